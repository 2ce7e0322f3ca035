// SPDX-License-Identifier: MIT OR Apache-2.0

//! The element and hosts for it, shared by the tests.

#![allow(dead_code, reason = "each test uses its part")]

use std::sync::Once;

use gst::prelude::*;
use gst_check::Harness;
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{DELTA, KEYFRAME, LONG, Link, Peer, Then};

pub fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstscanout::plugin_register_static().unwrap();
    });
}

/// The element, its output and its bus.
pub struct Source {
    pub harness: Harness,
    pub bus: gst::Bus,
}

impl Drop for Source {
    fn drop(&mut self) {
        // Messages that nobody has read hold the element, which holds the bus.
        self.bus.set_flushing(true);
    }
}

impl Source {
    pub fn new(port: u32, properties: &str) -> Self {
        let mut source = Self::unstarted(port, properties);
        source.harness.play();
        source
    }

    /// One that does not play yet.
    pub fn unstarted(port: u32, properties: &str) -> Self {
        init();
        let launch = format!("scanoutsrc tcp-host=127.0.0.1 tcp-port={port} {properties}");
        let bin = gst::parse::bin_from_description(&launch, true).unwrap();
        let bus = gst::Bus::new();
        bin.set_bus(Some(&bus));
        let mut harness = Harness::with_element(&bin, None, Some("src"));
        harness.use_systemclock();
        Self { harness, bus }
    }

    pub fn element(&self) -> gst::Element {
        let bin = self.harness.element().and_downcast::<gst::Bin>().unwrap();
        bin.iterate_elements().next().unwrap().unwrap()
    }

    pub fn pull(&mut self) -> gst::Buffer {
        self.harness.pull().expect("a pushed frame")
    }

    pub fn error(&self) -> String {
        let message = self
            .bus
            .timed_pop_filtered(
                gst::ClockTime::try_from(LONG).unwrap(),
                &[gst::MessageType::Error],
            )
            .expect("an error on the bus");
        let gst::MessageView::Error(error) = message.view() else {
            unreachable!()
        };
        error.error().to_string()
    }

    pub fn stat(&self, name: &str) -> u64 {
        self.element()
            .property::<gst::Structure>("stats")
            .get(name)
            .unwrap()
    }
}

/// Pushes `frames` of (is a keyframe) to whoever subscribes to scanout 1.
pub fn push(link: &mut Link, frames: &[bool]) {
    for (number, &keyframe) in frames.iter().enumerate() {
        // Deployed hosts make their timestamps up like this (quirk 7).
        let pts = number as i64 * 16_666_667;
        link.respond(1, pts, keyframe, if keyframe { KEYFRAME } else { DELTA });
    }
}

/// A host whose scanout 1 has the given frames.
pub fn host(frames: &'static [bool]) -> Peer {
    Peer::new(move |link, envelope| {
        if let Message::Subscribe { scanout_id } = envelope.message {
            assert_eq!(u32::from(envelope.session_id), scanout_id);
            link.send(encode::subscribe_resp(scanout_id, scanout_id == 1));
            push(link, frames);
        }
        link.pong(envelope);
        Then::GoOn
    })
}
