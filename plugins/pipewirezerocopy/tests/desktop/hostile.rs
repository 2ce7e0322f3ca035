// SPDX-License-Identifier: MIT OR Apache-2.0

//! Producers that pad, crop and shift their pictures, and those that lie about them.

use std::time::{Duration, Instant};

use gst::prelude::*;
use gstpipewirezerocopy::capture::PixelFormat;

use super::content::run_on;
use super::desktop;
use super::painter::{MEMORY, Painter, Picture};
use super::run::{LONG, Run, pixels};

const WIDTH: u32 = 16;
const HEIGHT: u32 = 8;
const STRIDE: i32 = WIDTH as i32 * 4;
const SIZE: u32 = WIDTH * HEIGHT * 4;

fn painter(desktop: &zerocopy_test_support::desktop::Desktop, name: &str) -> Painter {
    Painter::start(desktop, name, PixelFormat::Bgrx, (WIDTH, HEIGHT), MEMORY)
}

/// A picture of one colour.
fn plain(colour: u8) -> Picture {
    Picture::plain(vec![colour; SIZE as usize], STRIDE)
}

fn playing(desktop: &zerocopy_test_support::desktop::Desktop, name: &str) -> Run {
    let run = run_on(desktop, name, "video/x-raw");
    run.src.set_property("keepalive-time", 0u32);
    run.play();
    run
}

fn size(sample: &gst::Sample) -> (i32, i32) {
    let structure = sample.caps().unwrap().structure(0).unwrap();
    (
        structure.get("width").unwrap(),
        structure.get("height").unwrap(),
    )
}

#[test]
fn offset_and_stride_are_honoured() {
    let desktop = desktop();
    let painter = painter(&desktop, "shifted");
    let run = playing(&desktop, "shifted");
    // 100 bytes before the picture, 12 between its rows.
    let mut bytes = vec![0xee; 100];
    for row in 0..HEIGHT as u8 {
        bytes.extend(vec![row; STRIDE as usize]);
        bytes.extend([0xee; 12]);
    }
    painter.show(Picture {
        offset: 100,
        size: (STRIDE as u32 + 12) * HEIGHT,
        stride: STRIDE + 12,
        bytes,
        ..Picture::default()
    });
    let got = pixels(&run.frame());
    for (row, line) in got.chunks(STRIDE as usize).enumerate() {
        assert!(
            line.iter().all(|byte| usize::from(*byte) == row),
            "row {row}"
        );
    }
}

#[test]
fn a_crop_makes_the_frame_smaller() {
    let desktop = desktop();
    let painter = painter(&desktop, "cropped");
    let run = playing(&desktop, "cropped");
    let bytes: Vec<u8> = (0..SIZE).map(|n| (n / 4) as u8).collect();
    painter.show(Picture {
        crop: Some((3, 2, 4, 5)),
        ..Picture::plain(bytes, STRIDE)
    });
    let sample = run.frame();
    assert_eq!(size(&sample), (4, 5));
    let expected: Vec<u8> = (2..7u8)
        .flat_map(|y| (3..7u8).map(move |x| y * 16 + x))
        .flat_map(|pixel| [pixel; 4])
        .collect();
    assert_eq!(pixels(&sample), expected);
    painter.show(plain(7));
    assert_eq!(size(&run.frame()), (16, 8));
}

#[test]
fn pictures_that_are_none_are_skipped_and_counted() {
    let desktop = desktop();
    let painter = painter(&desktop, "broken");
    let run = playing(&desktop, "broken");
    painter.show(plain(1));
    assert_eq!(pixels(&run.frame())[0], 1);

    let corrupted = [
        Picture {
            chunk_flags: libspa::sys::SPA_CHUNK_FLAG_CORRUPTED as i32,
            ..plain(66)
        },
        Picture {
            header_flags: libspa::sys::SPA_META_HEADER_FLAG_CORRUPTED,
            ..plain(66)
        },
        // Lies, none of which may be read.
        Picture {
            stride: i32::MAX,
            ..plain(66)
        },
        Picture {
            stride: -STRIDE,
            ..plain(66)
        },
        Picture {
            stride: 1,
            ..plain(66)
        },
        Picture {
            offset: MEMORY - 1,
            size: u32::MAX,
            ..plain(66)
        },
        Picture {
            offset: u32::MAX,
            size: u32::MAX,
            ..plain(66)
        },
        Picture {
            size: SIZE - 1,
            ..plain(66)
        },
    ];
    let count = corrupted.len() as u64;
    for picture in corrupted {
        painter.show(picture);
    }
    // Metadata only.
    painter.show(Picture {
        size: 0,
        ..plain(66)
    });
    // More than there are buffers: each has gone back.
    painter.show(plain(2));
    assert_eq!(pixels(&run.frame())[0], 2, "nothing in between was pushed");
    assert_eq!(run.stat("corrupted"), count);
    assert_eq!(run.stat("empty"), 1);
    assert_eq!(run.stat("held-buffers"), 0);
}

#[test]
fn memory_that_is_shorter_than_announced_is_not_read() {
    let desktop = desktop();
    // Reading it would end this process with SIGBUS.
    let painter = Painter::start(
        &desktop,
        "short",
        PixelFormat::Bgrx,
        (WIDTH, HEIGHT),
        16 * MEMORY,
    );
    let run = playing(&desktop, "short");
    painter.show(Picture {
        offset: 8 * MEMORY,
        ..plain(66)
    });
    let start = Instant::now();
    while run.stat("corrupted") == 0 {
        assert!(start.elapsed() < LONG, "the frame did not come");
        // Nothing tells of a frame that was skipped.
        std::thread::yield_now();
    }
    assert_eq!(run.stat("frames"), 0);
}

#[test]
fn a_producer_that_changes_size_goes_on_in_new_caps() {
    let desktop = desktop();
    let painter = painter(&desktop, "resized");
    let run = playing(&desktop, "resized");
    painter.show(plain(1));
    assert_eq!(size(&run.frame()), (16, 8));
    for (width, height) in [(32, 4), (5, 3), (16, 8)] {
        painter.change(width, height);
        // A picture that is shown before the new size is agreed on is lost with its buffer, or
        // does not fit the old one.
        let bytes = vec![width as u8; (width * height * 4) as usize];
        let start = Instant::now();
        let sample = loop {
            assert!(start.elapsed() < LONG, "no frame of {width}x{height}");
            painter.show(Picture::plain(bytes.clone(), width as i32 * 4));
            match run.frame_within(Duration::from_millis(50)) {
                Some(sample) if size(&sample) == (width as i32, height as i32) => break sample,
                _ => {}
            }
        };
        assert_eq!(pixels(&sample), bytes);
    }
}

#[test]
fn many_pictures_go_through_few_buffers() {
    let desktop = desktop();
    let painter = painter(&desktop, "many");
    let run = playing(&desktop, "many");
    for n in 0..=100 {
        painter.show(plain(n));
        let got = pixels(&run.frame());
        assert_eq!(got, vec![n; SIZE as usize]);
    }
    assert_eq!(run.stat("frames"), 101);
    assert_eq!(run.stat("held-buffers"), 0);
}
