// SPDX-License-Identifier: MIT OR Apache-2.0

//! The end of pipelines. An element that hangs, as drivers do, never lets its pipeline stop: who waits for
//! that without a limit hangs too, and who makes a new one each time has more and more of them.

use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use gst::prelude::*;

/// How long to wait for a pipeline. Most end within milliseconds.
const LIMIT: Duration = Duration::from_secs(2);
/// Pipelines of one kind that may be left behind. Each keeps its threads and its memory, and a place in the
/// hardware perhaps.
const MOST_LEFT_BEHIND: usize = 8;

/// Pipelines that did not stop: what they are, and the thread that waits for each.
static LEFT_BEHIND: Mutex<Vec<(String, JoinHandle<()>)>> = Mutex::new(Vec::new());

/// Whether another pipeline with `what` may be started; an error says why not.
pub fn allow(what: &str) -> Result<(), String> {
    let count = left_behind().iter().filter(|(of, _)| of == what).count();
    if count < MOST_LEFT_BEHIND {
        return Ok(());
    }
    Err(format!(
        "{count} pipelines with {what} hang and were left behind; there will be no other before one of them has \
         ended (is a driver at fault? A new start of helix-host ends them)"
    ))
}

/// Stops a pipeline, and returns when it has, or when it seems that it never will. `what` hangs then.
pub fn stop(pipeline: &gst::Pipeline, what: &str) {
    let (done, ended) = mpsc::channel();
    let stopped = pipeline.clone();
    let spawned = std::thread::Builder::new()
        .name("helix-end".to_owned())
        .spawn(move || {
            // Nobody may be waiting any more.
            let _ = done.send(stopped.set_state(gst::State::Null));
        });
    let thread = match spawned {
        Ok(thread) => thread,
        Err(error) => {
            tracing::error!(what, %error, "no thread to stop the pipeline in");
            return;
        }
    };
    match ended.recv_timeout(LIMIT) {
        Ok(Ok(_)) => {}
        Ok(Err(_)) => tracing::debug!(what, "the pipeline did not stop cleanly"),
        Err(_) => {
            tracing::warn!(what, "the pipeline does not stop; it is left behind");
            left_behind().push((what.to_owned(), thread));
        }
    }
}

/// Those that have not ended since.
fn left_behind() -> MutexGuard<'static, Vec<(String, JoinHandle<()>)>> {
    let mut all = LEFT_BEHIND.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|(_, thread)| !thread.is_finished());
    all
}
