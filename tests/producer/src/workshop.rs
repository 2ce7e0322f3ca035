// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a producer's memory comes from, and who draws into it.

use std::os::fd::BorrowedFd;

use crate::{Agreed, Outcome, Timelines};

/// Says that what is drawn late is drawn.
pub type Signal = Box<dyn FnOnce() -> Outcome<()>>;

/// Makes the buffers of a stream, on the producer's thread.
pub trait Workshop {
    /// Memory for pictures of that kind and size: DMA-BUFs, or with [`Modifier::None`](crate::Modifier)
    /// shared memory.
    fn make(&mut self, agreed: &Agreed) -> Outcome<Box<dyn Canvas>>;

    /// How many buffers a stream has.
    fn buffers(&self) -> i32 {
        6
    }

    /// Say no sizes: they mean nothing for DMA-BUFs (L8).
    fn says_no_sizes(&self) -> bool {
        false
    }

    /// Says of what is drawn late, as far as a point of its acquire timeline, by which fence it will
    /// be. None: nothing is said before it is drawn.
    fn promise(&mut self, _timelines: &Timelines, _point: u64) -> Outcome<Option<Signal>> {
        Ok(None)
    }
}

/// Memory for one picture.
pub trait Canvas {
    /// Its planes.
    fn blocks(&self) -> Vec<Block<'_>>;

    /// Draws picture `number`: once nobody else uses the memory, or, `by_device`, whoever does.
    fn draw(&self, number: u8, by_device: bool) -> Outcome<()>;

    /// The host's number for it, where virtio-gpu made it.
    fn resource(&self) -> Option<u32> {
        None
    }

    /// Puts a fence on it: it is being drawn. None where that cannot be said of this memory.
    fn fence(&self) -> Outcome<Option<Signal>> {
        Ok(None)
    }
}

/// What PipeWire is told of a plane.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// The memory.
    pub fd: BorrowedFd<'a>,
    /// Bytes that the memory has.
    pub size: usize,
    /// Bytes before the plane.
    pub offset: usize,
    /// Bytes from row to row.
    pub stride: usize,
    /// Bytes of the plane.
    pub length: usize,
}
