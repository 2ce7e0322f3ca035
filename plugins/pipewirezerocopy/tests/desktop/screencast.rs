// SPDX-License-Identifier: MIT OR Apache-2.0

//! mutter's ScreenCast: moving pictures, their content, their timing, several at once.

use std::time::{Duration, Instant};

use gst::prelude::*;
use zerocopy_test_support::desktop::{CursorMode, Desktop, Recording};

use super::hostile::size;
use super::run::{LONG, Run, init, is_keepalive, pixels, pts};
use super::{desktop, own_desktop_without_monitor};

/// Pictures that the moving client of this size shows, in order (see `tests/pattern.py`), without their
/// padding: all there are.
pub fn moving_pictures((width, height): (u32, u32)) -> Vec<Vec<u8>> {
    init();
    // The picture repeats after its width, at 4 pixels a frame.
    let description = format!(
        "videotestsrc pattern=colors horizontal-speed=4 num-buffers={} ! \
         video/x-raw,format=BGRx,width={width},height={height},framerate=30/1 ! \
         appsink name=sink sync=false",
        width / 4
    );
    let pipeline = gst::parse::launch(&description)
        .unwrap()
        .downcast::<gst::Pipeline>()
        .unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let sink = pipeline
        .by_name("sink")
        .unwrap()
        .downcast::<gst_app::AppSink>()
        .unwrap();
    let pictures = std::iter::from_fn(|| sink.pull_sample().ok())
        .map(|sample| opaque(&pixels(&sample)))
        .collect();
    pipeline.set_state(gst::State::Null).unwrap();
    pictures
}

/// Pixels of 4 bytes whose last says nothing.
pub fn opaque(pixels: &[u8]) -> Vec<u8> {
    pixels
        .chunks(4)
        .flat_map(|pixel| [pixel[0], pixel[1], pixel[2], 255])
        .collect()
}

/// Which of these pictures each frame is, in each colour of each pixel.
fn shown(frames: &[gst::Sample], pictures: &[Vec<u8>]) -> Vec<usize> {
    let shown = frames.iter().map(|frame| {
        let info = gst_video::VideoInfo::from_caps(frame.caps().unwrap()).unwrap();
        let blue_first = [gst_video::VideoFormat::Bgrx, gst_video::VideoFormat::Bgra];
        assert!(blue_first.contains(&info.format()), "{:?}", info.format());
        let got = opaque(&pixels(frame));
        let found = pictures.iter().position(|picture| *picture == got);
        found.expect("the frame is none of the client's pictures")
    });
    shown.collect()
}

/// Checks that each frame is one of these pictures, and that they move.
pub fn assert_drawn(frames: &[gst::Sample], pictures: &[Vec<u8>]) {
    let mut shown = shown(frames, pictures);
    shown.sort_unstable();
    shown.dedup();
    // A picture may be captured twice.
    assert!(shown.len() > frames.len() / 2, "only pictures {shown:?}");
}

#[test]
fn a_moving_desktop_gives_its_frames_with_the_right_colours() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    let client = desktop.moving_picture(30);
    // What has piled up shows the client's window as it grew.
    while run.frame_within(Duration::ZERO).is_some() {}
    let samples = run.frames(10, |sample| !is_keepalive(sample));
    desktop.stop(client);
    assert!(samples.is_sorted_by(|a, b| pts(a) < pts(b)));

    assert_drawn(&samples, &moving_pictures((640, 480)));
    desktop.close(&cast);
}

#[test]
fn timestamps_are_capture_times_in_running_time() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    let client = desktop.moving_picture(30);
    // What has piled up is old.
    while run.frame_within(Duration::ZERO).is_some() {}
    for _ in 0..10 {
        let sample = run.frame();
        let now = run.pipeline.current_running_time().unwrap();
        let age = now
            .checked_sub(pts(&sample))
            .expect("not captured in the future");
        // On a machine that may be busy; another clock would be off by far more.
        assert!(age < gst::ClockTime::from_seconds(5), "{age} old");
    }
    assert!(run.stat("latency-p99-us") < 5_000_000);
    desktop.stop(client);
    desktop.close(&cast);
}

#[test]
fn two_sources_at_once_do_not_disturb_each_other() {
    let mut desktop = desktop();
    let monitor = desktop.screencast(Recording::Monitor);
    let other = desktop.screencast(Recording::Virtual);
    let runs = [
        Run::on_node(&desktop, monitor.node),
        Run::new(&desktop, "video/x-raw,width=320,height=200"),
    ];
    runs[1].src.set_property("pipewire-node-id", other.node);
    for run in &runs {
        run.play();
    }
    let widths = runs.each_ref().map(|run| {
        let sample = run.frame();
        sample
            .caps()
            .unwrap()
            .structure(0)
            .unwrap()
            .get::<i32>("width")
            .unwrap()
    });
    // A virtual monitor gets the size that downstream asks for.
    assert_eq!(widths, [640, 320]);
    // Both go on, by keepalives.
    for run in &runs {
        for _ in 0..3 {
            run.frame();
        }
    }
    desktop.close(&other);
    desktop.close(&monitor);
}

#[test]
fn two_sources_on_one_node_both_have_its_pictures() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let runs = [0; 2].map(|_| Run::on_node(&desktop, cast.node));
    assert_both_show_the_client(&mut desktop, &runs);
    desktop.close(&cast);
}

#[test]
fn two_sources_on_two_nodes_both_have_their_pictures() {
    let mut desktop = desktop();
    let casts = [0; 2].map(|_| desktop.screencast(Recording::Monitor));
    assert_ne!(casts[0].node, casts[1].node);
    let runs = casts
        .each_ref()
        .map(|cast| Run::on_node(&desktop, cast.node));
    assert_both_show_the_client(&mut desktop, &runs);
    for cast in &casts {
        desktop.close(cast);
    }
}

/// Checks what two on one node of 640x480, or on two of one monitor, get from a client that fills the
/// screen, and what the first one gets when the second one has gone.
pub fn assert_both_show_the_client(desktop: &mut Desktop, [first, second]: &[Run; 2]) {
    for run in [first, second] {
        // What comes is new.
        run.src.set_property("keepalive-time", 0u32);
    }
    first.play();
    first.frame();
    // A compositor draws nothing for the second one's sake alone.
    let client = desktop.moving_picture(30);
    // What has piled up shows the client's window as it grew.
    while first.frame_within(Duration::ZERO).is_some() {}
    second.play();
    let (one, other): (Vec<_>, Vec<_>) = (0..20).map(|_| (first.frame(), second.frame())).unzip();
    second.stop();
    let gone = first.pipeline.current_running_time().unwrap();
    let after = first.frames(10, |frame| pts(frame) > gone);
    desktop.stop(client);
    let pictures = moving_pictures((640, 480));
    for frames in [one, other, after] {
        assert_drawn(&frames, &pictures);
    }
}

#[test]
fn another_size_that_downstream_asks_for_while_playing_is_negotiated_and_filled() {
    // The virtual monitor is the only one: whatever a client shows is on it.
    let mut desktop = own_desktop_without_monitor();
    let cast = desktop.screencast(Recording::Virtual);
    let run = Run::new(&desktop, "video/x-raw,width=320,height=200");
    run.src.set_property("pipewire-node-id", cast.node);
    run.play();
    assert_eq!(size(&run.frame()), (320, 200));
    assert_fills_a_monitor_of(&mut desktop, &run, (320, 200));
    run.set_caps("video/x-raw,width=400,height=300");
    // What is under way still has the old size.
    run.frames(1, |frame| size(frame) == (400, 300));
    // Frames and keepalives keep it.
    for _ in 0..5 {
        assert_eq!(size(&run.frame()), (400, 300));
    }
    assert_fills_a_monitor_of(&mut desktop, &run, (400, 300));
    run.stop();
    desktop.close(&cast);
}

/// Checks what comes from a virtual monitor of this size while a client fills it.
fn assert_fills_a_monitor_of(desktop: &mut Desktop, run: &Run, size: (u32, u32)) {
    let client = desktop.moving_picture_of(30, size);
    // What has piled up shows the client's window as it grew.
    while run.frame_within(Duration::ZERO).is_some() {}
    let frames = run.frames(10, |frame| !is_keepalive(frame));
    desktop.stop(client);
    assert_drawn(&frames, &moving_pictures(size));
}

#[test]
fn a_slow_consumer_gets_the_newest_picture_and_does_not_stall_capture() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    // Blocks the streaming thread once two buffers wait.
    run.sink.set_max_buffers(2);
    run.play();
    let client = desktop.moving_picture(30);
    let dropped = |count| {
        let start = Instant::now();
        while run.stat("dropped") < count {
            assert!(start.elapsed() < LONG, "capture stalled");
            // Nothing tells when a frame was dropped.
            std::thread::sleep(Duration::from_millis(1));
        }
        run.pipeline.current_running_time().unwrap()
    };
    let meanwhile = dropped(10);
    dropped(run.stat("dropped") + 10);
    assert!(run.stat("held-buffers") <= 6, "mutter has two of its eight");
    // The pile, one that was under way, then the newest.
    for _ in 0..3 {
        assert!(pts(&run.frame()) < meanwhile);
    }
    assert!(pts(&run.frame()) > meanwhile);
    desktop.stop(client);
    desktop.close(&cast);
}

#[test]
fn target_fps_limits_the_rate_and_shows_the_last_change() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.src.set_property("target-fps", 5u32);
    run.play();
    let client = desktop.moving_picture(30);
    while run.frame_within(Duration::ZERO).is_some() {}
    let start = Instant::now();
    for _ in 0..10 {
        run.frame();
    }
    // One may have been under way.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(8 * 200), "10 in {took:?}");
    // While playing: no limit any more. Three come within the time of one before.
    run.src.set_property("target-fps", 0u32);
    let end = Instant::now() + LONG;
    let mut left = [Instant::now(); 3];
    loop {
        assert!(left[0] < end, "still limited");
        run.frame();
        left = [Instant::now(), left[0], left[1]];
        if left[0] - left[2] < Duration::from_millis(200) && left[2] > start + took {
            break;
        }
    }
    desktop.stop(client);
    desktop.close(&cast);
}

#[test]
fn the_latency_is_that_of_a_frame() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    run.frame();
    let mut query = gst::query::Latency::new();
    assert!(run.src.query(&mut query));
    let (live, min, max) = query.result();
    assert!(live);
    // mutter's highest rate is its monitor's: 60 Hz.
    assert_eq!(min.mseconds(), 16);
    assert_eq!(max, None);
    desktop.close(&cast);
}

/// The left upper corner of an overlay on a picture.
fn overlay(sample: &gst::Sample) -> Option<(i32, i32)> {
    let buffer = sample.buffer().unwrap();
    let meta = buffer.meta::<gst_video::VideoOverlayCompositionMeta>()?;
    let (x, y, _, _) = meta.overlay().rectangle(0).ok()?.render_rectangle();
    Some((x, y))
}

/// Whether the two differ near that pixel.
fn differ_at(one: &gst::Sample, other: &gst::Sample, (x, y): (usize, usize)) -> bool {
    let [one, other] = [one, other].map(|sample| opaque(&pixels(sample)));
    let row = |y: usize| (y * 640 + x - 8) * 4..(y * 640 + x + 24) * 4;
    (y - 8..y + 24).any(|y| one[row(y)] != other[row(y)])
}

#[test]
fn mutters_pointer_is_hidden_in_the_picture_or_beside_it_as_the_session_asks() {
    let mut desktop = desktop();
    for mode in [
        CursorMode::Hidden,
        CursorMode::Embedded,
        CursorMode::Metadata,
    ] {
        let cast = desktop.screencast_with_pointer(Recording::Monitor, mode);
        desktop.move_pointer(&cast, 300, 200);
        let run = Run::on_node(&desktop, cast.node);
        run.src.set_property("keepalive-time", 20u32);
        run.propose::<gst_video::VideoOverlayCompositionMeta>();
        run.play();
        let before = run.frame();
        // Nothing tells when a movement is on the screen.
        let end = Instant::now() + LONG;
        let mut moves = 0;
        for step in 0.. {
            assert!(Instant::now() < end, "{mode:?}: no pointer is seen");
            let (x, y) = (100 + step % 100, 100);
            desktop.move_pointer(&cast, x, y);
            let sample = run.frames_for(Duration::from_millis(100)).pop();
            let Some(sample) = sample else { continue };
            let drawn = differ_at(&sample, &before, (x as usize, y as usize));
            let beside = overlay(&sample);
            match mode {
                CursorMode::Hidden => {
                    assert!(!drawn && beside.is_none());
                    moves += 1;
                    if moves == 5 {
                        break;
                    }
                }
                CursorMode::Embedded => {
                    assert_eq!(beside, None);
                    if drawn {
                        break;
                    }
                }
                CursorMode::Metadata => {
                    assert!(!drawn, "beside the picture, not in it");
                    // Its tip is at most its size from its corner.
                    if beside
                        .is_some_and(|at| at.0.abs_diff(x as i32) < 48 && at.1.abs_diff(100) < 48)
                    {
                        break;
                    }
                }
            }
        }
        run.stop();
        desktop.close(&cast);
    }
}
