// SPDX-License-Identifier: MIT OR Apache-2.0

//! A PipeWire producer of DMA-BUFs that does what a test tells it, when it is told.
//!
//! [`Producer`] is the stream; where its memory comes from, and who draws into it, is the test's own
//! [`Workshop`]. What is drawn is known, byte by byte ([`Pixels::byte`]).

use std::error::Error;

mod pixels;
mod pods;
mod producer;
mod timelines;
mod workshop;

pub use pixels::Pixels;
pub use pods::{Agreed, Modifier, Offer};
pub use producer::{Event, Producer, STALE, Shown, When};
pub use timelines::{Release, SyncNode, Timelines};
pub use workshop::{Block, Canvas, Signal, Workshop};

/// What is returned: the reason is for a person.
pub type Outcome<T> = Result<T, Box<dyn Error>>;
