// SPDX-License-Identifier: MIT OR Apache-2.0

//! When the next frame may leave.

use std::time::{Duration, Instant};

/// Keeps frames to a rate on average: by a grid, so that a thread that wakes late does not make
/// the next frame late as well.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// The grid point of the last frame.
    slot: Option<Instant>,
}

impl Pace {
    /// Before when no frame may leave, given the least time between two.
    pub fn next(&self, interval: Option<Duration>) -> Option<Instant> {
        self.slot?.checked_add(interval?)
    }

    /// A frame leaves at `now`.
    pub fn left(&mut self, now: Instant, interval: Option<Duration>) {
        let interval = interval.unwrap_or_default();
        // What was missed is not made up for in a burst.
        let point = self
            .slot
            .and_then(|slot| slot.checked_add(interval))
            .filter(|point| *point <= now && now.duration_since(*point) < interval);
        self.slot = Some(point.unwrap_or(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn the_first_frame_leaves_at_once() {
        assert_eq!(Pace::default().next(Some(Duration::from_millis(16))), None);
    }

    #[test]
    fn a_rate_is_kept_however_late_frames_leave() {
        let start = Instant::now();
        let interval = Some(Duration::from_millis(10));
        let mut pace = Pace::default();
        for (left, next) in [(0, 10), (14, 20), (20, 30), (39, 40), (95, 105)] {
            pace.left(at(start, left), interval);
            assert_eq!(pace.next(interval), Some(at(start, next)));
        }
    }

    #[test]
    fn without_a_limit_there_is_no_waiting() {
        let mut pace = Pace::default();
        pace.left(Instant::now(), None);
        assert_eq!(pace.next(None), None);
    }
}
