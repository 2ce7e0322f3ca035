// SPDX-License-Identifier: MIT OR Apache-2.0

//! The file of a unix socket that somebody listens on: it must not be taken from another program,
//! nor be left behind, nor be there for everybody.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

/// A socket file of ours: removed at the end, unless another one has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
    /// Ends after the socket file does.
    _lock: LockFile,
}

impl SocketFile {
    /// Binds `socket` to a path, in the place of a socket file that nobody listens on any more.
    /// The new one is for its owner alone.
    pub fn bind(socket: &Socket, path: &Path, address: &SockAddr) -> io::Result<Self> {
        let lock = LockFile::beside(path)?;
        remove_stale(path, address)?;
        bind_private(socket, address)?;
        Ok(Self {
            path: path.to_owned(),
            id: file_id(path)?,
            _lock: lock,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|id| id == self.id) {
            // Nothing can be done about a directory that has become read-only.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Binds so that the file is for its owner alone.
fn bind_private(socket: &Socket, address: &SockAddr) -> io::Result<()> {
    // On Linux the mode of the socket inode is taken over by the file that bind() creates, so
    // there is no moment at which others could connect.
    // SAFETY: fchmod() on a descriptor that `socket` owns touches no memory.
    let done = unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind(address)
}

/// Removes a socket file that nobody listens on.
fn remove_stale(path: &Path, address: &SockAddr) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "there is a file of that name which is no socket; it stays as it is",
            ));
        }
        Ok(_) => {}
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?;
    match probe.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Err(in_use()),
    }
}

fn in_use() -> io::Error {
    io::Error::new(
        io::ErrorKind::AddrInUse,
        "another program listens there (is a helix-host already running?)",
    )
}

/// The right to replace a socket file: two that start at the same moment would both find that
/// nobody listens there yet, and each remove the other's. The system takes it back when the
/// process ends, in whatever way. Wayland's and PipeWire's sockets are kept in the same manner.
#[derive(Debug)]
struct LockFile {
    path: PathBuf,
    /// Locked until it is closed.
    _file: File,
}

impl LockFile {
    fn beside(socket: &Path) -> io::Result<Self> {
        let mut path = socket.to_owned().into_os_string();
        path.push(".lock");
        let path = PathBuf::from(path);
        Self::new(&path).map_err(|error| match error {
            TryLockError::WouldBlock => in_use(),
            TryLockError::Error(error) => {
                io::Error::new(error.kind(), format!("lock {}: {error}", path.display()))
            }
        })
    }

    fn new(path: &Path) -> Result<Self, TryLockError> {
        let open = || -> io::Result<_> {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                // Whatever somebody else has put there must neither be followed nor waited for.
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(path)?;
            let meta = file.metadata()?;
            Ok((file, (meta.dev(), meta.ino())))
        };
        loop {
            let (file, id) = open().map_err(TryLockError::Error)?;
            file.try_lock()?;
            // Else its owner has removed it in between, and others lock another one.
            if file_id(path).is_ok_and(|found| found == id) {
                return Ok(Self {
                    path: path.to_owned(),
                    _file: file,
                });
            }
        }
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Still locked. Where it cannot be removed, the next one locks the same.
        let _ = fs::remove_file(&self.path);
    }
}
