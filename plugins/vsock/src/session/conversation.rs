// SPDX-License-Identifier: MIT OR Apache-2.0

//! The time on one connection: requests out, replies in, until it is of no use any more. What is
//! done with the replies stands in replies.rs.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_protocol::connection::{Body, Event};
use helix_protocol::message::{Capabilities, FrameRequest, FrameResponse, RequestTag};
use helix_protocol::{Agreement, Connection, Payload, encode};

use super::liveness::{Due, Liveness};
use super::transfer::{Choice, Way};
use super::worker::{End, Worker};
use super::{Format, Item, Submitted};
use crate::picture::Picture;
use crate::pixels::Pixels;
use crate::virtgpu::Resource;

/// Encode sessions use this session id by habit.
pub(super) const SESSION_ID: u16 = 1;

/// A connection that lasts as long, and not because a frame is waited for, shows that the host is
/// well. One that ends sooner may be one of many that end at once.
const SETTLED: Duration = Duration::from_secs(2);

/// So many frames in a row without an answer, and the host will not answer any.
const UNANSWERED: u32 = 3;

/// A request that was sent and has no reply yet.
pub(super) struct Open {
    pub frame: u32,
    pub pts: i64,
    pub duration: i64,
    /// Kept until the reply: the host may refuse it, or look at its memory. `None` where nobody
    /// waits for the reply and the pixels were sent.
    pub picture: Option<Picture>,
    /// What it was sent as; `None` = as pixels.
    pub resource: Option<Arc<Resource>>,
    pub forced: bool,
    pub submitted: Submitted,
    /// When its request was handed to the connection.
    pub sent: Instant,
    /// The frame was reported as dropped, or sent again; its reply, should it come, belongs to
    /// nobody else.
    pub abandoned: bool,
    /// What the host calls it, where that was agreed.
    pub tag: RequestTag,
    /// The reply, which came before that to an older request.
    pub reply: Option<(FrameResponse, Payload)>,
}

impl Open {
    /// Nobody waits for its reply any more.
    pub fn abandon(&mut self) {
        self.abandoned = true;
        if self.resource.is_none() {
            // What is still being sent of it holds its buffer itself.
            self.picture = None;
        }
    }
}

/// The time on one connection.
pub(super) struct Conversation {
    since: Instant,
    /// Oldest first.
    pub open: VecDeque<Open>,
    pub choice: Choice,
    host: Arc<Agreement>,
    last_id: u16,
    /// CONFIG_REQs without CONFIG_RESP.
    pub unconfirmed: u32,
    /// How the last picture was sent.
    way: Way,
    /// What the client was told of it.
    pub announced: Way,
    pub after_loss: bool,
    /// The host has answered a request, if only with an ERROR.
    pub answered: bool,
    /// Frames in a row that were given up for want of an answer.
    pub unanswered: u32,
    /// PTS of the request that was answered last with a frame.
    pub last_answered: Option<i64>,
    /// The last ERROR, for when the connection is lost.
    pub last_error: Option<String>,
    /// ERRORs since the last frame.
    pub refusals: u32,
    /// The client knows that frames are refused.
    pub told_of_refusal: bool,
    pub liveness: Liveness,
    /// Sent and received, as far as they are in the session's counts.
    bytes: (u64, u64),
    /// Not yet in the session's counts.
    pixel_bytes: u64,
    /// Not yet in the session's counts.
    resource_frames: u64,
}

impl Conversation {
    pub fn new(worker: &Worker, choice: Choice, host: Arc<Agreement>, after_loss: bool) -> Self {
        Self {
            since: Instant::now(),
            open: VecDeque::new(),
            choice,
            host,
            last_id: 0,
            unconfirmed: 0,
            way: Way::default(),
            announced: Way::default(),
            after_loss,
            answered: false,
            unanswered: 0,
            last_answered: None,
            last_error: None,
            refusals: 0,
            told_of_refusal: false,
            liveness: Liveness::new(worker.timeout(), worker.settings.sign_of_life),
            bytes: (0, 0),
            pixel_bytes: 0,
            resource_frames: 0,
        }
    }

    /// Talks until the connection is of no use any more.
    pub fn run(&mut self, worker: &mut Worker, connection: &mut Connection<Pixels>) -> End {
        let Err(end) = self.talk(worker, connection);
        if self.since.elapsed() >= SETTLED && !self.is_waiting_for_reply() {
            // The next host gets the whole time again.
            worker.backoff = None;
        }
        match (end, self.last_error.take()) {
            (End::Lost(reason), Some(error)) if !reason.contains(&error) => {
                End::Lost(format!("{reason}; before that, {error}"))
            }
            (end, _) => end,
        }
    }

    fn talk(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
    ) -> Result<Infallible, End> {
        // Frames come only after set_format(), and its settings with them; after a loss they are
        // known already.
        if let Some(format) = worker.format {
            self.send_format(worker, connection, format)?;
        }
        loop {
            self.send_queued(worker, connection)?;
            let deadline = self.liveness.deadline(self.is_waiting_for_reply());
            let event = connection.next(&mut worker.waiter, deadline)?;
            self.count(worker, connection);
            match event {
                Event::Message(envelope) => self.receive(worker, connection, envelope.message)?,
                // The socket was read before these.
                Event::Woken | Event::TimedOut => self.liveness.looked(),
                Event::Drained => {}
            }
            self.check_time(worker, connection)?;
        }
    }

    /// The connection takes its frames with it.
    pub fn lose_frames(self, worker: &Worker) {
        for open in self.open.into_iter().filter(|open| !open.abandoned) {
            worker.drop_frame(open.frame, open.submitted, "the host was lost");
        }
    }

    fn send_queued(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
    ) -> Result<(), End> {
        loop {
            let Some(item) = worker.shared.state().queue.pop_front() else {
                return Ok(());
            };
            self.liveness.spoke();
            match item {
                Item::Format(format) => {
                    worker.format = Some(format);
                    self.send_format(worker, connection, format)?;
                }
                Item::Frame(request, submitted) => {
                    let interval = worker.settings.keyframe_interval;
                    let due = interval > 0 && worker.since_keyframe >= interval;
                    // After a flush nobody has what this frame could refer to.
                    let flushed = worker.epoch != submitted.epoch;
                    worker.epoch = submitted.epoch;
                    let forced = request.force_keyframe || worker.force_keyframe || due || flushed;
                    worker.force_keyframe = false;
                    worker.since_keyframe = if forced { 1 } else { worker.since_keyframe + 1 };
                    let resource = self.choice.choose(request.resource.as_ref());
                    let open = Open {
                        frame: request.frame,
                        pts: request.pts,
                        duration: request.duration,
                        picture: None,
                        resource,
                        forced,
                        submitted,
                        sent: Instant::now(),
                        abandoned: false,
                        tag: RequestTag::default(),
                        reply: None,
                    };
                    self.send_frame(worker, connection, open, request.picture)?;
                }
            }
        }
    }

    /// Fails where the host does not take such frames. The streaming thread has asked that too,
    /// but perhaps of the host before.
    fn send_format(
        &mut self,
        worker: &Worker,
        connection: &mut Connection<Pixels>,
        format: Format,
    ) -> Result<(), End> {
        if let Some(reason) = format.refused_by(&self.host) {
            return Err(End::Hopeless(format!("{}: {reason}", worker.address)));
        }
        connection.send(encode::config_req(SESSION_ID, &format.config));
        self.unconfirmed += 1;
        Ok(())
    }

    /// Whether requests have ids and epochs.
    pub fn is_tagged(&self) -> bool {
        self.host.can(Capabilities::REQUEST_IDS)
    }

    /// Whether CONFIG_REQ is answered.
    pub fn is_confirmed(&self) -> bool {
        self.host.can(Capabilities::CONFIG_RESP)
    }

    /// A name for the next request.
    fn next_tag(&mut self, epoch: u32) -> RequestTag {
        if !self.is_tagged() {
            return RequestTag::default();
        }
        self.last_id = next_id(self.last_id, |id| {
            self.open.iter().any(|open| open.tag.request_id == id)
        });
        RequestTag {
            epoch: epoch as u8,
            request_id: self.last_id,
        }
    }

    fn send_frame(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
        mut open: Open,
        picture: Picture,
    ) -> Result<(), End> {
        open.tag = self.next_tag(open.submitted.epoch);
        let mut wire = FrameRequest {
            resource_id: 0,
            width: picture.width,
            height: picture.height,
            format: picture.format.fourcc(),
            stride: picture.planes()[0].stride as u32,
            pts: open.pts,
            duration: open.duration,
            force_keyframe: open.forced,
            tag: open.tag,
        };
        let way = if let Some(resource) = &open.resource {
            wire.resource_id = resource.id.get();
            connection.send(encode::frame_request(SESSION_ID, &wire, 0));
            self.resource_frames += 1;
            Way::ResourceId
        } else {
            let limit = self.host.max_pixels() as usize;
            let pixels = Pixels::new(&picture, limit).map_err(|reason| {
                End::Hopeless(format!("a picture cannot be sent as pixels: {reason}"))
            })?;
            (wire.width, wire.height, wire.stride) = (pixels.width, pixels.height, pixels.stride);
            // set_format() has compared the size with the protocol's limit, below 4 GiB.
            let size = pixels.size() as u32;
            connection.send_with(encode::frame_request(SESSION_ID, &wire, size), pixels);
            self.pixel_bytes += u64::from(size);
            Way::Pixels
        };
        self.way = way;
        if way == Way::ResourceId && self.announced != way {
            self.announced = way;
            worker.client.transfer(way, "");
        }
        if !self.is_waiting_for_reply() {
            self.liveness.start_waiting();
        }
        open.picture = Some(picture);
        self.open.push_back(open);
        Ok(())
    }

    /// Sends an open frame again, which the host has just refused as a resource, and then those
    /// that were sent behind it. They will be answered before it, and a stream in that order
    /// would show the frames in that order; so those answers are not used, and it goes on from a
    /// keyframe. For this moment there may be more requests open than `max-in-flight`.
    pub fn send_again(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
        index: usize,
    ) -> Result<(), End> {
        self.liveness.start_waiting();
        // The ERROR was the answer to it.
        let Some(mut refused) = self.open.remove(index) else {
            return Ok(());
        };
        if worker.is_flushed(refused.submitted) {
            // What is behind it and not flushed begins with a keyframe, and so does without it.
            worker.release();
            self.finish_ready(worker);
            return Ok(());
        }
        let mut again = Vec::new();
        if let Some(picture) = refused.picture.take() {
            again.push((refused, picture));
        }
        for open in self.open.range_mut(index..).filter(|open| !open.abandoned) {
            let Some(picture) = open.picture.clone() else {
                continue;
            };
            open.abandon();
            let resource = open.resource.clone();
            let open = Open {
                picture: None,
                resource,
                abandoned: false,
                reply: None,
                ..*open
            };
            again.push((open, picture));
        }
        self.open
            .retain(|open| !open.abandoned || open.reply.is_none());
        again[0].0.forced |= again.len() > 1;
        for (mut open, picture) in again {
            open.resource = self.choice.choose(open.resource.as_ref());
            self.send_frame(worker, connection, open, picture)?;
        }
        Ok(())
    }

    fn send_ping(&mut self, connection: &mut Connection<Pixels>) {
        connection.send(encode::ping(SESSION_ID));
        self.liveness.pinged();
    }

    pub fn is_waiting_for_reply(&self) -> bool {
        self.open.iter().any(|open| !open.abandoned)
    }

    fn count(&mut self, worker: &Worker, connection: &Connection<Pixels>) {
        let bytes = (connection.bytes_sent(), connection.bytes_received());
        if bytes.1 != self.bytes.1 {
            self.liveness.looked();
        }
        if bytes != self.bytes {
            self.liveness.progress();
            let mut state = worker.shared.state();
            state.counts.bytes_sent += bytes.0 - self.bytes.0;
            state.counts.bytes_received += bytes.1 - self.bytes.1;
            state.counts.pixel_bytes += std::mem::take(&mut self.pixel_bytes);
            state.counts.resource_frames += std::mem::take(&mut self.resource_frames);
            state.counts.way = self.way;
            self.bytes = bytes;
        }
    }

    fn check_time(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
    ) -> Result<(), End> {
        let waiting = self.is_waiting_for_reply();
        let due = self.liveness.due(waiting, connection.queued() > 0);
        let waited = worker.timeout().unwrap_or_default().as_millis();
        match due {
            Due::Nothing => Ok(()),
            Due::Ping => {
                self.send_ping(connection);
                Ok(())
            }
            Due::Dead => Err(End::Lost(format!(
                "no answer and no sign of life for {waited} ms (timeout)"
            ))),
            Due::Unanswered if !self.answered => Err(End::Hopeless(format!(
                "{} is alive but did not answer a FRAME_REQUEST within {waited} ms (timeout): is \
                 it a host that only pushes screens? Those skip frames to encode; use a \
                 helix-host, or a longer timeout",
                worker.address
            ))),
            Due::Unanswered => {
                self.abandon_oldest(worker)?;
                self.unanswered += 1;
                if self.unanswered >= UNANSWERED {
                    return Err(End::Lost(format!(
                        "it is alive, but answers frames no more: {UNANSWERED} in a row were                          given up, each after {waited} ms (timeout)"
                    )));
                }
                self.liveness.start_waiting();
                Ok(())
            }
        }
    }
}

/// The number after `last` that no open request has. None is 0: that is what an ERROR about no
/// request has.
fn next_id(last: u16, is_taken: impl Fn(u16) -> bool) -> u16 {
    let mut id = last;
    loop {
        id = id.checked_add(1).unwrap_or(1);
        // Far fewer are open than there are numbers.
        if !is_taken(id) {
            return id;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::next_id;

    #[test]
    fn an_id_is_not_given_again_while_its_request_is_open() {
        assert_eq!(next_id(0, |_| false), 1);
        assert_eq!(next_id(65_534, |_| false), 65_535);
        assert_eq!(next_id(65_535, |_| false), 1);
        assert_eq!(next_id(65_533, |id| id == 65_534), 65_535);
        assert_eq!(next_id(65_535, |id| id <= 2), 3);
    }
}
