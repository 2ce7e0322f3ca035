// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pipewirezerocopysrc` on a real PipeWire daemon, with a real compositor's ScreenCast and with
//! producers whose every pixel is known.
//!
//! The tests share one desktop, and take turns: two at once would only slow each other down. Those
//! that kill a part of it have a desktop of their own.

use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use zerocopy_test_support::desktop::Desktop;

mod content;
mod dmabuf;
mod hostile;
mod keepalive;
mod lifecycle;
mod loss;
mod metadata;
mod painter;
mod run;
mod screencast;
mod sharing;

/// The shared desktop, for one test at a time.
fn desktop() -> MutexGuard<'static, Desktop> {
    static DESKTOP: LazyLock<Mutex<Desktop>> =
        LazyLock::new(|| Mutex::new(Desktop::start(640, 480)));
    // A test that failed has not harmed the desktop.
    DESKTOP.lock().unwrap_or_else(PoisonError::into_inner)
}
