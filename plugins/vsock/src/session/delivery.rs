// SPDX-License-Identifier: MIT OR Apache-2.0

//! What becomes of frames is told on a thread of its own. Telling it may take as long as
//! downstream likes (a paused sink), and the connection has to be served meanwhile: replies read,
//! PINGs sent. A frame is open until it was told of, so no more wait here than may be open.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, PoisonError};

use super::{AccessUnit, Client, Shared};

/// What became of a frame.
pub(super) struct Delivery {
    pub frame: u32,
    /// [`super::State::epoch`] at the time when it was submitted.
    pub epoch: u32,
    /// Its access unit, or why there is none.
    pub outcome: Result<AccessUnit, String>,
}

/// Tells the client until the session ends.
pub(super) fn run(shared: &Shared, client: &Arc<dyn Client>) {
    // A panic must not leave the pipeline waiting for a thread that is gone.
    if panic::catch_unwind(AssertUnwindSafe(|| deliver(shared, client.as_ref()))).is_err() {
        shared.fail(
            client.as_ref(),
            "the thread that delivers access units panicked; please report this as a bug",
        );
    }
}

fn deliver(shared: &Shared, client: &dyn Client) {
    while let Some((Delivery { frame, outcome, .. }, is_flushed)) = next(shared) {
        match outcome {
            _ if is_flushed => {}
            Ok(access_unit) => client.encoded(frame, access_unit),
            Err(reason) => client.dropped(frame, &reason),
        }
        shared.update(|state| {
            state.open -= 1;
            state.answered -= 1;
        });
    }
}

/// Waits for the next one, and says whether its frame is nobody's any more. `None` at the end.
fn next(shared: &Shared) -> Option<(Delivery, bool)> {
    let mut state = shared.state();
    loop {
        if state.ended {
            return None;
        }
        if let Some(delivery) = state.deliveries.pop_front() {
            let is_flushed = delivery.epoch != state.epoch;
            return Some((delivery, is_flushed));
        }
        state = shared
            .to_deliver
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

impl Shared {
    /// Leaves something for the thread that delivers.
    pub(super) fn deliver(&self, delivery: Delivery) {
        let mut state = self.state();
        state.answered += 1;
        state.deliveries.push_back(delivery);
        drop(state);
        self.to_deliver.notify_one();
    }
}
