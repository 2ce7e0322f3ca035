// SPDX-License-Identifier: MIT OR Apache-2.0

//! Producers that vanish, daemons that die, nodes that do not exist.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use gst::prelude::*;
use gstpipewirezerocopy::capture::PixelFormat;
use zerocopy_test_support::desktop::{Desktop, Recording, Victim};

use super::content::run_on;
use super::hostile::{SIZE, painter, plain, playing, shown};
use super::lifecycle::gst_launch;
use super::painter::{Painter, until};
use super::run::{LONG, Run, expected_pixels, is_keepalive, pixels};
use super::{desktop, own_desktop};

/// Within this a vanished producer must have been noticed, on however busy a machine. What is said
/// of it tells how: by the registry at once, or by buffers that are gone for a second.
const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_closed_session_is_an_error_soon() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    run.frame();
    assert_eq!(run.capture_message("streaming"), "");
    desktop.close(&cast);
    let start = Instant::now();
    let reason = run.capture_message("vanished");
    let error = run.error();
    assert!(start.elapsed() < SOON, "after {:?}", start.elapsed());
    assert!(!reason.is_empty() && error.contains(&reason), "{error}");
    assert!(error.contains("vanished"), "{error}");
    // And no dead picture for ever.
    while run.frame_within(Duration::from_millis(300)).is_some() {}
}

#[test]
fn a_closed_session_is_the_end_of_the_stream_when_asked_for() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.src.set_property_from_str("on-disconnect", "eos");
    run.play();
    run.frame();
    desktop.close(&cast);
    let start = Instant::now();
    run.eos();
    assert!(start.elapsed() < SOON, "after {:?}", start.elapsed());
}

#[test]
fn a_node_that_comes_back_under_its_name_is_followed() {
    let desktop = desktop();
    let run = Run::new(&desktop, "video/x-raw");
    run.src.set_property("target-object", "comes-back");
    run.src.set_property_from_str("on-disconnect", "none");
    run.play();
    let caps = "format=BGRx,width=64,height=48";
    let producer = Painter::still(&desktop, "comes-back", caps);
    run.frame();
    run.capture_message("streaming");
    for _ in 0..2 {
        let still = Painter::still(&desktop, "another", caps);
        drop(still);
    }
    drop(producer);
    // The registry tells at once; the buffers would take a second.
    let reason = run.capture_message("vanished");
    assert!(reason.contains("has been removed"), "{reason}");
    // Keepalives have stopped, for good.
    while run.frame_within(Duration::from_millis(150)).is_some() {}
    assert!(run.frame_within(Duration::from_millis(500)).is_none());

    let _producer = Painter::still(&desktop, "comes-back", "format=RGBA,width=32,height=32");
    let sample = run.frame();
    assert!(!is_keepalive(&sample));
    run.capture_message("returned");
    assert_eq!(run.stat("reconnects"), 1);
}

#[test]
fn a_namesake_that_came_before_the_node_went_is_followed() {
    let desktop = desktop();
    let old = painter(&desktop, "overlapping");
    let run = playing(&desktop, "overlapping");
    shown(&old, &run, &plain(1));
    let new = painter(&desktop, "overlapping");
    new.node();
    // A picture later the element has seen it come.
    while pixels(&shown(&old, &run, &plain(2)))[0] != 2 {}
    drop(old);
    let reason = run.capture_message("vanished");
    assert!(reason.contains("has been removed"), "{reason}");
    while pixels(&shown(&new, &run, &plain(3)))[0] != 3 {}
    run.capture_message("returned");
}

#[test]
fn a_killed_compositor_and_a_killed_daemon_are_errors_soon() {
    let mut desktop = own_desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    run.frame();
    desktop.kill(Victim::Compositor);
    let start = Instant::now();
    let error = run.error();
    assert!(start.elapsed() < SOON, "after {:?}", start.elapsed());
    assert!(error.contains("vanished"), "{error}");
    run.stop();

    let _producer = Painter::still(&desktop, "survivor", "format=BGRx,width=64,height=48");
    let run = Run::new(&desktop, "video/x-raw");
    run.src.set_property("target-object", "survivor");
    run.src.set_property_from_str("on-disconnect", "none");
    run.play();
    run.frame();
    desktop.kill(Victim::PipeWire);
    let start = Instant::now();
    // The socket leads nowhere now: there is nothing to wait for.
    let reason = run.capture_message("vanished");
    assert!(reason.contains("daemon"), "{reason}");
    let error = run.error();
    assert!(start.elapsed() < SOON, "after {:?}", start.elapsed());
    assert!(error.contains("daemon"), "{error}");
    run.stop();
}

#[test]
fn a_restarted_daemon_is_found_again() {
    let mut desktop = own_desktop();
    let folder = tempfile::tempdir().unwrap();
    // In a process of its own, which finds the daemon by its environment.
    let mut child = gst_launch(
        folder.path(),
        "-q pipewirezerocopysrc target-object=desk on-disconnect=none keepalive-time=0 ! fdsink",
    )
    .envs(desktop.environment().iter().cloned())
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    let mut frames = child.stdout.take().unwrap();
    for caps in [
        "format=BGRx,width=64,height=48",
        "format=RGBA,width=16,height=8",
    ] {
        let expected = expected_pixels(caps);
        let _producer = Painter::still(&desktop, "desk", caps);
        let mut frame = vec![0; expected.len()];
        frames
            .read_exact(&mut frame)
            .expect("a frame, and no error");
        assert_eq!(frame, expected);
        desktop.restart_pipewire();
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_daemon_that_goes_away_is_the_end_of_the_stream_when_asked_for() {
    let mut desktop = own_desktop();
    let _producer = Painter::still(&desktop, "desk", "format=BGRx,width=64,height=48");
    let run = Run::new(&desktop, "video/x-raw");
    run.src.set_property("target-object", "desk");
    run.src.set_property_from_str("on-disconnect", "none");
    run.play();
    run.frame();
    run.src.set_property_from_str("on-disconnect", "eos");
    desktop.kill(Victim::PipeWire);
    run.eos();
}

#[test]
fn a_node_that_does_not_exist_is_an_error_soon() {
    let desktop = desktop();
    for (property, value) in [("pipewire-node-id", "4000"), ("target-object", "nobody")] {
        let run = Run::new(&desktop, "video/x-raw");
        run.src.set_property_from_str(property, value);
        run.play();
        let start = Instant::now();
        let error = run.error();
        assert!(start.elapsed() < SOON, "after {:?}", start.elapsed());
        assert!(error.contains(value), "{error}");
        assert!(error.contains("does not exist"), "{error}");
    }
}

#[test]
fn a_producer_that_never_comes_runs_into_the_first_frame_timeout() {
    let desktop = desktop();
    let run = Run::new(&desktop, "video/x-raw");
    run.src.set_property("target-object", "nobody");
    run.src.set_property_from_str("on-disconnect", "none");
    run.src.set_property("first-frame-timeout", 300u32);
    run.play();
    let start = Instant::now();
    let error = run.error();
    assert!(start.elapsed() >= Duration::from_millis(250));
    assert!(start.elapsed() < SOON, "after {:?}", start.elapsed());
    assert!(error.contains("first-frame-timeout"), "{error}");
    assert!(error.contains("nobody"), "{error}");
}

#[test]
fn a_producer_that_draws_nothing_runs_into_the_first_frame_timeout() {
    let desktop = desktop();
    let painter = Painter::start(&desktop, "lazy", PixelFormat::Bgrx, (16, 8));
    let run = run_on(&desktop, "lazy", "video/x-raw");
    run.src.set_property("first-frame-timeout", 0u32);
    run.play();
    until(|| painter.formats() >= 1);
    assert!(run.frame_within(Duration::from_millis(500)).is_none());
    // From now on it counts, and the time is over.
    run.src.set_property("first-frame-timeout", 1u32);
    let error = run.error();
    for part in ["first-frame-timeout", "lazy", "locked", "BGRx"] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_node_by_its_id_is_waited_for_without_keepalives() {
    let desktop = desktop();
    let producer = Painter::still(&desktop, "by-id", "format=BGRx,width=64,height=48");
    let run = Run::on_node(&desktop, producer.node());
    run.src.set_property_from_str("on-disconnect", "none");
    run.play();
    run.frame();
    drop(producer);
    run.capture_message("vanished");
    while run.frame_within(Duration::from_millis(150)).is_some() {}
    assert!(run.frame_within(Duration::from_millis(500)).is_none());
    assert_eq!(run.stat("errors"), 0);
}

#[test]
fn buffers_that_stay_away_mean_a_vanished_producer() {
    let mut desktop = own_desktop();
    let producer = Painter::still(&desktop, "unlinked", "format=BGRx,width=64,height=48");
    let run = run_on(&desktop, "unlinked", "video/x-raw");
    run.play();
    run.frame();
    run.src.set_property_from_str("on-disconnect", "error");
    // Its links go with it, nobody makes others, and the producer's node stays.
    desktop.kill(Victim::SessionManager);
    let start = Instant::now();
    let reason = run.capture_message("vanished");
    assert!(start.elapsed() >= Duration::from_millis(900));
    assert!(start.elapsed() < SOON, "after {:?}", start.elapsed());
    assert!(reason.contains("taken its buffers away"), "{reason}");
    assert!(run.error().contains("vanished"));
    drop(producer);
}

/// What a session manager runs to do something about the link from a node.
const WITH_LINK: &str = r#"
links = ObjectManager { Interest { type = "link" } }
nodes = ObjectManager { Interest { type = "node" } }
clients = ObjectManager { Interest { type = "client" } }
links:connect("installed", function()
    local link = links:lookup { Constraint { "link.output.node", "=", "NODE" } }
    ACTION
    Core.sync(function() Core.quit() end)
end)
clients:activate()
nodes:activate()
links:activate()
"#;

/// Says that the stream is in error. Its buffers stay.
const BREAK_OFF: &str = r#"
    local consumer = link.properties["link.input.node"]
    local node = nodes:lookup { Constraint { "object.id", "=", consumer } }
    local client = clients:lookup { Constraint { "object.id", "=", node.properties["client.id"] } }
    client:send_error(tonumber(consumer), -32, "so the test will have it")
"#;

/// Takes the link away, and the consumer's buffers with it. Both nodes stay.
const UNLINK: &str = "link:request_destroy()";

fn with_link(desktop: &Desktop, node: u32, action: &str) {
    let mut script = tempfile::NamedTempFile::new().unwrap();
    let text = WITH_LINK.replace("NODE", &node.to_string());
    let text = text.replace("ACTION", action);
    script.write_all(text.as_bytes()).unwrap();
    let status = Command::new("wpexec")
        .arg(script.path())
        .envs(desktop.environment().iter().cloned())
        .status();
    assert!(status.unwrap().success());
}

/// Whether a picture lies in memory that the producer can draw into.
fn is_the_producers(sample: &gst::Sample) -> bool {
    let memory = sample.buffer().unwrap().peek_memory(0);
    let at = memory.map_readable().unwrap().as_ptr().addr();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let number = |digits: &str| usize::from_str_radix(digits, 16).unwrap();
    let holds = |line: &&str| {
        let (start, rest) = line.split_once('-').unwrap();
        let (end, _) = rest.split_once(' ').unwrap();
        (number(start)..number(end)).contains(&at)
    };
    maps.lines().find(holds).unwrap().contains("memfd:painter")
}

#[test]
fn a_stream_that_breaks_off_leaves_its_pictures_and_gives_their_buffers_back() {
    let desktop = desktop();
    let painter = painter(&desktop, "breaks-off");
    let run = playing(&desktop, "breaks-off");
    run.src.set_property_from_str("on-disconnect", "none");
    let kept = shown(&painter, &run, &plain(1));
    assert!(is_the_producers(&kept));
    with_link(&desktop, painter.node(), BREAK_OFF);
    let reason = run.capture_message("vanished");
    assert!(reason.contains("so the test will have it"), "{reason}");
    assert!(!is_the_producers(&kept), "it has its buffer back");
    assert_eq!(pixels(&kept), vec![1; SIZE as usize]);
    // It comes back by itself.
    while pixels(&shown(&painter, &run, &plain(2)))[0] != 2 {}
    assert_eq!(pixels(&kept), vec![1; SIZE as usize]);
}

#[test]
fn a_link_that_comes_back_finds_all_buffers_and_harms_no_picture() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.src.set_property_from_str("on-disconnect", "none");
    run.src.set_property("keepalive-time", 0u32);
    run.play();
    let client = desktop.moving_picture(30);
    // mutter has eight buffers.
    for round in 0..4 {
        let kept: Vec<_> = (0..3).map(|_| run.frame()).collect();
        let drawn: Vec<_> = kept.iter().map(pixels).collect();
        with_link(&desktop, cast.node, UNLINK);
        let reason = run.capture_message("vanished");
        assert!(reason.contains("taken its buffers away"), "{reason}");
        run.capture_message("returned");
        while run.frame_within(Duration::ZERO).is_some() {}
        for _ in 0..20 {
            run.frame();
        }
        let now: Vec<_> = kept.iter().map(pixels).collect();
        assert!(now == drawn, "pictures have changed in round {round}");
    }
    desktop.stop(client);
    desktop.close(&cast);
}

#[test]
fn timestamps_start_again_where_a_flush_resets_the_running_time() {
    let desktop = desktop();
    let _producer = Painter::still(&desktop, "flushed", "format=BGRx,width=64,height=48");
    let run = run_on(&desktop, "flushed", "video/x-raw");
    run.src.set_property("keepalive-time", 10u32);
    let (tell, pushed) = std::sync::mpsc::channel();
    let pad = run.src.static_pad("src").unwrap();
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        let _ = tell.send(info.buffer().and_then(|buffer| buffer.pts()));
        gst::PadProbeReturn::Ok
    });
    run.play();
    let next = || pushed.recv_timeout(LONG).expect("a buffer").unwrap();
    let late = gst::ClockTime::from_seconds(2);
    until(|| next() >= late);
    assert!(run.src.send_event(gst::event::FlushStart::new()));
    let stop = gst::event::FlushStop::builder(true).build();
    assert!(run.src.send_event(stop));
    until(|| next() < late);
}

#[test]
fn a_daemon_that_hangs_after_an_offer_is_waited_for() {
    let mut desktop = own_desktop();
    let painter = painter(&desktop, "thaws");
    let run = playing(&desktop, "thaws");
    shown(&painter, &run, &plain(1));
    desktop.freeze_pipewire(true);
    run.set_caps("video/x-raw,format=BGRx");
    // A producer has 5 s to answer.
    assert_eq!(run.error_within(Duration::from_secs(7)), None);
    desktop.freeze_pipewire(false);
    while pixels(&shown(&painter, &run, &plain(2)))[0] != 2 {}
    assert_eq!(run.error_within(Duration::from_secs(2)), None);
}
