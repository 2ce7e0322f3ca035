// SPDX-License-Identifier: MIT OR Apache-2.0

//! scanoutsrc against hosts that behave as a test tells them.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Source, host, init, push};
use gst::prelude::*;
use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage, ScanoutResp};
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{DELTA, Greets, KEYFRAME, LONG, Peer, Seen, Then, hello};

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
        let (code, text) = (ErrorCode::INVALID_MESSAGE, "what is that".to_owned());
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
    assert!(error.contains("what is that"), "{error}");
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

/// A host that answers ENABLE_SCANOUT and SUBSCRIBE with yes or no.
fn switching_host(enables: bool, subscribes: bool) -> Peer {
    Peer::new(move |link, envelope| {
        match envelope.message {
            Message::EnableScanout(enable) => link.send(encode::scanout_resp(
                envelope.session_id,
                &ScanoutResp {
                    scanout_id: enable.scanout_id,
                    success: enables,
                    connector: "Virtual-2".to_owned(),
                },
            )),
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(scanout_id, subscribes));
            }
            _ => {}
        }
        Then::GoOn
    })
}

/// The messages of a connection that has ended.
fn messages(peer: &Peer) -> Vec<Message> {
    let mut messages = Vec::new();
    peer.wait_for(|seen| match seen {
        Seen::Message(envelope) => {
            messages.push(envelope.message);
            None
        }
        Seen::Closed => Some(()),
        Seen::Connected => None,
    });
    messages
}

#[test]
fn a_screen_that_is_not_switched_on_is_not_subscribed_to() {
    let peer = switching_host(false, true);
    let properties = "scanout-id=1 enable=true reconnect-timeout=0";
    let error = Source::new(peer.port(), properties).error();
    assert!(error.contains("does not switch on scanout 1"), "{error}");
    let messages = messages(&peer);
    assert!(
        matches!(messages[..], [Message::EnableScanout(_)]),
        "{messages:?}"
    );
}

#[test]
fn a_screen_that_nobody_can_watch_is_not_left_on() {
    let peer = switching_host(true, false);
    let error = Source::new(peer.port(), "scanout-id=1 enable=true").error();
    assert!(error.contains("does not offer scanout 1"), "{error}");
    let messages = messages(&peer);
    assert!(
        matches!(
            messages[..],
            [
                Message::EnableScanout(_),
                Message::Subscribe { .. },
                Message::DisableScanout { scanout_id: 1 }
            ]
        ),
        "{messages:?}"
    );
}

/// What a host sees that answers ENABLE_SCANOUT if told so, and SUBSCRIBE never, when the element
/// goes to NULL while it waits for that.
fn stopped_while_waiting(enables: bool) -> Vec<Message> {
    let (tell, told) = std::sync::mpsc::channel();
    let peer = Peer::new(move |link, envelope| {
        match &envelope.message {
            Message::EnableScanout(enable) if enables => {
                link.send(encode::scanout_resp(
                    envelope.session_id,
                    &ScanoutResp {
                        scanout_id: enable.scanout_id,
                        success: true,
                        connector: "Virtual-2".to_owned(),
                    },
                ));
            }
            Message::EnableScanout(_) | Message::Subscribe { .. } => {
                let _ = tell.send(());
            }
            _ => {}
        }
        Then::GoOn
    });
    let source = Source::new(peer.port(), "scanout-id=1 enable=true timeout=0");
    told.recv_timeout(LONG).expect("a request");
    drop(source);
    messages(&peer)
}

#[test]
fn a_screen_is_switched_off_by_who_stops_before_it_is_on() {
    let messages = stopped_while_waiting(false);
    assert!(
        matches!(
            messages[..],
            [
                Message::EnableScanout(_),
                Message::DisableScanout { scanout_id: 1 }
            ]
        ),
        "{messages:?}"
    );
}

#[test]
fn a_screen_is_switched_off_by_who_stops_before_it_is_subscribed_to() {
    // On the way to NULL waits are cancelled twice, and it may say its last word in between.
    for _ in 0..30 {
        let messages = stopped_while_waiting(true);
        assert!(
            matches!(
                messages[..],
                [
                    Message::EnableScanout(_),
                    Message::Subscribe { .. },
                    Message::DisableScanout { scanout_id: 1 }
                ]
            ),
            "{messages:?}"
        );
    }
}

#[test]
fn a_screen_is_switched_off_where_the_host_does_not_say_in_time_that_it_is_on() {
    let peer = Peer::new(|_, _| Then::GoOn);
    let error = Source::new(peer.port(), "scanout-id=1 enable=true timeout=200").error();
    assert!(error.contains("does not answer"), "{error}");
    let messages = messages(&peer);
    assert!(
        matches!(
            messages[..],
            [
                Message::EnableScanout(_),
                Message::DisableScanout { scanout_id: 1 }
            ]
        ),
        "{messages:?}"
    );
}

fn force_key_unit() -> gst::Event {
    let force = gst::Structure::builder("GstForceKeyUnit").build();
    gst::event::CustomUpstream::new(force)
}

#[test]
fn a_request_for_a_keyframe_reaches_a_host_that_makes_them() {
    let peer = obliging_host();
    let mut source = Source::new(peer.port(), "scanout-id=1");
    source.pull();
    assert!(source.harness.push_upstream_event(force_key_unit()));
    assert!(!source.pull().flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert_eq!(source.stat("keyframes"), 2);
}

/// A host that pushes a keyframe to who subscribes, and for each that is asked for.
fn obliging_host() -> Peer {
    let greets = Greets::With(hello(Capabilities::KEYFRAME_REQ));
    Peer::greeting(greets, |link, envelope| {
        match envelope.message {
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(scanout_id, true));
                push(link, &[true]);
            }
            Message::KeyframeReq => push(link, &[true]),
            _ => {}
        }
        Then::GoOn
    })
}

#[test]
fn a_pause_that_is_over_at_once_does_not_end_the_stream() {
    let peer = obliging_host();
    let mut source = Source::new(peer.port(), "scanout-id=1");
    source.pull();
    let element = source.element();
    for _ in 0..200 {
        element.set_state(gst::State::Paused).unwrap();
        element.set_state(gst::State::Playing).unwrap();
        assert!(source.harness.push_upstream_event(force_key_unit()));
        source.pull();
    }
    assert_eq!((source.stat("reconnects"), source.stat("errors")), (0, 0));
}

#[test]
fn no_access_unit_is_taken_in_a_pause() {
    let peer = obliging_host();
    let mut source = Source::new(peer.port(), "scanout-id=1");
    source.pull();
    let element = source.element();
    // Nobody tells when the thread waits for the next one.
    std::thread::sleep(Duration::from_millis(50));
    element.set_state(gst::State::Paused).unwrap();
    assert!(source.harness.push_upstream_event(force_key_unit()));
    let errors = [gst::MessageType::Error];
    let while_paused = gst::ClockTime::from_mseconds(200);
    let error = source.bus.timed_pop_filtered(while_paused, &errors);
    assert!(error.is_none(), "{error:?}");
    // Were it taken, newer base classes would throw it away, and what is decoded next would lack it.
    assert_eq!(source.stat("frames"), 1);
    element.set_state(gst::State::Playing).unwrap();
    source.pull();
    assert_eq!(source.stat("frames"), 2);
}

#[test]
fn a_stream_that_begins_with_deltas_is_asked_for_a_keyframe_once() {
    let greets = Greets::With(hello(Capabilities::KEYFRAME_REQ));
    let peer = Peer::greeting(greets, |link, envelope| {
        match envelope.message {
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(scanout_id, true));
                push(link, &[false, false, false]);
            }
            Message::KeyframeReq => push(link, &[false, true]),
            _ => {}
        }
        Then::GoOn
    });
    let mut source = Source::new(peer.port(), "scanout-id=1");
    let buffer = source.pull();
    assert!(!buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert_eq!((source.stat("dropped"), source.stat("keyframes")), (4, 1));
}

#[test]
fn a_legacy_host_is_not_asked_for_keyframes() {
    let peer = host(&[false, true]);
    let mut source = Source::new(peer.port(), "scanout-id=1");
    source.pull();
    assert!(!source.harness.push_upstream_event(force_key_unit()));
    source.element().set_property("bitrate", 1_000_000);
    // Whatever was asked for before the bitrate has come by then.
    peer.wait_for(|seen| match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::KeyframeReq => panic!("asked for a keyframe"),
            Message::ConfigReq(_) => Some(()),
            _ => None,
        },
        _ => None,
    });
}

/// Warnings of the element whose text contains `part`, from now on.
fn warnings(part: &'static str) -> impl Fn() -> usize {
    init();
    gst::log::set_threshold_for_name("scanoutsrc", gst::DebugLevel::Warning);
    let count = Arc::new(AtomicUsize::new(0));
    gst::log::add_log_function({
        let count = count.clone();
        move |category, level, _, _, _, _, message| {
            let text = message.get().unwrap_or_default();
            if category.name() == "scanoutsrc"
                && level == gst::DebugLevel::Warning
                && text.contains(part)
            {
                count.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    move || count.load(Ordering::SeqCst)
}

#[test]
fn a_keyframe_that_says_nothing_of_the_stream_is_dropped_with_a_warning() {
    let seen = warnings("with a sequence parameter set that cannot be read");
    let mut broken = KEYFRAME.to_vec();
    // Of the parameter set only the profile and half an id are left.
    broken.drain(9..31);
    let peer = Peer::new(move |link, envelope| {
        if let Message::Subscribe { scanout_id } = envelope.message {
            link.send(encode::subscribe_resp(scanout_id, true));
            link.respond(1, 0, true, &broken);
            link.respond(1, 0, false, DELTA);
            link.respond(1, 0, true, &broken);
            push(link, &[true, false]);
            link.respond(1, 0, true, &broken);
            push(link, &[false, true]);
        }
        Then::GoOn
    });
    let mut source = Source::new(peer.port(), "scanout-id=1");
    let flags: Vec<_> = (0..3)
        .map(|_| {
            let flags = source.pull().flags();
            (
                flags.contains(gst::BufferFlags::DISCONT),
                flags.contains(gst::BufferFlags::DELTA_UNIT),
            )
        })
        .collect();
    assert_eq!(flags, [(true, false), (false, true), (true, false)]);
    assert_eq!(source.stat("dropped"), 5);
    // One for each interruption, not for each keyframe.
    assert_eq!(seen(), 2);
}

#[test]
fn a_keyframe_without_a_parameter_set_is_no_beginning() {
    let seen = warnings("with no sequence parameter set");
    let peer = Peer::new(|link, envelope| {
        if let Message::Subscribe { scanout_id } = envelope.message {
            link.send(encode::subscribe_resp(scanout_id, true));
            // Only a slice.
            let slice = &KEYFRAME[KEYFRAME.len() - 8..];
            link.respond(1, 0, true, slice);
            push(link, &[true]);
            link.respond(1, 0, true, slice);
        }
        Then::GoOn
    });
    let mut source = Source::new(peer.port(), "scanout-id=1");
    assert_eq!(&*source.pull().map_readable().unwrap(), KEYFRAME);
    // The decoder has one by now.
    assert_eq!(source.pull().size(), 8);
    assert_eq!((source.stat("dropped"), seen()), (1, 1));
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
