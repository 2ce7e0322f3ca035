// SPDX-License-Identifier: MIT OR Apache-2.0

//! Every size comes back as it went in, or one pixel larger where 4:2:0 has to.

mod common;

use common::{Peer, Rgb, config, decode, nal_types, start, with_encoder};
use helix_host::{Config, ScanoutSpec};
use helix_protocol::Message;
use helix_protocol::message::PixelFormat;
use helix_protocol::sps::{Changes, patches};

const ENCODERS: [&str; 2] = ["x264enc", "openh264enc"];
/// Around all that is special: nothing, macroblocks, GStreamer's strides.
const SIDES: [usize; 14] = [1, 2, 3, 6, 15, 16, 17, 18, 31, 32, 33, 34, 63, 64];

/// Each pixel differs from its neighbours, and no row or column from that beyond it by much: an
/// edge that is made up shows.
fn slope(width: usize, height: usize) -> Rgb {
    Rgb::new(width, height, |x, y| {
        [200 - 2 * y as u8, 20, 30 + 3 * x as u8]
    })
}

/// With even sides, by repeating the edges.
fn even(picture: &Rgb) -> Rgb {
    let (width, height) = (picture.width, picture.height);
    let (wide, high) = (width.next_multiple_of(2), height.next_multiple_of(2));
    Rgb::new(wide, high, |x, y| {
        picture.pixel(x.min(width - 1), y.min(height - 1))
    })
}

/// Sends a picture of each size and compares what comes back.
fn check(encoder: &str, format: PixelFormat, sizes: impl Iterator<Item = (usize, usize)>) {
    let server = with_encoder(encoder);
    let mut peer = Peer::of(&server);
    let pictures: Vec<_> = sizes.map(|(width, height)| slope(width, height)).collect();
    let units: Vec<_> = pictures
        .iter()
        .map(|picture| peer.encode(picture, format, 0, true).bytes)
        .collect();
    let decoded = decode(units.iter().map(Vec::as_slice));
    assert_eq!(decoded.len(), pictures.len());
    for (decoded, picture) in decoded.iter().zip(&pictures) {
        let wanted = even(picture);
        let what = format!("{encoder} {format:?} {picture:?}");
        let size = |picture: &Rgb| (picture.width, picture.height);
        assert_eq!(size(decoded), size(&wanted), "{what}");
        let psnr = decoded.psnr(&wanted);
        assert!(psnr > 28.0, "{what}: {psnr} dB");
    }
}

fn corners() -> impl Iterator<Item = (usize, usize)> {
    SIDES
        .into_iter()
        .flat_map(|width| SIDES.map(|height| (width, height)))
}

#[test]
fn all_sizes_come_back_with_their_edges_repeated() {
    for encoder in ENCODERS {
        for format in [PixelFormat::Bgra, PixelFormat::Rgba] {
            check(encoder, format, corners());
        }
        // Odd ones are refused.
        let even = corners().filter(|(width, height)| width % 2 == 0 && height % 2 == 0);
        check(encoder, PixelFormat::Nv12, even);
    }
}

#[test]
fn each_width_and_each_height_up_to_64_comes_back() {
    for encoder in ENCODERS {
        let diagonals = (1..=64).flat_map(|side| [(side, 65 - side), (side, 20), (20, side)]);
        check(encoder, PixelFormat::Bgra, diagonals);
    }
}

#[test]
fn an_odd_stream_goes_on_without_keyframes() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        let pictures: Vec<_> = (0..6).map(|time| Rgb::pattern(321, 243, time)).collect();
        let mut units = Vec::new();
        for (index, picture) in (0..).zip(&pictures) {
            let frame = peer.encode(picture, PixelFormat::Bgra, index * 16_666_667, false);
            assert_eq!(frame.response.is_keyframe, index == 0, "{encoder}");
            units.push(frame.bytes);
        }
        for (decoded, picture) in decode(units.iter().map(Vec::as_slice))
            .iter()
            .zip(&pictures)
        {
            let psnr = decoded.psnr(&even(picture));
            assert!(psnr > 30.0, "{encoder}: {psnr} dB");
        }
    }
}

#[test]
fn sizes_that_are_padded_to_the_same_one_are_told_apart() {
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        let sizes = [(6, 4), (6, 4), (8, 8), (15, 16), (16, 16), (6, 4), (6, 4)];
        let pictures: Vec<_> = sizes.iter().map(|size| slope(size.0, size.1)).collect();
        let mut units = Vec::new();
        for (index, picture) in (0..).zip(&pictures) {
            let frame = peer.encode(picture, PixelFormat::Bgra, index * 16_666_667, false);
            units.push(frame.bytes);
        }
        let decoded = decode(units.iter().map(Vec::as_slice));
        for (decoded, picture) in decoded.iter().zip(&pictures) {
            let psnr = decoded.psnr(&even(picture));
            assert!(psnr > 28.0, "{encoder} {picture:?}: {psnr} dB");
        }
    }
}

#[test]
fn parameter_sets_say_that_nothing_is_reordered() {
    let low_delay = Changes {
        low_delay: true,
        ..Changes::default()
    };
    for encoder in ENCODERS {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        for (width, height) in [(320, 240), (33, 17)] {
            let picture = Rgb::pattern(width, height, 0);
            let frame = peer.encode(&picture, PixelFormat::Bgra, 0, true);
            assert!(nal_types(&frame.bytes).contains(&7), "{encoder}");
            assert_eq!(patches(&frame.bytes, low_delay), Ok(vec![]), "{encoder}");
        }
    }
}

#[test]
fn scanouts_of_odd_sizes_come_back_in_every_format() {
    for (id, format) in (0..).zip(["NV12", "I420", "BGRx", "RGBx", "BGRA", "RGBA"]) {
        for (width, height) in [(33, 17), (6, 5)] {
            let server = start(Config {
                scanouts: vec![ScanoutSpec {
                    id,
                    description: format!(
                        "videotestsrc is-live=true pattern=red ! \
                         video/x-raw,format={format},width={width},height={height}"
                    ),
                }],
                ..config()
            });
            let mut peer = Peer::of(&server);
            peer.subscribe(id);
            let Message::FrameResponse(_, unit) = peer.next().message else {
                panic!("no frame");
            };
            let decoded = &decode([&*unit])[0];
            let red = even(&Rgb::new(width, height, |_, _| [255, 0, 0]));
            assert_eq!((decoded.width, decoded.height), (red.width, red.height));
            let psnr = decoded.psnr(&red);
            assert!(psnr > 30.0, "{format} {width}x{height}: {psnr} dB");
        }
    }
}

#[test]
fn the_largest_picture_is_beyond_all_levels_and_comes_back() {
    const SIDE: usize = 8192;
    let server = start(Config {
        max_frame_bytes: (SIDE * SIDE * 3 / 2) as u32,
        ..config()
    });
    let mut peer = Peer::of(&server);
    let request = helix_protocol::message::FrameRequest {
        width: SIDE as u32,
        height: SIDE as u32,
        format: PixelFormat::Nv12.fourcc(),
        stride: SIDE as u32,
        ..Default::default()
    };
    peer.request(&request, vec![0x80; SIDE * SIDE * 3 / 2]);
    let unit = peer.next_frame().bytes;
    let sps = helix_protocol::h264::find_sps(&unit).unwrap();
    let info = helix_protocol::h264::StreamInfo::from_sps(sps).unwrap();
    assert_eq!((info.width, info.height), (8192, 8192));
}
