// SPDX-License-Identifier: MIT OR Apache-2.0

//! The conversation with a host: one thread that connects, sends requests, takes replies as they
//! come (L23), and finds the host again when it is lost; and one that hands them to the client.
//!
//! | file | job |
//! | --- | --- |
//! | mod.rs | what other threads see and do |
//! | worker.rs | the thread: connecting, greeting, connecting again |
//! | conversation.rs | the time on one connection: requests out |
//! | replies.rs | and replies in |
//! | delivery.rs | the client's thread: what became of frames, told in order |
//! | liveness.rs | whether the host is still there |
//! | transfer.rs | how pictures travel |
//!
//! The streaming thread calls [`Session::submit`] and waits there, cancellably, until fewer than
//! the permitted number of requests are open. Everything about the connection itself belongs to
//! the session's own thread; the two share a queue and a count.

use std::collections::VecDeque;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use helix_protocol::message::{Config, FrameResponse};
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};
use helix_protocol::{Agreement, Payload};
use zerocopy_plugin_common::{ConnectionSettings, Quantiles};

use self::delivery::Delivery;
pub use self::liveness::SIGN_OF_LIFE;
pub use self::replies::{HELD, REFUSALS};
pub use self::transfer::Way;
use self::worker::Worker;
use crate::picture::Picture;
use crate::virtgpu::Resource;
use crate::vsockenc::Transfer;

mod conversation;
mod delivery;
mod liveness;
mod replies;
#[cfg(test)]
mod tests;
mod transfer;
mod worker;

/// Whom the session tells, with no lock of the session held. What becomes of frames is told in
/// order on a thread of its own (delivery.rs) and may take its time; the rest on the session's
/// thread, which must not be kept.
pub trait Client: Send + Sync + 'static {
    /// The host has accepted the connection, and this is what it said of itself. `way` is how
    /// pictures will travel, where that is known before the first.
    fn connected(&self, peer: &str, host: &Agreement, way: Option<Way>);
    /// The host says which settings are in force, in answer to those that it was `given`.
    fn configured(&self, given: &Config, in_force: &Config);
    /// The frame's access unit.
    fn encoded(&self, frame: u32, access_unit: AccessUnit);
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

/// A frame, encoded.
pub struct AccessUnit {
    /// What the host said of it.
    pub response: FrameResponse,
    /// Annex B.
    pub data: Payload,
    /// The first one of a connection that followed another, a keyframe.
    pub after_loss: bool,
    /// Its request asked for a keyframe.
    pub forced: bool,
    /// Time from the request's submission to this.
    pub took: Duration,
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
    pub resource: Option<Arc<Resource>>,
}

/// What the frames to come look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// What the host is told.
    pub config: Config,
    /// Bytes of pixels of one frame; 0 where none are sent.
    pub pixels: usize,
}

impl Format {
    /// Why a host does not take such frames, if it does not.
    pub fn refused_by(&self, host: &Agreement) -> Option<String> {
        let Config { width, height, .. } = self.config;
        let (max_width, max_height) = (host.max_width, host.max_height);
        if width > u32::from(max_width) || height > u32::from(max_height) {
            return Some(format!(
                "a {width}x{height} frame is over the host's limit of {max_width}x{max_height} \
                 pixels; scale it down"
            ));
        }
        let (size, limit) = (self.pixels, host.max_pixels());
        (size > limit as usize).then(|| {
            format!(
                "a {width}x{height} frame has {size} bytes, over the host's limit of {limit} \
                 bytes; scale it down"
            )
        })
    }
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
    /// The system does not let this thread wait. Nobody was told.
    CannotWait(io::ErrorKind),
}

/// What sessions counted. They add to what their owner gives them, so it outlives them.
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
    /// Replies that fit no open request.
    pub unmatched: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// Time from a request's sending to its reply.
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
    Format(Format),
    /// With [`State::epoch`] at the time when it was submitted, and that time.
    Frame(Request, u32, Instant),
}

struct State {
    status: Status,
    /// The host of the last connection.
    host: Option<Arc<Agreement>>,
    queue: VecDeque<Item>,
    /// Frames accepted and not yet reported to the end, or flushed and not yet answered.
    open: u32,
    /// Those of them that were answered, or dropped, and not yet reported.
    answered: u32,
    /// For the thread that delivers, oldest first.
    deliveries: VecDeque<Delivery>,
    /// Requests that may be open at the host at once, as of the last frame accepted.
    limit: u32,
    /// The session is being dropped.
    ended: bool,
    /// Counts flushes: what is older than the last one is nobody's any more.
    epoch: u32,
    /// The streaming thread waits for `open` or `status` to change.
    waiting: bool,
}

impl State {
    fn host_max_open(&self) -> u32 {
        self.host
            .as_ref()
            .map_or(1, |host| u32::from(host.max_in_flight))
    }
}

struct Shared {
    state: Mutex<State>,
    counts: Arc<Mutex<Counts>>,
    /// Wakes the thread that submits.
    submitter: Waker,
    /// Wakes the thread that delivers.
    to_deliver: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never locked together with the state.
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes the submitter if it waits for that.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        if std::mem::take(&mut state.waiting) {
            self.submitter.wake();
        }
    }

    /// The end of it, on whichever thread finds out, and at once: what is still to be delivered
    /// may wait for downstream as long as that likes.
    fn fail(&self, client: &dyn Client, reason: &str) {
        // Told first, so that whoever is woken by the status finds the error on the bus.
        client.failed(reason);
        self.update(|state| {
            state.status = Status::Failed;
            state.queue.clear();
            // These are being delivered.
            state.open = state.answered;
        });
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
    /// Requests that may be open at once, as far as this side knows.
    pub max_in_flight: u16,
    /// An idle connection says something this often; [`SIGN_OF_LIFE`] but in tests.
    pub sign_of_life: Duration,
    /// Where to count.
    pub counts: Arc<Mutex<Counts>>,
}

/// A running session; dropping it ends the thread and closes the connection.
pub struct Session {
    shared: Arc<Shared>,
    waker: Waker,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Session {
    /// Starts to connect. `submitter` wakes the waiter that will be given to
    /// [`Session::submit`].
    pub fn start(
        settings: SessionSettings,
        submitter: Waker,
        client: impl Client,
    ) -> io::Result<Self> {
        let waiter = Waiter::new()?;
        let waker = waiter.waker();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                status: Status::Connecting,
                host: None,
                queue: VecDeque::new(),
                open: 0,
                answered: 0,
                deliveries: VecDeque::new(),
                limit: 0,
                ended: false,
                epoch: 0,
                waiting: false,
            }),
            counts: settings.counts.clone(),
            submitter,
            to_deliver: Condvar::new(),
        });
        let client: Arc<dyn Client> = Arc::new(client);
        let mut worker = Worker::new(shared.clone(), client.clone(), settings, waiter);
        let mut session = Self {
            shared: shared.clone(),
            waker,
            threads: Vec::new(),
        };
        let delivery = thread::Builder::new()
            .name("vsockenc:src".to_owned())
            .spawn(move || delivery::run(&shared, &client))?;
        session.threads.push(delivery);
        let thread = thread::Builder::new()
            .name("vsockenc".to_owned())
            .spawn(move || {
                // A panic must not leave the pipeline waiting for a thread that is gone.
                if panic::catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                    worker.fail("the connection's thread panicked; please report this as a bug");
                }
            })?;
        session.threads.push(thread);
        Ok(session)
    }

    /// What the host takes, once there is one. While a lost host is called, what that one took.
    pub fn host(&self, waiter: &mut Waiter) -> Result<Arc<Agreement>, Submission> {
        let state = self.wait_until(waiter, |state| match (state.status, &state.host) {
            (Status::Failed, _) => Some(Submission::Failed),
            (_, Some(_)) => Some(Submission::Accepted),
            (_, None) => None,
        })?;
        state.host.clone().ok_or(Submission::NoHost)
    }

    /// Gives new settings to the host, after the frames submitted before. Those that no frame
    /// was submitted with are forgotten.
    pub fn configure(&self, format: Format) {
        let mut state = self.shared.state();
        match state.queue.back_mut() {
            Some(Item::Format(last)) => *last = format,
            _ => state.queue.push_back(Item::Format(format)),
        }
        drop(state);
        self.waker.wake();
    }

    /// Forgets all frames: none is reported from now on. Those that the host has are open until
    /// it answers them, as for the host they are.
    pub fn flush(&self) {
        self.shared.update(|state| {
            state.epoch = state.epoch.wrapping_add(1);
            let before = state.queue.len();
            state.queue.retain(|item| matches!(item, Item::Format(_)));
            state.open -= (before - state.queue.len()) as u32;
        });
        // It may have frames that wait to be sent again.
        self.waker.wake();
    }

    /// Hands a frame over once fewer than `max_open` are open, and fewer than the host takes.
    pub fn submit(&self, waiter: &mut Waiter, max_open: u32, request: Request) -> Submission {
        let limit = |state: &State| max_open.min(state.host_max_open());
        let result = self.wait_until(waiter, |state| match state.status {
            Status::Failed => Some(Submission::Failed),
            Status::Reconnecting => Some(Submission::NoHost),
            Status::Connected if state.open < limit(state) => Some(Submission::Accepted),
            Status::Connecting | Status::Connected => None,
        });
        match result {
            Ok(mut state) => {
                state.open += 1;
                state.limit = limit(&state);
                let epoch = state.epoch;
                state
                    .queue
                    .push_back(Item::Frame(request, epoch, Instant::now()));
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

    /// Frames accepted and not yet answered.
    pub fn in_flight(&self) -> u32 {
        let state = self.shared.state();
        state.open - state.answered
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
                Err(error) => return Err(Submission::CannotWait(error.kind())),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.waker.cancel();
        self.shared.state().ended = true;
        self.shared.to_deliver.notify_one();
        for thread in self.threads.drain(..) {
            // It has caught its panics.
            let _ = thread.join();
        }
    }
}
