// SPDX-License-Identifier: MIT OR Apache-2.0

//! One running encoder: raw pictures in, access units out, nothing waits.
//!
//! ```text
//! appsrc ! videoconvert ! {NV12, I420} ! ENCODER ! profile ! h264parse ! appsink
//! ```
//!
//! What the encoder cannot take is padded, before the conversion to its least size and behind it
//! to even sides ([`crate::edges`]), and cropped again in the stream's parameter sets.
//!
//! [`Encoder::push`] hands a picture to the pipeline's own thread and returns. What becomes of it
//! arrives as [`Output`], from that thread, in the order of the pictures: exactly one output for
//! each picture, unless the whole encoder fails.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use gst::ClockTime;
use gst::prelude::*;
use gst_video::{UpstreamForceKeyUnitEvent, VideoInfo};
use helix_protocol::sps::{self, Changes, Patch};

use crate::access_unit::AccessUnit;
use crate::edges;
use crate::ending;
use crate::picture::Picture;
use crate::settings::{EncoderSpec, Tuning};

/// The step from one picture's timestamp to the next, as the encoder sees it. Rate control takes
/// it seriously, so nothing absurd from a client may get there.
const LEAST_STEP: ClockTime = ClockTime::from_mseconds(1);
const LONGEST_STEP: ClockTime = ClockTime::SECOND;
/// Two timestamps that differ by less are the same: steps are at least twice this.
const TOLERANCE: ClockTime = ClockTime::from_useconds(500);

/// What became of a picture. `T` is the ticket that was pushed with it.
#[derive(Debug)]
pub enum Output<T> {
    /// It is encoded.
    Unit(T, AccessUnit),
    /// The encoder went on to a later picture without a word about this one.
    Skipped(T),
    /// The encoder is broken; none of the pictures in it comes out. Make a new one.
    Failed(String),
}

/// A pipeline around an encoder.
pub struct Encoder<T: Send + 'static> {
    spec: EncoderSpec,
    pipeline: gst::Pipeline,
    source: gst_app::AppSrc,
    element: gst::Element,
    shared: Arc<Shared<T>>,
    minimum: (u32, u32),
    /// Whether pictures with odd sides get as far as [`crate::edges`].
    odd: bool,
    /// What the pictures have been like so far.
    info: Option<VideoInfo>,
    /// Width and height of the last one before anything was padded.
    visible: Option<(u32, u32)>,
    /// Our own time of the last picture, and the sender's.
    last: Option<(ClockTime, i64)>,
}

struct Pending<T> {
    time: ClockTime,
    /// Width and height before anything was padded.
    visible: (u32, u32),
    since: Instant,
    ticket: T,
}

struct Shared<T> {
    /// The encoder's name, for the log.
    name: String,
    pending: Mutex<VecDeque<Pending<T>>>,
    /// Why nothing more will come.
    failed: Mutex<Option<String>>,
    output: Box<dyn Fn(Output<T>) + Send + Sync>,
}

impl<T: Send + 'static> Encoder<T> {
    /// Starts an encoder. `output` is called from its thread and must return soon.
    pub fn start(
        spec: &EncoderSpec,
        tuning: &Tuning,
        output: impl Fn(Output<T>) + Send + Sync + 'static,
    ) -> Result<Self, String> {
        ending::allow(&spec.name())?;
        let shared = Arc::new(Shared {
            name: spec.name().to_string(),
            pending: Mutex::new(VecDeque::new()),
            failed: Mutex::new(None),
            output: Box::new(output),
        });
        let encoder = spec.build(tuning).map_err(|error| error.to_string())?;
        let source = gst_app::AppSrc::builder()
            .format(gst::Format::Time)
            // Pictures in flight are counted by who pushes them.
            .max_bytes(0)
            .build();
        let sink = gst_app::AppSink::builder()
            .sync(false)
            .async_(false)
            .enable_last_sample(false)
            .callbacks(
                gst_app::AppSinkCallbacks::builder()
                    .new_sample({
                        let shared = shared.clone();
                        move |sink| {
                            let sample = sink.pull_sample().map_err(|_| gst::FlowError::Eos)?;
                            shared.encoded(&sample);
                            Ok(gst::FlowSuccess::Ok)
                        }
                    })
                    .build(),
            )
            .build();
        let element = |factory: &str| {
            gst::ElementFactory::make(factory)
                .build()
                .map_err(|_| missing(factory))
        };
        let filter = |caps: gst::Caps| {
            gst::ElementFactory::make("capsfilter")
                .property("caps", caps)
                .build()
                .map_err(|_| missing("capsfilter"))
        };
        // 4:2:0 only: x264enc would rather have Y444 and then write a profile nobody decodes.
        let raw = gst::Caps::builder("video/x-raw")
            .field("format", gst::List::new(["NV12", "I420"]))
            .build();
        let stream = gst::Caps::builder("video/x-h264")
            .field("stream-format", "byte-stream")
            .field("alignment", "au")
            .build();
        let parser = gst::ElementFactory::make("h264parse")
            // Parameter sets with each keyframe (L27).
            .property("config-interval", -1)
            .build()
            .map_err(|_| missing("h264parse"))?;
        let convert = element("videoconvert")?;
        let (raw, profile, stream) = (
            filter(raw)?,
            filter(spec.profile_caps(tuning.profile))?,
            filter(stream)?,
        );
        if let Some(pad) = raw.static_pad("src") {
            let shared = shared.clone();
            edges::complete(&pad, move |reason| shared.fail(reason));
        }
        let chain = [
            source.upcast_ref(),
            &convert,
            &raw,
            &encoder,
            &profile,
            &parser,
            &stream,
            sink.upcast_ref(),
        ];
        let pipeline = gst::Pipeline::new();
        pipeline
            .add_many(chain)
            .and_then(|()| gst::Element::link_many(chain))
            .map_err(|error| format!("cannot build a pipeline around {}: {error}", spec.name()))?;
        if let Some(bus) = pipeline.bus() {
            let shared = shared.clone();
            bus.set_sync_handler(move |_, message| {
                if let gst::MessageView::Error(error) = message.view() {
                    shared.fail(describe(error));
                }
                gst::BusSyncReply::Drop
            });
        }
        let this = Self {
            spec: spec.clone(),
            pipeline,
            source,
            element: encoder,
            shared,
            minimum: spec.minimum_size(),
            odd: spec.takes_odd_sizes(),
            info: None,
            visible: None,
            last: None,
        };
        this.pipeline.set_state(gst::State::Playing).map_err(|_| {
            let reason = this.shared.failed().clone().unwrap_or_default();
            format!("{} does not start: {reason}", spec.name())
        })?;
        Ok(this)
    }

    /// Has a picture encoded. `timestamp` is the sender's, in nanoseconds; only its distance to
    /// the one before counts.
    pub fn push(
        &mut self,
        picture: Picture,
        keyframe: bool,
        timestamp: i64,
        ticket: T,
    ) -> Result<(), String> {
        let visible = (picture.info.width(), picture.info.height());
        let mut least = (visible.0.max(self.minimum.0), visible.1.max(self.minimum.1));
        if !self.odd {
            least = (least.0.next_multiple_of(2), least.1.next_multiple_of(2));
        }
        let Picture { mut buffer, info } = picture.at_least(least)?;
        let time = self.time_of(timestamp, &info);
        // An encoder's first picture is a keyframe without asking. Asking all the same makes
        // x264enc in GStreamer 1.22 deaf to all later requests: it takes note of this one's time
        // after having moved it by 1000 h, and waits for that to pass.
        // Two small sizes may be padded to the same one: only a parameter set tells them apart.
        let cropped_anew = self.visible.replace(visible) != Some(visible);
        let force = (keyframe || cropped_anew) && self.info.is_some();
        if self.info.as_ref() != Some(&info) {
            let caps = info
                .to_caps()
                .map_err(|error| format!("the picture has no caps: {error}"))?;
            self.source.set_caps(Some(&caps));
            self.info = Some(info);
        }
        if force {
            // For the first picture from this time on: this one.
            let event = UpstreamForceKeyUnitEvent::builder()
                .running_time(time)
                .all_headers(true)
                .build();
            if !self
                .element
                .static_pad("src")
                .is_some_and(|pad| pad.send_event(event))
            {
                tracing::debug!(encoder = %self.spec.name(), "the encoder refuses a key unit");
            }
        }
        {
            let buffer = buffer.make_mut();
            buffer.set_pts(time);
            buffer.set_dts(ClockTime::NONE);
            buffer.set_duration(ClockTime::NONE);
        }
        self.shared.pending().push_back(Pending {
            time,
            visible,
            since: Instant::now(),
            ticket,
        });
        self.source.push_buffer(buffer).map(drop).map_err(|flow| {
            self.shared.pending().pop_back();
            format!("{} takes no more pictures: {flow}", self.spec.name())
        })
    }

    /// Changes the bitrate, in bit/s, from the next picture on. Whether this encoder does: some take one
    /// only before they start, and a new one is to be made.
    pub fn set_bitrate(&self, bits: u32) -> bool {
        let can = self.spec.takes_bitrate_while_playing(&self.element);
        if can {
            self.spec.set_bitrate(&self.element, bits);
        }
        can
    }

    /// The bitrate that it is set to, in bit/s; 0 where it has none.
    pub fn bitrate(&self) -> u32 {
        self.spec.bitrate_of(&self.element)
    }

    /// The same where it can be set to no other one.
    pub fn fixed_bitrate(&self) -> Option<u32> {
        let fixed = !self.spec.takes_bitrate_while_playing(&self.element);
        fixed.then(|| self.bitrate())
    }

    /// Pictures whose output has not come.
    pub fn in_flight(&self) -> usize {
        self.shared.pending().len()
    }

    /// Since when the encoder has been at the oldest of them.
    pub fn busy_since(&self) -> Option<Instant> {
        self.shared.pending().front().map(|pending| pending.since)
    }

    /// Our own monotonic time of a picture.
    fn time_of(&mut self, timestamp: i64, info: &VideoInfo) -> ClockTime {
        let time = match self.last {
            None => ClockTime::ZERO,
            Some((time, before)) => {
                let step = match timestamp.checked_sub(before) {
                    Some(step) if step > 0 => ClockTime::from_nseconds(step as u64),
                    // The sender's clock stood still or jumped back.
                    _ => frame_duration(info),
                };
                time + step.clamp(LEAST_STEP, LONGEST_STEP)
            }
        };
        self.last = Some((time, timestamp));
        time
    }
}

impl<T: Send + 'static> Drop for Encoder<T> {
    fn drop(&mut self) {
        // Whatever still comes out is nobody's.
        self.shared.failed().get_or_insert_default();
        ending::stop(&self.pipeline, &self.spec.name());
    }
}

impl<T> Shared<T> {
    fn pending(&self) -> MutexGuard<'_, VecDeque<Pending<T>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self) -> MutexGuard<'_, Option<String>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds out which picture a buffer is of, by its time, and tells.
    fn encoded(&self, sample: &gst::Sample) {
        // x264enc moves timestamps and segment by 1000 h together: the running time stays.
        let time = sample
            .buffer()
            .and_then(gst::BufferRef::pts)
            .zip(sample.segment())
            .and_then(|(pts, segment)| {
                segment
                    .downcast_ref::<ClockTime>()
                    .and_then(|segment| segment.to_running_time(pts))
            });
        let (Some(time), Some(buffer)) = (time, sample.buffer_owned()) else {
            self.fail("the encoder wrote a buffer without a timestamp".to_owned());
            return;
        };
        loop {
            let first = {
                let mut pending = self.pending();
                match pending.front() {
                    Some(first) if first.time <= time + TOLERANCE => {
                        let first = pending.pop_front();
                        // The encoder begins with the next one now, not when that was pushed.
                        if let Some(next) = pending.front_mut() {
                            next.since = Instant::now();
                        }
                        first
                    }
                    _ => None,
                }
            };
            if self.failed().is_some() {
                return;
            }
            match first {
                Some(first) if first.time + TOLERANCE >= time => {
                    let patches = |unit: &[u8]| self.patches(unit, first.visible);
                    match AccessUnit::patched(buffer, patches) {
                        Some(unit) => (self.output)(Output::Unit(first.ticket, unit)),
                        None => {
                            self.fail("the encoder wrote a buffer that cannot be read".to_owned());
                        }
                    }
                    return;
                }
                Some(first) => (self.output)(Output::Skipped(first.ticket)),
                None => {
                    tracing::debug!(%time, "the encoder wrote a picture that nobody sent");
                    return;
                }
            }
        }
    }

    /// What has to be changed in a keyframe so that it shows what the picture was, and so that
    /// decoders show it at once (L27): the encoders here reorder nothing.
    fn patches(&self, unit: &[u8], visible: (u32, u32)) -> Vec<Patch> {
        let changes = Changes {
            visible: Some(visible),
            low_delay: true,
        };
        sps::patches(unit, changes).unwrap_or_else(|error| {
            tracing::warn!(encoder = self.name, %error, "the parameter set stays as it is");
            Vec::new()
        })
    }

    fn fail(&self, reason: String) {
        let first = {
            let mut failed = self.failed();
            let first = failed.is_none();
            failed.get_or_insert_with(|| reason.clone());
            first
        };
        if first {
            (self.output)(Output::Failed(reason));
        }
    }
}

fn missing(factory: &str) -> String {
    format!("GStreamer's element {factory} is not installed")
}

/// What an error message says, in one line.
pub fn describe(error: &gst::message::Error) -> String {
    let source = error
        .src()
        .map(|source| source.name().to_string())
        .unwrap_or_default();
    match error.debug() {
        Some(debug) => format!(
            "{source}: {} ({})",
            error.error().message(),
            debug.lines().last().unwrap_or_default()
        ),
        None => format!("{source}: {}", error.error().message()),
    }
}

/// How long one picture is shown.
pub fn frame_duration(info: &VideoInfo) -> ClockTime {
    let fps = info.fps();
    ClockTime::SECOND
        .mul_div_floor(
            fps.denom().unsigned_abs().into(),
            fps.numer().unsigned_abs().into(),
        )
        .unwrap_or(LEAST_STEP)
}
