// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whom the session takes for a host, and what becomes of it when that changes.

use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage};
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{Greets, Hello, Peer, Seen, Then, hello};

use super::*;

fn run(peer: &Peer, reconnect_timeout: u32) -> Run {
    let run = Run::new(&[
        ("tcp-host", &"127.0.0.1"),
        ("tcp-port", &peer.port()),
        ("timeout", &20_000u32),
        ("reconnect-timeout", &reconnect_timeout),
        ("auth-token", &"s3cret"),
    ]);
    run.configure();
    run
}

fn host_that_says(theirs: Hello) -> Peer {
    Peer::greeting(Greets::With(theirs), |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.answer(request);
        }
        link.pong(envelope);
        Then::GoOn
    })
}

#[test]
fn hello_comes_first_with_the_token_then_ping_and_nothing_before_the_answer() {
    let peer = Peer::greeting(Greets::Script, |_, _| Then::GoOn);
    let _run = run(&peer, 0);
    assert!(matches!(peer.next(), Seen::Connected));
    let Seen::Message(first) = peer.next() else {
        panic!("no message")
    };
    let Message::Hello(hello) = first.message else {
        panic!("{first:?}")
    };
    assert_eq!(hello.auth_token.unwrap().0, b"s3cret");
    assert_eq!(hello.version, 1);
    assert!(hello.capabilities.contains(Capabilities::REQUEST_IDS));
    let second = peer.next();
    assert!(
        matches!(&second, Seen::Message(envelope) if matches!(envelope.message, Message::Ping))
    );
    assert!(peer.seen().is_empty(), "it waits for the answer");
}

#[test]
fn a_wrong_token_is_an_error_at_once_even_while_reconnecting() {
    // Takes the first client, then wants another token.
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        if matches!(envelope.message, Message::Hello(_)) {
            clients += 1;
            if clients > 1 {
                let (code, text) = (ErrorCode::INVALID_MESSAGE, "wrong token".to_owned());
                let tag = None;
                link.send(encode::error(0, &ErrorMessage { code, text, tag }));
                return Then::CloseAfterSending;
            }
        }
        if matches!(envelope.message, Message::ConfigReq(_)) {
            return Then::Close;
        }
        link.pong(envelope);
        Then::GoOn
    });
    let run = run(&peer, 3_600_000);
    let reason = run.failure();
    for part in ["wrong token", "is auth-token the one", "127.0.0.1"] {
        assert!(reason.contains(part), "{reason}");
    }
    assert!(!reason.contains("s3cret"), "{reason}");
}

#[test]
fn a_host_that_is_full_is_called_again() {
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        if matches!(envelope.message, Message::Hello(_)) {
            clients += 1;
            if clients == 2 {
                let (code, text) = (ErrorCode::INTERNAL, "too many clients".to_owned());
                let tag = None;
                link.send(encode::error(0, &ErrorMessage { code, text, tag }));
                return Then::CloseAfterSending;
            }
        }
        if clients == 1 && matches!(envelope.message, Message::ConfigReq(_)) {
            return Then::Close;
        }
        link.pong(envelope);
        Then::GoOn
    });
    let run = run(&peer, 20_000);
    for _ in 0..2 {
        run.wait_for(|told| matches!(told, Told::Connected(_)).then_some(()));
    }
}

#[test]
fn a_connection_that_lasted_starts_the_reconnect_time_anew() {
    // Goes when it has not been asked for anything for a while.
    let peer = Peer::new(|_, envelope| match &envelope.message {
        Message::Ping => Then::Close,
        _ => Then::GoOn,
    });
    let properties: &[(&str, &dyn glib::value::ToValue)] = &[
        ("tcp-host", &"127.0.0.1"),
        ("tcp-port", &peer.port()),
        ("reconnect-timeout", &200u32),
    ];
    let run = Run::with(properties, Duration::from_millis(2100));
    for _ in 0..3 {
        run.wait_for(|told| match told {
            Told::Connected(_) => Some(()),
            Told::Failed(reason) => panic!("{reason}"),
            _ => None,
        });
    }
}

#[test]
fn settings_given_while_a_host_is_lost_are_compared_with_the_next_one() {
    let (gone, let_in) = (channel::<()>(), channel::<()>());
    let (tell_gone, wait_to_let_in) = (gone.0, let_in.1);
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        if matches!(envelope.message, Message::Hello(_)) {
            clients += 1;
            if clients == 2 {
                tell_gone.send(()).unwrap();
                wait_to_let_in.recv().unwrap();
            }
            let max_width = if clients == 1 { 8192 } else { 2 };
            link.hello_resp(&Hello {
                max_width,
                ..hello(Capabilities(0))
            });
        }
        if matches!(envelope.message, Message::ConfigReq(_)) && clients == 1 {
            return Then::Close;
        }
        link.pong(envelope);
        Then::GoOn
    });
    let run = run(&peer, 20_000);
    gone.1.recv_timeout(LONG).unwrap();
    let mut larger = format();
    larger.config.width = 4;
    run.session.configure(larger);
    let_in.0.send(()).unwrap();
    let reason = run.failure();
    assert!(reason.contains("limit of 2x8192"), "{reason}");
    assert!(reason.contains("127.0.0.1"), "{reason}");
}

#[test]
fn a_host_without_h264_or_without_places_is_named() {
    for (theirs, said) in [
        (
            Hello {
                codecs: 0b110,
                ..hello(Capabilities(0))
            },
            "encodes no H.264",
        ),
        (
            Hello {
                max_in_flight: 0,
                ..hello(Capabilities(0))
            },
            "takes no requests",
        ),
    ] {
        let peer = host_that_says(theirs);
        let reason = run(&peer, 20_000).failure();
        assert!(reason.contains(said), "{reason}");
    }
}

#[test]
fn a_host_that_comes_back_with_smaller_limits_is_an_error_that_names_them() {
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        if matches!(envelope.message, Message::Hello(_)) {
            clients += 1;
            let max_message = if clients == 1 { 1 << 20 } else { 60 };
            link.hello_resp(&Hello {
                max_message,
                ..hello(Capabilities(0))
            });
        }
        if matches!(envelope.message, Message::ConfigReq(_)) {
            return Then::Close;
        }
        link.pong(envelope);
        Then::GoOn
    });
    let reason = run(&peer, 20_000).failure();
    assert!(reason.contains("has 16 bytes"), "{reason}");
    assert!(reason.contains("limit of 4 bytes"), "{reason}");
}

#[test]
fn what_was_agreed_is_agreed_anew_after_a_loss() {
    // Legacy at first, then with ids; each connection ends after its first frame.
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        match &envelope.message {
            Message::Hello(_) => {
                clients += 1;
                if clients == 2 {
                    link.hello_resp(&hello(Capabilities::REQUEST_IDS));
                }
            }
            Message::FrameRequest(request, _) => {
                link.answer(request);
                return Then::CloseAfterSending;
            }
            _ => {}
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut run = run(&peer, 20_000);
    let mut agreed = Vec::new();
    for number in 0..2 {
        agreed.push(run.wait_for(|told| match told {
            Told::Connected(host) => Some(host.capabilities),
            _ => None,
        }));
        // The status follows the news.
        while run.submit(number) == Submission::NoHost {
            thread::yield_now();
        }
        let after_loss = run.wait_for(|told| match told {
            Told::Encoded { after_loss, .. } => Some(after_loss),
            _ => None,
        });
        assert_eq!(after_loss, number == 1);
    }
    assert_eq!(agreed, [None, Some(Capabilities::REQUEST_IDS)]);
    let requests: Vec<_> = peer
        .seen()
        .into_iter()
        .filter_map(|seen| match seen {
            Seen::Message(envelope) => match envelope.message {
                Message::FrameRequest(request, _) => Some(request),
                _ => None,
            },
            _ => None,
        })
        .collect();
    assert_eq!(requests[0].tag.request_id, 0);
    assert_ne!(requests[1].tag.request_id, 0);
    assert!(requests[1].force_keyframe);
}

#[test]
fn a_late_hello_resp_changes_nothing() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.hello_resp(&hello(Capabilities::REQUEST_IDS));
            link.answer(request);
        }
        Then::GoOn
    });
    let mut run = run(&peer, 0);
    for number in 0..3 {
        run.submit(number);
        assert_eq!(run.outcome(), (number, true));
    }
}
