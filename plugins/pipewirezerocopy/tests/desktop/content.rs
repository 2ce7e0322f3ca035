// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pixels, formats and caps, against producers whose every pixel is known.

use std::process::{Command, Stdio};

use gst::prelude::*;
use gstpipewirezerocopy::capture::PixelFormat;

use super::desktop;
use super::painter::{Painter, Picture};
use super::run::{LONG, Run, expected_pixels, pixels};

/// A run on a producer by name, for a sink that takes `caps`.
pub fn run_on(desktop: &zerocopy_test_support::desktop::Desktop, name: &str, caps: &str) -> Run {
    let run = Run::new(desktop, caps);
    run.src.set_property("target-object", name);
    // The producer may not have shown up in the registry yet.
    run.src.set_property_from_str("on-disconnect", "none");
    run
}

fn size(sample: &gst::Sample) -> (i32, i32) {
    let structure = sample.caps().unwrap().structure(0).unwrap();
    (
        structure.get("width").unwrap(),
        structure.get("height").unwrap(),
    )
}

fn format(sample: &gst::Sample) -> String {
    let structure = sample.caps().unwrap().structure(0).unwrap();
    structure.get("format").unwrap()
}

#[test]
fn every_format_arrives_as_it_was_drawn() {
    let desktop = desktop();
    for name in [
        "BGRA", "RGBA", "ARGB", "ABGR", "BGRx", "RGBx", "xRGB", "xBGR", "BGR", "RGB", "NV12",
    ] {
        // Odd sizes: rows with padding, chroma that rounds up.
        let caps = format!("format={name},width=99,height=35");
        let node = format!("content-{name}");
        let _producer = Painter::still(&desktop, &node, &caps);
        let run = run_on(&desktop, &node, "video/x-raw");
        run.play();
        let sample = run.frame();
        assert_eq!(format(&sample), name);
        assert_eq!(size(&sample), (99, 35));
        let (expected, got) = (expected_pixels(&caps), pixels(&sample));
        // Padding is not drawn; every other byte is compared.
        let padding = name.find('x');
        let differs = (0..expected.len().max(got.len()))
            .find(|index| expected.get(*index) != got.get(*index) && padding != Some(index % 4));
        assert_eq!(differs, None, "{name}: byte that differs");
    }
}

#[test]
fn padding_goes_out_as_opaque_alpha_where_alpha_is_asked_for() {
    let desktop = desktop();
    let size = (16, 8);
    let painter = Painter::start(&desktop, "sibling", PixelFormat::Bgrx, size);
    painter.show(Picture::plain([1, 2, 3, 4].repeat(16 * 8), 16 * 4));
    let run = run_on(&desktop, "sibling", "video/x-raw,format=BGRA");
    run.play();
    let sample = run.frame();
    assert_eq!(format(&sample), "BGRA");
    assert_eq!(pixels(&sample), [1, 2, 3, 255].repeat(16 * 8));
}

#[test]
fn a_framerate_that_downstream_fixes_is_on_the_caps() {
    let desktop = desktop();
    let _producer = Painter::still(&desktop, "rated", "format=BGRx,width=64,height=48");
    let run = run_on(&desktop, "rated", "video/x-raw,framerate=24/1");
    run.play();
    let sample = run.frame();
    let rate: gst::Fraction = sample
        .caps()
        .unwrap()
        .structure(0)
        .unwrap()
        .get("framerate")
        .unwrap();
    assert_eq!(rate, gst::Fraction::new(24, 1));
}

#[test]
fn a_format_that_is_not_shared_is_an_error_that_names_both() {
    let desktop = desktop();
    let _producer = Painter::still(&desktop, "stubborn", "format=BGRx,width=64,height=48");
    let run = run_on(&desktop, "stubborn", "video/x-raw,format=NV12");
    run.play();
    let error = run.error();
    for part in ["stubborn", "share no format", "NV12", "videoconvert"] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_format_that_is_no_longer_shared_is_the_same_error() {
    // Whatever the loss of the producer means: PipeWire 1.4 ends such a stream, 0.3.65 leaves it as it is.
    for on_disconnect in ["none", "eos"] {
        let desktop = desktop();
        let name = format!("fickle-{on_disconnect}");
        let _producer = Painter::still(&desktop, &name, "format=BGRx,width=64,height=48");
        let run = run_on(&desktop, &name, "video/x-raw");
        run.play();
        run.frame();
        run.src
            .set_property_from_str("on-disconnect", on_disconnect);
        run.set_caps("video/x-raw,format=NV12");
        let error = run.error();
        for part in [name.as_str(), "share no format", "NV12", "videoconvert"] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}

#[test]
fn a_producer_that_comes_back_without_a_format_to_share_is_the_same_error() {
    let desktop = desktop();
    let producer = Painter::still(&desktop, "changed", "format=BGRx,width=64,height=48");
    let run = run_on(&desktop, "changed", "video/x-raw,format=BGRx");
    run.play();
    run.frame();
    drop(producer);
    run.capture_message("vanished");
    let _producer = Painter::still(&desktop, "changed", "format=NV12,width=64,height=48");
    let error = run.error();
    for part in ["changed", "share no format", "BGRx"] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn memory_that_this_version_does_not_give_is_refused() {
    let desktop = desktop();
    // A filter that could be linked, and then asks for what is not there.
    let run = run_on(&desktop, "any", "video/x-raw");
    run.set_caps("video/x-raw(memory:DMABuf)");
    run.play();
    let error = run.error();
    assert!(error.contains("what can leave here is"), "{error}");
}

mod pool {
    use gst::glib;
    use gst::subclass::prelude::*;

    /// A pool that takes every setting, and then has no memory.
    #[derive(Default)]
    pub struct Empty;

    #[glib::object_subclass]
    impl ObjectSubclass for Empty {
        const NAME: &'static str = "TestEmptyPool";
        type Type = super::EmptyPool;
        type ParentType = gst::BufferPool;
    }

    impl ObjectImpl for Empty {}
    impl GstObjectImpl for Empty {}

    impl BufferPoolImpl for Empty {
        fn start(&self) -> bool {
            false
        }
    }
}

gst::glib::wrapper! {
    pub struct EmptyPool(ObjectSubclass<pool::Empty>) @extends gst::BufferPool, gst::Object;
}

#[test]
fn a_pool_of_downstreams_that_has_no_memory_is_done_without() {
    let desktop = desktop();
    let caps = "format=BGRx,width=64,height=48";
    let _producer = Painter::still(&desktop, "poor", caps);
    let run = run_on(&desktop, "poor", "video/x-raw");
    run.allocate(|query| {
        let pool: EmptyPool = gst::glib::Object::new();
        query.add_allocation_pool(Some(&pool), 64 * 48 * 4, 2, 0);
    });
    run.play();
    let differs = |(index, (one, other)): (usize, (&u8, &u8))| one != other && index % 4 != 3;
    let (expected, got) = (expected_pixels(caps), pixels(&run.frame()));
    assert_eq!(expected.len(), got.len());
    assert!(!expected.iter().zip(&got).enumerate().any(differs));
}

#[test]
fn the_sink_of_pipewire_itself_is_a_producer_too() {
    // It streams from memory that the daemon has allocated. A process of its own, because its
    // version of Debian 12 sometimes crashes or hangs when it ends.
    let desktop = desktop();
    let caps = "format=RGBA,width=64,height=48";
    let run = run_on(&desktop, "sink", "video/x-raw");
    run.src.set_property("first-frame-timeout", 0u32);
    run.play();
    // That version also signals its condition variable without the lock: on a busy machine it may sleep
    // for ever, before its first picture too. Another one is found by its name.
    let got = (0..4).find_map(|_| {
        let mut producer = Command::new("gst-launch-1.0")
            .args([
                "-q",
                "videotestsrc",
                "is-live=true",
                "pattern=smpte100",
                "!",
            ])
            .args([&format!("video/x-raw,{caps},framerate=30/1"), "!"])
            .args(["pipewiresink", "mode=provide"])
            .arg("stream-properties=p,media.class=Video/Source,media.type=Video,node.name=sink")
            .envs(desktop.environment().iter().cloned())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let sample = run.frame_within(LONG / 2);
        producer.kill().unwrap();
        producer.wait().unwrap();
        sample
    });
    assert_eq!(pixels(&got.expect("a picture")), expected_pixels(caps));
}
