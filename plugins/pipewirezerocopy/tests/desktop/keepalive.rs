// SPDX-License-Identifier: MIT OR Apache-2.0

//! A desktop that stands still, and the end of the stream.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gst::prelude::*;
use gstpipewirezerocopy::capture::PixelFormat;
use zerocopy_test_support::desktop::Recording;

use super::content::run_on;
use super::desktop;
use super::hostile::{HEIGHT, WIDTH, painter, plain, show_until_counted, shown};
use super::painter::{Canvas, Painter, Picture, until};
use super::run::{LONG, Run, is_keepalive, pixels, pts};

/// A picture and the `count` keepalives that follow it, once the desktop has come to rest.
pub fn still(run: &Run, count: usize) -> (gst::Sample, Vec<gst::Sample>) {
    let mut frame = run.frame();
    let mut keepalives = Vec::new();
    while keepalives.len() < count {
        let next = run.frame();
        if is_keepalive(&next) {
            keepalives.push(next);
        } else {
            frame = next;
            keepalives.clear();
        }
    }
    (frame, keepalives)
}

/// Whether these came no faster than at the period, each in its own, however late in it, and not
/// slower by far on a machine that may be busy. How exact they are on a machine that does nothing
/// else, `ci/bench` tells; that they keep to a grid, the unit tests of the schedule.
fn keep_to(period: gst::ClockTime, keepalives: &[gst::Sample]) -> bool {
    let (Some(first), Some(last)) = (keepalives.first(), keepalives.last()) else {
        return false;
    };
    let count = keepalives.len() as u64;
    keepalives.is_sorted_by(|a, b| pts(a) < pts(b))
        && (period * (count - 2)..period * count * 10).contains(&(pts(last) - pts(first)))
}

fn address(sample: &gst::Sample) -> *const u8 {
    let memory = sample.buffer().unwrap().peek_memory(0);
    memory.map_readable().unwrap().as_ptr()
}

#[test]
fn a_still_desktop_is_kept_alive_at_the_period() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.src.set_property("keepalive-time", 50u32);
    run.play();
    let (frame, keepalives) = still(&run, 20);
    assert!(run.stat("keepalives") >= 20);
    for keepalive in &keepalives {
        assert_eq!(address(keepalive), address(&frame), "the same memory");
        assert!(pts(keepalive) > pts(&frame), "a new timestamp");
    }
    assert!(keep_to(gst::ClockTime::from_mseconds(50), &keepalives));
    desktop.close(&cast);
}

#[test]
fn other_wake_ups_do_not_move_the_period() {
    let desktop = desktop();
    let painter = painter(&desktop, "woken");
    let run = run_on(&desktop, "woken", "video/x-raw");
    run.src.set_property("keepalive-time", 50u32);
    run.play();
    painter.show(plain(1));
    run.frame();
    let done = AtomicBool::new(false);
    let keepalives = std::thread::scope(|scope| {
        let (src, stop) = (&run.src, &done);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // Each wakes the thread, to the same end. Were the period to begin anew, none would
                // ever be over.
                src.set_property("keepalive-time", 50u32);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        let keepalives: Vec<_> = (0..21).filter_map(|_| run.frame_within(LONG)).collect();
        done.store(true, Ordering::Relaxed);
        keepalives
    });
    assert_eq!(keepalives.len(), 21);
    assert!(keepalives.iter().all(is_keepalive));
    assert!(keep_to(gst::ClockTime::from_mseconds(50), &keepalives));
}

#[test]
fn keepalives_can_be_turned_off_and_on_while_playing() {
    let desktop = desktop();
    let painter = painter(&desktop, "switched");
    let run = run_on(&desktop, "switched", "video/x-raw");
    run.play();
    painter.show(plain(1));
    still(&run, 1);
    run.src.set_property("keepalive-time", 0u32);
    // One may have been under way.
    let mut late = run.frames_for(Duration::from_millis(500));
    late.retain(is_keepalive);
    assert!(late.len() <= 1, "{} keepalives", late.len());
    // The thread waits without an end now, and yet takes note.
    run.src.set_property("keepalive-time", 20u32);
    still(&run, 10);
}

#[test]
fn a_picture_that_cannot_be_read_does_not_end_the_keepalives() {
    let desktop = desktop();
    let canvas = Canvas {
        sealed: false,
        ..Canvas::default()
    };
    let size = (WIDTH, HEIGHT);
    let painter = Painter::on_canvas(&desktop, "unread", PixelFormat::Bgrx, size, canvas);
    let run = run_on(&desktop, "unread", "video/x-raw");
    run.src.set_property("keepalive-time", 20u32);
    run.play();
    painter.show(plain(1));
    let (frame, _) = still(&run, 1);
    painter.shrink();
    let empty = Picture {
        bytes: Vec::new(),
        ..plain(2)
    };
    show_until_counted(&painter, &run, &empty, "corrupted");
    let keepalives = run.stat("keepalives");
    until(|| run.stat("keepalives") > keepalives + 2);
    assert_eq!(run.stat("frames"), 1);
    assert_eq!(pixels(&frame)[0], 1);
}

#[test]
fn with_keepalive_time_0_nothing_is_resent() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.src.set_property("keepalive-time", 0u32);
    run.play();
    run.frame();
    // mutter may draw a few more while it settles.
    let more = run.frames_for(Duration::from_secs(1));
    assert!(!more.iter().any(is_keepalive));
    assert_eq!(run.stat("keepalives"), 0);
    desktop.close(&cast);
}

#[test]
fn a_short_period_does_not_shorten_the_wait_for_the_first_frame() {
    let desktop = desktop();
    let run = Run::new(&desktop, "video/x-raw");
    run.src.set_property("target-object", "comes-later");
    run.src.set_property_from_str("on-disconnect", "none");
    run.src.set_property("keepalive-time", 1u32);
    run.play();
    assert!(run.frame_within(Duration::from_millis(500)).is_none());
    let caps = "format=BGRx,width=64,height=48";
    let _producer = Painter::still(&desktop, "comes-later", caps);
    run.frame();
}

#[test]
fn the_last_frame_is_resent_at_eos_when_asked_for() {
    let desktop = desktop();
    let painter = painter(&desktop, "ends");
    for resend in [true, false] {
        let run = run_on(&desktop, "ends", "video/x-raw");
        run.src.set_property("keepalive-time", 0u32);
        run.src.set_property("resend-last", resend);
        run.play();
        let frame = shown(&painter, &run, &plain(1));
        // One that was shown again because the machine is busy may still come.
        let mut frames = vec![frame];
        assert!(run.pipeline.send_event(gst::event::Eos::new()));
        let end = Instant::now() + LONG;
        while !run.sink.is_eos() && Instant::now() < end {
            frames.extend(run.frame_within(Duration::from_millis(100)));
        }
        run.eos();
        let (last, before) = frames.split_last().unwrap();
        assert_eq!(is_keepalive(last), resend);
        assert!(!before.iter().any(is_keepalive));
        if let Some(before) = before.last() {
            assert!(pts(last) > pts(before));
            assert!(
                !resend || address(last) == address(before),
                "the same memory"
            );
        }
    }
}

#[test]
fn a_new_frame_goes_before_a_keepalive_that_is_due() {
    let desktop = desktop();
    let painter = painter(&desktop, "wins");
    let run = run_on(&desktop, "wins", "video/x-raw");
    run.src.set_property("keepalive-time", 1u32);
    // Blocks the streaming thread once a buffer waits.
    run.sink.set_max_buffers(1);
    run.play();
    painter.show(plain(1));
    let mut pulled = 0;
    for colour in 2..12 {
        // One is in the sink, one waits for it.
        until(|| run.stat("frames") + run.stat("keepalives") == pulled + 2);
        let before = run.stat("dropped");
        while run.stat("dropped") == before {
            // One takes another one's place: so one is there.
            painter.show(plain(colour));
            std::thread::sleep(Duration::from_millis(5));
        }
        run.frame();
        run.frame();
        let new = run.frame();
        pulled += 3;
        assert!(!is_keepalive(&new));
        // Of the last colour some may have been on their way, and have dropped each other.
        assert!([colour - 1, colour].contains(&pixels(&new)[0]));
    }
}

#[test]
fn a_capture_time_before_a_keepalives_is_moved_up_to_it() {
    let desktop = desktop();
    let painter = painter(&desktop, "late");
    let run = run_on(&desktop, "late", "video/x-raw");
    run.src.set_property("keepalive-time", 20u32);
    run.play();
    painter.show(plain(1));
    let (_, keepalives) = still(&run, 5);
    let now = run.pipeline.clock().unwrap().time().nseconds() as i64;
    painter.show(Picture {
        captured: Some(now - 5_000_000_000),
        ..plain(2)
    });
    let mut last = pts(keepalives.last().unwrap());
    loop {
        let sample = run.frame();
        assert!(pts(&sample) > last);
        last = pts(&sample);
        if pixels(&sample)[0] == 2 {
            break;
        }
    }
    assert!(
        run.stat("latency-p99-us") >= 5_000_000,
        "the header is believed"
    );
}
