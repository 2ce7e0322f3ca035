// SPDX-License-Identifier: MIT OR Apache-2.0

//! Encoders that hang, break, leave pictures out, or cannot do what they are told: what clients
//! and subscribers notice of it.

mod common;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use common::metrics::{figure, figures};
use common::scripted::{Arrived, Gate, Opens, element, encoder};
use common::{LONG, Peer, Rgb, config, hello, is_start, start};
use helix_host::{Config, ScanoutSpec, Server};
use helix_protocol::encode;
use helix_protocol::message::{Config as Settings, ErrorCode, PixelFormat};
use zerocopy_test_qemu::eventually;

const MOVING: &str =
    "videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=60/1";
/// One frame now, the next in half a minute.
const STILL: &str = "videotestsrc is-live=true pattern=blue ! \
                     video/x-raw,format=BGRx,width=320,height=240,framerate=1/30";

fn host(scanout: u32, description: &str, encoder: String) -> Server {
    start(Config {
        encoder,
        scanouts: vec![ScanoutSpec {
            id: scanout,
            description: description.to_owned(),
        }],
        metrics: Some("tcp:127.0.0.1:0".parse().unwrap()),
        ..config()
    })
}

fn encode_errors(server: &Server, scanout: u32) -> u64 {
    let name = format!("helix_scanout_encode_errors_total{{scanout=\"{scanout}\"}} ");
    figure(&figures(server), &name)
}

fn bitrate(bitrate: u32) -> Settings {
    Settings {
        bitrate,
        ..Settings::default()
    }
}

/// A script whose first encoder hangs at its first picture, and tells when it does.
fn hangs_once() -> (impl Fn(&Arrived<'_>) -> bool, Receiver<()>, Opens) {
    let (gate, opens) = Gate::new();
    let (tell, hangs) = channel();
    let script = move |arrived: &Arrived<'_>| {
        if arrived.instance == 0 {
            let _ = tell.send(());
            gate.pass();
        }
        true
    };
    (script, hangs, opens)
}

/// Whether a scanout's thread runs.
fn runs(scanout: u32) -> bool {
    let name = format!("helix-scanout-{scanout}");
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        // One may end between the two looks.
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .any(|comm| comm.trim_end() == name)
}

/// Watches until something hangs, goes, and comes back when nobody has watched for a while.
fn comes_back(server: &Server, scanout: u32, hangs: &Receiver<()>) {
    let mut first = Peer::of(server);
    first.subscribe(scanout);
    hangs.recv_timeout(LONG).unwrap();
    drop(first);
    eventually("the end of a scanout that nobody watches", || {
        (!runs(scanout)).then_some(())
    });
    let mut second = Peer::of(server);
    second.subscribe(scanout);
    assert!(is_start(&second.next_frame().bytes));
}

#[test]
fn an_encoder_that_hangs_while_the_last_viewer_goes_costs_nobody_the_screen() {
    let (script, hangs, _opens) = hangs_once();
    let server = host(1, MOVING, encoder(script));
    comes_back(&server, 1, &hangs);
}

#[test]
fn a_source_that_hangs_while_the_last_viewer_goes_costs_nobody_the_screen() {
    let (script, hangs, _opens) = hangs_once();
    let source = format!("{MOVING} ! {}", element(script));
    let server = host(2, &source, "x264enc".to_owned());
    comes_back(&server, 2, &hangs);
}

#[test]
fn an_encoder_that_hangs_is_replaced() {
    let (script, _, _opens) = hangs_once();
    let server = host(3, STILL, encoder(script));
    let mut subscriber = Peer::of(&server);
    subscriber.subscribe(3);
    assert!(is_start(&subscriber.next_frame().bytes));
    assert_eq!(encode_errors(&server, 3), 1);
}

#[test]
fn a_frame_at_which_an_encoder_hangs_is_an_error_and_the_next_one_is_encoded() {
    let (script, _, _opens) = hangs_once();
    let server = common::with_encoder(&encoder(script));
    let mut peer = Peer::of(&server);
    let picture = Rgb::pattern(64, 64, 0);
    let (request, pixels) = picture.request(PixelFormat::Bgra, 0, 1, false);
    peer.request(&request, pixels);
    let error = peer.next_error();
    assert_eq!(error.code, ErrorCode::ENCODE_FAILED);
    assert!(error.text.contains("hangs"), "{}", error.text);
    let frame = peer.encode(&picture, PixelFormat::Bgra, 2, false);
    assert!(is_start(&frame.bytes));
}

#[test]
fn a_broken_encoder_is_replaced_even_if_it_hangs_and_a_still_screen_comes_all_the_same() {
    let (gate, _opens) = Gate::new();
    let server = host(
        4,
        STILL,
        encoder(|arrived| {
            let breaks = arrived.instance < 2;
            if breaks {
                arrived.fail();
            }
            if arrived.instance == 1 {
                gate.pass();
            }
            !breaks
        }),
    );
    let mut subscriber = Peer::of(&server);
    subscriber.subscribe(4);
    assert!(is_start(&subscriber.next_frame().bytes));
    assert_eq!(encode_errors(&server, 4), 2);
}

#[test]
fn encoders_that_break_one_after_the_other_end_the_subscription_and_the_next_one_begins_anew() {
    let server = host(
        5,
        MOVING,
        encoder(|arrived| {
            let breaks = arrived.instance < 3;
            if breaks {
                arrived.fail();
            }
            !breaks
        }),
    );
    let mut first = Peer::of(&server);
    first.subscribe(5);
    let error = first.next_error();
    let text = &error.text;
    assert!(
        text.contains("scanout 5") && text.contains("as a test wants it"),
        "{text}"
    );
    first.expect_end();
    assert_eq!(encode_errors(&server, 5), 3);
    let mut second = Peer::of(&server);
    second.subscribe(5);
    assert!(is_start(&second.next_frame().bytes));
}

#[test]
fn what_comes_after_a_picture_that_was_left_out_is_withheld_until_a_keyframe() {
    let server = host(6, MOVING, encoder(|arrived| arrived.picture != 20));
    let mut subscriber = Peer::of(&server);
    subscriber.subscribe(6);
    let frames: Vec<_> = (0..30).map(|_| subscriber.next_frame()).collect();
    let keyframes = frames.iter().map(|frame| frame.response.is_keyframe);
    let places: Vec<_> = (0..).zip(keyframes).filter(|(_, is)| *is).collect();
    assert_eq!(places, [(0, true), (20, true)]);
    assert_eq!(encode_errors(&server, 6), 1);
}

/// A script that says which bitrate each encoder has.
fn says_its_bitrate(tell: Sender<u32>) -> impl Fn(&Arrived<'_>) -> bool {
    move |arrived| {
        if arrived.picture == 0 {
            let _ = tell.send(arrived.bitrate());
        }
        true
    }
}

#[test]
fn a_scanout_whose_encoder_cannot_change_its_bitrate_gets_a_new_one_now_and_then() {
    let (tell, bitrates) = channel();
    let server = host(7, MOVING, encoder(says_its_bitrate(tell)));
    let mut subscriber = Peer::of(&server);
    subscriber.subscribe(7);
    assert!(is_start(&subscriber.next_frame().bytes));
    assert_eq!(bitrates.recv_timeout(LONG), Ok(4_000_000));
    subscriber.send(encode::config_req(1, &bitrate(1_000_000)));
    // A second at most after the encoder before.
    assert!((0..300).any(|_| subscriber.next_frame().response.is_keyframe));
    assert_eq!(bitrates.recv_timeout(LONG), Ok(1_000_000));
    // Whoever asks for another one all the time does not make everybody's stream keyframes.
    let begin = Instant::now();
    let mut keyframes = 0;
    for bits in 1_000_001..1_000_120 {
        subscriber.send(encode::config_req(1, &bitrate(bits)));
        keyframes += u64::from(subscriber.next_frame().response.is_keyframe);
    }
    let most = begin.elapsed().as_secs() + 2;
    assert!(keyframes <= most, "{keyframes} keyframes");
    assert!(keyframes > 0);
}

#[test]
fn config_resp_is_about_the_encoder_that_runs() {
    let server = host(8, STILL, encoder(|_| true));
    let mut subscriber = Peer::of(&server);
    subscriber.greet(&hello());
    subscriber.subscribe(8);
    assert!(is_start(&subscriber.next_frame().bytes));
    // The next picture would bring a new encoder: it is half a minute away.
    let in_force = subscriber.configure(&bitrate(1_000_000));
    assert_eq!(in_force.bitrate, 4_000_000);
    // A keyframe brings one as well, a second after the one before.
    eventually("another encoder", || {
        subscriber.send(encode::keyframe_req(1));
        assert!(is_start(&subscriber.next_frame().bytes));
        let in_force = subscriber.configure(&bitrate(1_000_000));
        (in_force.bitrate == 1_000_000).then_some(())
    });
}

#[test]
fn a_client_whose_encoder_cannot_change_its_bitrate_gets_a_new_one() {
    let (tell, bitrates) = channel();
    let server = common::with_encoder(&encoder(says_its_bitrate(tell)));
    let mut peer = Peer::of(&server);
    let picture = Rgb::pattern(64, 64, 0);
    for (pts, bits) in [(1, 2_000_000), (2, 1_000_000)] {
        peer.send(encode::config_req(1, &bitrate(bits)));
        let frame = peer.encode(&picture, PixelFormat::Bgra, pts, false);
        assert!(is_start(&frame.bytes));
        assert_eq!(bitrates.recv_timeout(LONG), Ok(bits));
        // No frame is lost, and none is a keyframe for nothing.
        let frame = peer.encode(&picture, PixelFormat::Bgra, pts + 10, false);
        assert!(!frame.response.is_keyframe);
    }
}

#[test]
fn who_waits_for_an_encoder_with_all_open_that_may_be_still_gets_pongs() {
    // All by number; and by bytes, of one picture and of some.
    for (most, side, max_frame_bytes) in [
        (16, 16, 1 << 20),
        (1, 64, 64 * 64 * 4),
        (3, 64, 3 * 64 * 64 * 4 - 1),
    ] {
        let (gate, opens) = Gate::new();
        let server = start(Config {
            encoder: encoder(|_| {
                gate.pass();
                true
            }),
            max_frame_bytes,
            ..config()
        });
        let mut peer = Peer::of(&server);
        peer.greet(&hello());
        let picture = Rgb::pattern(side, side, 0);
        let request = |peer: &mut Peer, pts| {
            let (request, pixels) = picture.request(PixelFormat::Bgra, 0, pts, false);
            peer.request(&request, pixels);
        };
        for pts in 0..most {
            request(&mut peer, pts);
        }
        for _ in 0..3 {
            peer.expect_pong();
        }
        // One too many is not lost.
        request(&mut peer, most);
        drop(opens);
        for pts in 0..=most {
            assert_eq!(peer.next_frame().response.pts, pts);
        }
    }
}
