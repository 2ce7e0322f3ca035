// SPDX-License-Identifier: MIT OR Apache-2.0

//! For tests on machines without virtio-gpu: descriptors that GStreamer takes for DMA-BUFs, and a
//! device that knows some of them. The real ones are in tests/vm/stages/resource.py.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use gst_allocators::prelude::*;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;

use crate::virtgpu::{Resource, Resources};

/// Memory that can be mapped.
pub fn memfd(size: usize) -> OwnedFd {
    let fd = memfd_create(c"fake DMA-BUF", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, size as i64).unwrap();
    fd
}

/// A descriptor as DMA-BUF memory.
pub fn dmabuf(fd: OwnedFd, size: usize) -> gst::Memory {
    gst::init().unwrap();
    let allocator = gst_allocators::DmaBufAllocator::new();
    // SAFETY: the allocator takes the descriptor over, and nobody else has it.
    unsafe { allocator.alloc_dmabuf(fd, size) }.unwrap()
}

/// Knows the descriptors that it was told of.
pub struct Device {
    number: u64,
    known: Mutex<Vec<(u64, Resource)>>,
    /// How often it was asked.
    pub asked: AtomicU32,
}

impl Device {
    pub fn new(number: u64) -> Self {
        Self {
            number,
            known: Mutex::default(),
            asked: AtomicU32::new(0),
        }
    }

    /// From now on the file behind `fd` is a resource.
    pub fn add(&self, fd: impl AsFd, id: u32, size: usize) {
        let id = NonZeroU32::new(id).unwrap();
        let file = fstat(fd).unwrap().st_ino;
        self.known
            .lock()
            .unwrap()
            .push((file, Resource { id, size }));
    }
}

impl Resources for Device {
    fn resource(&self, dmabuf: BorrowedFd<'_>) -> io::Result<Resource> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let file = fstat(dmabuf)?.st_ino;
        let known = self.known.lock().unwrap();
        let found = known.iter().find(|(known, _)| *known == file);
        found
            .map(|(_, resource)| *resource)
            .ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    fn device(&self) -> u64 {
        self.number
    }
}
