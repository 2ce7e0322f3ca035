// SPDX-License-Identifier: MIT OR Apache-2.0

//! A dumb buffer of a DRM node, into which the processor draws: for machines without a GPU, on which this
//! program is tested.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use drm::buffer::{Buffer, DrmFourcc};
use drm::control::Device;
use drm::control::dumbbuffer::DumbBuffer;
use zerocopy_test_producer::{Block, Canvas, Outcome, Pixels};

/// `O_CLOEXEC | O_RDWR` (fcntl.h), which are `DRM_CLOEXEC | DRM_RDWR`.
const EXPORT_FLAGS: u32 = 0o2_000_000 | 0o2;

struct Node(File);

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Node {}
impl Device for Node {}

/// Memory for one picture of one plane.
pub struct Dumb {
    node: Node,
    buffer: RefCell<DumbBuffer>,
    fd: OwnedFd,
    pixels: Pixels,
    size: (u32, u32),
}

impl Dumb {
    /// Makes one on a primary node.
    pub fn new(node: &Path, pixels: Pixels, size: (u32, u32)) -> Outcome<Self> {
        let node = Node(File::options().read(true).write(true).open(node)?);
        let buffer = node.create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32)?;
        let fd = node.buffer_to_prime_fd(buffer.handle(), EXPORT_FLAGS)?;
        Ok(Self {
            node,
            buffer: RefCell::new(buffer),
            fd,
            pixels,
            size,
        })
    }

    fn stride(&self) -> usize {
        self.buffer.borrow().pitch() as usize
    }
}

impl Canvas for Dumb {
    fn blocks(&self) -> Vec<Block<'_>> {
        let stride = self.stride();
        let length = stride * self.size.1 as usize;
        vec![Block {
            fd: self.fd.as_fd(),
            size: length,
            offset: 0,
            stride,
            length,
        }]
    }

    fn draw(&self, number: u8, _by_device: bool) -> Outcome<()> {
        let stride = self.stride();
        let mut buffer = self.buffer.borrow_mut();
        let mut mapped = self.node.map_dumb_buffer(&mut buffer)?;
        for (y, row) in mapped
            .chunks_mut(stride)
            .take(self.size.1 as usize)
            .enumerate()
        {
            for (column, byte) in row[..4 * self.size.0 as usize].iter_mut().enumerate() {
                *byte = self.pixels.byte(number, 0, y, column);
            }
        }
        Ok(())
    }
}
