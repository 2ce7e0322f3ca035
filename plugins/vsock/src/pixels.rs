// SPDX-License-Identifier: MIT OR Apache-2.0

//! The pixels of a raw video frame, sent from where they lie.
//!
//! The protocol wants BGRA and RGBA as `stride * height` bytes, and NV12 tight: `width * height`
//! bytes of Y, then the UV rows, whatever the stride field says (quirk 4 of docs/protocol.md).
//! Frames in memory may have padding after each row, or be odd in size. Rows that do not lie as
//! the protocol wants them are gathered by a vectored write; none is ever copied.

use std::io::IoSlice;

use gst_video::prelude::*;
use helix_protocol::Limits;
use helix_protocol::connection::Body;
use helix_protocol::message::PixelFormat;

/// The protocol's format for a raw video format. What GStreamer calls x is sent as alpha, and the
/// host does not look at it.
pub fn pixel_format(format: gst_video::VideoFormat) -> Option<PixelFormat> {
    use gst_video::VideoFormat as V;
    match format {
        V::Bgrx | V::Bgra => Some(PixelFormat::Bgra),
        V::Rgbx | V::Rgba => Some(PixelFormat::Rgba),
        V::Nv12 => Some(PixelFormat::Nv12),
        _ => None,
    }
}

/// The rows of one plane, as they are sent.
#[derive(Clone, Copy, Debug)]
struct Plane {
    /// Index of the plane in the frame.
    index: usize,
    /// Bytes from one row to the next in memory.
    stride: usize,
    /// Bytes of a row that are sent.
    row: usize,
    /// How often the last byte of a row is sent once more: 0 or 1.
    repeated_byte: usize,
    /// Rows in memory.
    rows: usize,
    /// How often the last row is sent once more: 0 or 1.
    repeated_row: usize,
}

impl Plane {
    fn sent_row(&self) -> usize {
        self.row + self.repeated_byte
    }

    fn size(&self) -> usize {
        self.sent_row() * (self.rows + self.repeated_row)
    }
}

/// A mapped frame, ready to be sent.
pub struct Pixels {
    frame: gst_video::VideoFrame<gst_video::video_frame::Readable>,
    planes: [Plane; 2],
    count: usize,
    /// Pixels, as the request must say.
    pub width: u32,
    /// Pixels, as the request must say.
    pub height: u32,
    /// Bytes from one row of plane 0 to the next, as the request must say.
    pub stride: u32,
    /// The format as the request must say.
    pub format: PixelFormat,
}

impl Pixels {
    /// Maps `buffer` for reading. Fails where it cannot be mapped or is smaller than `info` says.
    pub fn new(buffer: gst::Buffer, info: &gst_video::VideoInfo) -> Option<Self> {
        let format = pixel_format(info.format())?;
        let frame = gst_video::VideoFrame::from_buffer_readable(buffer, info).ok()?;
        let (width, height) = (frame.width(), frame.height());
        let stride = |index: usize| usize::try_from(frame.plane_stride()[index]).ok();
        let (w, h) = (width as usize, height as usize);
        let plane = |index, row, rows, repeated_byte, repeated_row| {
            Some(Plane {
                index,
                stride: stride(index)?,
                row,
                repeated_byte,
                rows,
                repeated_row,
            })
        };
        let (planes, count, sent_stride) = match format {
            PixelFormat::Bgra | PixelFormat::Rgba => {
                let mut plane = plane(0, 4 * w, h, 0, 0)?;
                let whole = plane.stride * plane.rows;
                if frame.plane_data(0).ok()?.len() >= whole
                    && plane.stride <= 2 * plane.row
                    && whole <= Limits::default().pixels as usize
                {
                    // One slice, the bytes between the rows included: the host skips them. Where
                    // they are more than the pixels, sending them costs more than gathering.
                    plane.row = plane.stride;
                }
                ([plane, plane], 1, plane.row)
            }
            PixelFormat::Nv12 => {
                let (odd_width, odd_height) = (w % 2, h % 2);
                // A chroma row is as long as an even luma row, and there is one for a last odd row.
                let luma = plane(0, w, h, odd_width, odd_height)?;
                let chroma = plane(1, w + odd_width, h.div_ceil(2), 0, 0)?;
                ([luma, chroma], 2, luma.sent_row())
            }
        };
        for plane in &planes[..count] {
            // from_buffer_readable() has checked this; a slice out of range must not panic later.
            let needed = plane.stride * (plane.rows - 1) + plane.row;
            if plane.row > plane.stride || frame.plane_data(plane.index as u32).ok()?.len() < needed
            {
                return None;
            }
        }
        let (odd_width, odd_height) = match format {
            PixelFormat::Nv12 => (width % 2, height % 2),
            _ => (0, 0),
        };
        Some(Self {
            planes,
            count,
            width: width + odd_width,
            height: height + odd_height,
            stride: sent_stride as u32,
            format,
            frame,
        })
    }
}

impl Body for Pixels {
    fn size(&self) -> usize {
        self.planes[..self.count].iter().map(Plane::size).sum()
    }

    fn slices<'a>(&'a self, mut offset: usize, slices: &mut [IoSlice<'a>]) -> usize {
        let mut used = 0;
        for plane in &self.planes[..self.count] {
            if offset >= plane.size() {
                offset -= plane.size();
                continue;
            }
            // The plane was there when this was made, and the mapping does not change.
            let Ok(data) = self.frame.plane_data(plane.index as u32) else {
                return used;
            };
            if plane.row == plane.stride && plane.repeated_byte + plane.repeated_row == 0 {
                let Some(slot) = slices.get_mut(used) else {
                    return used;
                };
                *slot = IoSlice::new(&data[offset..plane.size()]);
                used += 1;
                offset = 0;
                continue;
            }
            while offset < plane.size() {
                let row = (offset / plane.sent_row()).min(plane.rows - 1);
                let from = offset % plane.sent_row();
                let start = plane.stride * row;
                let bytes = &data[start..start + plane.row];
                let part = if from < plane.row {
                    &bytes[from..]
                } else {
                    &bytes[plane.row - 1..]
                };
                let Some(slot) = slices.get_mut(used) else {
                    return used;
                };
                *slot = IoSlice::new(part);
                used += 1;
                offset += part.len();
            }
            offset = 0;
        }
        used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame whose bytes are all different from their neighbours, with `padding` bytes after
    /// each row, and the bytes the protocol wants for it.
    fn frame(format: gst_video::VideoFormat, w: u32, h: u32, padding: i32) -> (Pixels, Vec<u8>) {
        gst::init().unwrap();
        let tight = gst_video::VideoInfo::builder(format, w, h).build().unwrap();
        let nv12 = format == gst_video::VideoFormat::Nv12;
        let row = if nv12 {
            w.next_multiple_of(2) as i32
        } else {
            4 * w as i32
        };
        let stride = row + padding;
        let luma = stride as usize * h as usize;
        let chroma = if nv12 {
            stride as usize * h.div_ceil(2) as usize
        } else {
            0
        };
        let bytes: Vec<u8> = (0..luma + chroma).map(|i| (i % 251) as u8).collect();
        let mut buffer = gst::Buffer::from_slice(bytes.clone());
        let planes = if nv12 { 2 } else { 1 };
        gst_video::VideoMeta::add_full(
            buffer.get_mut().unwrap(),
            gst_video::VideoFrameFlags::empty(),
            format,
            w,
            h,
            &[0, luma][..planes],
            &[stride, stride][..planes],
        )
        .unwrap();
        let pixels = Pixels::new(buffer, &tight).unwrap();
        let mut wanted = Vec::new();
        let (stride, w, h) = (stride as usize, w as usize, h as usize);
        if nv12 {
            for y in (0..h).chain((h % 2 == 1).then_some(h - 1)) {
                wanted.extend_from_slice(&bytes[stride * y..stride * y + w]);
                if w % 2 == 1 {
                    wanted.push(bytes[stride * y + w - 1]);
                }
            }
            for y in 0..h.div_ceil(2) {
                let start = luma + stride * y;
                wanted.extend_from_slice(&bytes[start..start + w.next_multiple_of(2)]);
            }
        } else if stride > 2 * 4 * w {
            for row in bytes.chunks_exact(stride) {
                wanted.extend_from_slice(&row[..4 * w]);
            }
        } else {
            wanted = bytes;
        }
        (pixels, wanted)
    }

    fn gather(pixels: &Pixels, mut offset: usize, at_once: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while offset < pixels.size() {
            let mut slices = vec![IoSlice::new(&[]); at_once];
            let used = pixels.slices(offset, &mut slices);
            assert!(used >= 1 && !slices[0].is_empty());
            for slice in &slices[..used] {
                bytes.extend_from_slice(slice);
                offset += slice.len();
            }
        }
        bytes
    }

    #[test]
    fn rows_are_gathered_as_the_protocol_wants_them() {
        use gst_video::VideoFormat::{Bgrx, Nv12, Rgba};
        for format in [Bgrx, Rgba, Nv12] {
            for (w, h) in [(1, 1), (2, 2), (3, 5), (16, 9), (7, 4), (64, 48)] {
                for padding in [0, 2, 8] {
                    let (pixels, wanted) = frame(format, w, h, padding);
                    assert_eq!(pixels.size(), wanted.len(), "{format} {w}x{h}+{padding}");
                    for at_once in [1, 3, 256] {
                        assert_eq!(
                            gather(&pixels, 0, at_once),
                            wanted,
                            "{format} {w}x{h}+{padding}"
                        );
                    }
                    for offset in (0..wanted.len()).step_by(7) {
                        assert_eq!(gather(&pixels, offset, 2), wanted[offset..]);
                    }
                }
            }
        }
    }

    #[test]
    fn odd_nv12_goes_out_even() {
        let (pixels, wanted) = frame(gst_video::VideoFormat::Nv12, 3, 5, 0);
        assert_eq!((pixels.width, pixels.height, pixels.stride), (4, 6, 4));
        assert_eq!(wanted.len(), 4 * 6 * 3 / 2);
    }

    #[test]
    fn a_tight_or_padded_packed_frame_is_one_slice() {
        for padding in [0, 8] {
            let (pixels, wanted) = frame(gst_video::VideoFormat::Bgrx, 16, 9, padding);
            let mut slices = [IoSlice::new(&[]); 4];
            assert_eq!(pixels.slices(0, &mut slices), 1);
            assert_eq!(&*slices[0], wanted);
            assert_eq!(pixels.stride, 64 + padding as u32);
        }
    }

    #[test]
    fn padding_that_would_break_the_limit_is_not_sent() {
        let (pixels, _) = frame(gst_video::VideoFormat::Bgrx, 4096, 4096, 256);
        assert_eq!(pixels.size(), Limits::default().pixels as usize);
        assert_eq!(pixels.stride, 4 * 4096);
    }

    #[test]
    fn a_buffer_that_is_too_small_is_refused() {
        gst::init().unwrap();
        let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::Bgrx, 16, 16)
            .build()
            .unwrap();
        assert!(Pixels::new(gst::Buffer::from_slice([0; 16 * 16 * 4 - 1]), &info).is_none());
    }
}
