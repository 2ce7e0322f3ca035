// SPDX-License-Identifier: MIT OR Apache-2.0

//! PipeWire's structures for a buffer, which lie in memory that the producer can write to.

use std::os::fd::BorrowedFd;

use libspa::sys as spa_sys;
use pipewire::sys::pw_buffer;

use super::dmabuf;
use super::negotiate::StreamFormat;

/// The most blocks of a buffer that are looked at.
pub const MAX_BLOCKS: usize = dmabuf::MAX_PLANES;

/// What the producer says about a frame that it has put into a buffer, read once.
#[derive(Debug)]
pub struct Chunks {
    list: [spa_sys::spa_chunk; MAX_BLOCKS],
    count: usize,
}

impl Chunks {
    /// Reads what is said about each block.
    ///
    /// # Safety
    /// `datas` must be those of a buffer that PipeWire has added and not yet removed.
    pub unsafe fn read(datas: &[spa_sys::spa_data]) -> Result<Self, String> {
        let nothing = spa_sys::spa_chunk {
            offset: 0,
            size: 0,
            stride: 0,
            flags: 0,
        };
        let mut chunks = Self {
            list: [nothing; MAX_BLOCKS],
            count: 0,
        };
        for (slot, data) in chunks.list.iter_mut().zip(datas) {
            if data.chunk.is_null() {
                return Err("a block has no chunk".into());
            }
            // SAFETY: The pointer is valid for as long as the buffer. The producer can write there
            // at any time, so it is read once, and only the copy is checked and used.
            *slot = unsafe { data.chunk.read_volatile() };
            chunks.count += 1;
        }
        Ok(chunks)
    }

    /// A chunk for each block.
    pub fn list(&self) -> &[spa_sys::spa_chunk] {
        &self.list[..self.count]
    }

    /// Whether the producer says that nobody should look at the pixels.
    pub fn are_corrupted(&self) -> bool {
        let corrupted = spa_sys::SPA_CHUNK_FLAG_CORRUPTED as i32;
        self.list().iter().any(|chunk| chunk.flags & corrupted != 0)
    }

    /// Whether there are no pixels: compositors send such buffers when only the cursor has moved,
    /// and mutter marks them as corrupted as well (L8). DMA-BUFs may be said to have 0 bytes
    /// always, so there it takes both.
    pub fn are_empty(&self, format: &StreamFormat) -> bool {
        self.list[0].size == 0 && (format.modifier.is_none() || self.are_corrupted())
    }
}

/// The memory blocks of a buffer.
///
/// # Safety
/// `raw` must be a buffer that PipeWire has added and not yet removed, for as long as the result
/// is used.
pub unsafe fn datas<'a>(raw: *mut pw_buffer) -> &'a [spa_sys::spa_data] {
    // SAFETY: By the contract above both structures are there, and `datas` has `n_datas` entries.
    unsafe {
        let buffer = &*(*raw).buffer;
        if buffer.datas.is_null() {
            return &[];
        }
        std::slice::from_raw_parts(buffer.datas, buffer.n_datas as usize)
    }
}

/// The metadata of a buffer.
///
/// # Safety
/// As for [`datas`].
pub unsafe fn metas<'a>(raw: *mut pw_buffer) -> &'a [spa_sys::spa_meta] {
    // SAFETY: By the contract above both structures are there, and `metas` has `n_metas` entries.
    unsafe {
        let buffer = &*(*raw).buffer;
        if buffer.metas.is_null() {
            return &[];
        }
        std::slice::from_raw_parts(buffer.metas, buffer.n_metas as usize)
    }
}

/// The descriptor of a block.
///
/// # Safety
/// The block must be one of a buffer that PipeWire has added and will not remove while the result
/// is used.
pub unsafe fn descriptor(data: &spa_sys::spa_data) -> Result<BorrowedFd<'_>, String> {
    let fd = i32::try_from(data.fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or("it has no file descriptor")?;
    // SAFETY: PipeWire keeps the descriptor open until remove_buffer.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}
