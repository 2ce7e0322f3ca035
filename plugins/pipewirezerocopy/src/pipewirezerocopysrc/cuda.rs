// SPDX-License-Identifier: MIT OR Apache-2.0

//! Frames that leave in CUDA memory: on which device, in whose context, from which pool, and what is
//! done when it does not work.

use std::sync::Arc;

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;
use zerocopy_plugin_common::wait::Waiter;

use super::CudaImport;
use super::abilities::Use;
use super::dmabuf::with_dmabuf;
use super::figures::WaitedBy;
use super::gpu::Downstream;
use super::gpu_queue::GpuQueue;
use super::imp::{CAT, PipeWireZeroCopySrc, lock};
use super::negotiation::has_memory;
use super::settings::Settings;
use super::streaming::{Negotiated, Streaming};
use crate::capture::StreamFormat;
use crate::capture::dmabuf::{Fence, Plane};
use crate::capture::frame::Frame;
use crate::cuda::{self, Error, Importer, Pool, Source, Stream, Way};

/// The way to begin with. Not measured: no GPU was to be had. `ci/gpu` prints the figures of both.
const BETTER: Way = Way::Image;

/// What copies frames, from the first time that CUDA memory is negotiated on.
pub(super) struct CudaOutput {
    /// Taken out while it works: nothing is locked then.
    importer: Option<GpuQueue<Importer>>,
    /// A pool of our own for the caps that were negotiated last.
    pool: Pool,
    stream: Arc<Stream>,
    context: cuda::Context,
}

/// Ends the import of a frame's buffer: where there is no CUDA memory any more, it would keep the context, and
/// with it memory of the GPU, until the producer takes its buffer away.
#[cold]
pub(super) fn forget_import(frame: &Frame) {
    if let Some(picture) = frame.dmabuf() {
        picture.buffer.forget::<Imported>();
    }
}

/// An import that is kept with its buffer.
struct Imported {
    source: Source,
    /// What was imported. A producer should not move a picture in its buffer, but can.
    planes: Vec<Plane>,
}

impl PipeWireZeroCopySrc {
    /// What downstream and the application say about CUDA, where CUDA memory is wanted. Calls downstream.
    pub(super) fn downstream(&self, settings: &Settings) -> Downstream {
        let wanted = settings.wanted().is_ok_and(|wanted| wanted.cuda);
        if !wanted || cuda::available().is_err() {
            return Downstream::default();
        }
        let (obj, pad) = (self.obj(), self.obj().src_pad().clone());
        let mut shared = cuda::shared_with(obj.upcast_ref(), pad.upcast_ref());
        Downstream {
            device: shared.next().map(|context| context.device()),
            only_cuda: Downstream::takes_only_cuda(&pad.peer_query_caps(None)),
        }
    }

    /// Finds or makes the context that is shared with downstream, and what copies into it. Calls
    /// downstream and the application.
    pub(super) fn prepare_cuda(
        &self,
        caps: &gst::Caps,
        info: &gst_video::VideoInfo,
    ) -> Result<(), Error> {
        let gpu = lock(&self.streaming)
            .as_ref()
            .and_then(|streaming| streaming.display.clone().zip(streaming.cuda_device));
        let (display, device) =
            gpu.ok_or_else(|| Error::Unavailable("there is no GPU of CUDA's".into()))?;
        let obj = self.obj();
        let (element, pad) = (obj.upcast_ref(), obj.src_pad().upcast_ref());
        let context = cuda::ensure(element, pad, &self.cuda, device)?;
        if let Some(other) = cuda::shared_with(element, pad).find(|other| *other != context) {
            gst::warning!(
                CAT,
                imp = self,
                "downstream has a CUDA context of its own, on device {}, and copies what comes from \
                 device {device} (cuda-device-id and render-node say which is used)",
                other.device()
            );
        }
        let before = lock(&self.streaming)
            .as_mut()
            .and_then(|streaming| streaming.cuda.take())
            .filter(|cuda| cuda.context == context);
        let (importer, stream, before) = if let Some(CudaOutput {
            importer: Some(importer),
            stream,
            pool,
            ..
        }) = before
        {
            (importer, stream, Some(pool))
        } else {
            gst::info!(CAT, imp = self, "CUDA device {}", context.device());
            let way = match lock(&self.settings).cuda_import {
                CudaImport::Auto => BETTER,
                CudaImport::EglImage => Way::Image,
                CudaImport::GlTexture => Way::Texture,
            };
            let importer = Importer::new(display, &context, way)?;
            let importer = GpuQueue::new(importer);
            (importer, Arc::new(Stream::new(&context)?), None)
        };
        let size =
            u32::try_from(info.size()).map_err(|_| Error::Refused("frames over 4 GiB".into()))?;
        // A new one takes memory and gives it back, to learn the layout, and the GPU stands still for that.
        let pool = match before.filter(|pool| pool.is_for(caps)) {
            Some(pool) => pool,
            None => Pool::new(&context, &stream, caps, size)?,
        };
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.cuda = Some(CudaOutput {
                importer: Some(importer),
                pool,
                stream,
                context,
            });
        }
        Ok(())
    }

    /// Takes downstream's pool if its context is ours, else our own.
    pub(super) fn decide_cuda(
        &self,
        query: &mut gst::query::Allocation,
        caps: &gst::Caps,
    ) -> Result<(), gst::LoggableError> {
        let prepared = match &*lock(&self.streaming) {
            Some(Streaming {
                cuda: Some(cuda), ..
            }) => Some((cuda.context.clone(), cuda.stream.clone(), cuda.pool.clone())),
            _ => None,
        };
        let (context, stream, own) =
            prepared.ok_or_else(|| gst::loggable_error!(CAT, "no CUDA context for {caps}"))?;
        let proposed = query.allocation_pools().next();
        let theirs = proposed.and_then(|(pool, size, min, max)| {
            // One is kept for keepalives, one is being filled, one is downstream.
            let enough = max == 0 || max >= min + 2;
            let size = size.max(own.size);
            let pool = pool.filter(|_| enough)?;
            let pool = Pool::of_downstream(pool, &context, &stream, caps, (size, min, max))?;
            has_memory(&pool.pool).then_some((pool, min, max))
        });
        gst::debug!(
            CAT,
            imp = self,
            "{} pool of CUDA memory",
            if theirs.is_some() {
                "downstream's"
            } else {
                "our own"
            }
        );
        let (pool, min, max) = theirs.unwrap_or((own, 0, 0));
        if query.allocation_pools().next().is_some() {
            query.set_nth_allocation_pool(0, Some(&pool.pool), pool.size, min, max);
        } else {
            query.add_allocation_pool(Some(&pool.pool), pool.size, min, max);
        }
        Ok(())
    }

    /// Copies a frame into a buffer of the pool, once it is drawn. When this returns, the producer may
    /// have its buffer back. Where it cannot be done with this frame, it will not be tried again so.
    #[inline(never)]
    pub(super) fn copy_to_cuda(
        &self,
        frame: &Frame,
        fence: Fence,
        buffer: &mut gst::Buffer,
        negotiated: &Negotiated,
        waiter: &mut Waiter,
    ) -> Result<Copied, gst::FlowError> {
        let Negotiated {
            source: format,
            info,
            ..
        } = negotiated;
        let importer = lock(&self.streaming)
            .as_mut()
            .and_then(|streaming| streaming.cuda.as_mut()?.importer.take());
        let Some(mut importer) = importer else {
            return Err(gst::FlowError::Flushing);
        };
        let before = importer.unfinished();
        let copied = match before.map_or(Ok(true), |before| self.wait_for(before, waiter)) {
            Ok(true) => {
                // Also where the GPU waits: what waits for the GPU then could not be interrupted.
                let drawn = || match fence.pending() {
                    Some(_) => self.wait_for(&fence, waiter),
                    None => Ok(true),
                };
                let mut gpu_waits = false;
                let picture = (info, format);
                let waits = &mut gpu_waits;
                let copied = copy(&mut importer, frame, &fence, buffer, picture, waits, drawn);
                if gpu_waits && !matches!(copied, Ok(Ok(Copied::Done(_)))) {
                    importer.leave_behind(fence);
                }
                copied
            }
            // Not this picture's fault: it is the newest one yet.
            Ok(false) => Ok(Ok(Copied::Not)),
            Err(stopped) => Ok(Err(stopped)),
        };
        let way = importer.way();
        if let Some(Streaming {
            cuda: Some(cuda), ..
        }) = &mut *lock(&self.streaming)
        {
            cuda.importer = Some(importer);
        }
        match copied {
            Ok(copied) => {
                if matches!(copied, Ok(Copied::Done(_))) {
                    lock(&self.figures).way = Some(way);
                }
                copied
            }
            Err(error) => {
                self.give_up_cuda(format, &error)?;
                Ok(Copied::Not)
            }
        }
    }

    /// Does without CUDA memory for a frame that cannot come into it. An error, which is told, where it
    /// was asked for by name, and nothing else may take its place.
    #[cold]
    pub(super) fn give_up_cuda(
        &self,
        format: &StreamFormat,
        error: &Error,
    ) -> Result<(), gst::FlowError> {
        self.do_without_cuda(format, error);
        let can = lock(&self.streaming).as_ref().map(|s| s.can.caps());
        if can.is_some_and(|caps| caps.is_empty()) {
            return self.fail(gst::error_msg!(
                gst::ResourceError::Failed,
                ["frames cannot be copied into CUDA memory: {error}"]
            ));
        }
        Ok(())
    }

    /// Does without CUDA memory from now on: for this kind of DMA-BUFs, or for all where the GPU
    /// cannot go on.
    pub(super) fn do_without_cuda(&self, format: &StreamFormat, error: &Error) {
        if let Error::Refused(reason) = error {
            return self.refuse(format, Use::Cuda, reason);
        }
        let text = format!("no CUDA memory any more: {error}");
        gst::warning!(CAT, imp = self, "{text}");
        let cuda = lock(&self.streaming).as_mut().and_then(|streaming| {
            streaming.can.cuda = false;
            streaming.fallback = Some(text);
            streaming.cuda.take()
        });
        // Here, where nothing is locked.
        drop(cuda);
        if matches!(error, Error::Lost(_)) {
            self.cuda.bury();
        }
        self.obj().src_pad().mark_reconfigure();
    }
}

/// What became of a frame.
pub(super) enum Copied {
    /// It is copied; who waited until it was drawn.
    Done(WaitedBy),
    /// What draws it has not ended in time, or its memory is gone.
    Corrupted,
    /// It cannot be copied so.
    Not,
}

/// Copies a frame. `drawn` returns when what the fence stands for has happened, and whether it has;
/// `gpu_waits` is set where the GPU was told to wait for it as well.
fn copy(
    importer: &mut Importer,
    frame: &Frame,
    fence: &Fence,
    buffer: &mut gst::Buffer,
    (info, format): (&gst_video::VideoInfo, &StreamFormat),
    gpu_waits: &mut bool,
    drawn: impl FnOnce() -> Result<bool, gst::FlowError>,
) -> Result<Result<Copied, gst::FlowError>, Error> {
    let refused = |text: &str| Error::Refused(text.to_owned());
    let context = importer.context().clone();
    let picture = frame.dmabuf().ok_or_else(|| refused("no DMA-BUF"))?;
    let kept = &picture.buffer;
    let mut import = || {
        kept.keep(|| {
            let source = with_dmabuf(picture, format.format, |dmabuf| importer.prepare(dmabuf))?;
            Ok::<_, Error>(Imported {
                source,
                planes: picture.planes().to_vec(),
            })
        })
    };
    let mut known = import()?;
    if known.planes != picture.planes() || !known.source.is_of(&context) {
        kept.forget::<Imported>();
        known = import()?;
    }
    let buffer = buffer
        .get_mut()
        .ok_or_else(|| refused("the pool's buffer is in use"))?;
    let size = (info.width(), info.height());
    let files = fence.sync_files();
    let begun = importer.begin(&known.source, frame.layout.origin, size, &files)?;
    *gpu_waits = begun.waits();
    let waited = match (*gpu_waits, fence.pending()) {
        (true, _) => WaitedBy::Gpu,
        (false, Some(_)) => WaitedBy::Thread,
        (false, None) => WaitedBy::Nobody,
    };
    match drawn() {
        Ok(true) => begun.copy(buffer, info).map(|()| Ok(Copied::Done(waited))),
        Ok(false) => Ok(Ok(Copied::Corrupted)),
        Err(stopped) => Ok(Err(stopped)),
    }
}
