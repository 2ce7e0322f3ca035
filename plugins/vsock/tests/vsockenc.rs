// SPDX-License-Identifier: MIT OR Apache-2.0

//! vsockenc against hosts that behave as a test tells them. What a real encoder makes of its
//! requests is tested in tests/end_to_end.rs.

use std::sync::Once;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst_check::Harness;
use gst_video::prelude::*;
use helix_protocol::message::{Config, ErrorCode, ErrorMessage, FrameRequest};
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{DELTA, Greets, KEYFRAME, LONG, Peer, Seen, Then};

const FRAME: gst::ClockTime = gst::ClockTime::from_nseconds(16_666_667);

fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstvsock::plugin_register_static().unwrap();
    });
}

struct Encoder {
    harness: Harness,
    bus: gst::Bus,
    frames: u64,
    /// States of the `helix-connection` messages seen so far.
    states: Vec<String>,
}

impl Drop for Encoder {
    fn drop(&mut self) {
        // Messages that nobody has read hold the element, which holds the bus.
        self.bus.set_flushing(true);
    }
}

impl Encoder {
    fn new(port: u32, properties: &str) -> Self {
        Self::with(&format!("tcp-host=127.0.0.1 tcp-port={port} {properties}"))
    }

    fn with(properties: &str) -> Self {
        init();
        let bin =
            gst::parse::bin_from_description(&format!("vsockenc {properties}"), true).unwrap();
        let bus = gst::Bus::new();
        // Before it starts: the first message comes then.
        bin.set_bus(Some(&bus));
        let mut harness = Harness::with_element(&bin, Some("sink"), Some("src"));
        harness.set_src_caps_str("video/x-raw,format=BGRx,width=64,height=48,framerate=60/1");
        Self {
            harness,
            bus,
            frames: 0,
            states: Vec::new(),
        }
    }

    fn element(&self) -> gst::Element {
        let bin = self.harness.element().and_downcast::<gst::Bin>().unwrap();
        bin.iterate_elements().next().unwrap().unwrap()
    }

    fn buffer(&mut self, size: usize, value: u8) -> gst::Buffer {
        let mut buffer = gst::Buffer::from_mut_slice(vec![value; size]);
        let writable = buffer.get_mut().unwrap();
        writable.set_pts(FRAME * self.frames);
        writable.set_duration(FRAME);
        self.frames += 1;
        buffer
    }

    fn push(&mut self) -> Result<gst::FlowSuccess, gst::FlowError> {
        let value = self.frames as u8;
        let buffer = self.buffer(64 * 48 * 4, value);
        self.harness.push(buffer)
    }

    /// The next buffer out; fails the test where none comes.
    fn pull(&mut self) -> gst::Buffer {
        self.harness.pull().expect("an encoded frame")
    }

    /// The next message of one of the two types; keeps the connection's states.
    fn message(&mut self, wanted: gst::MessageType, wait: Duration) -> Option<gst::Message> {
        loop {
            let types = [wanted, gst::MessageType::Element];
            // The bindings' timed_pop_filtered() does not look at the queue without a timeout.
            let message = if wait.is_zero() {
                self.bus.pop_filtered(&types)?
            } else {
                self.bus
                    .timed_pop_filtered(gst::ClockTime::try_from(wait).unwrap(), &types)?
            };
            if message.type_() == wanted {
                return Some(message);
            }
            self.states.extend(
                message
                    .structure()
                    .and_then(|s| s.get::<String>("state").ok()),
            );
        }
    }

    /// The text of the error on the bus.
    fn error(&mut self) -> String {
        let message = self
            .message(gst::MessageType::Error, LONG)
            .expect("an error on the bus");
        let gst::MessageView::Error(error) = message.view() else {
            unreachable!()
        };
        format!("{} {:?}", error.error(), error.debug())
    }

    fn connection_states(&mut self) -> &[String] {
        self.message(gst::MessageType::Error, Duration::ZERO);
        &self.states
    }

    fn stat(&self, name: &str) -> u64 {
        self.element()
            .property::<gst::Structure>("stats")
            .get(name)
            .unwrap()
    }
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

fn config(seen: Seen) -> Option<Config> {
    match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::ConfigReq(config) => Some(config),
            _ => None,
        },
        _ => None,
    }
}

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
fn caps_say_what_the_stream_says() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "");
    encoder.push().unwrap();
    encoder.pull();
    let caps = encoder
        .harness
        .sinkpad()
        .unwrap()
        .current_caps()
        .unwrap()
        .to_string();
    // 1280x720 is what the stream's parameter set says; 60/1 is what came in.
    for field in [
        "stream-format=(string)byte-stream",
        "alignment=(string)au",
        "width=(int)1280",
        "height=(int)720",
        "profile=(string)constrained-baseline",
        "level=(string)3.1",
        "framerate=(fraction)60/1",
    ] {
        assert!(caps.contains(field), "{field} is not in {caps}");
    }
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
    let mut encoder = Encoder::new(peer.port(), "timeout=300");
    for _ in 0..3 {
        encoder.push().unwrap();
    }
    assert!(encoder.harness.push_event(gst::event::Eos::new()));
    assert_eq!(encoder.harness.buffers_received(), 2);
    assert_eq!(encoder.connection_states(), ["connected"]);
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
fn a_frame_over_the_limit_is_refused_by_name() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "");
    encoder
        .harness
        .set_src_caps_str("video/x-raw,format=BGRx,width=8192,height=4096,framerate=60/1");
    let error = encoder.error();
    assert!(
        error.contains("over the host's limit of 67108864 bytes"),
        "{error}"
    );
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

/// Runs `end` while a frame waits for a silent host, and expects that it is over soon.
fn ends_a_wait(end: impl FnOnce(&mut Harness)) {
    let peer = Peer::new(|_, _| Then::GoOn);
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1 timeout=0");
    encoder.push().unwrap();
    let pad = encoder.harness.srcpad().unwrap().clone();
    let buffer = encoder.buffer(64 * 48 * 4, 0);
    let (entered, wait) = std::sync::mpsc::channel();
    let pusher = std::thread::spawn(move || {
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
    assert!(encoder.harness.push_event(gst::event::FlushStart::new()));
    assert!(encoder.harness.push_event(gst::event::FlushStop::new(true)));
    let mut segment = gst::FormattedSegment::<gst::ClockTime>::new();
    segment.set_start(gst::ClockTime::ZERO);
    assert!(
        encoder
            .harness
            .push_event(gst::event::Segment::new(&segment))
    );
    encoder.push().unwrap();
    encoder.pull();
    assert_eq!(encoder.connection_states(), ["connected"]);
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
    let mut encoder = Encoder::new(peer.port(), "timeout=200 max-in-flight=1");
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

#[test]
fn frames_dropped_before_the_first_keyframe_are_let_go_with_it() {
    const REFUSED: i64 = 50;
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.pts < REFUSED * FRAME.nseconds() as i64 {
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
    let held = |encoder: &Encoder| {
        let encoder = encoder
            .element()
            .downcast::<gst_video::VideoEncoder>()
            .unwrap();
        (0..60)
            .filter(|number| encoder.frame(*number).is_some())
            .count()
    };
    for _ in 0..REFUSED {
        encoder.push().unwrap();
    }
    encoder.push().unwrap();
    encoder.pull();
    encoder.push().unwrap();
    encoder.pull();
    assert!(held(&encoder) <= 1, "{} frames are held", held(&encoder));
}

/// Runs frames through a caps filter behind the element to EOS or an error, whose text is returned.
fn with_filter(frames: u32, filter: &str) -> Option<String> {
    init();
    let peer = Peer::answering();
    let pipeline = gst::parse::launch(&format!(
        "videotestsrc num-buffers={frames} ! video/x-raw,format=NV12,width=64,height=48 ! \
         vsockenc tcp-host=127.0.0.1 tcp-port={} ! {filter} ! fakesink",
        peer.port()
    ))
    .unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let bus = pipeline.bus().unwrap();
    let message = bus
        .timed_pop_filtered(
            gst::ClockTime::try_from(LONG).unwrap(),
            &[gst::MessageType::Error, gst::MessageType::Eos],
        )
        .expect("an end");
    pipeline.set_state(gst::State::Null).unwrap();
    bus.set_flushing(true);
    match message.view() {
        gst::MessageView::Error(error) => Some(error.error().to_string()),
        _ => None,
    }
}

#[test]
fn a_profile_that_the_host_cannot_meet_is_named_even_by_the_last_frame() {
    for frames in [1, 2, 50] {
        let error = with_filter(frames, "video/x-h264,profile=high-4:4:4").expect("an error");
        assert!(error.contains("constrained-baseline"), "{error}");
        assert!(error.contains("downstream takes only"), "{error}");
    }
}

#[test]
fn a_wider_profile_than_the_streams_is_met() {
    for profile in ["constrained-baseline", "baseline", "main", "high"] {
        let error = with_filter(5, &format!("video/x-h264,profile={profile}"));
        assert_eq!(error, None, "{profile}");
    }
}

#[test]
fn a_failure_downstream_is_told_though_no_frame_follows() {
    let error = with_filter(1, "identity error-after=1").expect("an error");
    assert!(error.contains("Failed after"), "{error}");
}
