// SPDX-License-Identifier: MIT OR Apache-2.0

//! What was seen, and the figures that are made of it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::capture::Seen;
use crate::capture::Source::{self, Pipewiresrc, Pipewirezerocopysrc};
use crate::meter::Outcome;
use crate::report::{Latency, Spread};

/// Medians, per frame. Times in microseconds.
#[derive(Serialize)]
pub struct Figures {
    /// Frames a second.
    pub fps: f64,
    /// CPU time, in user space and in the kernel.
    pub cpu_us: f64,
    /// The part of it in the kernel, as far as the kernel tells.
    pub system_us: f64,
    /// Voluntary context switches.
    pub switches: f64,
    /// From a frame's header to its way out of the source.
    pub latency: Latency,
}

impl Figures {
    fn of<'a>(seen: impl Iterator<Item = &'a Seen>) -> Self {
        let outcomes: Vec<Outcome> = seen.map(|seen| seen.usage.clone()).collect();
        let median = |what: fn(&Outcome) -> f64| Spread::of(outcomes.iter().map(what)).median;
        Self {
            fps: median(|usage| usage.fps),
            cpu_us: median(|usage| usage.cpu_us),
            system_us: median(|usage| usage.system_us),
            switches: median(|usage| usage.voluntary_switches),
            latency: Latency::of(&outcomes),
        }
    }
}

/// What each of the two saw.
pub struct Pair(BTreeMap<Source, Seen>);

impl Pair {
    pub fn new(seen: [(Source, Seen); 2]) -> Self {
        Self(seen.into())
    }

    pub fn of(&self, who: Source) -> &Seen {
        &self.0[&who]
    }

    /// The element's CPU time as a multiple of pipewiresrc's.
    fn cpu_ratio(&self) -> f64 {
        let [ours, theirs] = [Pipewirezerocopysrc, Pipewiresrc].map(|who| self.of(who));
        ours.usage.cpu_us / theirs.usage.cpu_us
    }
}

/// What came of one pace, window by window.
#[derive(Serialize)]
pub struct Pace {
    pub figures: BTreeMap<Source, Figures>,
    pub cpu_ratio: Spread,
}

impl Pace {
    pub fn of(pairs: &[&Pair]) -> Self {
        let figures = |who| Figures::of(pairs.iter().map(move |pair| pair.of(who)));
        Self {
            figures: [Pipewirezerocopysrc, Pipewiresrc]
                .map(|who| (who, figures(who)))
                .into(),
            cpu_ratio: Spread::of(pairs.iter().map(|pair| pair.cpu_ratio())),
        }
    }
}

/// Two windows of both at once, between which they have changed places.
pub struct Turn {
    /// The compositor serves the element first.
    pub ours_first: Pair,
    /// The compositor serves pipewiresrc first.
    pub theirs_first: Pair,
}

impl Turn {
    /// Both windows.
    pub fn windows(&self) -> [&Pair; 2] {
        [&self.ours_first, &self.theirs_first]
    }

    /// What ours and theirs took when they were served first, or else second.
    fn at(&self, first: bool) -> [&Outcome; 2] {
        let (ours, theirs) = if first {
            (&self.ours_first, &self.theirs_first)
        } else {
            (&self.theirs_first, &self.ours_first)
        };
        [
            &ours.of(Pipewirezerocopysrc).usage,
            &theirs.of(Pipewiresrc).usage,
        ]
    }

    /// Microseconds by which the element's p99 is above pipewiresrc's at the same place.
    fn added_p99(&self, first: bool) -> f64 {
        let [ours, theirs] = self
            .at(first)
            .map(|usage| Latency::of(std::slice::from_ref(usage)).p99);
        ours - theirs
    }
}

/// Latency where both are at the same place in the compositor's order.
#[derive(Serialize)]
pub struct Places {
    /// Who is served first.
    pub first: BTreeMap<Source, Latency>,
    /// Who is served second.
    pub second: BTreeMap<Source, Latency>,
    /// Microseconds by which the element's p99 is above pipewiresrc's, turn by turn and place by place.
    pub added_p99_us: Spread,
}

impl Places {
    pub fn of(turns: &[Turn]) -> Self {
        let latency = |first| {
            let [ours, theirs] = [0, 1].map(|who| {
                let outcomes: Vec<Outcome> = turns
                    .iter()
                    .map(|turn| turn.at(first)[who].clone())
                    .collect();
                Latency::of(&outcomes)
            });
            [(Pipewirezerocopysrc, ours), (Pipewiresrc, theirs)].into()
        };
        let places = turns
            .iter()
            .flat_map(|turn| [true, false].map(|first| turn.added_p99(first)));
        Self {
            first: latency(true),
            second: latency(false),
            added_p99_us: Spread::of(places),
        }
    }
}
