// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a stream waits for, and until when: PipeWire does not tell when a producer has nothing to say.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long a producer's buffers may be gone without a new format before it counts as vanished.
/// Renegotiation removes them for some milliseconds.
const GONE_AFTER: Duration = Duration::from_secs(1);

/// How long a producer may leave an offer unanswered before the daemon is asked whether it does anything
/// at all. An answer takes some milliseconds. PipeWire 0.3.65 says nothing of it when there is none, and
/// leaves the stream as it is; 1.4 ends the stream.
const ANSWER_AFTER: Duration = Duration::from_secs(4);

/// How long after the daemon's word the producer counts as having no such format. A daemon that was
/// frozen answers first and negotiates then.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// How long after a format a frame is waited for before the producer is asked for one; doubled
/// each time, so that a producer which has nothing to show is asked only a few times.
const FRAME_AFTER: Duration = Duration::from_millis(500);
const MOST_REQUESTS: u32 = 4;

/// How long a producer may take to choose among modifiers before we do: it has to try allocating
/// with them.
const CHOOSE_AFTER: Duration = Duration::from_millis(500);

/// How far an offer has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Answer {
    /// There is none, or it is answered.
    #[default]
    Given,
    /// The daemon is to be asked then.
    Awaited(Instant),
    /// It was, with this sync.
    Doubted(i32),
    /// It has said then that it is alive.
    Due(Instant),
}

/// The moments at which something has been waited for long enough.
#[derive(Debug, Default)]
pub(super) struct Waits {
    answer: Cell<Answer>,
    choice: Cell<Option<Instant>>,
    frame: Cell<Option<Instant>>,
    /// Times that a frame was asked for since the format.
    requests: Cell<u32>,
    gone: Cell<Option<Instant>>,
}

impl Waits {
    /// The producer has an offer that it has not answered.
    pub fn offered(&self) {
        self.answer
            .set(Answer::Awaited(Instant::now() + ANSWER_AFTER));
        self.choice.set(None);
    }

    /// The daemon was asked, with the sync `seq`, whether it does anything.
    pub fn doubted(&self, seq: i32) {
        self.answer.set(Answer::Doubted(seq));
    }

    /// The last sync that the daemon has answered is `seq`.
    pub fn daemon_said(&self, seq: Option<i32>) {
        if let Answer::Doubted(asked) = self.answer.get()
            && seq == Some(asked)
        {
            let at = Instant::now() + ANSWER_LIMIT;
            self.answer.set(Answer::Due(at));
        }
    }

    /// It has answered with modifiers to choose from.
    pub fn format_open(&self) {
        self.answer.set(Answer::Given);
        self.choice.set(Some(Instant::now() + CHOOSE_AFTER));
    }

    /// It has fixed a format. One that is `paced`, with a rate of its own, is not asked for a frame: it
    /// draws anyhow, and being paused does harm. Debian 12's pipewiresink loses a buffer with each frame
    /// that it has meanwhile, and stands still when none is left.
    pub fn format_fixed(&self, paced: bool) {
        self.answer.set(Answer::Given);
        self.choice.set(None);
        self.gone.set(None);
        self.requests.set(0);
        let at = Instant::now() + FRAME_AFTER;
        self.frame.set((!paced).then_some(at));
    }

    /// There is no format.
    pub fn format_cleared(&self) {
        self.choice.set(None);
    }

    /// A buffer has come.
    pub fn buffer_added(&self) {
        self.gone.set(None);
    }

    /// No buffer is left, or the stream is linked to nobody.
    pub fn producer_gone(&self) {
        let at = Instant::now() + GONE_AFTER;
        self.gone.set(self.gone.get().or(Some(at)));
    }

    /// A frame has come.
    pub fn frame_came(&self) {
        self.frame.set(None);
    }

    /// The producer was asked for a frame.
    pub fn frame_asked(&self) {
        let requests = self.requests.get() + 1;
        self.requests.set(requests);
        let next = Instant::now() + FRAME_AFTER * 2_u32.pow(requests.min(MOST_REQUESTS));
        self.frame.set((requests < MOST_REQUESTS).then_some(next));
    }

    /// Whether an offer is not answered yet.
    pub fn is_answer_pending(&self) -> bool {
        self.answer.get() != Answer::Given
    }

    /// When to ask the daemon whether it does anything.
    pub fn doubt_due(&self) -> Option<Instant> {
        match self.answer.get() {
            Answer::Awaited(at) => Some(at),
            _ => None,
        }
    }

    /// When an offer counts as refused.
    pub fn answer_due(&self) -> Option<Instant> {
        match self.answer.get() {
            Answer::Due(at) => Some(at),
            _ => None,
        }
    }

    /// When to choose a modifier that the producer has left open.
    pub fn choice_due(&self) -> Option<Instant> {
        self.choice.get()
    }

    /// When to ask the producer for a frame.
    pub fn frame_due(&self) -> Option<Instant> {
        self.frame.get()
    }

    /// When the producer counts as vanished. Not while it has an offer to answer: buffers go with the old
    /// format, and with the link where there is no new one.
    pub fn gone_due(&self) -> Option<Instant> {
        self.gone.get().filter(|_| !self.is_answer_pending())
    }

    /// The next of all these moments.
    pub fn next(&self) -> Option<Instant> {
        let moments = [
            self.doubt_due(),
            self.answer_due(),
            self.choice_due(),
            self.frame_due(),
            self.gone_due(),
        ];
        moments.into_iter().flatten().min()
    }
}

/// Whether a moment has come.
pub(super) fn is_due(moment: Option<Instant>) -> bool {
    moment.is_some_and(|moment| moment <= Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_producer_with_an_offer_to_answer_has_not_vanished() {
        let waits = Waits::default();
        waits.producer_gone();
        assert!(waits.gone_due().is_some());
        waits.offered();
        assert_eq!(waits.gone_due(), None);
        assert!(waits.next().is_some() && waits.next() == waits.doubt_due());
        waits.format_open();
        assert!(waits.gone_due().is_some(), "it has answered");
        waits.format_fixed(false);
        assert_eq!((waits.gone_due(), waits.answer_due()), (None, None));
    }

    #[test]
    fn an_offer_is_not_refused_before_the_daemon_has_said_that_it_is_alive() {
        let waits = Waits::default();
        waits.offered();
        waits.doubted(7);
        assert_eq!((waits.next(), waits.is_answer_pending()), (None, true));
        waits.daemon_said(Some(6));
        assert_eq!(waits.answer_due(), None);
        waits.daemon_said(Some(7));
        assert!(waits.answer_due().is_some());
        // One that was asked about another offer.
        waits.offered();
        waits.daemon_said(Some(7));
        assert_eq!(waits.answer_due(), None);
    }

    #[test]
    fn what_has_gone_once_is_waited_for_from_then_on() {
        let waits = Waits::default();
        waits.producer_gone();
        let first = waits.gone_due();
        waits.producer_gone();
        assert_eq!(waits.gone_due(), first);
        waits.buffer_added();
        assert_eq!(waits.gone_due(), None);
    }

    #[test]
    fn a_frame_is_asked_for_a_few_times_only() {
        let waits = Waits::default();
        waits.format_fixed(false);
        let mut asked = 0;
        while waits.frame_due().is_some() {
            waits.frame_asked();
            asked += 1;
        }
        assert_eq!(asked, MOST_REQUESTS);
        waits.format_fixed(false);
        assert!(waits.frame_due().is_some());
        waits.frame_came();
        assert_eq!(waits.next(), None);
        waits.format_fixed(true);
        assert_eq!(waits.next(), None);
    }
}
