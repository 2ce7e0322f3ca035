// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory of a DMA-BUF.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::Outcome;

nix::ioctl_write_ptr!(dma_buf_sync, b'b', 0, u64);

/// `DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ` (linux/dma-buf.h).
static SYNC_START_READ: u64 = 1;
/// `DMA_BUF_SYNC_END | DMA_BUF_SYNC_READ`.
static SYNC_END_READ: u64 = 4 | 1;

/// `DMA_BUF_SYNC_START | DMA_BUF_SYNC_WRITE`.
static SYNC_START_WRITE: u64 = 2;
/// `DMA_BUF_SYNC_END | DMA_BUF_SYNC_WRITE`.
static SYNC_END_WRITE: u64 = 4 | 2;

/// The first `length` bytes.
pub fn read(dmabuf: impl AsFd, length: usize) -> Outcome<Vec<u8>> {
    let fd = dmabuf.as_fd();
    let size = NonZeroUsize::new(length).ok_or("nothing to read")?;
    // SAFETY: a new mapping at an address that the kernel chooses; it is removed below.
    let start = unsafe {
        mmap(
            None,
            size,
            ProtFlags::PROT_READ,
            MapFlags::MAP_SHARED,
            fd,
            0,
        )
    }
    .map_err(|error| format!("mmap a DMA-BUF: {error}"))?;
    // SAFETY: the ioctl reads one u64, which lives through the call (struct dma_buf_sync).
    unsafe { dma_buf_sync(fd.as_raw_fd(), &raw const SYNC_START_READ) }?;
    // SAFETY: `length` bytes are mapped there until the munmap below, and nobody writes them: the
    // only other mapping is this program's, which is a single thread.
    let bytes = unsafe { std::slice::from_raw_parts(start.as_ptr().cast::<u8>(), length) }.to_vec();
    // SAFETY: as for the first.
    unsafe { dma_buf_sync(fd.as_raw_fd(), &raw const SYNC_END_READ) }?;
    // SAFETY: exactly the mapping from above, of which nothing is borrowed any more.
    unsafe { munmap(start, length) }?;
    Ok(bytes)
}

/// Writes `bytes` to its beginning, once nobody else uses it.
pub fn write(dmabuf: impl AsFd, bytes: &[u8]) -> Outcome<()> {
    let fd = dmabuf.as_fd();
    // SAFETY: the ioctl reads one u64, which lives through the call (struct dma_buf_sync).
    unsafe { dma_buf_sync(fd.as_raw_fd(), &raw const SYNC_START_WRITE) }?;
    fill(fd, bytes)?;
    // SAFETY: as above.
    unsafe { dma_buf_sync(fd.as_raw_fd(), &raw const SYNC_END_WRITE) }?;
    Ok(())
}

/// Writes `bytes` to its beginning, whoever uses it, as the device would that draws there.
pub fn fill(dmabuf: impl AsFd, bytes: &[u8]) -> Outcome<()> {
    let size = NonZeroUsize::new(bytes.len()).ok_or("nothing to write")?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses; it is removed below.
    let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, dmabuf.as_fd(), 0) }
        .map_err(|error| format!("mmap a DMA-BUF: {error}"))?;
    // SAFETY: that many bytes are mapped there until the munmap below, and `bytes` are elsewhere.
    unsafe {
        start
            .as_ptr()
            .cast::<u8>()
            .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
    }
    // SAFETY: exactly the mapping from above, of which nothing is borrowed any more.
    unsafe { munmap(start, bytes.len()) }?;
    Ok(())
}
