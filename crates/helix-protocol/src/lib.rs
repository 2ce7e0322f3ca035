// SPDX-License-Identifier: MIT OR Apache-2.0

#![doc = include_str!("../README.md")]

pub mod address;
pub mod connection;
pub mod decode;
pub mod encode;
mod error;
pub mod greeting;
pub mod h264;
mod hello;
mod limits;
pub mod message;
mod payload;
mod socket_file;
pub mod sps;
pub mod transport;
pub mod wait;
mod wire;

pub use address::Address;
pub use connection::Connection;
pub use decode::Decoder;
pub use error::DecodeError;
pub use greeting::Agreement;
pub use limits::Limits;
pub use message::{Envelope, Message};
pub use payload::Payload;
pub use transport::{Listener, Stream};
