// SPDX-License-Identifier: MIT OR Apache-2.0

//! Starting, stopping and reconnecting again and again; alone in its process, so that its figures are
//! its own.

use std::net::{TcpListener, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};

use gst::prelude::*;
use gst_check::Harness;
use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage};
use helix_protocol::{Message, encode};
use nix::sys::socket::{Backlog, listen};
use zerocopy_test_support::peer::{Greets, Peer, Seen, Then, hello};
use zerocopy_test_support::process::{Usage, without_caches};

const LONG: gst::ClockTime = gst::ClockTime::from_seconds(20);

/// One test at a time: the figures are those of the process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    without_caches();
    gst::init().unwrap();
    gstvsock::plugin_register_static().unwrap();
    alone
}

/// Runs `cycle` so many times, and looks that nothing stays of it.
fn leaves_nothing(count: usize, mut cycle: impl FnMut()) {
    // The first ones start GStreamer's own pools of threads.
    for _ in 0..50 {
        cycle();
    }
    let before = Usage::now();
    for _ in 0..count {
        cycle();
    }
    assert_eq!(Usage::now().leak_since(&before), None);
}

/// A pipeline of three pictures with a host on this port, from its start until `reached`, and to NULL.
fn start_and_stop(port: u32, properties: &str, reached: impl FnOnce(&gst::Bus)) {
    let pipeline = gst::parse::launch(&format!(
        "videotestsrc num-buffers=3 ! video/x-raw,format=NV12,width=64,height=48 ! \
         vsockenc tcp-host=127.0.0.1 tcp-port={port} {properties} ! fakesink"
    ))
    .unwrap();
    let bus = pipeline.bus().unwrap();
    // Fails where the host is an error by then.
    let _ = pipeline.set_state(gst::State::Playing);
    reached(&bus);
    pipeline.set_state(gst::State::Null).unwrap();
    bus.set_flushing(true);
}

/// Waits for a message of this type.
fn wait_for(bus: &gst::Bus, wanted: gst::MessageType) {
    let types = [wanted, gst::MessageType::Error];
    let message = bus.timed_pop_filtered(LONG, &types).unwrap();
    assert_eq!(message.type_(), wanted, "{message:?}");
}

/// Waits until the element says this of its connection.
fn wait_for_state(bus: &gst::Bus, state: &str) {
    loop {
        let types = [gst::MessageType::Element, gst::MessageType::Error];
        let message = bus.timed_pop_filtered(LONG, &types).unwrap();
        let structure = message.structure().unwrap();
        if structure.get::<&str>("state") == Ok(state) {
            return;
        }
        assert_ne!(message.type_(), gst::MessageType::Error, "{message:?}");
    }
}

fn wait_for_end(peer: &Peer) {
    peer.wait_for(|seen| matches!(seen, Seen::Closed).then_some(()));
}

#[test]
fn starting_and_stopping_leaves_no_descriptor_no_thread_and_no_memory() {
    let _alone = alone();
    let peer = Peer::answering();
    leaves_nothing(1000, || {
        start_and_stop(peer.port(), "", |bus| wait_for(bus, gst::MessageType::Eos));
        wait_for_end(&peer);
    });
}

#[test]
fn stopping_while_connecting_leaves_nothing() {
    let _alone = alone();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    // The only place; whoever comes now gets no answer.
    let address = listener.local_addr().unwrap();
    let _first = TcpStream::connect(address).unwrap();
    leaves_nothing(200, || {
        start_and_stop(address.port().into(), "timeout=0", |_| {});
    });
}

#[test]
fn stopping_while_the_host_is_greeted_leaves_nothing() {
    let _alone = alone();
    let peer = Peer::greeting(Greets::Script, |_, _| Then::GoOn);
    leaves_nothing(200, || {
        start_and_stop(peer.port(), "timeout=0", |_| {
            peer.wait_for(|seen| matches!(seen, Seen::Message(_)).then_some(()));
        });
        wait_for_end(&peer);
    });
}

#[test]
fn stopping_with_frames_in_flight_leaves_nothing() {
    let _alone = alone();
    let greets = Greets::With(hello(Capabilities::REQUEST_IDS));
    let peer = Peer::greeting(greets, |link, envelope| {
        link.pong(envelope);
        Then::GoOn
    });
    leaves_nothing(200, || {
        start_and_stop(peer.port(), "timeout=0", |_| {
            peer.wait_for(|seen| match seen {
                Seen::Message(it) => matches!(it.message, Message::FrameRequest(..)).then_some(()),
                _ => None,
            });
        });
        wait_for_end(&peer);
    });
}

#[test]
fn stopping_while_a_host_is_called_again_leaves_nothing() {
    let _alone = alone();
    let peer = Peer::greeting(Greets::Script, |link, envelope| {
        if matches!(envelope.message, Message::Hello(_)) {
            let (code, text) = (ErrorCode::INTERNAL, "full".to_owned());
            let tag = None;
            link.send(encode::error(1, &ErrorMessage { code, text, tag }));
        }
        Then::GoOn
    });
    leaves_nothing(200, || {
        start_and_stop(peer.port(), "timeout=0", |bus| {
            wait_for_state(bus, "reconnecting");
        });
        wait_for_end(&peer);
        // Those that called again.
        peer.seen();
    });
}

#[test]
fn stopping_after_an_error_leaves_nothing() {
    let _alone = alone();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Nobody else gets the port for as long as this has it, and nobody listens.
    let _taken = TcpStream::connect(("127.0.0.1", port)).unwrap();
    drop(listener);
    leaves_nothing(200, || {
        start_and_stop(port.into(), "timeout=0", |bus| {
            wait_for(bus, gst::MessageType::Error);
        });
    });
}

#[test]
fn finding_a_lost_host_again_leaves_nothing() {
    let _alone = alone();
    let greets = Greets::With(hello(Capabilities::REQUEST_IDS));
    let peer = Peer::greeting(greets, |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.answer(request);
            return Then::CloseAfterSending;
        }
        link.pong(envelope);
        Then::GoOn
    });
    let element = gst::ElementFactory::make("vsockenc")
        // A name, which a thread of its own looks up.
        .property("tcp-host", "localhost")
        .property("tcp-port", peer.port())
        .property("max-in-flight", 1u32)
        .build()
        .unwrap();
    let bus = gst::Bus::new();
    // One for each picture that is dropped, and the bus's memory never shrinks.
    bus.set_sync_handler(|_, message| match message.type_() {
        gst::MessageType::Qos => gst::BusSyncReply::Drop,
        _ => gst::BusSyncReply::Pass,
    });
    element.set_bus(Some(&bus));
    let mut harness = Harness::with_element(&element, Some("sink"), Some("src"));
    harness.set_src_caps_str("video/x-raw,format=BGRx,width=2,height=2,framerate=60/1");
    let mut pts = gst::ClockTime::ZERO;
    wait_for_state(&bus, "connected");
    leaves_nothing(200, || {
        // The message comes before the element takes pictures.
        while harness.try_pull().is_none() {
            let mut buffer = gst::Buffer::from_slice([0; 16]);
            buffer.get_mut().unwrap().set_pts(pts);
            pts += gst::ClockTime::from_mseconds(16);
            harness.push(buffer).unwrap();
            std::thread::yield_now();
        }
        // Counted when nothing of the connection before is left on either side.
        wait_for_state(&bus, "connected");
        peer.seen();
    });
    bus.set_flushing(true);
}
