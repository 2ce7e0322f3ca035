// SPDX-License-Identifier: MIT OR Apache-2.0

//! When to ask whether the host is still there, and when to give it up.
//!
//! Something is waited for that must come: the reply to the oldest open request, or a PONG. After
//! half of `timeout` a PING goes out, after all of it the host is dead, or alive and not
//! answering. An idle connection says something now and then.

use std::time::{Duration, Instant};

use helix_protocol::wait::Deadline;

/// An idle connection says something this often: deployed hosts close one whose client has been
/// silent for 60 s or more (quirk 10), and behind NAT nobody says when the host has gone (L25).
pub const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing.
    Nothing,
    /// Ask.
    Ping,
    /// Neither a reply nor a PONG came in time.
    Dead,
    /// A PONG came, but no reply.
    Unanswered,
}

/// The clock of one connection.
pub struct Liveness {
    timeout: Option<Duration>,
    sign_of_life: Duration,
    /// When the host last sent or took something.
    progress: Instant,
    waiting_since: Instant,
    /// A PING was sent in this waiting time, and whether its PONG has come.
    ping: Option<bool>,
    /// When this side last sent something.
    spoke: Instant,
}

impl Liveness {
    /// `timeout` of `None` never gives a host up.
    pub fn new(timeout: Option<Duration>, sign_of_life: Duration) -> Self {
        let now = Instant::now();
        Self {
            timeout,
            sign_of_life,
            progress: now,
            waiting_since: now,
            ping: None,
            spoke: now,
        }
    }

    /// This side has sent something.
    pub fn spoke(&mut self) {
        self.spoke = Instant::now();
    }

    /// This side has sent a PING.
    pub fn pinged(&mut self) {
        self.ping = Some(false);
        self.spoke();
    }

    /// The host has answered a PING.
    pub fn pong(&mut self) {
        self.ping = self.ping.map(|_| true);
    }

    /// The host has sent or taken something.
    pub fn progress(&mut self) {
        self.progress = Instant::now();
    }

    /// What is waited for is something else from now on.
    pub fn start_waiting(&mut self) {
        self.waiting_since = Instant::now();
        self.ping = None;
    }

    /// When to ask [`Liveness::due`] again. `waiting`: a reply is.
    pub fn deadline(&self, waiting: bool) -> Deadline {
        let sign_of_life = Deadline::at(self.spoke + self.sign_of_life);
        let Some(limit) = self.timeout else {
            return sign_of_life;
        };
        let due = match (waiting, self.ping) {
            // First to ask whether the host is there, then to give up.
            (true, None) => limit / 2,
            (true, Some(_)) | (false, Some(false)) => limit,
            (false, None | Some(true)) => return sign_of_life,
        };
        Deadline::at(self.waiting_since + due).min(sign_of_life)
    }

    /// What is to be done. `waiting`: a reply is waited for; `sending`: not all is sent.
    pub fn due(&mut self, waiting: bool, sending: bool) -> Due {
        if self.spoke.elapsed() >= self.sign_of_life {
            // An idle connection begins to wait with its PING, unless it waits for a PONG already.
            if !waiting && self.ping != Some(false) {
                self.start_waiting();
            }
            return Due::Ping;
        }
        let Some(limit) = self.timeout else {
            return Due::Nothing;
        };
        if !self.deadline(waiting).has_passed() {
            return Due::Nothing;
        }
        if sending && self.progress.elapsed() < limit {
            // Still being sent, over a slow line.
            self.waiting_since = self.progress;
            return Due::Nothing;
        }
        match self.ping {
            None => Due::Ping,
            Some(false) => Due::Dead,
            Some(true) => Due::Unanswered,
        }
    }
}
