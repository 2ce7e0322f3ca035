// SPDX-License-Identifier: MIT OR Apache-2.0

//! Raw pictures on their way to an encoder: what a FRAME_REQUEST brings, checked and described
//! for GStreamer without a copy, and made large enough where an encoder needs that.

use crate::layout::Layout;
use gst_video::prelude::*;
use gst_video::{VideoFrame, VideoFrameRef, VideoInfo, VideoMeta};

/// The longest side that is encoded, in pixels: what elements.md promises for vsockenc.
pub const MAX_SIDE: u32 = 8192;

/// A raw picture in system memory.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The pixels. Where the layout is not `info`'s own, a `GstVideoMeta` gives it.
    pub buffer: gst::Buffer,
    /// Size, format and frame rate.
    pub info: VideoInfo,
}

impl Picture {
    /// Takes the memory of a FRAME_REQUEST's pixels over, without a copy.
    ///
    /// The error says which field is wrong, and what would be right.
    pub fn new(
        layout: &Layout,
        mut buffer: gst::Buffer,
        framerate: gst::Fraction,
    ) -> Result<Self, String> {
        let Layout {
            width,
            height,
            format,
            ..
        } = *layout;
        if buffer.size() < layout.size {
            return Err(format!(
                "FRAME_REQUEST: {} bytes of pixels, {width}x{height} with a stride of {} needs {}",
                buffer.size(),
                layout.strides[0],
                layout.size
            ));
        }
        let info = VideoInfo::builder(format, width, height)
            .fps(framerate)
            .build()
            .map_err(|error| format!("FRAME_REQUEST: {error}"))?;
        VideoMeta::add_full(
            buffer.make_mut(),
            gst_video::VideoFrameFlags::empty(),
            format,
            width,
            height,
            &layout.offsets,
            &layout.strides,
        )
        .map_err(|error| format!("FRAME_REQUEST: {error}"))?;
        Ok(Self { buffer, info })
    }

    /// The same picture with sides of at least so many pixels. The edges are repeated to the
    /// right and downwards. A picture that fits already is not copied.
    pub fn at_least(self, minimum: (u32, u32)) -> Result<Self, String> {
        let (width, height) = (self.info.width(), self.info.height());
        let (wide, high) = (width.max(minimum.0), height.max(minimum.1));
        if (wide, high) == (width, height) {
            return Ok(self);
        }
        self.extended(wide, high)
            .map_err(|error| format!("cannot pad {width}x{height} to {wide}x{high}: {error}"))
    }

    fn extended(self, width: u32, height: u32) -> Result<Self, gst::glib::BoolError> {
        let info = VideoInfo::builder(self.info.format(), width, height)
            .fps(self.info.fps())
            .colorimetry(&self.info.colorimetry())
            .build()?;
        let from = VideoFrameRef::from_buffer_ref_readable(&self.buffer, &self.info)?;
        let buffer = gst::Buffer::with_size(info.size())?;
        let mut to = VideoFrame::from_buffer_writable(buffer, &info)
            .map_err(|_| gst::glib::bool_error!("new memory cannot be written"))?;
        let layout = info.format_info();
        for plane in 0..layout.n_planes() {
            let Some(component) = layout.plane().iter().position(|&p| p == plane) else {
                continue;
            };
            // Bytes of what is repeated: one pixel, or one pair of U and V.
            let unit = layout.pixel_stride()[component] as usize;
            let side = |info: &VideoInfo| {
                let component = component as u8;
                (
                    layout.scale_width(component, info.width()) as usize,
                    layout.scale_height(component, info.height()) as usize,
                )
            };
            let (from_columns, from_rows) = side(&self.info);
            let (to_columns, to_rows) = side(&info);
            let from_stride = from.plane_stride()[plane as usize] as usize;
            let to_stride = to.plane_stride()[plane as usize] as usize;
            let source = from.plane_data(plane)?;
            let target = to.plane_data_mut(plane)?;
            for row in 0..to_rows {
                let source = &source[row.min(from_rows - 1) * from_stride..];
                let target = &mut target[row * to_stride..];
                let (picture, margin) =
                    target[..to_columns * unit].split_at_mut(from_columns * unit);
                picture.copy_from_slice(&source[..from_columns * unit]);
                let last = &source[(from_columns - 1) * unit..from_columns * unit];
                for pixel in margin.chunks_exact_mut(unit) {
                    pixel.copy_from_slice(last);
                }
            }
        }
        drop(from);
        let mut buffer = to.into_buffer();
        let times = gst::BufferCopyFlags::TIMESTAMPS | gst::BufferCopyFlags::FLAGS;
        self.buffer.copy_into(buffer.make_mut(), times, ..)?;
        Ok(Self { buffer, info })
    }
}
