// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures that a host refuses as resource ids, and gets as pixels.

use std::sync::atomic::{AtomicUsize, Ordering};

use zerocopy_test_support::peer::Hello;

use super::*;
use crate::session::HELD;

#[test]
fn a_host_that_refuses_ids_gets_each_picture_as_pixels() {
    for code in [
        ErrorCode::RESOURCE_NOT_FOUND,
        ErrorCode::NO_NATIVE_TEXTURE,
        ErrorCode::NO_NATIVE_SURFACE,
    ] {
        let peer = resolving_host(move |link, envelope| {
            match &envelope.message {
                Message::FrameRequest(_, None) => refuse(link, code),
                Message::FrameRequest(request, Some(_)) => link.answer(request),
                _ => {}
            }
            link.pong(envelope);
            Then::GoOn
        });
        let mut encoder = Encoder::new(&peer, Transfer::Auto);
        let buffers = [encoder.known(1), encoder.known(2), encoder.known(3)];
        for number in 0..8 {
            encoder.push(&buffers[number % 3]).unwrap();
        }
        let numbers: Vec<_> = (0..8).map(|_| encoder.pull()).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(encoder.stat::<u64>("dropped"), 0);
        assert_eq!(encoder.stat::<String>("transfer"), "pixels");
        assert_eq!(encoder.ways(), ["", "resource-id", "pixels"]);
        assert!(
            encoder
                .bus
                .pop_filtered(&[gst::MessageType::Warning])
                .is_none()
        );
    }
}

/// Two resources, of which the host can use one.
const GOOD: u32 = 1;
const BAD: u32 = 2;

#[test]
fn what_was_sent_behind_a_refused_picture_comes_after_it() {
    let mut refused = false;
    behind_a_refused_picture(&resolving_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            // Refuses the bad one when the next has come too.
            if std::mem::take(&mut refused) {
                refuse(link, ErrorCode::NO_NATIVE_SURFACE);
            }
            if request.resource_id == BAD {
                refused = true;
            } else {
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    }));
}

#[test]
fn what_was_answered_before_the_refusal_comes_after_it_too() {
    let mut refused = None;
    behind_a_refused_picture(&naming_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.resource_id == BAD {
                refused = Some(request.tag);
            } else {
                link.answer(request);
                if let Some(tag) = refused.take() {
                    refuse_named(link, ErrorCode::NO_NATIVE_SURFACE, Some(tag));
                }
            }
        }
        link.pong(envelope);
        Then::GoOn
    }));
}

fn behind_a_refused_picture(peer: &Peer) {
    let mut encoder = Encoder::new(peer, Transfer::Auto);
    let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
    encoder.push(&good).unwrap();
    assert_eq!(encoder.pull(), 0);
    for buffer in [&bad, &good, &bad, &good] {
        encoder.push(buffer).unwrap();
    }
    let numbers: Vec<_> = (0..4).map(|_| encoder.pull()).collect();
    assert_eq!(numbers, [1, 2, 3, 4]);
    assert_eq!(encoder.stat::<u64>("dropped"), 0);
    let sent: Vec<_> = (0..7)
        .map(|_| {
            let (request, _) = peer.wait_for(request);
            (request.pts as u64 / FRAME.nseconds(), request.resource_id)
        })
        .collect();
    let again = [(1, 0), (2, GOOD)];
    assert_eq!(
        sent[..5],
        [&[(0, GOOD), (1, BAD), (2, GOOD)][..], &again].concat()
    );
    // The bad one is known for it now; the good one is not.
    assert_eq!(sent[5..], [(3, 0), (4, GOOD)]);
}

#[test]
fn a_host_that_keeps_resources_without_an_answer_is_called_anew() {
    // Answers good ones only.
    let mut unanswered = 0;
    let peer = naming_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.resource_id == GOOD {
                link.answer(request);
            } else {
                unanswered += 1;
                assert!(unanswered < 8, "it goes on for ever");
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::with_timeout(&peer, Transfer::Auto, 1000);
    encoder.element.set_property("max-in-flight", 1u32);
    let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
    while encoder.stat::<u64>("reconnects") == 0 {
        encoder.push(&good).unwrap();
        encoder.push(&bad).unwrap();
    }
    let unanswered = std::iter::from_fn(|| Some(peer.next()))
        .take_while(|seen| !matches!(seen, Seen::Closed))
        .filter_map(request)
        .filter(|(request, _)| request.resource_id == BAD);
    assert_eq!(unanswered.count(), HELD as usize);
}

#[test]
fn a_message_says_how_pictures_travel_when_that_has_changed() {
    let peer = naming_host(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.answer(request);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let known = encoder.known(GOOD);
    let foreign = Encoder::dmabuf(fake::memfd(SIZE));
    let push = |encoder: &mut Encoder, buffer| {
        encoder.push(buffer).unwrap();
        encoder.pull();
    };
    for _ in 0..40 {
        push(&mut encoder, &known);
    }
    push(&mut encoder, &foreign);
    assert_eq!(encoder.ways(), ["", "resource-id", "pixels"]);
    assert_eq!(encoder.stat::<String>("transfer"), "pixels");
    // Not one for each picture where they take turns.
    for _ in 0..30 {
        push(&mut encoder, &known);
        push(&mut encoder, &foreign);
    }
    let ways = encoder.ways();
    assert!((1..=2).contains(&ways.len()), "{ways:?}");
}

#[test]
fn a_refused_picture_that_was_flushed_is_not_sent_again() {
    let mut bad = None;
    let peer = naming_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.resource_id == BAD {
                bad = Some(request.tag);
            } else {
                // By now the other one is flushed.
                if let Some(tag) = bad.take() {
                    refuse_named(link, ErrorCode::NO_NATIVE_SURFACE, Some(tag));
                }
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
    encoder.push(&good).unwrap();
    assert_eq!(encoder.pull(), 0);
    encoder.push(&bad).unwrap();
    let mut sent: Vec<_> = (0..2)
        .map(|_| peer.wait_for(request).0.resource_id)
        .collect();
    encoder.flush();
    encoder.push(&good).unwrap();
    assert_eq!(encoder.pull(), 2);
    encoder.push(&good).unwrap();
    assert_eq!(encoder.pull(), 3);
    sent.extend((0..2).map(|_| peer.wait_for(request).0.resource_id));
    assert_eq!(sent, [GOOD, BAD, GOOD, GOOD]);
}

#[test]
fn a_stream_goes_on_from_a_keyframe_where_answers_are_not_used() {
    let mut refused = false;
    let peer = resolving_host(move |link, envelope| {
        match &envelope.message {
            Message::FrameRequest(request, _) if request.resource_id == BAD => refused = true,
            Message::FrameRequest(request, _) => {
                if std::mem::take(&mut refused) {
                    refuse(link, ErrorCode::NO_NATIVE_SURFACE);
                }
                link.answer(request);
            }
            _ => {}
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
    for buffer in [&good, &bad, &good] {
        encoder.push(buffer).unwrap();
    }
    for number in 0..3 {
        assert_eq!(encoder.pull(), number);
    }
    let forced: Vec<_> = (0..5)
        .map(|_| peer.wait_for(request).0.force_keyframe)
        .collect();
    assert_eq!(forced, [true, false, false, true, false]);
}

#[test]
fn a_refused_picture_arrives_with_its_pixels() {
    let peer = resolving_host(|link, envelope| {
        match &envelope.message {
            Message::FrameRequest(_, None) => refuse(link, ErrorCode::RESOURCE_NOT_FOUND),
            Message::FrameRequest(request, Some(_)) => link.answer(request),
            _ => {}
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let fd = fake::memfd(SIZE);
    let picture: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    assert_eq!(nix::unistd::write(&fd, &picture), Ok(SIZE));
    encoder.device.add(&fd, 4, SIZE);
    let buffer = Encoder::dmabuf(fd);
    encoder.push(&buffer).unwrap();
    encoder.pull();
    assert_eq!(peer.wait_for(request).0.resource_id, 4);
    let (request, pixels) = peer.wait_for(request);
    assert_eq!(request.resource_id, 0);
    assert!(request.force_keyframe, "it still is the first one");
    assert_eq!(*pixels.unwrap(), *picture);
}

#[test]
fn no_more_requests_are_open_than_permitted_while_pictures_are_sent_again() {
    const PERMITTED: usize = 2;
    for (host, property) in [(PERMITTED, 16), (16, PERMITTED)] {
        let capabilities = Capabilities::RESOURCE_IDS.or(Capabilities::REQUEST_IDS);
        let greets = Greets::With(Hello {
            max_in_flight: host as u16,
            ..hello(capabilities)
        });
        let most = Arc::new(AtomicUsize::new(0));
        let most_here = most.clone();
        // Refuses the bad one when the next has come too. Answers the newest then, each time that
        // it is asked whether it is alive: by then the client has sent all that it wants to.
        let mut open: Vec<FrameRequest> = Vec::new();
        let mut refused = false;
        let peer = Peer::greeting(greets, move |link, envelope| {
            if let Message::FrameRequest(request, _) = &envelope.message {
                open.push(*request);
                most_here.fetch_max(open.len(), Ordering::Relaxed);
                if let [bad, _] = open[..]
                    && !std::mem::replace(&mut refused, true)
                {
                    refuse_named(link, ErrorCode::NO_NATIVE_SURFACE, Some(bad.tag));
                    open.remove(0);
                }
            }
            let is_first = open.first().is_some_and(|request| request.pts == 0);
            if (link.pong(envelope) || is_first)
                && let Some(request) = open.pop()
            {
                link.answer(&request);
            }
            Then::GoOn
        });
        let mut encoder = Encoder::with_timeout(&peer, Transfer::Auto, 1000);
        let max_in_flight = property as u32;
        encoder.element.set_property("max-in-flight", max_in_flight);
        let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
        encoder.push(&good).unwrap();
        assert_eq!(encoder.pull(), 0);
        for buffer in [&bad, &good, &good] {
            encoder.push(buffer).unwrap();
        }
        let numbers: Vec<_> = (0..3).map(|_| encoder.pull()).collect();
        assert_eq!(numbers, [1, 2, 3]);
        assert_eq!(most.load(Ordering::Relaxed), PERMITTED);
        assert_eq!(encoder.stat::<u64>("dropped"), 0);
    }
}

#[test]
fn a_pool_of_the_size_asked_for_lasts_though_the_host_keeps_pictures() {
    let mut requests = 0;
    let peer = naming_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            requests += 1;
            // It may still read every fifth.
            if requests % 5 != 0 {
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::with_timeout(&peer, Transfer::ResourceId, 500);
    let caps = encoder.harness.srcpad().unwrap().current_caps();
    let mut query = gst::query::Allocation::new(caps.as_ref(), false);
    assert!(encoder.harness.srcpad().unwrap().peer_query(&mut query));
    let (_, _, buffers, _) = query.allocation_pools().next().expect("a size");
    // A pool lends tokens, which come back when the buffers are free that hold them.
    let pool = gst::BufferPool::new();
    let mut config = pool.config();
    config.set_params(None, 1, buffers, buffers);
    pool.set_config(config).unwrap();
    pool.set_active(true).unwrap();
    let known: Vec<_> = (1..=buffers).map(|id| encoder.known(id)).collect();
    let mut tokens = Vec::new();
    let (tell, pushed) = channel();
    let pushing = std::thread::spawn(move || {
        for _ in 0..30 {
            let token = pool.acquire_buffer(None).unwrap();
            let address = token.as_ptr() as usize;
            let index = tokens.iter().position(|known| *known == address);
            let index = index.unwrap_or_else(|| {
                tokens.push(address);
                tokens.len() - 1
            });
            let mut buffer = known[index].copy();
            gst::ParentBufferMeta::add(buffer.make_mut(), &token);
            drop(token);
            encoder.push(&buffer).unwrap();
            drop(buffer);
            // A test that has failed no longer listens.
            let _ = tell.send(());
        }
        drop(encoder);
        pool.set_active(false).unwrap();
    });
    for number in 0..30 {
        let pushed = pushed.recv_timeout(LONG);
        assert!(pushed.is_ok(), "stands still after {number} frames");
    }
    pushing.join().unwrap();
}
