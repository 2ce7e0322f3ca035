// SPDX-License-Identifier: MIT OR Apache-2.0

//! The latency that is reported, in frames: one at first, and more when the host turns out to
//! take longer. It has no upper limit: a host may take as long as it likes for a frame.

use std::time::Duration;

/// So many replies in a row that took longer than was reported are no accident.
const LATE: u32 = 8;

/// What was reported, and what is true.
#[derive(Debug, Default)]
pub struct Latency {
    /// Of one frame.
    duration: Duration,
    /// Frames that are reported.
    frames: u32,
    /// Replies in a row that took longer.
    late: u32,
}

impl Latency {
    /// To be reported: one frame of `duration`.
    pub fn new(duration: Duration) -> Self {
        Self {
            duration,
            frames: 1,
            late: 0,
        }
    }

    /// What is to be reported.
    pub fn reported(&self) -> Duration {
        self.duration * self.frames
    }

    /// A frame took this long, from its sending to its reply; whether something else is to be
    /// reported from now on.
    pub fn took(&mut self, took: Duration) -> bool {
        if took <= self.reported() {
            self.late = 0;
            return false;
        }
        self.late += 1;
        if self.late < LATE {
            return false;
        }
        self.late = 0;
        let frames = took.as_nanos().div_ceil(self.duration.as_nanos().max(1));
        self.frames = u32::try_from(frames).unwrap_or(u32::MAX);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Duration = Duration::from_millis(10);

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
    fn one_slow_reply_is_an_accident() {
        let mut latency = Latency::new(FRAME);
        for number in 0..100 {
            let took = if number % 2 == 0 { FRAME * 3 } else { FRAME };
            assert!(!latency.took(took));
        }
    }
}
