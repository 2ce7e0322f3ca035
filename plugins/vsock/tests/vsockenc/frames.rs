// SPDX-License-Identifier: MIT OR Apache-2.0

//! Frames out, access units in.

use std::sync::mpsc::channel;
use std::time::Duration;

use gst::prelude::*;
use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage, FrameRequest, FrameResponse};
use helix_protocol::{Agreement, Message, encode};
use zerocopy_test_support::peer::{DELTA, Greets, KEYFRAME, LONG, Peer, Seen, Then, hello};

use super::*;

#[test]
fn a_reply_comes_out_without_waiting_for_the_next_frame() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "");
    encoder.push().unwrap();
    let buffer = encoder.pull();
    assert_eq!(&*buffer.map_readable().unwrap(), KEYFRAME);
    assert_eq!(buffer.pts(), Some(gst::ClockTime::ZERO));
    assert!(!buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
    encoder.push().unwrap();
    let buffer = encoder.pull();
    assert_eq!(&*buffer.map_readable().unwrap(), DELTA);
    assert_eq!(buffer.pts(), Some(FRAME));
    assert_eq!(buffer.dts(), Some(FRAME));
    assert_eq!(buffer.duration(), Some(FRAME));
    assert!(buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert_eq!(encoder.stat("frames"), 2);
    assert_eq!(encoder.stat("pixel-bytes"), 2 * 64 * 48 * 4);
    assert_eq!(encoder.connection_states(), ["connected"]);
}

#[test]
fn the_request_carries_the_frame() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "bitrate=1234567");
    for _ in 0..3 {
        encoder.push().unwrap();
        encoder.pull();
    }
    let config = peer.wait_for(config);
    assert_eq!(
        (config.width, config.height, config.bitrate),
        (64, 48, 1_234_567)
    );
    assert_eq!((config.framerate_num, config.framerate_den), (60, 1));
    for number in 0..3 {
        let (request, pixels) = peer.wait_for(|seen| match seen {
            Seen::Message(envelope) => match envelope.message {
                Message::FrameRequest(request, pixels) => Some((request, pixels.unwrap())),
                _ => None,
            },
            _ => None,
        });
        assert_eq!(
            (request.width, request.height, request.stride),
            (64, 48, 256)
        );
        assert_eq!(request.format, 0x3432_5241, "AR24");
        assert_eq!(request.resource_id, 0);
        assert_eq!(request.pts, (FRAME * number).nseconds() as i64);
        assert_eq!(request.duration, FRAME.nseconds() as i64);
        assert_eq!(request.force_keyframe, number == 0);
        assert_eq!(pixels.len(), 64 * 48 * 4);
        assert!(pixels.iter().all(|&byte| byte == number as u8));
    }
}

#[test]
fn padding_that_the_host_does_not_take_is_not_sent() {
    const SIZE: u32 = 64 * 48 * 4;
    let mut theirs = hello(Capabilities::REQUEST_IDS);
    theirs.max_message = Agreement::legacy().max_message - Agreement::legacy().max_pixels() + SIZE;
    let peer = Peer::greeting(Greets::With(theirs), |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            link.answer(request);
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "");
    let mut buffer = encoder.buffer(320 * 48, 1);
    gst_video::VideoMeta::add_full(
        buffer.get_mut().unwrap(),
        gst_video::VideoFrameFlags::empty(),
        gst_video::VideoFormat::Bgrx,
        64,
        48,
        &[0],
        &[320],
    )
    .unwrap();
    encoder.harness.push(buffer).unwrap();
    encoder.pull();
    let request = peer.wait_for(request);
    assert_eq!(request.stride, 256);
    assert_eq!(encoder.stat("pixel-bytes"), u64::from(SIZE));
}

#[test]
fn no_more_frames_are_open_than_permitted() {
    // Answers a request only when the next one has come.
    let mut last: Option<FrameRequest> = None;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message
            && let Some(last) = last.replace(*request)
        {
            link.answer(&last);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=2 timeout=60000");
    for _ in 0..5 {
        encoder.push().unwrap();
        assert!(encoder.stat("in-flight") <= 2);
    }
    for _ in 0..4 {
        encoder.pull();
    }
}

#[test]
fn a_reply_that_fits_a_later_request_says_that_others_were_skipped() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            let number = request.pts / FRAME.nseconds() as i64;
            if number % 3 != 1 {
                // Deployed hosts' PTS went through double-precision seconds (quirk 3).
                link.respond(1, request.pts - 1, request.force_keyframe, KEYFRAME);
            }
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=4");
    for _ in 0..9 {
        encoder.push().unwrap();
    }
    let numbers: Vec<_> = (0..6)
        .map(|_| encoder.pull().pts().unwrap().nseconds() / FRAME.nseconds())
        .collect();
    assert_eq!(numbers, [0, 2, 3, 5, 6, 8]);
    assert_eq!(encoder.stat("dropped"), 3);
}

#[test]
fn what_a_host_says_of_dts_is_not_believed() {
    let mut nonsense = [0, i64::MIN, i64::MAX, -1].into_iter().cycle();
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            let response = FrameResponse {
                pts: request.pts,
                dts: nonsense.next().unwrap(),
                is_keyframe: request.force_keyframe,
                ..FrameResponse::default()
            };
            link.reply(1, &response, KEYFRAME);
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "");
    for number in 0..8 {
        encoder.push().unwrap();
        let buffer = encoder.pull();
        let time = Some(FRAME * number);
        assert_eq!((buffer.pts(), buffer.dts()), (time, time));
    }
}

#[test]
fn frames_without_times_come_back_in_order() {
    let mut number = 0;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            number += 1;
            link.respond(1, request.pts, number == 1, &[KEYFRAME, &[number]].concat());
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=4");
    for _ in 0..9 {
        let buffer = gst::Buffer::from_slice([0; 64 * 48 * 4]);
        encoder.harness.push(buffer).unwrap();
    }
    for number in 1..=9 {
        assert_eq!(encoder.pull().map_readable().unwrap().last(), Some(&number));
    }
}

#[test]
fn a_missing_reply_loses_only_its_own_frame_where_frames_have_no_times() {
    let mut number = 0;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            number += 1;
            if number != 2 {
                link.respond(1, request.pts, true, &[KEYFRAME, &[number]].concat());
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1 timeout=1500");
    for _ in 0..6 {
        let buffer = gst::Buffer::from_slice([0; 64 * 48 * 4]);
        encoder.harness.push(buffer).unwrap();
    }
    for number in [1, 3, 4, 5, 6] {
        assert_eq!(encoder.pull().map_readable().unwrap().last(), Some(&number));
    }
    assert_eq!(encoder.stat("dropped"), 1);
}

#[test]
fn a_legacy_hosts_second_reply_to_a_request_is_nobodys() {
    // Answers a request twice when the next one is open.
    let mut last: Option<FrameRequest> = None;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message
            && let Some(last) = last.replace(*request)
        {
            let number = last.pts as u64 / FRAME.nseconds();
            let data = [KEYFRAME, &[number as u8 + 1]].concat();
            for _ in 0..2 {
                link.respond(1, last.pts, true, &data);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=2");
    for _ in 0..20 {
        encoder.push().unwrap();
    }
    for number in 0..19 {
        let buffer = encoder.pull();
        assert_eq!(buffer.pts(), Some(FRAME * number));
        let data = buffer.map_readable().unwrap();
        assert_eq!(data.last(), Some(&(number as u8 + 1)));
    }
    assert_eq!(encoder.stat("dropped"), 0);
    // The last one may still be on its way.
    assert!(encoder.stat("unmatched") >= 18);
}

#[test]
fn an_error_loses_only_the_oldest_open_frame() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.pts == FRAME.nseconds() as i64 {
                let code = ErrorCode::ENCODE_FAILED;
                let text = "no luck".to_owned();
                link.send(encode::error(
                    1,
                    &ErrorMessage {
                        code,
                        text,
                        tag: None,
                    },
                ));
            } else {
                link.answer(request);
            }
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "");
    for _ in 0..4 {
        encoder.push().unwrap();
    }
    let pts: Vec<_> = (0..3).map(|_| encoder.pull().pts().unwrap()).collect();
    let message = encoder
        .message(gst::MessageType::Warning, LONG)
        .expect("a warning");
    let gst::MessageView::Warning(warning) = message.view() else {
        unreachable!()
    };
    assert!(
        warning.error().to_string().contains("no luck"),
        "{warning:?}"
    );
    assert_eq!(pts, [gst::ClockTime::ZERO, FRAME * 2, FRAME * 3]);
    assert_eq!((encoder.stat("errors"), encoder.stat("dropped")), (1, 1));
}

#[test]
fn a_missing_last_reply_does_not_hold_up_eos() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message
            && request.pts < 2 * FRAME.nseconds() as i64
        {
            link.answer(request);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=1000");
    for _ in 0..3 {
        encoder.push().unwrap();
    }
    assert!(encoder.harness.push_event(gst::event::Eos::new()));
    assert_eq!(encoder.harness.buffers_received(), 2);
    assert_eq!(encoder.connection_states(), ["connected"]);
}

#[test]
fn a_late_reply_is_nobody_elses() {
    // Frame 2 is answered after it was given up, together with frame 3.
    let mut held = None;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.pts == 2 * FRAME.nseconds() as i64 {
                held = Some(*request);
            } else {
                if let Some(late) = held.take() {
                    link.respond(1, late.pts, false, b"\0\0\0\x01late");
                }
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "timeout=1000 max-in-flight=1");
    for _ in 0..3 {
        encoder.push().unwrap();
    }
    // Waits for its slot until frame 2 is given up.
    encoder.push().unwrap();
    encoder.push().unwrap();
    let numbers: Vec<_> = (0..4)
        .map(|_| encoder.pull())
        .map(|buffer| {
            assert!(!buffer.map_readable().unwrap().ends_with(b"late"));
            buffer.pts().unwrap().nseconds() / FRAME.nseconds()
        })
        .collect();
    assert_eq!(numbers, [0, 1, 3, 4]);
    assert_eq!(encoder.stat("dropped"), 1);
    // What came too late may be what the next frames refer to.
    let forced: Vec<_> = (0..5)
        .map(|_| peer.wait_for(request).force_keyframe)
        .collect();
    assert_eq!(forced, [true, false, false, false, true]);
}

#[test]
fn frames_refused_before_the_first_keyframe_cost_only_themselves() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.pts < 3 * FRAME.nseconds() as i64 {
                let code = ErrorCode::NOT_CONFIGURED;
                link.send(encode::error(
                    1,
                    &ErrorMessage {
                        code,
                        text: String::new(),
                        tag: None,
                    },
                ));
            } else {
                link.answer(request);
            }
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
    for _ in 0..4 {
        encoder.push().unwrap();
    }
    // The keyframe that the first one asked for is asked for again.
    let buffer = encoder.pull();
    assert_eq!(buffer.pts(), Some(FRAME * 3));
    assert!(!buffer.flags().contains(gst::BufferFlags::DELTA_UNIT));
    assert!(
        encoder
            .message(gst::MessageType::Error, Duration::ZERO)
            .is_none()
    );
    assert_eq!(encoder.stat("dropped"), 3);
}

#[test]
fn frames_dropped_before_the_first_keyframe_are_let_go_at_once() {
    use gst::EventType::{Caps, Segment, StreamStart, Tag};
    const REFUSED: u64 = 50;
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.pts < (FRAME * REFUSED).nseconds() as i64 {
                let code = ErrorCode::NOT_CONFIGURED;
                link.send(encode::error(
                    1,
                    &ErrorMessage {
                        code,
                        text: String::new(),
                        tag: None,
                    },
                ));
            } else {
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
    let pad = encoder.element().static_pad("src").unwrap();
    let (tell, events) = channel();
    pad.add_probe(gst::PadProbeType::EVENT_DOWNSTREAM, move |_, info| {
        tell.send(info.event().unwrap().type_()).unwrap();
        gst::PadProbeReturn::Ok
    });
    for number in 0..REFUSED {
        if number == REFUSED / 2 {
            // Events of a dropped frame are not dropped.
            let mut tags = gst::TagList::new();
            let title = tags.get_mut().unwrap();
            title.add::<gst::tags::Title>(&"later", gst::TagMergeMode::Append);
            assert!(encoder.harness.push_event(gst::event::Tag::new(tags)));
        }
        encoder.push().unwrap();
    }
    // The first one and that with the tag hold events; the last one may be under way.
    let element = encoder.element();
    let element = element.downcast::<gst_video::VideoEncoder>().unwrap();
    let held = element.frames().len();
    assert!(held <= 3, "{held} frames are held");
    assert_eq!(events.try_iter().next(), None, "before there are caps");
    encoder.push().unwrap();
    encoder.pull();
    encoder.push().unwrap();
    encoder.pull();
    let held = element.frames().len();
    assert!(held <= 1, "{held} frames are held");
    let events: Vec<_> = events.try_iter().collect();
    assert_eq!(events, [StreamStart, Caps, Segment, Tag]);
    assert_eq!(encoder.stat("dropped"), REFUSED);
    let error = encoder.message(gst::MessageType::Error, Duration::ZERO);
    assert!(error.is_none(), "{error:?}");
}

#[test]
fn a_bitrate_set_while_playing_reaches_the_host() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "");
    encoder.push().unwrap();
    encoder.pull();
    assert_eq!(peer.wait_for(config).bitrate, 4_000_000);
    encoder.element().set_property("bitrate", 500_000);
    assert_eq!(peer.wait_for(config).bitrate, 500_000);
}

#[test]
fn a_bitrate_set_while_the_host_is_greeted_reaches_it() {
    init();
    let (go, gone) = channel();
    let peer = Peer::greeting(Greets::Script, move |link, envelope| {
        if matches!(envelope.message, Message::Ping) {
            gone.recv_timeout(LONG).unwrap();
        }
        link.pong(envelope);
        Then::GoOn
    });
    let pipeline = gst::parse::launch(&format!(
        "videotestsrc num-buffers=1 ! video/x-raw,format=NV12,width=64,height=48 ! \
         vsockenc name=e tcp-host=127.0.0.1 tcp-port={} ! fakesink",
        peer.port()
    ))
    .unwrap()
    .downcast::<gst::Pipeline>()
    .unwrap();
    let element = pipeline.by_name("e").unwrap();
    // With the format comes the question for the profile, the only one without a filter; behind it
    // the host is waited for.
    let (tell, format) = channel();
    let pad = element.static_pad("src").unwrap();
    pad.add_probe(gst::PadProbeType::QUERY_DOWNSTREAM, move |_, info| {
        if let gst::QueryView::Caps(query) = info.query().unwrap().view()
            && query.filter().is_none()
        {
            // The test may have heard enough.
            let _ = tell.send(());
        }
        gst::PadProbeReturn::Ok
    });
    pipeline.set_state(gst::State::Playing).unwrap();
    format.recv_timeout(LONG).unwrap();
    element.set_property("bitrate", 500_000);
    go.send(()).unwrap();
    assert_eq!(peer.wait_for(config).bitrate, 500_000);
    pipeline.set_state(gst::State::Null).unwrap();
}

#[test]
fn transfers_that_are_not_built_are_refused() {
    init();
    for transfer in ["fd", "resource-id"] {
        let element = gst::ElementFactory::make("vsockenc")
            .property_from_str("transfer", transfer)
            .build()
            .unwrap();
        assert!(element.set_state(gst::State::Paused).is_err(), "{transfer}");
        element.set_state(gst::State::Null).unwrap();
    }
}

#[test]
fn a_token_that_no_host_takes_is_refused_at_the_start() {
    init();
    let bus = gst::Bus::new();
    let element = gst::ElementFactory::make("vsockenc")
        .property("socket-path", "/nowhere/host.sock")
        .property("auth-token", "x".repeat(1025))
        .build()
        .unwrap();
    element.set_bus(Some(&bus));
    assert!(element.set_state(gst::State::Paused).is_err());
    let message = bus.pop_filtered(&[gst::MessageType::Error]).unwrap();
    let gst::MessageView::Error(error) = message.view() else {
        unreachable!()
    };
    let said = error.debug().unwrap();
    assert!(said.contains("auth-token has 1025 bytes"), "{said}");
    element.set_state(gst::State::Null).unwrap();
}
