// SPDX-License-Identifier: MIT OR Apache-2.0

//! What becomes of frames is told on a thread of its own. Telling it may take as long as
//! downstream likes (a paused sink), and the connection has to be served meanwhile: replies read,
//! PINGs sent. A frame is open until it was told of, so no more wait here than may be open.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, PoisonError};

use super::{AccessUnit, Client, Shared, Status};

/// Something that the client is told in this order.
pub(super) enum Delivery {
    Encoded {
        frame: u32,
        epoch: u32,
        access_unit: AccessUnit,
    },
    Dropped {
        frame: u32,
        epoch: u32,
        reason: String,
    },
    Failed(String),
}

impl Delivery {
    /// It belongs to a frame of this epoch.
    fn epoch(&self) -> Option<u32> {
        match self {
            Self::Encoded { epoch, .. } | Self::Dropped { epoch, .. } => Some(*epoch),
            Self::Failed(_) => None,
        }
    }
}

/// Tells the client until the session ends.
pub(super) fn run(shared: &Shared, client: &Arc<dyn Client>) {
    // A panic must not leave the pipeline waiting for a thread that is gone.
    if panic::catch_unwind(AssertUnwindSafe(|| deliver(shared, client.as_ref()))).is_err() {
        fail(
            shared,
            client.as_ref(),
            "the thread that delivers access units panicked; please report this as a bug",
        );
    }
}

fn deliver(shared: &Shared, client: &dyn Client) {
    while let Some((delivery, is_flushed)) = next(shared) {
        match delivery {
            Delivery::Failed(reason) => {
                fail(shared, client, &reason);
                continue;
            }
            _ if is_flushed => {}
            Delivery::Encoded {
                frame, access_unit, ..
            } => client.encoded(frame, access_unit),
            Delivery::Dropped { frame, reason, .. } => client.dropped(frame, &reason),
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
            let is_flushed = delivery.epoch().is_some_and(|epoch| epoch != state.epoch);
            return Some((delivery, is_flushed));
        }
        state = shared
            .to_deliver
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

fn fail(shared: &Shared, client: &dyn Client, reason: &str) {
    // Told first, so that whoever is woken by the status finds the error on the bus.
    client.failed(reason);
    shared.update(|state| {
        state.status = Status::Failed;
        state.queue.clear();
        state.open = 0;
        state.answered = 0;
    });
}

impl Shared {
    /// Leaves something for the thread that delivers.
    pub(super) fn deliver(&self, delivery: Delivery) {
        let mut state = self.state();
        state.answered += u32::from(delivery.epoch().is_some());
        state.deliveries.push_back(delivery);
        drop(state);
        self.to_deliver.notify_one();
    }
}
