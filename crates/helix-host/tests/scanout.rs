// SPDX-License-Identifier: MIT OR Apache-2.0

//! What subscribers of a scanout get.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::program::Running;
use common::{LONG, Peer, Rgb, config, decode, is_start, start};
use gst::prelude::*;
use helix_host::{Config, ScanoutSpec, Server};
use helix_protocol::h264::nal_units;
use helix_protocol::message::{Config as Settings, EnableScanout, ScanoutResp};
use helix_protocol::{Message, encode};

const MOVING: &str =
    "videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=60/1";
/// One frame now, the next in half a minute.
const STILL: &str = "videotestsrc is-live=true pattern=blue ! \
                     video/x-raw,format=BGRx,width=320,height=240,framerate=1/30";

fn host(scanouts: &[(u32, &str)]) -> Server {
    start(Config {
        scanouts: scanouts
            .iter()
            .map(|&(id, description)| ScanoutSpec {
                id,
                description: description.to_owned(),
            })
            .collect(),
        ..config()
    })
}

fn monotonic_now() -> i64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a timespec that the call may write to.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    assert_eq!(done, 0);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

fn bitrate(bitrate: u32) -> encode::Head {
    encode::config_req(
        1,
        &Settings {
            bitrate,
            ..Settings::default()
        },
    )
}

#[test]
fn a_moving_screen_flows_with_capture_times() {
    let server = host(&[(3, MOVING)]);
    let mut peer = Peer::of(&server);
    peer.subscribe(3);
    let frames: Vec<_> = (0..60).map(|_| peer.next_frame()).collect();
    let now = monotonic_now();
    assert!(is_start(&frames[0].bytes));
    for frame in &frames {
        assert_eq!(frame.session_id, 3);
        assert_eq!(frame.response.dts, frame.response.pts);
        assert_eq!(frame.response.nal_count, 1);
        assert_eq!(frame.response.is_keyframe, is_start(&frame.bytes));
        let age = now - frame.response.pts;
        assert!((0..5_000_000_000).contains(&age), "{age} ns old");
    }
    for pair in frames.windows(2) {
        assert!(pair[1].response.pts > pair[0].response.pts);
    }
    let span = frames[59].response.pts - frames[0].response.pts;
    let nominal = 59 * 16_666_667;
    assert!((span - nominal).abs() < nominal / 4, "{span} ns");
    assert_eq!(decode(frames.iter().map(|f| f.bytes.as_slice())).len(), 60);
}

#[test]
fn a_newcomer_starts_with_a_keyframe_at_once() {
    let server = host(&[(0, MOVING)]);
    let mut first = Peer::of(&server);
    first.subscribe(0);
    for _ in 0..10 {
        first.next_frame();
    }
    let mut second = Peer::of(&server);
    second.subscribe(0);
    let newcomer = second.next_frame();
    assert!(is_start(&newcomer.bytes));
    // One encode for both: the first one sees the same frame.
    let same = loop {
        let frame = first.next_frame();
        if frame.response.pts == newcomer.response.pts {
            break frame;
        }
    };
    assert!(same.bytes == newcomer.bytes);
    // 60 frames on its own would be a second; it came sooner.
    let next = second.next_frame();
    assert!(!next.response.is_keyframe);
}

#[test]
fn a_still_screen_gives_each_newcomer_its_picture() {
    let server = host(&[(1, STILL)]);
    for _ in 0..3 {
        let asked = Instant::now();
        let mut peer = Peer::of(&server);
        peer.subscribe(1);
        let frame = peer.next_frame();
        assert!(asked.elapsed() < Duration::from_secs(5));
        assert!(is_start(&frame.bytes));
        let blue = Rgb::new(320, 240, |_, _| [0, 0, 255]);
        let psnr = decode([frame.bytes.as_slice()])[0].psnr(&blue);
        assert!(psnr > 30.0, "{psnr} dB");
        // The subscription of before may end late; the picture is resent only for newcomers.
        assert!(peer.is_quiet_for(Duration::from_millis(300)));
        // And for those who ask.
        peer.send(encode::keyframe_req(1));
        assert!(is_start(&peer.next_frame().bytes));
    }
}

#[test]
fn encoded_video_goes_out_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.h264");
    record(&path);
    let server = host(&[(
        2,
        &format!(
            "filesrc location={} ! h264parse ! identity sync=true",
            path.display()
        ),
    )]);
    let mut peer = Peer::of(&server);
    let asked = Instant::now();
    peer.subscribe(2);
    let frames: Vec<_> = (0..30).map(|_| peer.next_frame()).collect();
    // At its own pace.
    assert!(asked.elapsed() > Duration::from_millis(700));
    // Which is in their times too, however late this machine was.
    for pair in frames.windows(2) {
        let step = pair[1].response.pts - pair[0].response.pts;
        assert!((33_333_000..33_334_000).contains(&step), "{step} ns");
    }
    let sent: Vec<u8> = frames.iter().flat_map(|f| f.bytes.clone()).collect();
    let recorded = std::fs::read(&path).unwrap();
    // The parser may add delimiters (NAL unit type 9) between access units, nothing else.
    let units = |stream: &'_ [u8]| -> Vec<Vec<u8>> {
        nal_units(stream)
            .filter(|unit| unit[0] & 0x1f != 9)
            .map(<[u8]>::to_vec)
            .collect()
    };
    assert!(units(&sent) == units(&recorded));
    let error = peer.next_error();
    assert!(error.text.contains("ended"), "{}", error.text);
    peer.expect_end();
}

/// 30 frames at 30 Hz.
fn record(path: &Path) {
    record_as("bframes=0 ! video/x-h264,stream-format=byte-stream", path);
}

/// The same with the encoder set like this, and what comes behind it.
fn record_as(how: &str, path: &Path) {
    gst::init().unwrap();
    let pipeline = gst::parse::launch(&format!(
        "videotestsrc num-buffers=30 ! video/x-raw,width=64,height=64,framerate=30/1 ! \
         x264enc speed-preset=ultrafast aud=false {how} ! filesink location={}",
        path.display()
    ))
    .unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let end = pipeline.bus().unwrap().timed_pop_filtered(
        gst::ClockTime::from_seconds(20),
        &[gst::MessageType::Eos, gst::MessageType::Error],
    );
    assert_eq!(end.unwrap().type_(), gst::MessageType::Eos);
    pipeline.set_state(gst::State::Null).unwrap();
}

#[test]
fn a_stream_with_b_pictures_is_warned_of_once() {
    let folder = tempfile::tempdir().unwrap();
    for (how, warnings) in [("bframes=2 b-adapt=false", 1), ("bframes=0", 0)] {
        let path = folder.path().join("x.mkv");
        record_as(&format!("{how} ! h264parse ! matroskamux"), &path);
        let scanout = format!(
            "0=filesrc location={} ! matroskademux ! h264parse",
            path.display()
        );
        let listen = "tcp:127.0.0.1:0";
        let mut host = Running::start(&["--listen", listen, "--scanout", &scanout]);
        let mut peer = Peer::connect(&host.address());
        peer.subscribe(0);
        for _ in 0..30 {
            peer.next_frame();
        }
        let (_, log) = host.end_by(libc::SIGTERM);
        assert_eq!(log.matches("B pictures").count(), warnings, "{how}: {log}");
    }
}

#[test]
fn an_encoder_inside_the_description_makes_keyframes_for_newcomers() {
    let server = host(&[(
        0,
        "videotestsrc is-live=true ! video/x-raw,width=64,height=64,framerate=60/1 ! \
         x264enc tune=zerolatency key-int-max=10000",
    )]);
    let mut first = Peer::of(&server);
    first.subscribe(0);
    for _ in 0..10 {
        first.next_frame();
    }
    for _ in 0..2 {
        let mut newcomer = Peer::of(&server);
        newcomer.subscribe(0);
        assert!(is_start(&newcomer.next_frame().bytes));
    }
}

#[test]
fn a_slow_subscriber_loses_whole_frames_and_delays_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix:{}/s", folder.path().display());
    let server = start(Config {
        listen: vec![address.parse().unwrap()],
        scanouts: vec![ScanoutSpec {
            id: 0,
            // Large frames, so that the socket is soon full, but no cuts, which would be keyframes.
            description: "videotestsrc is-live=true pattern=zone-plate kx2=8 ky2=8 kt=1 ! \
                          video/x-raw,width=320,height=240,framerate=60/1"
                .to_owned(),
        }],
        ..config()
    });
    let (mut slow, mut quick) = (Peer::of(&server), Peer::of(&server));
    slow.subscribe(0);
    slow.next_frame();
    quick.subscribe(0);
    quick.send(bitrate(8_000_000));
    let done = Arc::new(AtomicBool::new(false));
    let (started, starts) = mpsc::channel();
    let quick = std::thread::spawn({
        let done = done.clone();
        move || {
            let mut frames = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let frame = quick.next_frame();
                frames.push((frame.response.pts, frame.bytes));
                // Halfway to a keyframe, when the slow one's queue is full of what led up to here.
                if frames.len() == 225 {
                    started.send(()).unwrap();
                }
            }
            frames
        }
    });
    // Almost four seconds in which the slow one reads nothing: more than its socket and queue hold.
    starts.recv_timeout(LONG).unwrap();
    // It gets what had been queued, then a gap, then a keyframe and what follows it.
    let seen: Vec<_> = (0..150).map(|_| slow.next_frame()).collect();
    done.store(true, Ordering::Relaxed);
    // Meanwhile the quick one waited for nothing.
    let all = quick.join().unwrap();
    let longest = all.windows(2).map(|pair| pair[1].0 - pair[0].0).max();
    assert!(longest.unwrap() < 500_000_000, "{longest:?} ns");
    // It got every frame, so it knows what the slow one missed, and where that went on.
    let place: HashMap<i64, usize> = all.iter().map(|frame| frame.0).zip(0..).collect();
    let mut gaps = 0;
    for pair in seen.windows(2) {
        let places = [0, 1].map(|index| place.get(&pair[index].response.pts));
        if let [Some(before), Some(now)] = places {
            assert!(all[*now].1 == pair[1].bytes);
            if *now != before + 1 {
                assert!(is_start(&pair[1].bytes), "went on in the middle");
                gaps += 1;
            }
        }
    }
    assert!(gaps > 0, "nothing was dropped");
}

#[test]
fn config_req_changes_the_bitrate_of_the_scanout() {
    let server = host(&[(
        0,
        "videotestsrc is-live=true pattern=snow ! \
         video/x-raw,width=160,height=120,framerate=60/1",
    )]);
    let mut peer = Peer::of(&server);
    peer.subscribe(0);
    let mut size = |bits: u32| {
        peer.send(bitrate(bits));
        let frames: Vec<_> = (0..60).map(|_| peer.next_frame().bytes.len()).collect();
        frames[30..].iter().sum::<usize>()
    };
    let (few, many) = (size(800_000), size(6_000_000));
    assert!(many > 2 * few, "{few} {many} bytes");
}

#[test]
fn an_end_or_an_error_is_told_and_the_next_subscriber_gets_a_new_start() {
    let server = host(&[
        (
            0,
            "videotestsrc is-live=true num-buffers=5 ! \
             video/x-raw,width=64,height=64,framerate=60/1",
        ),
        (1, "filesrc location=/nonexistent/x.h264 ! h264parse"),
    ]);
    for _ in 0..2 {
        let mut peer = Peer::of(&server);
        peer.subscribe(0);
        assert!(is_start(&peer.next_frame().bytes));
        let error = loop {
            match peer.next().message {
                Message::FrameResponse(..) => {}
                Message::Error(error) => break error,
                other => panic!("{other:?}"),
            }
        };
        assert!(error.text.contains("scanout 0"), "{}", error.text);
        peer.expect_end();
    }
    let mut peer = Peer::of(&server);
    peer.subscribe(1);
    let error = peer.next_error();
    assert!(error.text.contains("/nonexistent"), "{}", error.text);
    peer.expect_end();
    Peer::of(&server).expect_pong();
}

#[test]
fn scanouts_that_exist_can_be_enabled_and_others_not() {
    let server = host(&[(4, STILL)]);
    let mut peer = Peer::of(&server);
    for (scanout_id, success) in [(4, true), (5, false), (u32::MAX, false)] {
        peer.send(encode::enable_scanout(
            9,
            &EnableScanout {
                scanout_id,
                width: 1920,
                height: 1080,
                refresh_rate: 60,
            },
        ));
        let envelope = peer.next();
        assert_eq!(envelope.session_id, 9);
        let Message::ScanoutResp(resp) = envelope.message else {
            panic!("{envelope:?}");
        };
        if success {
            assert_eq!(
                resp,
                ScanoutResp {
                    scanout_id,
                    success,
                    connector: "Virtual-5".to_owned()
                }
            );
        } else {
            assert_eq!((resp.scanout_id, resp.success), (scanout_id, false));
        }
        peer.send(encode::subscribe(scanout_id));
        match peer.next().message {
            Message::SubscribeResp {
                scanout_id: id,
                success: done,
            } => assert_eq!((id, done), (scanout_id, success)),
            other => panic!("{other:?}"),
        }
        if success {
            peer.next_frame();
        }
        peer.send(encode::disable_scanout(9, scanout_id));
        peer.expect_pong();
    }
}
