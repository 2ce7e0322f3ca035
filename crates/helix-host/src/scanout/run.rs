// SPDX-License-Identifier: MIT OR Apache-2.0

//! A scanout while it runs: pictures from the source, keyframes for newcomers, an encoder that is
//! made again when it breaks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gst_video::VideoInfo;
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};

use super::{Origin, Scanout};
use crate::access_unit::AccessUnit;
use crate::encoder::{Encoder, Output};
use crate::picture::Picture;
use crate::qemu::Watch;
use crate::source::{Description, Event, Kind, Source, monotonic_now};

/// How long a scanout goes on after its last subscriber has gone.
const LINGER: Duration = Duration::from_secs(3);
/// A screen that shows nothing new for this long after a keyframe was asked for is still: its
/// last picture is encoded again.
const STILL: Duration = Duration::from_millis(100);
/// Keyframes on demand are at least this far apart, or one client could make everybody's stream
/// nothing but keyframes.
const KEYFRAME_PAUSE: Duration = Duration::from_millis(100);
/// Pictures in the encoder at once. Further ones replace each other before it (L26).
const IN_FLIGHT: usize = 2;
/// An encoder that is silent for so long hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// Encoders that fail one after the other before the scanout is given up.
const FAILURES: u32 = 3;
/// An encoder that cannot change its bitrate gives way to a new one, which begins with a keyframe:
/// so often at most, whatever clients ask for.
const RENEWAL_PAUSE: Duration = Duration::from_secs(1);

/// Where pictures come from.
enum Input {
    /// A pipeline, and its last picture for when it stands still.
    Pipeline(Source, Option<gst::Sample>),
    /// QEMU keeps its last picture itself.
    Console(Box<Watch>),
}

/// A scanout that runs: owned by its thread.
pub struct Run {
    scanout: Arc<Scanout>,
    input: Input,
    waker: Waker,
    encoder: Option<Encoder<i64>>,
    /// When the last encoder was started.
    started: Option<Instant>,
    /// It has not the bitrate that it should, and cannot change it.
    outdated: bool,
    failures: u32,
    keyframe_wanted: bool,
    /// When the keyframe that is wanted is made from the last picture.
    still_at: Option<Instant>,
    last_keyframe: Option<Instant>,
    empty_since: Option<Instant>,
    /// Why the source brings no more.
    ended: Option<String>,
}

impl Run {
    /// Starts the source; `waker` wakes the scanout's thread.
    pub fn start(scanout: &Arc<Scanout>, waker: Waker) -> Result<Self, String> {
        let input = match &scanout.origin {
            Origin::Description(description) => {
                Input::Pipeline(start_source(scanout, description, waker.clone())?, None)
            }
            Origin::Console(link) => {
                let watch = Watch::new(link, scanout.id, waker.clone());
                Input::Console(Box::new(watch))
            }
        };
        Ok(Self {
            scanout: scanout.clone(),
            input,
            waker,
            encoder: None,
            started: None,
            outdated: false,
            failures: 0,
            // There is somebody, or this would not run.
            keyframe_wanted: true,
            still_at: None,
            last_keyframe: None,
            empty_since: None,
            ended: None,
        })
    }

    /// Runs until nobody watches any more.
    pub fn serve(mut self, waiter: &mut Waiter) -> Result<(), String> {
        loop {
            let (inbox, mut picture, busy) = {
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
                let picture = if busy { None } else { state.picture.take() };
                (std::mem::take(&mut state.inbox), picture, busy)
            };
            self.ended = self.ended.take().or(inbox.ended);
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
            if let Input::Console(watch) = &mut self.input
                && !busy
            {
                picture = watch.picture(false)?;
                self.keyframe_wanted |= watch.returned();
            }
            match self.scanout.origin.kind() {
                Kind::Raw => self.encode(picture)?,
                Kind::Encoded => self.pass_keyframe_request(),
            }
            if let Some(reason) = self.ended.take_if(|_| {
                // What the source brought before it ended is still wanted.
                self.scanout.state().picture.is_none()
                    && self
                        .encoder
                        .as_ref()
                        .is_none_or(|encoder| encoder.in_flight() == 0)
            }) {
                return Err(reason);
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
            match &self.input {
                Input::Pipeline(..) => None,
                Input::Console(watch) => watch.due(),
            },
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
            if now < due {
                return Ok(());
            }
            let last = match &mut self.input {
                Input::Pipeline(_, last) => last.clone().map(|last| (last, monotonic_now())),
                Input::Console(watch) => watch.picture(true)?,
            };
            let Some(last) = last else {
                // The first picture will be a keyframe anyway.
                self.still_at = None;
                return Ok(());
            };
            last
        };
        self.still_at = None;
        let keyframe = self.keyframe_wanted && now >= allowed;
        self.push(&sample, keyframe, pts)?;
        if keyframe {
            self.keyframe_wanted = false;
            self.last_keyframe = Some(now);
        }
        if let Input::Pipeline(_, last) = &mut self.input {
            *last = Some(sample);
        }
        Ok(())
    }

    fn push(&mut self, sample: &gst::Sample, keyframe: bool, pts: i64) -> Result<(), String> {
        let picture = picture(sample)?;
        let allowed = |started: Instant| started.elapsed() >= RENEWAL_PAUSE;
        if self.outdated && self.started.is_none_or(allowed) {
            // What it has not finished is older than this picture.
            self.encoder = None;
        }
        let encoder = if let Some(encoder) = &mut self.encoder {
            encoder
        } else {
            self.outdated = false;
            self.started = Some(Instant::now());
            let encoder = start_encoder(&self.scanout, &self.waker)?;
            self.scanout.state().fixed_bitrate = encoder.fixed_bitrate();
            self.encoder.insert(encoder)
        };
        encoder.push(picture, keyframe, pts, pts)
    }

    fn pass_keyframe_request(&mut self) {
        let now = Instant::now();
        // Encoders start with a keyframe, and asking x264enc too early makes it deaf: see
        // Encoder::push.
        if !self.keyframe_wanted || !self.scanout.state().flowing {
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
        if let Input::Pipeline(source, _) = &self.input {
            source.force_keyframe();
        }
    }

    fn change_bitrate(&mut self) {
        let bits = self.scanout.state().bitrate;
        if let (Some(encoder), Some(bits)) = (&self.encoder, bits) {
            self.outdated = !encoder.set_bitrate(bits);
        } else if self.scanout.origin.kind() == Kind::Encoded {
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
        self.scanout.state().fixed_bitrate = None;
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
            self.encoder_failed("the encoder hangs")?;
        }
        Ok(())
    }
}

fn start_source(
    scanout: &Arc<Scanout>,
    description: &Description,
    waker: Waker,
) -> Result<Source, String> {
    let kind = description.kind();
    let target = scanout.clone();
    Source::start(description, move |event| {
        match (kind, event) {
            (Kind::Encoded, Event::Sample(sample, pts)) => {
                if let Some(unit) = sample.buffer_owned().and_then(AccessUnit::new) {
                    target.publish(unit, pts);
                }
                return;
            }
            (Kind::Raw, Event::Sample(sample, pts)) => {
                target.state().picture = Some((sample, pts));
            }
            (_, Event::Ended(reason)) => {
                target.state().inbox.ended.get_or_insert(reason);
            }
        }
        waker.wake();
    })
    .map_err(|reason| scanout.state().inbox.ended.take().unwrap_or(reason))
}

fn start_encoder(scanout: &Arc<Scanout>, waker: &Waker) -> Result<Encoder<i64>, String> {
    let tuning = scanout.tuning();
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
