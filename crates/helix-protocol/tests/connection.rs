// SPDX-License-Identifier: MIT OR Apache-2.0

//! Both directions of a connection at once, and every way in which one can end.

mod sockets;

use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use helix_protocol::connection::{Body, ConnectionError, Event, Reading};
use helix_protocol::decode::STAGE;
use helix_protocol::encode::{self, Head};
use helix_protocol::message::{ErrorCode, ErrorMessage, FrameRequest};
use helix_protocol::wait::{Deadline, Waiter, Waker};
use helix_protocol::{Address, Connection, DecodeError, Limits, Listener, Message, Stream};
use sockets::{AT_ONCE, LONG, accept, long, millis, over_tcp, pair, small_buffers, unix};

fn connection<B: Body>(stream: Stream) -> (Connection<B>, Waiter) {
    let waiter = Waiter::new().unwrap();
    let connection = Connection::new(stream, Limits::default(), &waiter).unwrap();
    (connection, waiter)
}

/// A peer that is no [`Connection`]: a plain socket, to misbehave with.
fn against_a_plain_socket<B: Body>() -> (Connection<B>, Waiter, UnixStream) {
    let (_dir, address) = unix();
    let listener = Listener::bind(&address).unwrap();
    let Address::Unix(path) = address else {
        panic!("{address}");
    };
    let peer = UnixStream::connect(path).unwrap();
    let (connection, waiter) = connection(accept(&listener));
    (connection, waiter, peer)
}

fn request(pixels: usize) -> Head {
    encode::frame_request(1, &FrameRequest::default(), pixels as u32)
}

/// Bytes that show when one is lost, doubled or out of place.
fn pattern(size: usize, seed: u8) -> Vec<u8> {
    (0..size)
        .map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8 ^ seed)
        .collect()
}

fn next_message<B: Body>(connection: &mut Connection<B>, waiter: &mut Waiter) -> Message {
    loop {
        match connection.next(waiter, long()).unwrap() {
            Event::Message(envelope) => return envelope.message,
            Event::Drained | Event::Woken => {}
            Event::TimedOut => panic!("no message within {LONG:?}"),
        }
    }
}

fn next_pixels<B: Body>(connection: &mut Connection<B>, waiter: &mut Waiter) -> Vec<u8> {
    match next_message(connection, waiter) {
        Message::FrameRequest(_, Some(pixels)) => pixels.to_vec(),
        other => panic!("{other:?}"),
    }
}

fn drain<B: Body>(connection: &mut Connection<B>, waiter: &mut Waiter) {
    while connection.queued() > 0 {
        match connection.next(waiter, long()).unwrap() {
            Event::Drained => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn both_ends_may_send_much_at_once() {
    const SIZE: usize = 8 << 20;
    const COUNT: usize = 3;
    // TCP crawls where a window holds less than its packets: 64 KiB on the loopback.
    for ((left, right), buffer) in [(pair(), 1), (over_tcp(), 128 << 10)] {
        small_buffers(&left, buffer);
        small_buffers(&right, buffer);
        let end = |stream: Stream, mine: u8, theirs: u8| {
            let (mut connection, mut waiter) = connection(stream);
            let body: Arc<[u8]> = pattern(SIZE, mine).into();
            for _ in 0..COUNT {
                connection.send_with(request(SIZE), body.clone());
            }
            let expected = pattern(SIZE, theirs);
            let mut received = 0;
            while received < COUNT || connection.queued() > 0 {
                match connection.next(&mut waiter, long()).unwrap() {
                    Event::Message(envelope) => match envelope.message {
                        Message::FrameRequest(_, Some(pixels)) => {
                            assert!(*pixels == *expected);
                            received += 1;
                        }
                        other => panic!("{other:?}"),
                    },
                    Event::Drained => {}
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(connection.bytes_sent(), (COUNT * (SIZE + 56)) as u64);
            assert_eq!(connection.bytes_received(), connection.bytes_sent());
            // The other one may still be sending.
            connection
        };
        thread::scope(|scope| {
            let left = scope.spawn(|| end(left, 1, 2));
            let right = scope.spawn(|| end(right, 2, 1));
            let _ends = (left.join().unwrap(), right.join().unwrap());
        });
    }
}

/// Rows that lie apart, as those of a video frame with padding do.
struct Rows {
    data: Vec<Vec<u8>>,
    /// Where each row begins.
    starts: Vec<usize>,
    size: usize,
}

impl Rows {
    fn new(rows: Vec<Vec<u8>>) -> Self {
        let mut size = 0;
        let starts = rows
            .iter()
            .map(|row| {
                size += row.len();
                size - row.len()
            })
            .collect();
        Self {
            data: rows,
            starts,
            size,
        }
    }
}

impl Body for Rows {
    fn size(&self) -> usize {
        self.size
    }

    fn slices<'a>(&'a self, offset: usize, slices: &mut [IoSlice<'a>]) -> usize {
        let first = self.starts.partition_point(|&start| start <= offset) - 1;
        let mut skip = offset - self.starts[first];
        let mut count = 0;
        for (row, slice) in self.data[first..].iter().zip(slices) {
            *slice = IoSlice::new(&row[skip..]);
            skip = 0;
            count += 1;
        }
        count
    }
}

#[test]
fn a_body_of_more_rows_than_one_call_takes_arrives_whole() {
    // IOV_MAX is 1024.
    let rows: Vec<_> = (0..5000)
        .map(|row| pattern(1 + row % 97, row as u8))
        .collect();
    let expected = rows.concat();
    for small in [true, false] {
        let (left, right) = pair();
        if small {
            small_buffers(&left, 1);
            small_buffers(&right, 1);
        }
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut connection, mut waiter) = connection(left);
                for _ in 0..2 {
                    connection.send_with(request(expected.len()), Rows::new(rows.clone()));
                }
                drain(&mut connection, &mut waiter);
            });
            let (mut connection, mut waiter) = connection::<()>(right);
            for _ in 0..2 {
                assert!(next_pixels(&mut connection, &mut waiter) == expected);
            }
        });
    }
}

#[test]
fn messages_arrive_in_the_order_in_which_they_were_queued() {
    let (left, right) = pair();
    small_buffers(&left, 1);
    let sizes = |n: u16| usize::from(n) * 37 % 5000;
    thread::scope(|scope| {
        scope.spawn(move || {
            let (mut connection, mut waiter) = connection(left);
            for n in 0..500 {
                if n % 3 == 0 {
                    connection.send(encode::ping(n));
                } else {
                    let head = encode::frame_request(n, &FrameRequest::default(), sizes(n) as u32);
                    connection.send_with(head, pattern(sizes(n), n as u8));
                }
            }
            assert_eq!(connection.queued(), 500);
            drain(&mut connection, &mut waiter);
        });
        let (mut connection, mut waiter) = connection::<()>(right);
        for n in 0..500 {
            let Event::Message(envelope) = connection.next(&mut waiter, long()).unwrap() else {
                panic!("no message {n}");
            };
            assert_eq!(envelope.session_id, n);
            match envelope.message {
                Message::Ping => assert_eq!(n % 3, 0),
                Message::FrameRequest(_, pixels) => {
                    assert!(*pixels.unwrap_or(vec![].into()) == *pattern(sizes(n), n as u8));
                }
                other => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn who_does_not_read_slows_the_sender_and_loses_nothing() {
    let (left, right) = pair();
    small_buffers(&left, 1);
    let (mut sender, mut sender_waiter) = connection(left);
    let (mut receiver, mut receiver_waiter) = connection::<()>(right);
    receiver.set_reading(Reading::Nothing);
    let body = pattern(1 << 20, 5);
    sender.send_with(request(body.len()), body.clone());
    let event = sender.next(&mut sender_waiter, millis(30)).unwrap();
    assert!(matches!(event, Event::TimedOut), "{event:?}");
    let stuck = sender.bytes_sent();
    assert!(stuck > 0 && stuck < body.len() as u64, "{stuck}");
    let event = receiver.next(&mut receiver_waiter, millis(30)).unwrap();
    assert!(matches!(event, Event::TimedOut), "{event:?}");
    assert_eq!(receiver.bytes_received(), 0);
    let event = sender.next(&mut sender_waiter, millis(1)).unwrap();
    assert!(matches!(event, Event::TimedOut), "{event:?}");
    assert_eq!(sender.bytes_sent(), stuck);
    assert_eq!(sender.queued(), 1);

    receiver.set_reading(Reading::All);
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut sender, &mut sender_waiter));
        assert!(next_pixels(&mut receiver, &mut receiver_waiter) == body);
    });
}

#[test]
fn who_takes_no_pixels_hears_what_comes_before_them() {
    let (left, right) = pair();
    let (mut sender, mut sender_waiter) = connection(left);
    let (mut receiver, mut receiver_waiter) = connection::<()>(right);
    receiver.set_reading(Reading::NoPixels);
    let body = pattern(1 << 20, 5);
    sender.send(encode::ping(1));
    sender.send_with(request(body.len()), body.clone());
    sender.send(encode::ping(2));
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut sender, &mut sender_waiter));
        let message = next_message(&mut receiver, &mut receiver_waiter);
        assert!(matches!(message, Message::Ping), "{message:?}");
        let event = receiver.next(&mut receiver_waiter, millis(30)).unwrap();
        assert!(matches!(event, Event::TimedOut), "{event:?}");
        // What was read together with the first message, and nothing of the rest.
        let bytes = receiver.bytes_received() as usize;
        assert!(bytes <= 2 * STAGE, "{bytes} bytes");
        assert!(
            receiver.silent_since().is_none(),
            "it is not the peer's silence"
        );

        receiver.set_reading(Reading::All);
        assert!(next_pixels(&mut receiver, &mut receiver_waiter) == body);
        let message = next_message(&mut receiver, &mut receiver_waiter);
        assert!(matches!(message, Message::Ping), "{message:?}");
    });
}

#[test]
fn who_does_not_read_still_sends() {
    let (left, right) = pair();
    let (mut deaf, mut deaf_waiter) = connection(left);
    let (mut other, mut other_waiter) = connection::<()>(right);
    deaf.set_reading(Reading::Nothing);
    other.send(encode::ping(3));
    drain(&mut other, &mut other_waiter);
    deaf.send_with(request(3), b"abc".to_vec());
    drain(&mut deaf, &mut deaf_waiter);
    assert_eq!(next_pixels(&mut other, &mut other_waiter), b"abc");
    deaf.set_reading(Reading::All);
    let message = next_message(&mut deaf, &mut deaf_waiter);
    assert!(matches!(message, Message::Ping), "{message:?}");
}

#[test]
fn drained_is_said_once_when_the_last_byte_is_handed_over() {
    let (mut connection, mut waiter, mut peer) = against_a_plain_socket();
    let quiet = connection.next(&mut waiter, millis(1)).unwrap();
    assert!(matches!(quiet, Event::TimedOut), "{quiet:?}");

    connection.send(encode::ping(1));
    connection.send(encode::ping(2));
    let event = connection.next(&mut waiter, long()).unwrap();
    assert!(matches!(event, Event::Drained), "{event:?}");
    assert_eq!(connection.queued(), 0);
    let event = connection.next(&mut waiter, millis(1)).unwrap();
    assert!(matches!(event, Event::TimedOut), "{event:?}");
    let mut bytes = [0; 24];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..], [&encode::ping(1)[..], &encode::ping(2)].concat());

    // Not while the socket is full.
    let body = pattern(4 << 20, 1);
    connection.send_with(request(body.len()), body.clone());
    let event = connection.next(&mut waiter, millis(20)).unwrap();
    assert!(matches!(event, Event::TimedOut), "{event:?}");
    let reader = thread::spawn(move || {
        let mut bytes = vec![0; 56 + (4 << 20)];
        peer.read_exact(&mut bytes).unwrap();
        (bytes, peer)
    });
    let event = connection.next(&mut waiter, long()).unwrap();
    assert!(matches!(event, Event::Drained), "{event:?}");
    assert!(reader.join().unwrap().0[56..] == body);
}

#[test]
fn a_peer_that_closes_between_messages_has_closed() {
    let (mut connection, mut waiter, mut peer) = against_a_plain_socket::<()>();
    peer.write_all(&encode::ping(1)).unwrap();
    drop(peer);
    let message = next_message(&mut connection, &mut waiter);
    assert!(matches!(message, Message::Ping), "{message:?}");
    for _ in 0..2 {
        let error = connection.next(&mut waiter, long()).unwrap_err();
        assert!(matches!(error, ConnectionError::Closed), "{error:?}");
    }
}

#[test]
fn a_peer_that_closes_inside_a_message_sent_half_of_one() {
    let bytes = [&request(1000)[..], &[0; 1000]].concat();
    for cut in [1, 11, 12, 30, 56, 57, 1055] {
        let (mut connection, mut waiter, mut peer) = against_a_plain_socket::<()>();
        peer.write_all(&bytes[..cut]).unwrap();
        drop(peer);
        let error = connection.next(&mut waiter, long()).unwrap_err();
        assert!(
            matches!(
                error,
                ConnectionError::Decode(DecodeError::Truncated { .. })
            ),
            "cut at {cut}: {error:?}"
        );
        let text = error.to_string();
        assert!(text.contains("the stream ended inside"), "{text}");
    }
}

#[test]
fn a_peer_that_only_stops_sending_can_still_be_sent_to() {
    let (mut connection, mut waiter, mut peer) = against_a_plain_socket::<()>();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    connection.set_reading(Reading::Nothing);
    connection.send(encode::pong(4));
    drain(&mut connection, &mut waiter);
    let mut bytes = [0; 12];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..], encode::pong(4)[..]);
}

#[test]
fn garbage_is_an_error_and_stays_one() {
    let (mut connection, mut waiter, mut peer) = against_a_plain_socket::<()>();
    peer.write_all(&encode::ping(1)).unwrap();
    peer.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
    let message = next_message(&mut connection, &mut waiter);
    assert!(matches!(message, Message::Ping), "{message:?}");
    for _ in 0..2 {
        let error = connection.next(&mut waiter, long()).unwrap_err();
        assert!(
            matches!(error, ConnectionError::Decode(DecodeError::BadMagic { .. })),
            "{error:?}"
        );
    }
}

/// Runs `write` on its own thread over and over, until dropped.
struct Busy {
    done: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Busy {
    fn new(mut peer: UnixStream, mut write: impl FnMut(&mut UnixStream) + Send + 'static) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let seen = done.clone();
        let thread = thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                write(&mut peer);
            }
        });
        Self {
            done,
            thread: Some(thread),
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A peer in the middle of a message that takes very long.
fn trickling() -> (Connection<()>, Waiter, Busy) {
    let (connection, waiter, mut peer) = against_a_plain_socket();
    peer.write_all(&request(64 << 20)).unwrap();
    let busy = Busy::new(peer, |peer| {
        let _ = peer.write(&[0; 1]);
        thread::sleep(Duration::from_millis(1));
    });
    (connection, waiter, busy)
}

/// How much of a message that never ends is in the socket when the test begins: several reads,
/// and less than a socket holds.
const WAITING: u64 = 150_000;

/// A peer that sends faster than it is read: there is always more.
fn flooding() -> (Connection<()>, Waiter, UnixStream) {
    let (connection, waiter, mut peer) = against_a_plain_socket();
    socket2::SockRef::from(&peer)
        .set_send_buffer_size(WAITING as usize)
        .unwrap();
    let header = b"HXFR\x77\0\0\0\0\0\0\x04";
    peer.write_all(header).unwrap();
    peer.write_all(&vec![0; WAITING as usize - header.len()])
        .unwrap();
    (connection, waiter, peer)
}

#[test]
fn a_peer_that_trickles_cannot_keep_us_past_the_deadline() {
    let (mut connection, mut waiter, _busy) = trickling();
    for _ in 0..2 {
        let start = Instant::now();
        let event = connection.next(&mut waiter, millis(100)).unwrap();
        assert!(matches!(event, Event::TimedOut), "{event:?}");
        assert!(start.elapsed() >= Duration::from_millis(100));
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    }
    assert!(connection.bytes_received() > 56);
}

#[test]
fn a_peer_that_floods_cannot_keep_us_past_the_deadline() {
    let (mut connection, mut waiter, _peer) = flooding();
    let mut before = 0;
    for _ in 0..3 {
        let event = connection.next(&mut waiter, millis(0)).unwrap();
        assert!(matches!(event, Event::TimedOut), "{event:?}");
        // It read a little, and left the rest.
        assert!(connection.bytes_received() > before);
        before = connection.bytes_received();
        assert!(before < WAITING);
    }
}

#[test]
fn a_peer_that_floods_cannot_keep_a_wake_up_from_us() {
    let (mut connection, mut waiter, _peer) = flooding();
    for _ in 0..3 {
        waiter.waker().wake();
        let event = connection.next(&mut waiter, long()).unwrap();
        assert!(matches!(event, Event::Woken), "{event:?}");
        assert!(connection.bytes_received() < WAITING);
    }
    // Each was said once.
    let event = connection.next(&mut waiter, millis(20)).unwrap();
    assert!(matches!(event, Event::TimedOut), "{event:?}");
}

#[test]
fn a_peer_that_floods_is_still_sent_what_it_takes() {
    let (mut connection, mut waiter, mut peer) = against_a_plain_socket::<Vec<u8>>();
    peer.set_nonblocking(true).unwrap();
    connection.send_with(request(1 << 20), vec![1; 1 << 20]);
    let mut space = vec![0; 1 << 20];
    // There is always more to receive than is taken at once.
    for _ in 0..100_000 {
        while peer.write(&encode::ping(1)).is_ok() {}
        match connection.next(&mut waiter, long()).unwrap() {
            Event::Message(_) => {}
            Event::Drained => return,
            other => panic!("{other:?}"),
        }
        // It takes what comes.
        let _ = peer.read(&mut space);
    }
    panic!("nothing more was sent");
}

#[test]
fn somebody_who_wakes_us_all_the_time_cannot_keep_us_from_reading() {
    let (mut connection, mut waiter, mut peer) = flooding();
    let waker = waiter.waker();
    // The rest of the 64 MiB message is not needed: what is there must be read.
    while connection.bytes_received() < WAITING {
        let before = connection.bytes_received();
        waker.wake();
        let event = connection.next(&mut waiter, long()).unwrap();
        assert!(matches!(event, Event::Woken), "{event:?}");
        assert!(connection.bytes_received() > before);
    }
    // Nor from sending.
    waker.wake();
    connection.send(encode::ping(1));
    let event = connection.next(&mut waiter, long()).unwrap();
    assert!(matches!(event, Event::Drained), "{event:?}");
    peer.read_exact(&mut [0; 12]).unwrap();
}

#[test]
fn a_peer_that_trickles_cannot_keep_us_from_being_cancelled() {
    let (mut connection, mut waiter, _busy) = trickling();
    let waker = waiter.waker();
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| waker.cancel());
        let error = connection.next(&mut waiter, Deadline::NEVER).unwrap_err();
        assert!(matches!(error, ConnectionError::Cancelled), "{error:?}");
    });
    assert!(start.elapsed() < AT_ONCE);
}

/// Gives one byte at a time, and cancels the connection's waits when asked for the tenth.
struct Cancelling(Waker);

impl Body for Cancelling {
    fn size(&self) -> usize {
        50
    }

    fn slices<'a>(&'a self, offset: usize, slices: &mut [IoSlice<'a>]) -> usize {
        if offset == 10 {
            self.0.cancel();
        }
        slices[0] = IoSlice::new(&[0]);
        1
    }
}

#[test]
fn a_peer_that_takes_everything_at_once_cannot_keep_us_from_being_cancelled() {
    let (mut connection, mut waiter, _peer) = against_a_plain_socket();
    connection.send_with(request(50), Cancelling(waiter.waker()));
    let error = connection.next(&mut waiter, Deadline::NEVER).unwrap_err();
    assert!(matches!(error, ConnectionError::Cancelled), "{error:?}");
    assert_eq!(connection.queued(), 1, "cancelled only when all was sent");
    waiter.waker().reset();
    drain(&mut connection, &mut waiter);
    assert_eq!(connection.bytes_sent(), 56 + 50);
}

#[test]
fn a_wake_up_ends_a_wait() {
    let (mut connection, mut waiter, _peer) = against_a_plain_socket::<()>();
    let waker = waiter.waker();
    thread::scope(|scope| {
        scope.spawn(|| waker.wake());
        let event = connection.next(&mut waiter, long()).unwrap();
        assert!(matches!(event, Event::Woken), "{event:?}");
    });
}

#[test]
fn a_cancelled_connection_goes_on_after_a_reset() {
    let (mut connection, mut waiter, mut peer) = against_a_plain_socket::<()>();
    let waker = waiter.waker();
    peer.write_all(&encode::ping(1)[..5]).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| waker.cancel());
        let start = Instant::now();
        let error = connection.next(&mut waiter, Deadline::NEVER).unwrap_err();
        assert!(matches!(error, ConnectionError::Cancelled), "{error:?}");
        assert!(start.elapsed() < AT_ONCE);
    });
    peer.write_all(&encode::ping(1)[5..]).unwrap();
    let error = connection.next(&mut waiter, long()).unwrap_err();
    assert!(matches!(error, ConnectionError::Cancelled), "{error:?}");
    waker.reset();
    let message = next_message(&mut connection, &mut waiter);
    assert!(matches!(message, Message::Ping), "{message:?}");
}

#[test]
fn the_last_words_of_a_peer_are_heard_though_we_were_sending() {
    let last_words = ErrorMessage {
        code: ErrorCode::INTERNAL,
        text: "too many clients".to_owned(),
        tag: None,
    };
    for (ours, theirs) in [pair(), over_tcp()] {
        // The peer says why, and closes with our bytes unread: TCP answers those with a reset.
        theirs
            .send(&[IoSlice::new(&encode::error(1, &last_words))])
            .unwrap();
        let (mut connection, mut waiter) = connection(ours);
        connection.send_with(request(1), vec![0]);
        drop(theirs);
        // At the latest the second message meets a closed socket.
        for _ in 0..3 {
            let body = vec![0; 8 << 20];
            connection.send_with(request(body.len()), body);
        }
        let Message::Error(error) = next_message(&mut connection, &mut waiter) else {
            panic!("another message");
        };
        assert_eq!(error, last_words);
        let end = connection.next(&mut waiter, long()).unwrap_err();
        assert!(
            matches!(end, ConnectionError::Closed | ConnectionError::Io(_)),
            "{end:?}"
        );
    }
}

#[test]
fn sending_to_a_peer_that_has_gone_is_an_error_though_nothing_is_read() {
    let (mut connection, mut waiter, peer) = against_a_plain_socket();
    drop(peer);
    connection.set_reading(Reading::Nothing);
    connection.send_with(request(8 << 20), vec![0; 8 << 20]);
    let error = connection.next(&mut waiter, long()).unwrap_err();
    assert!(matches!(error, ConnectionError::Io(_)), "{error:?}");
}

#[test]
fn a_dropped_connection_closes_what_others_still_wait_for() {
    let (connection, _waiter, mut peer) = against_a_plain_socket::<()>();
    let reader = thread::spawn(move || peer.read(&mut [0; 1]).unwrap());
    drop(connection);
    assert_eq!(reader.join().unwrap(), 0);
}

/// Promises bytes and gives none.
struct Liar;

impl Body for Liar {
    fn size(&self) -> usize {
        10
    }

    fn slices<'a>(&'a self, _: usize, _: &mut [IoSlice<'a>]) -> usize {
        0
    }
}

#[test]
fn a_body_that_gives_nothing_is_an_error_and_no_endless_loop() {
    let (mut connection, mut waiter, _peer) = against_a_plain_socket();
    connection.send_with(request(10), Liar);
    let error = connection.next(&mut waiter, long()).unwrap_err();
    assert!(matches!(error, ConnectionError::Io(_)), "{error:?}");
}
