// SPDX-License-Identifier: MIT OR Apache-2.0

//! The time on one connection: requests out, replies in, and the question whether the host is
//! still there.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use helix_protocol::connection::{Body, Event};
use helix_protocol::message::{ErrorMessage, FrameRequest, FrameResponse};
use helix_protocol::wait::Deadline;
use helix_protocol::{Connection, Message, Payload, encode};

use super::{End, Item, Request, Worker};
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
    forced: bool,
    submitted: Instant,
    /// The frame was reported as dropped; its reply, should it come, belongs to nobody else.
    abandoned: bool,
}

/// The time on one connection.
pub(super) struct Conversation {
    open: VecDeque<Open>,
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
}

impl Conversation {
    pub fn new(after_loss: bool) -> Self {
        let now = Instant::now();
        Self {
            open: VecDeque::new(),
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
            self.send_queued(worker, connection);
            let deadline = self.deadline(worker.timeout());
            let event = match connection.next(&mut worker.waiter, deadline) {
                Ok(event) => event,
                Err(error) => break error.into(),
            };
            self.count(worker, connection);
            if let Event::Message(envelope) = event
                && let Err(end) = self.receive(worker, envelope.message)
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

    fn send_queued(&mut self, worker: &mut Worker, connection: &mut Connection<Pixels>) {
        loop {
            let Some(item) = worker.shared.state().queue.pop_front() else {
                return;
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
                    self.send_frame(connection, request, submitted, forced);
                }
            }
        }
    }

    fn send_frame(
        &mut self,
        connection: &mut Connection<Pixels>,
        request: Request,
        submitted: Instant,
        force_keyframe: bool,
    ) {
        let pixels = request.pixels;
        let wire = FrameRequest {
            resource_id: 0,
            width: pixels.width,
            height: pixels.height,
            format: pixels.format.fourcc(),
            stride: pixels.stride,
            pts: request.pts,
            duration: request.duration,
            force_keyframe,
            ..FrameRequest::default()
        };
        // set_format() has compared the size with the protocol's limit, which is below 4 GiB.
        let size = pixels.size() as u32;
        connection.send_with(encode::frame_request(SESSION_ID, &wire, size), pixels);
        self.pixel_bytes += u64::from(size);
        if !self.is_waiting_for_reply() {
            self.start_waiting();
        }
        self.open.push_back(Open {
            frame: request.frame,
            pts: request.pts,
            forced: force_keyframe,
            submitted,
            abandoned: false,
        });
    }

    fn receive(&mut self, worker: &mut Worker, message: Message) -> Result<(), End> {
        match message {
            Message::FrameResponse(response, data) => self.reply(worker, response, data),
            Message::Error(error) => return self.error(worker, &error),
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
    fn error(&mut self, worker: &mut Worker, error: &ErrorMessage) -> Result<(), End> {
        worker.shared.state().counts.errors += 1;
        let reason = format!("the host says: {}: {}", error.code, error.text);
        if self.open.is_empty() {
            // Said before anything was asked, as by a host that takes no more clients.
            return Err(End::Lost(reason));
        }
        self.answered = true;
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
