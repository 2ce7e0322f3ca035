// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the plugins share.

pub use helix_protocol::wait;
