// SPDX-License-Identifier: MIT OR Apache-2.0

//! Screens that are pushed to whoever subscribes.
//!
//! A scanout runs while somebody watches: the first subscriber starts its thread, which owns the
//! source and the encoder (`run`) and stops both some time after the last has gone. There is one
//! encode however many watch; each has a queue of its own ([`crate::subscriber`]), so that none
//! delays another.

mod run;

use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use helix_protocol::connection::Body;
use helix_protocol::message::{Config, EnableScanout};
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};

use self::run::Run;
use crate::access_unit::AccessUnit;
use crate::qemu::Link;
use crate::settings::{EncoderSpec, Keyframes, Tuning};
use crate::source::{Description, Kind};
use crate::subscriber::{Frame, Next, Subscriber};

/// How many there may be; the ids are below this.
pub const SCANOUTS: u32 = 16;
/// A keyframe comes by itself after this many pictures, as clients of deployed hosts expect.
const KEYFRAME_DISTANCE: u32 = 60;
/// Nanoseconds; an access unit whose time is before that of the last one by more than this is no
/// jitter of a live source. Pictures are further apart.
const BACK: i64 = 5_000_000;
/// Time between two attempts to start what failed.
const RETRY: Duration = Duration::from_secs(1);

/// `ID=DESCRIPTION`, as on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanoutSpec {
    /// Below [`SCANOUTS`].
    pub id: u32,
    /// For gst-launch's parser; ends in `video/x-raw` or `video/x-h264`.
    pub description: String,
}

impl FromStr for ScanoutSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, description) = text
            .split_once('=')
            .ok_or("it must be ID=DESCRIPTION, for example 1=\"videotestsrc is-live=true\"")?;
        let id = id
            .trim()
            .parse()
            .ok()
            .filter(|id| *id < SCANOUTS)
            .ok_or_else(|| format!("'{id}' is no scanout id: 0 to {}", SCANOUTS - 1))?;
        Ok(Self {
            id,
            description: description.to_owned(),
        })
    }
}

/// Where a scanout's pictures come from.
pub enum Origin {
    /// A pipeline.
    Description(Description),
    /// The console of this number of a QEMU.
    Console(Arc<Link>),
}

impl Origin {
    /// What it provides.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Description(description) => description.kind(),
            Self::Console(_) => Kind::Raw,
        }
    }
}

/// What has happened to a scanout since the start, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Who watches now.
    pub subscribers: u64,
    /// Access units, each counted once however many watch.
    pub frames: u64,
    /// Of those.
    pub bytes: u64,
    /// Frames that subscribers who were too slow have missed, over all of them.
    pub dropped: u64,
    /// Encoders that broke, and pictures that they skipped.
    pub encode_errors: u64,
}

/// One screen.
pub struct Scanout {
    id: u32,
    origin: Origin,
    encoder: Arc<EncoderSpec>,
    state: Mutex<State>,
    stopped: Condvar,
}

#[derive(Default)]
struct State {
    subscribers: Vec<Arc<Subscriber>>,
    /// The thread that runs the scanout, if it runs.
    worker: Option<Waker>,
    /// The host ends.
    stopping: bool,
    inbox: Inbox,
    /// The newest picture of a raw source that nobody has taken, and when it was captured.
    picture: Option<(gst::Sample, i64)>,
    /// bit/s; stays over restarts of the pipeline.
    bitrate: Option<u32>,
    /// That of the encoder that runs, where it cannot take another one.
    fixed_bitrate: Option<u32>,
    last_pts: i64,
    /// It was said that the present source's pictures are not in the order in which they are shown.
    reordered: bool,
    /// Whether the present source has brought a frame.
    flowing: bool,
    figures: Figures,
}

/// What others have for the scanout's thread.
#[derive(Default)]
struct Inbox {
    keyframe_wanted: bool,
    bitrate_changed: bool,
    encoder_failed: Option<String>,
    ended: Option<String>,
}

/// A client's place among the subscribers; dropping it leaves.
pub struct Subscription {
    scanout: Arc<Scanout>,
    subscriber: Arc<Subscriber>,
}

impl Scanout {
    /// A scanout that waits for its first subscriber.
    pub fn new(id: u32, origin: Origin, encoder: Arc<EncoderSpec>) -> Arc<Self> {
        Arc::new(Self {
            id,
            origin,
            encoder,
            state: Mutex::default(),
            stopped: Condvar::new(),
        })
    }

    /// Whether there is such a screen. A QEMU that has never been there may have every console.
    pub fn exists(&self) -> bool {
        match &self.origin {
            Origin::Description(_) => true,
            Origin::Console(link) => link.may_have(self.id),
        }
    }

    /// ENABLE_SCANOUT: switches the screen on. `done` is called soon, by this thread or another
    /// that it must not block.
    pub fn enable(
        &self,
        request: &EnableScanout,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) {
        match &self.origin {
            // It is as its description says.
            Origin::Description(_) => done(Ok(())),
            Origin::Console(link) => link.enable(request, done),
        }
    }

    /// DISABLE_SCANOUT. `done` is called as that of [`Scanout::enable`].
    pub fn disable(&self, done: impl FnOnce(Result<(), String>) + Send + 'static) {
        match &self.origin {
            Origin::Description(_) => done(Ok(())),
            Origin::Console(link) => link.disable(self.id, done),
        }
    }

    /// What has happened so far.
    pub fn figures(&self) -> Figures {
        let state = self.state();
        Figures {
            subscribers: state.subscribers.len() as u64,
            ..state.figures
        }
    }

    /// Adds a subscriber whose thread `waker` wakes; starts the scanout if it does not run.
    pub fn subscribe(self: &Arc<Self>, waker: Waker) -> std::io::Result<Subscription> {
        let subscriber = Arc::new(Subscriber::new(waker));
        let mut state = self.state();
        state.subscribers.push(subscriber.clone());
        state.inbox.keyframe_wanted = true;
        if let Some(worker) = &state.worker {
            worker.wake();
        } else if let Err(error) = self.start(&mut state) {
            state.subscribers.pop();
            return Err(error);
        }
        drop(state);
        Ok(Subscription {
            scanout: self.clone(),
            subscriber,
        })
    }

    /// Ends the scanout for good and waits until it has, or until `deadline`.
    pub fn stop(&self, deadline: Instant) {
        let mut state = self.state();
        state.stopping = true;
        if let Some(worker) = &state.worker {
            worker.wake();
        }
        while state.worker.is_some() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(scanout = self.id, "the scanout does not stop");
                return;
            }
            state = self
                .stopped
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn start(self: &Arc<Self>, state: &mut State) -> std::io::Result<()> {
        let waiter = Waiter::new()?;
        let waker = waiter.waker();
        let scanout = self.clone();
        std::thread::Builder::new()
            .name(format!("helix-scanout-{}", self.id))
            .spawn(move || scanout.run(waiter))?;
        state.worker = Some(waker);
        Ok(())
    }

    /// The scanout's thread.
    fn run(self: Arc<Self>, mut waiter: Waiter) {
        loop {
            tracing::info!(scanout = self.id, "starting");
            let started = Instant::now();
            self.forget();
            match Run::start(&self, waiter.waker()).and_then(|run| run.serve(&mut waiter)) {
                Ok(()) => tracing::info!(scanout = self.id, "stopped"),
                Err(reason) => {
                    tracing::warn!(scanout = self.id, reason, "failed");
                    let text = format!("scanout {}: {reason}", self.id);
                    for subscriber in self.state().subscribers.drain(..) {
                        subscriber.end(&text);
                    }
                    // Whoever subscribes again at once must not make this loop spin.
                    self.rest(&mut waiter, started + RETRY);
                }
            }
            let mut state = self.state();
            if state.stopping || state.subscribers.is_empty() {
                state.worker = None;
                self.stopped.notify_all();
                return;
            }
        }
    }

    /// Forgets what a pipeline that is gone has left.
    fn forget(&self) {
        let mut state = self.state();
        state.flowing = false;
        state.reordered = false;
        state.fixed_bitrate = None;
        state.inbox = Inbox::default();
        let picture = state.picture.take();
        drop(state);
        // Giving its memory back may take a while: not under the lock.
        drop(picture);
    }

    /// Waits until `moment`, or until the host ends.
    fn rest(&self, waiter: &mut Waiter, moment: Instant) {
        while !self.state().stopping && Instant::now() < moment {
            match waiter.wait(Deadline::at(moment)) {
                Ok(Wake::Cancelled) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// Gives a frame to everybody.
    fn publish(&self, unit: AccessUnit, pts: i64) {
        let mut state = self.state();
        if self.origin.kind() == Kind::Encoded
            && pts + BACK < state.last_pts
            && !std::mem::replace(&mut state.reordered, true)
        {
            tracing::warn!(
                scanout = self.id,
                "access units are not in the order in which they are shown: a stream with B pictures \
                 goes out with wrong times (encode it without them)"
            );
        }
        // A picture that was encoded twice may come in between.
        let pts = pts.max(state.last_pts + 1);
        state.last_pts = pts;
        let frame = Frame { unit, pts };
        let dropped: u64 = state
            .subscribers
            .iter()
            .map(|subscriber| subscriber.push(&frame))
            .sum();
        let figures = &mut state.figures;
        figures.frames += 1;
        figures.bytes += frame.unit.size() as u64;
        figures.dropped += dropped;
        if !std::mem::replace(&mut state.flowing, true)
            && let Some(worker) = &state.worker
        {
            // It may hold back a request for a keyframe until now.
            worker.wake();
        }
    }

    /// Says that a frame is missing between the last and the next.
    fn interrupt(&self) {
        let mut state = self.state();
        state.inbox.keyframe_wanted = true;
        state.figures.encode_errors += 1;
        for subscriber in &state.subscribers {
            subscriber.interrupt();
        }
        // A still screen has no other reason to encode anything.
        if let Some(worker) = &state.worker {
            worker.wake();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscription {
    /// Which scanout it is of.
    pub fn scanout_id(&self) -> u32 {
        self.scanout.id
    }

    /// What to send next.
    pub fn next(&self) -> Next {
        let next = self.subscriber.next();
        if let Next::NeedsKeyframe = next {
            tracing::debug!(scanout = self.scanout.id, "asking for a keyframe");
            self.force_keyframe();
        }
        next
    }

    /// When to call [`Subscription::next`] even if nobody woke the thread.
    pub fn deadline(&self) -> Option<Instant> {
        self.subscriber.deadline()
    }

    /// Has the scanout make a keyframe soon.
    pub fn force_keyframe(&self) {
        self.scanout.tell(|state| {
            // Asked for once, it is on its way: waking the thread again would be for nothing.
            !std::mem::replace(&mut state.inbox.keyframe_wanted, true)
        });
    }

    /// What is in force, for CONFIG_RESP; what the scanout's description decides is 0.
    pub fn in_force(&self) -> Config {
        let (bitrate, profile) = match self.scanout.origin.kind() {
            Kind::Encoded => (0, 0),
            Kind::Raw => {
                let fixed = self.scanout.state().fixed_bitrate;
                let tuning = self.scanout.tuning();
                let encoder = &self.scanout.encoder;
                (
                    fixed.unwrap_or_else(|| encoder.bitrate_with(&tuning)),
                    encoder.profile_idc(tuning.profile),
                )
            }
        };
        Config {
            bitrate,
            profile,
            realtime: true,
            ..Config::default()
        }
    }

    /// Sets the scanout's bitrate, in bit/s, for all subscribers.
    pub fn set_bitrate(&self, bits: u32) {
        self.scanout.tell(|state| {
            let changed = state.bitrate != Some(bits);
            // The scanout's thread may not have seen the change before.
            state.inbox.bitrate_changed |= changed;
            state.bitrate = Some(bits);
            changed
        });
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.scanout.tell(|state| {
            state
                .subscribers
                .retain(|other| !Arc::ptr_eq(other, &self.subscriber));
            state.subscribers.is_empty()
        });
    }
}

impl Scanout {
    /// How its encoder is set.
    fn tuning(&self) -> Tuning {
        Tuning {
            bitrate: self.state().bitrate,
            profile: 77,
            keyframes: Keyframes::Every(KEYFRAME_DISTANCE),
        }
    }

    /// Changes the state and wakes the scanout's thread if `change` says so.
    fn tell(&self, change: impl FnOnce(&mut State) -> bool) {
        let mut state = self.state();
        if change(&mut state)
            && let Some(worker) = &state.worker
        {
            worker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitrate_said_twice_is_not_forgotten_by_a_thread_that_is_busy() {
        gst::init().unwrap();
        let description = Description::parse("videotestsrc").unwrap();
        let encoder = EncoderSpec::parse("x264enc").unwrap();
        let scanout = Scanout::new(0, Origin::Description(description), Arc::new(encoder));
        // In the place of the thread: it wakes up later.
        let waker = Waiter::new().unwrap().waker();
        scanout.state().worker = Some(waker.clone());
        let subscription = scanout.subscribe(waker).unwrap();
        for _ in 0..2 {
            subscription.set_bitrate(8_000_000);
        }
        let state = scanout.state();
        assert!(state.inbox.bitrate_changed);
        assert_eq!(state.bitrate, Some(8_000_000));
    }
}
