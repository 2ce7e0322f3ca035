// SPDX-License-Identifier: MIT OR Apache-2.0

//! A captured frame: where its pixels are, and the loan of the PipeWire buffer they lie in.
//!
//! The producer cannot draw into a buffer that we hold, and it has few of them (lesson L4). So a
//! [`Frame`] is a [`Lease`]: dropping it, anywhere, on any thread, sends the buffer back through
//! the loop thread at once. The memory itself is mapped by us once for each buffer and counted,
//! so that a frame stays readable even when PipeWire has removed its buffer meanwhile.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::geometry::{FrameLayout, MAX_PLANES};
use super::negotiate::StreamFormat;
use super::worker::Command;
use super::{Counters, Monotonic};

/// A producer's memory, mapped for reading by us and for as long as we need it.
///
/// The producer may write to it at any time. No reference to its bytes is ever formed; they are
/// only copied out.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<libc::c_void>,
    /// Bytes mapped at `base`.
    mapped: usize,
    /// Where the block begins behind `base`: mappings start at a page, blocks anywhere.
    start: usize,
    /// Bytes of the block.
    len: usize,
}

// SAFETY: The mapping is plain shared memory, owned by this value alone until `Drop`, and only
// ever read. The kernel does not care which thread reads or unmaps it.
unsafe impl Send for Mapping {}
// SAFETY: As above; concurrent reads do not disturb each other.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset` on.
    ///
    /// The descriptor must be at least that long: reading a mapping behind the end of its file
    /// would end the process with SIGBUS. A producer that shortens its memory later can still
    /// cause that; compositors seal theirs against it, and [`Mapping::is_sealed`] tells.
    pub fn new(fd: BorrowedFd<'_>, offset: u32, len: u32) -> io::Result<Self> {
        let (offset, len) = (offset as usize, len as usize);
        let end = offset
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty block"))?;
        let size = file_size(fd)?;
        if size < end as u64 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("a block that ends at byte {end} of memory that has {size} bytes"),
            ));
        }
        let start = offset % page_size();
        let mapped = start + len;
        // SAFETY: A new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                (offset - start) as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base)
            .ok_or_else(|| io::Error::other("mmap succeeded with a null pointer"))?;
        Ok(Self {
            base,
            mapped,
            start,
            len,
        })
    }

    /// Maps the same memory as the `len` bytes at `address` once more, so that it stays readable
    /// when that mapping is gone.
    ///
    /// Fails where the memory is not shared: there is nothing then that could be mapped again.
    ///
    /// # Safety
    /// `len` bytes at `address` must be mapped now.
    pub unsafe fn again(address: NonNull<libc::c_void>, len: u32) -> io::Result<Self> {
        let len = len as usize;
        if len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "an empty block",
            ));
        }
        let start = address.as_ptr().addr() % page_size();
        let mapped = start + len;
        // SAFETY: With an old size of 0, mremap leaves the old mapping alone and maps its pages at
        // an address of the kernel's choice as well, or fails with EINVAL where they are private
        // (mremap(2)). The page that `address` is in is mapped by the contract above.
        let base = unsafe {
            libc::mremap(
                address.as_ptr().byte_sub(start),
                0,
                mapped,
                libc::MREMAP_MAYMOVE,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base)
            .ok_or_else(|| io::Error::other("mremap succeeded with a null pointer"))?;
        Ok(Self {
            base,
            mapped,
            start,
            len,
        })
    }

    /// Bytes of the block.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the block is empty. It never is: [`Mapping::new`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the memory behind `fd` can no longer be shortened (`F_SEAL_SHRINK`).
    pub fn is_sealed(fd: BorrowedFd<'_>) -> bool {
        // SAFETY: F_GET_SEALS takes no argument and fails with EINVAL where seals are unknown.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
    }

    /// Fills `out` from byte `offset` of the block on; false, and nothing copied, where the block
    /// does not reach that far.
    #[must_use]
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) -> bool {
        if offset
            .checked_add(out.len())
            .is_none_or(|end| end > self.len)
        {
            return false;
        }
        // SAFETY: `start + offset + out.len()` is within `start + len`, which is what is mapped
        // (checked above, in `new` and in `again`). `out` is memory of this process and cannot overlap. The
        // producer may write meanwhile: any byte value is then a valid, if torn, pixel.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.base.as_ptr().cast::<u8>().add(self.start + offset),
                out.as_mut_ptr(),
                out.len(),
            );
        }
        true
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `mapped` are what mmap or mremap gave, and nothing points into it any more.
        unsafe { libc::munmap(self.base.as_ptr(), self.mapped) };
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

fn file_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` has room for what fstat writes.
    if unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fstat succeeded, so it has filled the structure.
    let stat = unsafe { stat.assume_init() };
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// The loan of one PipeWire buffer; gives it back when dropped.
pub struct Lease {
    buffer: u64,
    returns: pipewire::channel::Sender<Command>,
    counters: Arc<Counters>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.buffer).finish()
    }
}

impl Lease {
    /// Notes that the buffer which the loop thread knows as `buffer` is out.
    pub(super) fn new(
        buffer: u64,
        returns: pipewire::channel::Sender<Command>,
        counters: Arc<Counters>,
    ) -> Self {
        counters.held.fetch_add(1, Ordering::Relaxed);
        Self {
            buffer,
            returns,
            counters,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.counters.held.fetch_sub(1, Ordering::Relaxed);
        // Fails only when the loop thread is gone, and its buffers with it.
        let _ = self.returns.send(Command::Requeue(self.buffer));
    }
}

/// A frame that the producer drew.
#[derive(Debug)]
pub struct Frame {
    /// Where its pixels are, checked against the memory.
    pub layout: FrameLayout,
    /// What the producer fixed for it, with the size that is left after cropping.
    pub format: StreamFormat,
    /// When the producer says that it was captured, or else when it came.
    pub captured: Monotonic,
    pub(super) memory: [Option<Arc<Mapping>>; MAX_PLANES],
    pub(super) _lease: Lease,
}

impl Frame {
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
        let Some(memory) = self.memory.get(plane.block).and_then(Option::as_ref) else {
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
mod tests {
    use super::*;
    use crate::capture::format::PixelFormat;
    use crate::capture::geometry::{Chunk, Region};
    use std::fs::File;
    use std::os::fd::{AsFd, FromRawFd};
    use std::os::unix::fs::FileExt;

    /// A memfd with these bytes, as producers use.
    fn memfd(bytes: &[u8]) -> File {
        // SAFETY: The name is a C string; the result is checked and owned by the File.
        let file = unsafe {
            let fd = libc::memfd_create(
                c"frame-test".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            );
            assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn frame(bytes: &[u8], width: u32, height: u32, stride: i32) -> (Frame, Arc<Counters>) {
        let memory = memfd(bytes);
        let mapping = Mapping::new(memory.as_fd(), 0, bytes.len() as u32).unwrap();
        let chunk = Chunk {
            mapped: mapping.len(),
            offset: 0,
            size: bytes.len() as u32,
            stride,
        };
        let counters = Arc::new(Counters::default());
        let (sender, _receiver) = pipewire::channel::channel();
        let frame = Frame {
            layout: FrameLayout::new(PixelFormat::Bgrx, width, height, &[chunk]).unwrap(),
            format: StreamFormat {
                format: PixelFormat::Bgrx,
                width,
                height,
                framerate: (0, 1),
                max_framerate: None,
            },
            captured: Monotonic::now(),
            memory: [Some(Arc::new(mapping)), None],
            _lease: Lease::new(1, sender, counters.clone()),
        };
        (frame, counters)
    }

    #[test]
    fn memory_shorter_than_announced_is_not_mapped() {
        let memory = memfd(&[7; 100]);
        assert!(Mapping::new(memory.as_fd(), 0, 100).is_ok());
        let error = Mapping::new(memory.as_fd(), 0, 101).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
        assert!(Mapping::new(memory.as_fd(), 1, 100).is_err());
        assert!(Mapping::new(memory.as_fd(), u32::MAX, u32::MAX).is_err());
        assert!(Mapping::new(memory.as_fd(), 0, 0).is_err());
    }

    #[test]
    fn blocks_may_begin_anywhere() {
        let bytes: Vec<u8> = (0..10_000).map(|n| (n % 251) as u8).collect();
        let memory = memfd(&bytes);
        for offset in [0usize, 1, 4095, 4096, 5000] {
            let mapping = Mapping::new(memory.as_fd(), offset as u32, 1000).unwrap();
            let mut out = [0; 990];
            assert!(mapping.copy_out(10, &mut out));
            assert_eq!(out[..], bytes[offset + 10..offset + 1000]);
        }
    }

    #[test]
    fn memory_stays_readable_when_the_mapping_it_was_found_by_is_gone() {
        let bytes: Vec<u8> = (0..10_000).map(|n| (n % 251) as u8).collect();
        let memory = memfd(&bytes);
        let first = Mapping::new(memory.as_fd(), 0, 10_000).unwrap();
        for offset in [0usize, 1, 4096, 5000] {
            // SAFETY: `first` maps 10 000 bytes and lives on.
            let again = unsafe { Mapping::again(first.base.byte_add(offset), 1000) }.unwrap();
            let mut out = [0; 1000];
            assert!(again.copy_out(0, &mut out));
            assert_eq!(out[..], bytes[offset..offset + 1000]);
            memory
                .write_all_at(&[bytes[offset] ^ 1], offset as u64)
                .unwrap();
            let mut changed = [0];
            assert!(again.copy_out(0, &mut changed));
            assert_eq!(
                changed[0],
                bytes[offset] ^ 1,
                "it is the memory, not a copy"
            );
            memory
                .write_all_at(&[bytes[offset]], offset as u64)
                .unwrap();
        }
        // SAFETY: As above.
        let again = unsafe { Mapping::again(first.base, 10_000) }.unwrap();
        drop(first);
        drop(memory);
        let mut out = vec![0; 10_000];
        assert!(again.copy_out(0, &mut out));
        assert_eq!(out, bytes);
    }

    #[test]
    fn memory_that_is_not_shared_is_refused() {
        let mut private = vec![0u8; 100_000];
        let address = NonNull::new(private.as_mut_ptr().cast()).unwrap();
        // SAFETY: The vector is mapped while it lives.
        assert!(unsafe { Mapping::again(address, 100_000) }.is_err());
    }

    #[test]
    fn nothing_is_read_behind_the_end() {
        let memory = memfd(&[7; 100]);
        let mapping = Mapping::new(memory.as_fd(), 0, 100).unwrap();
        let mut out = [0; 10];
        assert!(mapping.copy_out(90, &mut out));
        assert!(!mapping.copy_out(91, &mut out));
        assert!(!mapping.copy_out(usize::MAX, &mut out));
    }

    #[test]
    fn seals_are_seen() {
        let memory = memfd(&[0; 16]);
        assert!(!Mapping::is_sealed(memory.as_fd()));
        // SAFETY: Plain fcntl on a descriptor that this test owns.
        let sealed =
            unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        assert_eq!(sealed, 0);
        assert!(Mapping::is_sealed(memory.as_fd()));
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
}
