// SPDX-License-Identifier: MIT OR Apache-2.0

//! A scanout lent by the machine's display manager over its lease socket; no GStreamer in it.
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
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send};

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
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
            " (is helix-drm-manager listening there, and is drm-socket right?)"
        }
        io::ErrorKind::PermissionDenied => " (may this user open it?)",
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::UnexpectedEof => {
            " (is that helix-drm-manager's socket? timeout is how long it is waited for)"
        }
        // A path longer than a socket address holds.
        io::ErrorKind::InvalidInput => " (set drm-socket to a shorter one)",
        _ => "",
    }
}

/// A scanout that is ours until this is released or dropped.
#[derive(Debug)]
pub struct Lease {
    connection: UnixStream,
    scanout_id: u16,
    connector: String,
    /// The DRM lease. It is not used here, but the kernel ends a lease whose descriptor is closed.
    _drm: Option<OwnedFd>,
}

impl Lease {
    /// Borrows a scanout of this many pixels. `limit` is for the reply; `None` = no limit.
    pub fn take(
        socket: Option<&Path>,
        width: u32,
        height: u32,
        limit: Option<Duration>,
    ) -> Result<Self, LeaseError> {
        let path = match socket {
            Some(path) => path,
            None => SOCKETS
                .into_iter()
                .map(Path::new)
                .find(|path| path.exists())
                .ok_or(LeaseError::NoSocket)?,
        };
        let failed = |what| {
            move |source| LeaseError::Io {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let connection =
            UnixStream::connect(path).map_err(failed("connect to the lease socket"))?;
        let (reply, drm) = exchange(&connection, LEASE, width, height, limit)
            .map_err(failed("borrow a scanout from"))?;
        if reply.status != 0 {
            return Err(LeaseError::Refused {
                path: path.to_owned(),
                width,
                height,
                reason: format!("{} (status {})", reply.name, reply.status),
            });
        }
        let scanout_id = u16::try_from(reply.scanout_id).map_err(|_| LeaseError::Id {
            path: path.to_owned(),
            id: reply.scanout_id,
        })?;
        Ok(Self {
            connection,
            scanout_id,
            connector: reply.name,
            _drm: drm,
        })
    }

    /// Which scanout it is.
    pub fn scanout_id(&self) -> u16 {
        self.scanout_id
    }

    /// The guest's connector, for logs.
    pub fn connector(&self) -> &str {
        &self.connector
    }

    /// Whether the manager still holds the other end. When it has gone, so has the lease.
    pub fn is_alive(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.connection.as_raw_fd(), &mut [0], flags) {
            Ok(count) => count > 0,
            Err(error) => error == nix::Error::EAGAIN,
        }
    }

    /// Gives the scanout back, so that it is free when this returns.
    pub fn release(self) -> io::Result<()> {
        let id = self.scanout_id.into();
        exchange(&self.connection, RELEASE, id, 0, Some(RELEASE_LIMIT)).map(|_| ())
    }
}

struct Reply {
    status: u8,
    scanout_id: u32,
    name: String,
}

/// Sends a request and waits for its reply, and the descriptor that came with it.
fn exchange(
    connection: &UnixStream,
    command: u8,
    width: u32,
    height: u32,
    limit: Option<Duration>,
) -> io::Result<(Reply, Option<OwnedFd>)> {
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    let mut request = [0; 9];
    request[0] = command;
    request[1..5].copy_from_slice(&width.to_le_bytes());
    request[5..9].copy_from_slice(&height.to_le_bytes());
    // Fits into any socket's buffer. Rust's runtime ignores SIGPIPE in programs only, and a plugin
    // lives in somebody else's process.
    send(connection.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL)?;
    let mut reply = [0; REPLY];
    let mut have = 0;
    let mut descriptor = None;
    while have < REPLY {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connection.set_read_timeout(left)?;
        match receive(connection, &mut reply[have..], &mut descriptor) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let name = &reply[5..];
    let name = name.split(|byte| *byte == 0).next().unwrap_or(name);
    let reply = Reply {
        status: reply[0],
        scanout_id: u32::from_le_bytes([reply[1], reply[2], reply[3], reply[4]]),
        // It goes into logs and messages, and the manager is another program.
        name: String::from_utf8_lossy(name).replace(char::is_control, " "),
    };
    Ok((reply, descriptor))
}

/// Reads once; the last descriptor that came is kept, others are closed.
fn receive(
    connection: &UnixStream,
    space: &mut [u8],
    descriptor: &mut Option<OwnedFd>,
) -> io::Result<usize> {
    let mut control = nix::cmsg_space!([i32; DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(space)];
    let message = recvmsg::<()>(
        connection.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows
                // it.
                *descriptor = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok(message.bytes)
}
