// SPDX-License-Identifier: MIT OR Apache-2.0

//! vsockenc against hosts that behave as a test tells them. What a real encoder makes of its
//! requests is tested by ci/demo and tests/peers.

use std::sync::Once;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst_check::Harness;
use gst_video::prelude::*;
use helix_protocol::Message;
use helix_protocol::message::{Config, FrameRequest};
use zerocopy_test_support::peer::{LONG, Seen};

mod downstream;
mod encoder_class;
mod frames;
mod loss;
mod negotiation;
mod stats;

const FRAME: gst::ClockTime = gst::ClockTime::from_nseconds(16_666_667);

fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstvsock::plugin_register_static().unwrap();
    });
}

struct Encoder {
    harness: Harness,
    bus: gst::Bus,
    frames: u64,
    /// States of the `helix-connection` messages seen so far.
    states: Vec<String>,
}

impl Drop for Encoder {
    fn drop(&mut self) {
        // Messages that nobody has read hold the element, which holds the bus.
        self.bus.set_flushing(true);
    }
}

impl Encoder {
    fn new(port: u32, properties: &str) -> Self {
        Self::with(&format!("tcp-host=127.0.0.1 tcp-port={port} {properties}"))
    }

    fn with(properties: &str) -> Self {
        init();
        let bin =
            gst::parse::bin_from_description(&format!("vsockenc {properties}"), true).unwrap();
        let bus = gst::Bus::new();
        // Before it starts: the first message comes then.
        bin.set_bus(Some(&bus));
        let mut harness = Harness::with_element(&bin, Some("sink"), Some("src"));
        harness.set_src_caps_str("video/x-raw,format=BGRx,width=64,height=48,framerate=60/1");
        Self {
            harness,
            bus,
            frames: 0,
            states: Vec::new(),
        }
    }

    fn element(&self) -> gst::Element {
        let bin = self.harness.element().and_downcast::<gst::Bin>().unwrap();
        bin.iterate_elements().next().unwrap().unwrap()
    }

    fn buffer(&mut self, size: usize, value: u8) -> gst::Buffer {
        let mut buffer = gst::Buffer::from_mut_slice(vec![value; size]);
        let writable = buffer.get_mut().unwrap();
        writable.set_pts(FRAME * self.frames);
        writable.set_duration(FRAME);
        self.frames += 1;
        buffer
    }

    fn push(&mut self) -> Result<gst::FlowSuccess, gst::FlowError> {
        let value = self.frames as u8;
        let buffer = self.buffer(64 * 48 * 4, value);
        self.harness.push(buffer)
    }

    fn flush(&mut self) {
        let mut push = |event| assert!(self.harness.push_event(event));
        push(gst::event::FlushStart::new());
        push(gst::event::FlushStop::new(true));
        let mut segment = gst::FormattedSegment::<gst::ClockTime>::new();
        segment.set_start(gst::ClockTime::ZERO);
        push(gst::event::Segment::new(&segment));
    }

    /// The next buffer out; fails the test where none comes.
    fn pull(&mut self) -> gst::Buffer {
        self.harness.pull().expect("an encoded frame")
    }

    /// The next message of one of the two types; keeps the connection's states.
    fn message(&mut self, wanted: gst::MessageType, wait: Duration) -> Option<gst::Message> {
        loop {
            let types = [wanted, gst::MessageType::Element];
            // The bindings' timed_pop_filtered() does not look at the queue without a timeout.
            let message = if wait.is_zero() {
                self.bus.pop_filtered(&types)?
            } else {
                self.bus
                    .timed_pop_filtered(gst::ClockTime::try_from(wait).unwrap(), &types)?
            };
            if message.type_() == wanted {
                return Some(message);
            }
            self.states.extend(
                message
                    .structure()
                    .and_then(|s| s.get::<String>("state").ok()),
            );
        }
    }

    /// The text of the error on the bus.
    fn error(&mut self) -> String {
        let message = self
            .message(gst::MessageType::Error, LONG)
            .expect("an error on the bus");
        let gst::MessageView::Error(error) = message.view() else {
            unreachable!()
        };
        format!("{} {:?}", error.error(), error.debug())
    }

    fn connection_states(&mut self) -> &[String] {
        self.message(gst::MessageType::Error, Duration::ZERO);
        &self.states
    }

    fn stats(&self) -> gst::Structure {
        self.element().property("stats")
    }

    fn stat(&self, name: &str) -> u64 {
        self.stats().get(name).unwrap()
    }

    /// Waits until the answers to all pictures have been read; nobody is told of that.
    fn wait_for_answers(&self) {
        let deadline = Instant::now() + LONG;
        while self.stat("in-flight") > 0 {
            assert!(Instant::now() < deadline, "the answers are not read");
            std::thread::yield_now();
        }
    }

    /// Blocks what is downstream, and says when something waits there.
    fn block(&self) -> (gst::Pad, gst::PadProbeId, Receiver<()>) {
        let pad = self.element().static_pad("src").unwrap();
        let (tell, blocked) = channel();
        let types = gst::PadProbeType::BLOCK | gst::PadProbeType::BUFFER;
        let id = pad.add_probe(types, move |_, _| {
            // The test may have heard enough.
            let _ = tell.send(());
            gst::PadProbeReturn::Ok
        });
        (pad, id.unwrap(), blocked)
    }
}

fn request(seen: Seen) -> Option<FrameRequest> {
    match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::FrameRequest(request, _) => Some(request),
            _ => None,
        },
        _ => None,
    }
}

fn config(seen: Seen) -> Option<Config> {
    match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::ConfigReq(config) => Some(config),
            _ => None,
        },
        _ => None,
    }
}
