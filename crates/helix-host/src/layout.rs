// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the pixels of a FRAME_REQUEST lie: its fields, checked before a pixel is looked at.

use gst_video::VideoFormat;
use helix_protocol::message::{FrameRequest, PixelFormat};

use crate::picture::MAX_SIDE;

/// A picture's size, format, planes and rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// As the protocol names it.
    pub pixels: PixelFormat,
    /// As GStreamer does.
    pub format: VideoFormat,
    /// Bytes from row to row, of each plane.
    pub strides: Vec<i32>,
    /// Where each plane begins.
    pub offsets: Vec<usize>,
    /// Bytes of the whole picture.
    pub size: usize,
}

impl Layout {
    /// The error says which field is wrong, and what would be right.
    pub fn of(request: &FrameRequest) -> Result<Self, String> {
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
        let pixels = PixelFormat::from_fourcc(request.format).ok_or_else(|| {
            format!(
                "FRAME_REQUEST: format is {:#010x}, must be AR24 (0x34325241), AB24 (0x34324241) \
                 or NV12 (0x3231564e)",
                request.format
            )
        })?;
        // Alpha of a desktop means nothing to a video: both formats stand for their x variant.
        let (format, stride) = match pixels {
            PixelFormat::Bgra => (VideoFormat::Bgrx, stride),
            PixelFormat::Rgba => (VideoFormat::Rgbx, stride),
            // Deployed hosts ignore the stride of NV12, and deployed clients send any.
            PixelFormat::Nv12 => (VideoFormat::Nv12, width),
        };
        let (rows, offsets) = if pixels == PixelFormat::Nv12 {
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
        let row = i32::try_from(stride).map_err(|_| {
            format!(
                "FRAME_REQUEST: stride is {stride}, must be at most {}",
                i32::MAX
            )
        })?;
        Ok(Self {
            width,
            height,
            pixels,
            format,
            strides: vec![row; offsets.len()],
            offsets,
            // Below 2^31 * 2^14.
            size: stride as usize * rows as usize,
        })
    }
}
