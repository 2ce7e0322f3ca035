// SPDX-License-Identifier: MIT OR Apache-2.0

//! A producer's memory: mapped where that is safe, else read by system calls.
//!
//! Reading a mapping behind the end of its file ends the process with SIGBUS, and a producer can
//! shorten a file at any time, unless it is sealed against that (`F_SEAL_SHRINK`, memfd_create(2)).
//! So only sealed memory is mapped, and can leave without a copy. From all other memory pictures are
//! copied with pread(2), which reports a missing byte instead of dying of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::LazyLock;

/// A block of a producer's memory, readable for as long as this value lives, whatever becomes of
/// the PipeWire buffer that it was found in.
#[derive(Debug)]
pub enum Memory {
    /// It cannot shrink.
    Mapped(Mapping),
    /// It can.
    File(FileBlock),
}

impl Memory {
    /// The `len` bytes of `fd` from `offset` on. They must be there.
    pub fn new(fd: BorrowedFd<'_>, offset: u32, len: u32) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what);
        if len == 0 {
            return Err(invalid("an empty block"));
        }
        let file = File::from(fd.try_clone_to_owned()?);
        // The seal first: what is as long as it must be, and sealed, stays as long.
        let sealed = is_sealed(fd);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            // A pipe or a device could make a reader wait.
            return Err(invalid("it is no file"));
        }
        let end = u64::from(offset) + u64::from(len);
        let size = metadata.len();
        if size < end {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("a block that ends at byte {end} of memory that has {size} bytes"),
            ));
        }
        let (offset, len) = (offset as usize, len as usize);
        if sealed {
            return Mapping::new(&file, offset, len).map(Self::Mapped);
        }
        Ok(Self::File(FileBlock {
            file,
            offset: offset as u64,
            len,
        }))
    }

    /// Bytes of the block.
    pub fn len(&self) -> usize {
        match self {
            Self::Mapped(mapping) => mapping.len,
            Self::File(block) => block.len,
        }
    }

    /// Whether the block is empty. It never is: an empty one is refused.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `out` from byte `offset` of the block on; false where the block does not reach, or no
    /// longer reaches, that far. What is in `out` then is undefined.
    #[must_use]
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) -> bool {
        match self {
            Self::Mapped(mapping) => mapping.copy_out(offset, out),
            Self::File(block) => block.copy_out(offset, out),
        }
    }

    /// Cuts the connection to the producer: whoever reads this memory in place goes on reading what
    /// is in it now, at the same address, and the producer may write what it likes.
    ///
    /// It costs a copy, and an error leaves everything as it was.
    pub fn detach(&self) -> io::Result<()> {
        match self {
            Self::Mapped(mapping) => mapping.detach(),
            // Nobody reads it in place.
            Self::File(_) => Ok(()),
        }
    }

    /// `len` bytes from `offset` on, in place. None where they are not mapped. They may reach
    /// behind the block's end, up to that of its last page.
    ///
    /// The producer is able to write to these bytes while somebody reads them, as with all memory
    /// that two processes share. It has agreed not to while we hold the buffer; should it break
    /// that, pixels are torn.
    pub fn shared(&self, offset: usize, len: usize) -> Option<&[u8]> {
        match self {
            Self::Mapped(mapping) => mapping.shared(offset, len),
            Self::File(_) => None,
        }
    }
}

/// Whether the memory behind `fd` can no longer be shortened.
fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: F_GET_SEALS takes no argument and fails with EINVAL where seals are unknown.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// A part of a file, read by system calls.
#[derive(Debug)]
pub struct FileBlock {
    file: File,
    offset: u64,
    len: usize,
}

impl FileBlock {
    fn copy_out(&self, offset: usize, out: &mut [u8]) -> bool {
        ends_within(offset, out.len(), self.len)
            && self
                .file
                .read_exact_at(out, self.offset + offset as u64)
                .is_ok()
    }
}

fn ends_within(offset: usize, len: usize, limit: usize) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= limit)
}

/// A producer's memory, mapped for reading by us and for as long as we need it.
///
/// The memory behind it cannot shrink: all of it stays readable.
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
    /// Maps `len` bytes of `file` from `offset` on. They must be there, and stay.
    pub(super) fn new(file: &File, offset: usize, len: usize) -> io::Result<Self> {
        let start = offset % page_size();
        let mapped = start + len;
        // SAFETY: A new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
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

    fn copy_out(&self, offset: usize, out: &mut [u8]) -> bool {
        if !ends_within(offset, out.len(), self.len) {
            return false;
        }
        // SAFETY: `start + offset + out.len()` is within `start + len`, which is what is
        // mapped (checked above, in `new` and in `again`). `out` is memory of this process and
        // cannot overlap. The producer may write meanwhile: any byte value is then a valid, if
        // torn, pixel.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.base.as_ptr().cast::<u8>().add(self.start + offset),
                out.as_mut_ptr(),
                out.len(),
            );
        }
        true
    }

    /// Bytes of all pages: the kernel maps whole ones.
    fn paged(&self) -> usize {
        self.mapped.next_multiple_of(page_size())
    }

    fn detach(&self) -> io::Result<()> {
        let failed = |address| {
            if address == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else {
                Ok(address)
            }
        };
        // SAFETY: A new mapping at an address of the kernel's choice touches no memory of ours.
        let copy = failed(unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                self.paged(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        })?;
        // SAFETY: Both are mapped with that many bytes, and the new one is nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr(), copy, self.paged()) };
        // SAFETY: The copy takes the place of the shared pages in one step of the kernel's (mremap(2),
        // MREMAP_FIXED): who reads them meanwhile finds the same bytes before and after. This
        // value owns both, and goes on owning what is at `base`.
        let moved = failed(unsafe {
            libc::mremap(
                copy,
                self.paged(),
                self.paged(),
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                self.base.as_ptr(),
            )
        });
        if let Err(error) = moved {
            // SAFETY: Mapped above, and known to nobody.
            unsafe { libc::munmap(copy, self.paged()) };
            return Err(error);
        }
        Ok(())
    }

    fn shared(&self, offset: usize, len: usize) -> Option<&[u8]> {
        let readable = self.paged() - self.start;
        if !ends_within(offset, len, readable) {
            return None;
        }
        // SAFETY: `start + offset + len` is within the pages that are mapped (checked above) for as
        // long as this value lives, and they cannot be cut off: their memory is sealed, or is the
        // daemon's. Every byte value is a valid u8. The producer does not write to a buffer that is
        // ours by PipeWire's protocol; that it could is said at `Memory::shared`.
        Some(unsafe {
            std::slice::from_raw_parts(
                self.base.as_ptr().cast::<u8>().add(self.start + offset),
                len,
            )
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `mapped` are what mmap or mremap gave, and nothing points into it any more.
        unsafe { libc::munmap(self.base.as_ptr(), self.mapped) };
    }
}

pub(super) fn page_size() -> usize {
    static SIZE: LazyLock<usize> = LazyLock::new(|| {
        // SAFETY: sysconf has no preconditions.
        usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
    });
    *SIZE
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, FromRawFd};

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

    #[test]
    fn memory_shorter_than_announced_is_refused() {
        let memory = memfd(&[7; 100]);
        unsealed_and_sealed(&memory, shorter);
    }

    fn shorter(memory: &File) {
        assert!(Memory::new(memory.as_fd(), 0, 100).is_ok());
        let error = Memory::new(memory.as_fd(), 0, 101).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
        assert!(Memory::new(memory.as_fd(), 1, 100).is_err());
        assert!(Memory::new(memory.as_fd(), u32::MAX, u32::MAX).is_err());
        assert!(Memory::new(memory.as_fd(), 0, 0).is_err());
    }

    #[test]
    fn blocks_may_begin_anywhere() {
        let memory = memfd(&pattern());
        unsealed_and_sealed(&memory, begin_anywhere);
    }

    fn begin_anywhere(memory: &File) {
        let bytes = pattern();
        for offset in [0usize, 1, 4095, 4096, 5000] {
            let mapping = Memory::new(memory.as_fd(), offset as u32, 1000).unwrap();
            let mut out = [0; 990];
            assert!(mapping.copy_out(10, &mut out));
            assert_eq!(out[..], bytes[offset + 10..offset + 1000]);
        }
    }

    /// Runs a test on the memory as it is, and sealed.
    fn unsealed_and_sealed(memory: &File, test: impl Fn(&File)) {
        test(memory);
        seal(memory);
        test(memory);
    }

    fn seal(memory: &File) {
        // SAFETY: Plain fcntl on a descriptor that this test owns.
        let sealed =
            unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        assert_eq!(sealed, 0);
    }

    fn pattern() -> Vec<u8> {
        (0..10_000).map(|n| (n % 251) as u8).collect()
    }

    #[test]
    fn only_sealed_memory_is_mapped() {
        let memory = memfd(&[7; 100]);
        let block = Memory::new(memory.as_fd(), 0, 100).unwrap();
        assert!(matches!(block, Memory::File(_)));
        assert!(block.shared(0, 100).is_none());
        seal(&memory);
        let block = Memory::new(memory.as_fd(), 0, 100).unwrap();
        assert!(matches!(block, Memory::Mapped(_)));
        assert_eq!(block.shared(10, 90), Some(&[7; 90][..]));
    }

    #[test]
    fn memory_that_shrinks_is_missed_and_not_died_of() {
        let memory = memfd(&pattern());
        let block = Memory::new(memory.as_fd(), 0, 10_000).unwrap();
        let mut out = vec![0; 10_000];
        assert!(block.copy_out(0, &mut out));
        assert_eq!(out, pattern());
        memory.set_len(100).unwrap();
        assert!(!block.copy_out(0, &mut out));
        assert!(block.copy_out(0, &mut out[..100]));
    }

    #[test]
    fn detached_memory_keeps_its_bytes_at_its_address() {
        let memory = memfd(&pattern());
        seal(&memory);
        let block = Memory::new(memory.as_fd(), 5000, 5000).unwrap();
        let bytes = block.shared(0, 5000).unwrap();
        block.detach().unwrap();
        memory.write_all_at(&[0; 10_000], 0).unwrap();
        assert_eq!(bytes, &pattern()[5000..]);
        assert_eq!(
            block.shared(0, 5000).map(<[u8]>::as_ptr),
            Some(bytes.as_ptr())
        );
    }

    #[test]
    fn what_could_make_a_reader_wait_is_refused() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(Memory::new(reader.as_fd(), 0, 100).is_err());
    }

    #[test]
    fn memory_stays_readable_when_the_mapping_it_was_found_by_is_gone() {
        let bytes = pattern();
        let memory = memfd(&bytes);
        seal(&memory);
        let first = Mapping::new(&memory, 0, 10_000).unwrap();
        for offset in [0usize, 1, 4096, 5000] {
            // SAFETY: `first` maps 10 000 bytes and lives on.
            let again = unsafe { Mapping::again(first.base.byte_add(offset), 1000) }.unwrap();
            let mut out = [0; 1000];
            assert!(again.copy_out(0, &mut out));
            assert_eq!(out[..], bytes[offset..offset + 1000]);
            assert_eq!(again.shared(0, 1000), Some(&out[..]));
            let at = offset as u64;
            memory.write_all_at(&[bytes[offset] ^ 1], at).unwrap();
            let mut changed = [0];
            assert!(again.copy_out(0, &mut changed));
            let expected = bytes[offset] ^ 1;
            assert_eq!(changed[0], expected, "it is the memory, not a copy");
            memory.write_all_at(&[bytes[offset]], at).unwrap();
        }
        // SAFETY: As above.
        let again = unsafe { Mapping::again(first.base, 10_000) }.unwrap();
        drop(first);
        drop(memory);
        assert_eq!(again.shared(0, 10_000), Some(&bytes[..]));
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
        unsealed_and_sealed(&memory, |memory| {
            let block = Memory::new(memory.as_fd(), 0, 100).unwrap();
            let mut out = [0; 10];
            assert!(block.copy_out(90, &mut out));
            assert!(!block.copy_out(91, &mut out));
            assert!(!block.copy_out(usize::MAX, &mut out));
        });
        let sealed = Memory::new(memory.as_fd(), 0, 100).unwrap();
        let page = page_size();
        assert_eq!(
            sealed.shared(90, page - 90).map(<[u8]>::len),
            Some(page - 90)
        );
        assert!(sealed.shared(90, page - 89).is_none());
        assert!(sealed.shared(usize::MAX, 1).is_none());
    }
}
