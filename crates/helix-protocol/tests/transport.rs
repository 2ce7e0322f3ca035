// SPDX-License-Identifier: MIT OR Apache-2.0

//! Connecting, listening, and what becomes of socket files. AF_VSOCK needs a VM: it is tested
//! where one runs.

mod sockets;

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use helix_protocol::transport::{ConnectError, is_local};
use helix_protocol::wait::{Deadline, Waiter, Wake};
use helix_protocol::{Address, Listener, Stream};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use sockets::{AT_ONCE, LONG, accept, connected, long, millis, over_tcp, pair, tcp, unix};

fn send(stream: &Stream, bytes: &[u8]) {
    let sent = stream.send(&[IoSlice::new(bytes)]).unwrap();
    assert_eq!(sent, bytes.len());
}

fn receive(stream: &Stream, waiter: &mut Waiter, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let mut filled = 0;
    while filled < count {
        match stream.recv(&mut bytes[filled..]) {
            Ok(0) => panic!("closed after {filled} of {count} bytes"),
            Ok(more) => filled += more,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                assert_eq!(waiter.wait(long()).unwrap(), Wake::Ready);
            }
        }
    }
    bytes
}

/// Says something in both directions, then ends the connection.
fn talk(client: Stream, host: &Stream) {
    let mut waiter = Waiter::new().unwrap();
    waiter.register(client.as_fd()).unwrap();
    waiter.register(host.as_fd()).unwrap();
    send(&client, b"to the host");
    assert_eq!(receive(host, &mut waiter, 11), b"to the host");
    send(host, b"to the client");
    assert_eq!(receive(&client, &mut waiter, 13), b"to the client");
    let empty = host.recv(&mut [0; 1]).unwrap_err();
    assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
    drop(client);
    loop {
        match host.recv(&mut [0; 1]) {
            Ok(count) => break assert_eq!(count, 0),
            Err(_) => assert_eq!(waiter.wait(long()).unwrap(), Wake::Ready),
        }
    }
}

fn talk_over_tcp(host: &str) {
    let listener = Listener::bind(&tcp(host)).unwrap();
    let Address::Tcp { port, .. } = *listener.address() else {
        panic!("{}", listener.address());
    };
    assert_ne!(port, 0);
    let (client, host) = connected(&listener);
    for end in [&client, &host] {
        let socket = SockRef::from(end);
        assert!(socket.tcp_nodelay().unwrap());
        assert!(socket.keepalive().unwrap());
        assert!(end.peer().starts_with("tcp:"), "{}", end.peer());
    }
    talk(client, &host);
}

#[test]
fn ipv4_carries_bytes_both_ways() {
    talk_over_tcp("127.0.0.1");
}

#[test]
fn ipv6_carries_bytes_both_ways() {
    if let Err(error) = std::net::TcpListener::bind("[::1]:0") {
        println!("SKIPPED: 1 test, this machine has no IPv6 loopback: {error}");
        return;
    }
    talk_over_tcp("::1");
}

#[test]
fn names_are_resolved() {
    // "localhost" may be ::1 first, where nobody listens: the next address is tried.
    let listener = Listener::bind(&tcp("127.0.0.1")).unwrap();
    let Address::Tcp { port, .. } = *listener.address() else {
        panic!("{}", listener.address());
    };
    let named = Address::Tcp {
        host: "localhost".to_owned(),
        port,
    };
    let mut waiter = Waiter::new().unwrap();
    let client = Stream::connect(&named, &mut waiter, long()).unwrap();
    talk(client, &accept(&listener));
}

#[test]
fn localhost_can_be_listened_on() {
    talk_over_tcp("localhost");
}

#[test]
fn other_names_cannot_be_listened_on() {
    let error = Listener::bind(&tcp("host.example")).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("tcp:host.example:0"), "{text}");
    assert!(text.contains("IP address or localhost"), "{text}");
}

#[test]
fn a_name_that_cannot_be_resolved_is_an_error_that_says_so() {
    // A label over 63 bytes is none: no name server is asked.
    let address = tcp(&"x".repeat(300));
    let mut waiter = Waiter::new().unwrap();
    let error = Stream::connect(&address, &mut waiter, long()).unwrap_err();
    assert!(matches!(error, ConnectError::Resolve { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("cannot resolve the name"), "{text}");
}

#[test]
fn unix_sockets_carry_bytes_both_ways() {
    let (_dir, address) = unix();
    let listener = Listener::bind(&address).unwrap();
    assert_eq!(*listener.address(), address);
    let (client, host) = connected(&listener);
    talk(client, &host);
}

#[test]
fn a_refused_connection_says_where_and_what_to_look_at() {
    let address = {
        let listener = Listener::bind(&tcp("127.0.0.1")).unwrap();
        listener.address().clone()
    };
    let mut waiter = Waiter::new().unwrap();
    let error = Stream::connect(&address, &mut waiter, long()).unwrap_err();
    let ConnectError::Io { source, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(source.kind(), io::ErrorKind::ConnectionRefused);
    let text = error.to_string();
    assert!(text.contains(&address.to_string()), "{text}");
    assert!(text.contains("is helix-host listening there?"), "{text}");
}

#[test]
fn a_missing_unix_socket_says_where_and_what_to_look_at() {
    let (_dir, address) = unix();
    let mut waiter = Waiter::new().unwrap();
    let error = Stream::connect(&address, &mut waiter, long()).unwrap_err();
    let ConnectError::Io { source, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
    let text = error.to_string();
    assert!(text.contains(&address.to_string()), "{text}");
    assert!(text.contains("is helix-host listening there?"), "{text}");
}

#[test]
fn a_path_too_long_for_a_socket_address_is_refused_and_never_cut() {
    // sun_path holds 108 bytes with its NUL on Linux, 104 elsewhere (unix(7), unix(4)).
    const HOLDS: usize = 103;
    let (dir, _) = unix();
    let room = HOLDS - dir.path().as_os_str().len() - 1;
    let fits = dir.path().join("f".repeat(room));
    Listener::bind(&Address::Unix(fits)).unwrap();
    for longer in [room + 5, room + 6, room + 100, 5000] {
        let address = Address::Unix(dir.path().join("l".repeat(longer)));
        let mut waiter = Waiter::new().unwrap();
        let connect = Stream::connect(&address, &mut waiter, long()).unwrap_err();
        let bind = Listener::bind(&address).unwrap_err();
        for text in [connect.to_string(), bind.to_string()] {
            assert!(text.contains("more than a socket address holds"), "{text}");
        }
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A listener that accepts nobody, its backlog filled until connecting no longer works at once.
fn full(domain: Domain, address: &SockAddr) -> (Socket, Vec<Socket>) {
    let listener = Socket::new(domain, Type::STREAM, None).unwrap();
    listener.bind(address).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut clients = Vec::new();
    loop {
        let client = Socket::new(domain, Type::STREAM, None).unwrap();
        client.set_nonblocking(true).unwrap();
        // Over TCP each begins; the kernel drops what its queue cannot hold.
        let done = client.connect(&address);
        clients.push(client);
        if clients.len() == 8 || done.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
            return (listener, clients);
        }
    }
}

fn full_unix() -> (tempfile::TempDir, Address, Socket, Vec<Socket>) {
    let (dir, address) = unix();
    let path = dir.path().join("test.sock");
    let (listener, clients) = full(Domain::UNIX, &SockAddr::unix(path).unwrap());
    (dir, address, listener, clients)
}

fn full_tcp() -> (Address, Socket, Vec<Socket>) {
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let (listener, clients) = full(Domain::IPV4, &any.into());
    let port = listener.local_addr().unwrap().as_socket().unwrap().port();
    let address = Address::Tcp {
        host: "127.0.0.1".to_owned(),
        port,
    };
    (address, listener, clients)
}

fn ends_at_the_deadline(address: &Address) {
    let mut waiter = Waiter::new().unwrap();
    let start = Instant::now();
    let error = Stream::connect(address, &mut waiter, millis(200)).unwrap_err();
    assert!(matches!(error, ConnectError::TimedOut { .. }), "{error:?}");
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert!(start.elapsed() < AT_ONCE);
    let text = error.to_string();
    assert!(text.contains(&address.to_string()), "{text}");
    assert!(text.contains("no answer in time"), "{text}");
}

#[test]
fn connecting_where_nobody_accepts_ends_at_the_deadline() {
    let (_dir, address, _listener, _clients) = full_unix();
    ends_at_the_deadline(&address);
    let (address, _listener, _clients) = full_tcp();
    ends_at_the_deadline(&address);
}

fn ends_when_cancelled(address: &Address) {
    let mut waiter = Waiter::new().unwrap();
    let waker = waiter.waker();
    let start = Instant::now();
    let canceller = thread::spawn(move || {
        // Late enough that connecting has begun on most runs; both orders must work.
        thread::sleep(Duration::from_millis(30));
        waker.cancel();
    });
    let error = Stream::connect(address, &mut waiter, Deadline::NEVER).unwrap_err();
    assert!(matches!(error, ConnectError::Cancelled), "{error:?}");
    assert!(start.elapsed() < AT_ONCE);
    canceller.join().unwrap();
    // Nothing is left behind in the waiter.
    waiter.waker().reset();
    assert_eq!(waiter.wait(millis(1)).unwrap(), Wake::TimedOut);
}

#[test]
fn connecting_ends_when_another_thread_cancels() {
    let (_dir, address, _listener, _clients) = full_unix();
    ends_when_cancelled(&address);
    let (address, _listener, _clients) = full_tcp();
    ends_when_cancelled(&address);
}

#[test]
fn a_full_unix_socket_is_tried_until_there_is_room() {
    let (_dir, address, listener, clients) = full_unix();
    let start = Instant::now();
    let connector = thread::spawn(move || {
        let mut waiter = Waiter::new().unwrap();
        Stream::connect(&address, &mut waiter, long()).map(|_| ())
    });
    // Nobody can see that the other thread waits. Most likely it does by now.
    thread::sleep(Duration::from_millis(30));
    for _ in clients {
        listener.accept().unwrap();
    }
    connector.join().unwrap().unwrap();
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn a_wake_up_does_not_end_connecting() {
    let (_dir, address, _listener, _clients) = full_unix();
    let mut waiter = Waiter::new().unwrap();
    let waker = waiter.waker();
    waker.wake();
    let error = Stream::connect(&address, &mut waiter, millis(50)).unwrap_err();
    assert!(matches!(error, ConnectError::TimedOut { .. }), "{error:?}");
}

#[test]
fn a_stale_unix_socket_is_replaced() {
    let (dir, address) = unix();
    drop(UnixListener::bind(dir.path().join("test.sock")).unwrap());
    let listener = Listener::bind(&address).unwrap();
    let (client, host) = connected(&listener);
    talk(client, &host);
}

#[test]
fn a_unix_socket_that_somebody_listens_on_is_left_to_them() {
    let (dir, address) = unix();
    let first = Listener::bind(&address).unwrap();
    let text = Listener::bind(&address).unwrap_err().to_string();
    assert!(text.contains("another program listens there"), "{text}");
    let (client, host) = connected(&first);
    talk(client, &host);
    drop(first);

    // The same where the other one is too busy to accept.
    let path = dir.path().join("test.sock");
    let (_listener, _clients) = full(Domain::UNIX, &SockAddr::unix(&path).unwrap());
    let text = Listener::bind(&address).unwrap_err().to_string();
    assert!(text.contains("another program listens there"), "{text}");
    assert!(path.exists());
}

#[test]
fn of_all_who_find_a_stale_unix_socket_at_once_one_gets_it() {
    const AT_A_TIME: usize = 8;
    for _ in 0..100 {
        let (dir, address) = unix();
        drop(UnixListener::bind(dir.path().join("test.sock")).unwrap());
        let (start, done) = (Barrier::new(AT_A_TIME), Barrier::new(AT_A_TIME));
        let bind = || {
            start.wait();
            let listener = Listener::bind(&address);
            // Nobody is late, and comes when the winner has gone.
            done.wait();
            listener
        };
        let results = thread::scope(|scope| {
            let threads = [(); AT_A_TIME].map(|()| scope.spawn(bind));
            threads.map(|thread| thread.join().unwrap())
        });
        let (winners, losers): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        assert_eq!(winners.len(), 1, "{winners:?} listen");
        for error in losers {
            let text = error.unwrap_err().to_string();
            assert!(text.contains("another program listens there"), "{text}");
        }
        let listener = winners.into_iter().next().unwrap().unwrap();
        let (client, host) = connected(&listener);
        talk(client, &host);
        drop(listener);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_lock_file_that_was_left_behind_is_no_hindrance() {
    let (dir, address) = unix();
    let lock = dir.path().join("test.sock.lock");
    fs::write(&lock, "").unwrap();
    drop(Listener::bind(&address).unwrap());
    assert!(!lock.exists());

    // What is no lock file is not followed.
    symlink(dir.path().join("elsewhere"), &lock).unwrap();
    let text = Listener::bind(&address).unwrap_err().to_string();
    assert!(
        text.contains("lock ") && text.contains("test.sock.lock"),
        "{text}"
    );
    assert!(!dir.path().join("elsewhere").exists());
}

#[test]
fn a_file_that_is_no_stream_socket_is_left_alone() {
    let (dir, address) = unix();
    let path = dir.path().join("test.sock");

    fs::write(&path, "precious").unwrap();
    let text = Listener::bind(&address).unwrap_err().to_string();
    assert!(text.contains("no socket"), "{text}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    fs::remove_file(&path).unwrap();

    fs::create_dir(&path).unwrap();
    Listener::bind(&address).unwrap_err();
    assert!(path.is_dir());
    fs::remove_dir(&path).unwrap();

    symlink(dir.path().join("elsewhere"), &path).unwrap();
    Listener::bind(&address).unwrap_err();
    assert!(path.is_symlink());
    fs::remove_file(&path).unwrap();

    let _datagram = UnixDatagram::bind(&path).unwrap();
    Listener::bind(&address).unwrap_err();
    assert!(path.exists());
}

#[test]
fn a_socket_file_is_for_its_owner_alone() {
    let (dir, address) = unix();
    let _listener = Listener::bind(&address).unwrap();
    let meta = fs::metadata(dir.path().join("test.sock")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_socket_file_goes_with_its_listener() {
    let (dir, address) = unix();
    let path = dir.path().join("test.sock");
    let listener = Listener::bind(&address).unwrap();
    assert!(path.exists());
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_socket_file_that_replaced_ours_stays() {
    let (dir, address) = unix();
    let path = dir.path().join("test.sock");
    let ours = Listener::bind(&address).unwrap();
    // Kept under another name, so that its inode is not given to the next file.
    fs::rename(&path, dir.path().join("moved")).unwrap();
    let _theirs = UnixListener::bind(&path).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    drop(ours);
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    UnixStream::connect(&path).unwrap();
}

#[test]
fn writing_to_a_peer_that_has_gone_is_an_error_and_no_signal() {
    // A blocked SIGPIPE stays pending instead of killing (or of being ignored, as Rust's own
    // programs ignore it): then it can be seen.
    // SAFETY: both sets are initialised by sigemptyset() before use, and the calls touch nothing
    // but them and this thread's signal mask, which ends with the test.
    let pending = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        for (client, host) in [pair(), over_tcp()] {
            drop(host);
            // TCP learns of it from the answer to the first bytes.
            let start = Instant::now();
            let error = loop {
                match client.send(&[IoSlice::new(b"hello")]) {
                    Ok(_) => thread::yield_now(),
                    Err(error) => break error,
                }
                assert!(start.elapsed() < LONG);
            };
            assert!(
                matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ),
                "{error}"
            );
            // The second is certain to be EPIPE, which is what comes with the signal.
            let error = client.send(&[IoSlice::new(b"hello")]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
        libc::sigemptyset(&raw mut set);
        libc::sigpending(&raw mut set);
        libc::sigismember(&raw const set, libc::SIGPIPE)
    };
    assert_eq!(pending, 0);
}

#[test]
fn one_waiter_serves_several_listeners() {
    const CLIENTS: usize = 20;
    let (_dir, address) = unix();
    let listeners = [
        Listener::bind(&address).unwrap(),
        Listener::bind(&tcp("127.0.0.1")).unwrap(),
        Listener::bind(&tcp("127.0.0.1")).unwrap(),
    ];
    let mut waiter = Waiter::new().unwrap();
    for listener in &listeners {
        waiter.register(listener.as_fd()).unwrap();
    }
    let addresses = listeners.each_ref().map(|l| l.address().clone());
    let clients: Vec<_> = addresses
        .into_iter()
        .map(|address| {
            thread::spawn(move || {
                let mut waiter = Waiter::new().unwrap();
                let connect = |_| Stream::connect(&address, &mut waiter, long()).unwrap();
                (0..CLIENTS).map(connect).collect::<Vec<_>>()
            })
        })
        .collect();
    let mut accepted = [0; 3];
    while accepted.iter().sum::<usize>() < 3 * CLIENTS {
        for (listener, count) in listeners.iter().zip(&mut accepted) {
            while listener.accept().unwrap().is_some() {
                *count += 1;
            }
        }
        if accepted.iter().sum::<usize>() < 3 * CLIENTS {
            assert_eq!(waiter.wait(long()).unwrap(), Wake::Ready);
        }
    }
    assert_eq!(accepted, [CLIENTS; 3]);
    for client in clients {
        assert_eq!(client.join().unwrap().len(), CLIENTS);
    }
}

#[test]
fn ending_a_stream_from_the_side_ends_a_wait_for_it() {
    let (client, _host) = pair();
    let mut waiter = Waiter::new().unwrap();
    waiter.register(client.as_fd()).unwrap();
    // The first edge says that it can be written.
    assert_eq!(waiter.wait(long()).unwrap(), Wake::Ready);
    thread::scope(|scope| {
        scope.spawn(|| client.shutdown());
        assert_eq!(waiter.wait(long()).unwrap(), Wake::Ready);
    });
    assert_eq!(client.recv(&mut [0; 1]).unwrap(), 0);
    // A second time does no harm.
    client.shutdown();
}

#[test]
fn local_addresses_are_told_from_others() {
    for (address, local) in [
        ("tcp:127.0.0.1:1", true),
        ("tcp:[::1]:1", true),
        ("tcp:localhost:1", true),
        ("tcp:0.0.0.0:1", false),
        ("tcp:[::]:1", false),
        ("tcp:192.0.2.1:1", false),
        ("unix:/x", true),
        ("vsock:5000", false),
        // Guests reach what listens on the host's own context id.
        ("vsock:2:5000", false),
        ("vsock:1:5000", true),
    ] {
        assert_eq!(is_local(&address.parse().unwrap()), local, "{address}");
    }
}

#[test]
fn a_silent_port_is_explained_by_what_the_address_is() {
    let said = |address: &str| {
        let error = ConnectError::Io {
            address: address.parse().unwrap(),
            source: io::ErrorKind::TimedOut.into(),
        };
        error.to_string()
    };
    let vsock = said("vsock:2:5000");
    assert!(vsock.starts_with("connect to vsock:2:5000: "), "{vsock}");
    assert!(
        vsock.ends_with(" (is helix-host listening on that port?)"),
        "{vsock}"
    );
    let tcp = said("tcp:192.0.2.1:5000");
    assert!(
        tcp.ends_with(" (is the machine reachable and helix-host running?)"),
        "{tcp}"
    );
}
