// SPDX-License-Identifier: MIT OR Apache-2.0

//! Sockets for tests: addresses that nobody else uses, and both ends of a connection.

#![allow(dead_code, reason = "each test program uses a part")]

use std::os::fd::AsFd;
use std::time::Duration;

use helix_protocol::wait::{Deadline, Waiter, Wake};
use helix_protocol::{Address, Listener, Stream};
use tempfile::TempDir;

/// Generous: catches a hang, measures nothing.
pub const LONG: Duration = Duration::from_secs(20);

/// What "at once" must stay under on a busy machine, and far from [`LONG`].
pub const AT_ONCE: Duration = Duration::from_secs(5);

pub fn long() -> Deadline {
    Deadline::after(LONG)
}

pub fn millis(millis: u64) -> Deadline {
    Deadline::after(Duration::from_millis(millis))
}

/// A folder and the address of a unix socket in it.
pub fn unix() -> (TempDir, Address) {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("test.sock"));
    (dir, address)
}

/// A port of `host` that the system chooses.
pub fn tcp(host: &str) -> Address {
    Address::Tcp {
        host: host.to_owned(),
        port: 0,
    }
}

/// The next client of `listener`.
pub fn accept(listener: &Listener) -> Stream {
    let mut waiter = Waiter::new().unwrap();
    waiter.register(listener.as_fd()).unwrap();
    loop {
        if let Some(stream) = listener.accept().unwrap() {
            return stream;
        }
        assert_eq!(waiter.wait(long()).unwrap(), Wake::Ready);
    }
}

/// Both ends of a connection over a unix socket: the client's, the host's.
pub fn pair() -> (Stream, Stream) {
    let (_dir, address) = unix();
    connected(&Listener::bind(&address).unwrap())
}

/// Both ends of a connection to `listener`.
pub fn connected(listener: &Listener) -> (Stream, Stream) {
    let mut waiter = Waiter::new().unwrap();
    let client = Stream::connect(listener.address(), &mut waiter, long()).unwrap();
    (client, accept(listener))
}

/// The same over TCP.
pub fn over_tcp() -> (Stream, Stream) {
    connected(&Listener::bind(&tcp("127.0.0.1")).unwrap())
}

/// Makes the buffers of a socket this small, or as small as the system lets them be.
pub fn small_buffers(stream: &Stream, size: usize) {
    let socket = socket2::SockRef::from(stream);
    socket.set_send_buffer_size(size).unwrap();
    socket.set_recv_buffer_size(size).unwrap();
}
