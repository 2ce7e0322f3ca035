// SPDX-License-Identifier: MIT OR Apache-2.0

//! A raw video frame in memory: where its rows lie, checked against the memory before anything
//! is read or said of it. Nothing is mapped in here.
//!
//! What lies where is said by the caps, overruled by `GstVideoMeta` (strides, offsets, a larger
//! frame in memory) and narrowed by `GstVideoCropMeta`, which costs no copy: rows begin later.

use std::fmt;
use std::sync::Arc;

use helix_protocol::message::PixelFormat;

use crate::dmabuf;
use crate::virtgpu::{Resource, Resources};

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
    /// Whether there are pixels between its rows that nobody should see.
    pub is_cropped: bool,
}

/// Why a frame cannot go as a resource id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unnamed {
    /// Its memory is something else.
    NoDmaBuf,
    /// virtio-gpu does not know the memory.
    Foreign,
    /// The protocol says neither where in a resource a picture begins, nor the strides and planes
    /// of NV12, nor an odd size of it.
    Unsayable,
    /// The resource is smaller than the picture.
    TooSmall,
}

impl fmt::Display for Unnamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoDmaBuf => "its memory is no DMA-BUF",
            Self::Foreign => "its DMA-BUF is not a resource of this virtio-gpu device",
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
        // What the host takes was compared with the caps.
        if width > info.width() || height > info.height() {
            return Err(format!(
                "a crop to {width}x{height} is larger than the {}x{} of its caps",
                info.width(),
                info.height()
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
            is_cropped: width != full.0,
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
    pub fn resource(&self, device: &dyn Resources) -> Result<Arc<Resource>, Unnamed> {
        let planes = self.planes();
        let (index, skip) = self.memory_of(&planes[0]).ok_or(Unnamed::Unsayable)?;
        let memory = self.buffer.peek_memory(index);
        let dmabuf = dmabuf::dmabuf(memory).ok_or(Unnamed::NoDmaBuf)?;
        if memory.offset() + skip != 0 || !self.is_sayable() {
            return Err(Unnamed::Unsayable);
        }
        let resource = dmabuf::resource(dmabuf, device).ok_or(Unnamed::Foreign)?;
        let begin = planes[0].offset;
        let end = planes
            .iter()
            .map(|plane| plane.offset - begin + plane.extent());
        if end.max() > Some(resource.size) {
            return Err(Unnamed::TooSmall);
        }
        Ok(resource)
    }

    /// Whether size, stride of the first plane and format are all that there is to say.
    fn is_sayable(&self) -> bool {
        let [first, second] = &self.planes;
        match self.format {
            PixelFormat::Bgra | PixelFormat::Rgba => true,
            // Hosts take NV12 as tight, whatever the stride field says (quirk 4).
            PixelFormat::Nv12 => {
                self.width % 2 + self.height % 2 == 0
                    && first.stride == first.row
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

#[cfg(test)]
mod tests {
    use gst_video::VideoFormat as V;

    use super::*;
    use crate::fake::{self, Device};

    fn info(format: V, width: u32, height: u32) -> gst_video::VideoInfo {
        gst::init().unwrap();
        gst_video::VideoInfo::builder(format, width, height)
            .build()
            .unwrap()
    }

    fn plane(offset: usize, stride: usize, row: usize, rows: usize) -> Plane {
        Plane {
            offset,
            stride,
            row,
            rows,
        }
    }

    /// A buffer of `size` bytes with a video meta.
    fn described(
        size: usize,
        format: V,
        (width, height): (u32, u32),
        offsets: &[usize],
        strides: &[i32],
    ) -> gst::Buffer {
        gst::init().unwrap();
        let mut buffer = gst::Buffer::from_mut_slice(vec![0; size]);
        gst_video::VideoMeta::add_full(
            buffer.get_mut().unwrap(),
            gst_video::VideoFrameFlags::empty(),
            format,
            width,
            height,
            offsets,
            strides,
        )
        .unwrap();
        buffer
    }

    fn cropped(mut buffer: gst::Buffer, rect: (u32, u32, u32, u32)) -> gst::Buffer {
        gst_video::VideoCropMeta::add(buffer.get_mut().unwrap(), rect);
        buffer
    }

    #[test]
    fn without_metadata_a_frame_lies_as_its_caps_say() {
        let info = info(V::Nv12, 6, 4);
        let buffer = gst::Buffer::from_mut_slice(vec![0; info.size()]);
        let picture = Picture::new(buffer, &info).unwrap();
        // GStreamer rounds strides up to four bytes.
        assert_eq!(picture.planes(), [plane(0, 8, 6, 4), plane(32, 8, 6, 2)]);
    }

    #[test]
    fn metadata_says_where_the_planes_are() {
        let buffer = described(1000, V::Nv12, (6, 4), &[100, 500], &[32, 64]);
        let picture = Picture::new(buffer, &info(V::Nv12, 6, 4)).unwrap();
        let planes = [plane(100, 32, 6, 4), plane(500, 64, 6, 2)];
        assert_eq!(picture.planes(), planes);
    }

    #[test]
    fn a_frame_may_lie_in_a_larger_one() {
        let buffer = described(64 * 32 * 4, V::Bgrx, (64, 32), &[0], &[256]);
        let picture = Picture::new(buffer, &info(V::Bgrx, 60, 20)).unwrap();
        assert_eq!((picture.width, picture.height), (60, 20));
        assert_eq!(picture.planes(), [plane(0, 256, 240, 20)]);
        assert!(picture.is_cropped);
        let buffer = described(64 * 32 * 4, V::Bgrx, (64, 32), &[0], &[256]);
        let picture = Picture::new(buffer, &info(V::Bgrx, 64, 20)).unwrap();
        assert!(!picture.is_cropped, "what is below it is not sent");
    }

    #[test]
    fn a_crop_moves_where_rows_begin() {
        let buffer = described(64 * 32 * 4, V::Bgrx, (64, 32), &[0], &[256]);
        let buffer = cropped(buffer, (10, 5, 20, 7));
        let picture = Picture::new(buffer, &info(V::Bgrx, 64, 32)).unwrap();
        assert_eq!((picture.width, picture.height), (20, 7));
        assert_eq!(picture.planes(), [plane(5 * 256 + 40, 256, 80, 7)]);
        assert!(picture.is_cropped);
    }

    #[test]
    fn a_crop_of_nv12_takes_the_chroma_of_each_pixel() {
        let size = 16 * 16 * 3 / 2;
        let crop = |rect| {
            let buffer = described(size, V::Nv12, (16, 16), &[0, 256], &[16, 16]);
            Picture::new(cropped(buffer, rect), &info(V::Nv12, 16, 16)).unwrap()
        };
        let even = [plane(2 * 16 + 4, 16, 8, 6), plane(256 + 16 + 4, 16, 8, 3)];
        assert_eq!(crop((4, 2, 8, 6)).planes(), even);
        let odd = [plane(3 * 16 + 5, 16, 7, 5), plane(256 + 16 + 4, 16, 8, 3)];
        assert_eq!(crop((5, 3, 7, 5)).planes(), odd);
        let corner = [
            plane(15 * 16 + 15, 16, 1, 1),
            plane(256 + 7 * 16 + 14, 16, 2, 1),
        ];
        assert_eq!(crop((15, 15, 1, 1)).planes(), corner);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let bgrx = |size, offset, stride| {
            let buffer = described(size, V::Bgrx, (16, 4), &[offset], &[stride]);
            Picture::new(buffer, &info(V::Bgrx, 16, 4)).is_ok()
        };
        assert!(bgrx(256, 0, 64));
        // The last row needs no padding behind it.
        assert!(bgrx(3 * 80 + 64, 0, 80));
        assert!(!bgrx(3 * 80 + 63, 0, 80));
        assert!(!bgrx(256, 1, 64));
        assert!(!bgrx(256, usize::MAX, 64));
        assert!(!bgrx(256, 0, 60), "rows overlap");
        assert!(!bgrx(256, 0, -64), "rows upwards");
        assert!(!bgrx(256, 0, i32::MAX));

        let crop = |rect| {
            let buffer = described(256, V::Bgrx, (16, 4), &[0], &[64]);
            Picture::new(cropped(buffer, rect), &info(V::Bgrx, 16, 4)).is_ok()
        };
        assert!(crop((15, 3, 1, 1)));
        for rect in [
            (0, 0, 17, 4),
            (1, 0, 16, 4),
            (0, 4, 1, 1),
            (0, 0, 0, 1),
            (u32::MAX, 0, 2, 1),
        ] {
            assert!(!crop(rect), "{rect:?}");
        }
        // A crop within the memory, and larger than the caps.
        let larger = |rect| {
            let buffer = described(1024, V::Bgrx, (16, 16), &[0], &[64]);
            Picture::new(cropped(buffer, rect), &info(V::Bgrx, 8, 8)).is_ok()
        };
        assert!(larger((8, 8, 8, 8)));
        assert!(!larger((0, 0, 9, 8)));
        assert!(!larger((0, 0, 8, 9)));
        // A buffer of other pixels than the caps say.
        let buffer = described(256, V::Rgba, (16, 4), &[0], &[64]);
        assert!(Picture::new(buffer, &info(V::Bgrx, 16, 4)).is_err());
        let small = described(256, V::Bgrx, (16, 4), &[0], &[64]);
        assert!(Picture::new(small, &info(V::Bgrx, 16, 5)).is_err());
        let short = gst::Buffer::from_slice([0; 16 * 16 * 4 - 1]);
        let error = Picture::new(short, &info(V::Bgrx, 16, 16)).unwrap_err();
        assert!(
            error.contains("its 1023 bytes do not hold 16x16 BGRx"),
            "{error}"
        );
    }

    #[test]
    fn planes_are_found_in_their_memories() {
        let info = info(V::Nv12, 8, 4);
        let mut buffer = gst::Buffer::new();
        let writable = buffer.get_mut().unwrap();
        writable.append_memory(gst::Memory::from_mut_slice(vec![0; 32]));
        writable.append_memory(gst::Memory::from_mut_slice(vec![0; 16]));
        let picture = Picture::new(buffer, &info).unwrap();
        let [luma, chroma] = picture.planes() else {
            panic!("two planes")
        };
        assert_eq!(picture.memory_of(luma), Some((0, 0)));
        assert_eq!(picture.memory_of(chroma), Some((1, 0)));
    }

    /// A buffer around a DMA-BUF that the device knows as resource 9.
    fn resource_of(size: usize) -> (Device, gst::Buffer) {
        let device = Device::new(1);
        let fd = fake::memfd(size);
        device.add(&fd, 9, size);
        let mut buffer = gst::Buffer::new();
        let memory = fake::dmabuf(fd, size);
        buffer.get_mut().unwrap().append_memory(memory);
        (device, buffer)
    }

    fn meta(
        mut buffer: gst::Buffer,
        format: V,
        (width, height): (u32, u32),
        offsets: &[usize],
        strides: &[i32],
    ) -> gst::Buffer {
        let flags = gst_video::VideoFrameFlags::empty();
        let writable = buffer.get_mut().unwrap();
        gst_video::VideoMeta::add_full(writable, flags, format, width, height, offsets, strides)
            .unwrap();
        buffer
    }

    fn named(
        buffer: gst::Buffer,
        info: &gst_video::VideoInfo,
        device: &Device,
    ) -> Result<u32, Unnamed> {
        let picture = Picture::new(buffer, info).unwrap();
        Ok(picture.resource(device)?.id.get())
    }

    #[test]
    fn a_picture_at_the_begin_of_a_resource_has_its_id() {
        let packed = info(V::Bgrx, 16, 8);
        let (device, buffer) = resource_of(16 * 8 * 4);
        assert_eq!(named(buffer, &packed, &device), Ok(9));
        // Taller, with longer rows, and cropped at the far sides.
        let (device, buffer) = resource_of(80 * 64);
        let buffer = meta(buffer, V::Bgrx, (20, 64), &[0], &[80]);
        assert_eq!(
            named(cropped(buffer, (0, 0, 16, 8)), &packed, &device),
            Ok(9)
        );
        // The first part of a memory.
        let (device, buffer) = resource_of(4096);
        let mut part = gst::Buffer::new();
        let memory = buffer.peek_memory(0).share(0..16 * 8 * 4);
        part.get_mut().unwrap().append_memory(memory);
        assert_eq!(named(part, &packed, &device), Ok(9));
    }

    #[test]
    fn a_picture_further_on_in_a_resource_has_none() {
        let packed = info(V::Bgrx, 16, 8);
        let (device, buffer) = resource_of(4096);
        let later = meta(buffer.copy(), V::Bgrx, (16, 8), &[64], &[64]);
        assert_eq!(named(later, &packed, &device), Err(Unnamed::Unsayable));
        let below = cropped(
            meta(buffer.copy(), V::Bgrx, (16, 9), &[0], &[64]),
            (0, 1, 16, 8),
        );
        assert_eq!(named(below, &packed, &device), Err(Unnamed::Unsayable));
        let mut part = gst::Buffer::new();
        let memory = buffer.peek_memory(0).share(64..4096);
        part.get_mut().unwrap().append_memory(memory);
        assert_eq!(named(part, &packed, &device), Err(Unnamed::Unsayable));
    }

    #[test]
    fn nv12_has_an_id_where_it_is_tight() {
        let even = info(V::Nv12, 16, 8);
        let nv12 = |size, offsets: &[usize], strides: &[i32], info: &gst_video::VideoInfo| {
            let (device, buffer) = resource_of(size);
            let sides = (info.width(), info.height());
            named(
                meta(buffer, V::Nv12, sides, offsets, strides),
                info,
                &device,
            )
        };
        assert_eq!(nv12(4096, &[0, 16 * 8], &[16, 16], &even), Ok(9));
        let unsayable = Err(Unnamed::Unsayable);
        assert_eq!(nv12(4096, &[0, 16 * 16], &[16, 16], &even), unsayable);
        assert_eq!(nv12(4096, &[0, 16 * 8], &[16, 32], &even), unsayable);
        assert_eq!(nv12(4096, &[0, 32 * 8], &[32, 32], &even), unsayable);
        let odd = info(V::Nv12, 15, 8);
        assert_eq!(nv12(4096, &[0, 16 * 8], &[16, 16], &odd), unsayable);
    }

    #[test]
    fn a_resource_is_not_said_to_hold_more_than_it_does() {
        let packed = info(V::Bgrx, 16, 8);
        let fd = fake::memfd(4096);
        let device = Device::new(1);
        device.add(&fd, 9, 16 * 8 * 4 - 1);
        let mut buffer = gst::Buffer::new();
        let memory = fake::dmabuf(fd, 4096);
        buffer.get_mut().unwrap().append_memory(memory);
        assert_eq!(named(buffer, &packed, &device), Err(Unnamed::TooSmall));
    }

    #[test]
    fn other_memory_has_no_id() {
        let packed = info(V::Bgrx, 16, 8);
        let device = Device::new(1);
        let system = gst::Buffer::from_mut_slice(vec![0; packed.size()]);
        assert_eq!(named(system, &packed, &device), Err(Unnamed::NoDmaBuf));
        let mut foreign = gst::Buffer::new();
        let memory = fake::dmabuf(fake::memfd(4096), 4096);
        foreign.get_mut().unwrap().append_memory(memory);
        assert_eq!(named(foreign, &packed, &device), Err(Unnamed::Foreign));
    }
}
