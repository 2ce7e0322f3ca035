// SPDX-License-Identifier: MIT OR Apache-2.0

//! When the next buffer may or must leave: keepalives and the limit of the framerate.
//!
//! Both go by a grid, not by the moment at which the thread happened to wake, so periods neither
//! drift nor move when it wakes for something else (lesson L1).

use std::time::{Duration, Instant};

/// The moments of the buffers that have left.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Schedule {
    /// The last frame or keepalive.
    last: Option<Instant>,
    /// The grid point of the last buffer, for the framerate.
    slot: Option<Instant>,
}

impl Schedule {
    /// When the last frame is to be resent, given `period`.
    pub fn keepalive_at(&self, period: Duration) -> Option<Instant> {
        self.last?.checked_add(period)
    }

    /// Before when no further frame may leave, given `interval` between them.
    pub fn frame_at(&self, interval: Duration) -> Option<Instant> {
        self.slot?.checked_add(interval)
    }

    /// A frame leaves at `now`. `interval` is the least time between frames, if there is one.
    pub fn frame_left(&mut self, now: Instant, interval: Option<Duration>) {
        self.last = Some(now);
        self.slot = interval.map(|interval| next_point(self.slot, interval, now));
    }

    /// A keepalive leaves at `now`, `period` after what was before it or later. It counts for the
    /// framerate as well.
    pub fn keepalive_left(&mut self, now: Instant, period: Duration, interval: Option<Duration>) {
        self.last = Some(next_point(self.last, period, now));
        self.slot = interval.map(|interval| next_point(self.slot, interval, now));
    }
}

/// The point `step` after `last`, or `now` where that point is missing or more than a step ago:
/// what was missed is not made up for in a burst.
fn next_point(last: Option<Instant>, step: Duration, now: Instant) -> Instant {
    last.and_then(|last| last.checked_add(step))
        .filter(|point| *point <= now && now.duration_since(*point) < step)
        .unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_millis(100);

    fn at(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn there_is_no_keepalive_before_the_first_frame() {
        assert_eq!(Schedule::default().keepalive_at(PERIOD), None);
    }

    #[test]
    fn keepalives_keep_their_grid_however_late_the_thread_wakes() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        schedule.frame_left(start, None);
        for (count, late) in [(1, 0), (2, 30), (3, 99), (4, 1)] {
            let due = at(start, 100 * count);
            assert_eq!(schedule.keepalive_at(PERIOD), Some(due));
            schedule.keepalive_left(due + Duration::from_millis(late), PERIOD, None);
        }
    }

    #[test]
    fn a_blocked_thread_does_not_make_up_for_what_it_missed() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        schedule.frame_left(start, None);
        schedule.keepalive_left(at(start, 1234), PERIOD, None);
        assert_eq!(schedule.keepalive_at(PERIOD), Some(at(start, 1334)));
    }

    #[test]
    fn a_frame_starts_the_period_anew() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        schedule.frame_left(start, None);
        schedule.frame_left(at(start, 60), None);
        assert_eq!(schedule.keepalive_at(PERIOD), Some(at(start, 160)));
    }

    #[test]
    fn a_limit_of_the_framerate_is_kept_on_average() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        let interval = Duration::from_millis(33);
        let mut left = 0;
        // Frames come every 16 ms and wait until they may leave.
        for come in (0..3300).step_by(16) {
            let come = at(start, come);
            if schedule.frame_at(interval).is_none_or(|due| due <= come) {
                schedule.frame_left(come, Some(interval));
                left += 1;
            }
        }
        assert!((99..=100).contains(&left), "{left} frames in 100 intervals");
    }

    #[test]
    fn keepalives_count_for_the_limit() {
        let start = Instant::now();
        let interval = Duration::from_millis(200);
        let mut schedule = Schedule::default();
        schedule.frame_left(start, Some(interval));
        schedule.keepalive_left(at(start, 200), PERIOD, Some(interval));
        assert_eq!(schedule.frame_at(interval), Some(at(start, 400)));
    }

    #[test]
    fn without_a_limit_every_frame_may_leave() {
        let mut schedule = Schedule::default();
        let now = Instant::now();
        schedule.frame_left(now, Some(PERIOD));
        schedule.frame_left(now, None);
        assert_eq!(schedule.frame_at(PERIOD), None);
    }
}
