// SPDX-License-Identifier: MIT OR Apache-2.0

//! A client that has as much open as the host takes: nothing more is taken from it, and it is
//! listened to all the same.

mod common;

use common::gate::{self, GATED, Shut};
use common::{Peer, Rgb, config, hello, start};
use helix_host::Config;
use helix_protocol::Message;
use helix_protocol::message::PixelFormat;

#[test]
fn who_has_all_requests_open_still_gets_pongs() {
    gate::register();
    // By number, and by bytes: of one picture, and of some.
    for (most, side, bytes) in [
        (16, 16, 1 << 20),
        (1, 64, 64 * 64 * 4),
        (3, 64, 3 * 64 * 64 * 4 - 1),
    ] {
        let server = start(Config {
            encoder: GATED.to_owned(),
            max_frame_bytes: bytes,
            ..config()
        });
        let mut peer = Peer::of(&server);
        peer.greet(&hello());
        let picture = Rgb::pattern(side, side, 0);
        let shut = Shut::now();
        let request = |peer: &mut Peer, pts| {
            let (request, pixels) = picture.request(PixelFormat::Bgra, 0, pts, false);
            peer.request(&request, pixels);
        };
        for pts in 0..most {
            request(&mut peer, pts);
        }
        for _ in 0..3 {
            peer.expect_pong();
        }
        // One too many is not lost.
        request(&mut peer, most);
        drop(shut);
        for pts in 0..=most {
            let Message::FrameResponse(response, _) = peer.next().message else {
                panic!("no frame");
            };
            assert_eq!(response.pts, pts);
        }
    }
}
