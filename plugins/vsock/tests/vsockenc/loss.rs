// SPDX-License-Identifier: MIT OR Apache-2.0

//! Hosts that are not there, go away, come back, refuse, or talk nonsense.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};

use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage};
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{DELTA, Greets, LONG, Link, Peer, Seen, Then, hello};

use super::*;

/// Sends an ERROR about the oldest request, or about the client.
fn refuse(link: &mut Link, code: ErrorCode, text: &str) {
    let (text, tag) = (text.to_owned(), None);
    link.send(encode::error(1, &ErrorMessage { code, text, tag }));
}

#[test]
fn a_host_that_never_answers_frames_is_named() {
    // The second generation of deployed hosts (quirk 1).
    let peer = Peer::new(|link, envelope| {
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=300");
    encoder.push().unwrap();
    let error = encoder.error();
    assert!(error.contains("did not answer a FRAME_REQUEST"), "{error}");
    assert!(error.contains(&peer.port().to_string()), "{error}");
    // The error is told first; the flow follows.
    while encoder.push().is_ok() {}
}

#[test]
fn nobody_listening_is_an_error_that_says_so() {
    let port = Peer::answering().port();
    let mut encoder = Encoder::new(port, "");
    assert_eq!(encoder.push(), Err(gst::FlowError::Error));
    let error = encoder.error();
    assert!(
        error.contains(&format!("connect to tcp:127.0.0.1:{port}")),
        "{error}"
    );
    assert!(error.contains("is helix-host listening there?"), "{error}");
}

#[test]
fn a_socket_path_too_long_is_an_error_and_not_cut() {
    let mut encoder = Encoder::with(&format!("socket-path=/tmp/{}", "x".repeat(200)));
    let text = encoder.error();
    assert!(text.contains("more than a socket address holds"), "{text}");
}

#[test]
fn a_host_that_comes_back_goes_on_with_a_keyframe() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.pts == 2 * FRAME.nseconds() as i64 {
                return Then::Close;
            }
            link.answer(request);
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
    encoder.push().unwrap();
    encoder.pull();
    encoder.push().unwrap();
    encoder.pull();
    assert_eq!(peer.wait_for(config).bitrate, 4_000_000);
    // The third is lost with the connection.
    encoder.push().unwrap();
    peer.wait_for(|seen| matches!(seen, Seen::Closed).then_some(()));
    peer.wait_for(|seen| matches!(seen, Seen::Connected).then_some(()));
    // Settings come again, before any frame.
    assert!(matches!(
        peer.next(),
        Seen::Message(envelope) if matches!(envelope.message, Message::ConfigReq(_))
    ));
    // Frames pushed before the element knows of its new connection are dropped.
    let buffer = loop {
        encoder.push().unwrap();
        if let Some(buffer) = encoder.harness.try_pull() {
            break buffer;
        }
    };
    assert!(buffer.flags().contains(gst::BufferFlags::DISCONT));
    assert!(!buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert_eq!(encoder.stat("reconnects"), 1);
    assert!(encoder.stat("dropped") >= 1);
    assert_eq!(
        encoder.connection_states(),
        ["connected", "reconnecting", "connected"]
    );
}

#[test]
fn of_the_bitrates_set_while_there_is_no_host_it_is_told_the_last() {
    // Loses its first client, and lets the second one wait.
    let mut clients = 0;
    let (go, gone) = channel();
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        match &envelope.message {
            Message::Hello(_) => clients += 1,
            Message::FrameRequest(..) if clients == 1 => return Then::Close,
            Message::FrameRequest(request, _) => link.answer(request),
            Message::Ping if clients == 2 => gone.recv_timeout(LONG).unwrap(),
            _ => {}
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "");
    encoder.push().unwrap();
    assert_eq!(peer.wait_for(config).bitrate, 4_000_000);
    peer.wait_for(|seen| matches!(seen, Seen::Closed).then_some(()));
    peer.wait_for(|seen| match seen {
        Seen::Message(envelope) => matches!(envelope.message, Message::Hello(_)).then_some(()),
        _ => None,
    });
    for bitrate in 500_001..=500_100 {
        encoder.element().set_property("bitrate", bitrate);
    }
    go.send(()).unwrap();
    while encoder.harness.try_pull().is_none() {
        encoder.push().unwrap();
    }
    let told: Vec<_> = peer.seen().into_iter().filter_map(config).collect();
    assert_eq!(
        told.iter().map(|c| c.bitrate).collect::<Vec<_>>(),
        [500_100]
    );
}

#[test]
fn nothing_leaves_after_a_loss_before_a_keyframe() {
    let mut frames = 0;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            frames += 1;
            match frames {
                2 => return Then::Close,
                // Passes over the wish for a keyframe.
                3 => link.respond(1, request.pts, false, DELTA),
                _ => link.answer(request),
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
    encoder.push().unwrap();
    encoder.pull();
    let buffer = loop {
        encoder.push().unwrap();
        if let Some(buffer) = encoder.harness.try_pull() {
            break buffer;
        }
    };
    assert!(!buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert!(buffer.flags().contains(gst::BufferFlags::DISCONT));
    assert!(encoder.stat("dropped") >= 2);
}

#[test]
fn a_loss_is_marked_though_a_flush_takes_the_frame_that_would_say_so() {
    let mut frames = 0;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            frames += 1;
            match frames {
                2 => return Then::Close,
                // The base class would mark this one.
                4 => refuse(link, ErrorCode::ENCODE_FAILED, "not this one"),
                _ => link.answer(request),
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=4");
    encoder.push().unwrap();
    encoder.pull();
    let pad = encoder.element().static_pad("src").unwrap();
    {
        // Frames leave under this lock: the second one's loss cannot be told, nor what comes after it.
        let _held = pad.stream_lock();
        encoder.push().unwrap();
        peer.wait_for(|seen| matches!(seen, Seen::Closed).then_some(()));
        peer.wait_for(|seen| matches!(seen, Seen::Connected).then_some(()));
        // Those that find no host are dropped at once.
        let dropped = loop {
            let dropped = encoder.stat("dropped");
            encoder.push().unwrap();
            if encoder.stat("dropped") == dropped {
                break dropped;
            }
        };
        encoder.wait_for_answers();
        encoder.flush();
        assert_eq!(encoder.stat("dropped"), dropped);
    }
    encoder.push().unwrap();
    encoder.wait_for_answers();
    encoder.push().unwrap();
    assert!(encoder.pull().flags().contains(gst::BufferFlags::DISCONT));
}

#[test]
fn a_host_that_stays_away_is_an_error_after_the_reconnect_timeout() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=300");
    encoder.push().unwrap();
    encoder.pull();
    drop(peer);
    let error = encoder.error();
    assert!(
        error.contains("called again for 300 ms (reconnect-timeout) in vain"),
        "{error}"
    );
    assert_eq!(
        encoder.connection_states(),
        ["connected", "reconnecting", "lost"]
    );
}

#[test]
fn without_reconnecting_a_lost_host_is_an_error_at_once() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=0");
    encoder.push().unwrap();
    encoder.pull();
    drop(peer);
    assert!(encoder.error().contains("lost tcp:127.0.0.1"));
}

#[test]
fn an_error_is_told_though_downstream_is_blocked() {
    let peer = Peer::new(|link, envelope| match &envelope.message {
        Message::FrameRequest(request, _) if request.pts == 0 => {
            link.answer(request);
            Then::GoOn
        }
        Message::FrameRequest(..) => Then::Close,
        _ => Then::GoOn,
    });
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=0");
    let (pad, probe, blocked) = encoder.block();
    encoder.push().unwrap();
    blocked.recv_timeout(LONG).unwrap();
    encoder.push().unwrap();
    assert!(encoder.error().contains("lost tcp:127.0.0.1"));
    assert_eq!(encoder.connection_states(), ["connected", "lost"]);
    // The error is told first; the flow follows.
    while encoder.push().is_ok() {}
    // What came before still leaves.
    pad.remove_probe(probe);
    assert_eq!(encoder.pull().pts(), Some(gst::ClockTime::ZERO));
}

#[test]
fn a_host_that_falls_silent_is_lost_within_the_timeout() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.pts > 0 {
                return Then::PlayDead;
            }
            link.answer(request);
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=300 reconnect-timeout=0");
    encoder.push().unwrap();
    encoder.pull();
    encoder.push().unwrap();
    let error = encoder.error();
    assert!(error.contains("no sign of life for 300 ms"), "{error}");
}

#[test]
fn a_host_that_stops_reading_in_a_picture_is_lost_within_the_timeout() {
    let peer = Peer::new(|_, envelope| match envelope.message {
        Message::ConfigReq(..) => Then::PlayDead,
        _ => Then::GoOn,
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=5000 reconnect-timeout=0");
    // More than sockets hold: a PING would wait behind it, and then have time of its own.
    encoder
        .harness
        .set_src_caps_str("video/x-raw,format=BGRx,width=4096,height=4096,framerate=60/1");
    let picture = encoder.buffer(4096 * 4096 * 4, 1);
    let start = Instant::now();
    encoder.harness.push(picture).unwrap();
    let error = encoder.error();
    assert!(error.contains("no sign of life for 5000 ms"), "{error}");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(7), "{took:?}");
}

#[test]
fn garbage_from_a_host_is_an_error_that_says_what_is_wrong() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.pts > 0 {
                link.raw(&[0xa5; 300]).unwrap();
            } else {
                link.answer(request);
            }
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=0");
    encoder.push().unwrap();
    encoder.pull();
    encoder.push().unwrap();
    let error = encoder.error();
    assert!(error.contains("magic is 0xa5a5a5a5"), "{error}");
}

#[test]
fn a_host_that_answers_starts_the_reconnect_time_anew() {
    // Closes each connection after a frame: as a host would that is restarted again and again.
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.answer(request);
            return Then::CloseAfterSending;
        }
        Then::GoOn
    });
    // The pauses of one such time allow three attempts.
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=150 max-in-flight=1");
    for _ in 0..8 {
        while encoder.harness.try_pull().is_none() {
            encoder.push().unwrap();
        }
    }
}

#[test]
fn a_host_that_only_greets_does_not_start_the_reconnect_time_anew() {
    let peer = Peer::new(|_, envelope| match &envelope.message {
        Message::ConfigReq(_) => Then::Close,
        _ => Then::GoOn,
    });
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=300");
    let error = encoder.error();
    assert!(error.contains("called again for 300 ms"), "{error}");
    let connections = peer.seen().into_iter();
    let connections = connections.filter(|seen| matches!(seen, Seen::Connected));
    // After 50, 150 and 300 ms, and the first one.
    assert!(connections.count() <= 4);
}

#[test]
fn a_host_that_answers_no_more_is_called_anew_and_then_given_up() {
    let mut requests = 0;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            requests += 1;
            assert!(requests < 20, "it goes on for ever");
            if requests == 1 {
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=1000");
    while encoder.push().is_ok() {}
    let error = encoder.error();
    assert!(error.contains("did not answer a FRAME_REQUEST"), "{error}");
    assert_eq!(
        encoder.connection_states(),
        ["connected", "reconnecting", "connected", "lost"]
    );
}

/// A buffer's bytes, and a channel that is closed when they are gone.
struct Watched(
    Vec<u8>,
    #[expect(dead_code, reason = "it only closes")] Sender<()>,
);

impl AsRef<[u8]> for Watched {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[test]
fn frames_that_were_given_up_do_not_keep_their_buffers() {
    let mut requests = 0;
    let greets = Greets::With(hello(Capabilities::REQUEST_IDS));
    let peer = Peer::greeting(greets, move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            requests += 1;
            if requests % 2 == 1 {
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    // Long enough for an answer and a PONG on a busy machine.
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1 timeout=1500");
    let (watch, gone) = channel();
    for number in 0..5 {
        let bytes = Watched(vec![0; 64 * 48 * 4], watch.clone());
        let mut buffer = gst::Buffer::from_slice(bytes);
        buffer.get_mut().unwrap().set_pts(FRAME * number);
        encoder.harness.push(buffer).unwrap();
    }
    // Waits for the last one.
    assert!(encoder.harness.push_event(gst::event::Eos::new()));
    // The connection, which their late answers may still come from, is the same one.
    assert_eq!(
        (encoder.stat("dropped"), encoder.stat("reconnects")),
        (2, 0)
    );
    assert_eq!(encoder.connection_states(), ["connected"]);
    drop(watch);
    let end = gone.recv_timeout(LONG);
    assert_eq!(end, Err(RecvTimeoutError::Disconnected), "some are held");
}

#[test]
fn a_host_that_is_full_at_first_is_called_again() {
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        if matches!(envelope.message, Message::Hello(_)) {
            clients += 1;
            if clients == 1 {
                refuse(link, ErrorCode::INTERNAL, "too many clients");
                return Then::CloseAfterSending;
            }
        }
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.answer(request);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "");
    // Nothing is lost meanwhile.
    encoder.push().unwrap();
    assert_eq!(encoder.pull().pts(), Some(gst::ClockTime::ZERO));
    assert_eq!(encoder.stat("reconnects"), 0);
    assert_eq!(encoder.connection_states(), ["reconnecting", "connected"]);
}

#[test]
fn a_host_that_stays_full_is_an_error_that_says_so() {
    let peer = Peer::greeting(Greets::Script, |link, _| {
        refuse(link, ErrorCode::INTERNAL, "too many clients");
        Then::CloseAfterSending
    });
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=200");
    let error = encoder.error();
    assert!(error.contains("too many clients"), "{error}");
    assert!(error.contains("called again for 200 ms"), "{error}");
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=0");
    let error = encoder.error();
    assert!(error.contains("too many clients"), "{error}");
}

#[test]
fn a_host_that_refuses_now_and_then_is_one_warning() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            let number = request.pts / FRAME.nseconds() as i64;
            if number % 2 == 1 {
                refuse(link, ErrorCode::ENCODE_FAILED, "no luck");
            } else {
                link.answer(request);
            }
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
    for _ in 0..9 {
        encoder.push().unwrap();
    }
    for _ in 0..5 {
        encoder.pull();
    }
    assert_eq!(encoder.stat("errors"), 4);
    let mut warning = || encoder.message(gst::MessageType::Warning, Duration::ZERO);
    assert!(warning().is_some());
    assert!(warning().is_none());
}

#[test]
fn a_host_that_accepts_and_says_nothing_is_found_out_without_a_frame() {
    let peer = Peer::greeting(Greets::Script, |_, _| Then::GoOn);
    let mut encoder = Encoder::new(peer.port(), "timeout=100 reconnect-timeout=0");
    let error = encoder.error();
    assert!(error.contains("no sign of life"), "{error}");
}

#[test]
fn the_hosts_reason_is_in_the_error_about_its_loss() {
    let peer = Peer::new(|link, envelope| {
        if matches!(envelope.message, Message::FrameRequest(..)) {
            refuse(link, ErrorCode::INVALID_MESSAGE, "that is too large");
            return Then::CloseAfterSending;
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=0");
    encoder.push().unwrap();
    let error = encoder.error();
    assert!(error.contains("that is too large"), "{error}");
}

#[test]
fn a_host_that_refuses_everything_is_given_up() {
    let peer = Peer::new(|link, envelope| {
        if matches!(envelope.message, Message::FrameRequest(..)) {
            refuse(link, ErrorCode::ENCODE_FAILED, "no encoder");
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "");
    let mut frames = 0;
    while encoder.push().is_ok() {
        frames += 1;
        assert!(frames < 1000, "it goes on for ever");
    }
    let error = encoder.error();
    assert!(
        error.contains("refused 120 frames") && error.contains("no encoder"),
        "{error}"
    );
}

#[test]
fn a_host_that_hangs_while_it_is_called_again_is_given_up_in_time() {
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        match envelope.message {
            Message::Hello(_) => clients += 1,
            Message::FrameRequest(..) => return Then::Close,
            _ if clients == 1 => {
                link.pong(envelope);
            }
            // Not even to a PING.
            _ => {}
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=0 reconnect-timeout=300");
    encoder.push().unwrap();
    let error = encoder.error();
    assert!(
        error.contains("300 ms (reconnect-timeout)") && error.contains("no sign of life"),
        "{error}"
    );
}

/// Pushes until that fails, and says with which error; `peer` was asked for keyframes.
fn given_up(peer: &Peer) -> String {
    let mut encoder = Encoder::new(peer.port(), "keyframe-interval=0 max-in-flight=1");
    let mut frames = 0;
    while encoder.push().is_ok() {
        frames += 1;
        assert!(frames < 1000, "it goes on for ever");
    }
    for number in 0..100 {
        // The second may be on its way before the first is answered.
        assert!(peer.wait_for(request).force_keyframe || number == 1);
    }
    encoder.error()
}

#[test]
fn a_host_that_makes_no_keyframe_is_asked_again_and_given_up() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.respond(1, request.pts, false, DELTA);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let error = given_up(&peer);
    assert!(error.contains("has sent no keyframe"), "{error}");
}

#[test]
fn a_host_whose_keyframes_are_empty_is_asked_again_and_given_up() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.respond(1, request.pts, true, &[]);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let error = given_up(&peer);
    assert!(error.contains("has sent no keyframe"), "{error}");
}

#[test]
fn a_host_whose_keyframes_have_no_parameter_sets_is_asked_again_and_given_up() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.respond(1, request.pts, true, &[0, 0, 0, 1, 0x65, 0x88, 0x84]);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let error = given_up(&peer);
    assert!(error.contains("parameter sets (SPS and PPS)"), "{error}");
}
