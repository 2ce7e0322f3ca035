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
use super::{Format, Item};
use crate::picture::Picture;
use crate::pixels::Pixels;
use crate::virtgpu::Resource;

/// Encode sessions use this session id by habit.
pub(super) const SESSION_ID: u16 = 1;

/// A connection that lasts as long, and not because a frame is waited for, shows that the host is
/// well. One that ends sooner may be one of many that end at once.
const SETTLED: Duration = Duration::from_secs(2);

/// Pictures between two messages that they travel another way: upstream may have buffers of both
/// kinds in turn.
const SELDOM: u32 = 30;

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
    /// Bytes of pixels that were sent of it.
    pixels: usize,
    pub forced: bool,
    /// The session's, when the frame was submitted.
    pub epoch: u32,
    /// When its frame was submitted.
    pub submitted: Instant,
    /// When its request was first handed to the connection.
    pub sent: Instant,
    pub wait: Wait,
    /// What the host calls it, where that was agreed.
    pub tag: RequestTag,
    /// The reply, which came before that to an older request.
    pub reply: Option<(FrameResponse, Payload)>,
}

/// What is still expected of an open request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// A reply for its frame.
    ForFrame,
    /// An end: its frame is sent again, but until it is answered it has a place at the host.
    ForPlace,
    /// Nothing: its frame was reported as dropped. Its reply, should it come, belongs to nobody
    /// else.
    Over,
}

impl Open {
    /// Its frame no longer waits for its reply.
    pub fn abandon(&mut self, wait: Wait) {
        self.wait = wait;
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
    /// Frames to be sent once more when the host has a place for them, oldest first: older than
    /// those in the session's queue.
    again: VecDeque<(Open, Picture)>,
    pub choice: Choice,
    host: Arc<Agreement>,
    last_id: u16,
    /// CONFIG_REQs without CONFIG_RESP.
    pub unconfirmed: u32,
    /// How the last picture was sent.
    way: Way,
    /// What the client was told of it, and how many pictures ago.
    announced: Option<Way>,
    told: u32,
    pub after_loss: bool,
    /// Nothing leaves before a keyframe, at the beginning and after a flush: how many frames had to
    /// be one and were none.
    pub passed_over: Option<u32>,
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
        let announced = choice.only_way();
        Self {
            since: Instant::now(),
            open: VecDeque::new(),
            again: VecDeque::new(),
            choice,
            host,
            last_id: 0,
            unconfirmed: 0,
            way: Way::default(),
            announced,
            told: 0,
            after_loss,
            passed_over: Some(0),
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
        // known already, unless others were given meanwhile.
        let others = matches!(worker.shared.state().queue.front(), Some(Item::Format(_)));
        if let Some(format) = worker.format.filter(|_| !others) {
            self.send_format(worker, connection, format)?;
        }
        loop {
            self.send_queued(worker, connection)?;
            let waiting = self.is_waiting_for_reply();
            let deadline = self.liveness.deadline(waiting, connection.unsent_since());
            let event = connection.next(&mut worker.waiter, deadline)?;
            self.count(worker, connection);
            match event {
                Event::Message(envelope) => self.receive(worker, envelope.message)?,
                // The socket was read before these.
                Event::Woken | Event::TimedOut => self.liveness.looked(),
                Event::Drained => {}
            }
            self.check_time(worker, connection)?;
        }
    }

    /// The connection takes its frames with it.
    pub fn lose_frames(self, worker: &Worker) {
        let wanted = |open: &Open| open.wait == Wait::ForFrame;
        let again = self.again.into_iter().map(|(open, _)| open);
        for open in self.open.into_iter().filter(wanted).chain(again) {
            worker.drop_frame(open.frame, open.epoch, "the host was lost");
        }
    }

    /// Whether the host takes another picture now: fewer than `limit` are with it, and not as many
    /// bytes of them that it would leave this one unread, and a PING behind it ("A full host" in
    /// docs/protocol.md).
    fn has_place(&self, limit: u32) -> bool {
        // As far as anybody can know: one that was given up may be skipped, and would take its place
        // for ever.
        let at_host = |open: &&Open| open.wait != Wait::Over && open.reply.is_none();
        let (mut count, mut bytes) = (0, 0);
        for open in self.open.iter().filter(at_host) {
            count += 1;
            bytes += open.pixels;
        }
        let is_legacy = self.host.capabilities.is_none();
        count < limit && (is_legacy || bytes < self.host.max_pixels() as usize)
    }

    /// Sends what the host has a place for, those first that are sent again.
    fn send_queued(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
    ) -> Result<(), End> {
        while let Some((mut open, picture)) = self.next_again(worker) {
            self.liveness.spoke();
            open.forced |= std::mem::take(&mut worker.force_keyframe);
            open.resource = self.choice.choose(open.resource.as_ref());
            self.send_frame(worker, connection, open, picture)?;
        }
        while let Some(item) = self.next_queued(worker) {
            self.liveness.spoke();
            match item {
                Item::Format(format) => {
                    worker.format = Some(format);
                    self.send_format(worker, connection, format)?;
                }
                Item::Frame(request, epoch, submitted) => {
                    let interval = worker.settings.keyframe_interval;
                    let due = interval > 0 && worker.since_keyframe >= interval;
                    // After a flush nobody has what this frame could refer to.
                    let flushed = worker.epoch != epoch;
                    worker.epoch = epoch;
                    if flushed {
                        self.passed_over.get_or_insert(0);
                    }
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
                        pixels: 0,
                        forced,
                        epoch,
                        submitted,
                        sent: Instant::now(),
                        wait: Wait::ForFrame,
                        tag: RequestTag::default(),
                        reply: None,
                    };
                    self.send_frame(worker, connection, open, request.picture)?;
                }
            }
        }
        Ok(())
    }

    fn next_again(&mut self, worker: &Worker) -> Option<(Open, Picture)> {
        while let Some((open, _)) = self.again.front()
            && worker.is_flushed(open.epoch)
        {
            self.again.pop_front();
            worker.release();
        }
        let limit = worker.shared.state().limit;
        let is_next = !self.again.is_empty() && self.has_place(limit);
        is_next.then(|| self.again.pop_front()).flatten()
    }

    fn next_queued(&self, worker: &Worker) -> Option<Item> {
        let mut state = worker.shared.state();
        match state.queue.front()? {
            Item::Frame(..) if !self.again.is_empty() || !self.has_place(state.limit) => None,
            _ => state.queue.pop_front(),
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
        open.tag = self.next_tag(open.epoch);
        open.pixels = 0;
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
                End::Hopeless(format!(
                    "a picture cannot be sent to {} as pixels: {reason}; have it in memory that \
                     the CPU can read (a capsfilter video/x-raw before the element asks for that)\
                     , or use transfer=resource-id where the host resolves ids",
                    worker.address
                ))
            })?;
            (wire.width, wire.height, wire.stride) = (pixels.width, pixels.height, pixels.stride);
            // set_format() has compared the size with the protocol's limit, below 4 GiB.
            let size = pixels.size() as u32;
            connection.send_with(encode::frame_request(SESSION_ID, &wire, size), pixels);
            open.pixels = size as usize;
            self.pixel_bytes += u64::from(size);
            Way::Pixels
        };
        self.way = way;
        self.told = self.told.saturating_add(1);
        let is_news = self.announced != Some(way);
        if is_news && (self.announced.is_none() || self.told >= SELDOM) {
            self.announce(worker, way, "");
        }
        if !self.is_waiting_for_reply() {
            self.liveness.start_waiting();
        }
        open.picture = Some(picture);
        self.open.push_back(open);
        Ok(())
    }

    /// Tells the client how pictures travel now.
    pub fn announce(&mut self, worker: &Worker, way: Way, reason: &str) {
        self.announced = Some(way);
        self.told = 0;
        worker.client.transfer(way, reason);
    }

    /// Takes an open frame, which the host has just refused as a resource, to be sent again, and
    /// then those that were sent behind it. They will be answered before it, and a stream in that
    /// order would show the frames in that order; so those answers are not used, and it goes on
    /// from a keyframe.
    pub fn send_again(&mut self, worker: &mut Worker, index: usize) {
        self.liveness.start_waiting();
        // The ERROR was the answer to it.
        let Some(mut refused) = self.open.remove(index) else {
            return;
        };
        if worker.is_flushed(refused.epoch) {
            // What is behind it and not flushed begins with a keyframe, and so does without it.
            worker.release();
            self.finish_ready(worker);
            return;
        }
        let mut again = Vec::new();
        if let Some(picture) = refused.picture.take() {
            again.push((refused, picture));
        }
        let behind = self.open.range_mut(index..);
        for open in behind.filter(|open| open.wait == Wait::ForFrame) {
            let Some(picture) = open.picture.clone() else {
                continue;
            };
            open.abandon(Wait::ForPlace);
            let once_more = Open {
                picture: None,
                resource: open.resource.clone(),
                wait: Wait::ForFrame,
                reply: None,
                ..*open
            };
            again.push((once_more, picture));
        }
        // Some may have been answered early.
        self.open
            .retain(|open| open.wait != Wait::ForPlace || open.reply.is_none());
        again[0].0.forced |= again.len() > 1;
        for frame in again.into_iter().rev() {
            self.again.push_front(frame);
        }
    }

    fn send_ping(&mut self, connection: &mut Connection<Pixels>) {
        connection.send(encode::ping(SESSION_ID));
        self.liveness.pinged();
    }

    pub fn is_waiting_for_reply(&self) -> bool {
        self.open.iter().any(|open| open.wait != Wait::Over)
    }

    fn count(&mut self, worker: &Worker, connection: &Connection<Pixels>) {
        let bytes = (connection.bytes_sent(), connection.bytes_received());
        if bytes.1 != self.bytes.1 {
            self.liveness.looked();
        }
        if bytes != self.bytes {
            // Not now: since then, it may have been waited for more.
            self.liveness.progress(connection.last_moved());
            let mut counts = worker.shared.counts();
            counts.bytes_sent += bytes.0 - self.bytes.0;
            counts.bytes_received += bytes.1 - self.bytes.1;
            counts.pixel_bytes += std::mem::take(&mut self.pixel_bytes);
            counts.resource_frames += std::mem::take(&mut self.resource_frames);
            counts.way = self.way;
            self.bytes = bytes;
        }
    }

    fn check_time(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
    ) -> Result<(), End> {
        let waiting = self.is_waiting_for_reply();
        let due = self.liveness.due(waiting, connection.unsent_since());
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
                        "it is alive, but answers frames no more: {UNANSWERED} in a row were given \
                         up, each after {waited} ms (timeout)"
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
