// SPDX-License-Identifier: MIT OR Apache-2.0

//! DMA-BUFs, as far as that goes where no kernel makes any: the producer calls its memory so, and means
//! no modifier but linear. tests/vm/stages has the real ones.

use std::time::{Duration, Instant};

use gst::prelude::*;
use gstpipewirezerocopy::capture::PixelFormat;
use zerocopy_test_support::desktop::Desktop;

use super::content::run_on;
use super::desktop;
use super::hostile::{
    HEIGHT, SIZE, STRIDE, WIDTH, plain, playing, show_until_counted, shown, size,
};
use super::painter::{Canvas, Painter, Picture};
use super::run::{LONG, Run, pixels};

/// DRM_FORMAT_MOD_LINEAR
const LINEAR: u64 = 0;
/// I915_FORMAT_MOD_X_TILED
const TILED: u64 = (1 << 56) | 1;
const NO_GPU: &str = "/dev/dri/renderD4711";

fn painter(desktop: &Desktop, name: &str, modifiers: &'static [u64]) -> Painter {
    let canvas = Canvas {
        sealed: false,
        modifiers,
        ..Canvas::default()
    };
    Painter::on_canvas(desktop, name, PixelFormat::Bgrx, (WIDTH, HEIGHT), canvas)
}

/// A run that knows no GPU, also on a machine that has one.
fn run_without_gpu(desktop: &Desktop, name: &str) -> Run {
    let run = run_on(desktop, name, "video/x-raw");
    run.src.set_property("render-node", NO_GPU);
    run.src.set_property("keepalive-time", 0u32);
    run.play();
    run
}

fn text(run: &Run, stat: &str) -> String {
    let stats = run.src.property::<gst::Structure>("stats");
    stats.get(stat).unwrap()
}

#[test]
fn linear_dmabufs_are_read_where_a_producer_has_nothing_else() {
    let desktop = desktop();
    let painter = painter(&desktop, "dmabufs", &[TILED, LINEAR]);
    let run = run_without_gpu(&desktop, "dmabufs");
    // Wider and higher than the picture, which begins in the middle of a row.
    let stride = STRIDE as usize + 64;
    let mut bytes = vec![0xee; stride * (HEIGHT as usize + 8)];
    let offset = 2 * stride + 20;
    for row in 0..HEIGHT as usize {
        let at = offset + row * stride;
        bytes[at..at + STRIDE as usize].fill(row as u8);
    }
    let picture = Picture {
        bytes,
        offset: offset as u32,
        size: 0,
        stride: stride as i32,
        ..Picture::default()
    };
    let sample = shown(&painter, &run, &picture);
    let expected: Vec<u8> = (0..HEIGHT as u8)
        .flat_map(|row| [row; STRIDE as usize])
        .collect();
    assert_eq!(pixels(&sample), expected);
    assert_eq!(text(&run, "memory"), "system");
    assert_eq!(text(&run, "sync"), "implicit");
    assert!(run.stat("copies") >= 1);
    // As often as there are buffers, and more.
    for colour in 1..=20 {
        let got = pixels(&shown(&painter, &run, &plain(colour)));
        assert_eq!(got, vec![colour; SIZE as usize]);
    }
    // And smaller than the buffer.
    let cropped = Picture {
        crop: Some((3, 2, 4, 5)),
        ..plain(7)
    };
    assert_eq!(size(&shown(&painter, &run, &cropped)), (4, 5));
}

#[test]
fn a_producer_of_dmabufs_that_changes_size_goes_on() {
    let desktop = desktop();
    let painter = painter(&desktop, "resized-dmabufs", &[LINEAR]);
    let run = playing(&desktop, "resized-dmabufs");
    assert_eq!(size(&shown(&painter, &run, &plain(1))), (16, 8));
    painter.change(WIDTH * 2, HEIGHT);
    let wide = Picture::plain(vec![9; SIZE as usize * 2], STRIDE * 2);
    while size(&shown(&painter, &run, &wide)) != (32, 8) {}
}

#[test]
fn what_is_called_a_dmabuf_and_shrinks_harms_nobody() {
    let desktop = desktop();
    let painter = painter(&desktop, "false-dmabufs", &[LINEAR]);
    let run = run_without_gpu(&desktop, "false-dmabufs");
    assert_eq!(pixels(&shown(&painter, &run, &plain(1)))[0], 1);
    for lie in [
        Picture {
            offset: u32::MAX,
            ..plain(66)
        },
        Picture {
            stride: i32::MAX,
            ..plain(66)
        },
        Picture {
            stride: -STRIDE,
            ..plain(66)
        },
    ] {
        show_until_counted(&painter, &run, &lie, "corrupted");
    }
    assert_eq!(pixels(&shown(&painter, &run, &plain(2)))[0], 2);
    painter.shrink();
    let empty = Picture {
        bytes: Vec::new(),
        ..plain(3)
    };
    let start = Instant::now();
    let error = loop {
        assert!(start.elapsed() < LONG, "no error");
        painter.show(empty.clone());
        if let Some(error) = run.error_within(Duration::from_millis(500)) {
            break error;
        }
    };
    // The producer has nothing else.
    for part in ["share no format", "XR24 cannot be read"] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_single_dmabuf_is_read_and_goes_back() {
    let desktop = desktop();
    let canvas = Canvas {
        buffers: 1,
        sealed: false,
        modifiers: &[LINEAR],
        ..Canvas::default()
    };
    let size = (WIDTH, HEIGHT);
    let painter = Painter::on_canvas(&desktop, "one-dmabuf", PixelFormat::Bgrx, size, canvas);
    let run = run_without_gpu(&desktop, "one-dmabuf");
    // With keepalives, for which the last picture is kept.
    run.src.set_property("keepalive-time", 20u32);
    for colour in 1..=10 {
        while pixels(&shown(&painter, &run, &plain(colour)))[0] != colour {}
    }
    assert!(run.stat("copies") >= 10);
}
