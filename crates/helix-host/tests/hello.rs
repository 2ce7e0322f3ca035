// SPDX-License-Identifier: MIT OR Apache-2.0

//! HELLO: what the host announces, what it then does, and what clients without it get as ever.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use common::{LONG, Peer, Rgb, config, hello, start, with_encoder};
use helix_host::{Config, ScanoutSpec, Server};
use helix_protocol::encode;
use helix_protocol::message::{
    AuthToken, CODEC_H264, Capabilities, Config as Settings, ErrorCode, FrameRequest, Hello,
    PixelFormat, RequestTag,
};
use helix_protocol::{Address, Message};

fn tag(epoch: u8, request_id: u16) -> RequestTag {
    RequestTag { epoch, request_id }
}

/// A picture's request with a tag.
fn tagged(tag: RequestTag) -> (FrameRequest, Vec<u8>) {
    let (request, pixels) = Rgb::pattern(64, 48, 0).request(PixelFormat::Bgra, 0, 3, false);
    (FrameRequest { tag, ..request }, pixels)
}

/// What cannot be encoded.
fn refused(tag: RequestTag) -> (FrameRequest, Vec<u8>) {
    let (request, pixels) = tagged(tag);
    (
        FrameRequest {
            width: 0,
            ..request
        },
        pixels,
    )
}

fn with_token(folder: &Path) -> Server {
    use std::os::unix::fs::PermissionsExt;
    let file = folder.join("token");
    std::fs::write(&file, "open sesame\n").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    start(Config {
        token_file: Some(file),
        stall_limit: Duration::from_secs(1),
        ..config()
    })
}

fn hello_with(token: &[u8]) -> Hello {
    Hello {
        auth_token: Some(AuthToken(token.to_vec())),
        ..hello()
    }
}

/// A bare socket: what the client library would not send.
fn raw(server: &Server) -> TcpStream {
    let Address::Tcp { host, port } = &server.addresses()[0] else {
        panic!("not TCP");
    };
    let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Everything up to the end of the stream, which is one ERROR: its code and text.
fn only_error(mut stream: TcpStream) -> (ErrorCode, String) {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes.len(), bytes[4]), (12 + 260, 0xff), "{bytes:?}");
    let code = i32::from_le_bytes(bytes[12..16].try_into().unwrap());
    let text = bytes[16..].split(|byte| *byte == 0).next().unwrap();
    (ErrorCode(code), String::from_utf8(text.to_vec()).unwrap())
}

#[test]
fn the_host_says_what_it_is_and_can() {
    for encoder in ["x264enc", "openh264enc"] {
        let server = with_encoder(encoder);
        let response = Peer::of(&server).greet(&hello());
        let expected = Hello {
            version: 1,
            max_in_flight: 16,
            // Request ids, CONFIG_RESP, KEYFRAME_REQ, capture time; no resource ids.
            capabilities: Capabilities(0b1_0000_0111),
            codecs: CODEC_H264,
            max_message: 12 + 44 + 64 * 1024 * 1024,
            max_width: 8192,
            max_height: 8192,
            name: Some(format!("helix-host {}", env!("CARGO_PKG_VERSION"))),
            encoder: Some(encoder.to_owned()),
            auth_token: None,
            clock_id: Some(b"CLOCK_MONOTONIC".to_vec()),
        };
        assert_eq!(response, expected);
    }
}

#[test]
fn the_lower_version_counts_and_a_hello_that_says_nothing_is_one() {
    let server = start(config());
    for (version, expected) in [(1, 1), (2, 1), (u16::MAX, 1)] {
        let nothing = Hello {
            version,
            ..Hello::default()
        };
        let mut peer = Peer::of(&server);
        assert_eq!(peer.greet(&nothing).version, expected);
        let (request, pixels) = tagged(tag(1, 2));
        peer.request(&request, pixels);
        assert_eq!(peer.next_frame().response.tag, RequestTag::default());
    }
}

#[test]
fn tags_come_back_in_replies_and_errors() {
    let server = start(config());
    let mut peer = Peer::of(&server);
    peer.greet(&hello());
    for tag in [tag(0, 0), tag(1, 0xffff), tag(255, 7)] {
        let (request, pixels) = tagged(tag);
        peer.request(&request, pixels);
        let (request, pixels) = refused(tag);
        peer.request(&request, pixels);
        assert_eq!(peer.next_frame().response.tag, tag);
        assert_eq!(peer.next_error().tag, Some(tag));
        let resource = FrameRequest {
            resource_id: 9,
            ..tagged(tag).0
        };
        peer.send(encode::frame_request(1, &resource, 0));
        let error = peer.next_error();
        assert_eq!(
            (error.code, error.tag),
            (ErrorCode::RESOURCE_NOT_FOUND, Some(tag))
        );
    }
}

#[test]
fn who_did_not_agree_on_tags_gets_zeros_and_short_errors() {
    let server = start(config());
    let silent = Peer::of(&server);
    let mut other = Peer::of(&server);
    other.greet(&Hello {
        capabilities: Capabilities(u64::MAX ^ Capabilities::REQUEST_IDS.0),
        ..hello()
    });
    for mut peer in [silent, other] {
        let (request, pixels) = tagged(tag(3, 4));
        peer.request(&request, pixels);
        assert_eq!(peer.next_frame().response.tag, RequestTag::default());
        let (request, pixels) = refused(tag(3, 4));
        peer.request(&request, pixels);
        assert_eq!(peer.next_error().tag, None);
    }
}

#[test]
fn config_resp_says_what_the_encoder_really_does() {
    let asked = Settings {
        width: 640,
        height: 480,
        bitrate: 1_234_567,
        framerate_num: 30_000,
        framerate_den: 1001,
        profile: 100,
        level: 51,
        realtime: false,
    };
    // x264enc counts in kbit/s; profile 100 becomes main; each host is always quick.
    for (encoder, bitrate) in [("x264enc", 1_234_000), ("openh264enc", 1_234_567)] {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        peer.greet(&hello());
        let in_force = peer.configure(&asked);
        let expected = Settings {
            bitrate,
            profile: 77,
            level: 0,
            realtime: true,
            ..asked
        };
        assert_eq!(in_force, expected, "{encoder}");
        let frame = peer.encode(&Rgb::pattern(640, 480, 0), PixelFormat::Bgra, 0, true);
        let sps = helix_protocol::h264::find_sps(&frame.bytes).unwrap();
        let in_force = peer.configure(&Settings {
            framerate_num: 0,
            width: 9000,
            bitrate: 0,
            ..asked
        });
        let expected = Settings {
            width: 8192,
            framerate_num: 60,
            framerate_den: 1,
            level: sps[3],
            ..expected
        };
        assert_eq!(in_force, expected, "{encoder}");
        assert_eq!(sps[1], 77, "{encoder}");
        assert_eq!(
            peer.configure(&Settings {
                bitrate: 1,
                profile: 66,
                ..asked
            })
            .bitrate,
            16_000,
            "{encoder}: the least that is set"
        );
    }
}

#[test]
fn frame_rates_are_taken_from_one_picture_a_minute_to_a_thousand_a_second() {
    for encoder in ["x264enc", "openh264enc"] {
        let server = with_encoder(encoder);
        let mut peer = Peer::of(&server);
        peer.greet(&hello());
        let cases = [
            ((1, 60), (1, 60)),
            ((1, 2), (1, 2)),
            ((24_000, 1001), (24_000, 1001)),
            ((1000, 1), (1000, 1)),
            ((1, 61), (1, 60)),
            ((1, u32::MAX), (1, 60)),
            ((1001, 1), (1000, 1)),
            ((u32::MAX, 1), (1000, 1)),
            ((u32::MAX, u32::MAX), (1, 1)),
            ((3_000_000_000, 100_000_000), (30, 1)),
            ((0, 1), (60, 1)),
            ((30, 0), (60, 1)),
        ];
        for (pts, ((framerate_num, framerate_den), expected)) in (0..).zip(cases) {
            let in_force = peer.configure(&Settings {
                framerate_num,
                framerate_den,
                ..Settings::default()
            });
            let rate = (in_force.framerate_num, in_force.framerate_den);
            assert_eq!(rate, expected, "{framerate_num}/{framerate_den}");
            // The encoder takes it too.
            peer.encode(&Rgb::pattern(64, 48, 0), PixelFormat::Bgra, pts, false);
        }
    }
}

#[test]
fn no_message_over_the_announced_size_is_taken() {
    let server = start(Config {
        max_frame_bytes: 4000,
        ..config()
    });
    let unknown = |payload_size: u32| {
        let mut bytes = b"HXFR\x55\0\x01\0".to_vec();
        bytes.extend(payload_size.to_le_bytes());
        bytes.resize(bytes.len() + payload_size as usize, 0);
        bytes
    };
    let max_message = Peer::of(&server).greet(&hello()).max_message;
    assert_eq!(max_message, 12 + 44 + 4000);
    let largest = max_message - 12;
    let (head, tlvs) = encode::hello(1, &hello());
    for size in [largest, largest + 1, 1_000_000] {
        let mut stream = raw(&server);
        stream.write_all(&[&*head, &tlvs].concat()).unwrap();
        let mut header = [0; 12];
        stream.read_exact(&mut header).unwrap();
        let response = u32::from_le_bytes(header[8..].try_into().unwrap());
        stream.read_exact(&mut vec![0; response as usize]).unwrap();
        // The host may close before it has read all.
        let _ = stream.write_all(&unknown(size));
        if size == largest {
            stream.write_all(&encode::ping(3)).unwrap();
            stream.read_exact(&mut header).unwrap();
            assert_eq!(header[4], 0x11);
        } else {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            // With a tag, as agreed.
            assert_eq!((bytes.len(), bytes[4]), (12 + 264, 0xff), "{size}");
        }
    }
    // Nobody told these.
    let mut stream = raw(&server);
    stream.write_all(&unknown(1_000_000)).unwrap();
    stream.write_all(&encode::ping(3)).unwrap();
    let mut pong = [0; 12];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(pong[4], 0x11);
}

#[test]
fn config_resp_of_a_subscriber_is_about_its_scanout() {
    let server = start(Config {
        scanouts: vec![ScanoutSpec {
            id: 1,
            description: "videotestsrc is-live=true ! \
                          video/x-raw,width=64,height=64,framerate=30/1"
                .to_owned(),
        }],
        ..config()
    });
    let mut peer = Peer::of(&server);
    peer.greet(&hello());
    peer.subscribe(1);
    peer.send(encode::config_req(
        1,
        &Settings {
            bitrate: 700_000,
            width: 640,
            ..Settings::default()
        },
    ));
    let in_force = loop {
        match peer.next().message {
            Message::FrameResponse(..) => {}
            Message::ConfigResp(config) => break config,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((in_force.bitrate, in_force.profile), (700_000, 77));
    assert_eq!((in_force.width, in_force.framerate_num), (0, 0));
}

#[test]
fn config_req_without_the_agreement_is_not_answered() {
    let server = start(config());
    let mut peer = Peer::of(&server);
    peer.send(encode::config_req(1, &Settings::default()));
    peer.expect_pong();
    let mut peer = Peer::of(&server);
    peer.greet(&Hello {
        capabilities: Capabilities::REQUEST_IDS,
        ..hello()
    });
    peer.send(encode::config_req(1, &Settings::default()));
    peer.expect_pong();
}

#[test]
fn a_picture_over_the_clients_max_message_is_an_error_that_names_the_limit() {
    let server = start(config());
    let mut peer = Peer::of(&server);
    peer.greet(&Hello {
        max_message: 4000,
        ..hello()
    });
    let (request, pixels) = Rgb::noise(320, 240, 1).request(PixelFormat::Bgra, 0, 1, false);
    peer.request(&request, pixels);
    let error = peer.next_error();
    assert_eq!(error.code, ErrorCode::ENCODE_FAILED);
    assert!(error.text.contains("max_message of 4000"), "{}", error.text);
    // What follows cannot refer to a picture that the client does not have.
    let flat = Rgb::new(320, 240, |_, _| [90; 3]);
    assert!(
        peer.encode(&flat, PixelFormat::Bgra, 2, false)
            .response
            .is_keyframe
    );
    let (request, pixels) = tagged(tag(0, 1));
    peer.request(&request, pixels);
    assert_eq!(peer.next_frame().response.tag, tag(0, 1));
}

#[test]
fn a_pushed_frame_over_the_clients_max_message_ends_the_connection() {
    let server = start(Config {
        scanouts: vec![ScanoutSpec {
            id: 0,
            description:
                "videotestsrc is-live=true pattern=snow ! video/x-raw,width=320,height=240"
                    .to_owned(),
        }],
        ..config()
    });
    let mut peer = Peer::of(&server);
    peer.greet(&Hello {
        max_message: 4000,
        ..hello()
    });
    peer.subscribe(0);
    let error = peer.next_error();
    assert!(error.text.contains("max_message"), "{}", error.text);
    peer.expect_end();
}

#[test]
fn a_hello_that_is_late_or_comes_twice_ends_the_connection() {
    let server = start(config());
    let first: [&dyn Fn(&mut Peer); 3] = [
        &|peer| peer.expect_pong(),
        &|peer| {
            peer.greet(&hello());
        },
        &|peer| {
            let (request, pixels) = tagged(tag(0, 1));
            peer.request(&request, pixels);
        },
    ];
    for before in first {
        let mut peer = Peer::of(&server);
        before(&mut peer);
        let (head, tlvs) = encode::hello(1, &hello());
        peer.connection.send_with(head, tlvs);
        // A request before it still gets its answer.
        let error = loop {
            match peer.next().message {
                Message::Error(error) => break error,
                Message::FrameResponse(..) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(error.code, ErrorCode::INVALID_MESSAGE);
        assert!(error.text.contains("first message"), "{}", error.text);
        peer.expect_end();
    }
}

#[test]
fn broken_hellos_are_refused_with_the_field() {
    let server = start(config());
    let hello = |change: &dyn Fn(&mut Vec<u8>)| {
        let (head, tlvs) = encode::hello(1, &hello());
        let mut bytes = [&*head, &tlvs].concat();
        change(&mut bytes);
        let size = bytes.len() as u32 - 12;
        if u32::from_le_bytes(bytes[8..12].try_into().unwrap()) < u32::MAX {
            bytes[8..12].copy_from_slice(&size.to_le_bytes());
        }
        bytes
    };
    let cases = [
        ("version is 0", hello(&|bytes| bytes[12] = 0)),
        (
            "fixed_size is 65535",
            hello(&|bytes| bytes[14..16].fill(0xff)),
        ),
        ("fixed_size is 31", hello(&|bytes| bytes[14] = 31)),
        ("last TLV", hello(&|bytes| bytes.extend([1, 0, 9]))),
        (
            "TLV length is 9",
            hello(&|bytes| bytes.extend([1, 0, 9, 0, 1])),
        ),
        ("payload_size", hello(&|bytes| bytes[8..12].fill(0xff))),
        ("payload_size", hello(&|bytes| bytes.resize(12 + 4097, 0))),
        ("codecs is 0x6", hello(&|bytes| bytes[28] = 6)),
    ];
    for (what, bytes) in cases {
        let mut stream = raw(&server);
        stream.write_all(&bytes).unwrap();
        let (code, text) = only_error(stream);
        assert_eq!(code, ErrorCode::INVALID_MESSAGE, "{what}");
        assert!(text.contains(what), "{what}: {text}");
    }
}

#[test]
fn the_token_lets_in() {
    let folder = tempfile::tempdir().unwrap();
    let server = with_token(folder.path());
    let mut peer = Peer::of(&server);
    assert_eq!(peer.greet(&hello_with(b"open sesame")).auth_token, None);
    // Pixels are welcome now, and so is silence.
    let (request, pixels) = tagged(tag(1, 1));
    peer.request(&request, pixels);
    peer.next_frame();
    assert!(peer.is_quiet_for(Duration::from_millis(1500)));
    peer.expect_pong();
}

#[test]
fn without_the_token_there_is_an_error_and_an_end() {
    let folder = tempfile::tempdir().unwrap();
    let server = with_token(folder.path());
    let greeting = |hello: &Hello| {
        let (head, tlvs) = encode::hello(1, hello);
        [&*head, &tlvs, &*encode::ping(2)].concat()
    };
    let (request, pixels) = Rgb::pattern(64, 64, 0).request(PixelFormat::Bgra, 0, 0, false);
    let frame = encode::frame_request(1, &request, pixels.len() as u32);
    let mut large = b"HXFR\x55\0\x01\0".to_vec();
    large.extend(1_000_000_u32.to_le_bytes());
    let cases: [(&str, Vec<u8>); 9] = [
        ("token is wrong", greeting(&hello_with(b"open sesam"))),
        ("token is wrong", greeting(&hello_with(b"open sesame "))),
        ("token is wrong", greeting(&hello_with(b""))),
        ("token is missing", greeting(&hello())),
        ("its token", encode::ping(1).to_vec()),
        ("its token", encode::subscribe(0).to_vec()),
        ("its token", [&*frame, &pixels].concat()),
        ("its token", large),
        ("its token", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
    ];
    for (what, bytes) in cases {
        let mut stream = raw(&server);
        // The host may close before it has read all.
        let _ = stream.write_all(&bytes);
        let (_, text) = only_error(stream);
        assert!(text.contains(what), "{what}: {text}");
        assert!(!text.contains("sesam"), "{text}");
    }
}

#[test]
fn a_stranger_who_sends_a_byte_now_and_then_loses_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let server = with_token(folder.path());
    let mut stream = raw(&server);
    let (head, tlvs) = encode::hello(1, &hello_with(&[b'x'; 1000]));
    stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    for byte in [&*head, &tlvs].concat() {
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        // Waits for the ERROR, a tenth of a second at most.
        if stream.peek(&mut [0]).is_ok() {
            break;
        }
    }
    stream.set_read_timeout(Some(LONG)).unwrap();
    let (_, text) = only_error(stream);
    assert!(text.contains("no token came in time"), "{text}");
}
