// SPDX-License-Identifier: MIT OR Apache-2.0

//! The conversation with a host: one thread that connects, sends requests, hands replies to its
//! client as they come (L23), and finds the host again when it is lost.
//!
//! The streaming thread calls [`Session::submit`] and waits there, cancellably, until fewer than
//! the permitted number of requests are open. Everything about the connection itself belongs to
//! the session's own thread; the two share a queue and a count.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use helix_protocol::connection::{ConnectionError, Event};
use helix_protocol::message::{Config, ErrorMessage, FrameRequest, FrameResponse};
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};
use helix_protocol::{Address, Connection, Limits, Message, Payload, Stream, encode};
use zerocopy_plugin_common::{Backoff, ConnectionSettings, Quantiles};

use crate::pixels::Pixels;

/// Encode sessions use this session id by habit.
const SESSION_ID: u16 = 1;

/// A PTS that went through a host may be off by this much (quirk 3 of docs/protocol.md).
const PTS_TOLERANCE_NS: u64 = 1000;

/// Whom the session tells. Called on the session's thread, with no lock of the session held.
pub trait Client: Send + 'static {
    /// The host has accepted the connection.
    fn connected(&self, peer: &str);
    /// The frame's access unit. `after_loss` is set on the first one of a new connection that
    /// followed another.
    fn encoded(&self, frame: u32, response: FrameResponse, data: Payload, after_loss: bool);
    /// The frame will have no access unit.
    fn dropped(&self, frame: u32, reason: &str);
    /// The host refused a frame for the first time on this connection.
    fn refused(&self, reason: &str);
    /// The host was lost and is being called again.
    fn reconnecting(&self, reason: &str);
    /// The session has ended: what was tried, on what, and what to do.
    fn failed(&self, reason: &str);
}

/// A frame to encode.
pub struct Request {
    /// The client's number for it.
    pub frame: u32,
    /// Nanoseconds.
    pub pts: i64,
    /// Nanoseconds.
    pub duration: i64,
    /// Ask for a keyframe.
    pub force_keyframe: bool,
    /// The picture.
    pub pixels: Pixels,
}

/// What became of a submitted frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submission {
    /// It will be reported as encoded or dropped.
    Accepted,
    /// There is no host right now.
    NoHost,
    /// The waker was used.
    Cancelled,
    /// The session has failed, and said so.
    Failed,
}

/// What the session counted.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Bytes handed to the system.
    pub bytes_sent: u64,
    /// Bytes taken from the system.
    pub bytes_received: u64,
    /// Bytes of pixels in requests.
    pub pixel_bytes: u64,
    /// ERROR messages.
    pub errors: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// Time from a request's submission to its reply.
    pub reply: Quantiles,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    /// The first connection is being made: frames wait for it.
    Connecting,
    Connected,
    /// Frames are dropped.
    Reconnecting,
    Failed,
}

#[expect(clippy::large_enum_variant, reason = "nearly all items are frames")]
enum Item {
    Config(Config),
    Frame(Request, Instant),
}

struct State {
    status: Status,
    queue: VecDeque<Item>,
    /// Frames accepted and not yet reported.
    open: u32,
    /// The streaming thread waits for `open` or `status` to change.
    waiting: bool,
    counts: Counts,
}

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread that submits.
    submitter: Waker,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes the submitter if it waits for that.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        if std::mem::take(&mut state.waiting) {
            self.submitter.wake();
        }
    }
}

/// What a session needs to know from the start.
pub struct SessionSettings {
    /// The host.
    pub connection: ConnectionSettings,
    /// Frames after which a keyframe is asked for; 0 = only when a request says so.
    pub keyframe_interval: u32,
}

/// A running session; dropping it ends the thread and closes the connection.
pub struct Session {
    shared: Arc<Shared>,
    waker: Waker,
    thread: Option<thread::JoinHandle<()>>,
}

impl Session {
    /// Starts to connect. `submitter` wakes the waiter that will be given to
    /// [`Session::submit`].
    pub fn start(
        settings: SessionSettings,
        submitter: Waker,
        client: impl Client,
    ) -> std::io::Result<Self> {
        let waiter = Waiter::new()?;
        let waker = waiter.waker();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                status: Status::Connecting,
                queue: VecDeque::new(),
                open: 0,
                waiting: false,
                counts: Counts::default(),
            }),
            submitter,
        });
        let address = settings.connection.address();
        let mut worker = Worker {
            shared: shared.clone(),
            client: Box::new(client),
            address,
            settings,
            waiter,
            config: None,
            backoff: None,
            force_keyframe: true,
            since_keyframe: 0,
        };
        let thread = thread::Builder::new()
            .name("vsockenc".to_owned())
            .spawn(move || {
                // A panic must not leave the pipeline waiting for a thread that is gone.
                if panic::catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                    worker.fail("the connection's thread panicked; please report this as a bug");
                }
            })?;
        Ok(Self {
            shared,
            waker,
            thread: Some(thread),
        })
    }

    /// Gives new settings to the host, after the frames submitted before.
    pub fn configure(&self, config: Config) {
        self.shared.state().queue.push_back(Item::Config(config));
        self.waker.wake();
    }

    /// Hands a frame over once fewer than `max_open` are open.
    pub fn submit(&self, waiter: &mut Waiter, max_open: u32, request: Request) -> Submission {
        let submitted = Instant::now();
        let result = self.wait_until(waiter, |state| match state.status {
            Status::Failed => Some(Submission::Failed),
            Status::Reconnecting => Some(Submission::NoHost),
            Status::Connected if state.open < max_open => Some(Submission::Accepted),
            Status::Connecting | Status::Connected => None,
        });
        match result {
            Ok(mut state) => {
                state.open += 1;
                state.queue.push_back(Item::Frame(request, submitted));
                drop(state);
                self.waker.wake();
                Submission::Accepted
            }
            Err(reason) => reason,
        }
    }

    /// Waits until no frame is open.
    pub fn drain(&self, waiter: &mut Waiter) -> Submission {
        let result = self.wait_until(waiter, |state| match state.status {
            Status::Failed => Some(Submission::Failed),
            _ if state.open == 0 => Some(Submission::Accepted),
            _ => None,
        });
        result.map_or_else(|reason| reason, |_| Submission::Accepted)
    }

    /// Frames accepted and not yet reported, and what was counted.
    pub fn counts(&self) -> (u32, Counts) {
        let state = self.shared.state();
        (state.open, state.counts.clone())
    }

    /// Waits for `ready` to have an opinion. [`Submission::Accepted`] comes with the state, still
    /// locked.
    fn wait_until(
        &self,
        waiter: &mut Waiter,
        ready: impl Fn(&State) -> Option<Submission>,
    ) -> Result<MutexGuard<'_, State>, Submission> {
        loop {
            {
                let mut state = self.shared.state();
                match ready(&state) {
                    Some(Submission::Accepted) => return Ok(state),
                    Some(reason) => return Err(reason),
                    None => state.waiting = true,
                }
            }
            // The session's own deadlines bound this: it answers or fails.
            match waiter.wait(Deadline::NEVER) {
                Ok(Wake::Cancelled) => return Err(Submission::Cancelled),
                Ok(_) => {}
                Err(_) => return Err(Submission::Failed),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.waker.cancel();
        if let Some(thread) = self.thread.take() {
            // It has caught its panics.
            let _ = thread.join();
        }
    }
}

/// A request that was sent and has no reply yet.
struct Open {
    frame: u32,
    pts: i64,
    forced: bool,
    submitted: Instant,
}

/// Why a conversation ended.
enum End {
    /// The session is being dropped.
    Cancelled,
    /// Another connection may do better.
    Lost(String),
    /// No other connection would.
    Hopeless(String),
}

impl From<ConnectionError> for End {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Cancelled => Self::Cancelled,
            error => Self::Lost(error.to_string()),
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    client: Box<dyn Client>,
    address: Address,
    settings: SessionSettings,
    waiter: Waiter,
    /// The settings last given, sent again on each connection.
    config: Option<Config>,
    /// Runs from the loss of a host until another has answered a request.
    backoff: Option<Backoff>,
    /// The next request asks for a keyframe.
    force_keyframe: bool,
    since_keyframe: u32,
}

impl Worker {
    fn run(&mut self) {
        let deadline = self.settings.connection.reply_deadline();
        let mut connection = match self.connect(deadline) {
            Ok(connection) => connection,
            Err(End::Cancelled) => return,
            Err(End::Lost(reason) | End::Hopeless(reason)) => return self.fail(&reason),
        };
        let mut again = false;
        loop {
            self.client.connected(&connection.stream().peer());
            self.shared.update(|state| {
                state.status = Status::Connected;
                state.counts.reconnects += u64::from(again);
            });
            let mut conversation = Conversation::new(again);
            let end = conversation.run(self, &mut connection);
            drop(connection);
            for open in conversation.open {
                self.report_dropped(open.frame, "the host was lost");
            }
            let reason = match end {
                End::Cancelled => return,
                End::Hopeless(reason) => return self.fail(&reason),
                End::Lost(reason) => reason,
            };
            match self.reconnect(&reason) {
                Ok(new) => connection = new,
                Err(End::Cancelled) => return,
                Err(End::Lost(reason) | End::Hopeless(reason)) => return self.fail(&reason),
            }
            again = true;
        }
    }

    fn connect(&mut self, deadline: Deadline) -> Result<Connection<Pixels>, End> {
        use helix_protocol::transport::ConnectError;
        let stream = Stream::connect(&self.address, &mut self.waiter, deadline);
        let stream = stream.map_err(|error| match error {
            ConnectError::Cancelled => End::Cancelled,
            error => End::Lost(error.to_string()),
        })?;
        Connection::new(stream, Limits::client(), &self.waiter)
            .map_err(|error| End::Lost(format!("connect to {}: {error}", self.address)))
    }

    fn reconnect(&mut self, reason: &str) -> Result<Connection<Pixels>, End> {
        let limit = self.settings.connection.reconnect_timeout();
        let lost = format!("lost {}: {reason}", self.address);
        if limit.is_zero() {
            return Err(End::Lost(lost));
        }
        self.shared
            .update(|state| state.status = Status::Reconnecting);
        self.drop_queued_frames();
        self.client.reconnecting(&lost);
        let mut outcome = String::new();
        loop {
            let backoff = self.backoff.get_or_insert_with(|| Backoff::new(limit));
            let Some(at) = backoff.next_attempt() else {
                let tried = limit.as_millis();
                return Err(End::Lost(format!(
                    "{lost}; not found again within {tried} ms (reconnect-timeout){outcome}"
                )));
            };
            loop {
                match self.waiter.wait(Deadline::at(at)) {
                    Ok(Wake::Cancelled) => return Err(End::Cancelled),
                    Ok(Wake::TimedOut) => break,
                    Ok(Wake::Ready | Wake::Woken) => {}
                    Err(error) => return Err(End::Hopeless(error.to_string())),
                }
            }
            match self.connect(self.settings.connection.reply_deadline()) {
                Ok(connection) => {
                    self.force_keyframe = true;
                    return Ok(connection);
                }
                Err(End::Lost(reason)) => outcome = format!("; {reason}"),
                Err(end) => return Err(end),
            }
        }
    }

    /// Frames that were accepted and not sent have no future after a loss; settings have.
    fn drop_queued_frames(&mut self) {
        let queue = std::mem::take(&mut self.shared.state().queue);
        for item in queue {
            match item {
                Item::Config(config) => self.config = Some(config),
                Item::Frame(request, _) => self.report_dropped(request.frame, "the host was lost"),
            }
        }
    }

    fn report_dropped(&self, frame: u32, reason: &str) {
        self.client.dropped(frame, reason);
        self.shared.update(|state| state.open -= 1);
    }

    fn fail(&mut self, reason: &str) {
        // Told first, so that whoever is woken by the status finds the error on the bus.
        self.client.failed(reason);
        self.shared.update(|state| {
            state.status = Status::Failed;
            state.queue.clear();
            state.open = 0;
        });
    }

    fn timeout(&self) -> Option<Duration> {
        self.settings.connection.timeout()
    }
}

/// The time on one connection.
struct Conversation {
    open: VecDeque<Open>,
    after_loss: bool,
    /// A reply to a request has come.
    answered: bool,
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
    fn new(after_loss: bool) -> Self {
        let now = Instant::now();
        Self {
            open: VecDeque::new(),
            after_loss,
            answered: false,
            refused: false,
            progress: now,
            waiting_since: now,
            ping: None,
            bytes: (0, 0),
            pixel_bytes: 0,
        }
    }

    fn run(&mut self, worker: &mut Worker, connection: &mut Connection<Pixels>) -> End {
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
        use helix_protocol::connection::Body;
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
        let fits = |open: &Open| open.pts.abs_diff(response.pts) <= PTS_TOLERANCE_NS;
        let skipped = self.open.iter().position(fits).unwrap_or(0);
        for _ in 0..skipped {
            self.drop_oldest(worker, "the host skipped it");
        }
        let Some(open) = self.open.pop_front() else {
            return;
        };
        self.answered = true;
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
            Some(true) if !self.answered => Err(End::Hopeless(format!(
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
