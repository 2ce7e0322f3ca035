// SPDX-License-Identifier: MIT OR Apache-2.0

//! Clients that err, stall, vanish or come in crowds, and what that costs the others: nothing.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{LONG, Peer, Rgb, config, start};
use helix_host::{Config, ScanoutSpec, Server};
use helix_protocol::message::{Config as WireConfig, ErrorCode, PixelFormat};
use helix_protocol::{Address, encode};

/// A client that is no client: a bare socket.
fn raw(server: &Server) -> TcpStream {
    let Address::Tcp { host, port } = &server.addresses()[0] else {
        panic!("not TCP");
    };
    let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Reads one ERROR and the end of the stream; the code and the text.
fn error_then_end(mut stream: TcpStream) -> (i32, String) {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 12 + 260, "one ERROR and nothing else");
    assert_eq!(bytes[4], 0xff);
    let code = i32::from_le_bytes(bytes[12..16].try_into().unwrap());
    let text = bytes[16..].split(|byte| *byte == 0).next().unwrap();
    (code, String::from_utf8(text.to_vec()).unwrap())
}

fn encodes(peer: &mut Peer) {
    let frame = peer.encode(&Rgb::pattern(64, 64, 0), PixelFormat::Bgra, 5, true);
    assert_eq!(frame.response.pts, 5);
}

#[test]
fn garbage_is_answered_with_an_error_and_others_go_on() {
    let server = start(config());
    let mut other = Peer::of(&server);
    encodes(&mut other);
    let header = |msg_type: u8, flags: u8, size: u32| {
        let mut bytes = b"HXFR".to_vec();
        bytes.extend([msg_type, flags, 1, 0]);
        bytes.extend(size.to_le_bytes());
        bytes
    };
    let cases: [(&str, Vec<u8>); 6] = [
        ("magic", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("magic", vec![0; 4096]),
        ("payload_size", header(0x01, 1, u32::MAX)),
        ("payload_size", header(0x01, 1, 43)),
        ("payload_size", header(0x04, 0, 1000)),
        ("payload_size", header(0x77, 0, u32::MAX)),
    ];
    for (what, bytes) in cases {
        let mut stream = raw(&server);
        stream.write_all(&bytes).unwrap();
        let (code, text) = error_then_end(stream);
        assert_eq!(code, ErrorCode::INVALID_MESSAGE.0);
        assert!(text.contains(what), "{what}: {text}");
        encodes(&mut other);
    }
}

#[test]
fn who_only_closes_its_sending_side_still_gets_its_replies() {
    let server = start(config());
    let mut stream = raw(&server);
    let (request, pixels) = Rgb::pattern(640, 480, 0).request(PixelFormat::Bgra, 0, 0, false);
    for _ in 0..5 {
        let head = encode::frame_request(1, &request, pixels.len() as u32);
        stream.write_all(&head).unwrap();
        stream.write_all(&pixels).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    let mut replies = Vec::new();
    stream.read_to_end(&mut replies).unwrap();
    let mut rest = replies.as_slice();
    for _ in 0..5 {
        assert_eq!(rest[4], 0x02);
        let size = u32::from_le_bytes(rest[8..12].try_into().unwrap());
        rest = &rest[12 + size as usize..];
    }
    assert!(rest.is_empty());
}

#[test]
fn a_silent_client_and_one_that_stalls_in_a_message_cost_others_nothing() {
    let server = start(config());
    let silent = raw(&server);
    let mut stalled = raw(&server);
    let (request, pixels) = Rgb::pattern(64, 64, 0).request(PixelFormat::Bgra, 0, 9, false);
    let head = encode::frame_request(1, &request, pixels.len() as u32);
    stalled.write_all(&head).unwrap();
    stalled.write_all(&pixels[..1000]).unwrap();
    let mut other = Peer::of(&server);
    let asked = Instant::now();
    for _ in 0..20 {
        encodes(&mut other);
    }
    assert!(asked.elapsed() < Duration::from_secs(10));
    // Both are still welcome, within Config::stall_limit.
    stalled.write_all(&pixels[1000..]).unwrap();
    let mut reply = [0; 12];
    stalled.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4], 0x02);
    let mut silent = silent;
    silent.write_all(&encode::ping(3)).unwrap();
    silent.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4], 0x11);
}

#[test]
fn who_owes_a_message_for_too_long_is_told_and_loses_its_place() {
    let server = start(Config {
        max_clients: 4,
        stall_limit: Duration::from_millis(500),
        scanouts: vec![ScanoutSpec {
            id: 0,
            description: "videotestsrc is-live=true ! \
                          video/x-raw,width=64,height=64,framerate=1/30"
                .to_owned(),
        }],
        ..config()
    });
    let mut idle = Peer::of(&server);
    encodes(&mut idle);
    let mut subscriber = Peer::of(&server);
    subscriber.subscribe(0);
    subscriber.next_frame();
    let (request, pixels) = Rgb::pattern(64, 64, 0).request(PixelFormat::Bgra, 0, 0, false);
    let head = encode::frame_request(1, &request, pixels.len() as u32);
    let cases: [(&str, &[&[u8]]); 4] = [
        ("no message", &[]),
        ("rest of a message", &[&head[..5]]),
        ("rest of a message", &[&head, &pixels[..1000]]),
        ("rest of a message", &[&encode::ping(1)[..11]]),
    ];
    // Two places are left: each pair must have made room for the next.
    for pair in cases.chunks(2) {
        let streams: Vec<_> = pair
            .iter()
            .map(|(expected, parts)| {
                let mut stream = place(&server);
                for part in *parts {
                    stream.write_all(part).unwrap();
                }
                (expected, stream)
            })
            .collect();
        for (expected, stream) in streams {
            let (code, text) = error_then_end(stream);
            assert_eq!(code, ErrorCode::INVALID_MESSAGE.0);
            assert!(text.contains(*expected), "{expected}: {text}");
        }
    }
    // They owe nothing, and have been silent for longer.
    encodes(&mut idle);
    subscriber.expect_pong();
}

/// A bare socket that is not turned away. The host notices on its own time that a client has
/// gone; who is turned away finds the ERROR at once.
fn place(server: &Server) -> TcpStream {
    let until = Instant::now() + LONG;
    loop {
        let stream = raw(server);
        stream
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        match stream.peek(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                stream.set_read_timeout(Some(LONG)).unwrap();
                return stream;
            }
            _ => assert!(Instant::now() < until, "no place became free"),
        }
    }
}

#[test]
fn who_reads_nothing_while_data_waits_loses_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let server = start(Config {
        listen: vec![format!("unix:{}", path.display()).parse().unwrap()],
        stall_limit: Duration::from_millis(500),
        scanouts: vec![ScanoutSpec {
            id: 0,
            description: "videotestsrc is-live=true pattern=snow ! \
                          video/x-raw,width=640,height=480,framerate=60/1"
                .to_owned(),
        }],
        ..config()
    });
    let mut subscriber = UnixStream::connect(&path).unwrap();
    subscriber.write_all(&encode::subscribe(0)).unwrap();
    let mut pinging = UnixStream::connect(&path).unwrap();
    pinging
        .set_write_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    // Until the host, which can send no more PONGs, reads no more either.
    while pinging.write_all(&encode::ping(1)).is_ok() {}
    let mut reading = Peer::connect(&server.addresses()[0]);
    reading.subscribe(0);
    let reader = std::thread::spawn(move || {
        for _ in 0..120 {
            reading.next_frame();
        }
    });
    wait_for_end(&subscriber);
    wait_for_end(&pinging);
    reader.join().unwrap();
}

/// Waits until the other side has closed, without reading, which would help it.
fn wait_for_end(stream: &UnixStream) {
    let mut wanted = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one pollfd, which the call may write to, with a descriptor that `stream` owns.
    let count = unsafe { libc::poll(&raw mut wanted, 1, LONG.as_millis() as libc::c_int) };
    assert_eq!(count, 1, "it is still open");
    assert_ne!(wanted.revents & libc::POLLHUP, 0);
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let server = start(config());
    let mut stream = raw(&server);
    stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    // PONGs that nobody fetches: the host stops at 17 of them and its socket's buffer, and then
    // this side's buffers fill too.
    let pings: Vec<u8> = (0..1000).flat_map(|_| encode::ping(1).to_vec()).collect();
    let mut sent = 0_usize;
    let limit = 64 * 1024 * 1024;
    while sent < limit {
        match stream.write(&pings) {
            Ok(count) => sent += count,
            Err(_) => break,
        }
    }
    assert!(sent < limit, "the host took {sent} bytes and more");
    encodes(&mut Peer::of(&server));
}

#[test]
fn replies_that_nobody_reads_are_bounded_in_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let size = 256 * 256 * 4;
    let _server = start(Config {
        // Not TCP, whose buffers grow to megabytes.
        listen: vec![format!("unix:{}", path.display()).parse().unwrap()],
        max_frame_bytes: size,
        ..config()
    });
    let mut stream = UnixStream::connect(&path).unwrap();
    let best = WireConfig {
        bitrate: u32::MAX,
        ..WireConfig::default()
    };
    stream.write_all(&encode::config_req(1, &best)).unwrap();
    stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    // Replies as large as the pixels, nearly: of what cannot be predicted, at the best quality.
    let (request, pixels) = Rgb::noise(256, 256, 1).request(PixelFormat::Bgra, 0, 0, true);
    let message = [&*encode::frame_request(1, &request, size), &pixels].concat();
    let mut sent = 0;
    while let Ok(count) = stream.write(&message[sent % message.len()..]) {
        sent += count;
        assert!(sent < 64 * message.len(), "the host takes everything");
    }
    let mut reader = stream.try_clone().unwrap();
    stream.set_write_timeout(None).unwrap();
    let rest = (message.len() - sent % message.len()) % message.len();
    let requests = (sent + rest) / message.len();
    // All that was asked for comes, once somebody reads.
    let writer = std::thread::spawn(move || {
        stream.write_all(&message[message.len() - rest..]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    let mut replies = Vec::new();
    reader.read_to_end(&mut replies).unwrap();
    writer.join().unwrap();
    let (mut rest, mut count, mut least) = (replies.as_slice(), 0, usize::MAX);
    while !rest.is_empty() {
        assert_eq!(rest[4], 0x02);
        let size = 12 + u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        least = least.min(size);
        rest = &rest[size..];
        count += 1;
    }
    assert_eq!(count, requests);
    // Replies of `max_frame_bytes` in the host, one request that it works on, and twice what a
    // socket holds: 212992 bytes (net.core.wmem_default).
    let held = (size as usize + 212_992).div_ceil(least) + 1 + 1;
    assert!(
        requests <= held,
        "{requests} requests were taken, with replies of {least} bytes and more"
    );
    assert!(
        held < 12,
        "{held} says nothing: as many may be open by number"
    );
}

#[test]
fn more_frames_at_once_than_the_host_holds_are_all_answered() {
    let server = start(config());
    let mut peer = Peer::of(&server);
    let picture = Rgb::pattern(320, 240, 0);
    for pts in 0..100 {
        let (request, pixels) = picture.request(PixelFormat::Bgra, 0, pts, false);
        peer.request(&request, pixels);
    }
    for pts in 0..100 {
        assert_eq!(peer.next_frame().response.pts, pts);
    }
}

#[test]
fn one_client_too_many_is_told_and_a_place_becomes_free_again() {
    let server = start(Config {
        max_clients: 2,
        ..config()
    });
    let (mut first, mut second) = (Peer::of(&server), Peer::of(&server));
    first.expect_pong();
    second.expect_pong();
    let (code, text) = error_then_end(raw(&server));
    assert_eq!(code, ErrorCode::INTERNAL.0);
    assert!(text.contains("--max-clients"), "{text}");
    drop(first);
    // The host notices on its own time.
    let until = Instant::now() + LONG;
    loop {
        let mut peer = Peer::of(&server);
        peer.send(encode::ping(1));
        match peer.try_next().map(|envelope| envelope.message) {
            Ok(helix_protocol::Message::Pong) => break,
            _ => assert!(Instant::now() < until, "no place became free"),
        }
    }
    second.expect_pong();
}

#[test]
fn frames_over_the_limit_are_refused_before_they_are_read() {
    let server = start(Config {
        max_frame_bytes: 64 * 64 * 4,
        ..config()
    });
    encodes(&mut Peer::of(&server));
    let mut stream = raw(&server);
    let (request, pixels) = Rgb::pattern(64, 65, 0).request(PixelFormat::Bgra, 0, 0, false);
    stream
        .write_all(&encode::frame_request(1, &request, pixels.len() as u32))
        .unwrap();
    let (_, text) = error_then_end(stream);
    assert!(
        text.contains("payload_size") && text.contains("limit"),
        "{text}"
    );
}

#[test]
fn unknown_messages_are_skipped_and_ping_is_answered() {
    let server = start(config());
    let mut stream = raw(&server);
    let mut bytes = b"HXFR\x55\0\x01\0".to_vec();
    bytes.extend(5_u32.to_le_bytes());
    bytes.extend(b"abcde");
    bytes.extend(&*encode::ping(4));
    stream.write_all(&bytes).unwrap();
    let mut pong = [0; 12];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(pong[..8], *b"HXFR\x11\0\x04\0");
}

#[test]
fn an_encoder_that_breaks_fails_its_frames_and_the_client_goes_on() {
    let server = start(Config {
        // Takes no picture wider than this, and says so in mid-stream.
        encoder: "openh264enc".to_owned(),
        ..config()
    });
    let mut peer = Peer::of(&server);
    encodes(&mut peer);
    // openh264 refuses pictures over 9437184 pixels (its MAX_MBS_PER_FRAME of 36864).
    let (request, _) = Rgb::new(2, 2, |_, _| [0; 3]).request(PixelFormat::Nv12, 0, 6, false);
    let request = helix_protocol::message::FrameRequest {
        width: 8192,
        height: 4096,
        stride: 8192,
        ..request
    };
    peer.request(&request, vec![128; 8192 * 4096 / 2 * 3]);
    let error = peer.next_error();
    assert_eq!(error.code, ErrorCode::ENCODE_FAILED);
    assert!(error.text.contains("openh264enc"), "{}", error.text);
    encodes(&mut peer);
    peer.expect_pong();
}

#[test]
fn stopping_ends_all_connections_at_once() {
    let server = start(config());
    let mut peers: Vec<_> = (0..5).map(|_| Peer::of(&server)).collect();
    for peer in &mut peers {
        encodes(peer);
    }
    let asked = Instant::now();
    server.stop();
    assert!(asked.elapsed() < Duration::from_secs(3));
    for peer in &mut peers {
        peer.expect_end();
    }
}
