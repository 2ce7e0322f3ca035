// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory that pixels lie in, and who may use it for how long.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use tokio::sync::oneshot;
use zbus::Message;

use crate::error::Error;

/// Canvases kept for reuse: one that is drawn on while downstream has two more.
const SPARES: usize = 3;

/// Memory of canvases that nobody uses any more. A new one would be cleared by the kernel, page
/// by page, for each frame.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spares(Arc<Mutex<Vec<Vec<u8>>>>);

impl Spares {
    fn take(&self) -> Vec<u8> {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spares.pop().unwrap_or_default()
    }

    fn give(&self, bytes: Vec<u8>) {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spares.len() < SPARES {
            spares.push(bytes);
        }
    }
}

#[derive(Debug)]
enum Bytes {
    /// Where QEMU's message was read to.
    Message(Message, Range<usize>),
    /// A copy of our own, which goes to the spares in the end.
    Own(Vec<u8>, Spares),
}

/// The bytes of a picture. They do not change while somebody else has them.
#[derive(Debug)]
pub struct Canvas(Bytes);

impl Canvas {
    /// The bytes `data`, which lie in `message`, where they stay.
    pub(crate) fn in_message(message: &Message, data: &[u8]) -> Option<Self> {
        let all = message.data().bytes();
        let start = (data.as_ptr() as usize).checked_sub(all.as_ptr() as usize)?;
        let range = start..start.checked_add(data.len())?;
        // The slice is not trusted to lie where the library's decoder should have found it.
        (all.get(range.clone())?.as_ptr() == data.as_ptr())
            .then(|| Self(Bytes::Message(message.clone(), range)))
    }

    /// A copy of `data` that may be drawn on.
    pub(crate) fn copied(data: &[u8], spares: &Spares) -> Self {
        let mut bytes = spares.take();
        bytes.clear();
        bytes.extend_from_slice(data);
        Self(Bytes::Own(bytes, spares.clone()))
    }

    /// The bytes for drawing, if they are ours.
    pub(crate) fn own_bytes(&mut self) -> Option<&mut [u8]> {
        match &mut self.0 {
            Bytes::Own(bytes, _) => Some(bytes),
            Bytes::Message(..) => None,
        }
    }
}

impl AsRef<[u8]> for Canvas {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Message(message, range) => &message.data().bytes()[range.clone()],
            Bytes::Own(bytes, _) => bytes,
        }
    }
}

impl Drop for Canvas {
    fn drop(&mut self) {
        if let Bytes::Own(bytes, spares) = &mut self.0 {
            spares.give(std::mem::take(bytes));
        }
    }
}

/// A memfd of QEMU's, into which it draws when it likes.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    sealed: bool,
}

impl SharedFile {
    /// `needed` bytes are to be read of `file`.
    pub(crate) fn checked(file: OwnedFd, needed: u64) -> Result<Self, Error> {
        // Fails where QEMU has not allowed it, which is what a stock one does (`qemu_memfd_create`
        // without MFD_ALLOW_SEALING).
        let _ = fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        let shared = Self {
            sealed: SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK),
            file: File::from(file),
        };
        shared.has(needed)?;
        Ok(shared)
    }

    /// Whether `needed` bytes are there now.
    pub fn has(&self, needed: u64) -> Result<(), Error> {
        let size = self
            .file
            .metadata()
            .map_err(|error| Error::Nonsense(format!("a map that cannot be looked at: {error}")))?
            .len();
        if size < needed {
            return Err(Error::Nonsense(format!(
                "a map of {size} bytes for a picture that needs {needed}"
            )));
        }
        Ok(())
    }

    /// Whether the file can never become smaller. Where it is not, QEMU could cut it off, and who
    /// reads a mapping of it then gets SIGBUS; [`SharedFile::read`] gives an error instead.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Reads what is there now, all of `out`.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        self.file
            .read_exact_at(out, offset)
            .map_err(|error| Error::Nonsense(format!("a map that cannot be read: {error}")))
    }
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// As long as somebody keeps it, the picture that it came with is in use. It goes with the memory
/// on its way downstream.
#[derive(Clone, Debug)]
pub struct Lease(Arc<Done>);

/// Tells QEMU, where it waits for that, when the last lease is dropped.
#[derive(Debug)]
struct Done {
    _reply: Option<oneshot::Sender<()>>,
}

impl Lease {
    /// A lease; the receiver of `reply`, if there is one, is told when it ends.
    pub(crate) fn new(reply: Option<oneshot::Sender<()>>) -> Self {
        Self(Arc::new(Done { _reply: reply }))
    }
}

/// The leases that may still be out.
#[derive(Debug, Default)]
pub(crate) struct Leases(Vec<Weak<Done>>);

impl Leases {
    pub fn add(&mut self, lease: &Lease) {
        self.0.retain(|lease| lease.strong_count() > 0);
        self.0.push(Arc::downgrade(&lease.0));
    }

    /// Whether somebody has a picture now.
    pub fn any(&self) -> bool {
        self.0.iter().any(|lease| lease.strong_count() > 0)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn memfd(size: u64, flags: MFdFlags) -> OwnedFd {
        let file = File::from(memfd_create("test", flags | MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        file.into()
    }

    #[test]
    fn a_map_that_is_too_small_is_refused() {
        let flags = MFdFlags::empty();
        assert!(SharedFile::checked(memfd(4096, flags), 4096).is_ok());
        assert!(SharedFile::checked(memfd(4096, flags), 4097).is_err());
        let (pipe, _) = nix::unistd::pipe().unwrap();
        assert!(SharedFile::checked(pipe, 1).is_err());
    }

    #[test]
    fn a_map_is_sealed_where_that_is_allowed() {
        let file = SharedFile::checked(memfd(4096, MFdFlags::MFD_ALLOW_SEALING), 1).unwrap();
        assert!(file.is_sealed());
        assert!(file.file.set_len(0).is_err());
    }

    #[test]
    fn a_map_that_shrinks_is_an_error_and_no_signal() {
        let file = SharedFile::checked(memfd(4096, MFdFlags::empty()), 4096).unwrap();
        assert!(!file.is_sealed());
        let mut out = [1; 4096];
        file.read(0, &mut out).unwrap();
        assert_eq!(out, [0; 4096]);
        file.file.set_len(100).unwrap();
        assert!(file.read(0, &mut out).is_err());
        assert!(file.has(4096).is_err());
    }

    #[test]
    fn a_lease_ends_with_its_last_copy() {
        let (reply, mut told) = oneshot::channel();
        let lease = Lease::new(Some(reply));
        let mut leases = Leases::default();
        leases.add(&lease);
        let copy = lease.clone();
        drop(lease);
        assert!(leases.any());
        assert_eq!(told.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        drop(copy);
        assert!(!leases.any());
        assert_eq!(told.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }

    #[test]
    fn memory_of_a_canvas_is_used_again() {
        let spares = Spares::default();
        let canvas = Canvas::copied(&[1; 1000], &spares);
        let address = canvas.as_ref().as_ptr();
        drop(canvas);
        let again = Canvas::copied(&[2; 900], &spares);
        assert_eq!(again.as_ref().as_ptr(), address);
        assert_eq!(again.as_ref(), [2; 900]);
    }
}
