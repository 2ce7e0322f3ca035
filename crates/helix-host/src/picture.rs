// SPDX-License-Identifier: MIT OR Apache-2.0

//! Raw pictures on their way to an encoder: what a FRAME_REQUEST brings, checked and described
//! for GStreamer without a copy, and made large enough where an encoder needs that.

use gst_video::prelude::*;
use gst_video::{VideoFormat, VideoFrame, VideoFrameRef, VideoInfo, VideoMeta};
use helix_protocol::Payload;
use helix_protocol::message::{FrameRequest, PixelFormat};

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
    /// Takes the pixels of a FRAME_REQUEST over, without a copy: their memory goes back to the
    /// connection's decoder when the encoder is done with them.
    ///
    /// The error says which field is wrong, and what would be right.
    pub fn from_request(
        request: &FrameRequest,
        pixels: Payload,
        framerate: gst::Fraction,
    ) -> Result<Self, String> {
        let FrameRequest {
            width,
            height,
            stride,
            ..
        } = *request;
        for (field, value) in [("width", width), ("height", height)] {
            if !(1..=MAX_SIDE).contains(&value) {
                return Err(format!(
                    "FRAME_REQUEST: {field} is {value}, must be 1 to {MAX_SIDE}"
                ));
            }
        }
        let format = PixelFormat::from_fourcc(request.format).ok_or_else(|| {
            format!(
                "FRAME_REQUEST: format is {:#010x}, must be AR24 (0x34325241), AB24 (0x34324241) \
                 or NV12 (0x3231564e)",
                request.format
            )
        })?;
        // Alpha of a desktop means nothing to a video: both formats stand for their x variant.
        let (format, stride) = match format {
            PixelFormat::Bgra => (VideoFormat::Bgrx, stride),
            PixelFormat::Rgba => (VideoFormat::Rgbx, stride),
            // Deployed hosts ignore the stride of NV12, and deployed clients send any.
            PixelFormat::Nv12 => (VideoFormat::Nv12, width),
        };
        let (rows, offsets) = if format == VideoFormat::Nv12 {
            for (field, value) in [("width", width), ("height", height)] {
                if value % 2 != 0 {
                    return Err(format!(
                        "FRAME_REQUEST: {field} is {value}, must be even for NV12 (pad it)"
                    ));
                }
            }
            (height / 2 * 3, vec![0, width as usize * height as usize])
        } else {
            if stride < width * 4 {
                return Err(format!(
                    "FRAME_REQUEST: stride is {stride}, must be at least {} for a width of {width}",
                    width * 4
                ));
            }
            (height, vec![0])
        };
        let needed = u64::from(stride) * u64::from(rows);
        if (pixels.len() as u64) < needed {
            return Err(format!(
                "FRAME_REQUEST: {} bytes of pixels, {width}x{height} with a stride of {stride} \
                 needs {needed}",
                pixels.len()
            ));
        }
        let strides = vec![
            i32::try_from(stride).map_err(|_| {
                format!(
                    "FRAME_REQUEST: stride is {stride}, must be at most {}",
                    i32::MAX
                )
            })?;
            offsets.len()
        ];
        let info = VideoInfo::builder(format, width, height)
            .fps(framerate)
            .build()
            .map_err(|error| format!("FRAME_REQUEST: {error}"))?;
        let mut buffer = gst::Buffer::from_mut_slice(pixels);
        VideoMeta::add_full(
            buffer.make_mut(),
            gst_video::VideoFrameFlags::empty(),
            format,
            width,
            height,
            &offsets,
            &strides,
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
