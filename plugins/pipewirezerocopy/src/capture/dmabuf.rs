// SPDX-License-Identifier: MIT OR Apache-2.0

//! A producer's buffer in DMA-BUFs: memory of a GPU or another device, handed on as it is.
//!
//! What lies in it in which order only the device knows, unless its modifier is [`LINEAR`]. It is
//! lent like all other buffers: a descriptor of our own keeps the memory, not the pixels (lesson L8).

use std::any::Any;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;

use super::memory::{Mapping, Memory};

/// `DRM_FORMAT_MOD_LINEAR` (drm_fourcc.h): rows one after another.
pub const LINEAR: u64 = 0;
/// `DRM_FORMAT_MOD_INVALID` (drm_fourcc.h): the producer names no modifier, and the driver that
/// imports the memory is left to know it.
pub const IMPLICIT: u64 = 0x00ff_ffff_ffff_ffff;

/// The most planes that a DMA-BUF with a modifier has (drm_mode.h, `drm_mode_fb_cmd2`).
pub const MAX_PLANES: usize = 4;

/// Where one plane lies. With a modifier that compresses there are more than the format has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plane {
    /// Which of the buffer's [`Block`]s.
    pub block: usize,
    /// Bytes from the block's beginning.
    pub offset: u32,
    /// Bytes from one row to the next; what that means is up to the modifier.
    pub stride: u32,
}

/// One DMA-BUF of a buffer.
#[derive(Debug)]
pub struct Block {
    file: File,
    size: usize,
    /// None where the CPU cannot read it.
    memory: OnceLock<Option<Memory>>,
}

impl Block {
    /// Bytes, as the kernel says.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The block for reading by the CPU, mapped when first asked for. Between
    /// [`DmaBuffer::begin_cpu_access`] and its end only.
    pub(super) fn memory(&self) -> Option<&Memory> {
        let open = || {
            if sync(self.file.as_fd(), SYNC_START) && sync(self.file.as_fd(), SYNC_END) {
                return Mapping::new(&self.file, 0, self.size)
                    .ok()
                    .map(Memory::Mapped);
            }
            // It is no DMA-BUF, whatever the producer says, and may shrink.
            let size = u32::try_from(self.size).ok()?;
            Memory::new(self.file.as_fd(), 0, size).ok()
        };
        self.memory.get_or_init(open).as_ref()
    }
}

impl AsFd for Block {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What consumers have made of buffers.
pub type Kept = Vec<Arc<dyn Any + Send + Sync>>;

/// What was made of buffers that are gone. The last reference to a buffer may end on the loop thread, and
/// what was made of it must not: drivers take long to let go of an import (lessons L15 and L20).
#[derive(Default)]
pub struct Remains {
    there: AtomicBool,
    of_buffers: Mutex<Kept>,
}

impl std::fmt::Debug for Remains {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remains").finish_non_exhaustive()
    }
}

impl Remains {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.of_buffers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, kept: &mut Kept) {
        self.lock().append(kept);
        self.there.store(true, Ordering::Release);
    }

    /// All of it, for the consumer to drop.
    pub fn take(&self) -> Kept {
        if self.there.swap(false, Ordering::Acquire) {
            std::mem::take(&mut *self.lock())
        } else {
            Kept::new()
        }
    }
}

/// One buffer of a producer, from `add_buffer` to the last reference to it.
pub struct DmaBuffer {
    blocks: Vec<Block>,
    /// What consumers have made of it and need again: imports, wrappers.
    kept: Mutex<Kept>,
    /// Where that goes then.
    remains: Arc<Remains>,
}

impl Drop for DmaBuffer {
    fn drop(&mut self) {
        let kept = self.kept.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !kept.is_empty() {
            self.remains.add(kept);
        }
    }
}

impl std::fmt::Debug for DmaBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DmaBuffer").field(&self.blocks).finish()
    }
}

impl DmaBuffer {
    /// Takes descriptors of our own of a buffer's. Returns, for each given one, which block it is:
    /// planes often lie in the same memory.
    pub(super) fn new(
        fds: &[BorrowedFd<'_>],
        remains: &Arc<Remains>,
    ) -> io::Result<(Self, Vec<usize>)> {
        let mut blocks: Vec<Block> = Vec::new();
        let mut identities = Vec::new();
        let mut which = Vec::new();
        for fd in fds {
            let mut file = File::from(fd.try_clone_to_owned()?);
            let metadata = file.metadata()?;
            let identity = (metadata.dev(), metadata.ino());
            if let Some(known) = identities.iter().position(|known| *known == identity) {
                which.push(known);
                continue;
            }
            // Not the producer's word for it: DMA-BUFs tell their size (dma-buf.rst, "lseek").
            let size = usize::try_from(file.seek(SeekFrom::End(0))?)
                .map_err(|_| io::ErrorKind::InvalidData)?;
            if size == 0 {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty"));
            }
            which.push(blocks.len());
            identities.push(identity);
            blocks.push(Block {
                file,
                size,
                memory: OnceLock::new(),
            });
        }
        let buffer = Self {
            blocks,
            kept: Mutex::default(),
            remains: remains.clone(),
        };
        Ok((buffer, which))
    }

    /// Its memory: one to [`MAX_PLANES`] blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// What was made of this buffer before, or is made now and kept: it ends with the buffer, not
    /// with a descriptor's number, which others get (lesson L15). One of each type.
    ///
    /// `make` must not ask for something kept itself.
    pub fn keep<T: Any + Send + Sync, E>(
        &self,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.iter().find_map(|one| one.clone().downcast::<T>().ok());
        if let Some(known) = known {
            return Ok(known);
        }
        let new = Arc::new(make()?);
        kept.push(new.clone());
        Ok(new)
    }

    /// Forgets what was kept of that type.
    pub fn forget<T: Any>(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|one| !(**one).is::<T>());
    }

    /// What is still being written to the buffer now, as far as the kernel knows (implicit fences).
    /// Costs one system call for each block where nothing is.
    pub fn writers(&self) -> Fence {
        let mut fence = Fence {
            of_files: true,
            ..Fence::default()
        };
        for (slot, block) in fence.pending.iter_mut().zip(&self.blocks) {
            if is_signalled(block.as_fd()) {
                continue;
            }
            // A snapshot: nobody who writes later is waited for. Before Linux 6.0 only the memory
            // itself can be asked.
            let file = export_sync_file(block.as_fd()).ok();
            fence.of_files &= file.is_some();
            *slot = file.or_else(|| block.file.try_clone().map(OwnedFd::from).ok());
        }
        fence
    }

    /// Tells the kernel that the CPU reads from now on, until the result is dropped
    /// (`DMA_BUF_IOCTL_SYNC`). Whoever still writes must have been waited for.
    pub fn begin_cpu_access(&self) -> CpuAccess<'_> {
        for block in &self.blocks {
            sync(block.as_fd(), SYNC_START);
        }
        CpuAccess(self)
    }
}

/// The CPU reads a buffer.
#[derive(Debug)]
pub struct CpuAccess<'a>(&'a DmaBuffer);

impl Drop for CpuAccess<'_> {
    fn drop(&mut self) {
        for block in &self.0.blocks {
            sync(block.as_fd(), SYNC_END);
        }
    }
}

/// What must have happened before a frame may be looked at.
#[derive(Debug, Default)]
pub struct Fence {
    /// Descriptors that become readable when it has.
    pending: [Option<OwnedFd>; MAX_PLANES],
    /// They are sync files, which a GPU can wait for too.
    of_files: bool,
}

impl Fence {
    /// Waits for one descriptor to become readable.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            pending: [Some(fd), None, None, None],
            of_files: false,
        }
    }

    /// Waits for one sync file.
    pub(super) fn of_file(file: OwnedFd) -> Self {
        Self {
            of_files: true,
            ..Self::new(file)
        }
    }

    /// The sync files that have not been signalled, for a GPU to wait for; none where that cannot be
    /// said with sync files.
    pub fn sync_files(&self) -> Vec<BorrowedFd<'_>> {
        let files = self.pending.iter().flatten().map(AsFd::as_fd);
        let files = files.filter(|file| self.of_files && !is_signalled(*file));
        files.collect()
    }

    /// A descriptor to wait for: it becomes readable. None when all has happened.
    pub fn pending(&self) -> Option<BorrowedFd<'_>> {
        let fds = self.pending.iter().flatten().map(AsFd::as_fd);
        fds.into_iter().find(|fd| !is_signalled(*fd))
    }
}

/// Whether a sync file is signalled, or a DMA-BUF's writers are done (dma-buf.rst, "Implicit Fence
/// Poll Support"). What cannot be asked has no fences.
fn is_signalled(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: One structure, which lives through the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) != 0 }
}

// linux/dma-buf.h
const SYNC_READ: u32 = 1;
const SYNC_START: u64 = 1; // DMA_BUF_SYNC_READ | DMA_BUF_SYNC_START
const SYNC_END: u64 = 1 | (1 << 2); // DMA_BUF_SYNC_READ | DMA_BUF_SYNC_END

/// `struct dma_buf_export_sync_file` (linux/dma-buf.h)
#[repr(C)]
struct ExportSyncFile {
    flags: u32,
    fd: i32,
}

mod ioctl {
    // DMA_BUF_IOCTL_SYNC, whose `struct dma_buf_sync` is a u64, and DMA_BUF_IOCTL_EXPORT_SYNC_FILE.
    nix::ioctl_write_ptr!(sync, b'b', 0, u64);
    nix::ioctl_readwrite!(export_sync_file, b'b', 2, super::ExportSyncFile);
}

/// False where it is no DMA-BUF.
fn sync(fd: BorrowedFd<'_>, flags: u64) -> bool {
    loop {
        // SAFETY: The ioctl reads one u64 during the call.
        match unsafe { ioctl::sync(fd.as_raw_fd(), &raw const flags) } {
            Ok(_) => return true,
            // dma-buf.h asks for it to be called again then.
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => return false,
        }
    }
}

fn export_sync_file(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut export = ExportSyncFile {
        flags: SYNC_READ,
        fd: -1,
    };
    // SAFETY: The ioctl reads and writes one structure of this layout during the call.
    unsafe { ioctl::export_sync_file(fd.as_raw_fd(), &raw mut export) }?;
    if export.fd < 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: The kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(export.fd) })
}

/// A frame in a buffer of DMA-BUFs, as the producer describes it.
#[derive(Clone, Debug)]
pub struct DmaBufPicture {
    /// The memory.
    pub buffer: Arc<DmaBuffer>,
    /// Modifier, or [`IMPLICIT`].
    pub modifier: u64,
    /// Pixels of the whole buffer, of which the frame may be a crop.
    pub size: (u32, u32),
    planes: [Plane; MAX_PLANES],
    count: usize,
}

impl DmaBufPicture {
    /// Fails, and says why, where a plane does not begin in its memory. More cannot be said of a
    /// layout that only the device knows; its driver checks when it imports.
    pub(super) fn new(
        buffer: Arc<DmaBuffer>,
        modifier: u64,
        size: (u32, u32),
        planes: &[Plane],
    ) -> Result<Self, String> {
        let count = planes.len();
        if !(1..=MAX_PLANES).contains(&count) {
            return Err(format!("a DMA-BUF of {count} planes"));
        }
        for plane in planes {
            let limit = buffer.blocks.get(plane.block).map_or(0, Block::size);
            if plane.offset as usize >= limit {
                return Err(format!(
                    "a plane at byte {} of a DMA-BUF of {limit} bytes",
                    plane.offset
                ));
            }
        }
        let mut list = [Plane::default(); MAX_PLANES];
        list[..count].copy_from_slice(planes);
        Ok(Self {
            buffer,
            modifier,
            size,
            planes: list,
            count,
        })
    }

    /// Its planes.
    pub fn planes(&self) -> &[Plane] {
        &self.planes[..self.count]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    /// A descriptor that a producer may call a DMA-BUF: memory that can be shrunk. Real ones need a
    /// kernel that makes them (tests/vm/stages).
    pub fn memory(bytes: &[u8]) -> File {
        // SAFETY: The name is a C string; the result is checked and owned by the File.
        let file = unsafe {
            let fd = libc::memfd_create(c"dmabuf-test".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    /// A buffer of 64 bytes into which somebody draws until there is something to read from `drawn`. It
    /// has no memory.
    pub fn drawn_when(drawn: io::PipeReader) -> DmaBuffer {
        let block = Block {
            file: OwnedFd::from(drawn).into(),
            size: 64,
            memory: OnceLock::new(),
        };
        DmaBuffer {
            blocks: vec![block],
            kept: Mutex::default(),
            remains: Arc::default(),
        }
    }

    fn buffer(sizes: &[usize]) -> DmaBuffer {
        let files: Vec<_> = sizes.iter().map(|size| memory(&vec![0; *size])).collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        DmaBuffer::new(&fds, &Arc::default()).unwrap().0
    }

    /// Says on which thread it ends.
    struct Import(std::sync::mpsc::Sender<std::thread::ThreadId>);

    impl Drop for Import {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().id());
        }
    }

    #[test]
    fn an_import_ends_where_the_consumer_drops_it_not_with_its_buffer() {
        let remains = Arc::default();
        let (tell, ended) = std::sync::mpsc::channel();
        let (buffer, _) = DmaBuffer::new(&[memory(&[0; 10]).as_fd()], &remains).unwrap();
        buffer.keep(|| Ok::<_, ()>(Import(tell))).unwrap();
        std::thread::spawn(|| drop(buffer)).join().unwrap();
        assert!(ended.try_recv().is_err());
        drop(remains.take());
        assert_eq!(ended.recv(), Ok(std::thread::current().id()));
    }

    #[test]
    fn planes_in_the_same_memory_share_a_block() {
        let (one, other) = (memory(&[0; 10]), memory(&[0; 20]));
        let again = one.try_clone().unwrap();
        let fds = [one.as_fd(), other.as_fd(), again.as_fd()];
        let (buffer, which) = DmaBuffer::new(&fds, &Arc::default()).unwrap();
        assert_eq!(which, [0, 1, 0]);
        let sizes: Vec<_> = buffer.blocks().iter().map(Block::size).collect();
        assert_eq!(sizes, [10, 20]);
    }

    #[test]
    fn empty_memory_is_refused() {
        assert!(DmaBuffer::new(&[memory(&[]).as_fd()], &Arc::default()).is_err());
        assert!(DmaBuffer::new(&[io::pipe().unwrap().0.as_fd()], &Arc::default()).is_err());
    }

    #[test]
    fn what_is_made_of_a_buffer_is_made_once_and_ends_with_it() {
        let buffer = buffer(&[1]);
        let made = buffer.keep(|| Ok::<_, ()>(7_u32)).unwrap();
        assert_eq!(buffer.keep(|| Err::<u32, _>("twice")), Ok(made.clone()));
        assert_eq!(buffer.keep(|| Err::<u8, _>("other")), Err("other"));
        buffer.forget::<u32>();
        assert_eq!(buffer.keep(|| Ok::<u32, ()>(8)).as_deref(), Ok(&8));
        let kept = buffer.keep(|| Ok::<_, ()>("text")).unwrap();
        assert_eq!(Arc::strong_count(&kept), 2);
        drop(buffer);
        assert_eq!((Arc::strong_count(&kept), Arc::strong_count(&made)), (1, 1));
    }

    #[test]
    fn a_plane_begins_in_its_memory() {
        let buffer = Arc::new(buffer(&[100, 50]));
        let picture = |planes: &[(usize, u32)]| {
            let planes: Vec<_> = planes
                .iter()
                .map(|&(block, offset)| Plane {
                    block,
                    offset,
                    stride: 8,
                })
                .collect();
            DmaBufPicture::new(buffer.clone(), 7, (2, 2), &planes)
        };
        assert_eq!(picture(&[(0, 99), (1, 49)]).unwrap().planes().len(), 2);
        for lie in [
            &[(0, 100)][..],
            &[(1, 50)],
            &[(2, 0)],
            &[(0, u32::MAX)],
            &[],
        ] {
            assert!(picture(lie).is_err(), "{lie:?}");
        }
        assert!(picture(&[(0, 0); 5]).is_err(), "too many");
    }

    #[test]
    fn a_fence_is_waited_for_until_it_is_signalled() {
        assert!(Fence::default().pending().is_none());
        let (reader, mut writer) = io::pipe().unwrap();
        let fence = Fence {
            pending: [None, Some(reader.into()), None, None],
            of_files: true,
        };
        assert!(fence.pending().is_some());
        assert_eq!(fence.sync_files().len(), 1);
        writer.write_all(b"!").unwrap();
        assert!(fence.pending().is_none());
        assert!(fence.sync_files().is_empty());
        let event = Fence::new(io::pipe().unwrap().0.into());
        assert!(event.sync_files().is_empty(), "a GPU knows sync files only");
        assert!(buffer(&[1]).writers().pending().is_none(), "nobody writes");
    }
}
