// SPDX-License-Identifier: MIT OR Apache-2.0

//! What becomes of a frame before it is submitted: when it may be read, and as what it may go.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_video::prelude::*;
use helix_protocol::message::PixelFormat;
use helix_protocol::wait::{Deadline, Wake};

use super::Transfer;
use super::imp::{CAT, VsockEnc, lock};
use super::settings::Settings;
use crate::dmabuf;
use crate::picture::{Picture, pixel_format};
use crate::session::{Format, Session};
use crate::virtgpu::{Node, Resource, Resources};

/// What draws into a DMA-BUF is done by then, or never will be: a display's worst frame takes some
/// hundred milliseconds.
const WRITERS_LIMIT: Duration = Duration::from_secs(1);

impl VsockEnc {
    /// Who tells the resources behind DMA-BUFs, as far as the settings want any.
    pub(super) fn find_resources(
        &self,
        settings: &Settings,
    ) -> Result<Option<Arc<dyn Resources>>, gst::ErrorMessage> {
        if settings.transfer == Transfer::Pixels {
            return Ok(None);
        }
        #[cfg(test)]
        if let Some(fake) = &*lock(&self.fake_resources) {
            return Ok(Some(fake.clone()));
        }
        match Node::find(settings.render_node.as_deref()) {
            Ok((node, path)) => {
                gst::info!(CAT, imp = self, "resource ids by {}", path.display());
                Ok(Some(Arc::new(node)))
            }
            Err(reason) if settings.transfer == Transfer::ResourceId => Err(gst::error_msg!(
                gst::ResourceError::OpenReadWrite,
                ["transfer=resource-id: {reason}; transfer=auto sends pixels here"]
            )),
            Err(reason) => {
                gst::info!(CAT, imp = self, "no resource ids: {reason}");
                Ok(None)
            }
        }
    }

    /// Whether who can have either memory should give DMA-BUFs. Where their pixels are read after
    /// all, their source would only wait longer for getting them back (L4).
    pub(super) fn prefers_dmabufs(&self) -> bool {
        let has_resources = lock(&self.streaming)
            .as_ref()
            .is_some_and(|streaming| streaming.resources.is_some());
        let asked = lock(&self.settings).transfer == Transfer::ResourceId;
        has_resources && (asked || lock(&self.output).resolves)
    }

    /// Takes down whether the host resolves resource ids. Upstream asked for caps before this was
    /// known, and may want to ask again.
    pub(super) fn set_resolves(&self, resolves: bool) {
        let before = self.prefers_dmabufs();
        lock(&self.output).resolves = resolves;
        if self.prefers_dmabufs() != before {
            // Fails where nobody is upstream yet: then nobody has asked.
            self.obj()
                .sink_pad()
                .push_event(gst::event::Reconfigure::new());
        }
    }

    /// The resource as which a picture may be sent. An error where it must and there is none.
    pub(super) fn resource(
        &self,
        picture: &Picture,
        resources: Option<&dyn Resources>,
    ) -> Result<Option<Arc<Resource>>, gst::FlowError> {
        let Some(resources) = resources else {
            return Ok(None);
        };
        match picture.resource(resources) {
            Ok(resource) => Ok(Some(resource)),
            Err(reason) if lock(&self.settings).transfer == Transfer::ResourceId => {
                gst::element_imp_error!(
                    self,
                    gst::StreamError::Encode,
                    [
                        "transfer=resource-id: a picture cannot go that way: {reason}; transfer=auto \
                      would send pixels"
                    ]
                );
                Err(gst::FlowError::Error)
            }
            Err(reason) => {
                gst::trace!(CAT, imp = self, "a picture goes as pixels: {reason}");
                Ok(None)
            }
        }
    }

    /// Waits, cancellably, until what draws into a picture's DMA-BUFs is done: neither a mapping
    /// nor, on the host, a resource shows the picture before. Whether it is: where not, nobody may
    /// map the picture, as the kernel would wait for the same, for ever and for no signal.
    pub(super) fn wait_for_writers(&self, picture: &Picture) -> Result<bool, gst::FlowError> {
        let deadline = Deadline::after(WRITERS_LIMIT);
        while let Some(memory) = picture.unready_memory() {
            if deadline.has_passed() {
                return Ok(false);
            }
            let Some(dmabuf) = dmabuf::dmabuf(&memory) else {
                return Ok(true);
            };
            let fd = dmabuf::fd(dmabuf);
            let ended = self.wait(|_, waiter| {
                let ended = waiter.register(fd).and_then(|()| waiter.wait(deadline));
                // Whatever came of it: the descriptor is not ours to watch any longer.
                let _ = waiter.deregister(fd);
                ended
            });
            match ended {
                None | Some(Ok(Wake::Cancelled)) => return Err(gst::FlowError::Flushing),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    gst::debug!(CAT, imp = self, "wait for what draws a picture: {error}");
                    return Ok(picture.unready_memory().is_none());
                }
            }
        }
        Ok(true)
    }

    /// Posts why the streaming thread could not wait.
    pub(super) fn cannot_wait(&self, reason: io::ErrorKind) -> gst::FlowError {
        gst::element_imp_error!(
            self,
            gst::ResourceError::Failed,
            [
                "wait for the host: {reason}; something else in this process may have closed a \
                 descriptor of this element. Stop the element and start it again"
            ]
        );
        gst::FlowError::Error
    }

    /// Bytes of pixels that a frame takes on its way; 0 where only resource ids may go.
    pub(super) fn pixels_of(&self, info: &gst_video::VideoInfo) -> usize {
        if lock(&self.settings).transfer == Transfer::ResourceId {
            return 0;
        }
        match pixel_format(info.format()) {
            Some(PixelFormat::Nv12) => nv12_bytes(info),
            _ => info.width() as usize * info.height() as usize * 4,
        }
    }

    /// Waits for the host and compares a frame with its limits. Where there is no host, the
    /// session says why, and compares with the next one.
    pub(super) fn check_limits(
        &self,
        info: &gst_video::VideoInfo,
        format: &Format,
    ) -> Result<(), String> {
        let Some(Ok(host)) = self.wait(Session::host) else {
            return Ok(());
        };
        let Some(mut reason) = format.refused_by(&host) else {
            return Ok(());
        };
        let as_nv12 = Format {
            pixels: nv12_bytes(info),
            ..*format
        };
        if format.pixels > as_nv12.pixels && as_nv12.refused_by(&host).is_none() {
            reason.push_str(", or send NV12");
        }
        Err(reason)
    }
}

/// Width and height of frames as they are sent, unless they are cropped. Odd sides of NV12 cannot be said (docs/protocol.md,
/// "Pixels"): the next even ones are sent.
pub(super) fn sent_size(info: &gst_video::VideoInfo) -> (u32, u32) {
    match pixel_format(info.format()) {
        Some(PixelFormat::Nv12) => even_size(info),
        _ => (info.width(), info.height()),
    }
}

fn even_size(info: &gst_video::VideoInfo) -> (u32, u32) {
    let even = |side: u32| side.next_multiple_of(2);
    (even(info.width()), even(info.height()))
}

/// Bytes of a frame, were it sent as NV12.
fn nv12_bytes(info: &gst_video::VideoInfo) -> usize {
    let (width, height) = even_size(info);
    width as usize * height as usize * 3 / 2
}
