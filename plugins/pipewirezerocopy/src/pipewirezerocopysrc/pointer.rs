// SPDX-License-Identifier: MIT OR Apache-2.0

//! The pointer, where the producer sends it beside the picture: as an overlay.

use crate::capture::PixelFormat;
use crate::capture::geometry::Region;
use crate::capture::meta::{Cursor, CursorBitmap};

/// The format of overlays (`GST_VIDEO_OVERLAY_COMPOSITION_FORMAT_RGB`).
const OVERLAY_FORMAT: gst_video::VideoFormat = if cfg!(target_endian = "little") {
    gst_video::VideoFormat::Bgra
} else {
    gst_video::VideoFormat::Argb
};

/// The pointer as it is now, and where it was last seen.
#[derive(Debug, Default)]
pub(super) struct Pointer {
    cursor: Cursor,
    overlay: Option<gst_video::VideoOverlayComposition>,
    /// The picture in it, kept while the pointer only moves.
    pixels: Option<gst::Buffer>,
    /// What the last picture that left has of it.
    shown: Option<Region>,
    changed: bool,
    /// See [`Self::is_known`].
    known: bool,
}

impl Pointer {
    /// There is news of it.
    pub fn update(&mut self, cursor: Cursor) {
        if cursor.bitmap != self.cursor.bitmap {
            self.pixels = cursor.bitmap.as_deref().and_then(pixels);
        }
        self.cursor = cursor;
        self.changed = true;
        self.known = true;
        self.overlay = self.draw();
    }

    /// Its producer is gone.
    pub fn forget(&mut self) {
        self.update(Cursor::default());
        self.known = false;
    }

    /// Whether the producer has told of it. One that is hidden may show up at any time.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// The overlay that draws it, if it is to be seen.
    pub fn overlay(&self) -> Option<&gst_video::VideoOverlayComposition> {
        self.overlay.as_ref()
    }

    /// A picture of that size leaves, with the pointer as it is. Returns what of the picture changes
    /// because of it: where the pointer was, and where it is.
    pub fn leaves(&mut self, width: u32, height: u32) -> Vec<Region> {
        let now = self.overlay.as_ref().and(self.region(width, height));
        let before = std::mem::replace(&mut self.shown, now);
        if !std::mem::take(&mut self.changed) {
            return Vec::new();
        }
        before.into_iter().chain(now).collect()
    }

    fn draw(&self) -> Option<gst_video::VideoOverlayComposition> {
        let (bitmap, (left, top)) = (self.cursor.bitmap.as_ref()?, self.corner()?);
        let rectangle = gst_video::VideoOverlayRectangle::new_raw(
            self.pixels.as_ref()?,
            left,
            top,
            bitmap.width,
            bitmap.height,
            gst_video::VideoOverlayFormatFlags::PREMULTIPLIED_ALPHA,
        );
        gst_video::VideoOverlayComposition::new([&rectangle]).ok()
    }

    /// Where its picture's left upper corner is. None for positions that no screen has.
    fn corner(&self) -> Option<(i32, i32)> {
        let hotspot = self.cursor.bitmap.as_ref()?.hotspot;
        let one_way = |position: i32, hotspot: i32| {
            let at = position.checked_sub(hotspot)?;
            (-32_768..=32_767).contains(&at).then_some(at)
        };
        Some((
            one_way(self.cursor.position.0, hotspot.0)?,
            one_way(self.cursor.position.1, hotspot.1)?,
        ))
    }

    /// The part of a picture of that size that it covers.
    fn region(&self, width: u32, height: u32) -> Option<Region> {
        let (bitmap, (left, top)) = (self.cursor.bitmap.as_ref()?, self.corner()?);
        let one_way = |at: i32, length: u32, limit: u32| {
            // Neither is anywhere near the end of i32.
            let end = (at + length as i32).min(limit as i32);
            let start = at.max(0);
            (end > start).then_some((start, (end - start) as u32))
        };
        let (x, width) = one_way(left, bitmap.width, width)?;
        let (y, height) = one_way(top, bitmap.height, height)?;
        Some(Region {
            x,
            y,
            width,
            height,
        })
    }
}

/// A pointer's picture in the format of overlays.
fn pixels(bitmap: &CursorBitmap) -> Option<gst::Buffer> {
    let order = byte_order(bitmap.format)?;
    let mut pixels = vec![0; bitmap.pixels.len()];
    let pairs = pixels.as_chunks_mut::<4>().0.iter_mut();
    for (to, from) in pairs.zip(bitmap.pixels.as_chunks::<4>().0) {
        *to = order.map(|byte| byte.map_or(u8::MAX, |byte| from[byte]));
    }
    let mut buffer = gst::Buffer::from_mut_slice(pixels);
    gst_video::VideoMeta::add(
        buffer.get_mut()?,
        gst_video::VideoFrameFlags::empty(),
        OVERLAY_FORMAT,
        bitmap.width,
        bitmap.height,
    )
    .ok()?;
    Some(buffer)
}

/// Which bytes of a pixel make the bytes of an overlay's pixel; none where there is no alpha.
fn byte_order(format: PixelFormat) -> Option<[Option<usize>; 4]> {
    let (name, wanted) = (format.name(), OVERLAY_FORMAT.to_str());
    if name.len() != 4 {
        return None;
    }
    let mut order = [None; 4];
    for (slot, letter) in order.iter_mut().zip(wanted.chars()) {
        *slot = name.find(letter);
    }
    Some(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn cursor(x: i32, y: i32) -> Cursor {
        Cursor {
            position: (x, y),
            bitmap: Some(Arc::new(CursorBitmap {
                format: PixelFormat::Rgba,
                width: 2,
                height: 1,
                hotspot: (1, 0),
                pixels: vec![1, 2, 3, 4, 5, 6, 7, 8],
            })),
        }
    }

    fn region(x: i32, y: i32, width: u32, height: u32) -> Region {
        Region {
            x,
            y,
            width,
            height,
        }
    }

    #[test]
    fn colours_are_put_into_the_order_of_overlays() {
        gst::init().unwrap();
        let buffer = pixels(cursor(0, 0).bitmap.as_deref().unwrap()).unwrap();
        let expected: [u8; 8] = if cfg!(target_endian = "little") {
            [3, 2, 1, 4, 7, 6, 5, 8]
        } else {
            [4, 1, 2, 3, 8, 5, 6, 7]
        };
        assert_eq!(buffer.map_readable().unwrap().as_slice(), expected);
    }

    #[test]
    fn what_changes_is_where_it_was_and_where_it_is() {
        gst::init().unwrap();
        let mut pointer = Pointer::default();
        assert!(pointer.leaves(16, 8).is_empty(), "there is none");
        pointer.update(cursor(5, 3));
        assert_eq!(pointer.leaves(16, 8), [region(4, 3, 2, 1)]);
        assert!(pointer.leaves(16, 8).is_empty(), "it has not moved");
        pointer.update(cursor(0, 0));
        assert_eq!(
            pointer.leaves(16, 8),
            [region(4, 3, 2, 1), region(0, 0, 1, 1)]
        );
        pointer.update(cursor(16, 8));
        assert_eq!(pointer.leaves(16, 8), [region(0, 0, 1, 1)], "outside");
        pointer.update(Cursor::default());
        assert!(pointer.overlay().is_none());
    }

    #[test]
    fn a_hidden_pointer_is_known_until_its_producer_is_gone() {
        gst::init().unwrap();
        let mut pointer = Pointer::default();
        assert!(!pointer.is_known());
        pointer.update(cursor(5, 3));
        pointer.update(Cursor::default());
        assert!(pointer.overlay().is_none() && pointer.is_known());
        pointer.update(cursor(5, 3));
        pointer.forget();
        assert!(pointer.overlay().is_none() && !pointer.is_known());
    }

    #[test]
    fn positions_that_no_screen_has_are_not_drawn() {
        gst::init().unwrap();
        let mut pointer = Pointer::default();
        for (x, y) in [(i32::MIN, 0), (0, i32::MAX)] {
            pointer.update(cursor(x, y));
            assert!(pointer.overlay().is_none());
            assert!(pointer.leaves(16, 8).is_empty());
        }
    }
}
