// SPDX-License-Identifier: MIT OR Apache-2.0

//! What comes back for FRAME_REQUESTs, decoded and compared with what went in.

mod common;

use std::thread;

use common::scripted::{Gate, encoder};
use common::{Encoded, Peer, Rgb, config, decode, is_start, start, with_encoder};
use helix_host::Config;
use helix_protocol::message::{Config as Settings, ErrorCode, PixelFormat};
use helix_protocol::{Message, encode};
use zerocopy_test_qemu::eventually;

const ENCODERS: [&str; 2] = ["x264enc", "openh264enc"];
const FRAME: i64 = 16_666_667;

fn bytes(frames: &[Encoded]) -> impl Iterator<Item = &[u8]> {
    frames.iter().map(|frame| frame.bytes.as_slice())
}

#[test]
fn every_format_comes_out_as_it_went_in() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        // 322: not a multiple of 4, which GStreamer would round the stride of NV12 up to.
        for (format, margin, width) in [
            (PixelFormat::Bgra, 0, 320),
            (PixelFormat::Bgra, 52, 320),
            (PixelFormat::Rgba, 0, 322),
            (PixelFormat::Rgba, 4, 320),
            (PixelFormat::Nv12, 0, 320),
            (PixelFormat::Nv12, 0, 322),
        ] {
            let mut peer = Peer::of(&server);
            let pictures: Vec<_> = (0..5).map(|time| Rgb::pattern(width, 240, time)).collect();
            let mut frames = Vec::new();
            for (index, picture) in (0..).zip(&pictures) {
                let pts = 5_000_000_000 + index * FRAME;
                let (request, pixels) = picture.request(format, margin, pts, false);
                peer.request(&request, pixels);
                let frame = peer.next_frame();
                assert_eq!((frame.response.pts, frame.response.dts), (pts, pts));
                assert_eq!((frame.response.nal_count, frame.session_id), (1, 1));
                assert_eq!(frame.response.is_keyframe, index == 0, "{encoder}");
                frames.push(frame);
            }
            assert!(is_start(&frames[0].bytes), "{encoder}");
            let decoded = decode(bytes(&frames));
            assert_eq!(decoded.len(), pictures.len());
            for (decoded, picture) in decoded.iter().zip(&pictures) {
                let psnr = decoded.psnr(picture);
                assert!(psnr > 30.0, "{encoder} {format:?}+{margin}: {psnr} dB");
            }
        }
        server.stop();
    }
}

#[test]
fn size_and_format_change_in_mid_stream_and_nothing_is_lost() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        let mut pictures = Vec::new();
        for (size, format) in [
            ((320, 240), PixelFormat::Bgra),
            ((320, 240), PixelFormat::Nv12),
            ((160, 120), PixelFormat::Nv12),
            ((400, 304), PixelFormat::Rgba),
        ] {
            for time in 0..3 {
                pictures.push((Rgb::pattern(size.0, size.1, time), format));
            }
        }
        // All at once: the changes meet frames that are still in the encoder.
        for (index, (picture, format)) in (0..).zip(&pictures) {
            let (request, pixels) = picture.request(*format, 0, index * FRAME, false);
            peer.request(&request, pixels);
        }
        let frames: Vec<_> = pictures.iter().map(|_| peer.next_frame()).collect();
        for (index, frame) in (0..).zip(&frames) {
            assert_eq!(frame.response.pts, index * FRAME, "{encoder}");
        }
        for first in [0, 6, 9] {
            assert!(frames[first].response.is_keyframe, "{encoder} {first}");
            assert!(is_start(&frames[first].bytes), "{encoder} {first}");
        }
        let decoded = decode(bytes(&frames));
        assert_eq!(decoded.len(), pictures.len(), "{encoder}");
        for (index, (decoded, (picture, _))) in decoded.iter().zip(&pictures).enumerate() {
            let psnr = decoded.psnr(picture);
            assert!(psnr > 28.0, "{encoder} {index}: {psnr} dB");
        }
    }
}

#[test]
fn a_forced_keyframe_is_this_very_frame() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        let forced = [0, 5, 6, 40];
        let by_request = [20];
        for index in 0..50 {
            let picture = Rgb::pattern(320, 240, index);
            if by_request.contains(&index) {
                peer.send(encode::keyframe_req(1));
            }
            let force = forced.contains(&index);
            let frame = peer.encode(&picture, PixelFormat::Bgra, index as i64 * FRAME, force);
            let key = force || by_request.contains(&index);
            assert_eq!(frame.response.is_keyframe, key, "{encoder} {index}");
            assert_eq!(is_start(&frame.bytes), key, "{encoder} {index}");
        }
    }
}

#[test]
fn keyframes_come_only_when_asked_for() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        for index in 0..300 {
            let picture = Rgb::pattern(64, 64, index);
            let frame = peer.encode(&picture, PixelFormat::Bgra, index as i64 * FRAME, false);
            assert_eq!(frame.response.is_keyframe, index == 0, "{encoder} {index}");
        }
    }
}

#[test]
fn config_req_sets_the_bitrate_also_in_mid_stream() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        let mut size = |bitrate: u32| {
            peer.send(encode::config_req(
                1,
                &Settings {
                    width: 320,
                    height: 240,
                    bitrate,
                    framerate_num: 30,
                    framerate_den: 1,
                    profile: 77,
                    level: 40,
                    realtime: true,
                },
            ));
            let mut bytes = 0;
            for index in 0..40 {
                let picture = Rgb::grain(320, 240, index);
                let pts = i64::from(index) * 33_333_333;
                let frame = peer.encode(&picture, PixelFormat::Bgra, pts, false);
                // The rate control needs some frames to get there.
                if index >= 20 {
                    bytes += frame.bytes.len();
                }
            }
            bytes
        };
        let (few, many, few_again) = (size(500_000), size(8_000_000), size(500_000));
        assert!(many > 3 * few, "{encoder}: {few} {many} bytes");
        assert!(many > 3 * few_again, "{encoder}: {many} {few_again} bytes");
    }
}

#[test]
fn the_profile_follows_config_req_and_no_frame_is_lost() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        let profiles = [66, 77, 100, 66];
        for profile in profiles {
            peer.send(encode::config_req(
                1,
                &Settings {
                    profile,
                    ..Settings::default()
                },
            ));
            for index in 0..3 {
                let (request, pixels) =
                    Rgb::pattern(160, 120, index).request(PixelFormat::Bgra, 0, 0, false);
                peer.request(&request, pixels);
            }
        }
        let mut units = Vec::new();
        for wanted in profiles {
            for index in 0..3 {
                let frame = peer.next_frame();
                if let Some([_, profile, ..]) = helix_protocol::h264::find_sps(&frame.bytes) {
                    // 100 is answered with main: what deployed clients can decode.
                    let expected = if wanted == 66 { 66 } else { 77 };
                    assert_eq!(*profile, expected, "{encoder} asked for {wanted}");
                } else {
                    assert_ne!((wanted, index), (66, 0), "{encoder}");
                }
                units.push(frame.bytes);
            }
        }
        assert_eq!(decode(units.iter().map(Vec::as_slice)).len(), units.len());
    }
}

#[test]
fn what_cannot_be_encoded_is_refused_in_order_and_the_connection_goes_on() {
    let server = start(config());
    let mut peer = Peer::of(&server);
    let picture = Rgb::pattern(64, 48, 0);
    let (good, pixels) = picture.request(PixelFormat::Bgra, 0, 11, false);
    let refused = |change: &dyn Fn(&mut helix_protocol::message::FrameRequest)| {
        let mut request = good;
        change(&mut request);
        request
    };
    let cases: [(&str, _); 6] = [
        ("format", refused(&|r| r.format = 0x3432_5258)),
        ("width", refused(&|r| r.width = 0)),
        ("height is 8193", refused(&|r| r.height = 8193)),
        ("stride is 255", refused(&|r| r.stride = 255)),
        ("needs 49392", refused(&|r| r.stride = 1029)),
        (
            "width is 63",
            refused(&|r| {
                r.format = PixelFormat::Nv12.fourcc();
                r.width = 63;
            }),
        ),
    ];
    for (what, request) in cases {
        peer.request(&good, pixels.clone());
        peer.request(&request, pixels.clone());
        peer.request(&good, pixels.clone());
        assert_eq!(peer.next_frame().response.pts, 11);
        let error = peer.next_error();
        assert_eq!(error.code, ErrorCode::INVALID_MESSAGE);
        assert!(error.text.contains(what), "{what}: {}", error.text);
        assert_eq!(peer.next_frame().response.pts, 11);
    }
    for (resource_id, code) in [
        (0, ErrorCode::INVALID_MESSAGE),
        (9, ErrorCode::RESOURCE_NOT_FOUND),
    ] {
        let mut request = good;
        request.resource_id = resource_id;
        peer.send(encode::frame_request(1, &request, 0));
        let error = peer.next_error();
        assert_eq!(error.code, code);
        assert!(error.text.contains("resource_id"), "{}", error.text);
    }
    peer.expect_pong();
}

#[test]
fn wild_timestamps_are_echoed_and_harm_nothing() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        let times = [0, i64::MAX, i64::MIN, -1, -1, 7, 7, i64::MAX, 0];
        let mut frames = Vec::new();
        for (index, pts) in times.into_iter().enumerate() {
            let picture = Rgb::pattern(64, 64, index);
            let frame = peer.encode(&picture, PixelFormat::Bgra, pts, false);
            assert_eq!(frame.response.pts, pts);
            frames.push(frame);
        }
        assert_eq!(decode(bytes(&frames)).len(), times.len());
    }
}

#[test]
fn ping_is_answered_while_a_large_frame_is_encoding() {
    let server = start(Config {
        // Slow on purpose.
        encoder: "x264enc speed-preset=veryslow threads=1".to_owned(),
        ..config()
    });
    let mut peer = Peer::of(&server);
    let (request, pixels) = Rgb::noise(1920, 1080, 1).request(PixelFormat::Bgra, 0, 1, false);
    peer.request(&request, pixels);
    // The PONG overtakes the frame.
    peer.expect_pong();
    assert_eq!(peer.next_frame().response.pts, 1);
}

#[test]
fn two_clients_get_their_own_pictures() {
    let server = start(config());
    let (mut left, mut right) = (Peer::of(&server), Peer::of(&server));
    let (red, blue) = (
        Rgb::new(64, 64, |_, _| [220, 20, 20]),
        Rgb::new(128, 96, |_, _| [20, 20, 220]),
    );
    for index in 0..10 {
        let (request, pixels) = red.request(PixelFormat::Bgra, 0, index, true);
        left.request(&request, pixels);
        let (request, pixels) = blue.request(PixelFormat::Rgba, 0, index, true);
        right.request(&request, pixels);
        // Drives the left connection's sending too.
        let left = left.next_frame();
        let right = right.next_frame();
        assert_eq!((left.response.pts, right.response.pts), (index, index));
        let left = decode([left.bytes.as_slice()]);
        let right = decode([right.bytes.as_slice()]);
        assert!(left[0].psnr(&red) > 30.0);
        assert!(right[0].psnr(&blue) > 30.0);
    }
}

#[test]
fn encoders_that_hang_for_ever_are_few() {
    let (gate, opens) = Gate::new();
    let server = with_encoder(&encoder(|arrived| {
        if !gate.is_open() {
            arrived.fail();
            gate.pass();
        }
        true
    }));
    let picture = Rgb::pattern(64, 64, 0);
    let ask = |peer: &mut Peer| {
        let (request, pixels) = picture.request(PixelFormat::Bgra, 0, 1, false);
        peer.request(&request, pixels);
        peer.next().message
    };
    let refused = |peer: &mut Peer| match ask(peer) {
        Message::Error(error) => error.text,
        other => panic!("no error but {other:?}"),
    };
    // At once, as the host waits for each for a while.
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let text = refused(&mut Peer::of(&server));
                assert!(text.contains("broken as a test wants it"), "{text}");
            });
        }
    });
    let mut peer = Peer::of(&server);
    let text = refused(&mut peer);
    assert!(
        text.starts_with("8 pipelines with scriptedh264enc hang"),
        "{text}"
    );
    // Another encoder than that one is none of them.
    let other = with_encoder("x264enc");
    assert!(matches!(
        ask(&mut Peer::of(&other)),
        Message::FrameResponse(..)
    ));
    drop(opens);
    eventually("an encoder that does not hang", || {
        matches!(ask(&mut peer), Message::FrameResponse(..)).then_some(())
    });
}
