// SPDX-License-Identifier: MIT OR Apache-2.0

//! Hosts that are not there, go away, come back, refuse, or talk nonsense.

use helix_protocol::message::{ErrorCode, ErrorMessage};
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{Greets, Peer, Seen, Then};

use super::*;

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
fn a_host_that_stays_away_is_an_error_after_the_reconnect_timeout() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "reconnect-timeout=300");
    encoder.push().unwrap();
    encoder.pull();
    drop(peer);
    let error = encoder.error();
    assert!(error.contains("not found again within 300 ms"), "{error}");
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
fn a_loss_while_idle_starts_the_reconnect_time_anew() {
    // Closes each connection once it is greeted: as a host would that was restarted again and
    // again.
    let peer = Peer::greeting(Greets::Script, |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.answer(request);
        }
        if link.pong(envelope) {
            Then::CloseAfterSending
        } else {
            Then::GoOn
        }
    });
    let encoder = Encoder::new(peer.port(), "reconnect-timeout=150");
    // Pauses of one budget of 150 ms allow three attempts.
    for _ in 0..12 {
        peer.wait_for(|seen| matches!(seen, Seen::Connected).then_some(()));
    }
    assert!(
        encoder
            .bus
            .pop_filtered(&[gst::MessageType::Error])
            .is_none()
    );
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
            let (code, text) = (ErrorCode::INVALID_MESSAGE, "that is too large".to_owned());
            link.send(encode::error(
                1,
                &ErrorMessage {
                    code,
                    text,
                    tag: None,
                },
            ));
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
            let (code, text) = (ErrorCode::ENCODE_FAILED, "no encoder".to_owned());
            link.send(encode::error(
                1,
                &ErrorMessage {
                    code,
                    text,
                    tag: None,
                },
            ));
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
