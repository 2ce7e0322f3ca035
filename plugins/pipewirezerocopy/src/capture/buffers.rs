// SPDX-License-Identifier: MIT OR Apache-2.0

//! The buffers that a stream has: opened when they are added, read when they come.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use libspa::sys as spa_sys;
use pipewire::sys::pw_buffer;

use super::dmabuf::{self, DmaBufPicture, DmaBuffer, LINEAR, Plane};
use super::frame::Pixels;
use super::geometry::{Chunk, FrameLayout, MAX_PLANES};
use super::memory::{Mapping, Memory};
use super::negotiate::StreamFormat;

/// The most blocks of a buffer that are looked at.
const MAX_BLOCKS: usize = dmabuf::MAX_PLANES;

/// A buffer of the stream.
#[derive(Debug)]
pub struct Buffer {
    /// Our number for it, never used twice, also not by the next stream.
    pub id: u64,
    /// A lease of it exists.
    pub out: bool,
    store: Store,
}

/// Where a buffer's pixels are.
#[derive(Debug)]
enum Store {
    /// Memory for the CPU; none for a block that cannot be read.
    Blocks([Option<Arc<Memory>>; MAX_PLANES]),
    /// Memory of a device.
    DmaBuf {
        buffer: Arc<DmaBuffer>,
        /// Which of its blocks, and which byte of that, each of PipeWire's blocks begins at.
        starts: Vec<(usize, u32)>,
    },
}

/// What the producer says about a frame that it has put into a buffer, read once.
#[derive(Debug)]
pub struct Chunks {
    list: [spa_sys::spa_chunk; MAX_BLOCKS],
    count: usize,
}

impl Buffer {
    /// Opens a buffer that was just added. What cannot be opened is told to `complain`; frames in it
    /// will be skipped.
    ///
    /// # Safety
    /// `datas` must be those of a buffer that PipeWire has just added.
    pub unsafe fn open(
        id: u64,
        datas: &[spa_sys::spa_data],
        mut complain: impl FnMut(String),
    ) -> Self {
        let dmabufs: Vec<_> = datas
            .iter()
            .take_while(|data| data.type_ == spa_sys::SPA_DATA_DmaBuf)
            .take(MAX_BLOCKS)
            .collect();
        let mut memory = [None, None];
        let store = if dmabufs.is_empty() {
            for (slot, data) in memory.iter_mut().zip(datas) {
                // SAFETY: By the contract above.
                match unsafe { open(data) } {
                    Ok(memory) => *slot = Some(Arc::new(memory)),
                    Err(error) => complain(error),
                }
            }
            Store::Blocks(memory)
        } else {
            // SAFETY: By the contract above.
            match unsafe { open_dmabufs(&dmabufs) } {
                Ok(store) => store,
                Err(error) => {
                    complain(error);
                    Store::Blocks(memory)
                }
            }
        };
        Self {
            id,
            out: false,
            store,
        }
    }

    /// Its memory in a few words, for logs.
    pub fn describe(&self) -> String {
        match &self.store {
            Store::Blocks(memory) => {
                let ways = memory.iter().flatten().map(|memory| match &**memory {
                    Memory::Mapped(_) => format!("{} bytes, mapped", memory.len()),
                    Memory::File(_) => format!(
                        "{} bytes, not sealed against shrinking: its frames are copied",
                        memory.len()
                    ),
                });
                ways.collect::<Vec<_>>().join("; ")
            }
            Store::DmaBuf { buffer, starts } => {
                let sizes = buffer.blocks().iter().map(|block| block.size().to_string());
                let sizes = sizes.collect::<Vec<_>>().join(" and ");
                format!("DMA-BUF of {sizes} bytes, {} planes", starts.len())
            }
        }
    }

    /// Makes a copy of what is in the buffer, where somebody still reads it in place, for them to go
    /// on reading. DMA-BUFs have none: their readers see what the producer draws next.
    pub fn detach(&self) -> std::io::Result<()> {
        match &self.store {
            Store::Blocks(memory) => memory.iter().flatten().try_for_each(|m| m.detach()),
            Store::DmaBuf { .. } => Ok(()),
        }
    }

    /// Where the pixels of a frame lie, checked against the memory that is there. The error says
    /// what cannot be.
    pub fn frame(
        &self,
        format: &StreamFormat,
        chunks: &Chunks,
    ) -> Result<(FrameLayout, Pixels), String> {
        let (pixels, width, height) = (format.format, format.width, format.height);
        let chunk = |chunk: &spa_sys::spa_chunk, mapped| Chunk {
            mapped,
            offset: chunk.offset,
            size: chunk.size,
            stride: chunk.stride,
        };
        match (&self.store, format.modifier) {
            (Store::Blocks(memory), None) => {
                let mut list = [Chunk::default(); MAX_PLANES];
                let count = chunks.count.min(MAX_PLANES);
                for ((slot, said), memory) in list.iter_mut().zip(chunks.list()).zip(memory) {
                    *slot = chunk(said, memory.as_ref().map_or(0, |memory| memory.len()));
                }
                let layout = FrameLayout::new(pixels, width, height, &list[..count])
                    .map_err(|error| error.to_string())?;
                Ok((layout, Pixels::Blocks(memory.clone())))
            }
            (Store::DmaBuf { buffer, starts }, Some(modifier)) => {
                let said = chunks.list().iter().zip(starts);
                let offset = |offset: u32, start: u32| {
                    let sum = offset.checked_add(start);
                    sum.ok_or("a plane beyond the address space")
                };
                let (layout, planes) = if modifier == LINEAR {
                    let mut list = [Chunk::default(); MAX_PLANES];
                    let mut count = 0;
                    for (slot, (said, &(block, start))) in list.iter_mut().zip(said) {
                        let mapped = buffer.blocks()[block].size();
                        // The size in a chunk means nothing for DMA-BUFs, and may be 0 (L8).
                        *slot = Chunk {
                            offset: offset(said.offset, start)?,
                            size: u32::MAX,
                            ..chunk(said, mapped)
                        };
                        count += 1;
                    }
                    let which = starts.iter().map(|(block, _)| *block);
                    let layout = FrameLayout::new(pixels, width, height, &list[..count])
                        .map_err(|error| error.to_string())?
                        .with_blocks(&which.collect::<Vec<_>>());
                    let planes = layout.planes().iter().map(|plane| {
                        let narrow =
                            |n: usize| u32::try_from(n).map_err(|_| "a plane beyond 4 GiB");
                        Ok(Plane {
                            block: plane.block,
                            offset: narrow(plane.offset)?,
                            stride: narrow(plane.stride)?,
                        })
                    });
                    (layout, planes.collect::<Result<Vec<_>, &str>>()?)
                } else {
                    let layout = FrameLayout::without_planes(pixels, width, height)
                        .map_err(|error| error.to_string())?;
                    let planes = said.map(|(said, &(block, start))| {
                        // Some producers leave it out where a row has no padding (L8).
                        let row = pixels.planes()[0].row_bytes(width).unwrap_or_default();
                        let stride = match said.stride {
                            0 => u32::try_from(row).map_err(|_| "rows beyond 4 GiB")?,
                            stride => u32::try_from(stride).map_err(|_| "a stride below 0")?,
                        };
                        Ok(Plane {
                            block,
                            offset: offset(said.offset, start)?,
                            stride,
                        })
                    });
                    (layout, planes.collect::<Result<Vec<_>, &str>>()?)
                };
                let picture =
                    DmaBufPicture::new(buffer.clone(), modifier, (width, height), &planes)?;
                Ok((layout, Pixels::DmaBuf(picture)))
            }
            (Store::Blocks(_), Some(_)) => Err("it is no DMA-BUF, as was agreed on".into()),
            (Store::DmaBuf { .. }, None) => Err("it is a DMA-BUF, which nobody asked for".into()),
        }
    }
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

    fn list(&self) -> &[spa_sys::spa_chunk] {
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
unsafe fn descriptor(data: &spa_sys::spa_data) -> Result<BorrowedFd<'_>, String> {
    let fd = i32::try_from(data.fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or("it has no file descriptor")?;
    // SAFETY: PipeWire keeps the descriptor open until remove_buffer.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Opens a block for reading.
///
/// # Safety
/// As for [`Buffer::open`].
unsafe fn open(data: &spa_sys::spa_data) -> Result<Memory, String> {
    let text = |error: std::io::Error| error.to_string();
    match data.type_ {
        spa_sys::SPA_DATA_MemFd => {
            // SAFETY: By the contract above.
            let fd = unsafe { descriptor(data) }?;
            Memory::new(fd, data.mapoffset, data.maxsize).map_err(text)
        }
        // Memory that the daemon has allocated for both sides, and sealed; PipeWire has mapped it.
        spa_sys::SPA_DATA_MemPtr => {
            let address = NonNull::new(data.data).ok_or("it has no address")?;
            // SAFETY: PipeWire keeps `maxsize` bytes mapped there until remove_buffer.
            let mapping = unsafe { Mapping::again(address, data.maxsize) }.map_err(text)?;
            Ok(Memory::Mapped(mapping))
        }
        other => Err(format!("memory of type {other} was not asked for")),
    }
}

/// Takes hold of DMA-BUFs.
///
/// # Safety
/// As for [`Buffer::open`].
unsafe fn open_dmabufs(datas: &[&spa_sys::spa_data]) -> Result<Store, String> {
    let fds = datas
        .iter()
        // SAFETY: By the contract above.
        .map(|data| unsafe { descriptor(data) })
        .collect::<Result<Vec<_>, _>>()?;
    let (buffer, which) = DmaBuffer::new(&fds).map_err(|error| error.to_string())?;
    let starts = which.into_iter().zip(datas);
    Ok(Store::DmaBuf {
        buffer: Arc::new(buffer),
        starts: starts
            .map(|(block, data)| (block, data.mapoffset))
            .collect(),
    })
}
