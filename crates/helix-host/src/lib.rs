// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host peer of vsockenc and scanoutsrc: encodes the frames that clients send, and pushes
//! screens to those who subscribe. docs/helix-host.md is the manual of the program.
//!
//! Threads and who owns what:
//!
//! - [`Server`] has one thread that accepts.
//! - Each client has one thread, which owns its connection and its [`session`]. It blocks in one
//!   place, the connection's wait, and never on an encoder or on another client.
//! - Each encoder is a GStreamer pipeline with its own thread; what comes out goes into a queue of
//!   the client and wakes it.
//! - Each [`scanout`] that somebody watches has one thread, which owns the screen's pipeline and
//!   its encoder.
//! - One thread, the [`monitor`], writes a line to the log now and then and answers who asks for figures.
//! - A [`qemu`] has one thread that keeps the connection to it, and one for its D-Bus.

mod access;
mod access_unit;
mod client;
mod edges;
mod enabling;
mod encoder;
mod ending;
mod greeting;
mod layout;
mod monitor;
mod picture;
mod probe;
mod qemu;
mod resource;
mod scanout;
mod server;
mod session;
mod settings;
mod source;
mod subscriber;

pub use access::{TOKEN_SIZE, TokenError};
pub use access_unit::AccessUnit;
pub use encoder::{Encoder, Output};
pub use layout::Layout;
pub use picture::Picture;
pub use qemu::QemuAddress;
pub use resource::{ClientIdentity, ResolveError, Resource, ResourceResolver};
pub use scanout::{SCANOUTS, ScanoutSpec};
pub use server::{Config, Prepared, STALL_LIMIT, Server, StartError};
pub use settings::{EncoderError, EncoderSpec, Keyframes, Tuning};
