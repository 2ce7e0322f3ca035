// SPDX-License-Identifier: MIT OR Apache-2.0

//! A captured frame: where its pixels are, and the loan of the PipeWire buffer they lie in.
//!
//! The producer cannot draw into a buffer that we hold, and it has few of them (lesson L4). So a
//! [`Frame`] has a [`Lease`]: dropping it, anywhere, on any thread, sends the buffer back through
//! the loop thread: at once where the producer may need it or waits to be told, else with the next
//! frame, for which that thread wakes anyhow. It is copied, or it is passed on as it lies, but only as long as its
//! [`Pool`] has buffers to spare. Other consumers of the node have the same buffers, and the producer
//! draws only into those that nobody has: PipeWire counts that in each buffer's metadata.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::damage::Damage;
use super::dmabuf::{self, CpuAccess, DmaBufPicture, Fence};
use super::geometry::{FrameLayout, MAX_PLANES};
use super::memory::Memory;
use super::meta::Transform;
use super::negotiate::StreamFormat;
use super::timeline::Point;
use super::worker::Command;
use super::{Counters, Monotonic};

/// Buffers of a pool that are never passed on: two for the producer to draw into, one that waits
/// in the inbox, and one that is being copied.
const KEPT_BACK: usize = 4;
/// The same where nothing is copied: those who take DMA-BUFs take nothing else.
const KEPT_BACK_OF_DMABUFS: usize = 3;
/// Those that may be out of a small pool all the same. Sinks keep their last buffer until the next one
/// comes: none would come if one alone may be out.
const LEAST_OF_DMABUFS: usize = 2;

/// Buffers that nobody has taken and that are marked as in use all the same: the one that the producer
/// draws into.
const DRAWN: usize = 1;

/// Buffers that the producer has at least while others wait to be given back; it also has half of
/// all.
const ENOUGH: usize = 2;

/// One generation of a stream's buffers: those that came after one format. A lease from an older
/// generation counts for that one only.
#[derive(Debug, Default)]
pub struct Pool {
    buffers: AtomicUsize,
    /// The most that there were.
    most: AtomicUsize,
    passed: AtomicUsize,
    /// Those that the producer has not.
    out: AtomicUsize,
    /// Those that the producer has not because other consumers of its node have them.
    elsewhere: AtomicUsize,
}

impl Pool {
    /// A buffer has come. How many there are now.
    pub(super) fn add(&self) -> usize {
        let buffers = self.buffers.fetch_add(1, Ordering::Relaxed) + 1;
        self.most.fetch_max(buffers, Ordering::Relaxed);
        buffers
    }

    /// Whether it has never had more than one buffer: with that one out, nothing can be drawn.
    fn is_single(&self) -> bool {
        self.most.load(Ordering::Relaxed) < 2
    }

    /// A buffer was taken away.
    pub(super) fn remove(&self) {
        self.buffers.fetch_sub(1, Ordering::Relaxed);
    }

    /// A buffer that was out is with the producer again, or gone.
    pub(super) fn end_loan(&self) {
        self.out.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes how many buffers somebody has, when one has come that is not out yet. All that are out are
    /// among them. A producer that takes every buffer that it can draw into looks like another consumer.
    pub(super) fn see_in_use(&self, buffers: usize) {
        let ours = self.out.load(Ordering::Relaxed) + 1;
        let others = buffers.saturating_sub(ours + DRAWN);
        self.elsewhere.store(others, Ordering::Relaxed);
    }

    /// How many buffers no other consumer has.
    fn ours(&self) -> usize {
        let buffers = self.buffers.load(Ordering::Relaxed);
        buffers.saturating_sub(self.elsewhere.load(Ordering::Relaxed))
    }

    /// Whether the producer should not wait for the next frame to get a buffer back.
    fn is_short(&self) -> bool {
        let buffers = self.buffers.load(Ordering::Relaxed);
        let left = self.ours().saturating_sub(self.out.load(Ordering::Relaxed));
        left < ENOUGH.max(buffers / 2)
    }

    /// How many buffers may be out for as long as downstream likes. A DMA-BUF of a producer that has
    /// taken its buffers away is kept from nobody.
    fn limit(&self, dmabufs: bool) -> usize {
        let buffers = self.buffers.load(Ordering::Relaxed);
        if dmabufs && buffers == 0 {
            usize::MAX
        } else if dmabufs {
            let spared = self.ours().saturating_sub(KEPT_BACK_OF_DMABUFS);
            spared.max(LEAST_OF_DMABUFS).min(buffers)
        } else {
            self.ours().saturating_sub(KEPT_BACK)
        }
    }

    /// Whether one more may be out.
    fn has_one(&self, dmabufs: bool) -> bool {
        self.passed.load(Ordering::Relaxed) < self.limit(dmabufs)
    }

    /// Notes that one more is out, if that can be.
    fn pass_one(&self, dmabufs: bool) -> bool {
        let limit = self.limit(dmabufs);
        self.passed
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |passed| {
                (passed < limit).then_some(passed + 1)
            })
            .is_ok()
    }
}

/// Buffers on their way back to the producer.
pub(super) struct Returns {
    buffers: Mutex<VecDeque<u64>>,
    commands: pipewire::channel::Sender<Command>,
}

impl Returns {
    pub fn new(commands: pipewire::channel::Sender<Command>) -> Self {
        Self {
            buffers: Mutex::default(),
            commands,
        }
    }

    /// Gives a buffer to the loop thread.
    fn give(&self, buffer: u64, soon: bool) {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.push_back(buffer);
        drop(buffers);
        if soon {
            // Fails only when the loop thread is gone, and its buffers with it.
            let _ = self.commands.send(Command::TakeBack);
        }
    }

    /// One that has come back.
    pub fn next(&self) -> Option<u64> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.pop_front()
    }
}

/// The loan of one PipeWire buffer; gives it back when dropped.
///
/// It may outlive the buffer, its stream and the loop thread: the loop thread knows buffers by
/// numbers that are never used twice, and ignores one that is gone.
pub struct Lease {
    buffer: u64,
    pool: Arc<Pool>,
    /// It counts among the pool's passed buffers.
    passed: bool,
    /// The producer waits to be told that it may draw, also while nothing moves on the screen.
    awaited: bool,
    returns: Arc<Returns>,
    counters: Arc<Counters>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.buffer).finish()
    }
}

impl Lease {
    /// Notes that the buffer which the loop thread knows as `buffer` is out. It is `awaited` where
    /// the producer has named a point that it waits for (L14).
    pub(super) fn new(
        buffer: u64,
        awaited: bool,
        pool: Arc<Pool>,
        returns: Arc<Returns>,
        counters: Arc<Counters>,
    ) -> Self {
        pool.out.fetch_add(1, Ordering::Relaxed);
        counters.held.fetch_add(1, Ordering::Relaxed);
        Self {
            buffer,
            pool,
            passed: false,
            awaited,
            returns,
            counters,
        }
    }

    /// Whether the buffer should not go back only with the next frame.
    fn is_due(&self) -> bool {
        // At the limit somebody may wait for just this one.
        let limit = self.pool.limit(false).max(1);
        let at_limit = || self.passed && self.pool.passed.load(Ordering::Relaxed) >= limit;
        self.awaited || self.pool.is_short() || at_limit()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let soon = self.is_due();
        if self.passed {
            self.pool.passed.fetch_sub(1, Ordering::Relaxed);
        }
        self.counters.held.fetch_sub(1, Ordering::Relaxed);
        self.returns.give(self.buffer, soon);
    }
}

/// A frame that the producer drew. It lies in a box from the beginning: it has some hundred bytes, and
/// would be moved half a dozen times, into memory that is cold.
#[derive(Debug)]
pub struct Frame {
    /// Where its pixels are, checked against the memory.
    pub layout: FrameLayout,
    /// What the producer fixed for it, with the size that is left after cropping.
    pub format: StreamFormat,
    /// When the producer says that it was captured, or else when it came.
    pub captured: Monotonic,
    /// What of it differs from the frame before.
    pub damage: Damage,
    /// How the picture was turned.
    pub transform: Transform,
    pub(super) pixels: Pixels,
    /// When it may be looked at, where the producer says.
    pub(super) acquire: Option<Point>,
    pub(super) lease: Lease,
}

/// How the producer's writing and our reading are kept apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sync {
    /// The producer has finished when a frame comes.
    #[default]
    None,
    /// The kernel knows who writes to a DMA-BUF.
    Implicit,
    /// By timelines.
    Explicit,
}

/// Where a frame's pixels are.
#[derive(Debug)]
pub(super) enum Pixels {
    /// In memory for the CPU; none for a block that cannot be read.
    Blocks([Option<Arc<Memory>>; MAX_PLANES]),
    /// In memory of a device.
    DmaBuf(DmaBufPicture),
}

/// Pixels of a frame in the producer's own memory. They stay readable, whatever becomes of the
/// stream; they stay the same until the last of the frame's parts is dropped.
#[derive(Debug)]
pub struct Part {
    memory: Arc<Memory>,
    start: usize,
    len: usize,
    _holder: Holder,
}

/// What keeps the buffer of a part from the producer.
#[derive(Debug)]
#[expect(dead_code, reason = "kept to be dropped")]
enum Holder {
    /// The frame that it is all of.
    Frame(Box<Frame>),
    /// The lease of a frame in several parts.
    Lease(Arc<Lease>),
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        // `Frame::pass` has seen it; memory does not change its ways.
        self.memory.shared(self.start, self.len).unwrap_or_default()
    }
}

impl Frame {
    /// Whether all of it can be read in place, in whole rows.
    pub fn is_mapped(&self) -> bool {
        let Pixels::Blocks(memory) = &self.pixels else {
            return false;
        };
        let shared = |block: usize, start, len| memory.get(block)?.as_ref()?.shared(start, len);
        self.layout
            .extents()
            .all(|extent| shared(extent.block, extent.start, extent.len).is_some())
    }

    /// The DMA-BUFs that it is in, if it is.
    pub fn dmabuf(&self) -> Option<&DmaBufPicture> {
        match &self.pixels {
            Pixels::Blocks(_) => None,
            Pixels::DmaBuf(picture) => Some(picture),
        }
    }

    /// What must have happened before the frame may be looked at or passed on, and how that is known.
    /// `for_gpu`: as something that a GPU can wait for, where that can be had.
    pub fn fence(&self, for_gpu: bool) -> io::Result<(Sync, Fence)> {
        match (&self.acquire, self.dmabuf()) {
            (Some(point), _) => {
                if for_gpu && let Ok(file) = point.timeline.promised(point.value) {
                    return Ok((Sync::Explicit, Fence::of_file(file)));
                }
                let reached = point.timeline.reached(point.value)?;
                Ok((Sync::Explicit, Fence::new(reached)))
            }
            (None, Some(picture)) => Ok((Sync::Implicit, picture.buffer.writers())),
            (None, None) => Ok((Sync::None, Fence::default())),
        }
    }

    /// Whether the producer says when it may be looked at.
    pub fn has_acquire_point(&self) -> bool {
        self.acquire.is_some()
    }

    /// Whether its buffer is the only one that the producer has.
    pub fn is_in_single_buffer(&self) -> bool {
        self.lease.pool.is_single()
    }

    /// Reserves the frame's buffer for [`into_parts`](Self::into_parts) or [`into_lease`](Self::into_lease).
    /// False where the producer needs it back soon.
    pub fn reserve(&mut self) -> bool {
        let dmabufs = self.dmabuf().is_some();
        self.lease.passed = self.lease.passed || self.lease.pool.pass_one(dmabufs);
        self.lease.passed
    }

    /// Whether [`reserve`](Self::reserve) would succeed now.
    pub(super) fn can_be_reserved(&self) -> bool {
        let dmabufs = self.dmabuf().is_some();
        self.lease.passed || self.lease.pool.has_one(dmabufs)
    }

    /// What keeps the buffer from the producer, for whoever has its DMA-BUFs already.
    pub fn into_lease(self: Box<Self>) -> Lease {
        self.lease
    }

    /// Gives the frame's memory as it lies, a part for each of the layout's extents.
    pub fn into_parts(mut self: Box<Self>, mut give: impl FnMut(Part)) {
        let Pixels::Blocks(memory) = &mut self.pixels else {
            return;
        };
        let mut extents = self.layout.extents();
        let first_two = (extents.next(), extents.next());
        drop(extents);
        if let (Some(all), None) = first_two {
            // As with most frames. It is its own lease: one allocation less, of a frame's few.
            if let Some(memory) = memory[all.block].take() {
                give(Part {
                    memory,
                    start: all.start,
                    len: all.len,
                    _holder: Holder::Frame(self),
                });
            }
            return;
        }
        let Pixels::Blocks(mut memory) = self.pixels else {
            return;
        };
        let lease = Arc::new(self.lease);
        for extent in self.layout.extents() {
            // Each extent has a block of its own.
            if let Some(memory) = memory[extent.block].take() {
                give(Part {
                    memory,
                    start: extent.start,
                    len: extent.len,
                    _holder: Holder::Lease(lease.clone()),
                });
            }
        }
    }

    /// Must be held while planes of a DMA-BUF are copied.
    pub fn begin_cpu_access(&self) -> Option<CpuAccess<'_>> {
        Some(self.dmabuf()?.buffer.begin_cpu_access())
    }

    /// Copies plane `index` into rows of `stride` bytes; false where the rows do not fit `out`.
    ///
    /// Each row is copied once. Where `opaque_at` names a byte of each pixel of 4, that byte is
    /// set to 255: padding becomes alpha when frames with padding go out as frames with alpha.
    #[must_use]
    pub fn copy_plane(
        &self,
        index: usize,
        out: &mut [u8],
        stride: usize,
        opaque_at: Option<usize>,
    ) -> bool {
        let Some(plane) = self.layout.planes().get(index) else {
            return false;
        };
        let memory = match &self.pixels {
            Pixels::Blocks(memory) => memory.get(plane.block).and_then(Option::as_deref),
            Pixels::DmaBuf(picture) => {
                let block = picture.buffer.blocks().get(plane.block);
                block.and_then(dmabuf::Block::memory)
            }
        };
        let Some(memory) = memory else {
            return false;
        };
        let length = (plane.rows - 1)
            .checked_mul(stride)
            .and_then(|above| above.checked_add(plane.row_bytes));
        if stride < plane.row_bytes || length.is_none_or(|length| length > out.len()) {
            return false;
        }
        if stride == plane.row_bytes && plane.stride == stride && opaque_at.is_none() {
            return memory.copy_out(plane.offset, &mut out[..stride * plane.rows]);
        }
        out.chunks_mut(stride)
            .take(plane.rows)
            .enumerate()
            .all(|(row, out)| {
                let out = &mut out[..plane.row_bytes];
                let copied = memory.copy_out(plane.offset + row * plane.stride, out);
                if let Some(byte) = opaque_at {
                    for pixel in out.as_chunks_mut::<4>().0 {
                        pixel[byte] = u8::MAX;
                    }
                }
                copied
            })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::capture::format::PixelFormat;
    use crate::capture::geometry::{Chunk, Region};
    use crate::capture::negotiate::Color;
    use std::fs::File;
    use std::os::fd::{AsFd, AsRawFd, FromRawFd};
    use std::os::unix::fs::FileExt;

    /// A frame of BGRx with these bytes in sealed memory, in a pool of `buffers`.
    pub fn frame_of(
        bytes: &[u8],
        (width, height): (u32, u32),
        stride: i32,
        buffers: usize,
        counters: &Arc<Counters>,
    ) -> Box<Frame> {
        // SAFETY: The name is a C string; the result is checked and owned by the File.
        let file = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            let fd = libc::memfd_create(c"frame-test".as_ptr(), flags);
            assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        file.write_all_at(bytes, 0).unwrap();
        // SAFETY: Plain fcntl on a descriptor that this test owns.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        let memory = Memory::new(file.as_fd(), 0, bytes.len() as u32).unwrap();
        let chunk = Chunk {
            mapped: memory.len(),
            offset: 0,
            size: bytes.len() as u32,
            stride,
        };
        let pool = Arc::new(Pool::default());
        for _ in 0..buffers {
            pool.add();
        }
        let (sender, _receiver) = pipewire::channel::channel();
        Box::new(Frame {
            layout: FrameLayout::new(PixelFormat::Bgrx, width, height, &[chunk]).unwrap(),
            format: StreamFormat {
                format: PixelFormat::Bgrx,
                width,
                height,
                framerate: (0, 1),
                max_framerate: None,
                color: Color::default(),
                modifier: None,
            },
            captured: Monotonic::now(),
            damage: Damage::Everything,
            transform: Transform::default(),
            pixels: Pixels::Blocks([Some(Arc::new(memory)), None]),
            acquire: None,
            lease: Lease::new(
                1,
                false,
                pool,
                Arc::new(Returns::new(sender)),
                counters.clone(),
            ),
        })
    }

    /// Frames in DMA-BUFs of one pool of `buffers`.
    #[expect(clippy::vec_box, reason = "as they are handed on")]
    pub fn frames_in_dmabufs(
        count: usize,
        buffers: usize,
        counters: &Arc<Counters>,
    ) -> Vec<Box<Frame>> {
        let pool = Arc::new(Pool::default());
        for _ in 0..buffers {
            pool.add();
        }
        let frames = (0..count).map(|_| {
            let mut frame = frame_of(&[0; 64], (2, 2), 8, 0, counters);
            let file = dmabuf::tests::memory(&[0; 64]);
            let (buffer, _) = dmabuf::DmaBuffer::new(&[file.as_fd()], &Arc::default()).unwrap();
            let plane = dmabuf::Plane::default();
            let picture = DmaBufPicture::new(buffer.into(), dmabuf::LINEAR, (2, 2), &[plane]);
            frame.pixels = Pixels::DmaBuf(picture.unwrap());
            frame.lease.pool = pool.clone();
            frame
        });
        frames.collect()
    }

    /// Frames of 2x2 pixels in sealed memory, of one pool of `buffers`.
    #[expect(clippy::vec_box, reason = "as they are handed on")]
    pub fn frames_in_memory(
        count: usize,
        buffers: usize,
        counters: &Arc<Counters>,
    ) -> Vec<Box<Frame>> {
        let mut frames = frames_in_dmabufs(count, buffers, counters);
        for frame in &mut frames {
            frame.pixels = frame_of(&[0; 64], (2, 2), 8, 0, counters).pixels;
        }
        frames
    }

    /// A frame of NV12, 8x2 pixels, with a memory for each plane.
    pub fn frame_in_two_memories(counters: &Arc<Counters>) -> Box<Frame> {
        let [mut frame, other] = [0, 1].map(|_| frame_of(&[0; 64], (8, 2), 32, 8, counters));
        let memories = [&frame, &other].map(|frame| match &frame.pixels {
            Pixels::Blocks([memory, _]) => memory.clone(),
            Pixels::DmaBuf(_) => None,
        });
        frame.pixels = Pixels::Blocks(memories);
        let chunks = [16, 8].map(|size| Chunk {
            mapped: 64,
            offset: 0,
            size,
            stride: 8,
        });
        frame.layout = FrameLayout::new(PixelFormat::Nv12, 8, 2, &chunks).unwrap();
        frame
    }

    /// The same frame, which is not drawn before something is written to what is returned with it.
    pub fn undrawn(mut frame: Box<Frame>) -> (Box<Frame>, io::PipeWriter) {
        let (reader, writer) = io::pipe().unwrap();
        let buffer = dmabuf::tests::drawn_when(reader).into();
        let plane = dmabuf::Plane::default();
        let picture = DmaBufPicture::new(buffer, dmabuf::LINEAR, (2, 2), &[plane]);
        frame.pixels = Pixels::DmaBuf(picture.unwrap());
        (frame, writer)
    }

    /// The lower row of the same frame, of whose layout only the driver knows.
    pub fn tiled_and_cropped(mut frame: Box<Frame>) -> Box<Frame> {
        let layout = FrameLayout::without_planes(PixelFormat::Bgrx, 2, 2).unwrap();
        frame.layout = layout.crop(Region {
            x: 0,
            y: 1,
            width: 2,
            height: 1,
        });
        frame
    }

    fn frame(bytes: &[u8], width: u32, height: u32, stride: i32) -> (Box<Frame>, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        let frame = frame_of(bytes, (width, height), stride, 8, &counters);
        (frame, counters)
    }

    #[test]
    fn rows_are_copied_with_both_strides_honoured() {
        let (frame, _) = frame(&(0..24).collect::<Vec<u8>>(), 2, 2, 12);
        let mut out = [0xee; 20];
        assert!(frame.copy_plane(0, &mut out, 10, None));
        assert_eq!(out[..8], (0..8).collect::<Vec<u8>>());
        assert_eq!(out[10..18], (12..20).collect::<Vec<u8>>());
        assert_eq!(
            (out[8], out[18]),
            (0xee, 0xee),
            "padding is not ours to write"
        );
        assert!(!frame.copy_plane(0, &mut out, 7, None), "rows overlap");
        assert!(
            !frame.copy_plane(0, &mut out[..17], 10, None),
            "last row cut off"
        );
        assert!(!frame.copy_plane(1, &mut out, 10, None), "no such plane");
    }

    #[test]
    fn padding_becomes_opaque_alpha_when_asked() {
        let (frame, _) = frame(&[1; 16], 2, 2, 8);
        let mut out = [0; 16];
        assert!(frame.copy_plane(0, &mut out, 8, Some(3)));
        assert_eq!(
            out,
            [1, 1, 1, 255, 1, 1, 1, 255, 1, 1, 1, 255, 1, 1, 1, 255]
        );
    }

    #[test]
    fn a_crop_is_what_is_copied() {
        let (mut frame, _) = frame(&(0..36).collect::<Vec<u8>>(), 3, 3, 12);
        frame.layout = frame.layout.crop(Region {
            x: 1,
            y: 1,
            width: 1,
            height: 2,
        });
        let mut out = [0; 8];
        assert!(frame.copy_plane(0, &mut out, 4, None));
        assert_eq!(out, [16, 17, 18, 19, 28, 29, 30, 31]);
    }

    #[test]
    fn a_dropped_frame_gives_its_buffer_back() {
        let (frame, counters) = frame(&[0; 16], 2, 2, 8);
        assert_eq!(counters.held.load(Ordering::Relaxed), 1);
        drop(frame);
        assert_eq!(counters.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_buffer_whose_producer_waits_to_be_told_goes_back_before_the_next_frame() {
        let (mut frame, _) = frame(&[0; 16], 2, 2, 8);
        assert!(!frame.lease.is_due(), "the producer has seven more");
        frame.lease.awaited = true;
        assert!(frame.lease.is_due());
    }

    #[test]
    fn a_frame_in_place_keeps_its_buffer_until_its_last_part_is_gone() {
        let (mut frame, counters) = frame(&[7; 24], 2, 2, 12);
        assert!(frame.is_mapped() && frame.reserve());
        let pool = frame.lease.pool.clone();
        let mut parts = Vec::new();
        frame.into_parts(|part| parts.push(part));
        assert_eq!(parts.len(), 1);
        assert_eq!(parts[0].as_ref(), [7; 24], "whole rows");
        assert_eq!(counters.held.load(Ordering::Relaxed), 1);
        drop(parts);
        assert_eq!(counters.held.load(Ordering::Relaxed), 0);
        assert_eq!(pool.passed.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_frame_in_dmabufs_is_read_by_rows_and_never_in_place() {
        let counters = Arc::new(Counters::default());
        let frame = frames_in_dmabufs(1, 8, &counters).remove(0);
        assert!(!frame.is_mapped());
        let access = frame.begin_cpu_access().unwrap();
        assert!(frame.copy_plane(0, &mut [1; 16], 8, None));
        drop(access);
        frame.into_parts(|_| panic!("it is in DMA-BUFs"));
        assert_eq!(counters.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn buffers_are_passed_on_only_as_long_as_the_producer_has_enough() {
        for (buffers, most) in [(0, 0), (2, 0), (4, 0), (5, 1), (6, 2), (8, 4), (16, 12)] {
            let pool = Pool::default();
            for _ in 0..buffers {
                pool.add();
            }
            assert_eq!((0..32).filter(|_| pool.pass_one(false)).count(), most);
        }
    }

    #[test]
    fn what_other_consumers_of_the_node_have_cannot_be_passed_on() {
        // One is the buffer that has come, and one what the producer draws into.
        for (in_use, most) in [(1, 4), (2, 4), (3, 3), (6, 0), (8, 0)] {
            let pool = Pool::default();
            for _ in 0..8 {
                pool.add();
            }
            pool.see_in_use(in_use);
            assert_eq!((0..32).filter(|_| pool.pass_one(false)).count(), most);
        }
        let pool = Pool::default();
        for _ in 0..8 {
            pool.add();
        }
        pool.out.store(2, Ordering::Relaxed);
        assert!(!pool.is_short(), "six are left");
        pool.see_in_use(2 + 1 + 4);
        assert!(pool.is_short(), "three");
        pool.see_in_use(2 + 1);
        assert!(!pool.is_short(), "the others have none any more");
        pool.see_in_use(8);
        let dmabufs = (0..32).filter(|_| pool.pass_one(true)).count();
        assert_eq!(dmabufs, LEAST_OF_DMABUFS, "a sink keeps one");
    }

    #[test]
    fn of_dmabufs_a_new_one_can_always_displace_the_one_that_a_sink_keeps() {
        for (buffers, most) in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 3), (8, 5)] {
            let pool = Pool::default();
            for _ in 0..buffers {
                pool.add();
            }
            assert_eq!((0..32).filter(|_| pool.pass_one(true)).count(), most);
            assert!(!pool.has_one(true));
        }
    }

    #[test]
    fn a_pool_that_is_taken_away_buffer_by_buffer_was_more_than_one() {
        let pool = Pool::default();
        pool.add();
        assert!(pool.is_single());
        pool.add();
        pool.remove();
        assert!(!pool.is_single());
    }

    #[test]
    fn dmabufs_of_a_producer_that_has_none_left_are_all_passed_on() {
        let pool = Pool::default();
        pool.add();
        assert!(pool.pass_one(true) && !pool.pass_one(true));
        pool.remove();
        assert!(pool.pass_one(true), "it is kept from nobody");
    }

    #[test]
    fn a_producer_waits_for_the_next_frame_only_while_it_has_buffers_enough() {
        for (buffers, out, short) in [
            (8, 4, false),
            (8, 5, true),
            (3, 1, false),
            (3, 2, true),
            (2, 1, true),
            (16, 8, false),
        ] {
            let pool = Pool::default();
            for _ in 0..buffers {
                pool.add();
            }
            pool.out.store(out, Ordering::Relaxed);
            assert_eq!(pool.is_short(), short, "{out} of {buffers} out");
        }
    }
}
