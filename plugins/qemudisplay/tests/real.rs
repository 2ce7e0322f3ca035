// SPDX-License-Identifier: MIT OR Apache-2.0

//! The element against a stock QEMU, whose firmware draws a screen of text.

mod common;

use std::time::Instant;

use common::{Rig, init};
use gst::prelude::*;
use zerocopy_test_qemu::ppm::Rgb;
use zerocopy_test_qemu::real::{Bus, Qemu};
use zerocopy_test_qemu::{LIMIT, eventually};
use zerocopy_test_support::process::{open_fds, threads};

/// Waits for a frame that is what QEMU itself says that it shows. The text cursor blinks, so there
/// is always another one.
fn shows_the_same(rig: &Rig, qemu: &Qemu) {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < LIMIT, "it never does");
        let frame = rig.next();
        let (width, height) = (frame.info.width() as usize, frame.info.height() as usize);
        assert_eq!(frame.info.format(), gst_video::VideoFormat::Bgrx);
        let frame = Rgb::from_bgrx(width, height, width * 4, &frame.pixels());
        if frame.colours() > 1 && frame == qemu.screendump() {
            break;
        }
    }
    let stats = rig.src.property::<gst::Structure>("stats");
    println!("{stats}");
    // As new as its QEMU can: the first with org.qemu.Display1.Listener.Unix.Map is 9.2.
    let shares = qemu.version() >= (9, 2);
    let expected = if shares { "memfd" } else { "bytes" };
    assert_eq!(stats.get::<&str>("transfer"), Ok(expected));
    assert_eq!(rig.stat("bytes-received") == 0, shares);
}

#[test]
fn frames_over_a_bus_are_what_qemu_shows() {
    let bus = Bus::start();
    let qemu = bus.qemu_with_vga();
    let rig = Rig::any(&format!("address={}", bus.address()));
    rig.play();
    shows_the_same(&rig, &qemu);
}

#[test]
fn frames_over_qmp_are_what_qemu_shows() {
    let qemu = Qemu::with_vga("dbus,p2p=on");
    let rig = Rig::over(&qemu.qmp(), "");
    rig.play();
    shows_the_same(&rig, &qemu);
}

#[test]
fn nothing_is_copied_for_who_lets_frames_go_at_once() {
    init();
    let qemu = Qemu::with_vga("dbus,p2p=on");
    let line = format!(
        "qemudisplaysrc name=src qmp-socket={} cursor=none ! \
         fakesink sync=false enable-last-sample=false",
        qemu.qmp().display()
    );
    let pipeline = gst::parse::launch(&line).unwrap();
    let src = pipeline.downcast_ref::<gst::Bin>().unwrap().by_name("src");
    let stat = |field: &str| {
        let stats = src.as_ref().unwrap().property::<gst::Structure>("stats");
        stats.get::<u64>(field).unwrap()
    };
    pipeline.set_state(gst::State::Playing).unwrap();
    // While the machine is busy QEMU may draw before a frame is through: then there is a copy, and
    // for a second more.
    let mut last = (0, 0);
    eventually("frames that were not copied", || {
        let (frames, copies) = (stat("frames"), stat("copies"));
        if copies != last.1 {
            last = (frames, copies);
        }
        (frames >= last.0 + 4).then_some(())
    });
    pipeline.set_state(gst::State::Null).unwrap();
}

#[test]
fn a_killed_qemu_is_an_error_and_the_next_one_is_found_after_ready() {
    let bus = Bus::start();
    let mut qemu = bus.qemu_with_vga();
    let rig = Rig::any(&format!("address={}", bus.address()));
    rig.play();
    rig.next();
    qemu.kill();
    let error = rig.error();
    assert!(
        error.contains("has gone") && error.contains("READY"),
        "{error}"
    );
    rig.ready();
    // Nobody is there yet.
    assert!(rig.pipeline.set_state(gst::State::Playing).is_err());
    let error = rig.error();
    assert!(error.contains("-display dbus"), "{error}");
    rig.ready();
    let qemu = bus.qemu_with_vga();
    rig.play();
    // Counted at the source: appsink gives nothing out after an error before it was in NULL.
    eventually("frames of the new QEMU", || {
        (rig.stat("frames") > 1).then_some(())
    });
    rig.pipeline.set_state(gst::State::Null).unwrap();
    rig.play();
    shows_the_same(&rig, &qemu);
}

#[test]
fn a_size_that_qemu_cannot_ask_for_is_a_warning_and_the_picture_comes() {
    // An old card has no way to be told.
    let qemu = Qemu::start("dbus,p2p=on", &["-vga", "cirrus"]);
    let rig = Rig::over(&qemu.qmp(), "width=1024 height=768");
    rig.play();
    let bus = rig.pipeline.bus().unwrap();
    let kinds = [gst::MessageType::Warning, gst::MessageType::Error];
    let message = bus.timed_pop_filtered(gst::ClockTime::from_seconds(60), &kinds);
    let message = message.expect("a warning");
    assert_eq!(message.type_(), gst::MessageType::Warning, "{message:?}");
    rig.next();
}

#[test]
fn cycles_leave_no_descriptors_and_no_threads() {
    // Alone in a process of its own: others would be counted.
    if std::env::var_os("QEMUDISPLAY_CYCLES").is_none() {
        let program = std::env::current_exe().unwrap();
        let status = std::process::Command::new(program)
            .args(["--exact", "cycles_leave_no_descriptors_and_no_threads"])
            .env("QEMUDISPLAY_CYCLES", "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let qemu = Qemu::with_vga("dbus,p2p=on");
    let rig = Rig::over(&qemu.qmp(), "");
    let cycle = || {
        rig.play();
        rig.next();
        rig.pipeline.set_state(gst::State::Null).unwrap();
    };
    cycle();
    cycle();
    let before = (open_fds(), threads());
    for _ in 0..10 {
        cycle();
    }
    // A thread that was joined is to be seen for a moment longer.
    eventually("as few descriptors and threads as before", || {
        (open_fds() <= before.0 && threads() <= before.1).then_some(())
    });
}
