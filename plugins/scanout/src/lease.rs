// SPDX-License-Identifier: MIT OR Apache-2.0

//! A scanout lent by the machine's display manager over its lease socket; no GStreamer in it.
//!
//! Asking takes no time; the manager may take its own to answer, and [`Lease::scanout_id`] is where
//! that is waited for.
//!
//! One request and one reply on a unix stream socket, little-endian and packed. The connection says
//! that the borrower lives: when it closes, the scanout goes back.
//!
//! | request, 9 bytes | reply, 69 bytes |
//! | --- | --- |
//! | command u8: 1 lease, 2 release | status u8: 0 = done |
//! | width u32; for release the scanout id | scanout id u32 |
//! | height u32 | name char\[64\]: the connector, or what is wrong |
//!
//! The reply to a lease brings the descriptor of a DRM lease along (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use helix_protocol::wait::{Deadline, Waiter, Wake};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv,
    recvmsg, send, socket,
};

/// Where lease sockets are looked for, in this order.
pub const SOCKETS: [&str; 2] = ["/run/helix-drm/drm.sock", "/run/helix-drm.sock"];

const LEASE: u8 = 1;
const RELEASE: u8 = 2;
const REPLY: usize = 69;
/// The descriptors that are taken from one reply; one is sent.
const DESCRIPTORS: usize = 4;
/// Limit for the reply to a release: closing releases too, and nobody waits for long at the end.
const RELEASE_LIMIT: Duration = Duration::from_secs(1);

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The waker was used. The answer can still be waited for.
    #[error("cancelled")]
    Cancelled,
    /// None of the sockets is there.
    #[error(
        "there is no lease socket at {} (is helix-drm-manager running? drm-socket says where else)",
        SOCKETS.join(" or ")
    )]
    NoSocket,
    /// The manager cannot be talked to.
    #[error("{what} {}: {source}{}", .path.display(), hint(.source))]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The manager has none for us.
    #[error(
        "{} lends no scanout of {width}x{height}: {reason} (are all of them taken? scanout-id names \
         one without a lease)",
        .path.display()
    )]
    Refused {
        /// The socket.
        path: PathBuf,
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// What the manager said.
        reason: String,
    },
    /// It was ours and is not any more.
    #[error("{} ends the lease of scanout {id} at once (is helix-drm-manager all right?)", .path.display())]
    Ended {
        /// The socket.
        path: PathBuf,
        /// Which scanout.
        id: u16,
    },
    /// The manager's reply makes no sense.
    #[error("{} answers with scanout {id}; ids end at {}", .path.display(), u16::MAX)]
    Id {
        /// The socket.
        path: PathBuf,
        /// What it said.
        id: u32,
    },
}

fn hint(error: &io::Error) -> &'static str {
    if error.raw_os_error() == Some(nix::Error::ENAMETOOLONG as i32) {
        return " (a socket's address holds 107 bytes: set drm-socket to a shorter one)";
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
            " (is helix-drm-manager listening there, and is drm-socket right?)"
        }
        io::ErrorKind::PermissionDenied => " (may this user open it?)",
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::UnexpectedEof => {
            " (is that helix-drm-manager's socket? timeout is how long it is waited for)"
        }
        _ => "",
    }
}

/// A scanout that was asked for, and is ours from the manager's answer until this is released or
/// dropped.
#[derive(Debug)]
pub struct Lease {
    connection: OwnedFd,
    path: PathBuf,
    /// Pixels, for errors.
    size: (u32, u32),
    answer: Answer,
    granted: Option<Granted>,
}

/// What the manager has lent.
#[derive(Debug)]
struct Granted {
    scanout_id: u16,
    connector: String,
    /// The DRM lease. It is not used here, but the kernel ends a lease whose descriptor is closed.
    _drm: Option<OwnedFd>,
}

impl Lease {
    /// Asks for a scanout of this many pixels, and does not wait for the answer.
    pub fn ask(socket: Option<&Path>, width: u32, height: u32) -> Result<Self, LeaseError> {
        let path = match socket {
            Some(path) => path,
            None => SOCKETS
                .into_iter()
                .map(Path::new)
                .find(|path| path.exists())
                .ok_or(LeaseError::NoSocket)?,
        };
        let connection = open(path)
            .and_then(|connection| {
                ask(&connection, LEASE, width, height)?;
                Ok(connection)
            })
            .map_err(|source| LeaseError::Io {
                what: "connect to the lease socket",
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            connection,
            path: path.to_owned(),
            size: (width, height),
            answer: Answer::default(),
            granted: None,
        })
    }

    /// Which scanout it is. Waits for the manager's answer, where that was not read yet.
    pub fn scanout_id(
        &mut self,
        waiter: &mut Waiter,
        deadline: Deadline,
    ) -> Result<u16, LeaseError> {
        let id = if let Some(granted) = &self.granted {
            granted.scanout_id
        } else {
            let granted = self.wait(waiter, deadline)?;
            self.granted.insert(granted).scanout_id
        };
        if self.is_alive() {
            return Ok(id);
        }
        let path = self.path.clone();
        Err(LeaseError::Ended { path, id })
    }

    fn wait(&mut self, waiter: &mut Waiter, deadline: Deadline) -> Result<Granted, LeaseError> {
        let reply = match self.answer.wait(&self.connection, waiter, deadline) {
            Ok(Some(reply)) => reply,
            Ok(None) => return Err(LeaseError::Cancelled),
            Err(source) => {
                return Err(LeaseError::Io {
                    what: "borrow a scanout from",
                    path: self.path.clone(),
                    source,
                });
            }
        };
        if reply.status != 0 {
            return Err(LeaseError::Refused {
                path: self.path.clone(),
                width: self.size.0,
                height: self.size.1,
                reason: format!("{} (status {})", reply.name, reply.status),
            });
        }
        let scanout_id = u16::try_from(reply.scanout_id).map_err(|_| LeaseError::Id {
            path: self.path.clone(),
            id: reply.scanout_id,
        })?;
        Ok(Granted {
            scanout_id,
            connector: reply.name,
            _drm: self.answer.descriptor.take(),
        })
    }

    /// The guest's connector, for logs; empty before the answer was read.
    pub fn connector(&self) -> &str {
        self.granted
            .as_ref()
            .map_or("", |granted| &granted.connector)
    }

    /// Whether the manager still holds the other end, or its answer is still to be read. When it
    /// has gone, so has the lease.
    pub fn is_alive(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.connection.as_raw_fd(), &mut [0], flags) {
            Ok(count) => count > 0,
            Err(error) => error == nix::Error::EAGAIN,
        }
    }

    /// Gives the scanout back, so that it is free when this returns. Where it was not ours yet,
    /// closing the connection is enough.
    pub fn release(self) -> io::Result<()> {
        let Some(granted) = &self.granted else {
            return Ok(());
        };
        ask(&self.connection, RELEASE, granted.scanout_id.into(), 0)?;
        let mut waiter = Waiter::new()?;
        let deadline = Deadline::after(RELEASE_LIMIT);
        Answer::default()
            .wait(&self.connection, &mut waiter, deadline)
            .map(|_| ())
    }
}

/// Connects without waiting for a manager that has too many callers.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connection = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(connection.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(connection)
}

/// Sends a request.
fn ask(connection: &OwnedFd, command: u8, width: u32, height: u32) -> io::Result<()> {
    let mut request = [0; 9];
    request[0] = command;
    request[1..5].copy_from_slice(&width.to_le_bytes());
    request[5..9].copy_from_slice(&height.to_le_bytes());
    // Fits into any socket's buffer. Rust's runtime ignores SIGPIPE in programs only, and a plugin
    // lives in somebody else's process.
    send(connection.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

struct Reply {
    status: u8,
    scanout_id: u32,
    name: String,
}

/// An answer as far as it has come.
#[derive(Debug)]
struct Answer {
    bytes: [u8; REPLY],
    have: usize,
    /// The last one that came along; others are closed.
    descriptor: Option<OwnedFd>,
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            bytes: [0; REPLY],
            have: 0,
            descriptor: None,
        }
    }
}

impl Answer {
    /// Waits for all of it; `None` when `waiter` was cancelled.
    fn wait(
        &mut self,
        connection: &OwnedFd,
        waiter: &mut Waiter,
        deadline: Deadline,
    ) -> io::Result<Option<Reply>> {
        waiter.register(connection.as_fd())?;
        let result = self.receive_all(connection, waiter, deadline);
        waiter.deregister(connection.as_fd())?;
        result
    }

    fn receive_all(
        &mut self,
        connection: &OwnedFd,
        waiter: &mut Waiter,
        deadline: Deadline,
    ) -> io::Result<Option<Reply>> {
        while self.have < REPLY {
            match self.receive(connection) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match waiter.wait(deadline)? {
                        Wake::Cancelled => return Ok(None),
                        Wake::TimedOut => return Err(io::ErrorKind::TimedOut.into()),
                        Wake::Ready | Wake::Woken => {}
                    }
                }
                Err(error) => return Err(error),
            }
        }
        let (status, rest) = (self.bytes[0], &self.bytes[1..]);
        let (id, name) = rest.split_at(4);
        let name = name.split(|byte| *byte == 0).next().unwrap_or(name);
        Ok(Some(Reply {
            status,
            scanout_id: u32::from_le_bytes([id[0], id[1], id[2], id[3]]),
            // It goes into logs and messages, and the manager is another program.
            name: String::from_utf8_lossy(name).replace(char::is_control, " "),
        }))
    }

    /// Reads once.
    fn receive(&mut self, connection: &OwnedFd) -> io::Result<usize> {
        let mut control = nix::cmsg_space!([i32; DESCRIPTORS]);
        let mut slices = [IoSliceMut::new(&mut self.bytes[self.have..])];
        let message = recvmsg::<()>(
            connection.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                for fd in fds {
                    // SAFETY: the kernel has just made this descriptor for us, and nobody else
                    // knows it.
                    self.descriptor = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        Ok(message.bytes)
    }
}
