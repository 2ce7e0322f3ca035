// SPDX-License-Identifier: MIT OR Apache-2.0

//! scanoutsrc against hosts that vanish, fall out of step, or fail.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::{Source, host, push};
use gst::prelude::*;
use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage, ScanoutResp};
use helix_protocol::{Envelope, Message, encode};
use zerocopy_test_support::peer::{DELTA, Greets, Hello, LONG, Link, Peer, Seen, Then, hello};

#[test]
fn silence_is_no_error_while_the_host_answers_ping() {
    let peer = host(&[true]);
    // The peer must answer in time, on a busy machine too.
    let mut source = Source::new(peer.port(), "scanout-id=1 timeout=1000");
    source.pull();
    // Each PING comes after another second of silence.
    for _ in 0..2 {
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
fn a_host_is_asked_before_it_is_given_up_however_long_downstream_took() {
    let peer = host(&[true]);
    let mut source = Source::unstarted(peer.port(), "scanout-id=1 timeout=250");
    let pad = source.element().static_pad("src").unwrap();
    pad.add_probe(gst::PadProbeType::BUFFER, |_, _| {
        // Downstream blocks: that this takes several times `timeout` is what is tested.
        thread::sleep(Duration::from_millis(500));
        gst::PadProbeReturn::Ok
    });
    source.harness.play();
    source.pull();
    for _ in 0..2 {
        peer.wait_for(|seen| match seen {
            Seen::Message(envelope) => matches!(envelope.message, Message::Ping).then_some(()),
            _ => None,
        });
    }
    assert_eq!((source.stat("reconnects"), source.stat("errors")), (0, 0));
}

/// A host that turns away its first `clients` as one without a place, before or after HELLO.
fn full_for(clients: u32, greeted: bool) -> Peer {
    let mut seen = 0;
    let greets = if greeted {
        Greets::Legacy
    } else {
        Greets::Script
    };
    Peer::greeting(greets, move |link, envelope| {
        let first = match &envelope.message {
            Message::Hello(_) => true,
            Message::Subscribe { .. } => greeted,
            _ => false,
        };
        if first && seen < clients {
            seen += 1;
            let (code, text) = (ErrorCode::INTERNAL, "there are 64 clients".to_owned());
            let tag = None;
            link.send(encode::error(0, &ErrorMessage { code, text, tag }));
            return Then::CloseAfterSending;
        }
        if let Message::Subscribe { scanout_id } = envelope.message {
            link.send(encode::subscribe_resp(scanout_id, true));
            push(link, &[true]);
        }
        link.pong(envelope);
        Then::GoOn
    })
}

#[test]
fn a_host_without_a_place_is_called_again_at_the_first_connection_too() {
    for greeted in [false, true] {
        let peer = full_for(2, greeted);
        let mut source = Source::new(peer.port(), "scanout-id=1 reconnect-timeout=60000");
        source.pull();
        assert_eq!((source.stat("reconnects"), source.stat("errors")), (0, 0));
        let states: Vec<String> =
            std::iter::from_fn(|| source.bus.pop_filtered(&[gst::MessageType::Element]))
                .filter_map(|message| message.structure()?.get("state").ok())
                .collect();
        assert_eq!(states, ["reconnecting", "connected"]);
    }
}

#[test]
fn a_host_that_has_no_place_for_as_long_as_it_is_called_is_an_error_that_says_so() {
    for (properties, said) in [
        ("reconnect-timeout=0", "there are 64 clients"),
        ("reconnect-timeout=200", "200 ms"),
    ] {
        let peer = full_for(u32::MAX, false);
        let error = Source::new(peer.port(), &format!("scanout-id=1 {properties}")).error();
        for part in ["there are 64 clients", said] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
    }
}

#[test]
fn a_screen_that_cannot_be_switched_on_yet_is_asked_for_again() {
    let mut refusals = 2;
    let peer = Peer::new(move |link, envelope| {
        match &envelope.message {
            Message::EnableScanout(enable) => {
                let answer = ScanoutResp {
                    scanout_id: enable.scanout_id,
                    success: refusals == 0,
                    connector: String::new(),
                };
                refusals -= u32::from(refusals > 0);
                link.send(encode::scanout_resp(1, &answer));
            }
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(*scanout_id, true));
                push(link, &[true]);
            }
            _ => {}
        }
        Then::GoOn
    });
    let properties = "scanout-id=1 enable=true reconnect-timeout=60000";
    let mut source = Source::new(peer.port(), properties);
    source.pull();
    assert_eq!((source.stat("reconnects"), source.stat("errors")), (0, 0));
}

#[test]
fn a_host_whose_qemu_is_busy_is_asked_again() {
    let mut asked = 0;
    let peer = Peer::new(move |link, envelope| {
        match &envelope.message {
            Message::EnableScanout(enable) => {
                asked += 1;
                // It waits for its QEMU, for longer than this client does.
                if asked > 1 {
                    let (scanout_id, connector) = (enable.scanout_id, String::new());
                    let success = true;
                    let answer = ScanoutResp {
                        scanout_id,
                        success,
                        connector,
                    };
                    link.send(encode::scanout_resp(1, &answer));
                }
            }
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(*scanout_id, true));
                push(link, &[true]);
            }
            _ => {}
        }
        Then::GoOn
    });
    let properties = "scanout-id=1 enable=true timeout=200 reconnect-timeout=60000";
    let mut source = Source::new(peer.port(), properties);
    source.pull();
    assert_eq!((source.stat("reconnects"), source.stat("errors")), (0, 0));
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
            Message::ConfigReq(_) if connections == 1 => return how(link),
            _ => {}
        }
        link.pong(envelope);
        Then::GoOn
    })
}

fn goes_on_with_a_keyframe(peer: &Peer, resyncs: u64) {
    let mut source = Source::new(peer.port(), "scanout-id=1 timeout=300");
    source.pull();
    source.pull();
    source.element().set_property("bitrate", 1_000_000);
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
fn the_next_host_is_told_to_switch_the_screen_on_too() {
    let peer = Peer::new(|link, envelope| {
        match &envelope.message {
            Message::EnableScanout(enable) => {
                let answer = ScanoutResp {
                    scanout_id: enable.scanout_id,
                    success: true,
                    connector: String::new(),
                };
                link.send(encode::scanout_resp(1, &answer));
            }
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(*scanout_id, true));
                push(link, &[true]);
                return Then::Close;
            }
            _ => {}
        }
        Then::GoOn
    });
    let properties = "scanout-id=1 enable=true width=640 height=480";
    let mut source = Source::new(peer.port(), properties);
    for _ in 0..3 {
        source.pull();
        let asked = peer.wait_for(|seen| match seen {
            Seen::Message(envelope) => match envelope.message {
                Message::EnableScanout(enable) => Some((enable.width, enable.height)),
                Message::Subscribe { .. } => Some((0, 0)),
                _ => None,
            },
            _ => None,
        });
        assert_eq!(asked, (640, 480), "before SUBSCRIBE");
        peer.wait_for(|seen| match seen {
            Seen::Message(envelope) => {
                matches!(envelope.message, Message::Subscribe { .. }).then_some(())
            }
            _ => None,
        });
    }
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

/// All of a pushed frame of one NAL unit that comes before its bytes.
fn frame_header(payload_size: u32, nal_size: u32) -> Vec<u8> {
    let mut header = vec![0x48, 0x58, 0x46, 0x52, 2, 0, 1, 0];
    header.extend(payload_size.to_le_bytes());
    // Times, kind, reserved.
    header.extend([0; 20]);
    header.extend(1_u32.to_le_bytes());
    header.extend(nal_size.to_le_bytes());
    header
}

#[test]
fn an_absurd_size_is_out_of_step() {
    let peer = fails_once(|link| {
        link.raw(&[0x48, 0x58, 0x46, 0x52, 2, 0, 1, 0, 0xff, 0xff, 0xff, 0xff])
            .unwrap();
        Then::GoOn
    });
    goes_on_with_a_keyframe(&peer, 1);
}

#[test]
fn a_wrong_size_that_swallows_all_that_comes_is_out_of_step() {
    // 16 MiB: PONGs and frames go into it for as long as it lasts.
    let peer = fails_once(|link| {
        let size = 1_u32 << 24;
        link.raw(&frame_header(24 + 4 + size, size)).unwrap();
        push(link, &[false, false, false]);
        Then::GoOn
    });
    goes_on_with_a_keyframe(&peer, 1);
}

#[test]
fn a_frame_that_begins_after_silence_has_all_its_time() {
    let frame = [
        frame_header(24 + 4 + DELTA.len() as u32, DELTA.len() as u32),
        DELTA.to_vec(),
    ]
    .concat();
    let mut pings = 0;
    let peer = Peer::new(move |link, envelope| {
        match envelope.message {
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(scanout_id, true));
                push(link, &[true]);
            }
            // After `timeout`, and after twice that: what began at the first one ends.
            Message::Ping => {
                pings += 1;
                let (begins, ends) = frame.split_at(20);
                match pings {
                    1 => link.raw(begins).unwrap(),
                    2 => link.raw(ends).unwrap(),
                    _ => usize::from(link.pong(envelope)),
                };
            }
            _ => {}
        }
        Then::GoOn
    });
    let mut source = Source::new(peer.port(), "scanout-id=1 timeout=500");
    source.pull();
    assert!(source.pull().flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert_eq!((source.stat("resyncs"), source.stat("reconnects")), (0, 0));
}

#[test]
fn a_frame_with_another_message_in_it_reaches_no_decoder() {
    // The end of a delta is left out, and the next one takes its place (quirk 8): the sizes fit.
    let peer = fails_once(|link| {
        let mut cut = frame_header(24 + 4 + 100, 100);
        cut.extend([0, 0, 0, 1, 0x41, 0x9a]);
        link.raw(&cut).unwrap();
        push(link, &[false, false, false, false]);
        Then::GoOn
    });
    goes_on_with_a_keyframe(&peer, 1);
}

/// Waits for the message that the host is called again.
fn is_lost(source: &Source) {
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
}

#[test]
fn a_lost_host_is_still_called_after_a_pause_or_a_flush() {
    for flush in [false, true] {
        let pushes = |link: &mut Link, envelope: &Envelope| {
            if let Message::Subscribe { scanout_id } = envelope.message {
                link.send(encode::subscribe_resp(scanout_id, true));
                push(link, &[true]);
            }
            link.pong(envelope);
            Then::GoOn
        };
        let peer = Peer::new(pushes);
        let address = peer.address().clone();
        let properties = "scanout-id=1 bitrate=2000000 reconnect-timeout=3600000";
        let mut source = Source::new(peer.port(), properties);
        source.pull();
        drop(peer);
        is_lost(&source);
        let element = source.element();
        // GStreamer 1.22 does not interrupt the element for a pause, later ones do.
        if flush {
            element.send_event(gst::event::FlushStart::new());
        } else {
            element.set_state(gst::State::Paused).unwrap();
        }
        // The next one is not ready for clients at once.
        let mut early = true;
        let peer = Peer::on(&address, Greets::Legacy, move |link, envelope| {
            if std::mem::take(&mut early) {
                return Then::Close;
            }
            pushes(link, envelope)
        });
        if flush {
            element.send_event(gst::event::FlushStop::new(false));
        } else {
            element.set_state(gst::State::Playing).unwrap();
        }
        let buffer = source.pull();
        assert!(buffer.flags().contains(gst::BufferFlags::DISCONT));
        let bitrate = peer.wait_for(|seen| match seen {
            Seen::Message(envelope) => match envelope.message {
                Message::ConfigReq(config) => Some(config.bitrate),
                _ => None,
            },
            _ => None,
        });
        assert_eq!(bitrate, 2_000_000);
        assert_eq!((source.stat("reconnects"), source.stat("errors")), (1, 0));
    }
}

#[test]
fn a_state_change_ends_a_call_to_a_lost_host_at_once() {
    let peer = host(&[true]);
    let mut source = Source::new(peer.port(), "scanout-id=1 reconnect-timeout=60000");
    source.pull();
    drop(peer);
    is_lost(&source);
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
fn a_subscription_that_lasted_gets_the_time_for_another_even_without_a_picture() {
    let (mut clients, mut pings) = (0, 0);
    let peer = Peer::new(move |link, envelope| {
        match envelope.message {
            Message::Subscribe { scanout_id } => {
                clients += 1;
                link.send(encode::subscribe_resp(scanout_id, true));
                match clients {
                    1 => return Then::CloseAfterSending,
                    2 => {}
                    _ => push(link, &[true]),
                }
            }
            // Each comes 100 ms after the one before: together, more than reconnect-timeout.
            Message::Ping if clients == 2 => {
                pings += 1;
                if pings == 5 {
                    return Then::Close;
                }
            }
            _ => {}
        }
        link.pong(envelope);
        Then::GoOn
    });
    let properties = "scanout-id=1 timeout=100 reconnect-timeout=400";
    let mut source = Source::new(peer.port(), properties);
    source.pull();
    assert_eq!((source.stat("reconnects"), source.stat("errors")), (2, 0));
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

#[test]
fn a_host_that_hangs_while_it_is_called_again_is_given_up_in_time() {
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        match &envelope.message {
            Message::Hello(_) => clients += 1,
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(*scanout_id, true));
                push(link, &[true]);
                return Then::CloseAfterSending;
            }
            _ if clients == 1 => {
                link.pong(envelope);
            }
            // Not even to a PING.
            _ => {}
        }
        Then::GoOn
    });
    let mut source = Source::new(peer.port(), "scanout-id=1 timeout=0 reconnect-timeout=300");
    source.pull();
    let error = source.error();
    assert!(
        error.contains("300 ms (reconnect-timeout)") && error.contains("no sign of life"),
        "{error}"
    );
}
