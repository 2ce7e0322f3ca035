// SPDX-License-Identifier: MIT OR Apache-2.0

//! Waiting for what still draws into a picture: for the DMA-BUF's fences. Here a pipe that has
//! something to read once somebody has written.

use std::thread;
use std::time::Instant;

use zerocopy_test_support::peer::LONG;

use super::*;

/// A buffer whose picture is drawn until its pipe's other end is written to.
fn drawn(encoder: &Encoder) -> (gst::Buffer, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    encoder.device.add(&reader, 3, SIZE);
    (Encoder::dmabuf(reader), writer)
}

/// Until the streaming thread waits, which nobody else can see: it has taken its waiter.
fn wait_until_it_waits(element: &VsockEnc) {
    let deadline = Instant::now() + LONG;
    let waits = || {
        let streaming = lock(&element.imp().streaming);
        streaming
            .as_ref()
            .is_some_and(|streaming| streaming.waiter.is_none())
    };
    while !waits() {
        assert!(Instant::now() < deadline, "it does not wait");
        thread::yield_now();
    }
}

/// The requests that the peer has seen so far.
fn requests(peer: &Peer) -> usize {
    peer.seen().into_iter().filter_map(request).count()
}

#[test]
fn a_picture_is_sent_when_what_draws_it_is_done() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    let (buffer, writer) = drawn(&encoder);
    let element = encoder.element.clone();
    thread::scope(|scope| {
        let push = scope.spawn(|| encoder.push(&buffer).unwrap());
        wait_until_it_waits(&element);
        assert_eq!(requests(&peer), 0);
        assert!(!push.is_finished());
        assert_eq!(nix::unistd::write(&writer, b"!"), Ok(1));
    });
    assert_eq!(encoder.pull(), 0);
}

#[test]
fn a_picture_that_is_drawn_for_ever_is_dropped_after_a_while() {
    for transfer in [Transfer::ResourceId, Transfer::Auto] {
        let peer = Peer::answering();
        let mut encoder = Encoder::new(&peer, transfer);
        let (buffer, _writer) = drawn(&encoder);
        encoder.push(&buffer).unwrap();
        assert_eq!(encoder.stat::<u64>("dropped"), 1);
        // Nobody has mapped it, nor asked the host for it.
        assert_eq!(requests(&peer), 0);
        let next = encoder.known(4);
        encoder.push(&next).unwrap();
        assert_eq!(encoder.pull(), 1);
    }
}

/// The base class has marked the request as made, and would make no other one.
#[test]
fn a_keyframe_asked_for_is_the_next_picture_where_one_is_dropped() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    encoder.element.set_property("keyframe-interval", 0);
    let next = encoder.known(4);
    encoder.push(&next).unwrap();
    encoder.pull();
    assert!(peer.wait_for(request).0.force_keyframe, "the first one");
    let event = gst_video::UpstreamForceKeyUnitEvent::builder().build();
    encoder.harness.push_upstream_event(event);
    let (buffer, _writer) = drawn(&encoder);
    encoder.push(&buffer).unwrap();
    assert_eq!(encoder.stat::<u64>("dropped"), 1);
    for is_keyframe in [true, false] {
        let next = encoder.known(5);
        encoder.push(&next).unwrap();
        encoder.pull();
        assert_eq!(peer.wait_for(request).0.force_keyframe, is_keyframe);
    }
}

/// Lets `end` end the wait for a picture that is drawn for ever, and expects that it was not sent.
fn ends_the_wait(end: impl FnOnce(&mut Encoder)) -> (Encoder, Peer) {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    let (mut buffer, _writer) = drawn(&encoder);
    buffer.get_mut().unwrap().set_pts(gst::ClockTime::ZERO);
    let pad = encoder.harness.srcpad().unwrap().clone();
    let push = thread::spawn(move || pad.push(buffer));
    wait_until_it_waits(&encoder.element);
    end(&mut encoder);
    // After its limit the wait would have ended in a request, and the flow been good.
    assert_eq!(push.join().unwrap(), Err(gst::FlowError::Flushing));
    assert_eq!(requests(&peer), 0);
    (encoder, peer)
}

#[test]
fn a_flush_ends_the_wait_for_what_draws_and_the_next_picture_is_sent() {
    let (mut encoder, _peer) = ends_the_wait(Encoder::flush);
    let next = encoder.known(4);
    encoder.frames = 1;
    encoder.push(&next).unwrap();
    assert_eq!(encoder.pull(), 1);
}

#[test]
fn a_state_change_ends_the_wait_for_what_draws() {
    ends_the_wait(|encoder| {
        encoder.element.set_state(gst::State::Null).unwrap();
    });
}
