// SPDX-License-Identifier: MIT OR Apache-2.0

//! From a captured frame to a buffer: the producer's memory in place where that can be, else a copy.

use gst_video::prelude::*;

use crate::capture::PixelFormat;
use crate::capture::frame::Frame;
use crate::capture::meta::Transform;

/// What downstream's answer to the allocation query said.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Takes {
    /// Any stride and offset: it reads the GstVideoMeta.
    pub video_meta: bool,
    /// Overlays, which it draws itself.
    pub overlays: bool,
    /// A part of what is in memory: it reads the GstVideoCropMeta.
    pub crop: bool,
}

/// Whether a frame can leave as it lies: in memory that stays, as far as downstream understands the
/// layout, and without a byte that would have to be changed.
pub(super) fn can_leave_in_place(frame: &Frame, info: &gst_video::VideoInfo, takes: Takes) -> bool {
    opaque_at(frame.layout.format, info).is_none()
        && (takes.video_meta || has_default_layout(frame, info))
        && frame.is_mapped()
}

/// Whether rows and planes lie where those lie who do not know the GstVideoMeta: in one memory, as who maps
/// several at once has them copied into one.
fn has_default_layout(frame: &Frame, info: &gst_video::VideoInfo) -> bool {
    let offsets = frame.layout.offsets_in_extents();
    let first = frame.layout.extents().next();
    first.is_some_and(|extent| extent.len >= info.size())
        && frame
            .layout
            .planes()
            .iter()
            .enumerate()
            .all(|(index, plane)| {
                info.stride()[index] as usize == plane.stride
                    && info.offset()[index] == offsets[index]
            })
}

/// A frame as it lies, in read-only memory. Its PipeWire buffer goes back when the last reference to
/// that memory is gone. A layout that everybody expects is not told.
pub(super) fn in_place(frame: Box<Frame>, info: &gst_video::VideoInfo) -> Option<gst::Buffer> {
    let mut buffer = gst::Buffer::new();
    let writable = buffer.get_mut()?;
    if !has_default_layout(&frame, info) {
        tell_layout(&frame, writable, info)?;
    }
    frame.into_parts(|part| writable.append_memory(gst::Memory::from_slice(part)));
    Some(buffer)
}

/// Adds the meta that says where a frame's planes lie; none where that cannot be said.
#[inline(never)]
fn tell_layout(
    frame: &Frame,
    buffer: &mut gst::BufferRef,
    info: &gst_video::VideoInfo,
) -> Option<()> {
    let layout = &frame.layout;
    let planes = layout.planes();
    let mut strides = [0; crate::capture::geometry::MAX_PLANES];
    for (stride, plane) in strides.iter_mut().zip(planes) {
        *stride = i32::try_from(plane.stride).ok()?;
    }
    gst_video::VideoMeta::add_full(
        buffer,
        gst_video::VideoFrameFlags::empty(),
        info.format(),
        layout.width,
        layout.height,
        &layout.offsets_in_extents()[..planes.len()],
        &strides[..planes.len()],
    )
    .ok()?;
    Some(())
}

/// Copies a frame's rows, each once, into a buffer of `info`'s format. Padding becomes opaque
/// alpha where the output has alpha and the frame has not. False where the CPU cannot read the
/// frame, or its memory is no longer what it was.
pub(super) fn copy_frame(
    frame: &Frame,
    buffer: &mut gst::Buffer,
    info: &gst_video::VideoInfo,
) -> Result<bool, gst::glib::BoolError> {
    if frame.layout.planes().is_empty() {
        return Ok(false);
    }
    let mut out = writable(buffer, info)?;
    let opaque_at = opaque_at(frame.layout.format, info);
    let _access = frame.begin_cpu_access();
    for plane in 0..frame.layout.planes().len() {
        let stride = usize::try_from(out.plane_stride()[plane]).unwrap_or(0);
        let data = out.plane_data_mut(plane as u32)?;
        if !frame.copy_plane(plane, data, stride, opaque_at) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Fills a buffer of a packed format with pixels that come as R, G, B, A bytes, in rows without
/// padding.
pub(super) fn write_rgba(
    rgba: &[u8],
    buffer: &mut gst::Buffer,
    info: &gst_video::VideoInfo,
) -> Result<(), gst::glib::BoolError> {
    let order: Vec<usize> = info
        .format()
        .to_str()
        .bytes()
        .map(|letter| match letter {
            b'R' => 0,
            b'G' => 1,
            b'B' => 2,
            _ => 3,
        })
        .collect();
    let width = info.width() as usize;
    let mut out = writable(buffer, info)?;
    let stride = usize::try_from(out.plane_stride()[0]).unwrap_or(0);
    let rows = out.plane_data_mut(0)?.chunks_mut(stride.max(1));
    for (row, from) in rows.zip(rgba.chunks_exact(width * 4)) {
        let pixels = row.chunks_exact_mut(order.len());
        for (to, from) in pixels.zip(from.as_chunks::<4>().0) {
            for (byte, index) in to.iter_mut().zip(&order) {
                *byte = from[*index];
            }
        }
    }
    Ok(())
}

/// Copies a picture into `buffer` and draws `overlay` on it.
#[inline(never)]
pub(super) fn draw(
    picture: &gst::BufferRef,
    overlay: &gst_video::VideoOverlayCompositionRef,
    buffer: &mut gst::Buffer,
    info: &gst_video::VideoInfo,
) -> Result<(), gst::glib::BoolError> {
    let from = gst_video::VideoFrameRef::from_buffer_ref_readable(picture, info)?;
    let mut to = writable(buffer, info)?;
    from.copy(&mut to)?;
    make_opaque(overlay, &mut to)?;
    overlay.blend(&mut to)
}

/// Fills the padding of the pixels under `overlay`: GStreamer's blending takes it for alpha.
fn make_opaque(
    overlay: &gst_video::VideoOverlayCompositionRef,
    frame: &mut gst_video::VideoFrameRef<&mut gst::BufferRef>,
) -> Result<(), gst::glib::BoolError> {
    let format = PixelFormat::from_name(frame.format().to_str());
    let padding = format
        .filter(|format| format.alpha_byte().is_none())
        .and_then(PixelFormat::sibling)
        .and_then(PixelFormat::alpha_byte);
    let Some(padding) = padding else {
        return Ok(());
    };
    let (width, height) = (i64::from(frame.width()), i64::from(frame.height()));
    let stride = usize::try_from(frame.plane_stride()[0]).unwrap_or(0);
    let data = frame.plane_data_mut(0)?;
    for rectangle in overlay.iter() {
        let (x, y, w, h) = rectangle.render_rectangle();
        let range = |start: i32, length: u32, limit: i64| {
            let end = i64::from(start) + i64::from(length);
            i64::from(start).clamp(0, limit) as usize..end.clamp(0, limit) as usize
        };
        for row in range(y, h, height) {
            for column in range(x, w, width) {
                data[row * stride + column * 4 + padding] = u8::MAX;
            }
        }
    }
    Ok(())
}

fn writable<'a>(
    buffer: &'a mut gst::Buffer,
    info: &gst_video::VideoInfo,
) -> Result<gst_video::VideoFrameRef<&'a mut gst::BufferRef>, gst::glib::BoolError> {
    let buffer = buffer
        .get_mut()
        .ok_or_else(|| gst::glib::bool_error!("the pool's buffer is in use"))?;
    gst_video::VideoFrameRef::from_buffer_ref_writable(buffer, info)
}

/// The byte of each pixel that must become 255: what is padding in `format` and alpha in `info`.
fn opaque_at(format: PixelFormat, info: &gst_video::VideoInfo) -> Option<usize> {
    let sibling = format.sibling().filter(|_| format.alpha_byte().is_none());
    sibling
        .filter(|_| info.format_info().has_alpha())?
        .alpha_byte()
}

/// The value of the tag `image-orientation` that undoes what the producer did.
pub(super) fn orientation(transform: Transform) -> &'static str {
    // The tag says: mirror, then turn with the clock. Undoing a mirrored turn to the left takes
    // the turn to the right first; mirroring first instead makes it one to the left.
    match (transform.mirrored, transform.quarters) {
        (false, 1) => "rotate-90",
        (false, 2) => "rotate-180",
        (false, 3) => "rotate-270",
        (false, _) => "rotate-0",
        (true, 1) => "flip-rotate-270",
        (true, 2) => "flip-rotate-180",
        (true, 3) => "flip-rotate-90",
        (true, _) => "flip-rotate-0",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::capture::Counters;
    use crate::capture::tests::{frame_in_two_memories, frame_with_stride};

    #[test]
    fn planes_in_memories_of_their_own_are_mapped_where_they_are() {
        gst::init().unwrap();
        let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::Nv12, 8, 2);
        let info = info.build().unwrap();
        let frame = frame_in_two_memories(&Arc::new(Counters::default()));
        assert_eq!(frame.layout.offsets_in_extents()[1], info.offset()[1]);
        let buffer = in_place(frame, &info).unwrap();
        assert_eq!(buffer.n_memory(), 2);
        // Who knows no layout would have to copy them into one.
        assert!(buffer.meta::<gst_video::VideoMeta>().is_some());
        let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&buffer, &info).unwrap();
        for plane in 0..2 {
            let memory = buffer.peek_memory(plane).map_readable().unwrap();
            let data = frame.plane_data(plane as u32).unwrap();
            assert_eq!(data.as_ptr(), memory.as_ptr());
        }
    }

    #[test]
    fn a_layout_is_told_where_it_is_not_the_one_that_everybody_expects() {
        gst::init().unwrap();
        let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::Bgrx, 2, 2);
        let info = info.build().unwrap();
        let counters = Arc::new(Counters::default());
        for (stride, told) in [(8, None), (16, Some(16))] {
            let buffer = in_place(frame_with_stride(stride, &counters), &info).unwrap();
            let meta = buffer.meta::<gst_video::VideoMeta>();
            assert_eq!(meta.map(|meta| meta.stride()[0]), told);
            let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&buffer, &info).unwrap();
            assert_eq!(frame.plane_stride(), [stride]);
        }
    }
}
