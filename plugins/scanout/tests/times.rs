// SPDX-License-Identifier: MIT OR Apache-2.0

//! The times of scanoutsrc's buffers, by what the host's timestamps are of. What comes of which
//! clock in detail is tested in src/timeline.rs.

mod common;

use common::Source;
use gst::prelude::*;
use helix_protocol::message::Capabilities;
use helix_protocol::{Message, encode};
use zerocopy_test_support::peer::{Greets, Hello, KEYFRAME, Link, Peer, Then, hello};

const FRAMES: usize = 30;
/// How old the frames are when they are sent, and how far apart they were captured.
const AGE: gst::ClockTime = gst::ClockTime::from_mseconds(40);
const STEP: gst::ClockTime = gst::ClockTime::from_mseconds(1);

/// A host with capture times, which says that they are of this clock and counts it from `epoch`.
fn capturing_host(clock_id: Option<&[u8]>, epoch: gst::ClockTime) -> Peer {
    let hello = Hello {
        clock_id: clock_id.map(<[u8]>::to_vec),
        ..hello(Capabilities::CAPTURE_PTS)
    };
    Peer::greeting(Greets::With(hello), move |link, envelope| {
        let newest = gst::SystemClock::obtain().time() - epoch - AGE;
        let push = |link: &mut Link, pts: gst::ClockTime| {
            link.respond(1, pts.nseconds() as i64, true, KEYFRAME);
        };
        match envelope.message {
            Message::Subscribe { scanout_id } => {
                link.send(encode::subscribe_resp(scanout_id, true));
                for number in (0..FRAMES as u64).rev() {
                    push(link, newest - STEP * number);
                }
            }
            // How a test asks for another.
            Message::ConfigReq(_) => push(link, newest),
            _ => {}
        }
        Then::GoOn
    })
}

/// The times of the buffers, and the host's beside them.
fn times(source: &mut Source) -> Vec<(gst::ClockTime, gst::ClockTime)> {
    (0..FRAMES)
        .map(|_| {
            let buffer = source.pull();
            let meta = buffer.meta::<gst::ReferenceTimestampMeta>().unwrap();
            (buffer.pts().unwrap(), meta.timestamp())
        })
        .collect()
}

fn latency(source: &Source) -> gst::ClockTime {
    let mut query = gst::query::Latency::new();
    assert!(source.element().query(&mut query));
    let (live, least, most) = query.result();
    assert!(live);
    assert_eq!(most, None);
    least
}

/// Lets frames come at 20 a second, until a latency is announced; how many.
fn frames_until_latency(source: &mut Source) -> u32 {
    for frames in 0.. {
        let kinds = [gst::MessageType::Latency];
        // The pace.
        let limit = gst::ClockTime::from_mseconds(50);
        if source.bus.timed_pop_filtered(limit, &kinds).is_some() {
            return frames;
        }
        assert!(frames < 400, "no latency is announced");
        source
            .element()
            .set_property("bitrate", 1_000_000 + frames as i32);
        source.pull();
    }
    unreachable!()
}

fn grows(times: &[(gst::ClockTime, gst::ClockTime)]) {
    for pair in times.windows(2) {
        assert!(pair[0].0 < pair[1].0, "{times:?}");
    }
}

#[test]
fn capture_times_of_this_machine_are_kept_and_a_latency_that_lasts_is_told() {
    let peer = capturing_host(Some(b"CLOCK_MONOTONIC"), gst::ClockTime::ZERO);
    let mut source = Source::new(peer.port(), "scanout-id=1");
    let times = times(&mut source);
    grows(&times);
    let base = source.element().base_time().unwrap();
    for (pts, host) in &times {
        // Two clocks are read, one after the other.
        let captured = *host - base;
        assert!(pts.nseconds().abs_diff(captured.nseconds()) < 1_000_000_000);
        assert!(*pts + AGE <= source.element().current_running_time().unwrap());
    }
    let age = AGE.useconds();
    assert!(source.stat("latency-p50-us") >= age);
    assert!(source.stat("latency-p99-us") >= source.stat("latency-p50-us"));
    // They came all at once, which may be an accident.
    assert_eq!(latency(&source), gst::ClockTime::ZERO);
    assert!(frames_until_latency(&mut source) >= 10);
    assert!(latency(&source) >= AGE);
}

#[test]
fn times_of_another_clock_or_another_machine_are_translated() {
    let hour = gst::ClockTime::from_seconds(3600);
    let booted_later = gst::SystemClock::obtain().time() / 2;
    for (clock_id, epoch) in [
        (None, gst::ClockTime::ZERO),
        (Some(&b"UTC"[..]), gst::ClockTime::ZERO),
        // As behind a forwarded port.
        (Some(&b"CLOCK_MONOTONIC"[..]), booted_later.min(hour)),
    ] {
        let peer = capturing_host(clock_id, epoch);
        let start = gst::SystemClock::obtain().time();
        let mut source = Source::new(peer.port(), "scanout-id=1");
        let times = times(&mut source);
        grows(&times);
        let base = source.element().base_time().unwrap();
        let now = source.element().current_running_time().unwrap();
        for (pts, _) in &times {
            assert!((start - base..now).contains(pts), "{clock_id:?}");
        }
        assert_eq!(source.stat("latency-p50-us"), 0);
    }
}

#[test]
fn a_legacy_hosts_frames_have_no_latency() {
    let peer = common::host(&[true, false, false, false, false, false, false, false, false]);
    let mut source = Source::new(peer.port(), "scanout-id=1");
    for _ in 0..9 {
        source.pull();
    }
    assert_eq!(latency(&source), gst::ClockTime::ZERO);
    assert_eq!(source.stat("latency-p99-us"), 0);
}
