// SPDX-License-Identifier: MIT OR Apache-2.0

//! A screen that any GStreamer description provides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gst::prelude::*;
use gst::{ClockTime, ParseFlags};

use crate::encoder::describe;
use crate::ending;

/// What comes out of a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pictures, which the host encodes.
    Raw,
    /// H.264, which goes out as it is.
    Encoded,
}

/// How a raw description goes on. The formats are those that [`crate::picture`] can pad.
const RAW_TAIL: &str = "videoconvert ! \
    video/x-raw,format=(string){NV12,I420,BGRx,RGBx,BGRA,RGBA} ! appsink name=helix-sink";
const ENCODED_TAIL: &str = "h264parse config-interval=-1 ! \
    video/x-h264,stream-format=byte-stream,alignment=au ! appsink name=helix-sink";

/// A gst-launch description that was found to be one.
#[derive(Clone, Debug)]
pub struct Description {
    text: String,
    kind: Kind,
}

/// What a running source says.
pub enum Event {
    /// A picture or an access unit, captured at this CLOCK_MONOTONIC time in nanoseconds.
    Sample(gst::Sample, i64),
    /// Nothing more will come, for this reason.
    Ended(String),
}

impl Description {
    /// Parses the text without running it, and finds out what its end provides.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim().trim_end_matches('!').trim();
        if text.is_empty() {
            return Err("it is empty".to_owned());
        }
        let mut reasons = Vec::new();
        for kind in [Kind::Raw, Kind::Encoded] {
            let description = Self {
                text: text.to_owned(),
                kind,
            };
            match description.pipeline() {
                Ok(_) => return Ok(description),
                Err(reason) => reasons.push(reason),
            }
        }
        reasons.dedup();
        Err(reasons.join("; "))
    }

    /// What it provides.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What its pipelines are called when they end. One that hangs is nothing to other sources.
    fn name(&self) -> String {
        format!("the source '{}'", self.text)
    }

    fn pipeline(&self) -> Result<(gst::Pipeline, gst_app::AppSink), String> {
        let tail = match self.kind {
            Kind::Raw => RAW_TAIL,
            Kind::Encoded => ENCODED_TAIL,
        };
        let text = format!("{} ! {tail}", self.text);
        let pipeline = gst::parse::launch_full(&text, None, ParseFlags::FATAL_ERRORS)
            .map_err(|error| error.message().to_owned())?
            .downcast::<gst::Pipeline>()
            .map_err(|_| "it is no pipeline".to_owned())?;
        let sink = pipeline
            .by_name("helix-sink")
            .and_downcast::<gst_app::AppSink>()
            .ok_or("its end cannot be reached")?;
        Ok((pipeline, sink))
    }
}

/// A source that runs.
pub struct Source {
    pipeline: gst::Pipeline,
    sink: gst_app::AppSink,
    name: String,
    /// It has been dropped. One that hung may come to itself later.
    over: Arc<AtomicBool>,
}

impl Source {
    /// Starts it. `event` is called from its threads and must return soon.
    pub fn start(
        description: &Description,
        event: impl Fn(Event) + Clone + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let name = description.name();
        ending::allow(&name)?;
        let (pipeline, sink) = description.pipeline()?;
        let over = Arc::new(AtomicBool::new(false));
        let event = {
            let over = over.clone();
            move |what| {
                if !over.load(Ordering::Acquire) {
                    event(what);
                }
            }
        };
        // Times of buffers are then CLOCK_MONOTONIC, whatever clocks the elements offer.
        let clock = gst::SystemClock::obtain();
        clock.set_property("clock-type", gst::ClockType::Monotonic);
        pipeline.use_clock(Some(&clock));
        sink.set_property("enable-last-sample", false);
        sink.set_callbacks(
            gst_app::AppSinkCallbacks::builder()
                .new_sample({
                    let (event, pipeline) = (event.clone(), pipeline.downgrade());
                    move |sink| {
                        let sample = sink.pull_sample().map_err(|_| gst::FlowError::Eos)?;
                        let time = pipeline
                            .upgrade()
                            .and_then(|pipeline| capture_time(&sample, pipeline.base_time()))
                            .unwrap_or_else(|| clock.time());
                        event(Event::Sample(sample, time.nseconds() as i64));
                        Ok(gst::FlowSuccess::Ok)
                    }
                })
                .eos({
                    let event = event.clone();
                    move |_| event(Event::Ended("the stream has ended".to_owned()))
                })
                .build(),
        );
        if let Some(bus) = pipeline.bus() {
            bus.set_sync_handler(move |_, message| {
                if let gst::MessageView::Error(error) = message.view() {
                    event(Event::Ended(describe(error)));
                }
                gst::BusSyncReply::Drop
            });
        }
        let this = Self {
            pipeline,
            sink,
            name,
            over,
        };
        // What is live comes when it comes; waiting for its time would only add latency. What is
        // not live must be held to its time, or a file is over in a moment.
        match this.pipeline.set_state(gst::State::Paused) {
            Ok(gst::StateChangeSuccess::NoPreroll) => this.sink.set_sync(false),
            Ok(_) => this.sink.set_sync(true),
            Err(_) => return Err("it does not start".to_owned()),
        }
        this.pipeline
            .set_state(gst::State::Playing)
            .map_err(|_| "it does not start".to_owned())?;
        Ok(this)
    }

    /// Asks an encoder inside the description for a keyframe. A recording has none to ask.
    pub fn force_keyframe(&self) {
        let event = gst_video::UpstreamForceKeyUnitEvent::builder()
            .all_headers(true)
            .build();
        if !self.sink.send_event(event) {
            tracing::debug!("nothing in the scanout's description makes keyframes when asked");
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        ending::stop(&self.pipeline, &self.name);
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_now() -> i64 {
    gst::SystemClock::obtain().time().nseconds() as i64
}

fn capture_time(sample: &gst::Sample, base: Option<ClockTime>) -> Option<ClockTime> {
    let buffer = sample.buffer()?;
    // h264parse gives a recording without a container DTS only.
    let time = buffer.pts().or(buffer.dts())?;
    let running = sample
        .segment()?
        .downcast_ref::<ClockTime>()?
        .to_running_time(time)?;
    base?.checked_add(running)
}
