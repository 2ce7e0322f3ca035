// SPDX-License-Identifier: MIT OR Apache-2.0

//! The latency that is reported, in frames: one at first, and more when the host turns out to
//! take longer. It cannot take longer than `max-in-flight` frames: then frames wait before the
//! element and not in it.

use std::time::Duration;

/// So many replies in a row that took longer than was reported are no accident.
const LATE: u32 = 8;

/// What was reported, and what is true.
#[derive(Debug, Default)]
pub struct Latency {
    /// Of one frame.
    duration: Duration,
    /// Frames that are reported.
    reported: u32,
    /// Frames, at most.
    most: u32,
    /// Replies in a row that took longer.
    late: u32,
}

impl Latency {
    /// To be reported: one frame of `duration`.
    pub fn new(duration: Duration, max_in_flight: u32) -> Self {
        Self {
            duration,
            reported: 1,
            most: max_in_flight,
            late: 0,
        }
    }

    /// What is to be reported, least and most.
    pub fn range(&self) -> (Duration, Duration) {
        (self.duration * self.reported, self.duration * self.most)
    }

    /// A frame took this long; whether something else is to be reported from now on.
    pub fn took(&mut self, took: Duration) -> bool {
        if took <= self.duration * self.reported || self.reported >= self.most {
            self.late = 0;
            return false;
        }
        self.late += 1;
        if self.late < LATE {
            return false;
        }
        self.late = 0;
        let frames = took.as_nanos().div_ceil(self.duration.as_nanos().max(1));
        self.reported = u32::try_from(frames).map_or(self.most, |frames| frames.min(self.most));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Duration = Duration::from_millis(10);

    #[test]
    fn a_slow_host_raises_it_to_what_is_true_and_never_over_what_can_be() {
        let mut latency = Latency::new(FRAME, 4);
        assert_eq!(latency.range(), (FRAME, FRAME * 4));
        for _ in 1..LATE {
            assert!(!latency.took(FRAME * 5 / 2));
        }
        assert!(latency.took(FRAME * 5 / 2));
        assert_eq!(latency.range(), (FRAME * 3, FRAME * 4));
        for _ in 1..LATE {
            assert!(!latency.took(FRAME * 100));
        }
        assert!(latency.took(FRAME * 100));
        assert_eq!(latency.range().0, FRAME * 4);
        assert!(!(0..100).any(|_| latency.took(FRAME * 100)));
    }

    #[test]
    fn one_slow_reply_is_an_accident() {
        let mut latency = Latency::new(FRAME, 4);
        for number in 0..100 {
            let took = if number % 2 == 0 { FRAME * 3 } else { FRAME };
            assert!(!latency.took(took));
        }
    }
}
