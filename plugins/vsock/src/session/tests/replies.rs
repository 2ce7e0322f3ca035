// SPDX-License-Identifier: MIT OR Apache-2.0

//! Replies late, early, twice, never, and to whom they belong.

use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage, FrameRequest, RequestTag};
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{Greets, Hello, KEYFRAME, Link, Peer, Seen, Then, hello};

use super::*;

/// A host with request ids that is told what to do with the requests so far, after each.
fn host_with_ids(mut answer: impl FnMut(&mut Link, &[FrameRequest]) + Send + 'static) -> Peer {
    let mut requests = Vec::new();
    let greets = Greets::With(hello(Capabilities::REQUEST_IDS));
    Peer::greeting(greets, move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            requests.push(*request);
            answer(link, &requests);
        }
        link.pong(envelope);
        Then::GoOn
    })
}

fn run(peer: &Peer, timeout: u32) -> Run {
    let run = Run::new(&[
        ("tcp-host", &"127.0.0.1"),
        ("tcp-port", &peer.port()),
        ("timeout", &timeout),
        ("reconnect-timeout", &0u32),
    ]);
    run.configure();
    run
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

fn error(tag: Option<RequestTag>) -> encode::Head {
    let (code, text) = (ErrorCode::ENCODE_FAILED, "no luck".to_owned());
    encode::error(1, &ErrorMessage { code, text, tag })
}

#[test]
fn access_units_leave_in_the_order_of_their_requests() {
    let peer = host_with_ids(|link, requests| {
        if requests.len() == 4 {
            for index in [2, 0, 3, 1] {
                link.answer(&requests[index]);
            }
        }
    });
    let mut run = run(&peer, 20_000);
    for number in 0..4 {
        assert_eq!(run.submit(number), Submission::Accepted);
    }
    let order: Vec<_> = (0..4).map(|_| run.outcome()).collect();
    assert_eq!(order, [(0, true), (1, true), (2, true), (3, true)]);
}

#[test]
fn requests_have_ids_that_differ_and_are_not_zero() {
    let peer = host_with_ids(|link, requests| link.answer(requests.last().unwrap()));
    let mut run = run(&peer, 20_000);
    for number in 0..3 {
        run.submit(number);
    }
    let ids: Vec<_> = (0..3).map(|_| peer.wait_for(request).tag).collect();
    for (index, tag) in ids.iter().enumerate() {
        assert_eq!(tag.epoch, 0);
        assert_ne!(tag.request_id, 0);
        assert!(!ids[..index].contains(tag));
    }
}

#[test]
fn a_legacy_host_sees_zeros_where_ids_would_be() {
    let peer = Peer::answering();
    let mut run = run(&peer, 20_000);
    run.submit(0);
    assert_eq!(peer.wait_for(request).tag, RequestTag::default());
    assert_eq!(run.outcome(), (0, true));
}

#[test]
fn replies_that_nobody_asked_for_are_counted_and_change_nothing() {
    let peer = host_with_ids(|link, requests| {
        let request = requests.last().unwrap();
        let unknown = RequestTag {
            epoch: 77,
            request_id: 7777,
        };
        link.answer(&FrameRequest {
            tag: unknown,
            ..*request
        });
        link.answer(request);
        link.answer(request);
    });
    let mut run = run(&peer, 20_000);
    for number in 0..3 {
        run.submit(number);
        assert_eq!(run.outcome(), (number, true));
    }
    // The last reply's double may still be on its way.
    assert!(run.counts.lock().unwrap().unmatched >= 5);
}

#[test]
fn an_error_that_is_said_twice_is_counted_and_changes_nothing() {
    let peer = host_with_ids(|link, requests| {
        let request = requests.last().unwrap();
        if requests.len() == 2 {
            link.send(error(Some(request.tag)));
            link.send(error(Some(request.tag)));
        } else {
            link.answer(request);
        }
    });
    let mut run = run(&peer, 20_000);
    for number in 0..4 {
        run.submit(number);
        assert_eq!(run.outcome(), (number, number != 1));
    }
    assert_eq!(run.counts.lock().unwrap().unmatched, 1);
}

#[test]
fn an_error_with_a_tag_drops_exactly_its_frame() {
    let peer = host_with_ids(|link, requests| {
        if requests.len() == 3 {
            link.send(error(Some(requests[1].tag)));
            link.answer(&requests[2]);
            link.answer(&requests[0]);
        }
    });
    let mut run = run(&peer, 20_000);
    for number in 0..3 {
        run.submit(number);
    }
    let order: Vec<_> = (0..3).map(|_| run.outcome()).collect();
    assert_eq!(order, [(1, false), (0, true), (2, true)]);
}

#[test]
fn a_frame_that_is_never_answered_is_given_up_and_those_behind_it_leave() {
    let peer = host_with_ids(|link, requests| {
        if requests.len() != 2 {
            link.answer(requests.last().unwrap());
        }
    });
    let mut run = run(&peer, 1000);
    for number in 0..4 {
        run.submit(number);
    }
    let order: Vec<_> = (0..4).map(|_| run.outcome()).collect();
    assert_eq!(order, [(0, true), (1, false), (2, true), (3, true)]);
}

#[test]
fn a_late_reply_by_id_is_thrown_away_and_asks_for_a_keyframe() {
    let peer = host_with_ids(|link, requests| match requests.len() {
        2 => {}
        3 => {
            link.answer(&requests[1]);
            link.answer(&requests[2]);
        }
        _ => link.answer(requests.last().unwrap()),
    });
    let mut run = run(&peer, 1000);
    run.submit(0);
    run.submit(1);
    assert_eq!((run.outcome(), run.outcome()), ((0, true), (1, false)));
    run.submit(2);
    assert_eq!(run.outcome(), (2, true));
    run.submit(3);
    assert_eq!(run.outcome(), (3, true));
    let forced: Vec<_> = (0..4)
        .map(|_| peer.wait_for(request).force_keyframe)
        .collect();
    assert_eq!(forced, [true, false, false, true]);
}

#[test]
fn what_was_flushed_is_nobodys() {
    for greets in [
        Greets::With(hello(Capabilities::REQUEST_IDS)),
        Greets::Legacy,
    ] {
        // Answers the first two with the third.
        let mut requests = Vec::new();
        let peer = Peer::greeting(greets, move |link, envelope| {
            if let Message::FrameRequest(request, _) = &envelope.message {
                requests.push(*request);
                if requests.len() == 3 {
                    for request in &requests {
                        link.answer(request);
                    }
                }
            }
            link.pong(envelope);
            Then::GoOn
        });
        let mut run = run(&peer, 20_000);
        run.submit(0);
        run.submit(1);
        let before = [peer.wait_for(request), peer.wait_for(request)];
        run.session.flush();
        run.submit(2);
        let after = peer.wait_for(request);
        assert!(after.force_keyframe, "nobody has what it could refer to");
        if after.tag != RequestTag::default() {
            assert_eq!((before[1].tag.epoch, after.tag.epoch), (0, 1));
        }
        assert_eq!(run.outcome(), (2, true));
        // Their places are free again, too.
        assert_eq!(run.session.drain(&mut run.waiter), Submission::Accepted);
        assert!(!run.told.try_iter().any(|told| matches!(
            told,
            Told::Encoded { .. } | Told::Dropped(_) | Told::Failed(_)
        )));
    }
}

#[test]
fn no_more_requests_are_open_than_the_host_takes() {
    let greets = Greets::With(Hello {
        max_in_flight: 1,
        ..hello(Capabilities::REQUEST_IDS)
    });
    let peer = Peer::greeting(greets, |link, envelope| {
        link.pong(envelope);
        Then::GoOn
    });
    let mut run = run(&peer, 0);
    assert_eq!(run.submit(0), Submission::Accepted);
    // Cancelled beforehand: waits for nothing, and would be accepted if there were a place.
    run.waiter.waker().cancel();
    assert_eq!(run.submit(1), Submission::Cancelled);
}

#[test]
fn a_picture_that_the_host_would_leave_unread_waits_and_pings_do_not() {
    // Three of 16 bytes are more than one may have.
    let greets = Greets::With(Hello {
        max_message: 12 + 44 + 40,
        ..hello(Capabilities::REQUEST_IDS)
    });
    let mut open = VecDeque::new();
    let peer = Peer::greeting(greets, move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            open.push_back(*request);
            assert!(open.len() <= 3, "a host would read no more");
        }
        // Nothing else comes while the client waits.
        if link.pong(envelope)
            && let Some(request) = open.pop_front()
        {
            link.answer(&request);
        }
        Then::GoOn
    });
    let mut run = Run::with(
        &[("tcp-host", &"127.0.0.1"), ("tcp-port", &peer.port())],
        Duration::from_millis(20),
    );
    run.configure();
    for number in 0..6 {
        assert_eq!(run.submit(number), Submission::Accepted);
    }
    let answers: Vec<_> = (0..6)
        .map(|number| {
            run.wait_for(|told| match told {
                Told::Encoded { frame, took, .. } => {
                    assert_eq!(frame, number);
                    Some((Instant::now(), took))
                }
                Told::Dropped(_) | Told::Failed(_) => panic!("{told:?}"),
                _ => None,
            })
        })
        .collect();
    // What waits for the host to read takes as long as if the host had it.
    let [third, last] = [answers[2], answers[5]];
    let later = last.0 - third.0;
    assert!(last.1 > third.1 + later / 2, "{answers:?}");
}

#[test]
fn the_settings_in_force_are_told() {
    let greets = Greets::With(hello(Capabilities::CONFIG_RESP));
    let peer = Peer::greeting(greets, |link, envelope| {
        if let Message::ConfigReq(config) = envelope.message {
            let bitrate = config.bitrate / 2;
            link.send(encode::config_resp(1, &Config { bitrate, ..config }));
        }
        Then::GoOn
    });
    let run = run(&peer, 20_000);
    let told = run.wait_for(|told| match told {
        Told::Configured { given, in_force } => Some((given, in_force)),
        _ => None,
    });
    assert_eq!(told, (4_000_000, 2_000_000));
}

#[test]
fn an_idle_session_says_something_now_and_then() {
    let peer = Peer::answering();
    let run = Run::with(
        &[("tcp-host", &"127.0.0.1"), ("tcp-port", &peer.port())],
        Duration::from_millis(20),
    );
    for _ in 0..3 {
        peer.wait_for(|seen| match seen {
            Seen::Message(envelope) => matches!(envelope.message, Message::Ping).then_some(()),
            _ => None,
        });
    }
    drop(run);
}

#[test]
fn a_dead_host_is_found_while_idle() {
    let peer = Peer::new(|_, _| Then::PlayDead);
    let run = Run::with(
        &[
            ("tcp-host", &"127.0.0.1"),
            ("tcp-port", &peer.port()),
            ("timeout", &100u32),
            ("reconnect-timeout", &0u32),
        ],
        Duration::from_millis(20),
    );
    let reason = run.failure();
    assert!(reason.contains("no sign of life for 100 ms"), "{reason}");
}

#[test]
fn nothing_leaves_after_a_flush_before_a_keyframe() {
    let mut requests = 0;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            requests += 1;
            // It passes over the keyframe that the flush makes necessary.
            let is_keyframe = requests != 2 && request.force_keyframe;
            link.respond(1, request.pts, is_keyframe, KEYFRAME);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut run = Run::new(&[("tcp-host", &"127.0.0.1"), ("tcp-port", &peer.port())]);
    run.configure();
    let outcome = |run: &mut Run, frame| {
        assert_eq!(run.submit(frame), Submission::Accepted);
        run.outcome()
    };
    assert_eq!(outcome(&mut run, 0), (0, true));
    run.session.flush();
    assert_eq!(outcome(&mut run, 1), (1, false));
    assert_eq!(outcome(&mut run, 2), (2, true));
    // This one was not asked to be a keyframe, and need not be.
    assert_eq!(outcome(&mut run, 3), (3, true));
}
