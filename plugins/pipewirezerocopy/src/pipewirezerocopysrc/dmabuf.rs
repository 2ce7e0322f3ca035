// SPDX-License-Identifier: MIT OR Apache-2.0

//! DMA-BUFs on their way out: waited for, wrapped as they are, or read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_allocators::prelude::*;
use gst_video::prelude::*;
use zerocopy_plugin_common::wait::{Deadline, Waiter, Wake};

use super::abilities::{Refusal, Use};
use super::gpu::drm_format;
use super::imp::{CAT, PipeWireZeroCopySrc, lock};
use super::output::{Takes, write_rgba};
use crate::capture::dmabuf::{Block, DmaBufPicture, DmaBuffer, Fence, IMPLICIT, MAX_PLANES, Plane};
use crate::capture::frame::{Frame, Lease};
use crate::capture::{PixelFormat, StreamFormat};
use crate::egl::{self, Display, Image, Reader};

/// What draws into a DMA-BUF is done by then, or never will be: a display's worst frame takes some
/// hundred milliseconds.
const WRITERS_LIMIT: Duration = Duration::from_secs(1);

impl PipeWireZeroCopySrc {
    /// Waits, cancellably, until what a frame needs has happened. Off the loop thread: the
    /// compositor goes on meanwhile (lesson L20). False where it has not happened in time: whoever
    /// looked at such a frame would see it half drawn, or wait in the kernel, without a limit.
    #[inline(never)]
    pub(super) fn wait_for(
        &self,
        fence: &Fence,
        waiter: &mut Waiter,
    ) -> Result<bool, gst::FlowError> {
        match until_none(|| fence.pending(), waiter, WRITERS_LIMIT) {
            Ok(Waited::Done) => Ok(true),
            Ok(Waited::Cancelled) => Err(gst::FlowError::Flushing),
            Ok(Waited::TooLong) => {
                gst::warning!(
                    CAT,
                    imp = self,
                    "a frame is dropped: it was still being drawn after {WRITERS_LIMIT:?}"
                );
                Ok(false)
            }
            Err(error) => {
                gst::warning!(
                    CAT,
                    imp = self,
                    "a frame is dropped: waiting for what draws it failed: {error}"
                );
                Ok(false)
            }
        }
    }

    /// Does without DMA-BUFs of that kind from now on, and negotiates again.
    #[cold]
    pub(super) fn refuse(&self, format: &StreamFormat, what: Use, reason: &str) {
        let Some(modifier) = format.modifier else {
            return;
        };
        let text = format!(
            "DMA-BUFs of {} {}: {reason}",
            describe(format.format, modifier),
            match what {
                Use::PassOn => "cannot be passed on",
                Use::Read => "cannot be read",
                Use::Cuda => "cannot be copied into CUDA memory",
            }
        );
        gst::warning!(CAT, imp = self, "{text}");
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.can.refused.push(Refusal {
                format: format.format,
                modifier,
                what,
            });
            streaming.fallback = Some(text);
        }
        self.obj().src_pad().mark_reconfigure();
    }

    /// Copies a frame that only the GPU can read. The error says why it cannot either.
    #[inline(never)]
    pub(super) fn read_by_gpu(
        &self,
        frame: &Frame,
        buffer: &mut gst::Buffer,
        info: &gst_video::VideoInfo,
    ) -> Result<(), String> {
        let picture = frame.dmabuf().ok_or("it is no DMA-BUF")?;
        let (display, reader) = match &mut *lock(&self.streaming) {
            Some(streaming) => (streaming.display.clone(), streaming.reader.take()),
            None => return Err("stopped".into()),
        };
        let display = display.ok_or("there is no GPU that could read it")?;
        // Nothing is locked while the GPU works.
        let mut reader = match reader {
            Some(reader) => reader,
            None => Reader::new(&display).map_err(|error| error.to_string())?,
        };
        let result = import(picture, frame.layout.format, &display).and_then(|image| {
            let ((x, y), layout) = (frame.layout.origin, &frame.layout);
            reader.read(&image, x, y, layout.width, layout.height)
        });
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.reader = Some(reader);
        }
        let rgba = result.map_err(|error| error.to_string())?;
        write_rgba(&rgba, buffer, info).map_err(|error| error.to_string())
    }
}

/// How a wait for descriptors has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    Done,
    TooLong,
    Cancelled,
}

/// Waits until nothing is `pending`: descriptors that become readable.
pub(super) fn until_none<'fd>(
    pending: impl Fn() -> Option<BorrowedFd<'fd>>,
    waiter: &mut Waiter,
    limit: Duration,
) -> io::Result<Waited> {
    let deadline = Deadline::after(limit);
    while let Some(fd) = pending() {
        if deadline.has_passed() {
            return Ok(Waited::TooLong);
        }
        // A timeline's eventfd is writable at any time.
        let ended = waiter
            .register_for_reading(fd)
            .and_then(|()| waiter.wait(deadline));
        // Whatever came of it: the descriptor is not ours to watch any longer.
        let _ = waiter.deregister(fd);
        if ended? == Wake::Cancelled {
            return Ok(Waited::Cancelled);
        }
    }
    Ok(Waited::Done)
}

/// A format and a modifier for people.
pub(super) fn describe(format: PixelFormat, modifier: u64) -> String {
    drm_format(format, modifier).unwrap_or_else(|| format!("{} without a modifier", format.name()))
}

/// An import that is kept with its buffer.
struct Imported {
    image: Arc<Image>,
    /// What was imported. A producer should not move a picture in its buffer, but can.
    planes: Vec<Plane>,
}

/// What EGL is told of the picture.
pub(super) fn with_dmabuf<T>(
    picture: &DmaBufPicture,
    format: PixelFormat,
    use_it: impl FnOnce(&egl::DmaBuf<'_>) -> T,
) -> T {
    let planes = picture.planes().iter().map(|plane| egl::Plane {
        fd: picture.buffer.blocks()[plane.block].as_fd(),
        offset: plane.offset,
        stride: plane.stride,
    });
    let planes: Vec<_> = planes.collect();
    use_it(&egl::DmaBuf {
        fourcc: format.fourcc(),
        modifier: Some(picture.modifier).filter(|modifier| *modifier != IMPLICIT),
        width: picture.size.0,
        height: picture.size.1,
        planes: &planes,
    })
}

/// The picture as an image on a GPU, imported once for each buffer.
fn import(
    picture: &DmaBufPicture,
    format: PixelFormat,
    display: &Display,
) -> Result<Arc<Image>, egl::Error> {
    let buffer = &picture.buffer;
    let make = || {
        let image = with_dmabuf(picture, format, |buffer| display.import(buffer))?;
        Ok(Imported {
            image: Arc::new(image),
            planes: picture.planes().to_vec(),
        })
    };
    let mut imported = buffer.keep(make)?;
    if imported.planes != picture.planes() {
        buffer.forget::<Imported>();
        imported = buffer.keep(make)?;
    }
    Ok(imported.image.clone())
}

/// The memories of a buffer, the same ones each time: who remembers something about one, such as an
/// import, finds it again.
struct Wrapped(Vec<gst::Memory>);

fn wrap(buffer: &DmaBuffer) -> Result<Wrapped, String> {
    let allocator = gst_allocators::DmaBufAllocator::new();
    let memories = buffer.blocks().iter().map(|block| {
        let fd = block
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| format!("no descriptor: {error}"))?;
        // SAFETY: The descriptor is open, and belongs to the memory from here on.
        unsafe { allocator.alloc_dmabuf(fd, block.size()) }.map_err(|error| error.to_string())
    });
    memories.collect::<Result<_, _>>().map(Wrapped)
}

/// A lease on its way downstream. GStreamer has no memory of no bytes.
struct Ticket(#[expect(dead_code, reason = "dropping it is its use")] Lease);

impl AsRef<[u8]> for Ticket {
    fn as_ref(&self) -> &[u8] {
        &[0]
    }
}

/// Has the PipeWire buffer whose memory a picture is in go back when the last copy of the picture is gone.
#[inline(never)]
pub(super) fn lend(picture: &mut gst::Buffer, lease: Lease) {
    if let Some(picture) = picture.get_mut() {
        let ticket = gst::Buffer::from_slice(Ticket(lease));
        gst::ParentBufferMeta::add(picture, &ticket);
    }
}

/// A frame's DMA-BUFs as a buffer, for which the frame's lease is to be [lent](lend). The error says why it
/// cannot leave so.
#[inline(never)]
pub(super) fn pass_on(
    frame: &Frame,
    info: &gst_video::VideoInfo,
    takes: Takes,
) -> Result<gst::Buffer, String> {
    let layout = &frame.layout;
    let picture = frame.dmabuf().ok_or("it is no DMA-BUF")?;
    let cropped = layout.origin != (0, 0) || (layout.width, layout.height) != picture.size;
    // Where rows are known, a crop is an offset that everybody understands.
    let says_crop = cropped && layout.planes().is_empty();
    if says_crop && !takes.crop {
        return Err(
            "it is cropped, which downstream does not understand (GstVideoCropMeta)".into(),
        );
    }
    let wrapped = picture.buffer.keep(|| wrap(&picture.buffer))?;
    let mut buffer = gst::Buffer::new();
    let writable = buffer.get_mut().ok_or("a new buffer is shared")?;
    for memory in &wrapped.0 {
        writable.append_memory(memory.clone());
    }
    let before = |block: usize| {
        picture.buffer.blocks()[..block]
            .iter()
            .map(Block::size)
            .sum::<usize>()
    };
    let (mut offsets, mut strides, mut count) = ([0; MAX_PLANES], [0; MAX_PLANES], 0);
    let rows = layout.planes().iter();
    let rows = rows.map(|plane| (plane.block, plane.offset, i32::try_from(plane.stride).ok()));
    let device = picture.planes().iter();
    let device = device.map(|plane| {
        (
            plane.block,
            plane.offset as usize,
            i32::try_from(plane.stride).ok(),
        )
    });
    let device = device.filter(|_| layout.planes().is_empty());
    for (block, offset, stride) in rows.chain(device) {
        offsets[count] = before(block) + offset;
        strides[count] = stride.ok_or("a stride beyond 2 GiB")?;
        count += 1;
    }
    let (width, height) = if says_crop {
        picture.size
    } else {
        (layout.width, layout.height)
    };
    gst_video::VideoMeta::add_full(
        writable,
        gst_video::VideoFrameFlags::empty(),
        info.format(),
        width,
        height,
        &offsets[..count],
        &strides[..count],
    )
    .map_err(|error| error.to_string())?;
    if says_crop {
        let (x, y) = layout.origin;
        gst_video::VideoCropMeta::add(writable, (x, y, layout.width, layout.height));
    }
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Waits for a pipe that has something in it, or not.
    fn waited(drawn: bool, cancelled: bool, limit: Duration) -> Waited {
        let (reader, mut writer) = io::pipe().unwrap();
        if drawn {
            writer.write_all(&[1]).unwrap();
        }
        let mut waiter = Waiter::new().unwrap();
        if cancelled {
            waiter.waker().cancel();
        }
        let pending = || {
            let mut poll = [nix::poll::PollFd::new(
                reader.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            let ready = nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO).unwrap();
            (ready == 0).then(|| reader.as_fd())
        };
        until_none(pending, &mut waiter, limit).unwrap()
    }

    #[test]
    fn what_is_not_drawn_in_time_is_told_from_what_is() {
        let short = Duration::from_millis(1);
        assert_eq!(waited(true, false, short), Waited::Done);
        assert_eq!(waited(false, false, short), Waited::TooLong);
    }

    #[test]
    fn a_wait_for_what_draws_can_be_cancelled() {
        assert_eq!(waited(false, true, Duration::MAX), Waited::Cancelled);
    }
}
