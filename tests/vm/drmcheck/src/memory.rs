// SPDX-License-Identifier: MIT OR Apache-2.0

//! DMA-BUFs of each kind as memory of GStreamer.

use std::os::fd::OwnedFd;

use gst_allocators::prelude::*;

use crate::Outcome;
use crate::foreign::{self, Foreign};
use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::{buffers, virtgpu};

/// Rows that the buffer has and the picture has not, as Mesa makes them.
const MORE_ROWS: u32 = 16;
/// Pixels; no picture has this size.
const MARKER_SIZE: (u32, u32) = (64, 16);

/// Where the memory comes from.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Memory {
    /// A dumb buffer of virtio-gpu's primary node.
    Dumb,
    /// VIRTGPU_RESOURCE_CREATE on virtio-gpu's render node; it has more rows than the picture.
    Created,
    /// A dumb buffer of vgem.
    Vgem,
    /// Pages of a memfd.
    Udmabuf,
    /// The system heap.
    Heap,
}

/// Memory for a picture of four bytes a pixel, and its stride in bytes. Says "resource ID WIDTHxHEIGHT
/// KIND" of what is virtio-gpu's.
pub fn make(memory: Memory, width: u32, height: u32) -> Outcome<(gst::Memory, u32)> {
    let (dmabuf, stride, rows) = match memory {
        Memory::Vgem => foreign(Foreign::Vgem, width, height)?,
        Memory::Udmabuf => foreign(Foreign::Udmabuf, width, height)?,
        Memory::Heap => foreign(Foreign::Heap, width, height)?,
        Memory::Dumb => {
            let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
            let (dmabuf, stride) = buffers::dumb(&node, width, height)?;
            let id = virtgpu::resource_of(&node, &dmabuf)?;
            println!("resource {id} {width}x{height} dumb");
            (dmabuf, stride, height)
        }
        Memory::Created => {
            let node = Node::open(VIRTIO_GPU, Kind::Render)?;
            let rows = height + MORE_ROWS;
            let (dmabuf, id) = buffers::created(&node, width, rows)?;
            println!("resource {id} {width}x{rows} created");
            (dmabuf, 4 * width, rows)
        }
    };
    let allocator = gst_allocators::DmaBufAllocator::new();
    // SAFETY: the allocator takes the descriptor over, and nobody else has it.
    let memory = unsafe { allocator.alloc_dmabuf(dmabuf, (stride * rows) as usize) }?;
    Ok((memory, stride))
}

/// A DMA-BUF of another kind, its stride in bytes, and its rows.
fn foreign(kind: Foreign, width: u32, height: u32) -> Outcome<(OwnedFd, u32, u32)> {
    let (dmabuf, stride) = foreign::make(kind, width, height)?;
    Ok((dmabuf, stride, height))
}

/// Makes a resource of virtio-gpu, where this memory is one, and says "marker ID". The device's commands
/// stay in order, so QEMU's trace shows what had ended before this one.
pub fn mark(memory: Memory) -> Outcome<()> {
    let id = match memory {
        Memory::Dumb => {
            let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
            let (dmabuf, _) = buffers::dumb(&node, MARKER_SIZE.0, MARKER_SIZE.1)?;
            virtgpu::resource_of(&node, &dmabuf)?
        }
        Memory::Created => {
            let node = Node::open(VIRTIO_GPU, Kind::Render)?;
            buffers::created(&node, MARKER_SIZE.0, MARKER_SIZE.1)?.1
        }
        Memory::Vgem | Memory::Udmabuf | Memory::Heap => return Ok(()),
    };
    println!("marker {id}");
    Ok(())
}
