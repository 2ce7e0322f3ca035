// SPDX-License-Identifier: MIT OR Apache-2.0

//! The end of pipelines. An element that hangs, as drivers do, never lets its pipeline stop: who waits for
//! that without a limit hangs too.

use std::sync::mpsc;
use std::time::Duration;

use gst::prelude::*;

/// How long to wait for a pipeline. Most end within milliseconds.
const LIMIT: Duration = Duration::from_secs(2);

/// Stops a pipeline, and returns when it has, or when it seems that it never will. `what` is for the log.
pub fn stop(pipeline: &gst::Pipeline, what: &str) {
    let (done, ended) = mpsc::channel();
    let stopped = pipeline.clone();
    let spawned = std::thread::Builder::new()
        .name("helix-end".to_owned())
        .spawn(move || {
            // Nobody may be waiting any more.
            let _ = done.send(stopped.set_state(gst::State::Null));
        });
    match spawned.map(|_| ended.recv_timeout(LIMIT)) {
        Ok(Ok(Ok(_))) => {}
        Ok(Ok(Err(_))) => tracing::debug!(what, "the pipeline did not stop cleanly"),
        Ok(Err(_)) => tracing::warn!(what, "the pipeline does not stop; it is left behind"),
        Err(error) => tracing::error!(what, %error, "no thread to stop the pipeline in"),
    }
}
