// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pipewirezerocopysrc` on a real PipeWire daemon, with a real compositor's ScreenCast and with
//! producers whose every pixel is known.
//!
//! The tests take turns: two at once would only slow each other down, and some count what this
//! process has open. They share one desktop, but for those that kill a part of theirs.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

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
mod weston;

/// The desktop that tests share, once one of them needs it.
static DESKTOP: Mutex<Option<Desktop>> = Mutex::new(None);

/// Whose turn it is.
fn turn() -> MutexGuard<'static, Option<Desktop>> {
    // A test that failed has not harmed the desktop.
    DESKTOP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The shared desktop, for one test at a time.
struct Shared(MutexGuard<'static, Option<Desktop>>);

impl Deref for Shared {
    type Target = Desktop;

    fn deref(&self) -> &Desktop {
        self.0.as_ref().expect("it was started")
    }
}

impl DerefMut for Shared {
    fn deref_mut(&mut self) -> &mut Desktop {
        self.0.as_mut().expect("it was started")
    }
}

fn desktop() -> Shared {
    let mut turn = turn();
    turn.get_or_insert_with(|| Desktop::start(640, 480));
    Shared(turn)
}

/// A desktop for one test alone, which may break it.
struct Own {
    desktop: Desktop,
    _turn: MutexGuard<'static, Option<Desktop>>,
}

impl Deref for Own {
    type Target = Desktop;

    fn deref(&self) -> &Desktop {
        &self.desktop
    }
}

impl DerefMut for Own {
    fn deref_mut(&mut self) -> &mut Desktop {
        &mut self.desktop
    }
}

fn own_desktop() -> Own {
    let turn = turn();
    Own {
        desktop: Desktop::start(320, 240),
        _turn: turn,
    }
}

/// The same where the only monitors are those that screencasts make.
fn own_desktop_without_monitor() -> Own {
    let turn = turn();
    Own {
        desktop: Desktop::without_monitor(),
        _turn: turn,
    }
}
