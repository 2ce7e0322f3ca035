// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMUs for tests of what shows their screens.
//!
//! [`real`] starts a stock QEMU without a guest: its firmware draws a screen, and QMP takes
//! another picture of it to compare with. [`fake`] is a QEMU of ours, as far as its display
//! shows, which says whatever a test wants, true or not.

pub mod fake;
pub mod ppm;
pub mod qmp;
pub mod real;

use std::time::{Duration, Instant};

/// Generous: catches a hang, measures nothing.
pub const LIMIT: Duration = Duration::from_mins(1);

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
