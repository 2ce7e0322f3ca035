// SPDX-License-Identifier: MIT OR Apache-2.0

//! The metadata that comes with a buffer (`spa/buffer/meta.h`), checked.
//!
//! It lies in memory that the producer can write to at any time, so every item is read once, and
//! only the copy is looked at.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use libspa::param::video::VideoFormat;
use libspa::sys as spa_sys;

use super::format::PixelFormat;
use super::geometry::Region;
use super::timeline::{SPA_META_SYNC_TIMELINE, SyncTimelineMeta, UNSCHEDULED_RELEASE};

/// Greatest width and height of a pointer's picture in pixels: mutter sends up to 384.
pub const MAX_CURSOR: u32 = 512;

/// How a producer has turned a picture before it put it into the buffer
/// (`SPA_META_TRANSFORMATION_*`): mirrored or not, then so many quarter turns against the clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transform {
    /// Left and right were swapped first.
    pub mirrored: bool,
    /// Quarter turns against the clock, 0 to 3.
    pub quarters: u32,
}

/// A pointer's picture.
#[derive(Debug, PartialEq, Eq)]
pub struct CursorBitmap {
    /// One of 4 bytes for each pixel, with premultiplied alpha.
    pub format: PixelFormat,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// The pixel of it that points.
    pub hotspot: (i32, i32),
    /// Rows without padding.
    pub pixels: Vec<u8>,
}

/// The pointer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Where it points to, in the frame's pixels.
    pub position: (i32, i32),
    /// How it looks; none where it is hidden, or not known yet.
    pub bitmap: Option<Arc<CursorBitmap>>,
}

/// A buffer's metadata.
#[derive(Clone, Copy)]
pub(super) struct Metas<'a>(&'a [spa_sys::spa_meta]);

impl<'a> Metas<'a> {
    /// # Safety
    /// For `'a`, each entry's `data` must be null or point to `size` bytes that are mapped for reading
    /// and writing.
    pub unsafe fn new(metas: &'a [spa_sys::spa_meta]) -> Self {
        Self(metas)
    }

    fn find(&self, kind: u32) -> Option<Bytes> {
        let meta = self.0.iter().find(|meta| meta.type_ == kind)?;
        (!meta.data.is_null()).then_some(Bytes {
            address: meta.data.cast(),
            len: meta.size as usize,
        })
    }

    /// Flags and capture time.
    pub fn header(&self) -> Option<spa_sys::spa_meta_header> {
        // SAFETY: A structure of integers.
        unsafe { self.find(spa_sys::SPA_META_Header)?.read(0) }
    }

    /// The address at which it begins, if there is any.
    pub fn start(&self) -> Option<usize> {
        let starts = self.0.iter().map(|meta| meta.data.addr());
        starts.filter(|start| *start != 0).min()
    }

    /// Where is counted how many have the buffer; none where that is not.
    pub fn users(&self) -> Option<Users> {
        let bytes = self.find(spa_sys::SPA_META_Busy)?;
        let fits = bytes.len >= size_of::<spa_sys::spa_meta_busy>();
        let busy: *mut spa_sys::spa_meta_busy = bytes.address.cast();
        (fits && busy.is_aligned()).then_some(Users(busy))
    }

    /// When the buffer may be read and drawn into, where that is said by timelines.
    pub fn sync_timeline(&self) -> Option<SyncTimelineMeta> {
        // SAFETY: A structure of integers.
        unsafe { self.find(SPA_META_SYNC_TIMELINE)?.read(0) }
    }

    /// Promises to signal the release point, to a producer that asks for that.
    pub fn promise_release(&self) {
        let Some(bytes) = self.find(SPA_META_SYNC_TIMELINE) else {
            return;
        };
        // SAFETY: An integer.
        let flags: Option<u32> = unsafe { bytes.read(offset_of!(SyncTimelineMeta, flags)) };
        if let Some(flags) = flags.filter(|flags| flags & UNSCHEDULED_RELEASE != 0) {
            let flags = (flags & !UNSCHEDULED_RELEASE).to_ne_bytes();
            bytes.copy_in(offset_of!(SyncTimelineMeta, flags), &flags);
        }
    }

    /// The part of the buffer that is the picture.
    pub fn crop(&self) -> Option<Region> {
        // SAFETY: A structure of integers.
        unsafe { self.find(spa_sys::SPA_META_VideoCrop)?.read(0) }.map(region)
    }

    /// What has changed in the buffer; nothing where the producer does not say.
    pub fn damage(&self) -> impl Iterator<Item = Region> {
        let bytes = self.find(spa_sys::SPA_META_VideoDamage);
        let step = size_of::<spa_sys::spa_meta_region>();
        (0..super::damage::MAX_RECTS)
            // SAFETY: A structure of integers.
            .map_while(move |index| unsafe { bytes?.read(index * step) }.map(region))
            // An empty one ends the list.
            .take_while(|region| region.width > 0 && region.height > 0)
    }

    /// How the picture was turned.
    pub fn transform(&self) -> Transform {
        let bytes = self.find(spa_sys::SPA_META_VideoTransform);
        // SAFETY: A structure of integers.
        let meta: Option<spa_sys::spa_meta_videotransform> =
            bytes.and_then(|bytes| unsafe { bytes.read(0) });
        // 0 to 3 are turns, 4 to 7 the same after mirroring; there are no others.
        meta.filter(|meta| meta.transform < 8)
            .map_or_else(Transform::default, |meta| Transform {
                mirrored: meta.transform >= 4,
                quarters: meta.transform % 4,
            })
    }

    /// The pointer as it is now, given how it was; none where there is no news of it.
    pub fn cursor(&self, before: &Cursor) -> Option<Cursor> {
        let bytes = self.find(spa_sys::SPA_META_Cursor)?;
        // SAFETY: A structure of integers.
        let meta: spa_sys::spa_meta_cursor = unsafe { bytes.read(0) }?;
        if meta.id == 0 {
            return None;
        }
        let bitmap = match meta.bitmap_offset as usize {
            0 => before.bitmap.clone(),
            offset => bitmap(bytes, offset, (meta.hotspot.x, meta.hotspot.y)).map(Arc::new),
        };
        let cursor = Cursor {
            position: (meta.position.x, meta.position.y),
            bitmap,
        };
        (cursor != *before).then_some(cursor)
    }
}

/// PipeWire's count of those who have a buffer now: consumers, and the producer that draws into it. The
/// producer gets none that somebody has. Kept by itself, so that a look at all buffers touches no more
/// of each.
#[derive(Clone, Copy)]
pub(super) struct Users(*mut spa_sys::spa_meta_busy);

impl Users {
    /// How many have the buffer.
    ///
    /// # Safety
    /// The buffer must not be removed yet.
    pub unsafe fn count(self) -> u32 {
        // SAFETY: `Metas::users` has seen that it is aligned and fits in the bytes, which are mapped for as
        // long as the buffer is there. PipeWire, too, changes it as an atomic, here and in other processes.
        let count = unsafe { AtomicU32::from_ptr(&raw mut (*self.0).count) };
        count.load(Ordering::Relaxed)
    }
}

fn region(meta: spa_sys::spa_meta_region) -> Region {
    Region {
        x: meta.region.position.x,
        y: meta.region.position.y,
        width: meta.region.size.width,
        height: meta.region.size.height,
    }
}

/// The picture at `at` of a cursor's metadata; none where it is invisible, or cannot be.
#[inline(never)]
fn bitmap(bytes: Bytes, at: usize, hotspot: (i32, i32)) -> Option<CursorBitmap> {
    // SAFETY: A structure of integers.
    let meta: spa_sys::spa_meta_bitmap = unsafe { bytes.read(at) }?;
    let format = PixelFormat::from_spa(VideoFormat::from_raw(meta.format))?;
    let (width, height) = (meta.size.width, meta.size.height);
    let sized = (1..=MAX_CURSOR).contains(&width) && (1..=MAX_CURSOR).contains(&height);
    if format.sibling().is_none() || !sized || meta.offset == 0 {
        return None;
    }
    let row = width as usize * 4;
    let stride = match usize::try_from(meta.stride).ok()? {
        0 => row,
        stride => stride,
    };
    let mut pixels = vec![0; row * height as usize];
    for (index, out) in pixels.chunks_exact_mut(row).enumerate() {
        let skipped = index
            .checked_mul(stride)?
            .checked_add(meta.offset as usize)?;
        if stride < row || !bytes.copy_out(at.checked_add(skipped)?, out) {
            return None;
        }
    }
    Some(CursorBitmap {
        format,
        width,
        height,
        hotspot,
        pixels,
    })
}

/// Bytes of one item, which somebody else may write to.
#[derive(Clone, Copy)]
struct Bytes {
    address: *mut u8,
    len: usize,
}

impl Bytes {
    /// Copies bytes out from `offset` on; false where there are not as many.
    fn copy_out(self, offset: usize, out: &mut [u8]) -> bool {
        if offset
            .checked_add(out.len())
            .is_none_or(|end| end > self.len)
        {
            return false;
        }
        // SAFETY: In the bytes that are mapped (checked above); `Metas::new` vouches for those.
        // `out` is ours and cannot overlap them.
        unsafe {
            std::ptr::copy_nonoverlapping(self.address.add(offset), out.as_mut_ptr(), out.len());
        }
        true
    }

    /// Copies bytes to `offset` and what follows; false where there is no room for all.
    fn copy_in(self, offset: usize, bytes: &[u8]) -> bool {
        if offset
            .checked_add(bytes.len())
            .is_none_or(|end| end > self.len)
        {
            return false;
        }
        // SAFETY: In the bytes that are mapped (checked above), which `Metas::new` vouches for.
        // `bytes` is ours and cannot overlap them.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.add(offset), bytes.len());
        }
        true
    }

    /// A copy of the value at `offset`, if it fits.
    ///
    /// # Safety
    /// Every bit pattern must be a value of type T.
    unsafe fn read<T: Copy>(self, offset: usize) -> Option<T> {
        if offset
            .checked_add(size_of::<T>())
            .is_none_or(|end| end > self.len)
        {
            return None;
        }
        // SAFETY: In the bytes that are mapped, as above; unaligned reads ask nothing of the
        // address, and the contract makes a T of whatever is there.
        Some(unsafe { self.address.add(offset).cast::<T>().read_unaligned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An item of metadata of that kind with these words.
    fn meta(kind: u32, words: &mut [u32]) -> spa_sys::spa_meta {
        spa_sys::spa_meta {
            type_: kind,
            size: size_of_val(words) as u32,
            data: words.as_mut_ptr().cast(),
        }
    }

    fn cursor(words: &mut [u32], before: &Cursor) -> Option<Cursor> {
        let metas = [meta(spa_sys::SPA_META_Cursor, words)];
        // SAFETY: The words are there.
        unsafe { Metas::new(&metas) }.cursor(before)
    }

    /// A pointer of 2x1 pixels at 10, 20 in a row of 3.
    fn words() -> Vec<u32> {
        let bgra = PixelFormat::Bgra.spa().as_raw();
        // id, flags, position, hotspot, bitmap_offset; format, size, stride, offset; pixels
        vec![1, 0, 10, 20, 1, 0, 28, bgra, 2, 1, 12, 20, 0x11, 0x22]
    }

    #[test]
    fn a_pointer_is_read_and_then_moved() {
        let first = cursor(&mut words(), &Cursor::default()).unwrap();
        assert_eq!(first.position, (10, 20));
        let bitmap = first.bitmap.as_ref().unwrap();
        assert_eq!(
            (bitmap.width, bitmap.height, bitmap.hotspot),
            (2, 1, (1, 0))
        );
        assert_eq!(bitmap.pixels, [0x11, 0, 0, 0, 0x22, 0, 0, 0]);
        let moved = cursor(&mut [1, 0, 11, 20, 0, 0, 0], &first).unwrap();
        assert_eq!((moved.position, &moved.bitmap), ((11, 20), &first.bitmap));
        assert_eq!(
            cursor(&mut [1, 0, 11, 20, 0, 0, 0], &moved),
            None,
            "no news"
        );
        assert_eq!(cursor(&mut [0, 0, 9, 9, 0, 0, 0], &moved), None, "no news");
    }

    #[test]
    fn a_pointer_can_be_hidden() {
        let first = cursor(&mut words(), &Cursor::default()).unwrap();
        let mut empty = words();
        (empty[8], empty[9]) = (0, 0);
        assert_eq!(cursor(&mut empty, &first).unwrap().bitmap, None);
    }

    #[test]
    fn a_pointer_that_is_not_there_is_not_read() {
        for (index, value) in [
            (6, 8_000_000),
            (6, u32::MAX),
            (7, u32::MAX),
            (8, 3),
            (8, u32::MAX),
            (9, 2),
            (10, u32::MAX),
            (10, 4),
            (11, 0),
            (11, u32::MAX),
        ] {
            let mut lie = words();
            lie[index] = value;
            let read = cursor(&mut lie, &Cursor::default()).unwrap();
            assert_eq!(read.bitmap, None, "word {index} = {value}");
        }
        assert_eq!(cursor(&mut words()[..6], &Cursor::default()), None);
    }

    #[test]
    fn damage_ends_at_the_first_empty_rectangle() {
        let mut list = [1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 7, 8];
        let metas = [meta(spa_sys::SPA_META_VideoDamage, &mut list)];
        // SAFETY: The words are there.
        let metas = unsafe { Metas::new(&metas) };
        let expected = Region {
            x: 1,
            y: 2,
            width: 3,
            height: 4,
        };
        assert_eq!(metas.damage().collect::<Vec<_>>(), [expected]);
        // SAFETY: There is nothing.
        assert_eq!(unsafe { Metas::new(&[]) }.damage().count(), 0);
    }

    #[test]
    fn turns_that_do_not_exist_are_none() {
        for (value, mirrored, quarters) in
            [(0, false, 0), (3, false, 3), (5, true, 1), (8, false, 0)]
        {
            let mut words = [value];
            let metas = [meta(spa_sys::SPA_META_VideoTransform, &mut words)];
            // SAFETY: The word is there.
            let transform = unsafe { Metas::new(&metas) }.transform();
            assert_eq!(transform, Transform { mirrored, quarters });
        }
    }
}
