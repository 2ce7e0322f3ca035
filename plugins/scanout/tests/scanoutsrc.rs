// SPDX-License-Identifier: MIT OR Apache-2.0

//! scanoutsrc against hosts that behave as a test tells them.

use std::sync::Once;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst_check::Harness;
use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage, ScanoutResp};
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{
    DELTA, Greets, Hello, KEYFRAME, LONG, Link, Peer, Seen, Then, hello,
};

fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstscanout::plugin_register_static().unwrap();
    });
}

struct Source {
    harness: Harness,
    bus: gst::Bus,
}

impl Drop for Source {
    fn drop(&mut self) {
        // Messages that nobody has read hold the element, which holds the bus.
        self.bus.set_flushing(true);
    }
}

impl Source {
    fn new(port: u32, properties: &str) -> Self {
        init();
        let launch = format!("scanoutsrc tcp-host=127.0.0.1 tcp-port={port} {properties}");
        let bin = gst::parse::bin_from_description(&launch, true).unwrap();
        let bus = gst::Bus::new();
        bin.set_bus(Some(&bus));
        let mut harness = Harness::with_element(&bin, None, Some("src"));
        harness.use_systemclock();
        harness.play();
        Self { harness, bus }
    }

    fn element(&self) -> gst::Element {
        let bin = self.harness.element().and_downcast::<gst::Bin>().unwrap();
        bin.iterate_elements().next().unwrap().unwrap()
    }

    fn pull(&mut self) -> gst::Buffer {
        self.harness.pull().expect("a pushed frame")
    }

    fn error(&self) -> String {
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

    fn stat(&self, name: &str) -> u64 {
        self.element()
            .property::<gst::Structure>("stats")
            .get(name)
            .unwrap()
    }
}

/// Pushes `frames` of (is a keyframe) to whoever subscribes to scanout 1.
fn push(link: &mut Link, frames: &[bool]) {
    for (number, &keyframe) in frames.iter().enumerate() {
        // Deployed hosts make their timestamps up like this (quirk 7).
        let pts = number as i64 * 16_666_667;
        link.respond(1, pts, keyframe, if keyframe { KEYFRAME } else { DELTA });
    }
}

/// A host whose scanout 1 has the given frames.
fn host(frames: &'static [bool]) -> Peer {
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

#[test]
fn the_stream_begins_with_a_keyframe_and_is_stamped_with_arrival() {
    let peer = host(&[false, false, true, false, false]);
    let mut source = Source::new(peer.port(), "scanout-id=1");
    let mut last = None;
    for number in 0..3 {
        let buffer = source.pull();
        let keyframe = number == 0;
        assert_eq!(
            &*buffer.map_readable().unwrap(),
            if keyframe { KEYFRAME } else { DELTA }
        );
        assert_eq!(
            buffer.flags().contains(gst::BufferFlags::DELTA_UNIT),
            !keyframe
        );
        assert_eq!(buffer.flags().contains(gst::BufferFlags::DISCONT), keyframe);
        assert!(buffer.pts() > last);
        assert_eq!(buffer.dts(), buffer.pts());
        last = buffer.pts();
        let host = buffer.meta::<gst::ReferenceTimestampMeta>().unwrap();
        assert_eq!(host.reference().to_string(), "timestamp/x-helix-host");
        assert_eq!(host.timestamp().nseconds(), (number + 2) * 16_666_667);
    }
    assert_eq!(
        (
            source.stat("frames"),
            source.stat("keyframes"),
            source.stat("dropped")
        ),
        (3, 1, 2)
    );
    let caps = source
        .harness
        .sinkpad()
        .unwrap()
        .current_caps()
        .unwrap()
        .to_string();
    for field in [
        "width=(int)1280",
        "height=(int)720",
        "framerate=(fraction)30/1",
        "profile=(string)constrained-baseline",
        "alignment=(string)au",
    ] {
        assert!(caps.contains(field), "{field} is not in {caps}");
    }
}

#[test]
fn a_scanout_that_is_not_there_is_an_error_that_names_it() {
    let peer = host(&[]);
    let source = Source::new(peer.port(), "scanout-id=7");
    let error = source.error();
    assert!(error.contains("does not offer scanout 7"), "{error}");
}

#[test]
fn an_error_message_instead_of_an_answer_is_passed_on() {
    let peer = Peer::new(|link, _| {
        let (code, text) = (ErrorCode::INTERNAL, "too many clients".to_owned());
        link.send(encode::error(
            1,
            &ErrorMessage {
                code,
                text,
                tag: None,
            },
        ));
        Then::GoOn
    });
    let error = Source::new(peer.port(), "scanout-id=1").error();
    assert!(error.contains("too many clients"), "{error}");
}

#[test]
fn a_host_that_does_not_answer_is_an_error_within_the_timeout() {
    let peer = Peer::new(|_, _| Then::GoOn);
    let error = Source::new(peer.port(), "scanout-id=1 timeout=200").error();
    assert!(error.contains("does not answer"), "{error}");
}

#[test]
fn a_screen_is_enabled_before_and_disabled_after() {
    let peer = Peer::new(|link, envelope| {
        match envelope.message {
            Message::EnableScanout(enable) => link.send(encode::scanout_resp(
                envelope.session_id,
                &ScanoutResp {
                    scanout_id: enable.scanout_id,
                    success: true,
                    connector: "Virtual-2".to_owned(),
                },
            )),
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(scanout_id, true));
                push(link, &[true]);
            }
            _ => {}
        }
        Then::GoOn
    });
    let mut source = Source::new(
        peer.port(),
        "scanout-id=1 enable=true width=1280 height=720 refresh-rate=75",
    );
    source.pull();
    drop(source);
    let mut order = Vec::new();
    peer.wait_for(|seen| match seen {
        Seen::Message(envelope) => {
            order.push(match envelope.message {
                Message::EnableScanout(e) => {
                    format!(
                        "enable {} {}x{}@{}",
                        e.scanout_id, e.width, e.height, e.refresh_rate
                    )
                }
                Message::Subscribe { scanout_id } => format!("subscribe {scanout_id}"),
                Message::DisableScanout { scanout_id } => format!("disable {scanout_id}"),
                other => format!("{other:?}"),
            });
            None
        }
        Seen::Closed => Some(()),
        Seen::Connected => None,
    });
    assert_eq!(order, ["enable 1 1280x720@75", "subscribe 1", "disable 1"]);
}

#[test]
fn silence_is_no_error_while_the_host_answers_ping() {
    let peer = host(&[true]);
    let mut source = Source::new(peer.port(), "scanout-id=1 timeout=100");
    source.pull();
    // Each PING comes after another 100 ms of silence.
    for _ in 0..4 {
        peer.wait_for(|seen| match seen {
            Seen::Message(envelope) => matches!(envelope.message, Message::Ping).then_some(()),
            _ => None,
        });
    }
    assert!(
        source
            .bus
            .pop_filtered(&[gst::MessageType::Error])
            .is_none()
    );
    assert_eq!(source.stat("reconnects"), 0);
}

#[test]
fn a_dead_host_is_lost_within_the_timeout() {
    let peer = Peer::new(|link, envelope| {
        if let Message::Subscribe { scanout_id } = envelope.message {
            link.send(encode::subscribe_resp(scanout_id, true));
            push(link, &[true]);
        }
        Then::GoOn
    });
    let mut source = Source::new(peer.port(), "scanout-id=1 timeout=100 reconnect-timeout=0");
    source.pull();
    let error = source.error();
    assert!(error.contains("not even to a PING"), "{error}");
}

/// A host whose first connection ends badly after a keyframe and a delta.
fn fails_once(how: impl Fn(&mut Link) -> Then + Send + 'static) -> Peer {
    let mut connections = 0;
    Peer::new(move |link, envelope| {
        match envelope.message {
            Message::Subscribe { scanout_id } => {
                connections += 1;
                link.send(encode::subscribe_resp(scanout_id, true));
                push(link, &[true, false]);
            }
            // Asked for by the test, once it has both.
            Message::KeyframeReq if connections == 1 => return how(link),
            _ => {}
        }
        link.pong(envelope);
        Then::GoOn
    })
}

fn goes_on_with_a_keyframe(peer: &Peer, resyncs: u64) {
    let mut source = Source::new(peer.port(), "scanout-id=1");
    source.pull();
    source.pull();
    let force = gst::Structure::builder("GstForceKeyUnit").build();
    assert!(
        source
            .harness
            .push_upstream_event(gst::event::CustomUpstream::new(force))
    );
    let buffer = source.pull();
    assert!(buffer.flags().contains(gst::BufferFlags::DISCONT));
    assert!(!buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert!(source.pull().flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert_eq!(
        (source.stat("reconnects"), source.stat("resyncs")),
        (1, resyncs)
    );
    let states: Vec<String> =
        std::iter::from_fn(|| source.bus.pop_filtered(&[gst::MessageType::Element]))
            .filter_map(|message| message.structure()?.get("state").ok())
            .collect();
    assert_eq!(states, ["connected", "reconnecting", "connected"]);
}

#[test]
fn a_closed_connection_is_made_again() {
    goes_on_with_a_keyframe(&fails_once(|_| Then::Close), 0);
}

#[test]
fn a_stream_out_of_step_is_made_again() {
    // Part of a message, then the next one (quirk 8).
    let peer = fails_once(|link| {
        link.raw(&[0x48, 0x58, 0x46, 0x52, 2, 0, 1, 0, 48, 0, 0, 0])
            .unwrap();
        link.raw(&[0; 30]).unwrap();
        push(link, &[false, false, false]);
        Then::GoOn
    });
    goes_on_with_a_keyframe(&peer, 1);
}

#[test]
fn a_bitrate_is_asked_for_at_the_start_and_while_playing() {
    let peer = host(&[true]);
    let mut source = Source::new(peer.port(), "scanout-id=1 bitrate=3000000");
    source.pull();
    let bitrate = |seen| match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::ConfigReq(config) => Some(config.bitrate),
            _ => None,
        },
        _ => None,
    };
    assert_eq!(peer.wait_for(bitrate), 3_000_000);
    source.element().set_property("bitrate", 1_000_000);
    assert_eq!(peer.wait_for(bitrate), 1_000_000);
}

#[test]
fn a_state_change_ends_a_wait_at_once() {
    let peer = host(&[true]);
    let mut source = Source::new(peer.port(), "scanout-id=1 timeout=0");
    source.pull();
    let start = Instant::now();
    source
        .harness
        .element()
        .unwrap()
        .set_state(gst::State::Null)
        .unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_state_change_ends_a_call_to_a_lost_host_at_once() {
    let peer = host(&[true]);
    let mut source = Source::new(peer.port(), "scanout-id=1 reconnect-timeout=60000");
    source.pull();
    drop(peer);
    source
        .bus
        .iter_timed_filtered(
            gst::ClockTime::try_from(LONG).unwrap(),
            &[gst::MessageType::Element],
        )
        .find(|message| {
            message
                .structure()
                .is_some_and(|s| s.get::<&str>("state") == Ok("reconnecting"))
        })
        .expect("a message about the loss");
    let start = Instant::now();
    source
        .harness
        .element()
        .unwrap()
        .set_state(gst::State::Null)
        .unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn without_a_scanout_id_it_says_where_one_may_come_from() {
    init();
    // Read by nothing else in this process.
    let element = gst::ElementFactory::make("scanoutsrc").build().unwrap();
    let bus = gst::Bus::new();
    element.set_bus(Some(&bus));
    assert!(element.set_state(gst::State::Paused).is_err());
    let message = bus.pop_filtered(&[gst::MessageType::Error]).unwrap();
    let gst::MessageView::Error(error) = message.view() else {
        unreachable!()
    };
    let text = format!("{} {:?}", error.error(), error.debug());
    assert!(text.contains("HELIX_SCANOUT_ID"), "{text}");
    element.set_state(gst::State::Null).unwrap();
    bus.set_flushing(true);
}

#[test]
fn a_host_that_subscribes_and_fails_is_given_up_in_time() {
    let peer = Peer::new(|link, envelope| {
        if let Message::Subscribe { scanout_id } = envelope.message {
            link.send(encode::subscribe_resp(scanout_id, true));
            let text = "no such camera".to_owned();
            link.send(encode::error(
                1,
                &ErrorMessage {
                    code: ErrorCode::INTERNAL,
                    text,
                    tag: None,
                },
            ));
        }
        Then::GoOn
    });
    let source = Source::new(peer.port(), "scanout-id=1 reconnect-timeout=400");
    let error = source.error();
    assert!(
        error.contains("no such camera") && error.contains("400 ms"),
        "{error}"
    );
    // Pauses grow from 50 ms: 50, 100, 200 and the rest.
    let connections = peer
        .seen()
        .iter()
        .filter(|seen| matches!(seen, Seen::Connected))
        .count();
    assert!(connections <= 6, "{connections} connections");
}

#[test]
fn a_profile_that_downstream_does_not_take_is_named() {
    init();
    let peer = host(&[true]);
    let pipeline = gst::parse::launch(&format!(
        "scanoutsrc scanout-id=1 tcp-host=127.0.0.1 tcp-port={} ! video/x-h264,profile=high-4:4:4 ! \
         fakesink",
        peer.port()
    ))
    .unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let bus = pipeline.bus().unwrap();
    let wait = gst::ClockTime::try_from(LONG).unwrap();
    let message = bus
        .timed_pop_filtered(wait, &[gst::MessageType::Error])
        .unwrap();
    let gst::MessageView::Error(error) = message.view() else {
        unreachable!()
    };
    assert!(
        error.error().to_string().contains("downstream takes only"),
        "{error:?}"
    );
    pipeline.set_state(gst::State::Null).unwrap();
    bus.set_flushing(true);
}

#[test]
fn a_host_that_greets_nobody_is_an_error_within_the_timeout() {
    let peer = Peer::greeting(Greets::Script, |_, _| Then::GoOn);
    let error = Source::new(peer.port(), "scanout-id=1 timeout=200").error();
    assert!(error.contains("neither HELLO nor PING"), "{error}");
}

/// A host that lets the first `clients` in, pushes one frame to each and closes, and then wants
/// another token.
fn host_that_changes_its_token(clients: u32) -> Peer {
    let mut seen = 0;
    Peer::greeting(Greets::Script, move |link, envelope| {
        match &envelope.message {
            Message::Hello(hello) => {
                assert_eq!(hello.auth_token.as_ref().unwrap().0, b"s3cret");
                seen += 1;
                if seen > clients {
                    let (code, text) = (ErrorCode::INVALID_MESSAGE, "wrong token".to_owned());
                    let tag = None;
                    link.send(encode::error(0, &ErrorMessage { code, text, tag }));
                    return Then::CloseAfterSending;
                }
                link.hello_resp(&hello_resp());
            }
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(*scanout_id, true));
                push(link, &[true]);
                return Then::CloseAfterSending;
            }
            _ => {}
        }
        link.pong(envelope);
        Then::GoOn
    })
}

fn hello_resp() -> Hello {
    // A host that only pushes takes no requests.
    Hello {
        max_in_flight: 0,
        ..hello(Capabilities::KEYFRAME_REQ)
    }
}

#[test]
fn a_wrong_token_is_an_error_at_once_even_while_reconnecting() {
    for clients in [0, 1] {
        let peer = host_that_changes_its_token(clients);
        let mut source = Source::new(
            peer.port(),
            "scanout-id=1 auth-token=s3cret reconnect-timeout=3600000",
        );
        if clients > 0 {
            source.pull();
        }
        let error = source.error();
        for part in ["wrong token", "is auth-token the one"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains("s3cret"), "{error}");
    }
}
