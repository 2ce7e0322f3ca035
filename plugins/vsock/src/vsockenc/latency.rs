// SPDX-License-Identifier: MIT OR Apache-2.0

//! The latency that is reported: one frame's duration at first, or less where frames are rare, and
//! more when the host turns out to take longer. At most it is what the frames last that the element
//! takes before it lets upstream wait.

use std::time::Duration;

/// So many replies are looked at.
const WINDOW: usize = 64;

/// So many of them that took longer than was reported are no accident.
const LATE: usize = 8;

/// A frame at 30 frames a second. A host takes no longer for a frame because few are sent.
const LARGEST_STEP: Duration = Duration::from_nanos(33_333_334);

/// What was reported, and what is true.
#[derive(Debug)]
pub struct Latency {
    /// From one frame to the next.
    frame: Duration,
    /// What is reported is a multiple of it.
    step: Duration,
    reported: Duration,
    /// What the last replies took since that was reported; zero where there were fewer.
    took: [Duration; WINDOW],
    /// Where the next one goes.
    next: usize,
}

impl Default for Latency {
    fn default() -> Self {
        Self::new(Duration::ZERO)
    }
}

impl Latency {
    /// To be reported: one frame of `duration`, at most [`LARGEST_STEP`].
    pub fn new(duration: Duration) -> Self {
        let step = duration.min(LARGEST_STEP);
        Self {
            frame: duration,
            step,
            reported: step,
            took: [Duration::ZERO; WINDOW],
            next: 0,
        }
    }

    /// What is to be reported.
    pub fn reported(&self) -> Duration {
        self.reported
    }

    /// How long a frame may stay while upstream need not wait: until so many are in flight. No
    /// less than what is reported.
    pub fn most(&self, in_flight: u32) -> Duration {
        self.reported.max(self.frame.saturating_mul(in_flight))
    }

    /// A frame took this long, from its submission to its reply; whether something else is to be
    /// reported from now on. Each time everybody in the pipeline is asked anew, so it is seldom:
    /// at most once in [`LATE`] replies, and only more than before.
    pub fn took(&mut self, took: Duration) -> bool {
        self.took[self.next] = took;
        self.next = (self.next + 1) % WINDOW;
        if took <= self.reported {
            return false;
        }
        let mut took = self.took;
        took.sort_unstable();
        if took[WINDOW - LATE] <= self.reported {
            return false;
        }
        // The middle one of those that were late: a single one may be any accident.
        let middle = took[WINDOW - LATE / 2];
        let steps = middle
            .as_nanos()
            .div_ceil(self.step.as_nanos().max(1))
            .try_into()
            .unwrap_or(u32::MAX);
        *self = Self {
            reported: self.step * steps,
            ..Self::new(self.frame)
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Duration = Duration::from_millis(10);

    /// How often something else is to be reported.
    fn rises(latency: &mut Latency, took: impl Iterator<Item = Duration>) -> usize {
        took.filter(|took| latency.took(*took)).count()
    }

    #[test]
    fn a_slow_host_raises_it_to_what_is_true() {
        let mut latency = Latency::new(FRAME);
        assert_eq!(latency.reported(), FRAME);
        for (took, reported) in [(FRAME * 5 / 2, FRAME * 3), (FRAME * 100, FRAME * 100)] {
            for _ in 1..LATE {
                assert!(!latency.took(took));
            }
            assert!(latency.took(took));
            assert_eq!(latency.reported(), reported);
        }
        assert!(!(0..100).any(|_| latency.took(FRAME * 100)));
    }

    #[test]
    fn quick_replies_in_between_do_not_hide_slow_ones() {
        for quick in [2, 8] {
            let mut latency = Latency::new(FRAME);
            let took = |number| FRAME * if number % quick == 0 { 1 } else { 6 };
            assert_eq!(rises(&mut latency, (0..100).map(took)), 1);
            assert_eq!(latency.reported(), FRAME * 6);
        }
    }

    #[test]
    fn slow_replies_now_and_then_are_accidents() {
        let mut latency = Latency::new(FRAME);
        let took = |number| FRAME * if number % 10 == 0 { 6 } else { 1 };
        assert_eq!(rises(&mut latency, (0..1000).map(took)), 0);
        assert_eq!(latency.reported(), FRAME);
    }

    #[test]
    fn an_accident_does_not_raise_it_further_than_a_slow_host_does() {
        let mut latency = Latency::new(FRAME);
        let took = |number| FRAME * if number == 5 { 1000 } else { 3 };
        assert_eq!(rises(&mut latency, (0..100).map(took)), 1);
        assert_eq!(latency.reported(), FRAME * 3);
    }

    #[test]
    fn it_rises_at_most_once_in_so_many_replies() {
        let mut latency = Latency::new(FRAME);
        let slower_and_slower = (0..800).map(|number| FRAME * number);
        assert!(rises(&mut latency, slower_and_slower) <= 800 / LATE);
    }

    #[test]
    fn rare_frames_are_not_slow_ones() {
        let latency = Latency::new(Duration::from_secs(1));
        assert_eq!(latency.reported(), LARGEST_STEP);
        assert_eq!(latency.most(2), Duration::from_secs(2));
    }

    #[test]
    fn at_most_it_is_what_the_frames_in_flight_last() {
        let mut latency = Latency::new(FRAME);
        assert_eq!(latency.most(1), FRAME);
        assert_eq!(latency.most(3), FRAME * 3);
        assert_eq!(rises(&mut latency, [FRAME * 7; LATE].into_iter()), 1);
        assert_eq!(latency.most(3), FRAME * 7);
        assert_eq!(latency.most(8), FRAME * 8);
    }
}
