// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pipelines end, even where one of their elements does not.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use gst::prelude::*;

/// A pipeline that takes longer than this to stop hangs.
const PATIENCE: Duration = Duration::from_secs(1);

/// Stops a pipeline. GStreamer waits for elements that hang for as long as they do: a thread of its
/// own does that, and this returns after a second.
pub fn stop(pipeline: &gst::Pipeline) {
    let (done, is_done) = channel();
    let stopping = pipeline.clone();
    let spawned = thread::Builder::new()
        .name("helix-stop".to_owned())
        .spawn(move || {
            set_to_null(&stopping);
            // Nobody may be waiting any more.
            let _ = done.send(());
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread to stop a pipeline");
        set_to_null(pipeline);
    } else if is_done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
        tracing::warn!("a pipeline does not stop; it is left alone");
    }
}

fn set_to_null(pipeline: &gst::Pipeline) {
    if pipeline.set_state(gst::State::Null).is_err() {
        tracing::debug!("a pipeline did not stop cleanly");
    }
}
