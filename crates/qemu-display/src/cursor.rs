// SPDX-License-Identifier: MIT OR Apache-2.0

//! The cursor, where QEMU sends it apart from the picture.

use std::sync::Arc;

use crate::damage::Rect;
use crate::error::Error;
use crate::format::PixelFormat;

/// The largest cursor in each direction, in pixels; that of QEMU itself (`cursor_alloc` in
/// ui/cursor.c).
const MAX_CURSOR: i32 = 512;

/// A cursor's picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CursorShape {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Rows without padding of pixels of four bytes: blue, green, red, alpha. Colours are premultiplied:
    /// QEMU hands on what the guest gives, which is that for virtio-gpu (DRM's cursor planes), QXL and
    /// vmware's; others have nothing between opaque and clear.
    pub bgra: Vec<u8>,
}

impl CursorShape {
    /// A shape as QEMU says it.
    pub(crate) fn checked(width: i32, height: i32, data: &[u8]) -> Result<Self, Error> {
        let range = 1..=MAX_CURSOR;
        let fits = range.contains(&width) && range.contains(&height);
        if !fits || (width * height * 4) as usize != data.len() {
            return Err(Error::Nonsense(format!(
                "a cursor of {width}x{height} pixels in {} bytes",
                data.len()
            )));
        }
        // ARGB of 32-bit words (CursorDefine in QEMU's ui/dbus-display1.xml).
        Ok(Self {
            width: width as u32,
            height: height as u32,
            bgra: data.to_vec(),
        })
    }
}

/// The cursor now.
#[derive(Clone, Debug, Default)]
pub struct Cursor {
    /// Its picture, once QEMU has sent one.
    pub shape: Option<Arc<CursorShape>>,
    /// Where its left edge is in the picture, in pixels; may be outside.
    pub x: i32,
    /// Where its upper edge is in the picture, in pixels; may be outside.
    pub y: i32,
    /// The guest shows it.
    pub visible: bool,
}

impl Cursor {
    /// The part of a picture of this size that the cursor covers, if it is to be seen there.
    pub fn covers(&self, size: (u32, u32)) -> Option<Rect> {
        let shape = self.shape.as_ref().filter(|_| self.visible)?;
        Rect::clipped((self.x, self.y), (shape.width, shape.height), size)
    }

    /// Draws it into a picture of `size` pixels of `format`, with `stride` bytes from one row to the next.
    pub fn draw(&self, format: PixelFormat, size: (u32, u32), out: &mut [u8], stride: usize) {
        let Some((rect, shape)) = self.covers(size).zip(self.shape.as_ref()) else {
            return;
        };
        let bytes = format.bytes_per_pixel();
        // What is outside to the left and above is not drawn.
        let skipped = |edge: u32, begin: i32| (i64::from(edge) - i64::from(begin)) as usize;
        let (left, top) = (skipped(rect.x, self.x), skipped(rect.y, self.y));
        for row in 0..rect.height as usize {
            let from = ((top + row) * shape.width as usize + left) * 4;
            let from = &shape.bgra[from..from + rect.width as usize * 4];
            let to = (rect.y as usize + row) * stride + rect.x as usize * bytes;
            let to = &mut out[to..to + rect.width as usize * bytes];
            for (pixel, bgra) in to.chunks_exact_mut(bytes).zip(from.chunks_exact(4)) {
                format.draw_over(pixel, [bgra[0], bgra[1], bgra[2], bgra[3]]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_cannot_be_are_refused() {
        assert!(CursorShape::checked(2, 2, &[0; 16]).is_ok());
        for (width, height, length) in [
            (2, 2, 15),
            (2, 2, 17),
            (0, 2, 0),
            (-2, -2, 16),
            (513, 1, 2052),
            (i32::MAX, i32::MAX, 4),
        ] {
            assert!(CursorShape::checked(width, height, &vec![0; length]).is_err());
        }
    }

    #[test]
    fn a_hidden_cursor_covers_nothing() {
        let mut cursor = Cursor {
            shape: Some(Arc::new(CursorShape::checked(2, 2, &[0; 16]).unwrap())),
            x: 638,
            y: 1,
            visible: false,
        };
        assert_eq!(cursor.covers((640, 480)), None);
        cursor.visible = true;
        assert_eq!(cursor.covers((640, 480)).unwrap().width, 2);
        cursor.shape = None;
        assert_eq!(cursor.covers((640, 480)), None);
    }

    #[test]
    fn a_cursor_is_drawn_where_it_is_and_not_beyond_the_edges() {
        let shape = [
            [1, 1, 1, 255],
            [2, 2, 2, 255],
            [3, 3, 3, 255],
            [4, 4, 4, 255],
        ]
        .concat();
        let shape = Arc::new(CursorShape::checked(2, 2, &shape).unwrap());
        let drawn = |x, y| {
            let shape = Some(shape.clone());
            let cursor = Cursor {
                shape,
                x,
                y,
                visible: true,
            };
            // Three pixels and one of padding.
            let mut out = [0; 2 * 16];
            cursor.draw(PixelFormat::Bgrx, (3, 2), &mut out, 16);
            out.chunks_exact(4)
                .map(|pixel| pixel[0])
                .collect::<Vec<_>>()
        };
        assert_eq!(drawn(1, 0), [0, 1, 2, 0, 0, 3, 4, 0]);
        assert_eq!(drawn(2, 1), [0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(drawn(-1, -1), [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(drawn(3, 0), [0; 8]);
    }
}
