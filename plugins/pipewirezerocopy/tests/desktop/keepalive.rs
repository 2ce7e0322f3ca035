// SPDX-License-Identifier: MIT OR Apache-2.0

//! A desktop that stands still, and the end of the stream.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gst::prelude::*;
use zerocopy_test_support::desktop::Recording;

use super::content::run_on;
use super::desktop;
use super::hostile::{painter, plain};
use super::painter::Painter;
use super::run::{Run, is_keepalive, pts};

/// Frames until the desktop has come to rest: the last one is its picture, and not a keepalive.
fn until_still(run: &Run) -> gst::Sample {
    let mut last = run.frame();
    loop {
        let next = run.frame();
        if is_keepalive(&next) {
            return last;
        }
        last = next;
    }
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
    let frame = until_still(&run);
    let frames = run.stat("frames");
    let keepalives: Vec<_> = (0..20).map(|_| run.frame()).collect();
    assert_eq!(run.stat("frames"), frames, "the desktop stands still");
    assert!(run.stat("keepalives") >= 20);

    assert!(keepalives.iter().all(is_keepalive));
    assert!(keepalives.is_sorted_by(|a, b| pts(a) < pts(b)));
    for keepalive in &keepalives {
        assert_eq!(address(keepalive), address(&frame), "the same memory");
    }
    // 19 periods, however late the thread woke in between.
    let took = pts(&keepalives[19]) - pts(&keepalives[0]);
    let expected = gst::ClockTime::from_mseconds(19 * 50);
    assert!(
        took.absdiff(expected) < gst::ClockTime::from_mseconds(150),
        "19 periods of 50 ms took {took}"
    );
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
                // Each wakes the thread, to the same end.
                src.set_property("keepalive-time", 50u32);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        let keepalives: Vec<_> = (0..21).map(|_| run.frame()).collect();
        done.store(true, Ordering::Relaxed);
        keepalives
    });
    assert!(keepalives.iter().all(is_keepalive));
    let took = pts(&keepalives[20]) - pts(&keepalives[0]);
    let off = took.absdiff(gst::ClockTime::from_mseconds(20 * 50));
    assert!(
        off < gst::ClockTime::from_mseconds(150),
        "20 periods took {took}"
    );
}

#[test]
fn keepalives_can_be_turned_off_and_on_while_playing() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    until_still(&run);
    run.src.set_property("keepalive-time", 0u32);
    // One may have been under way.
    let late = run.frames_for(Duration::from_millis(500));
    assert!(late.len() <= 1, "{} buffers", late.len());
    // The thread waits without an end now, and yet takes note.
    run.src.set_property("keepalive-time", 20u32);
    let more = run.frames_for(Duration::from_millis(500));
    assert!(more.len() >= 10, "{} buffers", more.len());
    desktop.close(&cast);
}

#[test]
fn with_keepalive_time_0_a_still_desktop_gives_one_picture() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.src.set_property("keepalive-time", 0u32);
    run.play();
    run.frame();
    // mutter may draw a few while it settles.
    while run.frame_within(Duration::from_millis(300)).is_some() {}
    assert!(run.frame_within(Duration::from_secs(1)).is_none());
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
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    for resend in [true, false] {
        let run = Run::on_node(&desktop, cast.node);
        run.src.set_property("keepalive-time", 0u32);
        run.src.set_property("resend-last", resend);
        run.play();
        let mut frames = vec![run.frame()];
        while let Some(frame) = run.frame_within(Duration::from_millis(300)) {
            frames.push(frame);
        }
        assert!(run.pipeline.send_event(gst::event::Eos::new()));
        let last = run.frame_within(super::run::LONG);
        assert_eq!(last.is_some(), resend);
        if let Some(last) = last {
            assert!(is_keepalive(&last));
            assert!(pts(&last) > pts(frames.last().unwrap()));
        }
        run.eos();
    }
    desktop.close(&cast);
}
