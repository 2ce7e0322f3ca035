// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the caps say, upstream and down.

use gst::prelude::*;
use helix_protocol::Message;
use helix_protocol::message::Capabilities;
use zerocopy_test_support::peer::{Greets, Hello, LONG, Peer, Seen, Then, hello};

use super::*;

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
fn the_host_is_told_the_rate_that_the_caps_promise() {
    for (rates, num, den) in [
        ("framerate=30000/1001", 30_000, 1001),
        ("framerate=0/1", 60, 1),
        ("framerate=0/1,max-framerate=50/1", 50, 1),
        ("framerate=30/1,max-framerate=50/1", 50, 1),
        ("framerate=30/1,max-framerate=0/1", 30, 1),
    ] {
        let peer = Peer::answering();
        let mut encoder = Encoder::new(peer.port(), "");
        peer.wait_for(config);
        encoder.harness.set_src_caps_str(&format!(
            "video/x-raw,format=BGRx,width=32,height=16,{rates}"
        ));
        let config = peer.wait_for(config);
        assert_eq!(
            (config.framerate_num, config.framerate_den),
            (num, den),
            "{rates}"
        );
    }
}

#[test]
fn the_host_is_told_the_profile_that_downstream_takes() {
    for (filter, profile) in [
        ("video/x-h264", 77),
        ("video/x-h264,profile=constrained-baseline", 66),
        ("video/x-h264,profile=(string){main,high}", 77),
        ("video/x-h264,profile=high", 100),
    ] {
        let peer = Peer::answering();
        let mut harness = Harness::new_parse(&format!(
            "vsockenc tcp-host=127.0.0.1 tcp-port={} ! capsfilter caps=\"{filter}\"",
            peer.port()
        ));
        harness.set_src_caps_str("video/x-raw,format=BGRx,width=64,height=48,framerate=60/1");
        assert_eq!(peer.wait_for(config).profile, profile, "{filter}");
    }
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
fn interlaced_video_is_refused_by_name() {
    let peer = Peer::answering();
    for mode in ["interleaved", "mixed"] {
        let mut encoder = Encoder::new(peer.port(), "");
        encoder.harness.set_src_caps_str(&format!(
            "video/x-raw,format=BGRx,width=64,height=48,framerate=60/1,interlace-mode={mode}"
        ));
        let error = encoder.error();
        assert!(error.contains(&format!("interlace-mode={mode}")), "{error}");
        assert!(error.contains("deinterlace"), "{error}");
    }
}

/// Runs frames through a caps filter behind the element to EOS or an error, whose text is returned.
pub fn with_filter(frames: u32, filter: &str) -> Option<String> {
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
fn the_limits_that_a_host_announces_are_named() {
    for (theirs, said) in [
        (
            Hello {
                max_width: 1280,
                max_height: 720,
                ..hello(Capabilities(0))
            },
            "over the host's limit of 1280x720 pixels",
        ),
        (
            Hello {
                max_message: 1920 * 1080 * 4,
                ..hello(Capabilities(0))
            },
            "over the host's limit of 8294344 bytes; scale it down, or send NV12",
        ),
    ] {
        let peer = Peer::greeting(Greets::With(theirs), |link, envelope| {
            link.pong(envelope);
            Then::GoOn
        });
        let mut encoder = Encoder::new(peer.port(), "");
        encoder
            .harness
            .set_src_caps_str("video/x-raw,format=BGRx,width=1920,height=1080,framerate=60/1");
        let error = encoder.error();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn a_host_may_take_more_than_a_legacy_one() {
    let peer = Peer::greeting(Greets::With(hello(Capabilities(0))), |link, envelope| {
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(peer.port(), "");
    encoder
        .harness
        .set_src_caps_str("video/x-raw,format=BGRx,width=6000,height=4096,framerate=60/1");
    peer.wait_for(|seen| config(seen).filter(|config| config.width == 6000));
}

#[test]
fn the_token_goes_to_the_host_and_shows_nowhere() {
    let peer = Peer::greeting(Greets::Script, |link, envelope| {
        link.pong(envelope);
        Then::GoOn
    });
    let encoder = Encoder::new(peer.port(), "auth-token=s3cret");
    let token = peer.wait_for(|seen| match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::Hello(hello) => hello.auth_token,
            _ => None,
        },
        _ => None,
    });
    assert_eq!(token.0, b"s3cret");
    let element = encoder.element();
    let pspec = element.find_property("auth-token").unwrap();
    assert!(!pspec.flags().contains(gst::glib::ParamFlags::READABLE));
    let bin = encoder
        .harness
        .element()
        .and_downcast::<gst::Bin>()
        .unwrap();
    let dump = bin.debug_to_dot_data(gst::DebugGraphDetails::all());
    let stats = element.property::<gst::Structure>("stats");
    for text in [dump.to_string(), stats.to_string()] {
        assert!(text.len() > 50 && !text.contains("s3cret"), "{text}");
    }
}
