// SPDX-License-Identifier: MIT OR Apache-2.0

//! What several plugins need and GStreamer is part of: the connection properties and messages of
//! the elements that talk to a host, statistics, damage, caps from an H.264 stream, the waits of live
//! sources.

mod backoff;
mod connection;
mod damage;
mod h264_caps;
mod stats;
mod unlock;

pub use backoff::Backoff;
pub use connection::{ConnectionSettings, ConnectionState, connection_message};
pub use damage::{DAMAGE_META, mark_damage};
pub use h264_caps::{H264Caps, accepted_downstream};
pub use helix_protocol::wait;
pub use stats::Quantiles;
pub use unlock::Unlock;
