// SPDX-License-Identifier: MIT OR Apache-2.0

//! The element in a pipeline, and what comes out of it.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::sync::Once;

use gst::prelude::*;
use zerocopy_plugin_common::DAMAGE_META;
use zerocopy_test_qemu::LIMIT;

pub fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstqemudisplay::plugin_register_static().unwrap();
    });
}

fn limit() -> gst::ClockTime {
    gst::ClockTime::try_from(LIMIT).unwrap()
}

/// A pipeline of the element and a sink that keeps every frame.
pub struct Rig {
    pub pipeline: gst::Pipeline,
    pub src: gst::Element,
    pub sink: gst_app::AppSink,
}

/// A frame that came out, with its caps.
pub struct Frame {
    pub buffer: gst::Buffer,
    pub info: gst_video::VideoInfo,
}

impl Rig {
    /// The element with these properties, as in gst-launch, and a sink that takes `caps`.
    pub fn new(properties: &str, caps: &str) -> Self {
        init();
        let line = format!("qemudisplaysrc name=src {properties} ! appsink name=sink sync=false");
        let pipeline = gst::parse::launch(&line).unwrap();
        let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
        let sink = pipeline.by_name("sink").unwrap();
        let sink = sink.downcast::<gst_app::AppSink>().unwrap();
        sink.set_caps(Some(&caps.parse::<gst::Caps>().unwrap()));
        // It says nothing by itself of the metas that it keeps.
        let pad = sink.static_pad("sink").unwrap();
        pad.add_probe(gst::PadProbeType::QUERY_DOWNSTREAM, |_, info| {
            let query = info.query_mut().map(gst::QueryRef::view_mut);
            let Some(gst::QueryViewMut::Allocation(query)) = query else {
                return gst::PadProbeReturn::Ok;
            };
            query.add_allocation_meta::<gst_video::VideoMeta>(None);
            gst::PadProbeReturn::Handled
        });
        Self {
            src: pipeline.by_name("src").unwrap(),
            sink,
            pipeline,
        }
    }

    /// Takes anything.
    pub fn any(properties: &str) -> Self {
        Self::new(properties, "video/x-raw")
    }

    /// Like [`Rig::any`], over a fake QEMU's QMP socket.
    pub fn over(qmp: &std::path::Path, properties: &str) -> Self {
        Self::any(&format!("qmp-socket={} {properties}", qmp.display()))
    }

    pub fn play(&self) {
        let played = self.pipeline.set_state(gst::State::Playing);
        assert!(played.is_ok(), "{}", self.error());
    }

    /// To READY, and everything is forgotten that was said before.
    pub fn ready(&self) {
        self.pipeline.set_state(gst::State::Ready).unwrap();
        let bus = self.pipeline.bus().unwrap();
        bus.set_flushing(true);
        bus.set_flushing(false);
    }

    /// The next frame, or the error that came instead.
    pub fn try_next(&self) -> Result<Frame, String> {
        match self.sink.try_pull_sample(limit()) {
            Some(sample) => Ok(Frame {
                buffer: sample.buffer_owned().unwrap(),
                info: gst_video::VideoInfo::from_caps(sample.caps().unwrap()).unwrap(),
            }),
            None => Err(self.error()),
        }
    }

    pub fn next(&self) -> Frame {
        self.try_next().expect("a frame")
    }

    /// The error that is on the bus, or comes.
    pub fn error(&self) -> String {
        let bus = self.pipeline.bus().unwrap();
        let message = bus.timed_pop_filtered(limit(), &[gst::MessageType::Error]);
        match message.expect("an error").view() {
            // What the element says is beside GStreamer's own words.
            gst::MessageView::Error(error) => error.debug().unwrap_or_default().to_string(),
            _ => unreachable!("only errors were asked for"),
        }
    }

    /// Waits for an element message that says this state.
    pub fn state(&self, wanted: &str) {
        let bus = self.pipeline.bus().unwrap();
        loop {
            let kinds = [gst::MessageType::Element, gst::MessageType::Error];
            let message = bus.timed_pop_filtered(limit(), &kinds).expect("a message");
            assert_ne!(message.type_(), gst::MessageType::Error, "{message:?}");
            let structure = message.structure().unwrap();
            assert_eq!(structure.name(), "qemu-display");
            if structure.get::<&str>("state") == Ok(wanted) {
                break;
            }
        }
    }

    pub fn stat(&self, field: &str) -> u64 {
        let stats = self.src.property::<gst::Structure>("stats");
        stats.get::<u64>(field).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.pipeline.set_state(gst::State::Null).unwrap();
    }
}

impl Frame {
    /// The pixels without padding.
    pub fn pixels(&self) -> Vec<u8> {
        let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&self.buffer, &self.info);
        let frame = frame.unwrap();
        let stride = gst_video::VideoFrameExt::plane_stride(&frame)[0] as usize;
        let row = self.info.width() as usize * self.info.format_info().pixel_stride()[0] as usize;
        let data = frame.plane_data(0).unwrap();
        let rows = (0..self.info.height() as usize).map(|y| &data[y * stride..y * stride + row]);
        rows.collect::<Vec<_>>().concat()
    }

    /// The damage, or none where everything may have changed.
    pub fn damage(&self) -> Option<Vec<Vec<i32>>> {
        let meta = gst::meta::CustomMeta::from_buffer(&self.buffer, DAMAGE_META).ok()?;
        let rects = meta.structure().get::<gst::Array>("rects").unwrap();
        let numbers = |rect: &gst::glib::SendValue| {
            let rect = rect.get::<gst::Array>().unwrap();
            rect.iter().map(|number| number.get().unwrap()).collect()
        };
        Some(rects.iter().map(numbers).collect())
    }
}
