// SPDX-License-Identifier: MIT OR Apache-2.0

//! How often a lost peer is called.

use std::time::{Duration, Instant};

use helix_protocol::wait::Deadline;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);
/// The last attempt begins at the end and has this long.
const LAST: Duration = Duration::from_secs(1);

/// Delays between attempts to reconnect: 50 ms, then twice as long each time up to 2 s, until the
/// time that was set for it is used up.
#[derive(Debug)]
pub struct Backoff {
    end: Instant,
    next: Duration,
}

impl Backoff {
    /// Attempts go on for `limit`.
    pub fn new(limit: Duration) -> Self {
        Self {
            end: Instant::now() + limit,
            next: FIRST,
        }
    }

    /// When to try next; `None` when it is time to give up. The last attempt comes at the very
    /// end of the time.
    pub fn next_attempt(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if now >= self.end {
            return None;
        }
        let at = self.end.min(now + self.next);
        self.next = LONGEST.min(self.next * 2);
        Some(at)
    }

    /// When an attempt that begins now is to be given up, if not before: at the end of the time, or
    /// a second from now where less is left.
    pub fn attempt_deadline(&self) -> Deadline {
        Deadline::at(self.end.max(Instant::now() + LAST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_and_end() {
        let mut backoff = Backoff::new(Duration::from_mins(1));
        let first = backoff.next_attempt().unwrap();
        let second = backoff.next_attempt().unwrap();
        assert!(second - first >= FIRST);
        for _ in 0..10 {
            assert!(backoff.next_attempt().unwrap() <= Instant::now() + LONGEST);
        }
        assert_eq!(Backoff::new(Duration::ZERO).next_attempt(), None);
    }

    #[test]
    fn an_attempt_ends_with_the_time_but_has_a_second() {
        let now = Instant::now();
        let limit = |time| Backoff::new(time).attempt_deadline().instant().unwrap() - now;
        assert!(limit(Duration::from_mins(1)) >= Duration::from_mins(1));
        assert!(limit(Duration::from_mins(1)) < Duration::from_mins(2));
        assert!(limit(Duration::ZERO) >= LAST);
    }
}
