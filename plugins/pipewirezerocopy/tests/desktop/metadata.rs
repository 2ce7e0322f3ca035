// SPDX-License-Identifier: MIT OR Apache-2.0

//! What comes with a picture: damage, how it is turned, the pointer beside it.

use gst::prelude::*;

use super::content::run_on;
use super::desktop;
use super::hostile::{HEIGHT, SIZE, WIDTH, painter, plain, playing, show_until_counted, shown};
use super::painter::{Cursor, Painter, Picture};
use super::run::{Run, pixels};

/// The damage on a buffer; none where everything may have changed.
fn damage(sample: &gst::Sample) -> Option<Vec<[i32; 4]>> {
    let buffer = sample.buffer().unwrap();
    let meta = gst::meta::CustomMeta::from_buffer(buffer, "GstDesktopDamage").ok()?;
    let rects = meta.structure().get::<gst::Array>("rects").unwrap();
    let numbers = |rect: &gst::glib::SendValue| {
        let rect = rect.get::<gst::Array>().unwrap();
        let numbers: Vec<i32> = rect.iter().map(|n| n.get().unwrap()).collect();
        numbers.try_into().unwrap()
    };
    Some(rects.iter().map(numbers).collect())
}

fn orientation(run: &Run) -> Option<String> {
    let pad = run.sink.static_pad("sink").unwrap();
    let tags = pad.sticky_event::<gst::event::Tag>(0)?;
    let value = tags.tag().get::<gst::tags::ImageOrientation>()?;
    Some(value.get().to_owned())
}

#[test]
fn damage_that_the_producer_reports_is_on_the_buffer() {
    let desktop = desktop();
    let painter = painter(&desktop, "damaged");
    let run = playing(&desktop, "damaged");
    let damaged = |damage: &[(i32, i32, u32, u32)]| Picture {
        damage: damage.to_vec(),
        ..plain(1)
    };
    let first = shown(&painter, &run, &damaged(&[(1, 2, 3, 4)]));
    assert_eq!(damage(&first), None, "nothing was there before");
    let second = shown(&painter, &run, &damaged(&[(1, 2, 3, 4), (-5, 6, 9, 99)]));
    assert_eq!(damage(&second), Some(vec![[1, 2, 3, 4], [0, 6, 4, 2]]));
    assert_eq!(
        damage(&shown(&painter, &run, &plain(1))),
        None,
        "it does not say"
    );
    // What a picture changed that never came has changed for the next one.
    let corrupted = Picture {
        chunk_flags: libspa::sys::SPA_CHUNK_FLAG_CORRUPTED as i32,
        ..damaged(&[(0, 0, 1, 1)])
    };
    show_until_counted(&painter, &run, &corrupted, "corrupted");
    assert_eq!(
        damage(&shown(&painter, &run, &damaged(&[(1, 2, 3, 4)]))),
        None
    );
}

#[test]
fn a_turned_picture_is_tagged() {
    let desktop = desktop();
    let painter = painter(&desktop, "turned");
    let run = playing(&desktop, "turned");
    shown(&painter, &run, &plain(1));
    assert_eq!(orientation(&run), None);
    // A picture turned to the left is looked at turned to the right.
    for (transform, expected) in [
        (libspa::sys::SPA_META_TRANSFORMATION_90, "rotate-90"),
        (libspa::sys::SPA_META_TRANSFORMATION_270, "rotate-270"),
        (
            libspa::sys::SPA_META_TRANSFORMATION_Flipped,
            "flip-rotate-0",
        ),
        (
            libspa::sys::SPA_META_TRANSFORMATION_Flipped90,
            "flip-rotate-270",
        ),
        (libspa::sys::SPA_META_TRANSFORMATION_None, "rotate-0"),
    ] {
        let picture = Picture {
            transform,
            ..plain(1)
        };
        shown(&painter, &run, &picture);
        assert_eq!(orientation(&run).as_deref(), Some(expected));
    }
}

/// A pointer of 2x1 pixels whose tip is the second one: blue and half of green.
fn pointer(x: i32, y: i32) -> Cursor {
    Cursor {
        position: (x, y),
        hotspot: (1, 0),
        bitmap: Some((2, 1, vec![255, 0, 0, 255, 0, 128, 0, 128])),
    }
}

fn with_pointer(colour: u8, cursor: Cursor) -> Picture {
    Picture {
        cursor: Some(cursor),
        ..plain(colour)
    }
}

/// Shows a buffer without pixels, which moves the pointer, until a picture with it has come.
fn moved(painter: &Painter, run: &Run, cursor: Cursor) -> gst::Sample {
    let empty = Picture {
        size: 0,
        ..with_pointer(66, cursor)
    };
    shown(painter, run, &empty)
}

#[test]
fn a_pointer_is_drawn_into_the_picture_for_who_takes_no_overlays() {
    let desktop = desktop();
    let painter = painter(&desktop, "pointed");
    let run = playing(&desktop, "pointed");
    let plain_pixels = vec![100; SIZE as usize];
    assert_eq!(pixels(&shown(&painter, &run, &plain(100))), plain_pixels);
    let at = |x: usize, y: usize| (y * WIDTH as usize + x) * 4;
    let colours = |pixels: &[u8], at: usize| pixels[at..at + 3].to_vec();

    let first = pixels(&shown(&painter, &run, &with_pointer(100, pointer(5, 3))));
    assert_eq!(colours(&first, at(4, 3)), [255, 0, 0]);
    // Half of the picture shows through.
    let blended = colours(&first, at(5, 3));
    assert!(
        (49..=51).contains(&blended[0]) && blended[1] > 170,
        "{blended:?}"
    );
    assert_eq!(colours(&first, at(6, 3)), [100, 100, 100]);

    // Moved without a new picture: the old place is clean again.
    let position = Cursor {
        bitmap: None,
        ..pointer(9, 7)
    };
    let sample = moved(&painter, &run, position);
    let second = pixels(&sample);
    assert_eq!(colours(&second, at(4, 3)), [100, 100, 100]);
    assert_eq!(colours(&second, at(8, 7)), [255, 0, 0]);
    assert_eq!(damage(&sample), Some(vec![[4, 3, 2, 1], [8, 7, 2, 1]]));

    let hidden = Cursor {
        bitmap: Some((0, 0, Vec::new())),
        ..pointer(9, 7)
    };
    assert_eq!(pixels(&moved(&painter, &run, hidden)), plain_pixels);
}

#[test]
fn a_pointer_that_reappears_on_a_still_screen_is_shown() {
    let desktop = desktop();
    let painter = painter(&desktop, "reappearing");
    let run = playing(&desktop, "reappearing");
    shown(&painter, &run, &with_pointer(100, pointer(5, 3)));
    let hidden = |x| Cursor {
        bitmap: Some((0, 0, Vec::new())),
        ..pointer(x, 3)
    };
    moved(&painter, &run, hidden(5));
    // Somebody types.
    let typed = pixels(&shown(&painter, &run, &plain(101)));
    assert_eq!(typed, vec![101; SIZE as usize]);
    // Where it cannot be seen it changes no picture.
    let elsewhere = Picture {
        size: 0,
        ..with_pointer(66, hidden(9))
    };
    show_until_counted(&painter, &run, &elsewhere, "empty");
    let sample = moved(&painter, &run, pointer(9, 3));
    let at = (3 * WIDTH as usize + 8) * 4;
    assert_eq!(pixels(&sample)[at..at + 3], [255, 0, 0]);
    assert_eq!(damage(&sample), Some(vec![[8, 3, 2, 1]]));
}

#[test]
fn a_pointer_is_an_overlay_for_who_takes_overlays() {
    let desktop = desktop();
    let painter = painter(&desktop, "overlaid");
    let run = run_on(&desktop, "overlaid", "video/x-raw");
    run.src.set_property("keepalive-time", 0u32);
    run.propose::<gst_video::VideoOverlayCompositionMeta>();
    run.play();
    let rectangle = |sample: &gst::Sample| {
        let buffer = sample.buffer().unwrap();
        let meta = buffer.meta::<gst_video::VideoOverlayCompositionMeta>()?;
        Some(meta.overlay().rectangle(0).unwrap().render_rectangle())
    };
    let sample = shown(&painter, &run, &with_pointer(100, pointer(5, 3)));
    assert_eq!(rectangle(&sample), Some((4, 3, 2, 1)));
    assert_eq!(pixels(&sample), vec![100; SIZE as usize]);
    let sample = moved(&painter, &run, pointer(0, HEIGHT as i32 - 1));
    assert_eq!(rectangle(&sample), Some((-1, 7, 2, 1)));
    assert_eq!(damage(&sample), Some(vec![[4, 3, 2, 1], [0, 7, 1, 1]]));
    assert_eq!(run.stat("copies"), 0);
}
