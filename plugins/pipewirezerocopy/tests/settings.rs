// SPDX-License-Identifier: MIT OR Apache-2.0

//! Properties and what is refused at the start. No daemon is needed.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use gst::prelude::*;

fn source() -> gst::Element {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstpipewirezerocopy::plugin_register_static().unwrap();
    });
    gst::ElementFactory::make("pipewirezerocopysrc")
        .build()
        .unwrap()
}

/// The error with which starting fails.
fn start_error(settings: &[(&str, &str)]) -> String {
    let src = source();
    for (name, value) in settings {
        src.set_property_from_str(name, value);
    }
    let bus = gst::Bus::new();
    src.set_bus(Some(&bus));
    assert!(src.set_state(gst::State::Paused).is_err(), "{settings:?}");
    let message = bus
        .pop_filtered(&[gst::MessageType::Error])
        .unwrap_or_else(|| panic!("{settings:?}: no error message"));
    src.set_state(gst::State::Null).unwrap();
    match message.view() {
        gst::MessageView::Error(error) => {
            format!("{} {}", error.error(), error.debug().unwrap_or_default())
        }
        _ => unreachable!("filtered"),
    }
}

#[test]
fn the_properties_have_the_names_types_and_defaults_that_applications_use() {
    let src = source();
    let default = |name: &str| {
        let value = src.property_value(name);
        assert_eq!(
            src.find_property(name).unwrap().default_value().type_(),
            value.type_()
        );
        value
            .serialize()
            .map_or("NULL".into(), |text| text.to_string())
    };
    for (name, type_, expected) in [
        ("pipewire-node-id", "guint", "0"),
        ("target-object", "gchararray", "NULL"),
        ("pipewire-fd", "gint", "-1"),
        ("render-node", "gchararray", "NULL"),
        ("output-mode", "GstPipeWireZeroCopySrcOutputMode", "auto"),
        ("cuda-device-id", "gint", "-1"),
        ("keepalive-time", "guint", "100"),
        ("resend-last", "gboolean", "false"),
        ("first-frame-timeout", "guint", "10000"),
        (
            "on-disconnect",
            "GstPipeWireZeroCopySrcOnDisconnect",
            "error",
        ),
        ("target-fps", "guint", "0"),
        ("buffer-type", "gchararray", "NULL"),
        ("capture-source", "gchararray", "pipewire"),
    ] {
        let pspec = src.find_property(name).unwrap();
        assert_eq!(pspec.value_type().name(), type_, "{name}");
        assert_eq!(default(name), expected, "{name}");
        assert!(
            pspec.blurb().is_some_and(|blurb| blurb.len() > 10),
            "{name}"
        );
    }
    assert_eq!(
        src.find_property("stats").unwrap().flags() & gst::glib::ParamFlags::READWRITE,
        gst::glib::ParamFlags::READABLE
    );
    assert_eq!(src.factory().unwrap().rank(), gst::Rank::NONE);
}

#[test]
fn without_a_target_it_does_not_start() {
    let error = start_error(&[]);
    assert!(error.contains("pipewire-node-id"), "{error}");
    assert!(error.contains("target-object"), "{error}");
}

#[test]
fn what_this_version_cannot_do_is_refused_by_name() {
    for source in ["wayland", "x11"] {
        let error = start_error(&[("pipewire-node-id", "42"), ("capture-source", source)]);
        assert!(
            error.contains(&format!("capture-source={source}")),
            "{error}"
        );
        assert!(error.contains("not in this version"), "{error}");
    }
    let error = start_error(&[("pipewire-node-id", "42"), ("buffer-type", "shmem")]);
    assert!(error.contains("buffer-type=shmem"), "{error}");
}

#[test]
fn dmabufs_without_a_gpu_are_refused_and_left_out_of_caps() {
    let no_gpu = ("render-node", "/dev/dri/renderD4711");
    for (name, value) in [
        ("output-mode", "dmabuf"),
        ("buffer-type", "dmabuf"),
        ("buffer-type", "dmabuf-passthrough"),
    ] {
        let error = start_error(&[("pipewire-node-id", "42"), no_gpu, (name, value)]);
        assert!(
            error.contains("render-node=/dev/dri/renderD4711"),
            "{error}"
        );
        assert!(error.contains("output-mode=system"), "{error}");
    }
    // The second one is there, but no GPU.
    for node in [no_gpu.1, "/dev/null"] {
        let src = source();
        src.set_property("render-node", node);
        let caps = src.static_pad("src").unwrap().query_caps(None);
        let system =
            |(_, features): (_, &gst::CapsFeaturesRef)| !features.contains("memory:DMABuf");
        assert!(
            !caps.is_empty() && caps.iter_with_features().all(system),
            "{node}: {caps}"
        );
    }
}

#[test]
fn cuda_memory_that_cannot_be_had_is_refused_with_the_reason_and_left_out_of_caps() {
    let no_gpu = ("render-node", "/dev/dri/renderD4711");
    let error = start_error(&[("pipewire-node-id", "42"), no_gpu, ("output-mode", "cuda")]);
    assert!(error.contains("output-mode=cuda"), "{error}");
    // Where the libraries are there, it is the GPU that is missing.
    let missing = gstpipewirezerocopy::cuda::available()
        .err()
        .map_or("render-node=".to_owned(), |missing| missing.to_string());
    assert!(error.contains(&missing), "{error}");
    let src = source();
    src.set_property(no_gpu.0, no_gpu.1);
    let pad = src.static_pad("src").unwrap();
    let cuda = |caps: &gst::Caps| {
        caps.iter_with_features()
            .any(|(_, features)| features.contains("memory:CUDAMemory"))
    };
    let template = pad.pad_template().unwrap();
    assert!(cuda(template.caps()), "some machine can");
    assert!(!cuda(&pad.query_caps(None)), "this one cannot");
}

#[test]
fn what_cannot_be_had_is_an_error_at_the_start_not_of_a_link() {
    for (mode, memory) in [("cuda", "CUDAMemory"), ("dmabuf", "DMABuf")] {
        let src = source();
        src.set_property("pipewire-node-id", 42u32);
        src.set_property("render-node", "/dev/dri/renderD4711");
        src.set_property_from_str("output-mode", mode);
        let filter = gst::ElementFactory::make("capsfilter")
            .property_from_str("caps", &format!("video/x-raw(memory:{memory})"))
            .build()
            .unwrap();
        let pipeline = gst::Pipeline::new();
        pipeline.add_many([&src, &filter]).unwrap();
        src.link(&filter).unwrap();
        let bus = pipeline.bus().unwrap();
        assert!(pipeline.set_state(gst::State::Paused).is_err());
        let message = bus.pop_filtered(&[gst::MessageType::Error]).unwrap();
        let gst::MessageView::Error(error) = message.view() else {
            unreachable!("filtered");
        };
        let text = error.debug().unwrap_or_default();
        assert!(text.contains("output-mode="), "{mode}: {text}");
        pipeline.set_state(gst::State::Null).unwrap();
    }
}

#[test]
fn a_memory_that_cannot_be_had_is_promised_alone() {
    for (settings, promised) in [
        (("output-mode", "dmabuf"), &["memory:DMABuf"][..]),
        (("output-mode", "cuda"), &["memory:CUDAMemory"]),
        (("buffer-type", "dmabuf-passthrough"), &["memory:DMABuf"]),
    ] {
        let src = source();
        src.set_property("render-node", "/dev/dri/renderD4711");
        src.set_property_from_str(settings.0, settings.1);
        let caps = src.static_pad("src").unwrap().query_caps(None);
        let of_these = |(_, features): (_, &gst::CapsFeaturesRef)| {
            promised.iter().any(|memory| features.contains(*memory))
        };
        assert!(
            !caps.is_empty() && caps.iter_with_features().all(of_these),
            "{settings:?}: {caps}"
        );
    }
}

#[test]
fn the_machine_is_looked_at_once_for_the_same_settings() {
    let src = source();
    src.set_property("name", "looks-once");
    let looks = Arc::new(AtomicUsize::new(0));
    let counted = looks.clone();
    gst::log::set_threshold_for_name("pipewirezerocopysrc", gst::DebugLevel::Info);
    let log = gst::log::add_log_function(move |_, _, _, _, _, object, message| {
        let ours = object.is_some_and(|object| object.to_string().contains("looks-once"));
        let text = message.get().unwrap_or_default().to_string();
        if ours && text.contains("no DMA-BUFs leave here") {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let pad = src.static_pad("src").unwrap();
    for (node, times) in [("renderD4711", 1), ("renderD4712", 2)] {
        src.set_property("render-node", format!("/dev/dri/{node}"));
        for _ in 0..3 {
            assert!(!pad.query_caps(None).is_empty());
        }
        assert_eq!(looks.load(Ordering::Relaxed), times, "{node}");
    }
    gst::log::remove_log_function(log);
}

#[test]
fn a_descriptor_that_is_not_open_is_refused() {
    let error = start_error(&[("pipewire-node-id", "42"), ("pipewire-fd", "987654")]);
    assert!(error.contains("pipewire-fd=987654"), "{error}");
}

#[test]
fn a_socket_behind_which_nobody_is_ends_in_an_error() {
    let src = source();
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    src.set_property("pipewire-node-id", 42u32);
    src.set_property("pipewire-fd", ours.as_raw_fd());
    let sink = gst::ElementFactory::make("fakesink").build().unwrap();
    let pipeline = gst::Pipeline::new();
    pipeline.add_many([&src, &sink]).unwrap();
    src.link(&sink).unwrap();
    let bus = pipeline.bus().unwrap();
    let start = Instant::now();
    let _ = pipeline.set_state(gst::State::Playing);
    let message = bus
        .timed_pop_filtered(gst::ClockTime::from_seconds(20), &[gst::MessageType::Error])
        .expect("an error");
    assert!(start.elapsed() < Duration::from_secs(2));
    pipeline.set_state(gst::State::Null).unwrap();
    drop(message);
}

#[test]
fn it_is_live_and_knows_no_seeking() {
    let src = source();
    let src = src.downcast_ref::<gst_base::BaseSrc>().unwrap();
    assert!(gst_base::prelude::BaseSrcExt::is_live(src));
    let mut query = gst::query::Seeking::new(gst::Format::Time);
    let answered = src.query(&mut query);
    assert!(!answered || !query.result().0);
}
