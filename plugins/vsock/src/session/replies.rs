// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the host says, and to which request it belongs.
//!
//! With request ids a reply names its request. Without them (legacy hosts) replies come in
//! request order, but not for every request (quirk 3 of docs/protocol.md).
//!
//! Access units leave in the order of their requests, whatever the order in which replies come:
//! the host's encoder took the frames in that order, so an access unit refers to those before it,
//! and a decoder that gets them otherwise shows rubbish. A reply that comes early waits here.

use helix_protocol::message::{Config, ErrorMessage, FrameResponse};
use helix_protocol::{Message, Payload};

use super::AccessUnit;
use super::conversation::{Conversation, Open, Wait};
use super::delivery::Delivery;
use super::transfer::{Refusal, Way};
use super::worker::{End, Worker};

/// Requests that were given up and whose late replies are still waited for. Older ones are
/// forgotten.
const ABANDONED: usize = 64;

/// Resources that a host may keep without saying what became of them, until it is taken for lost.
/// They are buffers of somebody else's pool, and those are small (L4): the pool that the element
/// asks for has room for one fewer.
pub const HELD: u32 = 2;

/// A host that refuses so many frames in a row, and has encoded none, will not encode any; nor
/// does one make a keyframe that has passed over so many requests for one.
pub const REFUSALS: u32 = 120;

/// A PTS that went through a host may be off by this much (quirk 3 of docs/protocol.md).
const PTS_TOLERANCE_NS: u64 = 1000;

impl Conversation {
    pub fn receive(&mut self, worker: &mut Worker, message: Message) -> Result<(), End> {
        match message {
            Message::FrameResponse(response, data) if self.is_tagged() => {
                self.reply_by_id(worker, response, data);
            }
            Message::FrameResponse(response, data) => self.reply_in_order(worker, response, data),
            Message::Error(error) => return self.error(worker, &error),
            Message::Pong => self.liveness.pong(),
            Message::ConfigResp(in_force) if self.is_confirmed() => {
                self.configured(worker, &in_force);
            }
            // A client need not answer PING, deployed hosts send none; and what was agreed on in
            // the greeting stays.
            _ => {}
        }
        if self.passed_over >= Some(REFUSALS) {
            return Err(End::Hopeless(format!(
                "{} has sent no keyframe, though {REFUSALS} frames in a row asked for one: nothing \
                 can be decoded without it. Does its encoder make keyframes when asked?",
                worker.address
            )));
        }
        Ok(())
    }

    /// What is in force after the last CONFIG_REQ; answers to those before it are old news.
    fn configured(&mut self, worker: &Worker, in_force: &Config) {
        self.unconfirmed = self.unconfirmed.saturating_sub(1);
        if self.unconfirmed == 0
            && let Some(format) = &worker.format
        {
            worker.client.configured(&format.config, in_force);
        }
    }

    fn reply_by_id(&mut self, worker: &mut Worker, response: FrameResponse, data: Payload) {
        let index = self
            .open
            .iter()
            .position(|open| open.tag == response.tag && open.reply.is_none());
        let Some(index) = index else {
            // Said twice, or never asked.
            worker.shared.counts().unmatched += 1;
            return;
        };
        self.unanswered = 0;
        if self.open[index].wait != Wait::ForFrame {
            // No frame waits for it, so it is nobody's turn.
            if let Some(open) = self.open.remove(index) {
                self.finish(worker, &open, response, data);
            }
            return;
        }
        self.open[index].reply = Some((response, data));
        self.finish_ready(worker);
    }

    /// Finishes the oldest frames, as far as their replies are there.
    pub fn finish_ready(&mut self, worker: &mut Worker) {
        loop {
            let wanted = |open: &Open| open.wait == Wait::ForFrame;
            let oldest = self.open.iter().position(wanted);
            let ready = oldest.filter(|index| self.open[*index].reply.is_some());
            let Some(mut open) = ready.and_then(|index| self.open.remove(index)) else {
                return;
            };
            if let Some((response, data)) = open.reply.take() {
                self.finish(worker, &open, response, data);
            }
        }
    }

    /// Replies come in request order, but not for every request: one whose PTS fits a later
    /// request says that those before it were skipped (quirk 3).
    fn reply_in_order(&mut self, worker: &mut Worker, response: FrameResponse, data: Payload) {
        let near = |pts: i64| pts.abs_diff(response.pts) <= PTS_TOLERANCE_NS;
        let skipped = match self.open.iter().position(|open| near(open.pts)) {
            Some(skipped) => skipped,
            // The last reply once more.
            None if self.last_answered.is_some_and(near) => {
                worker.shared.counts().unmatched += 1;
                return;
            }
            None => 0,
        };
        self.unanswered = 0;
        for _ in 0..skipped {
            self.drop_open(worker, 0, "the host skipped it");
        }
        match self.open.pop_front() {
            Some(open) => self.finish(worker, &open, response, data),
            None => worker.shared.counts().unmatched += 1,
        }
    }

    /// The reply to a request that is no longer open.
    fn finish(&mut self, worker: &mut Worker, open: &Open, response: FrameResponse, data: Payload) {
        if open.resource.is_some() {
            self.choice.worked();
        }
        self.answered = true;
        self.last_answered = Some(open.pts);
        self.last_error = None;
        self.refusals = 0;
        worker.backoff = None;
        worker.encoded_any = true;
        self.liveness.start_waiting();
        match open.wait {
            Wait::ForFrame => self.finish_frame(worker, open, response, data),
            // What is sent instead begins with a keyframe.
            Wait::ForPlace => {}
            // Too late. Later frames may refer to this one, which nobody has.
            Wait::Over => worker.force_keyframe = true,
        }
    }

    /// The reply to a request whose frame waits for it.
    fn finish_frame(
        &mut self,
        worker: &mut Worker,
        open: &Open,
        response: FrameResponse,
        data: Payload,
    ) {
        if worker.is_flushed(open.epoch) {
            worker.release();
        } else if let Some(passed_over) = &mut self.passed_over
            && (!response.is_keyframe || data.is_empty())
        {
            // It refers to what nobody has.
            worker.force_keyframe = true;
            *passed_over += u32::from(open.forced);
            let reason = "a keyframe must come first, and this is none";
            worker.report_dropped(open.frame, open.epoch, reason);
        } else if data.is_empty() {
            worker.force_keyframe |= open.forced;
            let reason = "the host sent an empty access unit";
            worker.report_dropped(open.frame, open.epoch, reason);
        } else {
            self.passed_over = None;
            let access_unit = AccessUnit {
                response,
                data,
                after_loss: std::mem::take(&mut self.after_loss),
                forced: open.forced,
                took: open.submitted.elapsed(),
            };
            worker.shared.counts().reply.add(open.sent.elapsed());
            worker.shared.deliver(Delivery {
                frame: open.frame,
                epoch: open.epoch,
                outcome: Ok(access_unit),
            });
        }
    }

    /// An ERROR belongs to the request that it names, or to the oldest open one.
    fn error(&mut self, worker: &mut Worker, error: &ErrorMessage) -> Result<(), End> {
        worker.shared.counts().errors += 1;
        let reason = format!("the host says: {}: {}", error.code, error.text);
        let unanswered = |open: &Open| open.reply.is_none();
        let index = match error.tag.filter(|_| self.is_tagged()) {
            Some(tag) => self
                .open
                .iter()
                .position(|open| open.tag == tag && unanswered(open)),
            None => self.open.iter().position(unanswered),
        };
        let Some(index) = index else {
            if self.is_tagged() && error.tag.is_some_and(|tag| tag.request_id != 0) {
                // Said twice, or of what was never asked.
                worker.shared.counts().unmatched += 1;
                return Ok(());
            }
            if self.open.is_empty() {
                // About the connection, as from a host that takes no more clients.
                return Err(End::Lost(reason));
            }
            self.last_error = Some(reason);
            return Ok(());
        };
        self.answered = true;
        self.unanswered = 0;
        if self.open[index].wait != Wait::ForFrame {
            self.open.remove(index);
            return Ok(());
        }
        if self.is_refusal_of_resource(worker, index, error)? {
            self.send_again(worker, index);
            return Ok(());
        }
        self.refusals += 1;
        if !std::mem::replace(&mut self.told_of_refusal, true) {
            worker.client.refused(&reason);
        }
        self.drop_open(worker, index, &reason);
        self.liveness.start_waiting();
        if self.refusals >= REFUSALS && !worker.encoded_any {
            return Err(End::Hopeless(format!(
                "{} refused {REFUSALS} frames and encoded none; {reason}",
                worker.address
            )));
        }
        self.last_error = Some(reason);
        self.finish_ready(worker);
        Ok(())
    }

    /// Whether an open frame can be had as pixels after an ERROR.
    fn is_refusal_of_resource(
        &mut self,
        worker: &Worker,
        index: usize,
        error: &ErrorMessage,
    ) -> Result<bool, End> {
        let Some(resource) = &self.open[index].resource else {
            return Ok(false);
        };
        let id = resource.id;
        let text = format!(
            "the host refuses resource {id}: {}: {}",
            error.code, error.text
        );
        match self.choice.refused(resource, error.code) {
            Refusal::Frame => Ok(false),
            Refusal::Resource { all } => {
                if all {
                    self.announce(worker, Way::Pixels, &text);
                }
                Ok(true)
            }
            Refusal::OnlyWay => Err(End::Hopeless(format!(
                "transfer=resource-id: {text}. Is it the host that has this machine's virtio-gpu \
                 device? transfer=auto would send pixels"
            ))),
        }
    }

    fn drop_open(&mut self, worker: &mut Worker, index: usize, reason: &str) {
        if let Some(open) = self.open.remove(index)
            && open.wait == Wait::ForFrame
        {
            worker.force_keyframe |= open.forced;
            worker.drop_frame(open.frame, open.epoch, reason);
        }
    }

    /// Gives the oldest open request up, but remembers it: should the reply come late, it must not
    /// be taken for another's. Fails where the host keeps too many buffers in this way;
    /// they are free when the connection has ended.
    pub fn abandon_oldest(&mut self, worker: &mut Worker) -> Result<(), End> {
        let over = |open: &Open| open.wait == Wait::Over;
        if let Some(open) = self.open.iter_mut().find(|open| !over(open)) {
            let had_frame = open.wait == Wait::ForFrame;
            open.abandon(Wait::Over);
            if had_frame {
                worker.force_keyframe |= open.forced;
                let reason = "the host did not answer it in time";
                worker.drop_frame(open.frame, open.epoch, reason);
            }
        }
        if self.open.iter().filter(|open| over(open)).count() > ABANDONED
            && let Some(oldest) = self.open.iter().position(over)
        {
            self.open.remove(oldest);
        }
        self.finish_ready(worker);
        let abandoned = self.open.iter().filter(|open| over(open));
        let held = abandoned.filter(|open| open.picture.is_some()).count();
        if held >= HELD as usize {
            return Err(End::Lost(format!(
                "it did not answer {held} pictures that it may still read as resources"
            )));
        }
        Ok(())
    }
}
