// SPDX-License-Identifier: MIT OR Apache-2.0

//! When to ask whether the host is still there, and when to give it up.
//!
//! Something is waited for that must come: the reply to the oldest open request, or a PONG. After
//! half of `timeout` a PING goes out, after all of it the host is dead, or alive and not
//! answering. An idle connection says something now and then. While a picture is being sent there is no
//! PING, which would come behind it: a host that takes nothing of it for all of `timeout` is dead.
//!
//! The thread that asks may have been kept from the connection for longer than that. So a PING has
//! at least half of `timeout` from its own sending on, and nobody is given up before the socket
//! was looked at once after it: the answer may lie there.

use std::time::{Duration, Instant};

use helix_protocol::wait::Deadline;

/// An idle connection says something this often: deployed hosts close one whose client has been
/// silent for 60 s or more (quirk 10), and behind NAT nobody says when the host has gone (L25).
pub const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

/// So often the socket is looked at before a host is given up that takes nothing: the first time may end, for a
/// wake-up, before it comes to what can be sent.
const LOOKS: u32 = 2;

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

/// A PING on its way.
#[derive(Clone, Copy)]
struct Ping {
    sent: Instant,
    /// Its PONG has come.
    answered: bool,
    /// The socket was read after it was sent.
    looked: bool,
}

/// The clock of one connection.
pub struct Liveness {
    timeout: Option<Duration>,
    sign_of_life: Duration,
    /// When the host last sent or took something.
    progress: Instant,
    waiting_since: Instant,
    /// The first PING of this waiting time.
    ping: Option<Ping>,
    /// When this side last sent something.
    spoke: Instant,
    /// How often it was asked since the host should have taken something.
    doubts: u32,
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
            doubts: 0,
        }
    }

    /// This side has sent something.
    pub fn spoke(&mut self) {
        self.spoke = Instant::now();
    }

    /// This side has sent a PING.
    pub fn pinged(&mut self) {
        // One more tells nothing that this waiting time's first one does not.
        self.ping.get_or_insert(Ping {
            sent: Instant::now(),
            answered: false,
            looked: false,
        });
        self.spoke();
    }

    /// The socket was read, and what it had is taken into account.
    pub fn looked(&mut self) {
        if let Some(ping) = &mut self.ping {
            ping.looked = true;
        }
    }

    /// The host has answered a PING.
    pub fn pong(&mut self) {
        if let Some(ping) = &mut self.ping {
            ping.answered = true;
        }
    }

    /// The host has sent or taken something, the last of it at that time.
    pub fn progress(&mut self, at: Instant) {
        self.progress = at;
        self.doubts = 0;
    }

    /// What is waited for is something else from now on.
    pub fn start_waiting(&mut self) {
        self.waiting_since = Instant::now();
        self.ping = None;
    }

    /// When to ask [`Liveness::due`] again. `waiting`: a reply is; `unsent`: since when the host takes
    /// nothing of what is to be sent, if not all is.
    pub fn deadline(&self, waiting: bool, unsent: Option<Instant>) -> Deadline {
        let sign_of_life = Deadline::at(self.spoke + self.sign_of_life);
        let Some(limit) = self.timeout else {
            return sign_of_life;
        };
        let due = match (unsent, self.ping) {
            (Some(since), _) => since.max(self.progress) + limit,
            // First to ask whether the host is there, then to give up.
            (None, None) if waiting => self.waiting_since + limit / 2,
            (None, Some(ping)) if waiting || !ping.answered => {
                (self.waiting_since + limit).max(ping.sent + limit / 2)
            }
            _ => return sign_of_life,
        };
        Deadline::at(due).min(sign_of_life)
    }

    /// What is to be done; for `waiting` and `unsent` see [`Liveness::deadline`].
    pub fn due(&mut self, waiting: bool, unsent: Option<Instant>) -> Due {
        if self.spoke.elapsed() >= self.sign_of_life {
            // An idle connection begins to wait with its PING, unless it waits for a PONG already.
            if !waiting && self.ping.is_none_or(|ping| ping.answered) {
                self.start_waiting();
            }
            return Due::Ping;
        }
        if let Some(since) = unsent {
            // It can answer when it has all of it.
            self.waiting_since = self.waiting_since.max(since).max(self.progress);
        }
        if self.timeout.is_none() || !self.deadline(waiting, unsent).has_passed() {
            return Due::Nothing;
        }
        if unsent.is_some() {
            self.doubts += 1;
            return if self.doubts > LOOKS {
                Due::Dead
            } else {
                Due::Nothing
            };
        }
        match self.ping {
            None => Due::Ping,
            Some(ping) if !ping.looked => Due::Nothing,
            Some(ping) if ping.answered => Due::Unanswered,
            Some(_) => Due::Dead,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(20);

    #[test]
    fn a_host_is_not_given_up_before_it_was_listened_to_after_the_ping() {
        let mut liveness = Liveness::new(Some(LIMIT), SIGN_OF_LIFE);
        // What kept this thread from the connection took longer than the host may.
        thread::sleep(2 * LIMIT);
        assert_eq!(liveness.due(true, None), Due::Ping);
        liveness.pinged();
        assert_eq!(liveness.due(true, None), Due::Nothing);
        thread::sleep(2 * LIMIT);
        assert_eq!(liveness.due(true, None), Due::Nothing);
        liveness.looked();
        assert_eq!(liveness.due(true, None), Due::Dead);
        liveness.pong();
        assert_eq!(liveness.due(true, None), Due::Unanswered);
    }

    #[test]
    fn a_late_ping_has_time_of_its_own() {
        let limit = Duration::from_secs(20);
        let mut liveness = Liveness::new(Some(limit), SIGN_OF_LIFE);
        liveness.waiting_since -= 2 * limit;
        assert_eq!(liveness.due(true, None), Due::Ping);
        liveness.pinged();
        liveness.looked();
        assert_eq!(liveness.due(true, None), Due::Nothing);
    }

    #[test]
    fn pings_that_only_show_life_do_not_put_the_decision_off() {
        let mut liveness = Liveness::new(Some(LIMIT), SIGN_OF_LIFE);
        thread::sleep(LIMIT);
        assert_eq!(liveness.due(true, None), Due::Ping);
        liveness.pinged();
        liveness.pong();
        thread::sleep(LIMIT);
        liveness.pinged();
        liveness.looked();
        assert_eq!(liveness.due(true, None), Due::Unanswered);
    }

    #[test]
    fn a_host_that_takes_nothing_is_waited_for_at_rest_and_lost_after_the_timeout() {
        let limit = Duration::from_secs(20);
        let mut liveness = Liveness::new(Some(limit), 2 * limit);
        let past = |age| Instant::now().checked_sub(age).unwrap();
        let mut ask = |unsent, progress| {
            liveness.progress = past(progress);
            let due = liveness.due(true, Some(past(unsent)));
            let rests = !liveness.deadline(true, Some(past(unsent))).has_passed();
            (due, rests)
        };
        // A PING would come behind what is not sent, and tell nothing.
        assert_eq!(ask(limit * 3 / 4, limit), (Due::Nothing, true));
        // It says something, if it takes nothing.
        assert_eq!(ask(limit, limit / 4), (Due::Nothing, true));
        // This thread may have been away: what can be sent now is tried first.
        for _ in 0..LOOKS {
            assert_eq!(ask(limit, limit), (Due::Nothing, false));
        }
        assert_eq!(ask(limit, limit).0, Due::Dead);
    }

    #[test]
    fn a_host_has_its_time_when_it_has_all() {
        let limit = Duration::from_secs(20);
        let mut liveness = Liveness::new(Some(limit), 2 * limit);
        liveness.waiting_since -= limit;
        liveness.progress(Instant::now());
        assert_eq!(liveness.due(true, Some(Instant::now())), Due::Nothing);
        assert_eq!(liveness.due(true, None), Due::Nothing);
    }
}
