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

use helix_protocol::connection::ConnectionError;
#[cfg(test)]
use helix_protocol::message::Capabilities;
use helix_protocol::message::{Config, FrameResponse};
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};
use helix_protocol::{Address, Connection, Limits, Payload, Stream};
use zerocopy_plugin_common::{Backoff, ConnectionSettings, Quantiles};

use self::conversation::Conversation;
use self::transfer::Choice;
pub use self::transfer::Way;
use crate::dmabuf::KnownResource;
use crate::picture::Picture;
use crate::pixels::Pixels;
use crate::vsockenc::Transfer;

mod conversation;
mod transfer;

/// Whom the session tells. Called on the session's thread, with no lock of the session held.
pub trait Client: Send + 'static {
    /// The host has accepted the connection.
    fn connected(&self, peer: &str);
    /// The frame's access unit. `after_loss` is set on the first one of a new connection that
    /// followed another.
    fn encoded(&self, frame: u32, response: FrameResponse, data: Payload, after_loss: bool);
    /// The frame will have no access unit.
    fn dropped(&self, frame: u32, reason: &str);
    /// Pictures travel another way from now on; `reason` is empty where nothing went wrong.
    fn transfer(&self, way: Way, reason: &str);
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
    pub picture: Picture,
    /// As what it may be sent, if not only as pixels.
    pub resource: Option<Arc<KnownResource>>,
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
    /// Requests with a resource id.
    pub resource_frames: u64,
    /// How the last picture was sent.
    pub way: Way,
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
    /// How pictures may travel.
    pub transfer: Transfer,
    /// What the host is taken to have said of itself.
    #[cfg(test)]
    pub host: Option<Capabilities>,
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
            encoded_any: false,
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
    /// Some host has encoded a frame of this session.
    encoded_any: bool,
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
            // No host is asked in this version what it can do.
            #[cfg(not(test))]
            let host = None;
            #[cfg(test)]
            let host = self.settings.host;
            let choice = match Choice::new(self.settings.transfer, host) {
                Ok(choice) => choice,
                Err(reason) => return self.fail(&format!("{}: {reason}", self.address)),
            };
            let mut conversation = Conversation::new(choice, again);
            let end = conversation.run(self, &mut connection);
            drop(connection);
            for frame in conversation.into_lost_frames() {
                self.report_dropped(frame, "the host was lost");
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
