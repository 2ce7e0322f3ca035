// SPDX-License-Identifier: MIT OR Apache-2.0

//! One client's ENABLE_SCANOUTs and DISABLE_SCANOUTs: QEMU takes its time over some, and the
//! client's thread does not wait for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use helix_protocol::encode::{self, Head};
use helix_protocol::message::ScanoutResp;
use helix_protocol::wait::Waker;

/// Those that QEMU is not done with, and answers on their way out.
pub struct Enabling {
    open: usize,
    shared: Arc<Shared>,
}

struct Shared {
    /// DISABLE_SCANOUT has none, and counts all the same: a client must not send them faster than
    /// QEMU takes them.
    answers: Mutex<Vec<Option<Head>>>,
    waker: Waker,
}

impl Shared {
    fn answers(&self) -> MutexGuard<'_, Vec<Option<Head>>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn done(&self, answer: Option<Head>) {
        self.answers().push(answer);
        self.waker.wake();
    }
}

impl Enabling {
    /// `waker` wakes the client's thread when there is something to [`Enabling::collect`].
    pub fn new(waker: Waker) -> Self {
        Self {
            open: 0,
            shared: Arc::new(Shared {
                answers: Mutex::default(),
                waker,
            }),
        }
    }

    /// Takes an ENABLE_SCANOUT; what is returned must be called with what became of it.
    pub fn enable(
        &mut self,
        session_id: u16,
        scanout_id: u32,
    ) -> impl FnOnce(Result<(), String>) + Send + use<> {
        self.open += 1;
        let shared = self.shared.clone();
        move |result| {
            match &result {
                Ok(()) => tracing::debug!(scanout = scanout_id, "ENABLE_SCANOUT"),
                Err(reason) => {
                    tracing::warn!(scanout = scanout_id, reason, "ENABLE_SCANOUT failed");
                }
            }
            let success = result.is_ok();
            let answer = ScanoutResp {
                scanout_id,
                success,
                connector: if success {
                    format!("Virtual-{}", scanout_id + 1)
                } else {
                    String::new()
                },
            };
            shared.done(Some(encode::scanout_resp(session_id, &answer)));
        }
    }

    /// The same for a DISABLE_SCANOUT.
    pub fn disable(&mut self, scanout_id: u32) -> impl FnOnce(Result<(), String>) + Send + use<> {
        self.open += 1;
        let shared = self.shared.clone();
        move |result| {
            tracing::debug!(scanout = scanout_id, ?result, "DISABLE_SCANOUT");
            shared.done(None);
        }
    }

    /// Requests that QEMU is not done with.
    pub fn open(&self) -> usize {
        self.open
    }

    /// The answers that are to be sent.
    pub fn collect(&mut self) -> Vec<Head> {
        let answers = std::mem::take(&mut *self.shared.answers());
        self.open -= answers.len();
        answers.into_iter().flatten().collect()
    }
}
