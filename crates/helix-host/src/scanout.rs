// SPDX-License-Identifier: MIT OR Apache-2.0

//! Screens that are pushed to whoever subscribes.
//!
//! A scanout runs while somebody watches: the first subscriber starts its thread, which owns the
//! source and the encoder and stops both [`LINGER`] after the last has gone. There is one encode
//! however many watch; each has a queue of its own ([`crate::subscriber`]), so that none delays
//! another.

use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gst_video::VideoInfo;
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};

use crate::access_unit::AccessUnit;
use crate::encoder::{Encoder, Output};
use crate::picture::Picture;
use crate::settings::{EncoderSpec, Keyframes, Tuning};
use crate::source::{Description, Event, Kind, Source};
use crate::subscriber::{Frame, Next, Subscriber};

/// How many there may be; the ids are below this.
pub const SCANOUTS: u32 = 16;
/// How long a scanout goes on after its last subscriber has gone.
const LINGER: Duration = Duration::from_secs(3);
/// A screen that shows nothing new for this long after a keyframe was asked for is still: its
/// last picture is encoded again.
const STILL: Duration = Duration::from_millis(100);
/// Keyframes on demand are at least this far apart, or one client could make everybody's stream
/// nothing but keyframes.
const KEYFRAME_PAUSE: Duration = Duration::from_millis(100);
/// Time between two attempts to start what failed.
const RETRY: Duration = Duration::from_secs(1);
/// Pictures in the encoder at once. Further ones replace each other before it (L26).
const IN_FLIGHT: usize = 2;
/// A keyframe comes by itself after this many pictures, as clients of deployed hosts expect.
const KEYFRAME_DISTANCE: u32 = 60;
/// An encoder that is silent for so long hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// Encoders that fail one after the other before the scanout is given up.
const FAILURES: u32 = 3;

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

/// One screen.
pub struct Scanout {
    id: u32,
    description: Description,
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
    /// bit/s; stays over restarts of the pipeline.
    bitrate: Option<u32>,
    last_pts: i64,
}

/// What others have for the scanout's thread.
#[derive(Default)]
struct Inbox {
    /// The newest picture of a raw source, and when it was captured.
    picture: Option<(gst::Sample, i64)>,
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
    pub fn new(id: u32, description: Description, encoder: Arc<EncoderSpec>) -> Arc<Self> {
        Arc::new(Self {
            id,
            description,
            encoder,
            state: Mutex::default(),
            stopped: Condvar::new(),
        })
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
            // Whatever is left over is of a pipeline that is gone.
            let inbox = std::mem::take(&mut self.state().inbox);
            drop(inbox);
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
        // A picture that was encoded twice may come in between.
        let pts = pts.max(state.last_pts + 1);
        state.last_pts = pts;
        let frame = Frame { unit, pts };
        for subscriber in &state.subscribers {
            subscriber.push(&frame);
        }
    }

    /// Says that a frame is missing between the last and the next.
    fn interrupt(&self) {
        let mut state = self.state();
        state.inbox.keyframe_wanted = true;
        for subscriber in &state.subscribers {
            subscriber.interrupt();
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
            self.force_keyframe();
        }
        next
    }

    /// Has the scanout make a keyframe soon.
    pub fn force_keyframe(&self) {
        self.scanout.tell(|state| {
            // Asked for once, it is on its way: waking the thread again would be for nothing.
            !std::mem::replace(&mut state.inbox.keyframe_wanted, true)
        });
    }

    /// Sets the scanout's bitrate, in bit/s, for all subscribers.
    pub fn set_bitrate(&self, bits: u32) {
        self.scanout.tell(|state| {
            state.inbox.bitrate_changed = state.bitrate != Some(bits);
            state.bitrate = Some(bits);
            state.inbox.bitrate_changed
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

/// A scanout that runs: owned by its thread.
struct Run {
    scanout: Arc<Scanout>,
    source: Source,
    waker: Waker,
    encoder: Option<Encoder<i64>>,
    failures: u32,
    /// The last picture, for screens that stand still.
    last: Option<gst::Sample>,
    keyframe_wanted: bool,
    /// When the keyframe that is wanted is made from the last picture.
    still_at: Option<Instant>,
    last_keyframe: Option<Instant>,
    empty_since: Option<Instant>,
}

impl Run {
    fn start(scanout: &Arc<Scanout>, waker: Waker) -> Result<Self, String> {
        let source = Source::start(&scanout.description, {
            let (scanout, waker) = (scanout.clone(), waker.clone());
            let kind = scanout.description.kind();
            move |event| {
                match (kind, event) {
                    (Kind::Encoded, Event::Sample(sample, pts)) => {
                        if let Some(unit) = sample.buffer_owned().and_then(AccessUnit::new) {
                            scanout.publish(unit, pts);
                        }
                        return;
                    }
                    (Kind::Raw, Event::Sample(sample, pts)) => {
                        scanout.state().inbox.picture = Some((sample, pts));
                    }
                    (_, Event::Ended(reason)) => {
                        scanout.state().inbox.ended.get_or_insert(reason);
                    }
                }
                waker.wake();
            }
        })
        .map_err(|reason| scanout.state().inbox.ended.take().unwrap_or(reason))?;
        Ok(Self {
            scanout: scanout.clone(),
            source,
            waker,
            encoder: None,
            failures: 0,
            last: None,
            // There is somebody, or this would not run.
            keyframe_wanted: true,
            still_at: None,
            last_keyframe: None,
            empty_since: None,
        })
    }

    /// Runs until nobody watches any more.
    fn serve(mut self, waiter: &mut Waiter) -> Result<(), String> {
        loop {
            let inbox = {
                let mut state = self.scanout.state();
                if state.stopping {
                    return Ok(());
                }
                if state.subscribers.is_empty() {
                    let since = *self.empty_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= LINGER {
                        return Ok(());
                    }
                } else {
                    self.empty_since = None;
                }
                let busy = self
                    .encoder
                    .as_ref()
                    .is_some_and(|encoder| encoder.in_flight() >= IN_FLIGHT);
                let picture = if busy { None } else { state.inbox.picture.take() };
                let keep = if busy { state.inbox.picture.take() } else { None };
                let inbox = std::mem::take(&mut state.inbox);
                state.inbox.picture = keep;
                Inbox { picture, ..inbox }
            };
            if let Some(reason) = inbox.ended {
                return Err(reason);
            }
            if let Some(reason) = inbox.encoder_failed {
                self.encoder_failed(&reason)?;
            }
            if inbox.bitrate_changed {
                self.change_bitrate();
            }
            if inbox.keyframe_wanted {
                self.keyframe_wanted = true;
            }
            self.check_encoder()?;
            match self.scanout.description.kind() {
                Kind::Raw => self.encode(inbox.picture)?,
                Kind::Encoded => self.pass_keyframe_request(),
            }
            if let Wake::Cancelled = waiter
                .wait(self.deadline())
                .map_err(|error| error.to_string())?
            {
                return Ok(());
            }
        }
    }

    fn deadline(&self) -> Deadline {
        let moments = [
            self.empty_since.map(|since| since + LINGER),
            self.still_at,
            self.encoder
                .as_ref()
                .and_then(Encoder::busy_since)
                .map(|since| since + PATIENCE),
        ];
        moments
            .into_iter()
            .flatten()
            .min()
            .map_or(Deadline::NEVER, Deadline::at)
    }

    /// Encodes a new picture, or the last one again where a still screen owes a keyframe.
    fn encode(&mut self, new: Option<(gst::Sample, i64)>) -> Result<(), String> {
        let now = Instant::now();
        let allowed = self.last_keyframe.map_or(now, |last| last + KEYFRAME_PAUSE);
        let (sample, pts) = if let Some(new) = new {
            new
        } else {
            if !self.keyframe_wanted {
                return Ok(());
            }
            let due = *self.still_at.get_or_insert(allowed.max(now + STILL));
            let Some(last) = self.last.clone().filter(|_| now >= due) else {
                if self.last.is_none() {
                    // The first picture will be a keyframe anyway.
                    self.still_at = None;
                }
                return Ok(());
            };
            (last, monotonic_now())
        };
        self.still_at = None;
        let keyframe = self.keyframe_wanted && now >= allowed;
        self.push(&sample, keyframe, pts)?;
        if keyframe {
            self.keyframe_wanted = false;
            self.last_keyframe = Some(now);
        }
        self.last = Some(sample);
        Ok(())
    }

    fn push(&mut self, sample: &gst::Sample, keyframe: bool, pts: i64) -> Result<(), String> {
        let picture = picture(sample)?;
        let encoder = match &mut self.encoder {
            Some(encoder) => encoder,
            None => self.encoder.insert(start_encoder(&self.scanout, &self.waker)?),
        };
        encoder.push(picture, keyframe, pts, pts)
    }

    fn pass_keyframe_request(&mut self) {
        let now = Instant::now();
        if !self.keyframe_wanted {
            return;
        }
        let allowed = self.last_keyframe.map_or(now, |last| last + KEYFRAME_PAUSE);
        if now < allowed {
            self.still_at = Some(allowed);
            return;
        }
        self.still_at = None;
        self.keyframe_wanted = false;
        self.last_keyframe = Some(now);
        self.source.force_keyframe();
    }

    fn change_bitrate(&mut self) {
        let bits = self.scanout.state().bitrate;
        if let (Some(encoder), Some(bits)) = (&self.encoder, bits) {
            encoder.set_bitrate(bits);
        } else if self.scanout.description.kind() == Kind::Encoded {
            tracing::debug!(
                scanout = self.scanout.id,
                "the bitrate of an encoded scanout is its description's"
            );
        }
    }

    /// Drops a broken encoder; the next picture makes a new one.
    fn encoder_failed(&mut self, reason: &str) -> Result<(), String> {
        self.failures += 1;
        tracing::warn!(scanout = self.scanout.id, reason, "encoding failed");
        self.encoder = None;
        self.scanout.interrupt();
        if self.failures >= FAILURES {
            return Err(reason.to_owned());
        }
        Ok(())
    }

    fn check_encoder(&mut self) -> Result<(), String> {
        let Some(encoder) = &self.encoder else {
            return Ok(());
        };
        let Some(since) = encoder.busy_since() else {
            // All that was asked of it has come.
            self.failures = 0;
            return Ok(());
        };
        if since.elapsed() >= PATIENCE {
            if let Some(encoder) = self.encoder.take() {
                encoder.abandon();
            }
            self.encoder_failed("the encoder hangs")?;
        }
        Ok(())
    }
}

fn start_encoder(scanout: &Arc<Scanout>, waker: &Waker) -> Result<Encoder<i64>, String> {
    let tuning = Tuning {
        bitrate: scanout.state().bitrate,
        profile: 77,
        keyframes: Keyframes::Every(KEYFRAME_DISTANCE),
    };
    let (target, waker) = (scanout.clone(), waker.clone());
    Encoder::start(&scanout.encoder, &tuning, move |output| {
        match output {
            Output::Unit(pts, unit) => target.publish(unit, pts),
            Output::Skipped(_) => target.interrupt(),
            Output::Failed(reason) => target.state().inbox.encoder_failed = Some(reason),
        }
        // There is room in the encoder now.
        waker.wake();
    })
}

fn picture(sample: &gst::Sample) -> Result<Picture, String> {
    let info = sample
        .caps()
        .and_then(|caps| VideoInfo::from_caps(caps).ok())
        .ok_or("the source's caps are no raw video")?;
    let buffer = sample
        .buffer_owned()
        .ok_or("the source sent a sample without a buffer")?;
    Ok(Picture { buffer, info })
}

/// CLOCK_MONOTONIC in nanoseconds.
fn monotonic_now() -> i64 {
    use gst::prelude::*;
    gst::SystemClock::obtain().time().nseconds() as i64
}
