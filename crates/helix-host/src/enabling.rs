// SPDX-License-Identifier: MIT OR Apache-2.0

//! One client's ENABLE_SCANOUTs: QEMU takes its time over some, and the client's thread does not
//! wait for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use helix_protocol::encode::{self, Head};
use helix_protocol::message::ScanoutResp;
use helix_protocol::wait::Waker;

/// Those without an answer, and answers on their way out.
pub struct Enabling {
    open: usize,
    shared: Arc<Shared>,
}

struct Shared {
    answers: Mutex<Vec<Head>>,
    waker: Waker,
}

impl Shared {
    fn answers(&self) -> MutexGuard<'_, Vec<Head>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Takes a request; what is returned must be called with what became of it.
    pub fn begin(
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
            let head = encode::scanout_resp(session_id, &answer);
            shared.answers().push(head);
            shared.waker.wake();
        }
    }

    /// Requests without an answer.
    pub fn open(&self) -> usize {
        self.open
    }

    /// The answers that are to be sent.
    pub fn collect(&mut self) -> Vec<Head> {
        let answers = std::mem::take(&mut *self.shared.answers());
        self.open -= answers.len();
        answers
    }
}
