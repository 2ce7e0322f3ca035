// SPDX-License-Identifier: MIT OR Apache-2.0

//! Resource ids instead of pixels, with a resolver that knows some memory.

mod common;

use std::sync::{Arc, mpsc};

use common::resources::{KnownMemory, Memory};
use common::{LONG, Peer, Rgb, config, decode, hello, start};
use helix_host::{ClientIdentity, Config, ResolveError, Resource, ResourceResolver, Server};
use helix_protocol::message::{Capabilities, ErrorCode, FrameRequest, PixelFormat};
use helix_protocol::{Message, encode};

fn with(resolver: Arc<dyn ResourceResolver>) -> Server {
    start(Config {
        resolver: Some(resolver),
        // Two encoders must write the same bytes, and x264's threads share out bits as they come.
        encoder: "x264enc threads=1".to_owned(),
        max_frame_bytes: 640 * 480 * 4,
        ..config()
    })
}

/// A picture as a resource, and the request that names it.
fn resource(
    picture: &Rgb,
    format: PixelFormat,
    margin: usize,
    id: u32,
    pts: i64,
) -> (FrameRequest, Memory) {
    let (request, bytes) = picture.request(format, margin, pts, false);
    let memory = Memory {
        width: request.width,
        height: request.height,
        format,
        stride: request.stride,
        bytes,
    };
    (
        FrameRequest {
            resource_id: id,
            ..request
        },
        memory,
    )
}

fn ask(peer: &mut Peer, request: &FrameRequest) {
    peer.send(encode::frame_request(1, request, 0));
}

#[test]
fn a_resource_comes_out_as_its_pixels_would_whoever_asks() {
    let known = Arc::new(KnownMemory::default());
    let server = with(known.clone());
    let mut legacy = Peer::of(&server);
    for (format, margin) in [
        (PixelFormat::Bgra, 0),
        (PixelFormat::Rgba, 44),
        (PixelFormat::Nv12, 0),
    ] {
        let (mut by_id, mut by_pixels) = (Peer::of(&server), Peer::of(&server));
        let response = by_id.greet(&hello());
        assert!(response.capabilities.contains(Capabilities::RESOURCE_IDS));
        let mut units = Vec::new();
        for index in 0..4 {
            let picture = Rgb::pattern(320, 240, index);
            let (request, memory) = resource(&picture, format, margin, 7, index as i64);
            known.set(7, Some(memory.clone()));
            ask(&mut by_id, &request);
            units.push(by_id.next_frame().bytes);
            ask(&mut legacy, &request);
            legacy.next_frame();
            let request = FrameRequest {
                resource_id: 0,
                ..request
            };
            by_pixels.request(&request, memory.bytes);
            assert_eq!(by_pixels.next_frame().bytes, units[index], "{format:?}");
        }
        let decoded = decode(units.iter().map(Vec::as_slice));
        assert_eq!(decoded.len(), 4);
        for (index, decoded) in decoded.iter().enumerate() {
            let psnr = decoded.psnr(&Rgb::pattern(320, 240, index));
            assert!(psnr > 30.0, "{format:?}: {psnr} dB");
        }
    }
    let asked = known.asked();
    let (identity, wanted) = &asked[0];
    assert_eq!(identity.listener, server.addresses()[0]);
    assert_eq!(identity.cid, None);
    assert_ne!(identity.connection, asked[1].0.connection);
    let expected = Resource {
        id: 7,
        width: 320,
        height: 240,
        format: PixelFormat::Bgra,
        stride: 1280,
        bytes: 320 * 240 * 4,
    };
    assert_eq!(*wanted, expected);
}

#[test]
fn a_resource_may_be_freed_and_drawn_over_while_the_encoder_has_it() {
    let known = Arc::new(KnownMemory::default());
    let server = with(known.clone());
    let mut peer = Peer::of(&server);
    let picture = Rgb::pattern(320, 240, 0);
    let (request, memory) = resource(&picture, PixelFormat::Bgra, 0, 3, 1);
    known.set(3, Some(memory));
    ask(&mut peer, &request);
    // Resolved before the PING behind it is looked at; the encoder may still be at it.
    peer.send(encode::ping(7));
    let mut frame = None;
    loop {
        let envelope = peer.next();
        match envelope.message {
            Message::Pong => break,
            Message::FrameResponse(_, bytes) => frame = Some(bytes.to_vec()),
            other => panic!("{other:?}"),
        }
    }
    known.set(3, None);
    ask(&mut peer, &request);
    let bytes = frame.unwrap_or_else(|| peer.next_frame().bytes);
    assert!(decode([bytes.as_slice()])[0].psnr(&picture) > 30.0);
    assert_eq!(peer.next_error().code, ErrorCode::RESOURCE_NOT_FOUND);
}

#[test]
fn what_does_not_fit_is_refused_in_order_and_the_connection_goes_on() {
    let known = Arc::new(KnownMemory::default());
    let server = with(known.clone());
    let mut peer = Peer::of(&server);
    peer.greet(&hello());
    let picture = Rgb::pattern(64, 48, 0);
    let (good, memory) = resource(&picture, PixelFormat::Bgra, 0, 3, 11);
    known.set(
        4,
        Some(Memory {
            bytes: vec![0; 5],
            ..memory.clone()
        }),
    );
    known.set(3, Some(memory));
    let changed = |change: &dyn Fn(&mut FrameRequest)| {
        let mut request = good;
        change(&mut request);
        request
    };
    let asked = known.asked().len();
    let before_the_resolver = [
        ("width is 0", changed(&|r| r.width = 0)),
        ("stride is 255", changed(&|r| r.stride = 255)),
        ("format", changed(&|r| r.format = 1)),
        ("send one or the other", changed(&|r| r.resource_id = 0)),
        (
            "over the limit of 1228800",
            changed(&|r| r.stride = 64 * 1024),
        ),
    ];
    for (what, request) in before_the_resolver {
        ask(&mut peer, &request);
        let error = peer.next_error();
        assert_eq!(error.code, ErrorCode::INVALID_MESSAGE, "{what}");
        assert!(error.text.contains(what), "{what}: {}", error.text);
    }
    assert_eq!(known.asked().len(), asked);
    let by_the_resolver = [
        (
            ErrorCode::RESOURCE_NOT_FOUND,
            changed(&|r| r.resource_id = 9),
        ),
        (ErrorCode::INVALID_MESSAGE, changed(&|r| r.height = 47)),
        (
            ErrorCode::NO_NATIVE_SURFACE,
            changed(&|r| r.resource_id = 4),
        ),
    ];
    for (code, request) in by_the_resolver {
        ask(&mut peer, &good);
        ask(&mut peer, &request);
        ask(&mut peer, &good);
        assert_eq!(peer.next_frame().response.pts, 11);
        let error = peer.next_error();
        assert_eq!(error.code, code, "{}", error.text);
        let id = format!("resource_id {}", request.resource_id);
        assert!(error.text.contains(&id), "{}", error.text);
        assert_eq!(peer.next_frame().response.pts, 11);
    }
}

/// Gives too few bytes, or waits until it is told to go on.
#[derive(Debug)]
struct Faulty {
    gate: std::sync::Mutex<mpsc::Receiver<()>>,
}

impl ResourceResolver for Faulty {
    fn resolve(
        &self,
        _: &ClientIdentity,
        resource: &Resource,
    ) -> Result<gst::Buffer, ResolveError> {
        match resource.id {
            1 => Ok(gst::Buffer::from_slice(vec![0; resource.bytes - 1])),
            2 => {
                self.gate.lock().unwrap().recv_timeout(LONG).unwrap();
                Err(ResolveError::NotFound)
            }
            _ => panic!("a resolver with a bug"),
        }
    }
}

#[test]
fn a_resolver_that_errs_blocks_or_panics_harms_its_own_client_only() {
    let (open, gate) = mpsc::channel();
    let server = with(Arc::new(Faulty { gate: gate.into() }));
    let (mut blocked, mut other) = (Peer::of(&server), Peer::of(&server));
    let (request, _) = resource(&Rgb::pattern(64, 48, 0), PixelFormat::Bgra, 0, 1, 0);
    ask(&mut other, &request);
    assert_eq!(other.next_error().code, ErrorCode::INTERNAL);
    ask(
        &mut blocked,
        &FrameRequest {
            resource_id: 2,
            ..request
        },
    );
    blocked.flush();
    let mut panicking = Peer::of(&server);
    ask(
        &mut panicking,
        &FrameRequest {
            resource_id: 3,
            ..request
        },
    );
    panicking.expect_end();
    other.expect_pong();
    open.send(()).unwrap();
    assert_eq!(blocked.next_error().code, ErrorCode::RESOURCE_NOT_FOUND);
}
