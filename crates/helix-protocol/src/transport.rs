// SPDX-License-Identifier: MIT OR Apache-2.0

//! Sockets: TCP, unix and AF_VSOCK behind one [`Stream`] and one [`Listener`].
//!
//! All of them are non-blocking; whoever must wait does so in a [`Waiter`].

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};

use crate::address::{Address, VSOCK_CID_LOCAL};
use crate::socket_file::SocketFile;
use crate::wait::{Deadline, Waiter, Wake};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// How soon a unix socket with a full backlog is tried again: the kernel does not say when.
const BACKLOG_RETRY: Duration = Duration::from_millis(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Somebody used [`crate::wait::Waker::cancel`].
    #[error("connecting was cancelled")]
    Cancelled,
    /// The peer, or the name service, did not answer in time.
    #[error(
        "connect to {address}: no answer in time (is the machine reachable and helix-host running?)"
    )]
    TimedOut {
        /// Whom.
        address: Address,
    },
    /// The name has no address.
    #[error("connect to {address}: cannot resolve the name: {source}")]
    Resolve {
        /// Whom.
        address: Address,
        /// What the resolver said.
        source: io::Error,
    },
    /// Anything else the system said.
    #[error("connect to {address}: {source}{}", hint(.address, .source))]
    Io {
        /// Whom.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
}

fn hint(address: &Address, error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::NotFound
        | io::ErrorKind::ConnectionReset => " (is helix-host listening there?)",
        // What a guest's kernel says after 2 s when the host's side of AF_VSOCK leaves a request for a
        // port that nobody listens on without an answer, as vhost-device-vsock does.
        io::ErrorKind::TimedOut if matches!(address, Address::Vsock { .. }) => {
            " (is helix-host listening on that port?)"
        }
        io::ErrorKind::TimedOut => " (is the machine reachable and helix-host running?)",
        io::ErrorKind::PermissionDenied => " (may this user open it?)",
        io::ErrorKind::Unsupported => " (does this machine have AF_VSOCK?)",
        _ => "",
    }
}

/// Why nobody can be listened to.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address}: {source}")]
pub struct BindError {
    address: Address,
    source: io::Error,
}

/// A connected, non-blocking stream socket.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
}

impl Stream {
    /// Connects within `deadline`. Other wake-ups of `waiter` than cancellation may get lost here.
    pub fn connect(
        address: &Address,
        waiter: &mut Waiter,
        deadline: Deadline,
    ) -> Result<Self, ConnectError> {
        let failed = |source| ConnectError::Io {
            address: address.clone(),
            source,
        };
        let candidates = match address {
            Address::Tcp { host, port } => resolve(address, host, *port, waiter, deadline)?
                .into_iter()
                .map(|addr| (Domain::for_address(addr), addr.into()))
                .collect(),
            Address::Unix(path) => vec![(Domain::UNIX, unix_address(path).map_err(failed)?)],
            #[cfg(target_os = "linux")]
            Address::Vsock { cid, port } => vec![(Domain::VSOCK, SockAddr::vsock(*cid, *port))],
            #[cfg(not(target_os = "linux"))]
            Address::Vsock { .. } => return Err(failed(io::ErrorKind::Unsupported.into())),
        };
        // Each address gets its share of the time that is left, so that a dead one leaves some.
        let mut last = None;
        let count = candidates.len() as u32;
        for (index, (domain, candidate)) in (0..).zip(candidates) {
            let share = deadline.instant().map_or(Deadline::NEVER, |end| {
                let left = end.saturating_duration_since(Instant::now());
                Deadline::after(left / (count - index))
            });
            match connect_one(domain, &candidate, waiter, share) {
                Ok(socket) => return Ok(Self { socket }),
                Err(Failure::Cancelled) => return Err(ConnectError::Cancelled),
                Err(Failure::TimedOut) => {
                    last = Some(ConnectError::TimedOut {
                        address: address.clone(),
                    });
                }
                Err(Failure::Io(source)) => last = Some(failed(source)),
            }
        }
        Err(last.unwrap_or_else(|| failed(io::ErrorKind::AddrNotAvailable.into())))
    }

    fn accepted(socket: Socket) -> io::Result<Self> {
        prepare(&socket)?;
        Ok(Self { socket })
    }

    /// Reads what is there, at most `space.len()` bytes. 0 means that the peer has closed.
    pub fn recv(&self, space: &mut [u8]) -> io::Result<usize> {
        // SAFETY: `MaybeUninit<u8>` has the layout of `u8`, and recv() writes only initialised
        // bytes into the memory, so that it is as initialised afterwards as it was before.
        let space = unsafe {
            std::slice::from_raw_parts_mut(
                space.as_mut_ptr().cast::<MaybeUninit<u8>>(),
                space.len(),
            )
        };
        self.socket.recv(space)
    }

    /// Sends as much as the socket takes now, and returns how much that was.
    pub fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        // A plugin lives in somebody else's process: no SIGPIPE for it.
        #[cfg(target_os = "linux")]
        return self
            .socket
            .send_vectored_with_flags(slices, libc::MSG_NOSIGNAL);
        #[cfg(not(target_os = "linux"))]
        return self.socket.send_vectored(slices);
    }

    /// Ends both directions; a wait for this socket ends too.
    pub fn shutdown(&self) {
        // Fails only where the connection is gone already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Who is at the other end, for logs.
    pub fn peer(&self) -> String {
        let Ok(peer) = self.socket.peer_addr() else {
            return "a closed connection".to_owned();
        };
        if let Some(addr) = peer.as_socket() {
            return format!("tcp:{addr}");
        }
        #[cfg(target_os = "linux")]
        if let Some((cid, port)) = peer.as_vsock_address() {
            return format!("vsock:{cid}:{port}");
        }
        "a unix socket".to_owned()
    }

    /// The context id of the other end's machine, over AF_VSOCK; the kernel vouches for it.
    pub fn peer_cid(&self) -> Option<u32> {
        #[cfg(target_os = "linux")]
        let cid = self
            .socket
            .peer_addr()
            .ok()
            .and_then(|peer| peer.as_vsock_address())
            .map(|(cid, _)| cid);
        #[cfg(not(target_os = "linux"))]
        let cid = None;
        cid
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

enum Failure {
    Cancelled,
    TimedOut,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Bytes that wait in a client's unix socket. A picture goes through in so many pieces, each with a
/// wake-up on both sides. The kernel permits net.core.wmem_max of it, and then doubles that (socket(7),
/// `SO_SNDBUF`); its usual limit, 212992, is little less. More makes the median frame faster by a tenth, and one
/// in a hundred slower by milliseconds (docs/performance.md).
pub const UNIX_SEND_BUFFER: usize = 1 << 18;

fn connect_one(
    domain: Domain,
    address: &SockAddr,
    waiter: &mut Waiter,
    deadline: Deadline,
) -> Result<Socket, Failure> {
    let socket = Socket::new(domain, Type::STREAM, None)?;
    prepare(&socket)?;
    if domain == Domain::UNIX {
        // It works with less, too.
        let _ = socket.set_send_buffer_size(UNIX_SEND_BUFFER);
    }
    loop {
        let retry = match socket.connect(address) {
            Ok(()) => return Ok(socket),
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Deadline::after(BACKLOG_RETRY)
            }
            Err(error) => return Err(error.into()),
        };
        match waiter.wait(retry.min(deadline))? {
            Wake::Cancelled => return Err(Failure::Cancelled),
            _ if deadline.has_passed() => return Err(Failure::TimedOut),
            _ => {}
        }
    }
    waiter.register(socket.as_fd())?;
    let result = loop {
        match waiter.wait(deadline)? {
            Wake::Cancelled => break Err(Failure::Cancelled),
            Wake::TimedOut => break Err(Failure::TimedOut),
            Wake::Ready | Wake::Woken => {}
        }
        if let Some(error) = socket.take_error()? {
            break Err(error.into());
        }
        match socket.peer_addr() {
            Ok(_) => break Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
            Err(error) => break Err(error.into()),
        }
    };
    waiter.deregister(socket.as_fd())?;
    result.map(|()| socket)
}

fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    #[cfg(target_vendor = "apple")]
    socket.set_nosigpipe(true)?;
    if matches!(socket.domain()?, Domain::IPV4 | Domain::IPV6) {
        socket.set_tcp_nodelay(true)?;
        // A dead peer behind NAT or QEMU's user networking sends no FIN (L25): half a minute.
        socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(Duration::from_secs(15))
                .with_interval(Duration::from_secs(5))
                .with_retries(3),
        )?;
    }
    Ok(())
}

/// Asks the name service, which may take long and cannot be interrupted, in a thread of its own.
fn resolve(
    address: &Address,
    host: &str,
    port: u16,
    waiter: &mut Waiter,
    deadline: Deadline,
) -> Result<Vec<SocketAddr>, ConnectError> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![(ip, port).into()]);
    }
    let failed = |source| ConnectError::Resolve {
        address: address.clone(),
        source,
    };
    let (answer, question) = mpsc::sync_channel(1);
    let waker = waiter.waker();
    let name = host.to_owned();
    thread::Builder::new()
        .name("helix-resolve".to_owned())
        .spawn(move || {
            let found = (name.as_str(), port).to_socket_addrs().map(Vec::from_iter);
            // The asker may have given up.
            let _ = answer.send(found);
            waker.wake();
        })
        .map_err(failed)?;
    loop {
        match question.try_recv() {
            Ok(found) => return found.map_err(failed),
            Err(mpsc::TryRecvError::Empty) => {}
            Err(mpsc::TryRecvError::Disconnected) => {
                return Err(failed(io::Error::other(
                    "the resolver ended without an answer",
                )));
            }
        }
        match waiter.wait(deadline).map_err(failed)? {
            Wake::Cancelled => return Err(ConnectError::Cancelled),
            Wake::TimedOut => {
                return Err(ConnectError::TimedOut {
                    address: address.clone(),
                });
            }
            Wake::Ready | Wake::Woken => {}
        }
    }
}

fn unix_address(path: &Path) -> io::Result<SockAddr> {
    SockAddr::unix(path).map_err(|error| {
        let length = path.as_os_str().len();
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the path has {length} bytes, more than a socket address holds: {error}"),
        )
    })
}

/// A non-blocking listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
    /// The socket file; dropping it removes it.
    _file: Option<SocketFile>,
}

impl Listener {
    /// Starts listening. A unix socket file that nobody listens on any more is replaced; one that
    /// somebody does is an error, and so is any other file. A new one is for its owner alone, and
    /// has a lock file beside it, `PATH.lock`, for as long as this lives.
    pub fn bind(address: &Address) -> Result<Self, BindError> {
        Self::try_bind(address).map_err(|source| BindError {
            address: address.clone(),
            source,
        })
    }

    fn try_bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp { host, port } => {
                let ip = match host.as_str() {
                    "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
                    host => host.parse().map_err(|_| {
                        io::Error::new(
                            io::ErrorKind::InvalidInput,
                            "a listening address must be an IP address or localhost",
                        )
                    })?,
                };
                let wanted = SocketAddr::new(ip, *port);
                let socket = listening(Domain::for_address(wanted), |socket| {
                    socket.set_reuse_address(true)?;
                    socket.bind(&wanted.into())
                })?;
                let bound = socket.local_addr()?.as_socket().unwrap_or(wanted);
                let address = Address::Tcp {
                    host: bound.ip().to_string(),
                    port: bound.port(),
                };
                Ok(Self {
                    socket,
                    address,
                    _file: None,
                })
            }
            Address::Unix(path) => {
                let wanted = unix_address(path)?;
                let mut file = None;
                let socket = listening(Domain::UNIX, |socket| {
                    file = Some(SocketFile::bind(socket, path, &wanted)?);
                    Ok(())
                })?;
                Ok(Self {
                    socket,
                    address: address.clone(),
                    _file: file,
                })
            }
            #[cfg(target_os = "linux")]
            Address::Vsock { cid, port } => {
                let wanted = SockAddr::vsock(*cid, *port);
                let socket = listening(Domain::VSOCK, |socket| socket.bind(&wanted))?;
                Ok(Self {
                    socket,
                    address: address.clone(),
                    _file: None,
                })
            }
            #[cfg(not(target_os = "linux"))]
            Address::Vsock { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// The address in use; a port of 0 has become a real one.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The next client, or `None` while there is none.
    ///
    /// An error may pass (too many open files): wait a little and try again.
    pub fn accept(&self) -> io::Result<Option<Stream>> {
        loop {
            match self.socket.accept() {
                // One that is gone before it could be set up does not count.
                Ok((socket, _)) => {
                    if let Ok(stream) = Stream::accepted(socket) {
                        return Ok(Some(stream));
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn listening(domain: Domain, bind: impl FnOnce(&Socket) -> io::Result<()>) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    bind(&socket)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Whether an [`Address`] can be reached from this machine only.
pub fn is_local(address: &Address) -> bool {
    match address {
        Address::Unix(_) => true,
        Address::Vsock { cid, .. } => *cid == VSOCK_CID_LOCAL,
        Address::Tcp { host, .. } => {
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
        }
    }
}
