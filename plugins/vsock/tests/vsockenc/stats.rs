// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the element says of itself: figures and messages.

use std::collections::BTreeSet;

use gst::prelude::*;
use helix_protocol::Message;
use helix_protocol::encode;
use helix_protocol::message::{ErrorCode, ErrorMessage};
use zerocopy_test_support::peer::{Peer, Then};

use super::*;

const COUNTERS: [&str; 13] = [
    "frames",
    "bytes-sent",
    "bytes-received",
    "dropped",
    "errors",
    "reconnects",
    "in-flight",
    "pixel-bytes",
    "resource-frames",
    "fd-frames",
    "reply-p50-us",
    "reply-p99-us",
    "unmatched",
];

#[test]
fn every_figure_is_there_before_the_first_start() {
    init();
    let element = gst::ElementFactory::make("vsockenc").build().unwrap();
    let stats: gst::Structure = element.property("stats");
    assert_eq!(stats.name(), "vsockenc-stats");
    for counter in COUNTERS {
        assert_eq!(stats.get::<u64>(counter), Ok(0), "{counter}");
    }
    assert_eq!(stats.get::<String>("transfer").unwrap(), "pixels");
    let names: BTreeSet<_> = stats.fields().map(ToString::to_string).collect();
    let known = COUNTERS.into_iter().chain(["transfer"]).map(str::to_owned);
    assert_eq!(names, known.collect());
}

#[test]
fn figures_stay_from_the_end_to_the_next_start() {
    // Refuses the second frame, says the third's reply twice and goes with the fourth.
    let mut frames = 0;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            frames += 1;
            match frames {
                2 => {
                    let (code, text, tag) = (ErrorCode::ENCODE_FAILED, String::new(), None);
                    link.send(encode::error(1, &ErrorMessage { code, text, tag }));
                }
                3 => {
                    link.answer(request);
                    link.answer(request);
                }
                4 => return Then::Close,
                _ => link.answer(request),
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
    while encoder.harness.buffers_received() < 4 {
        encoder.push().unwrap();
    }
    let before = encoder.stats();
    for counter in COUNTERS {
        let is_0 = ["in-flight", "resource-frames", "fd-frames"].contains(&counter);
        assert!(is_0 || before.get::<u64>(counter).unwrap() > 0, "{counter}");
    }
    let element = encoder.element();
    element.set_state(gst::State::Null).unwrap();
    let after = encoder.stats();
    for counter in COUNTERS {
        let (before, after): (u64, u64) =
            (before.get(counter).unwrap(), after.get(counter).unwrap());
        if counter == "in-flight" {
            assert_eq!(after, 0);
        } else {
            // The last bytes may have been on their way.
            assert!(after >= before, "{counter}: {after} after {before}");
        }
    }
    element.set_state(gst::State::Playing).unwrap();
    for counter in [
        "frames",
        "dropped",
        "errors",
        "reconnects",
        "pixel-bytes",
        "reply-p50-us",
    ] {
        assert_eq!(encoder.stat(counter), 0, "{counter}");
    }
}

/// The `helix-connection` messages up to one of this state.
fn messages(encoder: &Encoder, last: &str) -> Vec<gst::Structure> {
    let mut seen = Vec::new();
    loop {
        let message = encoder
            .bus
            .timed_pop_filtered(
                gst::ClockTime::try_from(LONG).unwrap(),
                &[gst::MessageType::Element],
            )
            .expect("a message");
        let structure = message.structure().unwrap().to_owned();
        assert_eq!(structure.name(), "helix-connection");
        let state = structure.get::<String>("state").unwrap();
        seen.push(structure);
        if state == last {
            return seen;
        }
    }
}

#[test]
fn messages_say_who_the_host_is_how_pictures_go_and_what_is_wrong() {
    let peer = Peer::answering();
    let port = peer.port();
    let mut encoder = Encoder::new(port, "reconnect-timeout=100");
    encoder.push().unwrap();
    encoder.pull();
    drop(peer);
    let messages = messages(&encoder, "lost");
    let states: Vec<String> = messages.iter().map(|it| it.get("state").unwrap()).collect();
    assert_eq!(states, ["connected", "reconnecting", "lost"]);
    for message in &messages {
        let field = |name| message.get::<String>(name).unwrap();
        assert_eq!(field("address"), format!("tcp:127.0.0.1:{port}"));
        let connected = field("state") == "connected";
        assert_eq!(field("transfer"), if connected { "pixels" } else { "" });
        assert_eq!(field("reason").is_empty(), connected, "{message}");
        assert_eq!(field("peer").is_empty(), !connected, "{message}");
    }
    let reason = messages[2].get::<String>("reason").unwrap();
    assert!(reason.contains("reconnect-timeout"), "{reason}");
}
