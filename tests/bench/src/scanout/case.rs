// SPDX-License-Identifier: MIT OR Apache-2.0

//! What one measurement is of, and what came of it.

use serde::{Deserialize, Serialize};

/// Frames a second.
pub const RATE: u32 = 60;

/// Who carries the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Contender {
    /// helix-host and scanoutsrc.
    Scanoutsrc,
    /// A thread for each scanout and a thread for each subscriber, with blocking sockets.
    Plain,
    /// What GStreamer has for it: gdppay and tcpserversink, tcpclientsrc and gdpdepay.
    Gdp,
    /// The recording's pipeline alone, without a socket: how late its frames are by themselves.
    Source,
}

impl Contender {
    /// As it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scanoutsrc => "scanoutsrc",
            Self::Plain => "plain",
            Self::Gdp => "gdp",
            Self::Source => "source",
        }
    }
}

/// One scanout, as a subscriber reaches it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    /// Of the host, as helix-protocol writes addresses.
    pub address: String,
    /// Which.
    pub scanout_id: u32,
}

/// Who pushes what to whom, and for how long.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    /// Who.
    pub contender: Contender,
    /// How many scanouts, at [`RATE`] frames a second each.
    pub scanouts: u32,
    /// Of each scanout.
    pub subscribers: u32,
    /// Over a unix socket, else TCP on the loopback.
    pub unix: bool,
    /// The recording that is pushed (see [`super::film`]).
    pub film: String,
    /// Frames that each subscriber must have before the measurement begins.
    pub warm_up: u32,
    /// Frames of each scanout that are measured.
    pub frames: u32,
}

impl Case {
    /// How it is called in tables.
    pub fn name(&self) -> String {
        format!(
            "{}x{} {}",
            self.scanouts,
            self.subscribers,
            if self.unix { "unix" } else { "tcp" }
        )
    }

    /// What every description of the recording begins with: frames come at their time.
    pub fn front(&self) -> String {
        format!(
            "filesrc location={} ! h264parse ! identity sync=true",
            self.film
        )
    }
}

/// A host that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Served {
    /// Of its process.
    pub pid: i32,
    /// Its scanouts.
    pub targets: Vec<Target>,
    /// What is added to a frame's PTS for its time in CLOCK_MONOTONIC, in ns.
    pub base: i64,
}

impl Served {
    /// For [`Contender::Source`], which runs where it is watched.
    pub fn here(case: &Case) -> Self {
        let target = |scanout_id| Target {
            address: String::new(),
            scanout_id,
        };
        Self {
            pid: std::process::id() as i32,
            targets: (0..case.scanouts).map(target).collect(),
            base: 0,
        }
    }
}

/// What a measurement found. Times are in microseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// From the moment a frame is due to the moment it is out, of each frame and subscriber.
    pub latency_us: Vec<f64>,
    /// CPU time of the host's process for a frame and subscriber.
    pub host_us: f64,
    /// The same of the subscribers' process.
    pub client_us: f64,
    /// Times that a thread of the host's gave the CPU away, for a frame and subscriber.
    pub host_switches: f64,
    /// Frames that should have come, over all subscribers.
    pub expected: u64,
    /// Of those, the ones that did not.
    pub lost: u64,
}
