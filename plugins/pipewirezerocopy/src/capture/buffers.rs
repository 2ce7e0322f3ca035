// SPDX-License-Identifier: MIT OR Apache-2.0

//! The buffers that a stream has: opened when they are added, read when they come.

use std::ptr::NonNull;
use std::sync::Arc;

use libspa::sys as spa_sys;

use super::dmabuf::{DmaBufPicture, DmaBuffer, LINEAR, Plane, Remains};
use super::frame::Pixels;
use super::geometry::{Chunk, FrameLayout, MAX_PLANES};
use super::memory::{Mapping, Memory};
use super::negotiate::StreamFormat;
use super::raw::{self, Chunks, descriptor};
use super::timeline::{Point, SPA_DATA_SYNC_OBJ, SyncNode, SyncTimelineMeta, Timeline};

/// A buffer of the stream.
#[derive(Debug)]
pub struct Buffer {
    /// Our number for it, never used twice, also not by the next stream.
    pub id: u64,
    /// A lease of it exists.
    pub out: bool,
    store: Store,
    /// Its timelines: reached when it may be read, and when it may be drawn into.
    timelines: Option<[Arc<Timeline>; 2]>,
    /// The point to reach on the second when we have done with it.
    release: Option<u64>,
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

impl Buffer {
    /// Opens a buffer that was just added. What cannot be opened is told to `complain`, with what
    /// follows from that. What is made of it goes to `remains` in the end.
    ///
    /// # Safety
    /// `datas` must be those of a buffer that PipeWire has just added.
    pub unsafe fn open(
        id: u64,
        datas: &[spa_sys::spa_data],
        sync: Option<&Arc<SyncNode>>,
        remains: &Arc<Remains>,
        mut complain: impl FnMut(String),
    ) -> Self {
        let dmabufs: Vec<_> = datas
            .iter()
            .take_while(|data| data.type_ == spa_sys::SPA_DATA_DmaBuf)
            .take(raw::MAX_BLOCKS)
            .collect();
        let mut memory = [None, None];
        let mut unreadable = |error| complain(format!("its frames are skipped: {error}"));
        let store = if dmabufs.is_empty() {
            for (slot, data) in memory.iter_mut().zip(datas) {
                // SAFETY: By the contract above.
                match unsafe { open(data) } {
                    Ok(memory) => *slot = Some(Arc::new(memory)),
                    Err(error) => unreadable(error),
                }
            }
            Store::Blocks(memory)
        } else {
            // SAFETY: By the contract above.
            match unsafe { open_dmabufs(&dmabufs, remains) } {
                Ok(store) => store,
                Err(error) => {
                    unreadable(error);
                    Store::Blocks(memory)
                }
            }
        };
        // Behind the planes come the timelines.
        // SAFETY: By the contract above.
        let timelines = unsafe { open_timelines(&datas[dmabufs.len()..], sync) };
        Self {
            id,
            out: false,
            store,
            timelines: timelines.unwrap_or_else(|error| {
                complain(format!(
                    "its frames are taken as they come, and the producer may wait for ever to be \
                     told that we have done with them: {error}"
                ));
                None
            }),
            release: None,
        }
    }

    /// Notes what the producer says about a buffer that has just come. Returns when it may be read.
    pub fn comes(&mut self, points: Option<SyncTimelineMeta>) -> Option<Point> {
        let (points, [acquire, _]) = points.zip(self.timelines.as_ref())?;
        self.release = Some(points.release_point);
        Some(Point {
            timeline: acquire.clone(),
            value: points.acquire_point,
        })
    }

    /// Says that the producer may draw into it, before it is given back. Read or not: every point
    /// that was announced is waited for (lesson L14).
    pub fn goes(&mut self) -> std::io::Result<()> {
        self.out = false;
        match (&self.timelines, self.release.take()) {
            (Some([_, release]), Some(point)) => release.signal(point),
            _ => Ok(()),
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
                let synced = match self.timelines {
                    Some(_) => ", with timelines",
                    None => "",
                };
                format!("DMA-BUF of {sizes} bytes, {} planes{synced}", starts.len())
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
                let count = chunks.list().len().min(MAX_PLANES);
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

/// Takes hold of the timelines among blocks, of which there are two or none.
///
/// # Safety
/// As for [`Buffer::open`].
unsafe fn open_timelines(
    datas: &[spa_sys::spa_data],
    sync: Option<&Arc<SyncNode>>,
) -> Result<Option<[Arc<Timeline>; 2]>, String> {
    let objects = datas.iter().filter(|data| data.type_ == SPA_DATA_SYNC_OBJ);
    let objects: Vec<_> = objects.collect();
    let (Some(node), [acquire, release]) = (sync, objects.as_slice()) else {
        return Ok(None);
    };
    let import = |data: &spa_sys::spa_data| {
        // SAFETY: By the contract above.
        let fd = unsafe { descriptor(data) }?;
        let timeline = Timeline::import(node, fd);
        timeline
            .map(Arc::new)
            .map_err(|error| format!("importing its timelines failed: {error}"))
    };
    Ok(Some([import(acquire)?, import(release)?]))
}

/// Takes hold of DMA-BUFs.
///
/// # Safety
/// As for [`Buffer::open`].
unsafe fn open_dmabufs(
    datas: &[&spa_sys::spa_data],
    remains: &Arc<Remains>,
) -> Result<Store, String> {
    let fds = datas
        .iter()
        // SAFETY: By the contract above.
        .map(|data| unsafe { descriptor(data) })
        .collect::<Result<Vec<_>, _>>()?;
    let (buffer, which) = DmaBuffer::new(&fds, remains).map_err(|error| error.to_string())?;
    let starts = which.into_iter().zip(datas);
    Ok(Store::DmaBuf {
        buffer: Arc::new(buffer),
        starts: starts
            .map(|(block, data)| (block, data.mapoffset))
            .collect(),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::capture::dmabuf::tests::memory;
    use crate::capture::dmabuf::{Block, IMPLICIT};
    use crate::capture::format::PixelFormat;
    use crate::capture::offer::tests::format;
    use crate::capture::timeline::tests::no_timeline;
    use std::fs::File;
    use std::os::fd::{AsFd, AsRawFd};

    fn data(type_: u32, fd: &File, mapoffset: u32) -> spa_sys::spa_data {
        spa_sys::spa_data {
            type_,
            flags: 0,
            fd: fd.as_raw_fd().into(),
            mapoffset,
            // Means nothing for DMA-BUFs.
            maxsize: 0,
            data: std::ptr::null_mut(),
            chunk: std::ptr::null_mut(),
        }
    }

    fn dmabuf(fd: &File) -> spa_sys::spa_data {
        data(spa_sys::SPA_DATA_DmaBuf, fd, 0)
    }

    fn open(datas: &[spa_sys::spa_data]) -> Buffer {
        // SAFETY: The descriptors are open.
        unsafe { Buffer::open(1, datas, None, &Arc::default(), |error| panic!("{error}")) }
    }

    fn chunks(list: &[(u32, i32, i32)]) -> Chunks {
        let mut chunks: Vec<_> = list
            .iter()
            .map(|&(offset, stride, flags)| spa_sys::spa_chunk {
                offset,
                size: 0,
                stride,
                flags,
            })
            .collect();
        let datas: Vec<_> = chunks
            .iter_mut()
            .map(|chunk| {
                let file = File::open("/dev/null").unwrap();
                let mut data = dmabuf(&file);
                data.chunk = chunk;
                data
            })
            .collect();
        // SAFETY: The chunks are there.
        unsafe { Chunks::read(&datas) }.unwrap()
    }

    /// 2x2 pixels.
    fn small(pixels: PixelFormat, modifier: u64) -> StreamFormat {
        StreamFormat {
            format: pixels,
            width: 2,
            height: 2,
            ..format(Some(modifier))
        }
    }

    /// One without pixels.
    pub fn without_timelines(id: u64) -> Buffer {
        Buffer {
            id,
            out: false,
            store: Store::Blocks([None, None]),
            timelines: None,
            release: None,
        }
    }

    /// The same with timelines that are none.
    pub fn with_timelines(id: u64) -> Buffer {
        Buffer {
            timelines: Some([no_timeline(), no_timeline()]),
            ..without_timelines(id)
        }
    }

    const BGRX: PixelFormat = PixelFormat::Bgrx;
    const NV12: PixelFormat = PixelFormat::Nv12;

    fn picture(pixels: Pixels) -> DmaBufPicture {
        match pixels {
            Pixels::DmaBuf(picture) => picture,
            Pixels::Blocks(_) => panic!("it is a DMA-BUF"),
        }
    }

    #[test]
    fn linear_memory_may_be_larger_than_the_frame() {
        let file = memory(&[0; 1000]);
        let buffer = open(&[dmabuf(&file)]);
        let (layout, pixels) = buffer
            .frame(&small(BGRX, LINEAR), &chunks(&[(100, 64, 0)]))
            .unwrap();
        let plane = layout.planes()[0];
        assert_eq!((plane.offset, plane.stride, plane.rows), (100, 64, 2));
        let expected = Plane {
            block: 0,
            offset: 100,
            stride: 64,
        };
        assert_eq!(picture(pixels).planes(), [expected]);
    }

    #[test]
    fn linear_planes_are_found_in_one_memory_and_in_two() {
        let (luma, chroma) = (memory(&[0; 64]), memory(&[0; 32]));
        let nv12 = small(NV12, LINEAR);
        let places = |datas: &[spa_sys::spa_data], said: &[(u32, i32, i32)]| {
            let (layout, pixels) = open(datas).frame(&nv12, &chunks(said)).unwrap();
            let picture = picture(pixels);
            for (plane, row) in picture.planes().iter().zip(layout.planes()) {
                assert_eq!(
                    (plane.block, plane.offset as usize),
                    (row.block, row.offset)
                );
            }
            let planes = picture.planes().iter();
            planes.map(|p| (p.block, p.offset)).collect::<Vec<_>>()
        };
        let (one, two) = (dmabuf(&luma), dmabuf(&chroma));
        assert_eq!(places(&[one], &[(0, 8, 0)]), [(0, 0), (0, 16)]);
        assert_eq!(
            places(&[one, one], &[(0, 8, 0), (32, 8, 0)]),
            [(0, 0), (0, 32)]
        );
        assert_eq!(
            places(&[one, two], &[(0, 8, 0), (4, 8, 0)]),
            [(0, 0), (1, 4)]
        );
        let late = data(spa_sys::SPA_DATA_DmaBuf, &luma, 16);
        assert_eq!(
            places(&[one, late], &[(0, 8, 0), (4, 8, 0)]),
            [(0, 0), (0, 20)]
        );
    }

    #[test]
    fn linear_lies_are_found_out_and_others_are_the_drivers_business() {
        let file = memory(&[0; 80]);
        let buffer = open(&[dmabuf(&file)]);
        let lies = [(0, 76, 0), (80 - 15, 0, 0), (0, 4, 0), (0, -8, 0)];
        for lie in lies {
            let frame = buffer.frame(&small(BGRX, LINEAR), &chunks(&[lie]));
            assert!(frame.is_err(), "{lie:?}");
        }
        for modifier in [7, IMPLICIT] {
            let format = small(BGRX, modifier);
            let (layout, pixels) = buffer.frame(&format, &chunks(&[(79, 76, 0)])).unwrap();
            assert!(layout.planes().is_empty(), "rows are not where they seem");
            assert_eq!(picture(pixels).modifier, modifier);
            for lie in [(80, 8, 0), (u32::MAX, 8, 0), (0, -8, 0)] {
                assert!(buffer.frame(&format, &chunks(&[lie])).is_err(), "{lie:?}");
            }
        }
    }

    #[test]
    fn a_stride_that_is_not_said_is_that_of_rows_without_padding() {
        let file = memory(&[0; 80]);
        let buffer = open(&[dmabuf(&file)]);
        for modifier in [LINEAR, 7] {
            let frame = buffer.frame(&small(BGRX, modifier), &chunks(&[(0, 0, 0)]));
            assert_eq!(picture(frame.unwrap().1).planes()[0].stride, 8);
        }
    }

    #[test]
    fn compression_has_more_planes_than_the_format() {
        let file = memory(&[0; 80]);
        let buffer = open(&[dmabuf(&file), dmabuf(&file)]);
        let said = chunks(&[(0, 8, 0), (64, 4, 0)]);
        let (_, pixels) = buffer.frame(&small(BGRX, 7), &said).unwrap();
        assert_eq!(picture(pixels).planes().len(), 2);
    }

    #[test]
    fn memory_is_of_the_kind_that_was_agreed_on() {
        let file = memory(&[0; 80]);
        let said = chunks(&[(0, 8, 0)]);
        let system = StreamFormat {
            modifier: None,
            ..small(BGRX, 0)
        };
        assert!(open(&[dmabuf(&file)]).frame(&system, &said).is_err());
        let mut shared = data(spa_sys::SPA_DATA_MemFd, &file, 0);
        shared.maxsize = 80;
        assert!(open(&[shared]).frame(&small(BGRX, LINEAR), &said).is_err());
    }

    #[test]
    fn sizes_of_dmabufs_mean_nothing_unless_the_content_is_corrupted_too() {
        let corrupted = spa_sys::SPA_CHUNK_FLAG_CORRUPTED as i32;
        for (modifier, flags, empty) in [
            (None, 0, true),
            (Some(LINEAR), 0, false),
            (Some(LINEAR), corrupted, true),
        ] {
            let chunks = chunks(&[(0, 8, flags)]);
            assert_eq!(chunks.are_empty(&format(modifier)), empty);
        }
    }

    #[test]
    fn a_producer_that_calls_other_memory_a_dmabuf_harms_nobody() {
        let file = memory(&[7; 80]);
        let (buffer, _) = DmaBuffer::new(&[file.as_fd()], &Arc::default()).unwrap();
        let _access = buffer.begin_cpu_access();
        let block: &Block = &buffer.blocks()[0];
        let mut out = [0; 80];
        assert!(block.memory().unwrap().copy_out(0, &mut out));
        assert_eq!(out, [7; 80]);
        file.set_len(0).unwrap();
        // Reading a mapping would end this process with SIGBUS.
        assert!(!block.memory().unwrap().copy_out(0, &mut out));
    }
}
