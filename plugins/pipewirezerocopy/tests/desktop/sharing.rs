// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures that leave in the producer's own memory, and those that must be copied.

use std::time::{Duration, Instant};

use gst::prelude::*;
use gstpipewirezerocopy::capture::PixelFormat;
use zerocopy_test_support::desktop::{Desktop, Recording};

use super::content::run_on;
use super::desktop;
use super::hostile::{
    HEIGHT, SIZE, STRIDE, WIDTH, painter, plain, playing, show_until_counted, shown, shown_to,
};
use super::painter::{Canvas, Painter, Picture};
use super::run::{LONG, Run, pixels};

/// Whether downstream could write to it: memory of a pool, not the producer's.
fn is_pooled(sample: &gst::Sample) -> bool {
    let memory = sample.buffer().unwrap().peek_memory(0);
    !memory.flags().contains(gst::MemoryFlags::READONLY)
}

#[test]
fn a_compositor_with_few_buffers_goes_on_behind_a_sink_that_keeps_one() {
    let desktop = desktop();
    for buffers in [4, 8] {
        let name = format!("thrifty-{buffers}");
        let canvas = Canvas {
            buffers,
            thrifty: true,
            ..Canvas::default()
        };
        let size = (WIDTH, HEIGHT);
        let painter = Painter::on_canvas(&desktop, &name, PixelFormat::Bgrx, size, canvas);
        let run = playing(&desktop, &name);
        for colour in 0..10 {
            // Faster than they are taken.
            for _ in 0..20 {
                painter.show(plain(100));
            }
            while pixels(&shown(&painter, &run, &plain(colour)))[0] != colour {}
        }
    }
}

/// One that has so many buffers.
fn painter_of(desktop: &Desktop, name: &str, buffers: u32) -> Painter {
    let canvas = Canvas {
        buffers,
        ..Canvas::default()
    };
    Painter::on_canvas(desktop, name, PixelFormat::Bgrx, (WIDTH, HEIGHT), canvas)
}

#[test]
fn a_consumer_that_sits_on_pictures_gets_copies_before_the_producer_runs_short() {
    let desktop = desktop();
    let painter = painter(&desktop, "sat-on");
    let run = playing(&desktop, "sat-on");
    let mut kept = Vec::new();
    for colour in 0..40 {
        kept.extend(shown_to(&painter, &[&run], colour));
        let held = run.stat("held-buffers");
        assert!(
            held <= 6,
            "{held} of 8 buffers held: the producer has less than two"
        );
    }
    let shared = kept.iter().filter(|sample| !is_pooled(sample)).count();
    assert_eq!(shared, 4, "all that the producer can spare, and no more");
    // One more where a picture was shown again.
    assert!(run.stat("copies") >= 36);
    for (colour, sample) in kept.iter().enumerate() {
        assert_eq!(pixels(sample), vec![colour as u8; SIZE as usize]);
    }
    // What is let go of goes back, and pictures leave in place again. The sink has the last one.
    kept.clear();
    shown_to(&painter, &[&run], 100);
    let copies = run.stat("copies");
    for colour in 0..20 {
        assert!(!is_pooled(&shown_to(&painter, &[&run], colour)[0]));
    }
    assert_eq!(run.stat("copies"), copies);
}

#[test]
fn a_full_queue_does_not_stall_a_compositor() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    // All that comes is kept: an endless queue that nobody reads.
    run.src.set_property("keepalive-time", 0u32);
    run.play();
    let client = desktop.moving_picture(30);
    let start = Instant::now();
    while run.stat("copies") < 20 {
        assert!(start.elapsed() < LONG, "capture stalled");
        assert!(run.stat("held-buffers") <= 6, "mutter has two of its eight");
        // Nothing tells when a frame was copied.
        std::thread::sleep(Duration::from_millis(1));
    }
    desktop.stop(client);
    desktop.close(&cast);
}

#[test]
fn two_consumers_of_a_node_that_sit_on_pictures_leave_the_producer_buffers() {
    let desktop = desktop();
    // So many that the second one gets some beside those that the first one keeps from the beginning.
    let painter = painter_of(&desktop, "sat-on-by-two", 10);
    let first = playing(&desktop, "sat-on-by-two");
    let mut of_first = Vec::new();
    for colour in 0..4 {
        of_first.extend(shown_to(&painter, &[&first], colour));
    }
    let second = playing(&desktop, "sat-on-by-two");
    let mut of_second = Vec::new();
    // Far more than there are buffers: what comes of the last ones was drawn when both had all they get.
    for colour in 4..40 {
        let [one, other] = shown_to(&painter, &[&first, &second], colour)
            .try_into()
            .unwrap();
        of_first.push(one);
        of_second.push(other);
    }
    let in_place = |kept: &[gst::Sample]| kept.iter().map(|it| !is_pooled(it)).collect::<Vec<_>>();
    let (one, other) = (in_place(&of_first), in_place(&of_second));
    assert_eq!(one[..4], [true; 4], "the first one alone");
    assert!(other.contains(&true), "the second one has buffers too");
    for (run, in_place) in [(&first, &one), (&second, &other)] {
        let copied = in_place.iter().filter(|it| !**it).count();
        assert!(run.stat("copies") >= copied as u64);
    }
    // Both may have the same one.
    let either = one[4..].iter().zip(&other).filter(|it| *it.0 || *it.1);
    let taken = 4 + either.count();
    assert!(taken <= 8, "{taken} of 10 are kept");
    for (kept, from) in [(of_first, 0), (of_second, 4)] {
        for (sample, colour) in kept.iter().zip(from..) {
            assert_eq!(pixels(sample), vec![colour; SIZE as usize]);
        }
    }
}

#[test]
fn pictures_of_many_buffers_keep_their_content() {
    // The metadata of so many is more than a page, and some of it is mapped over other.
    for buffers in [10, 11, 12, 16] {
        let desktop = desktop();
        let painter = painter_of(&desktop, "many", buffers);
        let run = playing(&desktop, "many");
        let mut kept = Vec::new();
        for colour in 0..40 {
            kept.extend(shown_to(&painter, &[&run], colour));
        }
        for (sample, colour) in kept.iter().zip(0..) {
            assert_eq!(pixels(sample), vec![colour; SIZE as usize], "{buffers}");
        }
    }
}

#[test]
fn pictures_keep_their_content_when_the_stream_is_gone() {
    let desktop = desktop();
    let painter = painter(&desktop, "outlived");
    let run = playing(&desktop, "outlived");
    let mut kept = shown_to(&painter, &[&run], 1);
    kept.extend(shown_to(&painter, &[&run], 2));
    // The consumer stops; another one has the producer's buffers painted over.
    run.stop();
    let other = playing(&desktop, "outlived");
    for colour in 100..120 {
        shown_to(&painter, &[&other], colour);
    }
    kept.extend(shown_to(&painter, &[&other], 3));
    // Other buffers, then no stream at all.
    painter.change(WIDTH * 2, HEIGHT);
    let wide = Picture::plain(vec![99; SIZE as usize * 2], STRIDE * 2);
    while pixels(&shown(&painter, &other, &wide)).len() != SIZE as usize * 2 {}
    drop(painter);
    other.capture_message("vanished");
    for (sample, colour) in kept.iter().zip([1, 2, 3]) {
        assert!(!is_pooled(sample));
        assert_eq!(pixels(sample), vec![colour; SIZE as usize]);
    }
}

#[test]
fn memory_that_can_shrink_is_copied_and_shrinking_it_harms_nobody() {
    let desktop = desktop();
    let canvas = Canvas {
        sealed: false,
        ..Canvas::default()
    };
    let size = (WIDTH, HEIGHT);
    let painter = Painter::on_canvas(&desktop, "shrinks", PixelFormat::Bgrx, size, canvas);
    let run = playing(&desktop, "shrinks");
    let sample = shown(&painter, &run, &plain(7));
    assert!(is_pooled(&sample));
    assert!(run.stat("copies") >= 1);
    painter.shrink();
    assert_eq!(pixels(&sample), vec![7; SIZE as usize]);
    // Reading what is not there would end this process with SIGBUS.
    let empty = Picture {
        bytes: Vec::new(),
        ..plain(8)
    };
    show_until_counted(&painter, &run, &empty, "corrupted");
}

#[test]
fn sealed_memory_cannot_be_shrunk() {
    let desktop = desktop();
    let painter = painter(&desktop, "sealed");
    let run = playing(&desktop, "sealed");
    let sample = shown(&painter, &run, &plain(7));
    painter.shrink();
    shown_to(&painter, &[&run], 8);
    assert_eq!(pixels(&sample), vec![7; SIZE as usize]);
}

#[test]
fn a_pool_without_buffers_to_spare_is_copied_from() {
    let desktop = desktop();
    for buffers in [1, 2] {
        let painter = painter_of(&desktop, &format!("scarce-{buffers}"), buffers);
        let run = playing(&desktop, &format!("scarce-{buffers}"));
        for colour in 0..10 {
            assert!(is_pooled(&shown(&painter, &run, &plain(colour))));
            assert!(run.stat("held-buffers") <= 1);
        }
    }
}

#[test]
fn a_small_pool_has_two_buffers_left_while_one_is_copied_and_one_waits() {
    let desktop = desktop();
    // So large that the next one comes before one is copied.
    let (width, height) = (4096, 2160);
    let picture = Picture {
        size: width * height * 4,
        stride: width as i32 * 4,
        ..Picture::default()
    };
    for (buffers, shared) in [(4, 0), (5, 1), (6, 2)] {
        let canvas = Canvas {
            buffers,
            bytes: picture.size,
            announced: picture.size,
            ..Canvas::default()
        };
        let name = format!("small-{buffers}");
        let size = (width, height);
        let painter = Painter::on_canvas(&desktop, &name, PixelFormat::Bgrx, size, canvas);
        let run = playing(&desktop, &name);
        let kept: Vec<_> = (0..=shared)
            .map(|_| shown(&painter, &run, &picture))
            .collect();
        let in_place = kept.iter().filter(|sample| !is_pooled(sample)).count();
        assert_eq!(in_place, shared, "all that a pool of {buffers} can spare");
        let (copies, mut too_many) = (run.stat("copies"), 0);
        while run.stat("copies") < copies + 20 {
            painter.show(picture.clone());
            run.frame_within(Duration::from_millis(1));
            // For a moment there is one more, while the newest takes the place of another.
            if run.stat("held-buffers") + 2 > u64::from(buffers) {
                too_many += 1;
            } else {
                too_many = 0;
            }
            assert!(too_many < 3, "of {buffers} less than two are left");
        }
    }
}

#[test]
fn rows_with_padding_leave_in_place_for_who_reads_the_video_meta() {
    let desktop = desktop();
    let painter = painter(&desktop, "padded");
    let mut bytes = Vec::new();
    for row in 0..HEIGHT as u8 {
        bytes.extend(vec![row; STRIDE as usize]);
        bytes.extend([0xee; 12]);
    }
    let picture = Picture {
        crop: Some((1, 2, 4, 3)),
        ..Picture::plain(bytes, STRIDE + 12)
    };
    let expected: Vec<u8> = (2..5u8).flat_map(|row| [row; 16]).collect();
    for takes_meta in [false, true] {
        let run = run_on(&desktop, "padded", "video/x-raw");
        run.src.set_property("keepalive-time", 0u32);
        if takes_meta {
            run.propose::<gst_video::VideoMeta>();
        }
        run.play();
        let sample = shown(&painter, &run, &picture);
        assert_eq!(is_pooled(&sample), !takes_meta);
        assert_eq!(pixels(&sample), expected);
    }
}

#[test]
fn a_keepalive_shares_the_memory_of_the_producer() {
    let desktop = desktop();
    let painter = painter(&desktop, "resent");
    let run = run_on(&desktop, "resent", "video/x-raw");
    run.src.set_property("keepalive-time", 20u32);
    run.play();
    painter.show(plain(5));
    let address = |sample: &gst::Sample| {
        let memory = sample.buffer().unwrap().peek_memory(0);
        memory.map_readable().unwrap().as_ptr()
    };
    let first = run.frame();
    for _ in 0..5 {
        let again = run.frame();
        assert_eq!(address(&again), address(&first));
        assert_eq!(run.stat("held-buffers"), 1);
    }
    assert_eq!(run.stat("copies"), 0);
}
