// SPDX-License-Identifier: MIT OR Apache-2.0

//! What of a picture has changed.

/// A rectangle in pixels, inside its picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

impl Rect {
    /// A rectangle as QEMU says it, if it is not empty and lies in a picture of this size.
    pub(crate) fn checked(
        (x, y): (i32, i32),
        (width, height): (i32, i32),
        size: (u32, u32),
    ) -> Option<Self> {
        let rect = Self {
            x: u32::try_from(x).ok()?,
            y: u32::try_from(y).ok()?,
            width: u32::try_from(width).ok().filter(|width| *width > 0)?,
            height: u32::try_from(height).ok().filter(|height| *height > 0)?,
        };
        (rect.right() <= size.0.into() && rect.bottom() <= size.1.into()).then_some(rect)
    }

    /// The part of a rectangle that lies in a picture of this size, if any.
    pub(crate) fn clipped(
        (x, y): (i32, i32),
        (width, height): (u32, u32),
        size: (u32, u32),
    ) -> Option<Self> {
        let span = |start: i32, length: u32, limit: u32| {
            let end = (i64::from(start) + i64::from(length)).min(limit.into());
            let start = i64::from(start.max(0));
            (end > start).then(|| (start as u32, (end - start) as u32))
        };
        let (x, width) = span(x, width, size.0)?;
        let (y, height) = span(y, height, size.1)?;
        Some(Self {
            x,
            y,
            width,
            height,
        })
    }

    fn right(&self) -> u64 {
        u64::from(self.x) + u64::from(self.width)
    }

    fn bottom(&self) -> u64 {
        u64::from(self.y) + u64::from(self.height)
    }

    fn contains(&self, other: &Self) -> bool {
        self.x <= other.x
            && self.y <= other.y
            && self.right() >= other.right()
            && self.bottom() >= other.bottom()
    }

    fn united(&self, other: &Self) -> Self {
        let (x, y) = (self.x.min(other.x), self.y.min(other.y));
        Self {
            x,
            y,
            width: (self.right().max(other.right()) - u64::from(x)) as u32,
            height: (self.bottom().max(other.bottom()) - u64::from(y)) as u32,
        }
    }
}

/// What of a picture has changed since it was last taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Everything may have.
    All,
    /// These parts, which may overlap. Empty: nothing.
    Rects(Vec<Rect>),
}

impl Damage {
    /// More rectangles than this become the one around them: whoever uses them pays for each.
    pub const MOST_RECTS: usize = 16;

    /// Nothing has changed.
    pub const NONE: Self = Self::Rects(Vec::new());

    /// Whether nothing has changed.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::Rects(rects) if rects.is_empty())
    }

    /// `rect` has changed as well.
    pub(crate) fn add(&mut self, rect: Rect) {
        let Self::Rects(rects) = self else {
            return;
        };
        if rects.iter().any(|known| known.contains(&rect)) {
            return;
        }
        rects.retain(|known| !rect.contains(known));
        rects.push(rect);
        if rects.len() > Self::MOST_RECTS {
            let around = rects.iter().fold(rect, |around, rect| around.united(rect));
            *rects = vec![around];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
        Rect {
            x,
            y,
            width,
            height,
        }
    }

    #[test]
    fn rectangles_outside_the_picture_are_none() {
        let size = (640, 480);
        assert_eq!(
            Rect::checked((0, 0), (640, 480), size),
            Some(rect(0, 0, 640, 480))
        );
        for (at, extent) in [
            ((-1, 0), (1, 1)),
            ((0, 0), (0, 1)),
            ((0, 0), (1, -5)),
            ((639, 0), (2, 1)),
            ((0, 480), (1, 1)),
            ((i32::MAX, i32::MAX), (i32::MAX, i32::MAX)),
        ] {
            assert_eq!(Rect::checked(at, extent, size), None, "{at:?} {extent:?}");
        }
    }

    #[test]
    fn a_cursor_at_the_edge_is_clipped() {
        let size = (640, 480);
        assert_eq!(
            Rect::clipped((-3, 470), (16, 16), size),
            Some(rect(0, 470, 13, 10))
        );
        assert_eq!(Rect::clipped((640, 0), (16, 16), size), None);
        assert_eq!(Rect::clipped((-16, 0), (16, 16), size), None);
        assert_eq!(
            Rect::clipped((i32::MIN, i32::MAX), (u32::MAX, 1), size),
            None
        );
    }

    #[test]
    fn what_is_known_is_not_said_twice() {
        let mut damage = Damage::NONE;
        assert!(damage.is_none());
        damage.add(rect(10, 10, 20, 20));
        damage.add(rect(12, 12, 5, 5));
        assert_eq!(damage, Damage::Rects(vec![rect(10, 10, 20, 20)]));
        damage.add(rect(0, 0, 100, 100));
        assert_eq!(damage, Damage::Rects(vec![rect(0, 0, 100, 100)]));
        let mut all = Damage::All;
        all.add(rect(0, 0, 1, 1));
        assert_eq!(all, Damage::All);
    }

    #[test]
    fn many_rectangles_become_the_one_around_them() {
        let mut damage = Damage::NONE;
        for index in 0..=Damage::MOST_RECTS as u32 {
            damage.add(rect(index * 10, index, 5, 1));
        }
        let most = Damage::MOST_RECTS as u32;
        assert_eq!(
            damage,
            Damage::Rects(vec![rect(0, 0, most * 10 + 5, most + 1)])
        );
    }
}
