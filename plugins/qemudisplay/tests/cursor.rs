// SPDX-License-Identifier: MIT OR Apache-2.0

//! The cursor of a stock QEMU: its graphics card has one of its own, which QEMU sends apart from the
//! picture. The test programs the card in a guest's place.

mod common;

use std::time::Instant;

use common::Rig;
use gst::prelude::*;
use zerocopy_test_qemu::LIMIT;
use zerocopy_test_qemu::card::{CURSOR_SIDE, Card, Cursor};
use zerocopy_test_qemu::real::{Qemu, is_newer};

/// Pixels.
const SIZE: (u32, u32) = (320, 200);
const FIRST: Cursor = Cursor {
    size: (32, 16),
    left: [255, 0, 0],
    right: [0, 255, 0],
};
const SECOND: Cursor = Cursor {
    size: (16, 40),
    left: [255, 255, 255],
    right: [0, 0, 1],
};

/// A cursor and where it is.
type Shown<'a> = Option<(&'a Cursor, (u32, u32))>;

/// What the card draws. No cursor has blue of this kind.
fn colour(x: u32, y: u32) -> [u8; 3] {
    [x as u8, y as u8, 128]
}

/// The picture with a cursor in it, as pixels of blue, green and red.
fn expected(cursor: Shown<'_>) -> Vec<[u8; 3]> {
    let pixel = |x: u32, y: u32| {
        let inside = cursor.and_then(|(cursor, (left, top))| {
            cursor.pixel(x.checked_sub(left)?, y.checked_sub(top)?)
        });
        let [red, green, blue] = inside.unwrap_or_else(|| colour(x, y));
        [blue, green, red]
    };
    (0..SIZE.1)
        .flat_map(|y| (0..SIZE.0).map(move |x| pixel(x, y)))
        .collect()
}

/// A QEMU that shows the picture.
fn qemu() -> (Qemu, Card) {
    let (qemu, mut card) = Qemu::with_card("dbus,p2p=on");
    card.set_mode(SIZE.0, SIZE.1);
    card.draw(colour);
    (qemu, card)
}

/// Which colours a frame of the element has; none while it is of another size.
fn pixels(frame: &common::Frame) -> Option<Vec<[u8; 3]>> {
    let of_size = (frame.info.width(), frame.info.height()) == SIZE;
    let pixels = frame.pixels();
    let (pixels, _) = pixels.as_chunks::<4>();
    of_size.then(|| {
        pixels
            .iter()
            .map(|bgrx| [bgrx[0], bgrx[1], bgrx[2]])
            .collect()
    })
}

/// Waits for a frame with the cursor drawn into it.
fn shows(rig: &Rig, cursor: Shown<'_>) {
    let (start, expected) = (Instant::now(), expected(cursor));
    while pixels(&rig.next()).as_ref() != Some(&expected) {
        assert!(start.elapsed() < LIMIT, "never with {cursor:?}");
    }
}

/// What lies beside a frame: where, and its pixels of blue, green, red and alpha.
fn beside(buffer: &gst::BufferRef) -> Option<((i32, i32), Vec<u8>)> {
    let meta = buffer.meta::<gst_video::VideoOverlayCompositionMeta>()?;
    let overlay = meta.overlay();
    assert_eq!(overlay.n_rectangles(), 1);
    let rectangle = overlay.rectangle(0).unwrap();
    let (x, y, width, height) = rectangle.render_rectangle();
    assert_eq!((width, height), (CURSOR_SIDE, CURSOR_SIDE));
    let flags = gst_video::VideoOverlayFormatFlags::empty();
    let bytes = rectangle.pixels_unscaled_argb(flags);
    let bytes = bytes.map_readable().unwrap().to_vec();
    Some(((x, y), bytes))
}

/// The cursor as it lies beside frames.
fn overlay((cursor, (x, y)): (&Cursor, (u32, u32))) -> ((i32, i32), Vec<u8>) {
    let pixel = |x, y| match cursor.pixel(x, y) {
        Some([red, green, blue]) => [blue, green, red, 255],
        None => [0; 4],
    };
    let row = |y| (0..CURSOR_SIDE).flat_map(move |x| pixel(x, y));
    (
        (x as i32, y as i32),
        (0..CURSOR_SIDE).flat_map(row).collect(),
    )
}

#[test]
fn a_cursor_is_drawn_into_the_picture_wherever_it_goes() {
    let (qemu, mut card) = qemu();
    let rig = Rig::over(&qemu.qmp(), "cursor=blend");
    rig.play();
    shows(&rig, None);
    card.define_cursor(&FIRST);
    card.show_cursor(Some((100, 50)));
    shows(&rig, Some((&FIRST, (100, 50))));
    // Beyond the edge.
    card.show_cursor(Some((310, 190)));
    shows(&rig, Some((&FIRST, (310, 190))));
    card.define_cursor(&SECOND);
    shows(&rig, Some((&SECOND, (310, 190))));
    card.show_cursor(None);
    shows(&rig, None);
    card.show_cursor(Some((0, 0)));
    shows(&rig, Some((&SECOND, (0, 0))));
}

#[test]
fn a_cursor_lies_beside_the_picture_where_that_is_taken() {
    let (qemu, mut card) = qemu();
    let properties = format!("qmp-socket={} cursor=overlay", qemu.qmp().display());
    let rig = Rig::new(&properties, "video/x-raw(meta:GstVideoOverlayComposition)");
    rig.play();
    let (start, plain) = (Instant::now(), expected(None));
    let lies_beside = |wanted: Option<(&Cursor, (u32, u32))>| {
        let wanted = wanted.map(overlay);
        loop {
            assert!(start.elapsed() < LIMIT, "it never does");
            let frame = rig.next();
            if pixels(&frame).as_ref() == Some(&plain) && beside(&frame.buffer) == wanted {
                break;
            }
        }
    };
    lies_beside(None);
    card.define_cursor(&FIRST);
    card.show_cursor(Some((100, 50)));
    lies_beside(Some((&FIRST, (100, 50))));
    card.define_cursor(&SECOND);
    lies_beside(Some((&SECOND, (100, 50))));
    card.show_cursor(None);
    lies_beside(None);
}

#[test]
fn a_cursor_that_has_come_is_there_after_a_pause() {
    let (qemu, mut card) = qemu();
    let rig = Rig::over(&qemu.qmp(), "cursor=blend");
    rig.play();
    // It is listened to.
    shows(&rig, None);
    card.define_cursor(&FIRST);
    card.show_cursor(Some((8, 8)));
    shows(&rig, Some((&FIRST, (8, 8))));
    for _ in 0..3 {
        rig.pipeline.set_state(gst::State::Paused).unwrap();
        rig.play();
        shows(&rig, Some((&FIRST, (8, 8))));
    }
}

/// QEMU 7.2 tells a new listener none until it has another shape.
#[test]
fn a_cursor_from_before_is_there_if_qemu_tells_it() {
    let (qemu, mut card) = qemu();
    card.define_cursor(&FIRST);
    card.show_cursor(Some((8, 8)));
    let rig = Rig::over(&qemu.qmp(), "cursor=blend");
    rig.play();
    shows(&rig, is_newer().then_some((&FIRST, (8, 8))));
    card.define_cursor(&SECOND);
    card.show_cursor(Some((80, 80)));
    shows(&rig, Some((&SECOND, (80, 80))));
}
