// SPDX-License-Identifier: MIT OR Apache-2.0

//! From pictures to buffers, without a copy where that is possible.

use std::os::fd::{AsFd, IntoRawFd};
use std::sync::Arc;

use gst::prelude::*;
use gst_allocators::prelude::*;
use gst_video::{VideoFrameExt, VideoFrameFlags, VideoFrameRef, VideoInfo, VideoMeta};
use qemu_display::{Canvas, Cursor, DmaBuf, Layout, Lease, Pixels, SharedFile};

use super::caps::{drm_video_format, video_format};

/// What downstream has agreed to.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    /// Of pictures in system memory.
    pub info: Option<VideoInfo>,
    /// Downstream knows `GstVideoMeta`: rows may lie as they like.
    pub any_layout: bool,
}

/// Makes buffers, and keeps what several of them share.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pool: Option<gst::BufferPool>,
    /// The memfd that was wrapped last.
    shared: Option<(Arc<SharedFile>, gst::Memory)>,
    /// The DMA-BUFs that were wrapped last.
    dmabuf: Option<(Arc<DmaBuf>, Vec<gst::Memory>)>,
}

/// A buffer, and whether its pixels were copied.
pub(super) struct Made {
    pub buffer: gst::Buffer,
    pub copied: bool,
}

struct Bytes(Arc<Canvas>);

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// A lease on its way downstream. GStreamer has no memory of no bytes.
struct Ticket(#[expect(dead_code, reason = "dropping it is its use")] Lease);

impl AsRef<[u8]> for Ticket {
    fn as_ref(&self) -> &[u8] {
        &[0]
    }
}

impl Buffers {
    /// Downstream has agreed to something else.
    pub fn reset(&mut self) {
        if let Some(pool) = self.pool.take() {
            // What is out comes back all the same. It fails for a pool that is not active.
            let _ = pool.set_active(false);
        }
        self.forget();
    }

    /// There is no picture any more: its memory is QEMU's alone, once downstream is done with it.
    pub fn forget(&mut self) {
        self.shared = None;
        self.dmabuf = None;
    }

    /// A buffer of these pixels, with `cursor` drawn into it. The error says what failed.
    pub fn make(
        &mut self,
        pixels: &Pixels,
        terms: &Terms,
        cursor: Option<&Cursor>,
    ) -> Result<Made, String> {
        let as_it_is = |layout: &Layout, info: &VideoInfo| {
            let as_usual = usize::try_from(info.stride()[0]) == Ok(layout.stride as usize);
            cursor.is_none() && (terms.any_layout || as_usual)
        };
        let (mut buffer, copied, lease) = match (pixels, &terms.info) {
            (Pixels::Bytes { layout, canvas }, Some(info)) => {
                let lent = as_it_is(layout, info);
                let buffer = if lent {
                    let mut memory = gst::Memory::from_slice(Bytes(canvas.clone()));
                    memory
                        .get_mut()
                        .ok_or("new memory is shared")?
                        .resize(..layout.bytes());
                    with_layout(memory, layout)?
                } else {
                    self.copy(info, pixels, cursor)?
                };
                (buffer, !lent, None)
            }
            (
                Pixels::Shared {
                    layout,
                    file,
                    offset,
                    lease,
                    busy,
                },
                Some(info),
            ) => {
                let lent = as_it_is(layout, info) && !busy;
                let buffer = if lent {
                    with_layout(self.share(file, *offset as usize, layout.bytes())?, layout)?
                } else {
                    self.copy(info, pixels, cursor)?
                };
                (buffer, !lent, Some(lease))
            }
            (Pixels::DmaBuf { buffer, lease }, None) => (self.dmabuf(buffer)?, false, Some(lease)),
            // Done with it here: the lease ends with the picture.
            (Pixels::DmaBuf { .. }, Some(info)) => (self.copy(info, pixels, cursor)?, true, None),
            (_, None) => return Err("nothing is agreed on".to_owned()),
        };
        if let Some(lease) = lease {
            let ticket = gst::Buffer::from_slice(Ticket(lease.clone()));
            let buffer = buffer.get_mut().ok_or("a new buffer is shared")?;
            gst::ParentBufferMeta::add(buffer, &ticket);
        }
        Ok(Made { buffer, copied })
    }

    /// A buffer of our own with a picture, with `cursor` drawn into it.
    fn copy(
        &mut self,
        info: &VideoInfo,
        pixels: &Pixels,
        cursor: Option<&Cursor>,
    ) -> Result<gst::Buffer, String> {
        let pool = match &self.pool {
            Some(pool) => pool,
            None => self.pool.insert(make_pool(info)?),
        };
        let failed = |error: gst::glib::BoolError| error.to_string();
        let mut buffer = pool
            .acquire_buffer(None)
            .map_err(|error| format!("no buffer from the pool: {error}"))?;
        let inner = buffer.get_mut().ok_or("the pool gave a shared buffer")?;
        let mut frame = VideoFrameRef::from_buffer_ref_writable(inner, info).map_err(failed)?;
        let stride = frame.plane_stride()[0] as usize;
        let out = frame.plane_data_mut(0).map_err(failed)?;
        pixels
            .copy_to(out, stride)
            .map_err(|error| error.to_string())?;
        if let Some((cursor, layout)) = cursor.zip(pixels.layout()) {
            cursor.draw(layout.format, pixels.size(), out, stride);
        }
        drop(frame);
        Ok(buffer)
    }

    /// Part of a memfd. It is mapped once however many buffers are made of it.
    fn share(
        &mut self,
        file: &Arc<SharedFile>,
        offset: usize,
        bytes: usize,
    ) -> Result<gst::Memory, String> {
        let known = self.shared.take();
        let same = |(known, _): &(Arc<SharedFile>, _)| Arc::ptr_eq(known, file);
        let shared = if let Some(shared) = known.filter(same) {
            shared
        } else {
            (file.clone(), wrap_file(file, offset + bytes)?)
        };
        let whole = &self.shared.insert(shared).1;
        // A share is read-only: nobody downstream draws on the guest's screen.
        Ok(whole.share(offset..offset + bytes))
    }

    fn dmabuf(&mut self, buffer: &Arc<DmaBuf>) -> Result<gst::Buffer, String> {
        let known = self.dmabuf.take();
        let same = |(known, _): &(Arc<DmaBuf>, _)| Arc::ptr_eq(known, buffer);
        let wrapped = if let Some(wrapped) = known.filter(same) {
            wrapped
        } else {
            (buffer.clone(), wrap_planes(buffer)?)
        };
        let planes = &self.dmabuf.insert(wrapped).1;
        let mut made = gst::Buffer::new();
        let inner = made.get_mut().ok_or("a new buffer is shared")?;
        let (mut offsets, mut strides, mut before) = (Vec::new(), Vec::new(), 0);
        for (plane, memory) in buffer.planes.iter().zip(planes) {
            inner.append_memory(memory.share(..));
            offsets.push(before + plane.offset as usize);
            strides.push(plane.stride as i32);
            before += memory.size();
        }
        // Other formats have no description of their memory but the caps' modifier.
        if let Some(format) = drm_video_format(buffer.fourcc) {
            let (width, height) = (buffer.width, buffer.height);
            let flags = VideoFrameFlags::empty();
            VideoMeta::add_full(inner, flags, format, width, height, &offsets, &strides)
                .map_err(|error| error.to_string())?;
        }
        Ok(made)
    }
}

/// A buffer of memory in which rows lie as `layout` says.
fn with_layout(memory: gst::Memory, layout: &Layout) -> Result<gst::Buffer, String> {
    let mut buffer = gst::Buffer::new();
    let inner = buffer.get_mut().ok_or("a new buffer is shared")?;
    inner.append_memory(memory);
    VideoMeta::add_full(
        inner,
        VideoFrameFlags::empty(),
        video_format(layout.format),
        layout.width,
        layout.height,
        &[0],
        &[layout.stride as i32],
    )
    .map_err(|error| error.to_string())?;
    Ok(buffer)
}

/// The first `bytes` of a memfd.
fn wrap_file(file: &SharedFile, bytes: usize) -> Result<gst::Memory, String> {
    let fd = file
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| format!("no descriptor: {error}"))?;
    let flags = gst_allocators::FdMemoryFlags::KEEP_MAPPED;
    let allocator = gst_allocators::FdAllocator::new();
    // SAFETY: the descriptor is open, and belongs to the memory from here on.
    let memory = unsafe { allocator.alloc_fd(fd.into_raw_fd(), bytes, flags) };
    memory.map_err(|error| error.to_string())
}

fn wrap_planes(buffer: &DmaBuf) -> Result<Vec<gst::Memory>, String> {
    let allocator = gst_allocators::DmaBufAllocator::new();
    let wrap = |plane: &qemu_display::Plane| {
        let fd = plane
            .fd
            .try_clone()
            .map_err(|error| format!("no descriptor: {error}"))?;
        // SAFETY: the descriptor is open, and belongs to the memory from here on.
        let memory = unsafe { allocator.alloc_dmabuf(fd, plane.size as usize) };
        memory.map_err(|error| error.to_string())
    };
    buffer.planes.iter().map(wrap).collect()
}

fn make_pool(info: &VideoInfo) -> Result<gst::BufferPool, String> {
    let failed = |error: gst::glib::BoolError| error.to_string();
    let pool = gst_video::VideoBufferPool::new();
    let caps = info.to_caps().map_err(failed)?;
    let size = u32::try_from(info.size()).map_err(|error| error.to_string())?;
    let mut config = pool.config();
    config.set_params(Some(&caps), size, 0, 0);
    config.add_option(gst_video::BUFFER_POOL_OPTION_VIDEO_META);
    pool.set_config(config).map_err(failed)?;
    pool.set_active(true).map_err(failed)?;
    Ok(pool.upcast())
}
