// SPDX-License-Identifier: MIT OR Apache-2.0

//! What vsockenc takes and how it arrives: caps, strides, crops, memory.

use std::str::FromStr;
use std::sync::Once;

use gst::prelude::*;
use gst_check::Harness;
use helix_protocol::message::{Capabilities, FrameRequest};
use helix_protocol::{Message, Payload};
use zerocopy_test_support::peer::{Greets, Hello, Peer, Seen, Then, hello};

fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstvsock::plugin_register_static().unwrap();
    });
}

fn encoder(peer: &Peer, caps: &str) -> Harness {
    init();
    let mut harness = Harness::new_parse(&format!(
        "vsockenc tcp-host=127.0.0.1 tcp-port={}",
        peer.port()
    ));
    harness.set_src_caps_str(caps);
    harness
}

/// The next request that the peer sees, with its pixels.
fn request(peer: &Peer) -> (FrameRequest, Payload) {
    request_and_size(peer, &mut (0, 0))
}

/// The next request that the peer sees, with its pixels; `configured` becomes what the last
/// CONFIG_REQ before it said of the size.
fn request_and_size(peer: &Peer, configured: &mut (u32, u32)) -> (FrameRequest, Payload) {
    peer.wait_for(|seen| match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::FrameRequest(request, pixels) => Some((request, pixels.expect("pixels"))),
            Message::ConfigReq(config) => {
                *configured = (config.width, config.height);
                None
            }
            _ => None,
        },
        _ => None,
    })
}

/// Bytes that are all different from their neighbours.
fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i % 251) as u8).collect()
}

fn timed(mut buffer: gst::Buffer) -> gst::Buffer {
    buffer.make_mut().set_pts(gst::ClockTime::ZERO);
    buffer
}

#[test]
fn a_crop_arrives_as_a_smaller_picture() {
    let peer = Peer::answering();
    let mut harness = encoder(
        &peer,
        "video/x-raw,format=NV12,width=16,height=16,framerate=30/1",
    );
    let all = bytes(16 * 24);
    let mut buffer = gst::Buffer::from_slice(all.clone());
    gst_video::VideoCropMeta::add(buffer.get_mut().unwrap(), (4, 2, 8, 6));
    harness.push(timed(buffer)).unwrap();
    let (request, pixels) = request(&peer);
    assert_eq!((request.width, request.height, request.stride), (8, 6, 8));
    let luma = (2..8).flat_map(|y| &all[16 * y + 4..16 * y + 12]);
    let chroma = (1..4).flat_map(|y| &all[256 + 16 * y + 4..256 + 16 * y + 12]);
    let wanted: Vec<u8> = luma.chain(chroma).copied().collect();
    assert_eq!(*pixels, *wanted);
    // The stream shows the crop already; whoever decodes it must not crop once more.
    let encoded = harness.pull().unwrap();
    assert!(encoded.meta::<gst_video::VideoCropMeta>().is_none());
}

#[test]
fn every_size_and_format_arrives_as_it_is() {
    const SIZES: [(u32, u32); 11] = [
        (1, 1),
        (2, 2),
        (3, 5),
        (15, 16),
        (33, 17),
        (17, 33),
        (1366, 7),
        (1, 8192),
        (8192, 1),
        (8191, 3),
        (1366, 768),
    ];
    init();
    let peer = Peer::answering();
    let mut harness = Harness::new_parse(&format!(
        "vsockenc tcp-host=127.0.0.1 tcp-port={}",
        peer.port()
    ));
    let formats = ["BGRx", "BGRA", "RGBx", "RGBA", "NV12"];
    let mut configured = (0, 0);
    for (format, (width, height)) in formats
        .into_iter()
        .flat_map(|format| SIZES.map(|size| (format, size)))
    {
        let caps =
            format!("video/x-raw,format={format},width={width},height={height},framerate=30/1");
        harness.set_src_caps_str(&caps);
        let info = gst_video::VideoInfo::from_caps(&gst::Caps::from_str(&caps).unwrap()).unwrap();
        let all = bytes(info.size());
        harness
            .push(timed(gst::Buffer::from_slice(all.clone())))
            .unwrap();
        let (request, pixels) = request_and_size(&peer, &mut configured);
        let (width, height) = (width as usize, height as usize);
        let (sent, fourcc, wanted) = if format == "NV12" {
            let (wide, high) = (width.next_multiple_of(2), height.next_multiple_of(2));
            let stride = info.stride()[0] as usize;
            // The last column and row of an odd picture are there twice.
            let luma = (0..high).flat_map(|y| {
                let row = &all[y.min(height - 1) * stride..];
                (0..wide).map(|x| row[x.min(width - 1)])
            });
            let chroma = (0..high / 2).flat_map(|y| {
                let start = info.offset()[1] + y * stride;
                all[start..start + wide].iter().copied()
            });
            (
                (wide, high),
                0x3231_564e,
                luma.chain(chroma).collect::<Vec<_>>(),
            )
        } else {
            let fourcc = if format.starts_with('B') {
                0x3432_5241
            } else {
                0x3432_4241
            };
            ((width, height), fourcc, all.clone())
        };
        let what = format!("{format} {width}x{height}");
        assert_eq!(configured, (request.width, request.height), "{what}");
        let seen = (request.width as usize, request.height as usize);
        assert_eq!((seen, request.format), (sent, fourcc), "{what}");
        let bytes_per_pixel = if format == "NV12" { 1 } else { 4 };
        assert_eq!(request.stride as usize, sent.0 * bytes_per_pixel, "{what}");
        assert!(*pixels == *wanted, "{what}");
        harness.pull().unwrap();
    }
}

#[test]
fn the_largest_pictures_that_a_host_takes_arrive() {
    let all = Greets::With(Hello {
        max_message: u32::MAX,
        ..hello(Capabilities(0))
    });
    // 64 MiB, and the largest size there is.
    for (greets, format, side, bytes_per_four_pixels) in
        [(Greets::Legacy, "BGRx", 4096, 16), (all, "NV12", 8192, 6)]
    {
        let peer = Peer::greeting(greets, |link, envelope| {
            if let Message::FrameRequest(request, _) = &envelope.message {
                link.answer(request);
            }
            link.pong(envelope);
            Then::GoOn
        });
        let mut harness = encoder(
            &peer,
            &format!("video/x-raw,format={format},width={side},height={side},framerate=1/1"),
        );
        let size = side * side / 4 * bytes_per_four_pixels;
        let buffer = gst::Buffer::from_mut_slice(vec![7; size]);
        harness.push(timed(buffer)).unwrap();
        let (request, pixels) = request(&peer);
        assert_eq!(
            (request.width as usize, request.height as usize),
            (side, side)
        );
        assert_eq!(pixels.len(), size);
        harness.pull().unwrap();
    }
}

#[test]
fn planes_in_memories_of_their_own_arrive_tight() {
    let peer = Peer::answering();
    let mut harness = encoder(
        &peer,
        "video/x-raw,format=NV12,width=16,height=8,framerate=30/1",
    );
    let mut buffer = gst::Buffer::new();
    let all = bytes(32 * 12);
    let writable = buffer.get_mut().unwrap();
    for plane in [&all[..32 * 8], &all[32 * 8..]] {
        writable.append_memory(gst::Memory::from_slice(plane.to_vec()));
    }
    gst_video::VideoMeta::add_full(
        writable,
        gst_video::VideoFrameFlags::empty(),
        gst_video::VideoFormat::Nv12,
        16,
        8,
        &[0, 32 * 8],
        &[32, 32],
    )
    .unwrap();
    harness.push(timed(buffer)).unwrap();
    let wanted: Vec<u8> = all
        .chunks_exact(32)
        .flat_map(|row| &row[..16])
        .copied()
        .collect();
    assert_eq!(*request(&peer).1, *wanted);
}

#[test]
fn a_buffer_that_lies_about_its_planes_is_an_error() {
    let peer = Peer::answering();
    let mut harness = encoder(
        &peer,
        "video/x-raw,format=BGRx,width=16,height=4,framerate=30/1",
    );
    let mut buffer = gst::Buffer::from_slice(bytes(256));
    gst_video::VideoMeta::add_full(
        buffer.get_mut().unwrap(),
        gst_video::VideoFrameFlags::empty(),
        gst_video::VideoFormat::Bgrx,
        16,
        4,
        &[1 << 40],
        &[64],
    )
    .unwrap();
    assert_eq!(harness.push(timed(buffer)), Err(gst::FlowError::Error));
}

#[test]
fn upstream_learns_what_downstream_wants() {
    let peer = Peer::answering();
    init();
    let mut harness = Harness::new_parse(&format!(
        "vsockenc tcp-host=127.0.0.1 tcp-port={} ! capsfilter \
         caps=video/x-h264,width=640,framerate=15/1",
        peer.port()
    ));
    harness.play();
    let caps = harness.srcpad().unwrap().peer_query_caps(None);
    assert!(!caps.is_empty());
    for structure in caps.iter() {
        assert_eq!(structure.get::<i32>("width"), Ok(640), "{caps}");
        assert_eq!(
            structure.get::<gst::Fraction>("framerate"),
            Ok(gst::Fraction::new(15, 1)),
            "{caps}"
        );
    }
}

#[test]
fn an_allocation_query_without_caps_is_answered() {
    let peer = Peer::answering();
    let harness = encoder(
        &peer,
        "video/x-raw,format=NV12,width=16,height=16,framerate=30/1",
    );
    let mut query = gst::query::Allocation::new(None, false);
    assert!(harness.srcpad().unwrap().peer_query(&mut query));
    let crop = gst_video::VideoCropMeta::meta_api();
    assert!(
        query
            .find_allocation_meta::<gst_video::VideoCropMeta>()
            .is_some(),
        "{crop}"
    );
}

#[test]
fn memory_from_the_proposed_pool_is_sent_in_as_few_pieces_as_there_are_planes() {
    let peer = Peer::answering();
    let caps = "video/x-raw,format=NV12,width=1280,height=720,framerate=30/1";
    let mut harness = encoder(&peer, caps);
    let caps: gst::Caps = caps.parse().unwrap();
    let mut query = gst::query::Allocation::new(Some(&caps), true);
    assert!(harness.srcpad().unwrap().peer_query(&mut query));
    let (pool, ..) = query.allocation_pools().next().expect("a pool");
    let pool = pool.expect("of system memory");
    pool.set_active(true).unwrap();
    let buffer = pool.acquire_buffer(None).unwrap();
    let meta = buffer.meta::<gst_video::VideoMeta>().expect("a video meta");
    // Tight, and one plane right after the other, as the protocol wants them.
    assert_eq!(
        (meta.stride(), meta.offset()),
        (&[1280, 1280][..], &[0, 1280 * 720][..])
    );
    harness.push(timed(buffer)).unwrap();
    assert_eq!(request(&peer).1.len(), 1280 * 720 * 3 / 2);
    pool.set_active(false).unwrap();
}
