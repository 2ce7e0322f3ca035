// SPDX-License-Identifier: MIT OR Apache-2.0

//! What GstVideoEncoder asks of its subclasses: flushes, states, caps, the end, keyframes.

use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst_check::Harness;
use helix_protocol::Message;
use helix_protocol::message::{Capabilities, FrameRequest};
use zerocopy_test_support::peer::{Greets, Hello, KEYFRAME, LONG, Peer, Seen, Then, hello};

use super::*;

#[test]
fn keyframes_are_asked_for_at_the_interval_and_on_request() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "keyframe-interval=4");
    for number in 0..10 {
        if number == 6 {
            let event = gst::event::CustomUpstream::builder(
                gst::Structure::builder("GstForceKeyUnit")
                    .field("all-headers", true)
                    .build(),
            );
            assert!(encoder.harness.push_upstream_event(event.build()));
        }
        encoder.push().unwrap();
        encoder.pull();
    }
    let forced: Vec<_> = (0..10)
        .filter(|_| peer.wait_for(request).force_keyframe)
        .collect();
    assert_eq!(forced.len(), 3, "0, 4 and 6 of 10");
}

#[test]
fn every_frame_is_out_before_eos() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=16");
    for _ in 0..40 {
        encoder.push().unwrap();
    }
    assert!(encoder.harness.push_event(gst::event::Eos::new()));
    assert_eq!(encoder.harness.buffers_received(), 40);
}

#[test]
fn a_change_of_size_drains_and_tells_the_host() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "");
    encoder.push().unwrap();
    encoder
        .harness
        .set_src_caps_str("video/x-raw,format=NV12,width=32,height=32,framerate=30/1");
    let buffer = encoder.buffer(32 * 32 * 3 / 2, 9);
    encoder.harness.push(buffer).unwrap();
    encoder.pull();
    encoder.pull();
    assert_eq!(peer.wait_for(config).width, 64);
    assert_eq!(peer.wait_for(request).width, 64);
    let config = peer.wait_for(config);
    assert_eq!((config.width, config.framerate_num), (32, 30));
    let request = peer.wait_for(request);
    assert_eq!(
        (request.width, request.stride, request.format),
        (32, 32, 0x3231_564e)
    );
}

/// [`KEYFRAME`] with another parameter set: level 3.2.
fn other_keyframe() -> Vec<u8> {
    let mut bytes = KEYFRAME.to_vec();
    assert_eq!(std::mem::replace(&mut bytes[7], 32), 31);
    bytes
}

#[test]
fn frames_from_before_a_change_of_caps_leave_before_it() {
    // Answers the first frame when it is asked for a sign of life: until then the caps wait.
    let (tell, told) = channel();
    let mut first: Option<FrameRequest> = None;
    let peer = Peer::new(move |link, envelope| {
        match &envelope.message {
            Message::ConfigReq(config) => tell.send(format!("config {}", config.width)).unwrap(),
            Message::FrameRequest(request, _) if request.width == 64 => first = Some(*request),
            Message::FrameRequest(request, _) => {
                link.respond(1, request.pts, true, &other_keyframe());
            }
            _ => {}
        }
        if link.pong(envelope)
            && let Some(request) = first.take()
        {
            tell.send("answer".to_owned()).unwrap();
            link.answer(&request);
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=1000");
    let pad = encoder.element().static_pad("src").unwrap();
    let (tell_level, levels) = channel();
    pad.add_probe(gst::PadProbeType::BUFFER, move |pad, _| {
        let caps = pad.current_caps().unwrap();
        let level = caps.structure(0).unwrap().get::<String>("level").unwrap();
        tell_level.send(level).unwrap();
        gst::PadProbeReturn::Ok
    });
    encoder.push().unwrap();
    encoder
        .harness
        .set_src_caps_str("video/x-raw,format=NV12,width=32,height=32,framerate=60/1");
    let buffer = encoder.buffer(32 * 32 * 3 / 2, 9);
    encoder.harness.push(buffer).unwrap();
    assert_eq!(encoder.pull().pts(), Some(gst::ClockTime::ZERO));
    assert_eq!(encoder.pull().pts(), Some(FRAME));
    let order: Vec<_> = told.try_iter().collect();
    assert_eq!(order, ["config 64", "answer", "config 32"]);
    let levels: Vec<_> = levels.try_iter().collect();
    assert_eq!(levels, ["3.1", "3.2"]);
}

#[test]
fn a_change_of_framerate_alone_reaches_both_sides() {
    // The parameter sets stay the same.
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "");
    for (rate, wanted) in [
        ("60/1", (60, 1)),
        ("30/1", (30, 1)),
        ("24000/1001", (24_000, 1001)),
    ] {
        encoder.harness.set_src_caps_str(&format!(
            "video/x-raw,format=BGRx,width=64,height=48,framerate={rate}"
        ));
        encoder.push().unwrap();
        encoder.pull();
        let config = peer.wait_for(config);
        assert_eq!((config.framerate_num, config.framerate_den), wanted);
        let caps = encoder.harness.sinkpad().unwrap().current_caps().unwrap();
        let caps = caps.structure(0).unwrap();
        let (num, den) = wanted;
        let wanted = gst::Fraction::new(num as i32, den as i32);
        assert_eq!(caps.get::<gst::Fraction>("framerate").unwrap(), wanted);
        // As the stream says, whatever the caps were before.
        assert_eq!(caps.get::<i32>("width").unwrap(), 1280);
    }
}

#[test]
fn an_end_downstream_ends_the_stream_and_is_no_error() {
    assert_eq!(negotiation::with_filter(1000, "identity eos-after=3"), None);
}

/// Runs `end` while a frame waits for a silent host, and expects that it is over soon.
fn ends_a_wait(end: impl FnOnce(&mut Harness)) {
    let peer = Peer::new(|_, _| Then::GoOn);
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1 timeout=0");
    encoder.push().unwrap();
    let pad = encoder.harness.srcpad().unwrap().clone();
    let buffer = encoder.buffer(64 * 48 * 4, 0);
    let (entered, wait) = channel();
    let pusher = thread::spawn(move || {
        entered.send(()).unwrap();
        pad.push(buffer)
    });
    wait.recv().unwrap();
    // Once its first request is there, the second frame is waiting or about to.
    peer.wait_for(request);
    let start = Instant::now();
    end(&mut encoder.harness);
    let flow = pusher.join().unwrap();
    assert_eq!(flow, Err(gst::FlowError::Flushing));
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "took {:?}",
        start.elapsed()
    );
}

#[test]
fn a_flush_ends_a_wait_at_once() {
    ends_a_wait(|harness| assert!(harness.push_event(gst::event::FlushStart::new())));
}

#[test]
fn a_state_change_ends_a_wait_at_once() {
    ends_a_wait(|harness| {
        harness
            .element()
            .unwrap()
            .set_state(gst::State::Null)
            .unwrap();
    });
}

#[test]
fn encoding_goes_on_after_a_flush() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "");
    encoder.push().unwrap();
    encoder.pull();
    encoder.flush();
    encoder.push().unwrap();
    encoder.pull();
    assert_eq!(encoder.connection_states(), ["connected"]);
}

#[test]
fn a_beginning_is_marked_though_its_first_frame_is_lost() {
    let mut frames = 0;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            frames += 1;
            if frames % 3 == 1 {
                link.respond(1, request.pts, true, &[]);
            } else {
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
    for beginning in ["the start", "a flush"] {
        encoder.push().unwrap();
        for is_first in [true, false] {
            encoder.push().unwrap();
            let flags = encoder.pull().flags();
            let is_marked = flags.contains(gst::BufferFlags::DISCONT);
            assert_eq!(is_marked, is_first, "{beginning}");
        }
        encoder.flush();
    }
}

#[test]
fn a_failure_downstream_is_told_though_no_frame_follows() {
    let error = negotiation::with_filter(1, "identity error-after=1").expect("an error");
    assert!(error.contains("Failed after"), "{error}");
}

#[test]
fn a_flush_in_the_middle_leaves_nothing_behind() {
    for greets in [
        Greets::Legacy,
        Greets::With(hello(Capabilities::REQUEST_IDS)),
    ] {
        // Answers the first two with the third, which comes after the flush.
        let mut requests = Vec::new();
        let peer = Peer::greeting(greets, move |link, envelope| {
            if let Message::FrameRequest(request, _) = &envelope.message {
                requests.push(*request);
                if requests.len() >= 3 {
                    for request in requests.drain(..) {
                        link.answer(&request);
                    }
                    requests.extend([FrameRequest::default(); 2]);
                }
            }
            link.pong(envelope);
            Then::GoOn
        });
        let mut encoder = Encoder::new(peer.port(), "max-in-flight=4");
        encoder.push().unwrap();
        encoder.push().unwrap();
        for _ in 0..2 {
            peer.wait_for(request);
        }
        encoder.flush();
        encoder.push().unwrap();
        let buffer = encoder.pull();
        assert_eq!(buffer.pts(), Some(FRAME * 2));
        assert!(!buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
        assert!(encoder.harness.push_event(gst::event::Eos::new()));
        assert_eq!(encoder.harness.buffers_received(), 1);
        assert_eq!(encoder.stat("dropped"), 0);
    }
}

/// The running time of the force-key-unit event that left downstream.
fn key_unit(encoder: &mut Encoder) -> Option<gst::ClockTime> {
    std::iter::from_fn(|| encoder.harness.try_pull_event())
        .find_map(|event| gst_video::DownstreamForceKeyUnitEvent::parse(&event).ok())
        .and_then(|event| event.running_time)
}

#[test]
fn a_keyframe_asked_for_from_downstream_is_announced_with_its_time() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "keyframe-interval=0");
    encoder.push().unwrap();
    encoder.pull();
    assert_eq!(key_unit(&mut encoder), None);
    let event = gst_video::UpstreamForceKeyUnitEvent::builder()
        .all_headers(true)
        .count(7)
        .build();
    assert!(encoder.harness.push_upstream_event(event));
    encoder.push().unwrap();
    let buffer = encoder.pull();
    assert!(!buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert_eq!(key_unit(&mut encoder), buffer.pts());
}

#[test]
fn a_keyframe_asked_for_from_upstream_comes_at_its_time() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "keyframe-interval=0");
    encoder.push().unwrap();
    let event = gst_video::DownstreamForceKeyUnitEvent::builder()
        .running_time(FRAME * 3)
        .all_headers(true)
        .build();
    assert!(encoder.harness.push_event(event));
    for _ in 1..5 {
        encoder.push().unwrap();
    }
    let deltas: Vec<_> = (0..5)
        .map(|_| {
            let buffer = encoder.pull();
            buffer.flags().contains(gst::BufferFlags::DELTA_UNIT)
        })
        .collect();
    assert_eq!(deltas, [false, true, true, false, true]);
    assert_eq!(key_unit(&mut encoder), Some(FRAME * 3));
}

#[test]
fn frames_too_late_for_the_sink_are_not_sent() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "qos=true");
    encoder.push().unwrap();
    encoder.pull();
    // The sink was half a second late at the stream's begin.
    let half = gst::ClockTime::from_mseconds(500);
    let late = gst::event::Qos::new(
        gst::QOSType::Underflow,
        2.0,
        gst::ClockTimeDiff::try_from(half.nseconds()).unwrap(),
        Some(gst::ClockTime::ZERO),
    );
    assert!(encoder.harness.push_upstream_event(late));
    encoder.push().unwrap();
    encoder.frames = 600;
    encoder.push().unwrap();
    assert_eq!(encoder.pull().pts(), Some(FRAME * 600));
    assert_eq!(encoder.stat("dropped"), 1);
    let requests: Vec<_> = peer.seen().into_iter().filter_map(request).collect();
    assert_eq!(requests.len(), 2);
}

#[test]
fn events_before_a_frame_that_is_too_late_stay_behind_those_under_way() {
    let (go, gone) = channel();
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            gone.recv_timeout(LONG).unwrap();
            link.answer(request);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "qos=true");
    let (tell, left) = channel();
    let pad = encoder.element().static_pad("src").unwrap();
    let types = gst::PadProbeType::BUFFER | gst::PadProbeType::EVENT_DOWNSTREAM;
    pad.add_probe(types, move |_, info| {
        let what = match &info.data {
            Some(gst::PadProbeData::Buffer(_)) => "access unit",
            Some(gst::PadProbeData::Event(event)) if event.type_() == gst::EventType::Tag => "tag",
            _ => return gst::PadProbeReturn::Ok,
        };
        // A test that has failed no longer listens.
        let _ = tell.send(what);
        gst::PadProbeReturn::Ok
    });
    encoder.push().unwrap();
    let half = gst::ClockTime::from_mseconds(500);
    let late = gst::event::Qos::new(
        gst::QOSType::Underflow,
        2.0,
        gst::ClockTimeDiff::try_from(half.nseconds()).unwrap(),
        Some(gst::ClockTime::ZERO),
    );
    assert!(encoder.harness.push_upstream_event(late));
    let mut tags = gst::TagList::new();
    let title = tags.make_mut();
    title.add::<gst::tags::Title>(&"changed", gst::TagMergeMode::Append);
    assert!(encoder.harness.push_event(gst::event::Tag::new(tags)));
    let (pushed, is_pushed) = channel();
    let pushing = thread::spawn(move || {
        let _ = pushed.send(encoder.push());
        encoder
    });
    // It waits: that this is not over soon is all that can be seen of it.
    let soon = is_pushed.recv_timeout(Duration::from_millis(200));
    assert!(
        soon.is_err(),
        "the late frame was finished before the first"
    );
    go.send(()).unwrap();
    assert_eq!(left.recv_timeout(LONG), Ok("access unit"));
    assert_eq!(left.recv_timeout(LONG), Ok("tag"));
    is_pushed.recv_timeout(LONG).unwrap().unwrap();
    drop(pushing.join().unwrap());
}

/// What the element adds to the latency, at least and at most.
fn latency(encoder: &Encoder) -> (gst::ClockTime, Option<gst::ClockTime>) {
    let mut query = gst::query::Latency::new();
    assert!(encoder.element().query(&mut query));
    let (_, least, _) = query.result();
    // The harness, which is upstream, has no maximum: the query's is not the element's.
    let element = encoder.element();
    let (told, most) = element
        .downcast_ref::<gst_video::VideoEncoder>()
        .unwrap()
        .latency();
    assert_eq!(told, least);
    (least, most)
}

#[test]
fn latency_is_a_frame_at_first_and_then_what_the_host_takes() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
    encoder.push().unwrap();
    encoder.pull();
    assert_eq!(latency(&encoder), (FRAME, Some(FRAME)));
    // So many frames are taken before upstream has to wait.
    encoder.element().set_property("max-in-flight", 3u32);
    assert_eq!(latency(&encoder), (FRAME, Some(3 * FRAME)));
    encoder.element().set_property("max-in-flight", 1u32);
    // No host answers within 1 us, whatever may be in flight.
    encoder
        .harness
        .set_src_caps_str("video/x-raw,format=BGRx,width=64,height=48,framerate=1000000/1");
    for _ in 0..10 {
        encoder.push().unwrap();
        encoder.pull();
    }
    let (least, most) = latency(&encoder);
    assert!(least > gst::ClockTime::from_useconds(1), "{least}");
    assert_eq!(most, Some(least));
}

#[test]
fn latency_is_at_most_what_the_host_takes_at_once() {
    let one = Hello {
        max_in_flight: 1,
        ..hello(Capabilities::REQUEST_IDS)
    };
    let peer = Peer::greeting(Greets::With(one), |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.answer(request);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=16");
    encoder.push().unwrap();
    encoder.pull();
    assert_eq!(latency(&encoder), (FRAME, Some(FRAME)));
}

#[test]
fn latency_is_not_what_downstream_takes() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=16");
    // No host answers within 1 us: what is reported is what the answers took.
    encoder
        .harness
        .set_src_caps_str("video/x-raw,format=BGRx,width=64,height=48,framerate=1000000/1");
    let (pad, probe, blocked) = encoder.block();
    let start = Instant::now();
    for _ in 0..16 {
        encoder.push().unwrap();
    }
    blocked.recv_timeout(LONG).unwrap();
    encoder.wait_for_answers();
    let answered = start.elapsed();
    // Downstream takes the first one after twice that time, and those behind it have waited, too.
    while start.elapsed() < 2 * answered {
        thread::yield_now();
    }
    pad.remove_probe(probe);
    for _ in 0..16 {
        encoder.pull();
    }
    let least = latency(&encoder).0;
    let most = gst::ClockTime::try_from(answered).unwrap() + gst::ClockTime::USECOND;
    assert!(least <= most, "{least} is more than {most}");
    assert!(least > gst::ClockTime::USECOND);
}

#[test]
fn the_host_is_talked_to_while_downstream_is_blocked() {
    // Answers the first frame when it has the second, and that when it is asked for a sign of
    // life again.
    let mut open: Vec<FrameRequest> = Vec::new();
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            open.push(*request);
            if let [first, _] = open[..] {
                link.answer(&first);
            }
        }
        if link.pong(envelope)
            && let [_, second] = open[..]
        {
            link.answer(&second);
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=2 timeout=1000");
    let (pad, probe, blocked) = encoder.block();
    encoder.push().unwrap();
    encoder.push().unwrap();
    assert_eq!(peer.wait_for(config).bitrate, 4_000_000);
    peer.wait_for(request);
    peer.wait_for(request);
    blocked.recv_timeout(LONG).unwrap();
    encoder.element().set_property("bitrate", 500_000);
    assert_eq!(peer.wait_for(config).bitrate, 500_000);
    peer.wait_for(|seen| match seen {
        Seen::Message(envelope) => matches!(envelope.message, Message::Ping).then_some(()),
        _ => None,
    });
    // Its answer is read, too.
    encoder.wait_for_answers();
    pad.remove_probe(probe);
    encoder.pull();
    encoder.pull();
    assert_eq!(
        (encoder.stat("reconnects"), encoder.stat("dropped")),
        (0, 0)
    );
}

#[test]
fn a_blocked_downstream_does_not_hold_up_stopping() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "");
    let (_pad, _probe, blocked) = encoder.block();
    encoder.push().unwrap();
    blocked.recv_timeout(LONG).unwrap();
    encoder.element().set_state(gst::State::Null).unwrap();
}

/// Flushes a pipeline whose host does what it does to it, and stops it, and expects that both are
/// over soon and no error.
fn flushes_and_stops_at_once(peer: &Peer, properties: &str, when: impl FnOnce(&Peer)) {
    stops_at_once(peer, properties, when, true);
}

fn stops_at_once(peer: &Peer, properties: &str, when: impl FnOnce(&Peer), flush: bool) {
    init();
    let pipeline = gst::parse::launch(&format!(
        "videotestsrc ! video/x-raw,format=NV12,width=64,height=48 ! \
         vsockenc name=e tcp-host=127.0.0.1 tcp-port={} {properties} ! fakesink sync=false",
        peer.port()
    ))
    .unwrap()
    .downcast::<gst::Pipeline>()
    .unwrap();
    let pad = pipeline.by_name("e").unwrap().static_pad("sink").unwrap();
    let (tell, caps) = channel();
    pad.add_probe(gst::PadProbeType::EVENT_DOWNSTREAM, move |_, info| {
        if info.event().unwrap().type_() == gst::EventType::Caps {
            tell.send(()).unwrap();
        }
        gst::PadProbeReturn::Ok
    });
    let bus = pipeline.bus().unwrap();
    let (tell, errors) = channel();
    bus.set_sync_handler(move |_, message| {
        if let gst::MessageView::Error(error) = message.view() {
            // The test may be over.
            let _ = tell.send(format!("{error:?}"));
        }
        gst::BusSyncReply::Drop
    });
    pipeline.set_state(gst::State::Playing).unwrap();
    caps.recv_timeout(LONG).unwrap();
    when(peer);
    let start = Instant::now();
    if flush {
        assert!(pad.send_event(gst::event::FlushStart::new()));
        // Comes through once the streaming thread has left.
        assert!(pad.send_event(gst::event::FlushStop::new(true)));
    }
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(errors.try_iter().collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn a_flush_that_ends_while_the_element_stops_does_not_hold_it_up() {
    let peer = Peer::new(|_, envelope| match envelope.message {
        Message::FrameRequest(..) => Then::PlayDead,
        _ => Then::GoOn,
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=0 max-in-flight=1");
    encoder.push().unwrap();
    let buffer = encoder.buffer(64 * 48 * 4, 1);
    let element = encoder.element();
    let [sink, src] = ["sink", "src"].map(|name| element.static_pad(name).unwrap());
    // The source pad is deactivated first, and that waits for this.
    let held = src.stream_lock();
    let stopping = thread::spawn(move || element.set_state(gst::State::Null).is_ok());
    let deadline = Instant::now() + LONG;
    while src.is_active() {
        assert!(Instant::now() < deadline, "the element does not stop");
        thread::yield_now();
    }
    // It gets no further than the element.
    sink.send_event(gst::event::FlushStop::new(false));
    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
    sink.send_event(gst::event::Segment::new(&segment));
    let (tell, pushed) = channel();
    let pad = sink.clone();
    thread::spawn(move || tell.send(pad.chain(buffer)));
    let flow = pushed.recv_timeout(LONG);
    drop(held);
    // Lets it go where it waits for the host.
    sink.send_event(gst::event::FlushStart::new());
    assert_eq!(flow, Ok(Err(gst::FlowError::Flushing)));
    assert!(stopping.join().unwrap());
}

#[test]
fn flushes_and_states_are_immediate_while_the_host_is_greeted() {
    for flush in [true, false] {
        let peer = Peer::greeting(Greets::Script, |_, _| Then::GoOn);
        let greeted = |peer: &Peer| {
            peer.wait_for(|seen| matches!(seen, Seen::Message(_)).then_some(()));
        };
        stops_at_once(&peer, "timeout=0", greeted, flush);
    }
}

#[test]
fn flushes_and_states_are_immediate_while_the_host_is_dead() {
    let peer = Peer::new(|_, envelope| match envelope.message {
        Message::FrameRequest(..) => Then::PlayDead,
        _ => Then::GoOn,
    });
    flushes_and_stops_at_once(&peer, "timeout=0", |peer| {
        peer.wait_for(request);
    });
}

#[test]
fn flushes_and_states_are_immediate_while_the_host_is_called_again() {
    // Nobody greets the second client.
    let mut clients = 0;
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        match envelope.message {
            Message::Hello(_) => clients += 1,
            Message::FrameRequest(..) => return Then::Close,
            _ if clients == 1 => {
                link.pong(envelope);
            }
            _ => {}
        }
        Then::GoOn
    });
    flushes_and_stops_at_once(&peer, "timeout=0 reconnect-timeout=3600000", |peer| {
        for _ in 0..2 {
            peer.wait_for(|seen| matches!(seen, Seen::Connected).then_some(()));
        }
    });
}
