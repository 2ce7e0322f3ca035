// SPDX-License-Identifier: MIT OR Apache-2.0

//! The time on one connection: requests out, replies in, and the question whether the host is
//! still there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_protocol::connection::{Body, Event};
use helix_protocol::message::{ErrorMessage, FrameRequest, FrameResponse};
use helix_protocol::wait::Deadline;
use helix_protocol::{Connection, Message, Payload, encode};

use super::transfer::{Choice, Refusal, Way};
use super::{End, Item, Worker};
use crate::dmabuf::KnownResource;
use crate::picture::Picture;
use crate::pixels::Pixels;

/// Encode sessions use this session id by habit.
const SESSION_ID: u16 = 1;

/// An idle connection says something this often: deployed hosts close one whose client has been
/// silent for 60 s or more (quirk 10), and behind NAT nobody says when the host has gone.
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

/// Requests that were given up and whose late replies are still waited for. Older ones are
/// forgotten.
const ABANDONED: usize = 64;

/// A host that refuses so many frames in a row, and has encoded none, will not encode any.
const REFUSALS: u32 = 120;

/// A PTS that went through a host may be off by this much (quirk 3 of docs/protocol.md).
const PTS_TOLERANCE_NS: u64 = 1000;

/// A request that was sent and has no reply yet.
struct Open {
    frame: u32,
    pts: i64,
    duration: i64,
    /// Kept until the reply: the host may look at its memory, or refuse it.
    picture: Picture,
    /// What it was sent as; `None` = as pixels.
    resource: Option<Arc<KnownResource>>,
    forced: bool,
    submitted: Instant,
    /// The frame was reported as dropped, or sent again; its reply, should it come, belongs to
    /// nobody else.
    abandoned: bool,
}

/// The time on one connection.
pub(super) struct Conversation {
    open: VecDeque<Open>,
    choice: Choice,
    /// How the last picture was sent.
    way: Way,
    /// What the client was told of it.
    announced: Way,
    after_loss: bool,
    /// The host has answered something: it speaks the protocol.
    proven: bool,
    /// The host has answered a request, if only with an ERROR.
    answered: bool,
    /// PTS of the request that was answered last with a frame.
    last_answered: Option<i64>,
    /// The last ERROR, for when the connection is lost.
    last_error: Option<String>,
    /// ERRORs since the last frame.
    refusals: u32,
    /// When the host last sent or took something.
    progress: Instant,
    /// Since when something is waited for that must come: a reply to the oldest open request, or
    /// a PONG.
    waiting_since: Instant,
    /// A PING was sent in this waiting time, and whether its PONG has come.
    ping: Option<bool>,
    /// When this side last sent something.
    spoke: Instant,
    /// Sent and received, as far as they are in the session's counts.
    bytes: (u64, u64),
    /// Not yet in the session's counts.
    pixel_bytes: u64,
    /// Not yet in the session's counts.
    resource_frames: u64,
}

impl Conversation {
    pub fn new(choice: Choice, after_loss: bool) -> Self {
        let now = Instant::now();
        Self {
            open: VecDeque::new(),
            choice,
            way: Way::default(),
            announced: Way::default(),
            after_loss,
            proven: false,
            answered: false,
            last_answered: None,
            last_error: None,
            refusals: 0,
            progress: now,
            waiting_since: now,
            ping: None,
            spoke: now,
            bytes: (0, 0),
            pixel_bytes: 0,
            resource_frames: 0,
        }
    }

    /// Talks until the connection is of no use any more.
    pub fn run(&mut self, worker: &mut Worker, connection: &mut Connection<Pixels>) -> End {
        // Frames come only after set_format(), and its settings with them; after a loss they are
        // known already.
        if let Some(config) = &worker.config {
            connection.send(encode::config_req(SESSION_ID, config));
        }
        // A host that accepts a connection and is dead shows before there is a frame to lose.
        self.send_ping(connection);
        let end = loop {
            if let Err(end) = self.send_queued(worker, connection) {
                break end;
            }
            let deadline = self.deadline(worker.timeout());
            let event = match connection.next(&mut worker.waiter, deadline) {
                Ok(event) => event,
                Err(error) => break error.into(),
            };
            self.count(worker, connection);
            if let Event::Message(envelope) = event
                && let Err(end) = self.receive(worker, connection, envelope.message)
            {
                break end;
            }
            if let Err(end) = self.check_time(worker, connection) {
                break end;
            }
        };
        if self.proven && !self.is_waiting_for_reply() {
            // Nothing was asked of it: the next host gets the whole time again.
            worker.backoff = None;
        }
        match (end, self.last_error.take()) {
            (End::Lost(reason), Some(error)) if !reason.contains(&error) => {
                End::Lost(format!("{reason}; before that, {error}"))
            }
            (end, _) => end,
        }
    }

    /// The frames that the connection takes with it.
    pub fn into_lost_frames(self) -> impl Iterator<Item = u32> {
        self.open
            .into_iter()
            .filter(|open| !open.abandoned)
            .map(|open| open.frame)
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
            self.spoke = Instant::now();
            match item {
                Item::Config(config) => {
                    connection.send(encode::config_req(SESSION_ID, &config));
                    worker.config = Some(config);
                }
                Item::Frame(request, submitted) => {
                    let interval = worker.settings.keyframe_interval;
                    let due = interval > 0 && worker.since_keyframe >= interval;
                    let forced = request.force_keyframe || worker.force_keyframe || due;
                    worker.force_keyframe = false;
                    worker.since_keyframe = if forced { 1 } else { worker.since_keyframe + 1 };
                    let resource = self.choice.choose(request.resource.as_ref());
                    let open = Open {
                        frame: request.frame,
                        pts: request.pts,
                        duration: request.duration,
                        picture: request.picture,
                        resource,
                        forced,
                        submitted,
                        abandoned: false,
                    };
                    self.send_frame(worker, connection, open)?;
                }
            }
        }
    }

    fn send_frame(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
        open: Open,
    ) -> Result<(), End> {
        let picture = &open.picture;
        let mut wire = FrameRequest {
            resource_id: 0,
            width: picture.width,
            height: picture.height,
            format: picture.format.fourcc(),
            stride: picture.planes()[0].stride as u32,
            pts: open.pts,
            duration: open.duration,
            force_keyframe: open.forced,
            ..FrameRequest::default()
        };
        let way = if let Some(known) = &open.resource {
            wire.resource_id = known.resource.id.get();
            connection.send(encode::frame_request(SESSION_ID, &wire, 0));
            self.resource_frames += 1;
            Way::ResourceId
        } else {
            let pixels = Pixels::new(picture).map_err(|reason| {
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
            self.start_waiting();
        }
        self.open.push_back(open);
        Ok(())
    }

    /// Sends the oldest open frame again, which the host has just refused as a resource, and then
    /// those that were sent behind it. They will be answered before it, and a stream in that order
    /// would show the frames in that order; so those answers are not used, and it goes on from a
    /// keyframe. For this moment there may be more requests open than `max-in-flight`.
    fn send_again(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
    ) -> Result<(), End> {
        let mut again = Vec::new();
        // The ERROR was the answer to it.
        again.extend(self.open.pop_front());
        for open in self.open.iter_mut().filter(|open| !open.abandoned) {
            open.abandoned = true;
            again.push(Open {
                picture: open.picture.clone(),
                resource: open.resource.clone(),
                abandoned: false,
                ..*open
            });
        }
        again[0].forced |= again.len() > 1;
        self.start_waiting();
        for mut open in again {
            open.resource = self.choice.choose(open.resource.as_ref());
            self.send_frame(worker, connection, open)?;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
        message: Message,
    ) -> Result<(), End> {
        match message {
            Message::FrameResponse(response, data) => self.reply(worker, response, data),
            Message::Error(error) => return self.error(worker, connection, &error),
            Message::Pong => {
                self.proven = true;
                self.ping = self.ping.map(|_| true);
            }
            // A client need not answer PING; deployed hosts send none.
            _ => {}
        }
        Ok(())
    }

    /// Replies come in request order, but not for every request: one whose PTS fits a later
    /// request says that those before it were skipped (quirk 3).
    fn reply(&mut self, worker: &mut Worker, response: FrameResponse, data: Payload) {
        let near = |pts: i64| pts.abs_diff(response.pts) <= PTS_TOLERANCE_NS;
        let skipped = match self.open.iter().position(|open| near(open.pts)) {
            Some(skipped) => skipped,
            // The last reply once more.
            None if self.last_answered.is_some_and(near) => return,
            None => 0,
        };
        for _ in 0..skipped {
            self.drop_oldest(worker, "the host skipped it");
        }
        let Some(open) = self.open.pop_front() else {
            return;
        };
        if open.resource.is_some() {
            self.choice.worked();
        }
        self.proven = true;
        self.answered = true;
        self.last_answered = Some(open.pts);
        self.last_error = None;
        self.refusals = 0;
        worker.backoff = None;
        worker.encoded_any = true;
        self.start_waiting();
        if open.abandoned {
            // Too late. Later frames may refer to this one, which nobody has.
            worker.force_keyframe = true;
            return;
        }
        if data.is_empty() {
            worker.force_keyframe |= open.forced;
            worker.report_dropped(open.frame, "the host sent an empty access unit");
            return;
        }
        let after_loss = std::mem::take(&mut self.after_loss);
        worker
            .client
            .encoded(open.frame, response, data, after_loss);
        worker.shared.update(|state| {
            state.open -= 1;
            state.counts.reply.add(open.submitted.elapsed());
        });
    }

    /// An ERROR belongs to the oldest open request.
    fn error(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
        error: &ErrorMessage,
    ) -> Result<(), End> {
        worker.shared.state().counts.errors += 1;
        let reason = format!("the host says: {}: {}", error.code, error.text);
        if self.open.is_empty() {
            // Said before anything was asked, as by a host that takes no more clients.
            return Err(End::Lost(reason));
        }
        self.answered = true;
        if self.open.front().is_some_and(|open| open.abandoned) {
            self.open.pop_front();
            return Ok(());
        }
        if self.is_refusal_of_resource(worker, error)? {
            return self.send_again(worker, connection);
        }
        self.refusals += 1;
        if self.last_error.is_none() {
            worker.client.refused(&reason);
        }
        self.drop_oldest(worker, &reason);
        self.start_waiting();
        if self.refusals >= REFUSALS && !worker.encoded_any {
            return Err(End::Hopeless(format!(
                "{} refused {REFUSALS} frames and encoded none; {reason}",
                worker.address
            )));
        }
        self.last_error = Some(reason);
        Ok(())
    }

    /// Whether the oldest open frame can be had as pixels after an ERROR.
    fn is_refusal_of_resource(
        &mut self,
        worker: &Worker,
        error: &ErrorMessage,
    ) -> Result<bool, End> {
        let oldest = self.open.front();
        let Some(known) = oldest.and_then(|open| open.resource.as_ref()) else {
            return Ok(false);
        };
        let id = known.resource.id;
        let text = format!(
            "the host refuses resource {id}: {}: {}",
            error.code, error.text
        );
        match self.choice.refused(known, error.code) {
            Refusal::Frame => Ok(false),
            Refusal::Resource { all } => {
                if all {
                    self.announced = Way::Pixels;
                    worker.client.transfer(self.announced, &text);
                }
                Ok(true)
            }
            Refusal::OnlyWay => Err(End::Hopeless(format!(
                "transfer=resource-id: {text}. Is it the host that has this machine's virtio-gpu \
                 device? transfer=auto would send pixels"
            ))),
        }
    }

    fn drop_oldest(&mut self, worker: &mut Worker, reason: &str) {
        if let Some(open) = self.open.pop_front()
            && !open.abandoned
        {
            worker.force_keyframe |= open.forced;
            worker.report_dropped(open.frame, reason);
        }
    }

    /// Reports the oldest open frame as dropped, but remembers its request: should the reply come
    /// late, it must not be taken for another's.
    fn abandon_oldest(&mut self, worker: &mut Worker) {
        if let Some(open) = self.open.iter_mut().find(|open| !open.abandoned) {
            open.abandoned = true;
            let (frame, forced) = (open.frame, open.forced);
            worker.force_keyframe |= forced;
            worker.report_dropped(frame, "the host did not answer it in time");
        }
        if self.open.iter().filter(|open| open.abandoned).count() > ABANDONED {
            self.open.pop_front();
        }
    }

    fn is_waiting_for_reply(&self) -> bool {
        self.open.iter().any(|open| !open.abandoned)
    }

    fn start_waiting(&mut self) {
        self.waiting_since = Instant::now();
        self.ping = None;
    }

    fn send_ping(&mut self, connection: &mut Connection<Pixels>) {
        connection.send(encode::ping(SESSION_ID));
        self.ping = Some(false);
        self.spoke = Instant::now();
    }

    fn count(&mut self, worker: &Worker, connection: &Connection<Pixels>) {
        let bytes = (connection.bytes_sent(), connection.bytes_received());
        if bytes != self.bytes {
            self.progress = Instant::now();
            let mut state = worker.shared.state();
            state.counts.bytes_sent += bytes.0 - self.bytes.0;
            state.counts.bytes_received += bytes.1 - self.bytes.1;
            state.counts.pixel_bytes += std::mem::take(&mut self.pixel_bytes);
            state.counts.resource_frames += std::mem::take(&mut self.resource_frames);
            state.counts.way = self.way;
            self.bytes = bytes;
        }
    }

    /// When to look at the time again.
    fn deadline(&self, timeout: Option<Duration>) -> Deadline {
        let sign_of_life = Deadline::at(self.spoke + SIGN_OF_LIFE);
        let Some(limit) = timeout else {
            return sign_of_life;
        };
        let due = match (self.is_waiting_for_reply(), self.ping) {
            // First to ask whether the host is there, then to give up.
            (true, None) => limit / 2,
            (true, Some(_)) | (false, Some(false)) => limit,
            (false, None | Some(true)) => return sign_of_life,
        };
        Deadline::at(self.waiting_since + due).min(sign_of_life)
    }

    fn check_time(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
    ) -> Result<(), End> {
        let waiting = self.is_waiting_for_reply();
        if self.spoke.elapsed() >= SIGN_OF_LIFE {
            if !waiting {
                self.start_waiting();
            }
            self.send_ping(connection);
            return Ok(());
        }
        let Some(limit) = worker.timeout() else {
            return Ok(());
        };
        if !self.deadline(Some(limit)).has_passed() {
            return Ok(());
        }
        if connection.queued() > 0 && self.progress.elapsed() < limit {
            // Still being sent, over a slow line.
            self.waiting_since = self.progress;
            return Ok(());
        }
        let waited = limit.as_millis();
        match self.ping {
            None => {
                self.send_ping(connection);
                Ok(())
            }
            Some(false) => Err(End::Lost(format!(
                "no answer and no sign of life for {waited} ms (timeout)"
            ))),
            Some(true) if !self.answered => Err(End::Hopeless(format!(
                "{} is alive but did not answer a FRAME_REQUEST within {waited} ms (timeout): is \
                 it a host that only pushes screens? Those skip frames to encode; use a \
                 helix-host, or a longer timeout",
                worker.address
            ))),
            Some(true) => {
                self.abandon_oldest(worker);
                self.start_waiting();
                Ok(())
            }
        }
    }
}
