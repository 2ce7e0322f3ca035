// SPDX-License-Identifier: MIT OR Apache-2.0

//! A second compositor: weston, whose PipeWire backend came with version 13. Debian 12 has an older
//! one; there these tests say so.

use std::time::{Duration, Instant};

use gst::prelude::*;
use zerocopy_test_support::desktop::{Desktop, Victim};

use super::content::run_on;
use super::keepalive::still;
use super::run::{LONG, Run, is_keepalive, pixels, pts};
use super::screencast::{assert_both_show_the_client, assert_drawn, moving_pictures};
use super::turn;

const NODE: &str = "weston.pipewire";

/// What `test` finds on a weston of its own, if there is one here.
fn on_weston(test: impl FnOnce(&mut Desktop)) {
    let _turn = turn();
    match Desktop::weston(640, 480) {
        Ok(mut desktop) => test(&mut desktop),
        Err(reason) => eprintln!("not tested: {reason}"),
    }
}

fn playing(desktop: &Desktop) -> Run {
    let run = run_on(desktop, NODE, "video/x-raw");
    run.play();
    run
}

#[test]
fn a_moving_weston_gives_its_frames_with_the_right_colours() {
    on_weston(|desktop| {
        let run = playing(desktop);
        run.frame();
        let client = desktop.moving_picture(30);
        while run.frame_within(Duration::ZERO).is_some() {}
        let samples = run.frames(10, |sample| !is_keepalive(sample));
        desktop.stop(client);
        assert!(samples.is_sorted_by(|a, b| pts(a) < pts(b)));
        assert_drawn(&samples, &moving_pictures((640, 480)));
    });
}

#[test]
fn a_still_weston_is_kept_alive_and_a_killed_one_has_vanished() {
    on_weston(|desktop| {
        let run = playing(desktop);
        let (frame, keepalives) = still(&run, 5);
        assert_eq!(pixels(&frame).len(), 640 * 480 * 4);
        assert_eq!(pixels(&frame), pixels(&keepalives[4]));
        run.src.set_property_from_str("on-disconnect", "error");
        desktop.kill(Victim::Compositor);
        run.capture_message("vanished");
        assert!(run.error().contains("vanished"));
    });
}

#[test]
fn a_full_queue_does_not_stall_a_weston() {
    on_weston(|desktop| {
        let run = run_on(desktop, NODE, "video/x-raw");
        run.src.set_property("keepalive-time", 0u32);
        run.play();
        let client = desktop.moving_picture(30);
        let start = Instant::now();
        // All that comes is kept.
        while run.stat("copies") < 20 {
            assert!(start.elapsed() < LONG, "capture stalled");
            // Nothing tells when a frame was copied.
            std::thread::sleep(Duration::from_millis(1));
        }
        desktop.stop(client);
    });
}

#[test]
fn a_slow_pipeline_does_not_stall_a_weston() {
    on_weston(|desktop| {
        let run = run_on(desktop, NODE, "video/x-raw");
        run.src.set_property("keepalive-time", 0u32);
        // Each buffer takes longer than a frame.
        let pad = run.sink.static_pad("sink").unwrap();
        pad.add_probe(gst::PadProbeType::BUFFER, |_, _| {
            std::thread::sleep(Duration::from_millis(150));
            gst::PadProbeReturn::Ok
        });
        run.play();
        let client = desktop.moving_picture(30);
        for _ in 0..40 {
            run.frame();
        }
        assert!(run.stat("dropped") > 40, "it goes on meanwhile");
        desktop.stop(client);
    });
}

#[test]
fn two_consumers_of_a_weston_both_have_its_pictures() {
    on_weston(|desktop| {
        let runs = [0; 2].map(|_| run_on(desktop, NODE, "video/x-raw"));
        assert_both_show_the_client(desktop, &runs);
    });
}
