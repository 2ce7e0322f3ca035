// SPDX-License-Identifier: MIT OR Apache-2.0

//! A host with a QEMU.

use helix_host::{Config, QemuAddress, Server};
use helix_protocol::message::{EnableScanout, ScanoutResp};
use helix_protocol::{Message, encode};

use super::{Peer, config, start};

/// A host whose scanouts are the consoles of this QEMU.
pub fn host(qemu: QemuAddress) -> Server {
    start(Config {
        qemu: Some(qemu),
        ..config()
    })
}

/// ENABLE_SCANOUT and its answer; frames in between are passed over.
pub fn enable(peer: &mut Peer, scanout_id: u32, (width, height): (u32, u32)) -> ScanoutResp {
    let request = EnableScanout {
        scanout_id,
        width,
        height,
        refresh_rate: 60,
    };
    peer.send(encode::enable_scanout(1, &request));
    loop {
        match peer.next().message {
            Message::ScanoutResp(answer) => return answer,
            Message::FrameResponse(..) => {}
            other => panic!("no answer but {other:?}"),
        }
    }
}
