// SPDX-License-Identifier: MIT OR Apache-2.0

//! Producers that pad, crop and shift their pictures, and those that lie about them.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gstpipewirezerocopy::capture::PixelFormat;

use super::content::run_on;
use super::desktop;
use super::painter::{Canvas, MEMORY, Painter, Picture, until};
use super::run::{LONG, Run, pixels};

pub const WIDTH: u32 = 16;
pub const HEIGHT: u32 = 8;
pub const STRIDE: i32 = WIDTH as i32 * 4;
pub const SIZE: u32 = WIDTH * HEIGHT * 4;

pub fn painter(desktop: &zerocopy_test_support::desktop::Desktop, name: &str) -> Painter {
    Painter::start(desktop, name, PixelFormat::Bgrx, (WIDTH, HEIGHT))
}

/// A picture of one colour.
pub fn plain(colour: u8) -> Picture {
    Picture::plain(vec![colour; SIZE as usize], STRIDE)
}

pub fn playing(desktop: &zerocopy_test_support::desktop::Desktop, name: &str) -> Run {
    let run = run_on(desktop, name, "video/x-raw");
    run.src.set_property("keepalive-time", 0u32);
    run.play();
    run
}

pub fn size(sample: &gst::Sample) -> (i32, i32) {
    let structure = sample.caps().unwrap().structure(0).unwrap();
    (
        structure.get("width").unwrap(),
        structure.get("height").unwrap(),
    )
}

/// Shows a picture until the element has counted it under `stat`: PipeWire passes one picture at a
/// time, and one that meets a busy machine is replaced by the next.
pub fn show_until_counted(painter: &Painter, run: &Run, picture: &Picture, stat: &str) {
    let before = run.stat(stat);
    let end = Instant::now() + LONG;
    while Instant::now() < end {
        painter.show(picture.clone());
        let again = Instant::now() + Duration::from_millis(500);
        while Instant::now() < again {
            if run.stat(stat) > before {
                return;
            }
            // Nobody tells when a picture is thrown away.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    panic!("a picture was not counted as {stat}");
}

/// What comes out after a picture was shown; see [`show_until_counted`] for why it may be shown
/// again.
pub fn shown(painter: &Painter, run: &Run, picture: &Picture) -> gst::Sample {
    let end = Instant::now() + LONG;
    while Instant::now() < end {
        painter.show(picture.clone());
        if let Some(sample) = run.frame_within(Duration::from_secs(1)) {
            return sample;
        }
    }
    panic!("a picture that was shown did not come");
}

/// What comes out of each of these after a picture of that colour was shown. One of the colour before,
/// which was shown again, may come first; see [`shown`].
pub fn shown_to(painter: &Painter, runs: &[&Run], colour: u8) -> Vec<gst::Sample> {
    painter.show(plain(colour));
    let to = |run: &&Run| {
        let end = Instant::now() + LONG;
        while Instant::now() < end {
            match run.frame_within(Duration::from_secs(1)) {
                Some(sample) if pixels(&sample)[0] == colour => return sample,
                Some(_) => {}
                None => painter.show(plain(colour)),
            }
        }
        panic!("a picture that was shown did not come");
    };
    runs.iter().map(to).collect()
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
    let picture = Picture {
        offset: 100,
        size: (STRIDE as u32 + 12) * HEIGHT,
        stride: STRIDE + 12,
        bytes,
        ..Picture::default()
    };
    let got = pixels(&shown(&painter, &run, &picture));
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
    let picture = Picture {
        crop: Some((3, 2, 4, 5)),
        ..Picture::plain(bytes, STRIDE)
    };
    let sample = shown(&painter, &run, &picture);
    assert_eq!(size(&sample), (4, 5));
    let expected: Vec<u8> = (2..7u8)
        .flat_map(|y| (3..7u8).map(move |x| y * 16 + x))
        .flat_map(|pixel| [pixel; 4])
        .collect();
    assert_eq!(pixels(&sample), expected);
    assert_eq!(size(&shown(&painter, &run, &plain(7))), (16, 8));
}

#[test]
fn pictures_that_are_none_are_skipped_and_counted() {
    let desktop = desktop();
    let painter = painter(&desktop, "broken");
    let run = playing(&desktop, "broken");
    assert_eq!(pixels(&shown(&painter, &run, &plain(1)))[0], 1);

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
    for picture in &corrupted {
        show_until_counted(&painter, &run, picture, "corrupted");
    }
    // Metadata only.
    let empty = Picture {
        size: 0,
        ..plain(66)
    };
    show_until_counted(&painter, &run, &empty, "empty");
    // More than there are buffers: each has gone back.
    let sample = shown(&painter, &run, &plain(2));
    assert_eq!(pixels(&sample)[0], 2, "nothing in between was pushed");
    // More where one was shown again too early.
    assert!(run.stat("corrupted") >= count);
    // The sink keeps the last one it gave out.
    assert!(run.stat("held-buffers") <= 1);
}

#[test]
fn memory_that_is_shorter_than_announced_is_not_read() {
    let desktop = desktop();
    // Reading it would end this process with SIGBUS.
    let canvas = Canvas {
        announced: 16 * MEMORY,
        ..Canvas::default()
    };
    let size = (WIDTH, HEIGHT);
    let painter = Painter::on_canvas(&desktop, "short", PixelFormat::Bgrx, size, canvas);
    let run = playing(&desktop, "short");
    let picture = Picture {
        offset: 8 * MEMORY,
        ..plain(66)
    };
    show_until_counted(&painter, &run, &picture, "corrupted");
    assert_eq!(run.stat("frames"), 0);
}

#[test]
fn a_producer_that_changes_size_goes_on_in_new_caps() {
    let desktop = desktop();
    let painter = painter(&desktop, "resized");
    let run = playing(&desktop, "resized");
    assert_eq!(size(&shown(&painter, &run, &plain(1))), (16, 8));
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
    let mut addresses = HashSet::new();
    for n in 0..=100 {
        let sample = shown_to(&painter, &[&run], n).remove(0);
        assert_eq!(pixels(&sample), vec![n; SIZE as usize]);
        let memory = sample.buffer().unwrap().peek_memory(0);
        addresses.insert(memory.map_readable().unwrap().as_ptr());
    }
    assert!(addresses.len() <= 8, "each buffer is mapped once");
    assert!(run.stat("frames") >= 101);
    // The sink keeps the last one it gave out.
    assert!(run.stat("held-buffers") <= 1);
}

#[test]
fn a_producer_that_changes_format_goes_on_in_new_caps() {
    let desktop = desktop();
    let painter = painter(&desktop, "repainted");
    let run = playing(&desktop, "repainted");
    assert_eq!(format(&shown(&painter, &run, &plain(1))), "BGRx");
    for (number, format_) in [PixelFormat::Rgba, PixelFormat::Xbgr, PixelFormat::Bgrx]
        .into_iter()
        .enumerate()
    {
        painter.change_format(format_, (WIDTH, HEIGHT));
        let colour = number as u8 + 10;
        let sample = shown_in(&painter, &run, &plain(colour), format_.name());
        assert_eq!(pixels(&sample), vec![colour; SIZE as usize]);
    }
}

/// What comes out in that format after a picture was shown, again and again: one that is shown before
/// the format is agreed on is lost, or leaves in the old one.
fn shown_in(painter: &Painter, run: &Run, picture: &Picture, name: &str) -> gst::Sample {
    let end = Instant::now() + LONG;
    while Instant::now() < end {
        let sample = shown(painter, run, picture);
        if format(&sample) == name && pixels(&sample)[..] == picture.bytes[..] {
            return sample;
        }
    }
    panic!("no picture in {name}");
}

fn format(sample: &gst::Sample) -> String {
    let structure = sample.caps().unwrap().structure(0).unwrap();
    structure.get("format").unwrap()
}

#[test]
fn formats_that_follow_each_other_at_once_are_each_answered() {
    // mutter fixes one, then another, before a picture has come (L5).
    let desktop = desktop();
    let painter = painter(&desktop, "undecided");
    let run = playing(&desktop, "undecided");
    shown(&painter, &run, &plain(1));
    let lasting = [PixelFormat::Rgba, PixelFormat::Xbgr, PixelFormat::Bgrx];
    for (colour, last) in (2..).zip(lasting) {
        let before = painter.formats();
        painter.change_format(PixelFormat::Argb, (WIDTH * 2, HEIGHT));
        until(|| painter.formats() > before);
        painter.change_format(last, (WIDTH, HEIGHT));
        let sample = shown_in(&painter, &run, &plain(colour), last.name());
        assert_eq!(size(&sample), (WIDTH as i32, HEIGHT as i32));
    }
    // Each has brought buffers of its own, and none of the old ones is held.
    until(|| run.stat("held-buffers") <= 1);
}
