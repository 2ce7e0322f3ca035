// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMUs for tests of what shows their screens.
//!
//! [`real`] starts a stock QEMU without a guest: its firmware draws a screen, and QMP takes
//! another picture of it to compare with; or, as a guest does, the test draws itself,
//! with a [`card`] or [`virtio_gpu`]. [`fake`] is a
//! QEMU of ours, as far as its display shows, which says whatever a test wants, true or not.

pub mod card;
pub mod fake;
pub mod ppm;
pub mod qmp;
mod qtest;
pub mod real;
pub mod virtio_gpu;

use std::time::{Duration, Instant};

/// Generous: catches a hang, measures nothing. A QEMU inside an emulated machine takes half a minute
/// to start where others work beside it.
pub const LIMIT: Duration = Duration::from_mins(2);

/// Calls `ready` until it gives something. For what gives no sign of its own.
///
/// # Panics
///
/// After [`LIMIT`].
pub fn eventually<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "waited for {what} for {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
