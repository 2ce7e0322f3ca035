// SPDX-License-Identifier: MIT OR Apache-2.0

//! Downstream that flushes, goes away and comes back.

use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::Duration;

use gst::prelude::*;
use zerocopy_test_support::peer::{LONG, Peer};

use super::*;

#[test]
fn a_flush_leaves_nothing_of_what_is_just_leaving() {
    let peer = Peer::answering();
    // What comes of a push that a flush overtakes: it may see the flush yet, or not.
    for outcome in [None, Some(gst::FlowError::Flushing)] {
        let mut encoder = Encoder::new(peer.port(), "max-in-flight=1");
        let pad = encoder.element().static_pad("src").unwrap();
        let (tell, leaving) = channel();
        let (go_on, flushed) = channel();
        let first = Mutex::new(Some((tell, flushed)));
        pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
            let Some((tell, flushed)) = first.lock().unwrap().take() else {
                return gst::PadProbeReturn::Ok;
            };
            tell.send(()).unwrap();
            // A flush that waits for this does not end before it.
            let _ = flushed.recv_timeout(Duration::from_millis(200));
            outcome.map_or(gst::PadProbeReturn::Ok, |error| {
                info.flow_res = Err(error);
                gst::PadProbeReturn::Handled
            })
        });
        encoder.push().unwrap();
        leaving.recv_timeout(LONG).unwrap();
        encoder.flush();
        // Nobody hears it where the flush has waited.
        let _ = go_on.send(());
        for number in 1..4 {
            encoder.push().unwrap();
            assert_eq!(encoder.pull().pts(), Some(FRAME * number), "{outcome:?}");
        }
    }
}

/// What upstream hears with one of the next frames.
fn flow(encoder: &mut Encoder) -> Option<gst::FlowError> {
    (0..100).find_map(|_| encoder.push().err())
}

/// Expects that buffers leave, of which the first can be decoded and says that some were lost, and
/// that there was no error.
fn goes_on(encoder: &mut Encoder) {
    let left = (0..100).find_map(|_| {
        // What was under way may have failed.
        let _ = encoder.push();
        encoder.harness.try_pull()
    });
    let flags = left.expect("no frame leaves").flags();
    assert!(!flags.contains(gst::BufferFlags::DELTA_UNIT), "{flags:?}");
    assert!(flags.contains(gst::BufferFlags::DISCONT), "{flags:?}");
    let error = encoder.message(gst::MessageType::Error, Duration::ZERO);
    assert!(error.is_none(), "{error:?}");
}

/// Expects that the base class waits for no frame once all have left.
fn nothing_is_left(encoder: &mut Encoder) {
    assert!(encoder.harness.push_event(gst::event::Eos::new()));
    let element = encoder.element();
    let element = element.downcast_ref::<gst_video::VideoEncoder>().unwrap();
    assert_eq!(element.frames().len(), 0);
}

fn relink(encoder: &mut Encoder) {
    let pad = encoder.element().static_pad("src").unwrap();
    let peer = pad.peer().unwrap();
    pad.unlink(&peer).unwrap();
    assert_eq!(flow(encoder), Some(gst::FlowError::NotLinked));
    pad.link(&peer).unwrap();
    goes_on(encoder);
}

#[test]
fn encoding_goes_on_when_downstream_is_linked_again() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1 keyframe-interval=0");
    encoder.push().unwrap();
    encoder.pull();
    relink(&mut encoder);
    relink(&mut encoder);
    nothing_is_left(&mut encoder);
}

#[test]
fn a_stream_may_begin_unlinked() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1 keyframe-interval=0");
    relink(&mut encoder);
    let caps = encoder.harness.sinkpad().unwrap().current_caps().unwrap();
    assert!(caps.to_string().contains("level"), "{caps}");
    nothing_is_left(&mut encoder);
}

#[test]
fn encoding_goes_on_when_downstream_has_flushed_on_its_own() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(peer.port(), "max-in-flight=1 keyframe-interval=0");
    let pad = encoder.element().static_pad("src").unwrap();
    let probe = pad.add_probe(gst::PadProbeType::BUFFER, |_, info| {
        info.flow_res = Err(gst::FlowError::Flushing);
        gst::PadProbeReturn::Handled
    });
    assert_eq!(flow(&mut encoder), Some(gst::FlowError::Flushing));
    pad.remove_probe(probe.unwrap());
    goes_on(&mut encoder);
    nothing_is_left(&mut encoder);
}
