// SPDX-License-Identifier: MIT OR Apache-2.0

//! The Helix frame-export protocol and its transports; no GStreamer, no global state.

pub mod wait;
