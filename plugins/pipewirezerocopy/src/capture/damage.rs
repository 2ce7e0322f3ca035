// SPDX-License-Identifier: MIT OR Apache-2.0

//! What of a picture has changed, as far as the producer says.
//!
//! Damage is what differs from the frame that came before. Where that one never leaves, the next
//! one's damage must cover both: [`Damage::add`].

use super::geometry::{FrameLayout, Region};

/// The most rectangles that are told apart; more become one around all of them. It is also what is
/// asked for in `SPA_META_VideoDamage`.
pub const MAX_RECTS: usize = 16;

/// The changed part of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Nobody knows: it may be everything.
    Everything,
    /// Nothing outside of these rectangles, which lie in the frame.
    Rects(Vec<Region>),
}

impl Damage {
    /// What a producer said about the buffer of a frame with `layout`. Saying nothing means
    /// everything; rectangles are in the buffer's pixels, and a frame may be a crop of those.
    pub fn of_buffer(said: impl Iterator<Item = Region>, layout: &FrameLayout) -> Self {
        let mut rects = Vec::new();
        let mut any = false;
        for region in said {
            any = true;
            rects.extend(clip(region, layout));
        }
        if any {
            Self::Rects(rects)
        } else {
            Self::Everything
        }
    }

    /// Includes the damage of an earlier frame, of the same size.
    pub fn add(&mut self, earlier: Self) {
        match (&mut *self, earlier) {
            (Self::Everything, _) => {}
            (_, Self::Everything) => *self = Self::Everything,
            (Self::Rects(rects), Self::Rects(more)) => {
                for rect in more {
                    if !rects.contains(&rect) {
                        rects.push(rect);
                    }
                }
                if rects.len() > MAX_RECTS {
                    let around = rects.drain(..).reduce(around);
                    rects.extend(around);
                }
            }
        }
    }
}

/// The part of `region` that is in the frame, in the frame's pixels.
fn clip(region: Region, layout: &FrameLayout) -> Option<Region> {
    let one_way = |start: i32, length: u32, origin: u32, limit: u32| {
        let start = i64::from(start) - i64::from(origin);
        let end = (start + i64::from(length)).min(limit.into());
        let start = start.max(0);
        let length = u32::try_from(end - start).ok().filter(|n| *n > 0)?;
        Some((i32::try_from(start).ok()?, length))
    };
    let (left, top) = layout.origin;
    let (x, width) = one_way(region.x, region.width, left, layout.width)?;
    let (y, height) = one_way(region.y, region.height, top, layout.height)?;
    Some(Region {
        x,
        y,
        width,
        height,
    })
}

/// The rectangle around two that lie in a frame.
fn around(a: Region, b: Region) -> Region {
    let one_way = |a: (i32, u32), b: (i32, u32)| {
        let start = a.0.min(b.0);
        let end = (a.0 as u32 + a.1).max(b.0 as u32 + b.1);
        (start, end - start as u32)
    };
    let (x, width) = one_way((a.x, a.width), (b.x, b.width));
    let (y, height) = one_way((a.y, a.height), (b.y, b.height));
    Region {
        x,
        y,
        width,
        height,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::format::PixelFormat;
    use crate::capture::geometry::Chunk;

    fn region(x: i32, y: i32, width: u32, height: u32) -> Region {
        Region {
            x,
            y,
            width,
            height,
        }
    }

    fn layout() -> FrameLayout {
        let chunk = Chunk {
            mapped: 1024,
            offset: 0,
            size: 1024,
            stride: 64,
        };
        FrameLayout::new(PixelFormat::Bgrx, 16, 16, &[chunk]).unwrap()
    }

    fn damage(said: &[Region], layout: &FrameLayout) -> Damage {
        Damage::of_buffer(said.iter().copied(), layout)
    }

    #[test]
    fn a_producer_that_says_nothing_may_have_changed_everything() {
        assert_eq!(damage(&[], &layout()), Damage::Everything);
    }

    #[test]
    fn damage_is_clipped_to_the_frame() {
        let said = [
            region(2, 3, 4, 5),
            region(-1, 14, 3, 9),
            region(16, 0, 1, 1),
            region(i32::MIN, i32::MIN, u32::MAX, u32::MAX),
            region(i32::MAX, 0, u32::MAX, 1),
        ];
        let expected = vec![
            region(2, 3, 4, 5),
            region(0, 14, 2, 2),
            region(0, 0, 16, 16),
        ];
        assert_eq!(damage(&said, &layout()), Damage::Rects(expected));
        let cropped = layout().crop(region(2, 2, 4, 4));
        let expected = Damage::Rects(vec![region(0, 1, 4, 3)]);
        assert_eq!(damage(&[region(2, 3, 9, 9)], &cropped), expected);
    }

    #[test]
    fn damage_outside_of_a_crop_is_none_of_the_frame() {
        let cropped = layout().crop(region(2, 2, 4, 4));
        let outside = damage(&[region(10, 10, 2, 2)], &cropped);
        assert_eq!(outside, Damage::Rects(Vec::new()));
    }

    #[test]
    fn a_frame_that_never_left_adds_its_damage_to_the_next() {
        let rects = |list: &[Region]| Damage::Rects(list.to_vec());
        let mut damage = rects(&[region(0, 0, 1, 1)]);
        damage.add(rects(&[region(0, 0, 1, 1), region(5, 5, 2, 2)]));
        assert_eq!(damage, rects(&[region(0, 0, 1, 1), region(5, 5, 2, 2)]));
        damage.add(Damage::Everything);
        assert_eq!(damage, Damage::Everything);
        damage.add(rects(&[]));
        assert_eq!(damage, Damage::Everything);
    }

    #[test]
    fn many_rectangles_become_one() {
        let many = |y| Damage::Rects((0..9).map(|x| region(x, y, 1, 1)).collect());
        let mut damage = many(3);
        damage.add(many(7));
        assert_eq!(damage, Damage::Rects(vec![region(0, 3, 9, 5)]));
    }
}
