// SPDX-License-Identifier: MIT OR Apache-2.0

//! Moments on `CLOCK_MONOTONIC`, the clock in which PipeWire stamps frames.

use std::time::Duration;

/// How far in the past a producer's stamp is believed.
const OLDEST: Duration = Duration::from_secs(10);

/// Nanoseconds on `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Monotonic(u64);

impl Monotonic {
    /// The present moment.
    pub fn now() -> Self {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `now` has room for the result. CLOCK_MONOTONIC always exists, so this cannot
        // fail; were it to, the moment would be 0, and stamps would not be believed.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
        Self(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }

    /// Time from `earlier` to this moment; zero where it is not earlier.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// When a frame that came at `received` was captured: what its header says if that can be,
    /// else the moment when it came.
    ///
    /// Headers of value 0 or -1 say nothing, and some producers stamp in a clock of their own.
    /// A moment ahead counts as `received`: nothing is captured in the future, but compositors do
    /// stamp the moment at which a frame will be on the screen.
    pub fn of_capture(header_pts: Option<i64>, received: Self) -> Self {
        let stamp = header_pts
            .and_then(|pts| u64::try_from(pts).ok())
            .filter(|pts| *pts > 0)
            .map(Self);
        match stamp {
            Some(stamp) if stamp <= received && received.since(stamp) <= OLDEST => stamp,
            _ => received,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Monotonic = Monotonic(100_000_000_000);

    fn capture(pts: i64) -> Monotonic {
        Monotonic::of_capture(Some(pts), NOW)
    }

    #[test]
    fn the_header_says_when_a_frame_was_captured() {
        assert_eq!(capture(99_990_000_000), Monotonic(99_990_000_000));
        assert_eq!(capture(100_000_000_000), NOW);
    }

    #[test]
    fn stamps_that_cannot_be_are_replaced_by_the_arrival() {
        for pts in [
            0,
            -1,
            i64::MIN,
            i64::MAX,
            1,
            89_000_000_000,
            100_016_000_000,
        ] {
            assert_eq!(capture(pts), NOW, "{pts}");
        }
        assert_eq!(Monotonic::of_capture(None, NOW), NOW);
    }

    #[test]
    fn the_clock_goes_forward() {
        let earlier = Monotonic::now();
        assert!(Monotonic::now() >= earlier);
        assert_eq!(NOW.since(Monotonic(u64::MAX)), Duration::ZERO);
    }
}
