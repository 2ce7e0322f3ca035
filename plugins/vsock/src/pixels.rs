// SPDX-License-Identifier: MIT OR Apache-2.0

//! The pixels of a picture, sent from where they lie.
//!
//! The protocol wants BGRA and RGBA as `stride * height` bytes, and NV12 tight: `width * height`
//! bytes of Y, then the UV rows, whatever the stride field says (quirk 4 of docs/protocol.md).
//! Frames in memory may have padding after each row, be a part of a larger frame, or odd in size.
//! Rows that do not lie as the protocol wants them are gathered by a vectored write, not copied. Only
//! where a plane lies in several memories does GStreamer copy the buffer, to map it in one piece.

use std::io::IoSlice;

use gst::buffer::{MappedBuffer, Readable};
use gst::memory::MappedMemory;
use helix_protocol::connection::Body;
use helix_protocol::message::PixelFormat;

use crate::picture::Picture;

/// The rows of one plane, as they are sent.
#[derive(Clone, Copy, Debug)]
struct Plane {
    /// Index of the mapping.
    mapping: usize,
    /// Bytes from the mapping's begin to the first row.
    start: usize,
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

/// Memory that can be read. GStreamer brackets reads of a DMA-BUF by DMA_BUF_IOCTL_SYNC itself
/// (gst_dmabuf_mem_map), which also waits for whoever still writes to it.
enum Mapping {
    /// One of the buffer's.
    Memory(MappedMemory<gst::memory::Readable>),
    /// All of them in one piece, which GStreamer has to copy together: rows that begin in one
    /// memory and end in the next.
    Buffer(MappedBuffer<Readable>),
}

impl Mapping {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Memory(memory) => memory.as_slice(),
            Self::Buffer(buffer) => buffer.as_slice(),
        }
    }
}

/// A mapped picture, ready to be sent.
pub struct Pixels {
    planes: [Plane; 2],
    count: usize,
    mappings: [Option<Mapping>; 2],
    /// Pixels, as the request must say.
    pub width: u32,
    /// Pixels, as the request must say.
    pub height: u32,
    /// Bytes from one row of plane 0 to the next, as the request must say.
    pub stride: u32,
    /// Keeps the memory from being written again by whoever owns it. After the mappings, which
    /// end first.
    _buffer: gst::Buffer,
}

impl Pixels {
    /// Maps a picture for reading. What lies between its rows goes along only where the whole has
    /// at most `limit` bytes. Fails, with a reason for a person, where the picture cannot be
    /// mapped.
    pub fn new(picture: &Picture, limit: usize) -> Result<Self, String> {
        let nv12 = picture.format == PixelFormat::Nv12;
        // A chroma row is as long as an even luma row, and there is one for a last odd row.
        let odd = |side: u32| if nv12 { side % 2 } else { 0 };
        let (odd_width, odd_height) = (odd(picture.width), odd(picture.height));
        let mut mappings = [None, None];
        let mut memories = [None, None];
        let mut planes = [None, None];
        for (index, plane) in picture.planes().iter().enumerate() {
            let place = picture.memory_of(plane);
            let memory = place.map(|(memory, _)| memory);
            // A memory is mapped once, whatever lies in it.
            let mapping = if index > 0 && memories[0] == Some(memory) {
                0
            } else {
                mappings[index] = Some(map(picture, memory)?);
                memories[index] = Some(memory);
                index
            };
            let (repeated_byte, repeated_row) = match index {
                0 => (odd_width as usize, odd_height as usize),
                _ => (0, 0),
            };
            planes[index] = Some(Plane {
                mapping,
                start: place.map_or(plane.offset, |(_, skip)| skip),
                stride: plane.stride,
                row: plane.row,
                repeated_byte,
                rows: plane.rows,
                repeated_row,
            });
        }
        for plane in planes.iter_mut().flatten() {
            let bytes = mappings[plane.mapping]
                .as_ref()
                .map_or(0, |it| it.bytes().len());
            let available = bytes.saturating_sub(plane.start);
            // The picture was checked against its buffer. Should a mapping be shorter all the
            // same, a slice out of range must not panic later.
            if available < plane.stride * (plane.rows - 1) + plane.row {
                return Err(format!("only {bytes} bytes of it can be mapped"));
            }
            let whole = plane.stride * plane.rows;
            if !nv12
                && !picture.is_cropped
                && available >= whole
                && plane.stride <= 2 * plane.row
                && whole <= limit
            {
                // One slice, the bytes between the rows included: the host skips them. Where
                // they are more than the pixels, sending them costs more than gathering; where
                // they are pixels that were cut off, nobody should see them.
                plane.row = plane.stride;
            }
        }
        let [Some(first), second] = planes else {
            return Err("it has no planes".to_owned());
        };
        Ok(Self {
            planes: [first, second.unwrap_or(first)],
            count: picture.planes().len(),
            mappings,
            width: picture.width + odd_width,
            height: picture.height + odd_height,
            stride: first.sent_row() as u32,
            _buffer: picture.buffer().clone(),
        })
    }

    fn bytes(&self, plane: &Plane) -> &[u8] {
        let mapping = self.mappings[plane.mapping].as_ref();
        // There is one for each plane since this was made.
        mapping.map_or(&[], |mapping| &mapping.bytes()[plane.start..])
    }
}

/// Maps one memory of a picture's buffer, or all of them.
fn map(picture: &Picture, memory: Option<usize>) -> Result<Mapping, String> {
    let failed = "its memory cannot be mapped for reading";
    match memory.map(|index| picture.buffer().memory(index)) {
        Some(memory) => memory
            .and_then(|memory| memory.into_mapped_memory_readable().ok())
            .map(Mapping::Memory)
            .ok_or_else(|| failed.to_owned()),
        None => picture
            .buffer()
            .clone()
            .into_mapped_buffer_readable()
            .map(Mapping::Buffer)
            .map_err(|_| failed.to_owned()),
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
            let data = self.bytes(plane);
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
    use helix_protocol::Agreement;

    use super::*;

    fn pixels_of(buffer: gst::Buffer, info: &gst_video::VideoInfo) -> Result<Pixels, String> {
        let limit = Agreement::legacy().max_pixels() as usize;
        Pixels::new(&Picture::new(buffer, info)?, limit)
    }

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
        let pixels = pixels_of(buffer, &tight).unwrap();
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
        assert_eq!(pixels.size(), Agreement::legacy().max_pixels() as usize);
        assert_eq!(pixels.stride, 4 * 4096);
    }

    /// Memory of bytes that are all different from their neighbours, and where it lies.
    fn memory(size: usize, first: usize) -> (gst::Memory, *const u8) {
        let bytes: Vec<u8> = (first..first + size).map(|i| (i % 251) as u8).collect();
        let place = bytes.as_ptr();
        (gst::Memory::from_slice(bytes), place)
    }

    #[test]
    fn several_memories_are_sent_from_where_they_lie() {
        gst::init().unwrap();
        let format = gst_video::VideoFormat::Nv12;
        let info = gst_video::VideoInfo::builder(format, 64, 48)
            .build()
            .unwrap();
        let (luma, luma_place) = memory(64 * 48, 0);
        let (chroma, chroma_place) = memory(64 * 24, 64 * 48);
        let mut buffer = gst::Buffer::new();
        buffer.get_mut().unwrap().append_memory(luma);
        buffer.get_mut().unwrap().append_memory(chroma);
        let pixels = pixels_of(buffer, &info).unwrap();
        let mut slices = [IoSlice::new(&[]); 4];
        assert_eq!(pixels.slices(0, &mut slices), 2);
        assert_eq!(slices[0].as_ptr(), luma_place);
        assert_eq!(slices[1].as_ptr(), chroma_place);
        let wanted: Vec<u8> = (0..64 * 72).map(|i| (i % 251) as u8).collect();
        assert_eq!(gather(&pixels, 0, 3), wanted);
    }

    #[test]
    fn rows_across_two_memories_are_right_too() {
        gst::init().unwrap();
        let format = gst_video::VideoFormat::Bgrx;
        let info = gst_video::VideoInfo::builder(format, 16, 4)
            .build()
            .unwrap();
        let mut buffer = gst::Buffer::new();
        buffer.get_mut().unwrap().append_memory(memory(100, 0).0);
        buffer.get_mut().unwrap().append_memory(memory(156, 100).0);
        let pixels = pixels_of(buffer, &info).unwrap();
        let wanted: Vec<u8> = (0..256).map(|i| (i % 251) as u8).collect();
        assert_eq!(gather(&pixels, 0, 3), wanted);
    }

    #[test]
    fn what_was_cropped_away_is_not_sent() {
        gst::init().unwrap();
        let format = gst_video::VideoFormat::Bgrx;
        let info = gst_video::VideoInfo::builder(format, 8, 8).build().unwrap();
        let (memory, place) = memory(8 * 8 * 4, 0);
        let mut buffer = gst::Buffer::new();
        buffer.get_mut().unwrap().append_memory(memory);
        gst_video::VideoCropMeta::add(buffer.get_mut().unwrap(), (1, 2, 6, 5));
        let pixels = pixels_of(buffer, &info).unwrap();
        assert_eq!((pixels.width, pixels.height, pixels.stride), (6, 5, 24));
        assert_eq!(pixels.size(), 6 * 5 * 4);
        let mut slices = [IoSlice::new(&[]); 8];
        assert_eq!(pixels.slices(0, &mut slices), 5);
        // Not copied: it begins in the memory that came in.
        assert_eq!(slices[0].as_ptr(), place.wrapping_add(2 * 32 + 4));
        let wanted: Vec<u8> = (2..7)
            .flat_map(|y| (32 * y + 4..32 * y + 28).map(|i: usize| (i % 251) as u8))
            .collect();
        assert_eq!(gather(&pixels, 0, 8), wanted);
    }

    #[test]
    fn a_buffer_stays_as_long_as_its_pixels() {
        gst::init().unwrap();
        let format = gst_video::VideoFormat::Bgrx;
        let info = gst_video::VideoInfo::builder(format, 16, 4)
            .build()
            .unwrap();
        let mut buffer = gst::Buffer::from_mut_slice(vec![0; 256]);
        let pixels = pixels_of(buffer.clone(), &info).unwrap();
        assert!(buffer.get_mut().is_none(), "others have it");
        drop(pixels);
        assert!(buffer.get_mut().is_some());
    }
}
