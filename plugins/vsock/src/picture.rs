// SPDX-License-Identifier: MIT OR Apache-2.0

//! A raw video frame in memory: where its rows lie, checked against the memory before anything
//! is read or said of it. Nothing is mapped in here.
//!
//! What lies where is said by the caps, overruled by `GstVideoMeta` (strides, offsets, a larger
//! frame in memory) and narrowed by `GstVideoCropMeta`, which costs no copy: rows begin later.

use std::fmt;
use std::sync::Arc;

use helix_protocol::message::PixelFormat;

use crate::dmabuf::{self, KnownResource};
use crate::virtgpu::Resources;

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

/// The rows of one plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// Bytes from the buffer's begin to the first row.
    pub offset: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
    /// Bytes of a row that are pixels.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
}

impl Plane {
    /// Bytes from the first row's begin to the last row's end. Whoever makes a plane has checked
    /// that this is within the buffer.
    pub fn extent(&self) -> usize {
        self.stride * (self.rows - 1) + self.row
    }

    /// `None` where its end is more than `limit` bytes into the buffer, or its rows overlap.
    fn within(self, limit: usize) -> Option<Self> {
        let end = self
            .stride
            .checked_mul(self.rows.checked_sub(1)?)?
            .checked_add(self.row)?
            .checked_add(self.offset)?;
        (end <= limit && self.row <= self.stride).then_some(self)
    }
}

/// A frame and where its pixels lie. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Picture {
    buffer: gst::Buffer,
    planes: [Plane; 2],
    /// The format, as the protocol has it.
    pub format: PixelFormat,
    /// Pixels, after cropping.
    pub width: u32,
    /// Pixels, after cropping.
    pub height: u32,
    /// Whether there are pixels around it that nobody should see.
    pub is_cropped: bool,
}

/// Why a frame cannot go as a resource id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unnamed {
    /// Its memory is something else.
    NoDmaBuf,
    /// virtio-gpu does not know the memory.
    Foreign,
    /// The host could not use it before.
    Refused,
    /// The protocol says neither where in a resource a picture begins, nor where its second plane
    /// is, nor an odd size of NV12.
    Unsayable,
    /// The resource is smaller than the picture.
    TooSmall,
}

impl fmt::Display for Unnamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoDmaBuf => "its memory is no DMA-BUF",
            Self::Foreign => "its DMA-BUF is not a resource of this virtio-gpu device",
            Self::Refused => "the host could not use its resource before",
            Self::Unsayable => "a request cannot say where in its resource the picture lies",
            Self::TooSmall => "its resource is smaller than the picture",
        })
    }
}

impl Picture {
    /// Looks at where the pixels of a frame with these caps lie. Fails, with a reason for a
    /// person, where the buffer does not hold such a frame.
    pub fn new(buffer: gst::Buffer, info: &gst_video::VideoInfo) -> Result<Self, String> {
        let format = pixel_format(info.format())
            .ok_or_else(|| format!("format {} cannot be sent", info.format()))?;
        let count = plane_count(format);
        let meta = buffer.meta::<gst_video::VideoMeta>();
        let (full, offsets, strides) = match &meta {
            Some(meta) => {
                if pixel_format(meta.format()).is_some_and(|format_here| format_here != format) {
                    return Err(format!(
                        "its metadata says {}, its caps {}",
                        meta.format(),
                        info.format()
                    ));
                }
                ((meta.width(), meta.height()), meta.offset(), meta.stride())
            }
            None => ((info.width(), info.height()), info.offset(), info.stride()),
        };
        let crop = buffer
            .meta::<gst_video::VideoCropMeta>()
            .map(|meta| meta.rect());
        let (x, y, width, height) = crop.unwrap_or((0, 0, info.width(), info.height()));
        let fits = |at: u32, size: u32, limit: u32| {
            size > 0 && at.checked_add(size).is_some_and(|end| end <= limit)
        };
        if !fits(x, width, full.0) || !fits(y, height, full.1) {
            return Err(format!(
                "{width}x{height} at {x},{y} is not within its {}x{} in memory",
                full.0, full.1
            ));
        }
        let (x, y) = (x as usize, y as usize);
        let (w, h) = (width as usize, height as usize);
        let size = buffer.size();
        // The first pixel's place in a row, in bytes; the row; bytes of a row; rows.
        let plane = |index: usize, at: usize, first: usize, row: usize, rows: usize| {
            let stride = usize::try_from(*strides.get(index)?).ok()?;
            let offset = stride
                .checked_mul(first)?
                .checked_add(at)?
                .checked_add(*offsets.get(index)?)?;
            let plane = Plane {
                offset,
                stride,
                row,
                rows,
            };
            // With what is left of it, or the row would go on in the next one.
            plane.within(size).filter(|plane| at + plane.row <= stride)
        };
        let none = Plane {
            offset: 0,
            stride: 0,
            row: 0,
            rows: 0,
        };
        let planes = match format {
            PixelFormat::Bgra | PixelFormat::Rgba => {
                plane(0, 4 * x, y, 4 * w, h).map(|plane| [plane, none])
            }
            PixelFormat::Nv12 => {
                // Two rows, and two pixels of a row, share their chroma.
                let luma = plane(0, x, y, w, h);
                let chroma = plane(1, x / 2 * 2, y / 2, w.next_multiple_of(2), h.div_ceil(2));
                luma.zip(chroma).map(|(luma, chroma)| [luma, chroma])
            }
        };
        let planes = planes.ok_or_else(|| {
            format!(
                "its {size} bytes do not hold {width}x{height} {} at {x},{y} with strides \
                 {strides:?} and offsets {offsets:?}",
                info.format()
            )
        })?;
        debug_assert!(count <= planes.len());
        Ok(Self {
            planes,
            format,
            width,
            height,
            is_cropped: (width, height) != full && crop.is_some(),
            buffer,
        })
    }

    /// The buffer.
    pub fn buffer(&self) -> &gst::Buffer {
        &self.buffer
    }

    /// The planes: one of packed formats, two of NV12.
    pub fn planes(&self) -> &[Plane] {
        &self.planes[..plane_count(self.format)]
    }

    /// Which memory of the buffer a plane lies in, and where in it that begins; `None` where it
    /// lies in several.
    pub fn memory_of(&self, plane: &Plane) -> Option<(usize, usize)> {
        let range = plane.offset..plane.offset + plane.extent();
        let (memories, skip) = self.buffer.find_memory(range)?;
        (memories.len() == 1).then_some((memories.start, skip))
    }

    /// The first DMA-BUF among the memories of the buffer whose writers are not done.
    pub fn unready_memory(&self) -> Option<gst::Memory> {
        self.buffer.iter_memories_owned().find(|memory| {
            dmabuf::dmabuf(memory).is_some_and(|dmabuf| !dmabuf::is_ready(dmabuf::fd(dmabuf)))
        })
    }

    /// The resource that the picture is the begin of.
    pub fn resource(&self, device: &dyn Resources) -> Result<Arc<KnownResource>, Unnamed> {
        let planes = self.planes();
        let (index, skip) = self.memory_of(&planes[0]).ok_or(Unnamed::Unsayable)?;
        let memory = self.buffer.peek_memory(index);
        let dmabuf = dmabuf::dmabuf(memory).ok_or(Unnamed::NoDmaBuf)?;
        if memory.offset() + skip != 0 || !self.is_sayable() {
            return Err(Unnamed::Unsayable);
        }
        let known = dmabuf::resource(dmabuf, device).ok_or(Unnamed::Foreign)?;
        let begin = planes[0].offset;
        let end = planes
            .iter()
            .map(|plane| plane.offset - begin + plane.extent());
        if end.max() > Some(known.resource.size) {
            return Err(Unnamed::TooSmall);
        }
        if known.is_refused() {
            return Err(Unnamed::Refused);
        }
        Ok(known)
    }

    /// Whether size, stride of the first plane and format are all that there is to say.
    fn is_sayable(&self) -> bool {
        let [first, second] = &self.planes;
        match self.format {
            PixelFormat::Bgra | PixelFormat::Rgba => true,
            PixelFormat::Nv12 => {
                self.width % 2 + self.height % 2 == 0
                    && second.stride == first.stride
                    && second.offset == first.offset + first.stride * first.rows
                    && self.memory_of(first).map(|(index, _)| index)
                        == self.memory_of(second).map(|(index, _)| index)
            }
        }
    }
}

fn plane_count(format: PixelFormat) -> usize {
    match format {
        PixelFormat::Bgra | PixelFormat::Rgba => 1,
        PixelFormat::Nv12 => 2,
    }
}
