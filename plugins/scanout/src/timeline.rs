// SPDX-License-Identifier: MIT OR Apache-2.0

//! When a pushed frame was captured, in the pipeline's running time. Times are in nanoseconds;
//! no GStreamer in it.
//!
//! | host | its timestamps | a frame's time |
//! | --- | --- | --- |
//! | legacy | n x 16,666,667 ns, whatever the real rate is (quirk 7 of docs/protocol.md) | its arrival |
//! | with capture times, on this machine | this machine's `CLOCK_MONOTONIC` | its capture |
//! | with capture times, elsewhere | a clock that says nothing here, but runs as fast | its arrival, less what it took longer than the fastest frames of the last 10 to 20 s |
//!
//! The last keeps the spacing of the captures however the network jitters, and follows the drift
//! between two machines' clocks. Each frame is stamped for itself, so that nothing piles up.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The host clock id in HELLO that is believed of a host on this machine.
pub const CLOCK_MONOTONIC: &[u8] = b"CLOCK_MONOTONIC";

/// A first frame older than this is not of this machine's clock: behind a forwarded port is a
/// machine that was started at another time.
const OLDEST: u64 = 10_000_000_000;
/// And one more than this ahead neither.
const AHEAD: u64 = 100_000_000;
/// The fastest transit is that of this period and the one before.
const PERIOD: u64 = 10_000_000_000;

/// One frame is looked at in each period of this length: frames that come in a burst, after
/// something was stuck, are one accident, however many they are.
const LATENCY_SLOT: u64 = 100_000_000;
/// So many of them in a row over the reported latency, and none below in between, are no accident.
const LATE: usize = 20;
/// What the last ones of them took is what lasts: the first may be late for what is over by then.
const LASTING: usize = 5;
/// Lateness that became less by this part meanwhile, or by so much, is a backlog that is being worked off.
const LESS_PART: u64 = 8;
const LESS: u64 = 50_000_000;
/// Reported latencies are multiples of this.
const LATENCY_STEP: u64 = 5_000_000;

/// What the timestamps of a host are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostClock {
    /// Of nothing: they are made up.
    Synthetic,
    /// Of a clock that only the host can read.
    Foreign,
    /// Of this machine's `CLOCK_MONOTONIC`.
    Shared,
}

/// When a frame came.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Running time of the pipeline.
    pub running: u64,
    /// `CLOCK_MONOTONIC`.
    pub monotonic: u64,
}

/// A frame's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Running time; more than that of the frame before.
    pub pts: u64,
    /// From capture to arrival, where the host's clock can be read here.
    pub latency: Option<Duration>,
}

/// Stamps the frames of one run of the element, over as many connections as that takes.
#[derive(Debug)]
pub struct Timeline {
    clock: HostClock,
    /// A frame of this connection was stamped.
    checked: bool,
    transit: FastestTransit,
    last: Option<u64>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            clock: HostClock::Synthetic,
            checked: false,
            transit: FastestTransit::default(),
            last: None,
        }
    }
}

impl Timeline {
    /// A connection to a host with this clock begins.
    pub fn connected(&mut self, clock: HostClock) {
        self.clock = clock;
        self.checked = false;
        self.transit = FastestTransit::default();
    }

    /// What the host's timestamps turned out to be of.
    pub fn clock(&self) -> HostClock {
        self.clock
    }

    /// The time of a frame that the host stamped with `host_pts`.
    pub fn stamp(&mut self, host_pts: i64, arrival: Arrival) -> Stamp {
        let transit = (arrival.monotonic as i64).saturating_sub(host_pts);
        let first = !std::mem::replace(&mut self.checked, true);
        if first
            && self.clock == HostClock::Shared
            && !(-(AHEAD as i64)..=OLDEST as i64).contains(&transit)
        {
            self.clock = HostClock::Foreign;
        }
        let age = match self.clock {
            HostClock::Synthetic => 0,
            HostClock::Shared => transit.max(0) as u64,
            HostClock::Foreign => transit.abs_diff(self.transit.of(transit, arrival.monotonic)),
        };
        let pts = arrival.running.saturating_sub(age);
        // Two in one tick of the clock must still differ.
        let pts = self.last.map_or(pts, |last| pts.max(last + 1));
        self.last = Some(pts);
        Stamp {
            pts,
            latency: (self.clock == HostClock::Shared).then(|| Duration::from_nanos(age)),
        }
    }
}

/// The least transit of a while: the one without waiting on the way.
#[derive(Debug, Default)]
struct FastestTransit {
    /// Of the present period, and when that began.
    present: Option<(i64, u64)>,
    /// Of the period before.
    before: Option<i64>,
}

impl FastestTransit {
    /// The least of the last two periods, this one at `now` included.
    fn of(&mut self, transit: i64, now: u64) -> i64 {
        let least = match self.present {
            Some((least, began)) if now.saturating_sub(began) < PERIOD => {
                let least = least.min(transit);
                self.present = Some((least, began));
                least
            }
            old => {
                self.before = old.map(|(least, _)| least);
                self.present = Some((transit, now));
                transit
            }
        };
        self.before.map_or(least, |before| before.min(least))
    }
}

/// The latency to report: how long after their times the frames leave.
#[derive(Debug, Default)]
pub struct Latency {
    reported: u64,
    /// What the last frame took, if it was late, and the slot in which it came.
    last: Option<(u64, u64)>,
    /// Slots in a row that ended late.
    late: usize,
    /// The most that the last frames of the first ones took.
    first: u64,
    /// What the last frames of the last ones took, each in its place by number.
    took: [u64; LASTING],
}

impl Latency {
    /// What is to be reported.
    pub fn reported(&self) -> u64 {
        self.reported
    }

    /// A frame that came at `now`, of any steady clock, left this long after its time; whether
    /// more is to be reported from now on.
    pub fn took(&mut self, now: u64, took: u64) -> bool {
        if took <= self.reported {
            *self = Self::reporting(self.reported);
            return false;
        }
        let slot = now / LATENCY_SLOT;
        if let Some((last_slot, last)) = self.last.replace((slot, took))
            && last_slot != slot
        {
            // A burst ends with the frames that waited least.
            self.took[self.late % LASTING] = last;
            self.late += 1;
            if self.late <= LASTING {
                self.first = self.first.max(last);
            }
        }
        if self.late < LATE {
            return false;
        }
        let most = self.took.iter().max().copied().unwrap_or(took);
        if self.first.saturating_sub(most) > LESS.min(self.first / LESS_PART) {
            *self = Self::reporting(self.reported);
            return false;
        }
        *self = Self::reporting(most.next_multiple_of(LATENCY_STEP));
        true
    }

    fn reporting(reported: u64) -> Self {
        Self {
            reported,
            ..Self::default()
        }
    }
}

/// `CLOCK_MONOTONIC` now (clock_gettime(2)).
pub fn monotonic_now() -> u64 {
    // The clock always exists. Were it not to, no host's clock would be believed.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    /// Running time 0 is this moment of `CLOCK_MONOTONIC`.
    const BASE: u64 = 5_000_000 * MS;

    fn at(millis: u64) -> Arrival {
        Arrival {
            running: millis * MS,
            monotonic: BASE + millis * MS,
        }
    }

    fn timeline(clock: HostClock) -> Timeline {
        let mut timeline = Timeline::default();
        timeline.connected(clock);
        timeline
    }

    #[test]
    fn made_up_times_count_for_nothing() {
        let mut timeline = timeline(HostClock::Synthetic);
        // Still for a minute; and two read from one packet.
        for (number, (millis, pts)) in [
            (100, 100 * MS),
            (117, 117 * MS),
            (60_000, 60_000 * MS),
            (60_000, 60_000 * MS + 1),
            (60_016, 60_016 * MS),
        ]
        .into_iter()
        .enumerate()
        {
            let stamp = timeline.stamp(number as i64 * 16_666_667, at(millis));
            assert_eq!((stamp.pts, stamp.latency), (pts, None));
        }
    }

    #[test]
    fn a_clock_of_this_machine_says_when_it_was() {
        let mut timeline = timeline(HostClock::Shared);
        for (number, delay) in [20, 3, 16, 0].into_iter().enumerate() {
            let captured = 1000 + number as u64 * 16;
            let host = (BASE + captured * MS) as i64;
            let stamp = timeline.stamp(host, at(captured + delay));
            assert_eq!(stamp.pts, captured * MS);
            assert_eq!(stamp.latency, Some(Duration::from_millis(delay)));
        }
    }

    #[test]
    fn a_clock_that_cannot_be_of_this_machine_is_not_believed() {
        for host in [1, (BASE + 3_600_000 * MS) as i64, i64::MAX, i64::MIN, 0, -5] {
            let mut timeline = timeline(HostClock::Shared);
            let stamp = timeline.stamp(host, at(1000));
            assert_eq!((stamp.pts, stamp.latency), (1000 * MS, None), "{host}");
            assert_eq!(timeline.clock(), HostClock::Foreign);
        }
    }

    #[test]
    fn an_element_that_was_held_up_does_not_lose_the_clock() {
        let mut timeline = timeline(HostClock::Shared);
        timeline.stamp((BASE + 1000 * MS) as i64, at(1001));
        // A pause of a minute: running time stands still, frames wait.
        let arrival = Arrival {
            running: 1002 * MS,
            monotonic: BASE + 61_000 * MS,
        };
        let stamp = timeline.stamp((BASE + 1001 * MS) as i64, arrival);
        assert_eq!(stamp.pts, 1000 * MS + 1);
        assert_eq!(timeline.clock(), HostClock::Shared);
    }

    #[test]
    fn jitter_on_the_way_from_another_machine_is_taken_out() {
        let mut timeline = timeline(HostClock::Foreign);
        let mut stamps = Vec::new();
        for (number, jitter) in [0, 30, 12, 0, 5, 25].into_iter().enumerate() {
            let captured = number as u64 * 40;
            let stamp = timeline.stamp((captured * MS) as i64, at(2000 + captured + jitter));
            assert_eq!(stamp.latency, None);
            stamps.push(stamp.pts);
        }
        for pair in stamps.windows(2) {
            assert_eq!(pair[1] - pair[0], 40 * MS);
        }
    }

    #[test]
    fn drift_between_two_machines_does_not_pile_up() {
        // A host's clock that is slow, and one that is fast, by 1 %.
        for (host, here) in [(99, 100), (100, 99)] {
            let mut timeline = timeline(HostClock::Foreign);
            let mut last = None;
            for number in 0..36_000 {
                let arrival = at(1000 + number * here);
                let pts = timeline.stamp((number * host * MS) as i64, arrival).pts;
                assert!(last < Some(pts));
                last = Some(pts);
                let behind = arrival.running.abs_diff(pts);
                assert!(behind <= 210 * MS, "{behind} ns after {number}");
            }
        }
    }

    #[test]
    fn time_never_goes_back_from_one_host_to_the_next() {
        let mut timeline = timeline(HostClock::Synthetic);
        let last = timeline.stamp(0, at(1000)).pts;
        timeline.connected(HostClock::Shared);
        let stamp = timeline.stamp((BASE + 900 * MS) as i64, at(1001));
        assert_eq!(stamp.pts, last + 1);
    }

    #[test]
    fn a_frame_from_before_the_start_begins_at_zero() {
        let mut timeline = timeline(HostClock::Shared);
        let stamp = timeline.stamp((BASE - 50 * MS) as i64, at(1));
        assert_eq!(stamp.pts, 0);
    }

    /// Frames at 60 frames a second from `from` on, this late each; the latency reported after
    /// each that raises it.
    fn rises(latency: &mut Latency, from: u64, late: impl Iterator<Item = u64>) -> Vec<u64> {
        let frames = late.enumerate();
        let rises = frames.filter_map(|(number, late)| {
            let captured = from + number as u64 * 16;
            let rises = latency.took((captured + late) * MS, late * MS);
            rises.then(|| latency.reported() / MS)
        });
        rises.collect()
    }

    #[test]
    fn latency_is_raised_by_what_lasts_and_not_by_an_accident() {
        let mut latency = Latency::default();
        let now_and_then = (0..200).map(|number| u64::from(number % 2 == 0) * 40);
        assert!(rises(&mut latency, 0, now_and_then).is_empty());
        let one_second = std::iter::repeat_n(11, 60).chain([0]);
        assert!(rises(&mut latency, 10_000, one_second).is_empty());
        let three_seconds = (0..180).map(|number| if number % 7 == 0 { 9 } else { 11 });
        assert_eq!(rises(&mut latency, 20_000, three_seconds), [15]);
        assert!(rises(&mut latency, 30_000, std::iter::repeat_n(15, 180)).is_empty());
    }

    #[test]
    fn frames_that_waited_together_are_one_accident() {
        // Something was stuck for 300 ms, then for three seconds.
        for stuck in [300, 3000] {
            for steady in [0, 12] {
                let mut latency = Latency::default();
                let burst = (0..stuck / 16).map(|number| (stuck - number * 16).max(steady));
                let after = std::iter::repeat_n(steady, 180);
                let reported = rises(&mut latency, 0, burst.chain(after));
                let expected: &[u64] = if steady == 0 { &[] } else { &[15] };
                assert_eq!(reported, expected, "stuck for {stuck} ms");
            }
        }
    }

    #[test]
    fn a_backlog_that_is_worked_off_slowly_is_an_accident_too() {
        // What it began with, and how much of 16 ms for a frame downstream takes.
        for (backlog, pace) in [
            (300u64, 13),
            (300, 15),
            (500, 14),
            (1000, 12),
            (1000, 14),
            (1000, 15),
            (2000, 10),
            (3000, 15),
        ] {
            let mut latency = Latency::default();
            let left = |number: u64| backlog.saturating_sub(number * (16 - pace));
            let worked_off = (0..4000).map(left);
            let rises = rises(&mut latency, 0, worked_off);
            assert!(rises.is_empty(), "{backlog} ms at {pace} ms: {rises:?}");
        }
    }
}
