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

/// A PTS that went through a host may be off by this much (quirk 3 of docs/protocol.md).
const PTS_TOLERANCE_NS: u64 = 1000;

/// A request that was sent and has no reply yet.
pub(super) struct Open {
    pub frame: u32,
    pts: i64,
    forced: bool,
    submitted: Instant,
}

/// The time on one connection.
pub(super) struct Conversation {
    pub open: VecDeque<Open>,
    after_loss: bool,
    /// PTS of the request that was answered last.
    last_answered: Option<i64>,
    /// The host has refused a frame.
    refused: bool,
    /// When the host last sent or took something.
    progress: Instant,
    /// The latest of: the oldest open request became the oldest, a reply came.
    waiting_since: Instant,
    /// A PING was sent in this waiting time, and whether its PONG has come.
    ping: Option<bool>,
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
            last_answered: None,
            refused: false,
            progress: now,
            waiting_since: now,
            ping: None,
            bytes: (0, 0),
            pixel_bytes: 0,
        }
    }

    pub fn run(&mut self, worker: &mut Worker, connection: &mut Connection<Pixels>) -> End {
        // Frames come only after set_format(), and its settings with them; after a loss they are
        // known already.
        if let Some(config) = &worker.config {
            connection.send(encode::config_req(SESSION_ID, config));
        }
        loop {
            self.send_queued(worker, connection);
            let deadline = self.deadline(worker.timeout());
            let event = match connection.next(&mut worker.waiter, deadline) {
                Ok(event) => event,
                Err(error) => return error.into(),
            };
            self.count(worker, connection);
            if let Event::Message(envelope) = event
                && let Err(end) = self.receive(worker, envelope.message)
            {
                return end;
            }
            if let Err(end) = self.check_time(worker, connection) {
                return end;
            }
        }
    }

    fn send_queued(&mut self, worker: &mut Worker, connection: &mut Connection<Pixels>) {
        loop {
            let Some(item) = worker.shared.state().queue.pop_front() else {
                return;
            };
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
        if self.open.is_empty() {
            self.start_waiting();
        }
        self.open.push_back(Open {
            frame: request.frame,
            pts: request.pts,
            forced: force_keyframe,
            submitted,
        });
    }

    fn receive(&mut self, worker: &mut Worker, message: Message) -> Result<(), End> {
        match message {
            Message::FrameResponse(response, data) => self.reply(worker, response, data),
            Message::Error(error) => return self.error(worker, &error),
            Message::Pong => self.ping = self.ping.map(|_| true),
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
        self.last_answered = Some(open.pts);
        worker.backoff = None;
        self.start_waiting();
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
        if !std::mem::replace(&mut self.refused, true) {
            worker.client.refused(&reason);
        }
        self.drop_oldest(worker, &reason);
        self.start_waiting();
        Ok(())
    }

    fn drop_oldest(&mut self, worker: &mut Worker, reason: &str) {
        if let Some(open) = self.open.pop_front() {
            worker.force_keyframe |= open.forced;
            worker.report_dropped(open.frame, reason);
        }
    }

    fn start_waiting(&mut self) {
        self.waiting_since = Instant::now();
        self.ping = None;
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

    /// When to look at the time: first to ask whether the host is there, then to give up.
    fn deadline(&self, timeout: Option<Duration>) -> Deadline {
        match timeout {
            Some(limit) if !self.open.is_empty() => {
                let limit = if self.ping.is_none() {
                    limit / 2
                } else {
                    limit
                };
                Deadline::at(self.waiting_since + limit)
            }
            _ => Deadline::NEVER,
        }
    }

    fn check_time(
        &mut self,
        worker: &mut Worker,
        connection: &mut Connection<Pixels>,
    ) -> Result<(), End> {
        let Some(limit) = worker.timeout() else {
            return Ok(());
        };
        if self.open.is_empty() || !self.deadline(Some(limit)).has_passed() {
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
                connection.send(encode::ping(SESSION_ID));
                self.ping = Some(false);
                Ok(())
            }
            Some(false) => Err(End::Lost(format!(
                "no answer and no sign of life for {waited} ms (timeout)"
            ))),
            Some(true) if self.last_answered.is_none() => Err(End::Hopeless(format!(
                "{} is alive but did not answer a FRAME_REQUEST within {waited} ms (timeout): is \
                 it a host that only pushes screens? Those skip frames to encode; use a \
                 helix-host, or a longer timeout",
                worker.address
            ))),
            Some(true) => {
                self.drop_oldest(worker, "the host did not answer it");
                self.start_waiting();
                Ok(())
            }
        }
    }
}
