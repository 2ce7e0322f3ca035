// SPDX-License-Identifier: MIT OR Apache-2.0

//! The whole way of a virtual machine's screen: a stock QEMU, helix-host, scanoutsrc, a decoder.

use gst::prelude::*;
use helix_host::{Config, STALL_LIMIT, Server};
use helix_protocol::Address;
use zerocopy_test_qemu::LIMIT;
use zerocopy_test_qemu::ppm::Rgb;
use zerocopy_test_qemu::real::Qemu;

fn host(qemu: &Qemu) -> Server {
    gst::init().unwrap();
    gstscanout::plugin_register_static().unwrap();
    Server::start(Config {
        listen: vec!["tcp:127.0.0.1:0".parse().unwrap()],
        encoder: "x264enc".to_owned(),
        scanouts: Vec::new(),
        qemu: Some(format!("qmp:{}", qemu.qmp().display()).parse().unwrap()),
        token_file: None,
        allow_cids: Vec::new(),
        resolver: None,
        metrics: None,
        max_clients: 64,
        max_frame_bytes: 64 * 1024 * 1024,
        stall_limit: STALL_LIMIT,
    })
    .unwrap()
}

/// Ends when dropped, by a panic too.
struct Playing(gst::Pipeline);

impl Drop for Playing {
    fn drop(&mut self) {
        let _ = self.0.set_state(gst::State::Null);
    }
}

/// The mean difference of two pictures' bytes; over 255 if they have other sizes.
fn difference(a: &Rgb, b: &Rgb) -> f64 {
    if (a.width, a.height) != (b.width, b.height) {
        return f64::INFINITY;
    }
    let pairs = a.bytes.iter().zip(&b.bytes);
    let sum: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 / a.bytes.len() as f64
}

#[test]
fn a_screen_of_qemu_comes_out_of_a_decoder_as_qemu_shows_it() {
    // It has a VGA's text screen for its firmware, and takes sizes as graphics cards of guests do.
    let qemu = Qemu::start("dbus,p2p=on", &["-device", "virtio-vga"]);
    let server = host(&qemu);
    let Address::Tcp { port, .. } = server.addresses()[0] else {
        panic!("no TCP address");
    };
    // A blinking text cursor is a frame now and then: a decoder must not hold one back (L27).
    let pipeline = gst::parse::launch(&format!(
        "scanoutsrc tcp-host=127.0.0.1 tcp-port={port} scanout-id=0 enable=true width=1280 \
         height=800 ! h264parse ! avdec_h264 max-threads=1 ! videoconvert ! \
         video/x-raw,format=RGB ! appsink name=sink sync=false"
    ))
    .unwrap()
    .downcast::<gst::Pipeline>()
    .unwrap();
    let sink = pipeline.by_name("sink").and_downcast::<gst_app::AppSink>();
    let sink = sink.unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let playing = Playing(pipeline);
    loop {
        let limit = gst::ClockTime::try_from(LIMIT).unwrap();
        let sample = sink.try_pull_sample(limit).unwrap_or_else(|| {
            let bus = playing.0.bus().unwrap();
            panic!(
                "no picture: {:?}",
                bus.pop_filtered(&[gst::MessageType::Error])
            )
        });
        let caps = sample.caps().unwrap().structure(0).unwrap();
        let side = |name| caps.get::<i32>(name).unwrap() as usize;
        let (width, height) = (side("width"), side("height"));
        let map = sample.buffer().unwrap().map_readable().unwrap();
        let stride = map.len() / height;
        let rows = map.chunks(stride);
        let picture = Rgb {
            width,
            height,
            bytes: rows.flat_map(|row| &row[..width * 3]).copied().collect(),
        };
        let shown = qemu.screendump();
        if shown.colours() > 1 && difference(&picture, &shown) < 3.0 {
            return;
        }
    }
}
