// SPDX-License-Identifier: MIT OR Apache-2.0

//! The screens of a stock QEMU, whose firmware draws a screen of text, as scanouts.

mod common;

use std::net::TcpListener;

use common::{Encoded, Peer, Rgb, config, decode, is_start, start};
use helix_host::{Config, QemuAddress, ScanoutSpec, Server, StartError};
use helix_protocol::message::{EnableScanout, ScanoutResp};
use helix_protocol::{Address, Message, encode};
use zerocopy_test_qemu::real::{Bus, Qemu};

fn qmp(qemu: &Qemu) -> QemuAddress {
    QemuAddress(qemu_display::Address::Qmp(qemu.qmp()))
}

fn on(bus: &Bus) -> QemuAddress {
    format!("dbus:{}", bus.address()).parse().unwrap()
}

fn host(qemu: QemuAddress) -> Server {
    start(Config {
        qemu: Some(qemu),
        ..config()
    })
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

/// Waits until what a decoder shows is what QEMU itself says that it shows. The text cursor
/// blinks, so there is always another picture.
fn shows_the_same(peer: &mut Peer, qemu: &Qemu) {
    let mut stream = Stream::default();
    loop {
        let frame = peer.next_frame();
        assert!(!stream.0.is_empty() || is_start(&frame.bytes));
        stream.add(frame);
        let dump = qemu.screendump();
        let picture = stream.picture();
        if (picture.width, picture.height) != (dump.width, dump.height) {
            continue;
        }
        let dump = Rgb {
            width: dump.width,
            height: dump.height,
            bytes: dump.bytes,
        };
        // A screen of one colour shows nothing of the decoder.
        let first = &dump.bytes[..3];
        if dump.bytes.chunks(3).all(|pixel| pixel == first) {
            continue;
        }
        let psnr = picture.psnr(&dump);
        println!("{}x{}: {psnr:.1} dB", dump.width, dump.height);
        if psnr > 30.0 {
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
