// SPDX-License-Identifier: MIT OR Apache-2.0

//! The element against a QEMU of ours, which says what a test wants.

mod common;

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use common::Rig;
use gst::prelude::*;
use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy_plugin_common::DAMAGE_META;
use zerocopy_test_qemu::eventually;
use zerocopy_test_qemu::fake::{FakeQemu, Listener};

const LISTENER: &str = "org.qemu.Display1.Listener";

/// A playing pipeline, and the listener that it has registered.
fn playing(qemu: &FakeQemu, properties: &str) -> (Rig, Listener) {
    let rig = Rig::over(&qemu.qmp(), properties);
    rig.play();
    let listener = qemu.listener();
    (rig, listener)
}

fn memfd(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("picture", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file
}

fn draw(mut file: &File, bytes: &[u8]) {
    file.seek(SeekFrom::Start(0)).unwrap();
    file.write_all(bytes).unwrap();
}

/// Frames as they come, as fast as they come.
const UNPACED: &str = "max-framerate=0/1";

#[test]
fn bytes_go_out_as_they_came_and_only_changes_cost_a_copy() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    let data: Vec<u8> = (0..64).collect();
    listener.scanout(4, 4, &data).unwrap();
    let first = rig.next();
    assert_eq!(first.pixels(), data);
    assert_eq!(first.damage(), None);
    assert_eq!(rig.stat("copies"), 0);
    listener.update((1, 2), (2, 1), &[9; 8]).unwrap();
    let second = rig.next();
    let mut changed = data.clone();
    changed[2 * 16 + 4..2 * 16 + 12].fill(9);
    assert_eq!(second.pixels(), changed);
    assert_eq!(second.damage(), Some(vec![vec![1, 2, 2, 1]]));
    assert_eq!(first.pixels(), data, "it is still in use");
    assert_eq!((rig.stat("copies"), rig.stat("frames")), (1, 2));
    assert!(second.buffer.pts() > first.buffer.pts());
}

#[test]
fn a_memfd_goes_out_without_a_copy_and_cannot_be_drawn_on() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    let file = memfd(&[1; 128]);
    listener.scanout_map(file.as_fd(), 32, (4, 4, 24)).unwrap();
    let mut frame = rig.next();
    assert_eq!(frame.pixels(), vec![1; 64]);
    assert_eq!(rig.stat("copies"), 0);
    // The same memory: what is drawn now shows.
    draw(&file, &[2; 128]);
    assert_eq!(frame.pixels(), vec![2; 64]);
    // A filter that works in place gets a copy.
    frame.buffer.make_mut().map_writable().unwrap().fill(3);
    listener.update_map((0, 0), (4, 4)).unwrap();
    assert_eq!(rig.next().pixels(), vec![2; 64]);
}

#[test]
fn a_screen_that_changes_while_frames_are_in_use_is_copied() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    let file = memfd(&[1; 64]);
    listener.scanout_map(file.as_fd(), 0, (4, 4, 16)).unwrap();
    let lent = rig.next();
    draw(&file, &[2; 64]);
    listener.update_map((0, 0), (4, 4)).unwrap();
    let copied = rig.next();
    assert_eq!((rig.stat("overlaps"), rig.stat("copies")), (1, 1));
    draw(&file, &[3; 64]);
    assert_eq!(copied.pixels(), vec![2; 64]);
    drop(lent);
}

#[test]
fn a_memfd_that_shrinks_is_an_error() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    let file = memfd(&[1; 64]);
    listener.scanout_map(file.as_fd(), 0, (4, 4, 16)).unwrap();
    drop(rig.next());
    file.set_len(10).unwrap();
    listener.update_map((0, 0), (4, 4)).unwrap();
    let error = rig.error();
    assert!(error.contains("a map of 10 bytes"), "{error}");
}

#[test]
fn rows_with_padding_become_usual_ones_for_who_knows_no_other() {
    common::init();
    let qemu = FakeQemu::start(&[0]);
    let line = format!(
        "qemudisplaysrc qmp-socket={} ! fakesink name=sink signal-handoffs=true",
        qemu.qmp().display()
    );
    let pipeline = gst::parse::launch(&line).unwrap();
    let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
    let (sender, frames) = std::sync::mpsc::channel();
    let sink = pipeline.by_name("sink").unwrap();
    sink.connect("handoff", false, move |values| {
        let buffer = values[1].get::<gst::Buffer>().unwrap();
        let _ = sender.send(buffer.map_readable().unwrap().to_vec());
        None
    });
    pipeline.set_state(gst::State::Playing).unwrap();
    let listener = qemu.listener();
    let body = (2u32, 2u32, 12u32, 0x2002_0888u32, &[7u8; 24][..]);
    listener.call(LISTENER, "Scanout", &body).unwrap();
    let frame = frames.recv_timeout(zerocopy_test_qemu::LIMIT).unwrap();
    assert_eq!(frame, vec![7; 16]);
    pipeline.set_state(gst::State::Null).unwrap();
}

#[test]
fn changes_that_come_fast_are_one_frame() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, "max-framerate=1/2");
    listener.scanout(4, 4, &[0; 64]).unwrap();
    rig.next();
    for x in 0..4 {
        listener.update((x, 0), (1, 1), &[1; 4]).unwrap();
    }
    rig.src
        .set_property("max-framerate", gst::Fraction::new(0, 1));
    let frame = rig.next();
    assert_eq!(frame.damage().unwrap().len(), 4);
    assert_eq!(
        &frame.pixels()[..20],
        [[1; 16].as_slice(), &[0; 4]].concat()
    );
    assert_eq!((rig.stat("frames"), rig.stat("coalesced")), (2, 3));
}

#[test]
fn a_blended_cursor_is_drawn_where_it_is_and_damages_what_it_leaves() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    listener.scanout(4, 4, &[0; 64]).unwrap();
    assert_eq!(rig.next().pixels(), vec![0; 64]);
    let opaque = [10, 20, 30, 255];
    listener.cursor_define(1, 1, &opaque).unwrap();
    rig.next();
    listener.mouse_set(2, 1, true).unwrap();
    let frame = rig.next();
    assert_eq!(&frame.pixels()[16 + 8..16 + 11], &opaque[..3]);
    assert_eq!(frame.damage(), Some(vec![vec![2, 1, 1, 1]]));
    listener.mouse_set(0, 0, true).unwrap();
    let frame = rig.next();
    assert_eq!(&frame.pixels()[16 + 8..16 + 11], [0; 3]);
    assert_eq!(&frame.pixels()[..3], &opaque[..3]);
    let both = vec![vec![2, 1, 1, 1], vec![0, 0, 1, 1]];
    assert_eq!(frame.damage(), Some(both));
    listener.mouse_set(0, 0, false).unwrap();
    assert_eq!(rig.next().pixels(), vec![0; 64]);
}

#[test]
fn a_cursor_lets_through_what_its_alpha_says_and_adds_its_own_colours() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    listener.scanout(1, 1, &[100; 4]).unwrap();
    rig.next();
    // Premultiplied: as light as it is to be at its edge, and no lighter.
    listener.cursor_define(1, 1, &[50, 0, 120, 128]).unwrap();
    rig.next();
    listener.mouse_set(0, 0, true).unwrap();
    let pixels = rig.next().pixels();
    for (found, own) in pixels.iter().zip([50_u8, 0, 120]) {
        let expected = own + 100 / 2;
        assert!(found.abs_diff(expected) <= 1, "{pixels:?}");
    }
}

#[test]
fn an_overlay_goes_beside_the_picture() {
    let qemu = FakeQemu::start(&[0]);
    let properties = format!(
        "qmp-socket={} cursor=overlay {UNPACED}",
        qemu.qmp().display()
    );
    let rig = Rig::new(&properties, "video/x-raw(meta:GstVideoOverlayComposition)");
    rig.play();
    let listener = qemu.listener();
    listener.scanout(4, 4, &[0; 64]).unwrap();
    rig.next();
    listener.cursor_define(2, 2, &[255; 16]).unwrap();
    rig.next();
    listener.mouse_set(1, 1, true).unwrap();
    let frame = rig.next();
    assert_eq!(frame.pixels(), vec![0; 64]);
    assert_eq!(frame.damage(), Some(vec![]));
    let meta = frame
        .buffer
        .meta::<gst_video::VideoOverlayCompositionMeta>();
    let overlay = meta.unwrap().overlay_owned();
    let rectangle = overlay.rectangle(0).unwrap();
    assert_eq!(rectangle.render_rectangle(), (1, 1, 2, 2));
    assert_eq!(rig.stat("copies"), 0);
}

#[test]
fn a_cursor_that_is_not_wanted_makes_no_frames() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, "cursor=none max-framerate=0/1");
    listener.scanout(4, 4, &[0; 64]).unwrap();
    rig.next();
    listener.cursor_define(1, 1, &[255; 4]).unwrap();
    listener.mouse_set(1, 1, true).unwrap();
    listener.update((0, 0), (1, 1), &[1; 4]).unwrap();
    let frame = rig.next();
    assert_eq!(frame.damage(), Some(vec![vec![0, 0, 1, 1]]));
    assert_eq!(rig.stat("frames"), 2);
}

#[test]
fn another_size_is_another_caps() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    for (width, height) in [(4, 4), (8, 2), (1, 1), (4, 4)] {
        let data = vec![5; (width * height * 4) as usize];
        listener.scanout(width, height, &data).unwrap();
        let frame = rig.next();
        assert_eq!((frame.info.width(), frame.info.height()), (width, height));
        assert_eq!(frame.pixels(), data);
    }
}

#[test]
fn a_size_that_downstream_does_not_take_is_an_error_that_says_what_helps() {
    let qemu = FakeQemu::start(&[0]);
    let properties = format!("qmp-socket={}", qemu.qmp().display());
    let rig = Rig::new(&properties, "video/x-raw,width=4");
    rig.play();
    let listener = qemu.listener();
    listener.scanout(8, 2, &[0; 64]).unwrap();
    let error = rig.error();
    assert!(
        error.contains("8x2 pixels of BGRx") && error.contains("videoscale"),
        "{error}"
    );
}

#[test]
fn a_console_that_is_switched_off_is_said_and_comes_back() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    listener.scanout(4, 4, &[1; 64]).unwrap();
    rig.next();
    rig.state("streaming");
    listener.disable().unwrap();
    rig.state("off");
    listener.scanout(4, 4, &[2; 64]).unwrap();
    rig.state("streaming");
    assert_eq!(rig.next().pixels(), vec![2; 64]);
    assert_eq!(rig.stat("frames"), 2);
}

#[test]
fn qemu_says_what_it_shows_only_while_frames_can_leave() {
    let qemu = FakeQemu::start(&[0]);
    let rig = Rig::over(&qemu.qmp(), "width=640 height=480");
    for times in 1..3 {
        rig.pipeline.set_state(gst::State::Paused).unwrap();
        // The answer to this would come after a listener.
        rig.src.set_property("width", 640 + times * 8);
        while qemu.size().1 != 640 + times * 8 {}
        assert_eq!(qemu.registered(), times as usize - 1);
        rig.play();
        let listener = qemu.listener();
        listener.scanout(4, 4, &[times as u8; 64]).unwrap();
        let frame = rig.next();
        assert_eq!(
            (frame.pixels(), frame.damage()),
            (vec![times as u8; 64], None)
        );
        rig.pipeline.set_state(gst::State::Paused).unwrap();
        listener.wait_for_close();
    }
}

/// A newer QEMU never forgets a listener.
#[test]
fn a_newer_qemu_is_given_one_listener() {
    let qemu = FakeQemu::start(&[0]);
    qemu.grow_up();
    let (rig, listener) = playing(&qemu, UNPACED);
    // A picture may come once more.
    let shows = |value| while rig.next().pixels() != vec![value; 64] {};
    for times in 1..4 {
        listener.scanout(4, 4, &[times; 64]).unwrap();
        shows(times);
        rig.pipeline.set_state(gst::State::Paused).unwrap();
        listener.update((0, 0), (4, 4), &[times + 100; 64]).unwrap();
        rig.play();
        shows(times + 100);
    }
    assert_eq!(qemu.registered(), 1);
}

#[test]
fn playing_begins_with_the_picture_after_the_shortest_pause() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, mut listener) = playing(&qemu, UNPACED);
    let show = |listener: &Listener| listener.scanout(4, 4, &[1; 64]);
    show(&listener).unwrap();
    rig.next();
    let mut known = qemu.registered();
    for _ in 0..200 {
        rig.pipeline.set_state(gst::State::Paused).unwrap();
        rig.play();
        // Either the element has begun to listen anew, or nobody has noticed the pause.
        eventually("a frame", || {
            if qemu.registered() > known {
                known += 1;
                listener = qemu.listener();
                // It may be closed again.
                let _ = show(&listener);
            }
            rig.sink.try_pull_sample(gst::ClockTime::ZERO)
        });
    }
}

#[test]
fn a_qemu_that_goes_is_an_error() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, "");
    listener.scanout(4, 4, &[1; 64]).unwrap();
    rig.next();
    listener.close();
    let error = rig.error();
    assert!(
        error.contains("has gone") && error.contains("READY"),
        "{error}"
    );
    assert_eq!(rig.stat("errors"), 1);
}

#[test]
fn a_qemu_that_lies_is_an_error() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, "");
    assert!(listener.scanout(1000, 1000, &[1; 64]).is_err());
    let error = rig.error();
    assert!(
        error.contains("64 bytes for a picture of 4000000"),
        "{error}"
    );
    listener.wait_for_close();
}

#[test]
fn a_still_screen_is_sent_again_to_who_comes_late() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    listener.scanout(4, 4, &[1; 64]).unwrap();
    let first = rig.next();
    let events: [gst::Event; 2] = [
        gst::event::Reconfigure::new(),
        gst_video::UpstreamForceKeyUnitEvent::builder().build(),
    ];
    for (index, event) in events.into_iter().enumerate() {
        let pad = rig.src.static_pad("src").unwrap();
        assert!(pad.send_event(event), "event {index}");
        let again = rig.next();
        assert_eq!(again.pixels(), first.pixels());
        assert_eq!(again.damage(), Some(vec![]));
    }
    assert_eq!(rig.stat("repeats"), 2);
}

#[test]
fn a_flush_brings_the_whole_picture_anew() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, UNPACED);
    listener.scanout(4, 4, &[1; 64]).unwrap();
    rig.next();
    // At the source's own pad: what the sink makes of a flush is the pipeline's affair.
    let (tell, pushed) = std::sync::mpsc::channel();
    let pad = rig.src.static_pad("src").unwrap();
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        let buffer = info.buffer().unwrap();
        let damaged = gst::meta::CustomMeta::from_buffer(buffer, DAMAGE_META).is_ok();
        let _ = tell.send((damaged, buffer.map_readable().unwrap().to_vec()));
        gst::PadProbeReturn::Ok
    });
    assert!(rig.src.send_event(gst::event::FlushStart::new()));
    let stop = gst::event::FlushStop::builder(false).build();
    assert!(rig.src.send_event(stop));
    let frame = pushed.recv_timeout(zerocopy_test_qemu::LIMIT).unwrap();
    assert_eq!(frame, (false, vec![1; 64]));
}

#[test]
fn sizes_are_asked_for_at_the_start_and_while_playing() {
    let qemu = FakeQemu::start(&[0, 5]);
    let (rig, listener) = playing(&qemu, "console=5 width=1024 height=768");
    assert_eq!(listener.console, 5);
    assert_eq!(qemu.size(), (5, 1024, 768));
    rig.src.set_property("width", 1280u32);
    assert_eq!(qemu.size(), (5, 1280, 768));
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let qemu = FakeQemu::start(&[0]);
    for (properties, said) in [
        ("width=100", "both width and height"),
        ("address=unix:path=/nowhere", "both set"),
        ("console=3", "no console 3, only [0]"),
    ] {
        let rig = Rig::over(&qemu.qmp(), properties);
        assert!(rig.pipeline.set_state(gst::State::Playing).is_err());
        let error = rig.error();
        assert!(error.contains(said), "{properties}: {error}");
    }
    let rig = Rig::any("address=unix:path=/nowhere/bus");
    assert!(rig.pipeline.set_state(gst::State::Playing).is_err());
    let error = rig.error();
    assert!(error.contains("unix:path=/nowhere/bus"), "{error}");
}

#[test]
fn latency_is_the_time_of_a_frame() {
    let qemu = FakeQemu::start(&[0]);
    let (rig, listener) = playing(&qemu, "max-framerate=50/1");
    listener.scanout(4, 4, &[1; 64]).unwrap();
    rig.next();
    let mut query = gst::query::Latency::new();
    assert!(rig.src.query(&mut query));
    let (live, min, max) = query.result();
    assert_eq!(
        (live, min, max),
        (true, gst::ClockTime::from_mseconds(20), None)
    );
}
