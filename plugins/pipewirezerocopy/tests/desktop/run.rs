// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pipelines for the tests: the element with an appsink behind it, and pictures to compare with.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst_video::prelude::*;
use zerocopy_test_support::desktop::Desktop;

/// Catches a hang; nothing takes nearly as long.
pub const LONG: Duration = Duration::from_secs(20);

pub fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstpipewirezerocopy::plugin_register_static().unwrap();
    });
}

/// `pipewirezerocopysrc ! capsfilter ! appsink` on a desktop's PipeWire.
pub struct Run {
    pub pipeline: gst::Pipeline,
    pub src: gst::Element,
    filter: gst::Element,
    pub sink: gst_app::AppSink,
    bus: gst::Bus,
    _socket: UnixStream,
}

impl Run {
    /// In state NULL, without a target. `caps` is what the sink takes.
    pub fn new(desktop: &Desktop, caps: &str) -> Self {
        Self::over(desktop.pipewire(), caps)
    }

    /// The same on a socket of PipeWire's.
    pub fn over(socket: UnixStream, caps: &str) -> Self {
        init();
        let src = gst::ElementFactory::make("pipewirezerocopysrc")
            .property("pipewire-fd", socket.as_raw_fd())
            .build()
            .unwrap();
        let filter = gst::ElementFactory::make("capsfilter")
            .property_from_str("caps", caps)
            .build()
            .unwrap();
        // A keepalive that nobody has pulled does not hold EOS back.
        let sink = gst_app::AppSink::builder().sync(false).build();
        sink.set_property("wait-on-eos", false);
        let pipeline = gst::Pipeline::new();
        let elements = [&src, &filter, sink.upcast_ref()];
        pipeline.add_many(elements).unwrap();
        gst::Element::link_many(elements).unwrap();
        let bus = pipeline.bus().unwrap();
        Self {
            pipeline,
            src,
            filter,
            sink,
            bus,
            _socket: socket,
        }
    }

    /// On a node, with anything for a sink.
    pub fn on_node(desktop: &Desktop, node: u32) -> Self {
        let run = Self::new(desktop, "video/x-raw");
        run.src.set_property("pipewire-node-id", node);
        run
    }

    /// Changes what is taken downstream, at any time.
    pub fn set_caps(&self, caps: &str) {
        self.filter.set_property_from_str("caps", caps);
    }

    /// Makes the sink answer allocation queries with this meta.
    pub fn propose<M: MetaAPI>(&self) {
        self.allocate(|query| query.add_allocation_meta::<M>(None));
    }

    /// Makes the sink answer allocation queries so.
    pub fn allocate(&self, answer: impl Fn(&mut gst::query::Allocation) + Send + Sync + 'static) {
        let pad = self.sink.static_pad("sink").unwrap();
        pad.add_probe(gst::PadProbeType::QUERY_DOWNSTREAM, move |_, info| {
            let Some(query) = info.query_mut() else {
                return gst::PadProbeReturn::Ok;
            };
            if let gst::QueryViewMut::Allocation(query) = query.view_mut() {
                answer(query);
                return gst::PadProbeReturn::Handled;
            }
            gst::PadProbeReturn::Ok
        });
    }

    pub fn play(&self) {
        let started = self.pipeline.set_state(gst::State::Playing);
        assert!(started.is_ok(), "starting failed: {}", self.error());
    }

    pub fn stop(&self) {
        self.pipeline.set_state(gst::State::Null).unwrap();
    }

    /// The next buffer; panics where none comes.
    pub fn frame(&self) -> gst::Sample {
        let deadline = Instant::now() + LONG;
        while Instant::now() < deadline {
            if let Some(sample) = self.frame_within(Duration::from_millis(100)) {
                return sample;
            }
            // An error ends the stream as well.
            if self.sink.is_eos() {
                match self.bus.pop_filtered(&[gst::MessageType::Error]) {
                    Some(message) => panic!("{message:?}"),
                    None => panic!("the stream ended"),
                }
            }
        }
        panic!("no frame within {LONG:?}");
    }

    /// The next buffer, if one comes in time.
    pub fn frame_within(&self, limit: Duration) -> Option<gst::Sample> {
        let limit = gst::ClockTime::try_from(limit).unwrap();
        self.sink.try_pull_sample(limit)
    }

    /// The next `count` buffers that are `wanted`; panics where they do not come in time.
    pub fn frames(&self, count: usize, wanted: impl Fn(&gst::Sample) -> bool) -> Vec<gst::Sample> {
        let end = Instant::now() + LONG;
        std::iter::repeat_with(|| self.frame())
            .inspect(|_| assert!(Instant::now() < end, "frames come, but not those"))
            .filter(wanted)
            .take(count)
            .collect()
    }

    /// What comes until the moment `limit` from now.
    pub fn frames_for(&self, limit: Duration) -> Vec<gst::Sample> {
        let end = Instant::now() + limit;
        let mut samples = Vec::new();
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            samples.extend(self.frame_within(left));
        }
        samples
    }

    /// The text of the first error message, with its details; waits for it.
    pub fn error(&self) -> String {
        self.error_within(LONG).expect("an error message")
    }

    /// The same, if one comes in time.
    pub fn error_within(&self, limit: Duration) -> Option<String> {
        let limit = gst::ClockTime::try_from(limit).unwrap();
        let message = self
            .bus
            .timed_pop_filtered(limit, &[gst::MessageType::Error])?;
        match message.view() {
            gst::MessageView::Error(error) => Some(describe(error)),
            _ => unreachable!("filtered"),
        }
    }

    /// Waits for the end of the stream at the sink.
    pub fn eos(&self) {
        let message = self.bus.timed_pop_filtered(
            gst::ClockTime::try_from(LONG).unwrap(),
            &[gst::MessageType::Eos, gst::MessageType::Error],
        );
        match message.expect("EOS").view() {
            gst::MessageView::Eos(_) => {}
            gst::MessageView::Error(error) => panic!("{}", describe(error)),
            _ => unreachable!("filtered"),
        }
    }

    /// Waits for the element's message with that state, and returns its reason.
    pub fn capture_message(&self, state: &str) -> String {
        let deadline = Instant::now() + LONG;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            let Some(message) = self.bus.timed_pop_filtered(
                gst::ClockTime::try_from(left).unwrap(),
                &[gst::MessageType::Element, gst::MessageType::Error],
            ) else {
                break;
            };
            match message.view() {
                gst::MessageView::Error(error) => panic!("{}", describe(error)),
                gst::MessageView::Element(element) => {
                    let structure = element.structure().expect("it has a structure");
                    assert_eq!(structure.name(), "pipewire-capture");
                    assert_eq!(structure.get::<&str>("memory"), Ok("system"));
                    if structure.get::<&str>("state") == Ok(state) {
                        return structure.get::<String>("reason").unwrap();
                    }
                }
                _ => unreachable!("filtered"),
            }
        }
        panic!("no message pipewire-capture with state={state}");
    }

    pub fn stat(&self, name: &str) -> u64 {
        let stats = self.src.property::<gst::Structure>("stats");
        stats.get(name).unwrap()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

fn describe(error: &gst::message::Error) -> String {
    format!("{} {}", error.error(), error.debug().unwrap_or_default())
}

/// Whether a buffer is a resent frame.
pub fn is_keepalive(sample: &gst::Sample) -> bool {
    let buffer = sample.buffer().unwrap();
    gst::meta::CustomMeta::from_buffer(buffer, "GstDesktopDamage").is_ok_and(|meta| {
        let rects = meta.structure().get::<gst::Array>("rects").unwrap();
        rects.is_empty()
    })
}

pub fn pts(sample: &gst::Sample) -> gst::ClockTime {
    sample.buffer().unwrap().pts().expect("it has a timestamp")
}

/// The pixels of a sample without the padding of its rows, plane after plane.
pub fn pixels(sample: &gst::Sample) -> Vec<u8> {
    let info = gst_video::VideoInfo::from_caps(sample.caps().unwrap()).unwrap();
    let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(sample.buffer().unwrap(), &info)
        .unwrap();
    let mut pixels = Vec::new();
    let format = info.format_info();
    for plane in 0..frame.n_planes() {
        let component = plane as usize;
        let width = (info.width() as usize).div_ceil(1 << format.w_sub()[component]);
        let height = (info.height() as usize).div_ceil(1 << format.h_sub()[component]);
        let row = width * format.pixel_stride()[component] as usize;
        let stride = frame.plane_stride()[component] as usize;
        let data = frame.plane_data(plane).unwrap();
        for line in data.chunks(stride).take(height) {
            pixels.extend_from_slice(&line[..row]);
        }
    }
    pixels
}

/// A picture of videotestsrc, with `format`, width and height in `caps`.
pub fn test_picture(caps: &str) -> gst::Sample {
    init();
    let description = format!(
        "videotestsrc pattern=smpte100 num-buffers=1 ! video/x-raw,{caps} ! \
         appsink name=sink sync=false"
    );
    let pipeline = gst::parse::launch(&description)
        .unwrap()
        .downcast::<gst::Pipeline>()
        .unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let sink = pipeline.by_name("sink").unwrap();
    let sample = sink.downcast::<gst_app::AppSink>().unwrap().pull_sample();
    pipeline.set_state(gst::State::Null).unwrap();
    sample.unwrap()
}

/// What [`Painter::still`](super::painter::Painter::still) shows.
pub fn expected_pixels(caps: &str) -> Vec<u8> {
    pixels(&test_picture(caps))
}
