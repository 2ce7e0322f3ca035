// SPDX-License-Identifier: MIT OR Apache-2.0

//! The screens of a running QEMU, through the D-Bus display that a stock QEMU (7.2 and newer) has:
//! `-display dbus,addr=ADDRESS`, or `-display dbus,p2p=on` with a QMP socket.
//!
//! [`Display::start`] makes a thread that speaks with QEMU. Each [`Screen`] keeps the latest
//! picture of one console, what has changed in it since it was last taken, and the cursor, for as
//! long as somebody keeps a [`Listening`] of it. Whoever shows it calls [`Screen::take`] at a rate of
//! their own: QEMU sends up to several hundred updates a second and waits for nobody.
//!
//! # Where the pixels are
//!
//! | QEMU gives | when | [`Pixels`] |
//! | --- | --- | --- |
//! | bytes in messages | before QEMU 9.2, and devices without shareable memory | [`Pixels::Bytes`], copied on write |
//! | a memfd | `org.qemu.Display1.Listener.Unix.Map` | [`Pixels::Shared`], lent or to be read |
//! | a DMA-BUF | with `gl=on` | [`Pixels::DmaBuf`], QEMU waits until it is let go |
//!
//! # Trust
//!
//! QEMU is not trusted: sizes, strides, offsets and lengths are checked against each other and
//! against the real size of what was sent before anything is kept, and one that does not fit ends
//! the connection with [`Error::Nonsense`].

mod address;
mod console;
mod cursor;
mod damage;
mod display;
mod dmabuf;
mod error;
mod format;
mod listener;
mod memory;
mod picture;
mod proxies;
mod qmp;
mod screen;
mod sizes;

pub use address::Address;
pub use cursor::{Cursor, CursorShape};
pub use damage::{Damage, Rect};
pub use display::{Config, Consoles, Display, Event, Level, Log, Notify, Status};
pub use dmabuf::{DmaBuf, Plane};
pub use error::Error;
pub use format::PixelFormat;
pub use memory::{Canvas, Lease, SharedFile};
pub use picture::{Layout, MAX_SIZE, Picture, Pixels};
pub use screen::{Figures, Listening, Look, Screen};
