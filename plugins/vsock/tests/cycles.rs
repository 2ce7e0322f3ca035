// SPDX-License-Identifier: MIT OR Apache-2.0

//! Starting and stopping again and again; alone in its process, so that its figures are its own.

use gst::prelude::*;
use zerocopy_test_support::peer::{Peer, Seen};
use zerocopy_test_support::process;

#[test]
fn starting_and_stopping_leaves_no_descriptor_no_thread_and_no_memory() {
    gst::init().unwrap();
    gstvsock::plugin_register_static().unwrap();
    let peer = Peer::answering();
    let cycle = || {
        let pipeline = gst::parse::launch(&format!(
            "videotestsrc num-buffers=3 ! video/x-raw,format=NV12,width=64,height=48 ! \
             vsockenc tcp-host=127.0.0.1 tcp-port={} ! fakesink",
            peer.port()
        ))
        .unwrap();
        pipeline.set_state(gst::State::Playing).unwrap();
        let message = pipeline.bus().unwrap().timed_pop_filtered(
            gst::ClockTime::from_seconds(20),
            &[gst::MessageType::Eos, gst::MessageType::Error],
        );
        assert_eq!(message.unwrap().type_(), gst::MessageType::Eos);
        pipeline.set_state(gst::State::Null).unwrap();
        pipeline.bus().unwrap().set_flushing(true);
        drop(pipeline);
        peer.wait_for(|seen| matches!(seen, Seen::Closed).then_some(()));
    };
    // The first ones start GStreamer's own pools of threads, and fill those of memory.
    for _ in 0..50 {
        cycle();
    }
    let before = (process::open_fds(), process::threads());
    let memory = process::resident_memory();
    for _ in 0..1000 {
        cycle();
    }
    let after = (process::open_fds(), process::threads());
    let grown = process::resident_memory().saturating_sub(memory);
    // A picture that stayed would be 4.6 kB each time, and a thread's stack at least 8.
    assert!(grown < 4 << 20, "{grown} bytes of memory");
    // GLib's pool may keep an idle thread more or less; a leak would show as 1000.
    assert!(
        after.0 <= before.0 && after.1 <= before.1 + 2,
        "{before:?} became {after:?}"
    );
}
