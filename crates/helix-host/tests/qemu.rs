// SPDX-License-Identifier: MIT OR Apache-2.0

//! The screens of a stock QEMU, whose firmware draws a screen of text, as scanouts.

mod common;

use common::qemu::{enable, host};
use common::{Encoded, Peer, Rgb, config, decode, is_start};
use helix_host::{Config, Prepared, QemuAddress, ScanoutSpec, StartError};
use zerocopy_test_qemu::real::{Bus, Qemu};

fn qmp(qemu: &Qemu) -> QemuAddress {
    QemuAddress(qemu_display::Address::Qmp(qemu.qmp()))
}

fn on(bus: &Bus) -> QemuAddress {
    format!("dbus:{}", bus.address()).parse().unwrap()
}

/// Frames since the last keyframe, which is all that the last of them needs.
#[derive(Default)]
struct Stream(Vec<Encoded>);

impl Stream {
    fn add(&mut self, frame: Encoded) {
        if frame.response.is_keyframe {
            self.0.clear();
        }
        self.0.push(frame);
    }

    /// The picture that a decoder shows now.
    fn picture(&self) -> Rgb {
        let pictures = decode(self.0.iter().map(|frame| frame.bytes.as_slice()));
        pictures.into_iter().next_back().unwrap()
    }
}

/// What QEMU itself says that it shows, once that is more than one colour.
fn dump(qemu: &Qemu) -> Option<Rgb> {
    let dump = qemu.screendump();
    (dump.colours() > 1).then_some(Rgb {
        width: dump.width,
        height: dump.height,
        bytes: dump.bytes,
    })
}

/// Waits until a decoder of what comes next shows what QEMU does. The text cursor blinks, so
/// there is always another picture. What is left of a former stream is passed over.
fn shows_the_same(peer: &mut Peer, qemu: &Qemu) {
    let mut stream = Stream::default();
    loop {
        let frame = peer.next_frame();
        assert_eq!(frame.response.is_keyframe, is_start(&frame.bytes));
        if stream.0.is_empty() && !frame.response.is_keyframe {
            continue;
        }
        stream.add(frame);
        let Some(dump) = dump(qemu) else {
            continue;
        };
        let picture = stream.picture();
        // The cursor may have blinked in between: the next one will do.
        if (picture.width, picture.height) == (dump.width, dump.height)
            && picture.psnr(&dump) > 30.0
        {
            return;
        }
    }
}

#[test]
fn a_screen_over_qmp_is_what_qemu_shows() {
    let qemu = Qemu::with_vga("dbus,p2p=on");
    let server = host(qmp(&qemu));
    let mut peer = Peer::of(&server);
    peer.subscribe(0);
    shows_the_same(&mut peer, &qemu);
}

#[test]
fn qemu_host_and_client_may_come_and_go_in_any_order() {
    let bus = Bus::start();
    // First the host, then its client, then QEMU.
    let server = host(on(&bus));
    let mut peer = Peer::of(&server);
    peer.subscribe(0);
    let mut qemu = bus.qemu_with_vga();
    shows_the_same(&mut peer, &qemu);
    // QEMU goes and comes; the subscription stays.
    qemu.kill();
    let again = bus.qemu_with_vga();
    shows_the_same(&mut peer, &again);
    // The client goes and comes.
    drop(peer);
    let mut peer = Peer::of(&server);
    peer.subscribe(0);
    shows_the_same(&mut peer, &again);
    // The host goes and comes.
    server.stop();
    while peer.try_next().is_ok() {}
    let server = host(on(&bus));
    let mut peer = Peer::of(&server);
    peer.subscribe(0);
    shows_the_same(&mut peer, &again);
}

#[test]
fn each_output_of_a_graphics_card_is_a_scanout_that_takes_a_size() {
    let outputs = ["-device", "virtio-gpu-pci,max_outputs=2"];
    let mut qemu = Qemu::start("dbus,p2p=on", &outputs);
    let server = host(qmp(&qemu));
    let mut peer = Peer::of(&server);
    for id in [0, 1] {
        let answer = enable(&mut peer, id, (1304, 744));
        assert!(answer.success);
        assert_eq!(answer.scanout_id, id);
        assert_eq!(answer.connector, format!("Virtual-{}", id + 1));
    }
    // Nobody drives the card: QEMU shows that the output is not active.
    peer.subscribe(1);
    assert!(is_start(&peer.next_frame().bytes));
    assert!(!enable(&mut peer, 2, (640, 480)).success);
    // Gone, it can switch nothing on, and the host goes on.
    qemu.kill();
    while enable(&mut peer, 1, (640, 480)).success {}
    peer.expect_pong();
}

#[test]
fn an_id_stands_for_one_screen() {
    let qemu = Qemu::with_vga("dbus,p2p=on");
    let with = |id| {
        Prepared::new(Config {
            qemu: Some(qmp(&qemu)),
            scanouts: vec![ScanoutSpec {
                id,
                description: "videotestsrc".to_owned(),
            }],
            ..config()
        })
    };
    assert!(matches!(with(0), Err(StartError::ScanoutOfQemu(0))));
    assert!(with(1).is_ok());
}
