// SPDX-License-Identifier: MIT OR Apache-2.0

//! What Prometheus finds.

mod common;

use std::io::{ErrorKind, Read, Write};

use common::metrics::{ask, connect, figure, figures};
use common::{Peer, Rgb, config, start};
use helix_host::{Config, ScanoutSpec, Server};
use helix_protocol::message::PixelFormat;
use zerocopy_test_qemu::eventually;
use zerocopy_test_qemu::fake::FakeQemu;

fn host() -> Server {
    start(Config {
        scanouts: vec![ScanoutSpec {
            id: 3,
            description: "videotestsrc is-live=true".to_owned(),
        }],
        metrics: Some("tcp:127.0.0.1:0".parse().unwrap()),
        ..config()
    })
}

#[test]
fn figures_say_what_has_happened() {
    let server = host();
    let text = figures(&server);
    assert!(text.starts_with("HTTP/1.0 200 OK\r\n"), "{text}");
    assert!(text.contains("Content-Type: text/plain; version=0.0.4"));
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}", body.len())));
    assert_eq!(figure(body, "helix_clients "), 0);
    assert_eq!(figure(body, "helix_encoded_frames_total "), 0);
    assert!(!body.contains("helix_qemu"));
    // Each metric says what it is before its values.
    for line in body.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        assert!(body.contains(&format!("# TYPE {name} ")), "{line}");
        assert!(body.contains(&format!("# HELP {name} ")), "{line}");
    }

    let mut sender = Peer::of(&server);
    let bytes = sender
        .encode(&Rgb::pattern(64, 64, 0), PixelFormat::Bgra, 0, true)
        .bytes;
    let mut watcher = Peer::of(&server);
    watcher.subscribe(3);
    watcher.next_frame();
    let text = figures(&server);
    assert_eq!(figure(&text, "helix_clients "), 2);
    assert_eq!(figure(&text, "helix_encoded_frames_total "), 1);
    assert_eq!(
        figure(&text, "helix_encoded_bytes_total "),
        bytes.len() as u64
    );
    assert_eq!(figure(&text, "helix_encode_errors_total "), 0);
    assert_eq!(
        figure(&text, "helix_scanout_subscribers{scanout=\"3\"} "),
        1
    );
    assert!(figure(&text, "helix_scanout_frames_total{scanout=\"3\"} ") >= 1);
    assert!(figure(&text, "helix_scanout_bytes_total{scanout=\"3\"} ") > 0);
    assert_eq!(
        figure(&text, "helix_scanout_dropped_frames_total{scanout=\"3\"} "),
        0
    );
}

#[test]
fn it_shows_when_qemu_comes_back() {
    let qemu = FakeQemu::start(&[0, 2]);
    let server = start(Config {
        qemu: Some(format!("qmp:{}", qemu.qmp().display()).parse().unwrap()),
        metrics: Some("tcp:127.0.0.1:0".parse().unwrap()),
        ..config()
    });
    let text = figures(&server);
    assert_eq!(figure(&text, "helix_qemu_connected "), 1);
    assert_eq!(figure(&text, "helix_qemu_reconnects_total "), 0);
    // Its consoles are scanouts, and no others.
    for (id, there) in [(0, true), (1, false), (2, true)] {
        let name = format!("helix_scanout_subscribers{{scanout=\"{id}\"}} ");
        assert_eq!(text.contains(&name), there, "{id}");
    }
    // Nobody watches: the connection on which it is asked things is all there is.
    qemu.forget_clients();
    eventually("the next connection", || {
        let text = figures(&server);
        (figure(&text, "helix_qemu_reconnects_total ") == 1).then_some(())
    });
}

#[test]
fn other_requests_are_refused() {
    let server = host();
    let text = ask(&server, "POST / HTTP/1.0\r\n\r\n");
    assert!(text.starts_with("HTTP/1.0 405 "), "{text}");
    let mut stream = connect(&server);
    // It may be closed before all of this is written.
    let _ = stream.write_all(&vec![b'x'; 64 * 1024]);
    match stream.read(&mut [0; 1]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn visitors_who_say_nothing_are_closed_and_delay_nobody() {
    let server = host();
    let mut silent: Vec<_> = (0..20).map(|_| connect(&server)).collect();
    figures(&server);
    for stream in &mut silent {
        match stream.read(&mut [0; 1]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
    }
}
