// SPDX-License-Identifier: MIT OR Apache-2.0

//! Starting and stopping, from inside and as a user would from the shell.

use std::ffi::CStr;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use gst::prelude::*;
use zerocopy_test_support::desktop::Recording;
use zerocopy_test_support::process::{done_alone, heap, open_fds, threads};

use super::content::run_on;
use super::hostile::{painter, plain, playing, shown};
use super::painter::{Painter, until};
use super::run::{LONG, Run, init, pixels, pts};
use super::{desktop, own_desktop, turn};

#[test]
fn starting_and_stopping_leaves_nothing_behind() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    // One socket for all of them, as from the portal.
    let run = Run::on_node(&desktop, cast.node);
    let mut before = None;
    for round in 0..10 {
        run.play();
        run.frame();
        run.stop();
        let now = (open_fds(), threads());
        // The first rounds load plugins and fill caches. A thread of the tests' own may end meanwhile.
        if round >= 2 {
            let (fds, threads_before) = *before.get_or_insert(now);
            assert_eq!(now.0, fds, "descriptors after round {round}");
            assert!(now.1 <= threads_before, "threads after round {round}");
        }
    }
    desktop.close(&cast);
}

#[test]
fn one_thread_does_all_of_pipewires_work() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    run.frame();
    // Before 1.2, PipeWire's threads have the name of the thread that started them.
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    let names: Vec<_> = names
        .filter(|name| name.starts_with("pw-capture") || name.contains("data-loop"))
        .collect();
    assert_eq!(names, ["pw-capture\n"]);
    run.stop();
    desktop.close(&cast);
}

/// Bytes more on the heap that are no leak of each start. Seen are at most 80 after 150, and 64 after
/// 450, with libpipewire 0.3.65; one more thread than before may have made its thread-local variables, 3 kB.
const MOST_MORE: u64 = 5 << 10;

/// GLib's pool may have so many idle threads more than before.
const MORE_THREADS: usize = 2;

/// Whether the test of that name was done, in a process whose memory can be measured.
fn measured_elsewhere(test: &str) -> bool {
    let _turn = turn();
    done_alone(&format!("lifecycle::{test}"))
}

/// How often this process has memory mapped that producers and PipeWire share with it.
fn mappings() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("memfd:")).count()
}

/// Whether the libpipewire that this process has is older than that.
fn pipewire_is_before(version: [u32; 3]) -> bool {
    // SAFETY: It returns a string that is never freed.
    let own = unsafe { CStr::from_ptr(pipewire::sys::pw_get_library_version()) };
    let own = own.to_str().unwrap().split('.');
    own.map(|number| number.parse::<u32>().unwrap()).lt(version)
}

/// What this process has open beside the painter's files, how many threads, and how many mappings, once
/// that is at rest: the producer takes note of a consumer's end in its own time.
fn at_rest(painter: &Painter) -> (usize, usize, usize) {
    let now = || (open_fds() - painter.files(), threads(), mappings());
    let mut last = now();
    let mut since = Instant::now();
    let start = since;
    while since.elapsed() < Duration::from_millis(300) {
        assert!(start.elapsed() < LONG, "it never comes to rest");
        std::thread::sleep(Duration::from_millis(10));
        if now() != last {
            (last, since) = (now(), Instant::now());
        }
    }
    last
}

#[test]
fn five_hundred_starts_and_stops_cost_nothing() {
    if measured_elsewhere("five_hundred_starts_and_stops_cost_nothing") {
        return;
    }
    let desktop = desktop();
    let painter = painter(&desktop, "often");
    let run = run_on(&desktop, "often", "video/x-raw");
    let mut before = None;
    for round in 0..500 {
        run.play();
        shown(&painter, &run, &plain(1));
        run.stop();
        if round == 50 {
            before = Some((at_rest(&painter), heap()));
        }
    }
    let (open, memory) = before.unwrap();
    let now = at_rest(&painter);
    assert_eq!(now.0, open.0, "descriptors");
    assert!(
        now.1 <= open.1 + MORE_THREADS,
        "{} threads after {}",
        now.1,
        open.1
    );
    assert!(now.2 <= open.2, "{} mappings after {}", now.2, open.2);
    let grown = heap().saturating_sub(memory);
    assert!(grown < MOST_MORE, "{grown} bytes more after 450 rounds");
}

#[test]
fn stopping_amid_the_start_leaves_nothing_behind() {
    if measured_elsewhere("stopping_amid_the_start_leaves_nothing_behind") {
        return;
    }
    let desktop = desktop();
    let painter = painter(&desktop, "hardly");
    let run = run_on(&desktop, "hardly", "video/x-raw");
    let mut before = None;
    for round in 0..200u64 {
        run.play();
        // Each at another moment of the start.
        std::thread::sleep(Duration::from_millis(round % 10));
        run.stop();
        if round == 50 {
            before = Some((at_rest(&painter), heap()));
        }
    }
    let (before, memory) = before.unwrap();
    let now = at_rest(&painter);
    // libpipewire before 0.3.72 loses those in what arrives for a stream that was just destroyed.
    let lost = 50 * usize::from(pipewire_is_before([0, 3, 72]));
    assert!(now.0 <= before.0 + lost, "{} after {}", now.0, before.0);
    assert!(
        now.1 <= before.1 + MORE_THREADS,
        "{} threads after {}",
        now.1,
        before.1
    );
    assert!(now.2 <= before.2, "{} mappings after {}", now.2, before.2);
    let grown = heap().saturating_sub(memory);
    assert!(grown < MOST_MORE, "{grown} bytes more after 150 rounds");
}

#[test]
fn pausing_and_going_on_needs_no_new_frame() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    run.frame();
    run.pipeline.set_state(gst::State::Paused).unwrap();
    while run.frame_within(Duration::from_millis(100)).is_some() {}
    run.play();
    run.frame();
    desktop.close(&cast);
}

#[test]
fn a_pause_that_is_over_at_once_does_not_end_the_stream() {
    let desktop = desktop();
    let painter = painter(&desktop, "hasty");
    let run = playing(&desktop, "hasty");
    for colour in 0..200 {
        run.pipeline.set_state(gst::State::Paused).unwrap();
        run.play();
        while pixels(&shown(&painter, &run, &plain(colour)))[0] != colour {}
    }
    // And one that is not over keeps nobody from stopping.
    run.pipeline.set_state(gst::State::Paused).unwrap();
    stop_soon(&run);
}

#[test]
fn the_newest_picture_leaves_after_a_pause_and_in_time() {
    let desktop = desktop();
    let painter = painter(&desktop, "patient");
    let run = playing(&desktop, "patient");
    for colour in 0..5 {
        while pixels(&shown(&painter, &run, &plain(100)))[0] != 100 {}
        run.pipeline.set_state(gst::State::Paused).unwrap();
        let dropped = run.stat("dropped");
        // One after another, until one has made room for another.
        let start = Instant::now();
        while run.stat("dropped") < dropped + 2 {
            painter.show(plain(colour));
            let sample = run.frame_within(Duration::from_millis(20));
            assert!(sample.is_none(), "a picture has left in PAUSED");
            assert!(start.elapsed() < LONG, "none has come");
        }
        // Whoever takes one in PAUSED has one of this colour.
        painter.show(plain(colour + 50));
        std::thread::sleep(Duration::from_millis(200));
        run.play();
        let sample = run.frame();
        assert_eq!(pixels(&sample)[0], colour + 50);
        let now = run.pipeline.current_running_time().unwrap();
        assert!(pts(&sample) <= now, "{} at {now}", pts(&sample));
    }
}

#[test]
fn a_pause_is_not_waited_for_the_first_frame() {
    let desktop = desktop();
    let painter = painter(&desktop, "idle");
    let run = run_on(&desktop, "idle", "video/x-raw");
    run.src.set_property("first-frame-timeout", 500u32);
    run.play();
    until(|| painter.formats() >= 1);
    run.pipeline.set_state(gst::State::Paused).unwrap();
    assert_eq!(run.error_within(Duration::from_secs(1)), None);
    run.play();
    assert!(run.error().contains("first-frame-timeout"));
}

#[test]
fn stopping_during_the_wait_for_the_first_frame_is_immediate() {
    let desktop = desktop();
    let run = Run::new(&desktop, "video/x-raw");
    run.src.set_property("target-object", "nobody");
    run.src.set_property_from_str("on-disconnect", "none");
    run.src.set_property("first-frame-timeout", 0u32);
    run.play();
    assert!(run.frame_within(Duration::from_millis(200)).is_none());
    let start = Instant::now();
    run.stop();
    // It would have waited for ever.
    assert!(
        start.elapsed() < LONG,
        "stopping took {:?}",
        start.elapsed()
    );
}

/// Stops, and says how long that took; what hangs would take for ever.
fn stop_soon(run: &Run) {
    let start = Instant::now();
    run.stop();
    assert!(start.elapsed() < LONG / 4, "it took {:?}", start.elapsed());
}

#[test]
fn a_daemon_that_never_answers_is_waited_for_and_stopping_is_immediate() {
    let _turn = turn();
    init();
    let folder = tempfile::tempdir().unwrap();
    // It takes connections, and that is all.
    let _daemon = UnixListener::bind(folder.path().join("silent")).unwrap();
    let mut before = None;
    for round in 0..5 {
        let socket = UnixStream::connect(folder.path().join("silent")).unwrap();
        let run = Run::over(socket, "video/x-raw");
        run.src.set_property("target-object", "anything");
        run.src.set_property("first-frame-timeout", 0u32);
        run.play();
        assert!(run.frame_within(Duration::from_millis(200)).is_none());
        // Now it counts, and the time is over.
        run.src.set_property("first-frame-timeout", 1u32);
        let error = run.error();
        assert!(error.contains("has not answered"), "{error}");
        stop_soon(&run);
        drop(run);
        let now = (open_fds(), threads());
        if round >= 1 {
            let before = before.get_or_insert(now);
            assert_eq!(now.0, before.0, "descriptors after round {round}");
            assert!(now.1 <= before.1, "threads after round {round}");
        }
    }
}

#[test]
fn a_daemon_that_hangs_while_starting_or_playing_keeps_nobody_from_stopping() {
    let mut desktop = own_desktop();
    let painter = painter(&desktop, "frozen");
    let run = run_on(&desktop, "frozen", "video/x-raw");
    let mut before = None;
    for round in 0..6 {
        let while_starting = round % 2 == 0;
        if while_starting {
            desktop.freeze_pipewire(true);
            run.play();
            assert!(run.frame_within(Duration::from_millis(200)).is_none());
        } else {
            run.play();
            shown(&painter, &run, &plain(1));
            desktop.freeze_pipewire(true);
        }
        stop_soon(&run);
        desktop.freeze_pipewire(false);
        // And nothing is broken.
        run.play();
        shown(&painter, &run, &plain(2));
        run.stop();
        if round == 1 {
            before = Some(at_rest(&painter));
        }
    }
    let before = before.unwrap();
    let now = at_rest(&painter);
    assert_eq!(now.0, before.0, "descriptors");
    assert!(now.1 <= before.1, "{} threads after {}", now.1, before.1);
}

#[test]
fn a_flush_does_not_end_the_stream() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    run.frame();
    // At the source's own pad: whether the sink is back in PLAYING after a flush is the pipeline's
    // affair, and takes a state change of its own.
    let (tell, pushed) = std::sync::mpsc::channel();
    let pad = run.src.static_pad("src").unwrap();
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, _| {
        let _ = tell.send(());
        gst::PadProbeReturn::Ok
    });
    assert!(run.src.send_event(gst::event::FlushStart::new()));
    let stop = gst::event::FlushStop::builder(false).build();
    // What is pushed from now on was made after the flush: it waits for the pad's stream lock.
    while pushed.try_recv().is_ok() {}
    assert!(run.src.send_event(stop));
    pushed.recv_timeout(LONG).expect("a frame after the flush");
    desktop.close(&cast);
}

#[test]
fn the_statistics_have_every_field_of_the_contract() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let run = Run::on_node(&desktop, cast.node);
    run.play();
    run.frame();
    let stats = run.src.property::<gst::Structure>("stats");
    assert_eq!(stats.name(), "pipewirezerocopysrc-stats");
    for name in [
        "frames",
        "bytes-sent",
        "bytes-received",
        "dropped",
        "errors",
        "reconnects",
        "keepalives",
        "copies",
        "corrupted",
        "held-buffers",
        "latency-p50-us",
        "latency-p99-us",
    ] {
        assert!(stats.get::<u64>(name).is_ok(), "{name} in {stats}");
    }
    assert_eq!(stats.get::<&str>("memory"), Ok("system"));
    assert_eq!(stats.get::<&str>("sync"), Ok("none"));
    assert!(stats.get::<&str>("transfer").is_ok());
    assert!(run.stat("frames") >= 1);
    assert_eq!(stats.get::<&str>("transfer"), Ok("shared"));
    assert_eq!(run.stat("copies"), 0);
    assert!(run.stat("bytes-received") >= 640 * 480 * 4);
    desktop.close(&cast);
}

/// The plugin as it was built for this test.
fn plugin() -> PathBuf {
    let deps = std::env::current_exe().unwrap();
    let plugin = deps.with_file_name("libgstpipewirezerocopy.so");
    assert!(plugin.exists(), "{} is not there", plugin.display());
    plugin
}

pub fn gst_launch(folder: &Path, pipeline: &str) -> Command {
    let mut command = Command::new("gst-launch-1.0");
    command
        .arg(format!("--gst-plugin-load={}", plugin().display()))
        .args(pipeline.split_whitespace())
        .env("GST_REGISTRY", folder.join("registry.bin"))
        .env_remove("PIPEWIRE_REMOTE")
        .env_remove("PIPEWIRE_RUNTIME_DIR");
    command
}

#[test]
fn gst_launch_plays_a_desktop_that_the_environment_names() {
    let mut desktop = desktop();
    let cast = desktop.screencast(Recording::Monitor);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("frame.raw");
    let pipeline = format!(
        "pipewirezerocopysrc pipewire-node-id={} capture-source=pipewire buffer-type=shm \
         keepalive-time=50 num-buffers=5 ! queue max-size-buffers=1 leaky=downstream ! \
         videoconvert ! videoscale ! video/x-raw,format=I420,width=320,height=240 ! \
         filesink location={}",
        cast.node,
        out.display()
    );
    let output = gst_launch(folder.path(), &pipeline)
        .envs(desktop.environment().iter().cloned())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let size = fs::metadata(&out).unwrap().len();
    assert!(
        size > 0 && size.is_multiple_of(320 * 240 * 3 / 2),
        "{size} bytes"
    );
    desktop.close(&cast);
}

#[test]
fn without_a_daemon_the_error_names_its_socket() {
    // It opens pipes, which others count.
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let output = gst_launch(
        folder.path(),
        "pipewirezerocopysrc pipewire-node-id=42 ! fakesink",
    )
    .env("XDG_RUNTIME_DIR", folder.path())
    .output()
    .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    let socket = folder.path().join("pipewire-0");
    assert!(text.contains(socket.to_str().unwrap()), "{text}");
}
