// SPDX-License-Identifier: MIT OR Apache-2.0

//! The cursor, where QEMU sends it apart from the picture.

use std::sync::Arc;

use crate::damage::Rect;
use crate::error::Error;

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
    /// Rows without padding of pixels of four bytes: blue, green, red, alpha, not premultiplied.
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
}
