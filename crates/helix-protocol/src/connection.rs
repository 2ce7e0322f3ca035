// SPDX-License-Identifier: MIT OR Apache-2.0

//! One end of a connection: messages out, messages in, one thread, never blocked by one of the
//! two directions alone.
//!
//! The thread that owns a [`Connection`] queues what it sends and calls [`Connection::next`] in a
//! loop. Other threads reach it through the waiter's [`crate::wait::Waker`].

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::decode::Decoder;
use crate::encode::Head;
use crate::error::DecodeError;
use crate::limits::Limits;
use crate::message::Envelope;
use crate::payload::Payload;
use crate::transport::Stream;
use crate::wait::{Deadline, Waiter, Wake, Waker};

/// Slices given to the kernel at once. IOV_MAX is 1024 on Linux and macOS; a quarter of it moves
/// as fast and keeps the stack small.
const SLICES: usize = 256;

/// The large part of a message, sent from where it lies.
pub trait Body: Send {
    /// Number of bytes.
    fn size(&self) -> usize;

    /// Puts the bytes from `offset` on into the front of `slices`, as many as fit, and returns
    /// how many slices that took. With `offset` less than [`Body::size`] it is at least one that
    /// is not empty.
    fn slices<'a>(&'a self, offset: usize, slices: &mut [IoSlice<'a>]) -> usize;
}

macro_rules! contiguous_body {
    ($($type:ty),*) => {$(
        impl Body for $type {
            fn size(&self) -> usize {
                self.len()
            }

            fn slices<'a>(&'a self, offset: usize, slices: &mut [IoSlice<'a>]) -> usize {
                slices[0] = IoSlice::new(&self[offset..]);
                1
            }
        }
    )*};
}
contiguous_body!(Vec<u8>, Arc<[u8]>, Payload);

/// For ends that send only heads.
impl Body for () {
    fn size(&self) -> usize {
        0
    }

    fn slices<'a>(&'a self, _: usize, _: &mut [IoSlice<'a>]) -> usize {
        0
    }
}

/// What [`Connection::next`] saw.
#[derive(Debug)]
pub enum Event {
    /// A message from the peer.
    Message(Envelope),
    /// Everything queued has been handed to the system.
    Drained,
    /// Another thread used the waker.
    Woken,
    /// The deadline has passed.
    TimedOut,
}

/// What is taken from the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Everything.
    All,
    /// Messages, up to the first one whose pixels are not there yet: those stay with the peer. So a
    /// peer whose pictures there is no room for is still heard, as long as it says something
    /// else.
    NoPixels,
    /// Nothing.
    Nothing,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// Somebody used [`crate::wait::Waker::cancel`]; the connection itself is whole, and after
    /// [`crate::wait::Waker::reset`] it goes on where it was.
    #[error("cancelled")]
    Cancelled,
    /// The peer has closed, between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer sent something that is no message, or half of one.
    #[error("the peer sent an invalid message: {0}")]
    Decode(#[from] DecodeError),
    /// The system said so.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
}

struct Outgoing<B> {
    head: Head,
    tail: Tail<B>,
}

/// What follows a head.
enum Tail<B> {
    Nothing,
    Bytes(Vec<u8>),
    Body(B),
}

impl<B: Body> Tail<B> {
    fn size(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Bytes(bytes) => bytes.len(),
            Self::Body(body) => body.size(),
        }
    }

    fn slices<'a>(&'a self, offset: usize, slices: &mut [IoSlice<'a>]) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Bytes(bytes) => bytes.slices(offset, slices),
            Self::Body(body) => body.slices(offset, slices),
        }
    }
}

/// Whether the socket takes bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    /// Nothing is known to the contrary.
    Assumed,
    /// It does not; the waiter tells when it does.
    Awaited,
    /// It may: the waiter has told so, and will again.
    Announced,
}

/// A connection and its two directions' state.
pub struct Connection<B> {
    stream: Stream,
    decoder: Decoder,
    outbox: VecDeque<Outgoing<B>>,
    /// Bytes of the first message in the outbox that are sent.
    sent: usize,
    /// When bytes were last handed to the system, or the outbox began to fill.
    sent_at: Instant,
    /// When bytes last came, or reading began.
    received_at: Instant,
    reading: Reading,
    /// There may be bytes to take: the socket has not said otherwise since it became ready.
    readable: bool,
    room: Room,
    /// Why nothing can be sent any more.
    send_error: Option<io::Error>,
    bytes_sent: u64,
    bytes_received: u64,
}

impl<B: Body> Connection<B> {
    /// Takes over a stream. From now on `waiter` waits for it.
    pub fn new(stream: Stream, limits: Limits, waiter: &Waiter) -> io::Result<Self> {
        waiter.register_for_reading(stream.as_fd())?;
        Ok(Self {
            stream,
            decoder: Decoder::new(limits),
            outbox: VecDeque::new(),
            sent: 0,
            sent_at: Instant::now(),
            received_at: Instant::now(),
            reading: Reading::All,
            readable: true,
            room: Room::Assumed,
            send_error: None,
            bytes_sent: 0,
            bytes_received: 0,
        })
    }

    /// Queues a message that is all head; [`Connection::next`] sends it.
    pub fn send(&mut self, head: Head) {
        self.queue(head, Tail::Nothing);
    }

    /// Queues a message whose head announced `bytes`, few of them: the TLVs of HELLO.
    pub fn send_bytes(&mut self, head: Head, bytes: Vec<u8>) {
        self.queue(head, Tail::Bytes(bytes));
    }

    /// Queues a message whose head announced `body`; [`Connection::next`] sends it.
    pub fn send_with(&mut self, head: Head, body: B) {
        self.queue(head, Tail::Body(body));
    }

    fn queue(&mut self, head: Head, tail: Tail<B>) {
        if self.outbox.is_empty() {
            self.sent_at = Instant::now();
        }
        self.outbox.push_back(Outgoing { head, tail });
    }

    /// Messages that are not wholly sent.
    pub fn queued(&self) -> usize {
        self.outbox.len()
    }

    /// Bytes of these messages that are not sent yet.
    pub fn queued_bytes(&self) -> usize {
        let size = |message: &Outgoing<B>| message.head.len() + message.tail.size();
        self.outbox.iter().map(size).sum::<usize>() - self.sent
    }

    /// What to take from the peer; [`Reading::All`] at first. What is not taken slows the peer by
    /// the transport's own flow control; a peer that closes behind that is noticed only when
    /// something is sent.
    pub fn set_reading(&mut self, reading: Reading) {
        if reading == Reading::All && self.reading != Reading::All {
            // The pause was not the peer's.
            self.received_at = Instant::now();
        }
        self.reading = reading;
    }

    /// Since when the peer takes nothing of what is queued; `None` where nothing is.
    pub fn unsent_since(&self) -> Option<Instant> {
        (!self.outbox.is_empty()).then_some(self.sent_at)
    }

    /// Since when nothing came from the peer, while everything is taken from it. It begins anew
    /// whenever that is switched on again.
    pub fn silent_since(&self) -> Option<Instant> {
        (self.reading == Reading::All).then_some(self.received_at)
    }

    /// When bytes last went either way, or there was a reason why they should.
    pub fn last_moved(&self) -> Instant {
        self.sent_at.max(self.received_at)
    }

    /// Whether the peer owes the rest of a message that it has begun. To be asked when
    /// [`Connection::next`] had no message.
    pub fn is_inside_message(&self) -> bool {
        self.decoder.finish().is_err()
    }

    /// See [`Decoder::set_limits`].
    pub fn set_limits(&mut self, limits: Limits) {
        self.decoder.set_limits(limits);
    }

    /// See [`Decoder::trim`].
    pub fn trim(&self) {
        self.decoder.trim();
    }

    /// Bytes handed to the system since the start.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// Bytes taken from the system since the start.
    pub fn bytes_received(&self) -> u64 {
        self.bytes_received
    }

    /// The stream, to end it from the side.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Sends what is queued and receives until there is something to say.
    ///
    /// `waiter` is the one given to [`Connection::new`]. When nothing can be sent any more, what
    /// the peer said before is still received (a host says in an ERROR why it closes), and only
    /// then the connection ends.
    pub fn next(
        &mut self,
        waiter: &mut Waiter,
        deadline: Deadline,
    ) -> Result<Event, ConnectionError> {
        let waker = waiter.waker();
        loop {
            if waker.is_cancelled() {
                return Err(ConnectionError::Cancelled);
            }
            if waiter.take_ready() {
                self.readable = true;
                if self.room == Room::Awaited {
                    self.room = Room::Announced;
                }
            }
            if self.flush(waiter, &waker)? {
                return Ok(Event::Drained);
            }
            if self.reading != Reading::Nothing {
                if let Some(envelope) = self.decoder.next()? {
                    return Ok(Event::Message(envelope));
                }
                let held = self.reading == Reading::NoPixels && self.decoder.is_inside_pixels();
                if !held && self.readable && self.receive()? {
                    // A peer that never stops sending must not keep the caller from its own
                    // deadline, nor from those who want it.
                    if deadline.has_passed() {
                        return Ok(Event::TimedOut);
                    }
                    if waiter.take_wake() {
                        return Ok(Event::Woken);
                    }
                    // Nor from hearing that it takes bytes again.
                    if self.room == Room::Awaited
                        && waiter.wait(Deadline::after(Duration::ZERO))? == Wake::Woken
                    {
                        return Ok(Event::Woken);
                    }
                    continue;
                }
            }
            if let Some(error) = self.send_error.take() {
                return Err(error.into());
            }
            match waiter.wait(deadline)? {
                Wake::Ready => {}
                Wake::Woken => return Ok(Event::Woken),
                Wake::TimedOut => return Ok(Event::TimedOut),
                Wake::Cancelled => return Err(ConnectionError::Cancelled),
            }
        }
    }

    /// Reads once; whether anything came.
    fn receive(&mut self) -> Result<bool, ConnectionError> {
        match self.stream.recv(self.decoder.space()) {
            Ok(0) => {
                self.decoder.finish()?;
                Err(ConnectionError::Closed)
            }
            Ok(count) => {
                self.decoder.advance(count);
                self.bytes_received += count as u64;
                self.received_at = Instant::now();
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(false)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends until the socket is full; whether the outbox became empty by this.
    fn flush(&mut self, waiter: &Waiter, waker: &Waker) -> Result<bool, ConnectionError> {
        let mut progress = false;
        while self.room != Room::Awaited
            && let Some(message) = self.outbox.front()
        {
            // A peer that takes all at once must not keep the caller either.
            if waker.is_cancelled() {
                return Err(ConnectionError::Cancelled);
            }
            let head = message.head.len();
            let size = head + message.tail.size();
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            if self.sent < head {
                slices[0] = IoSlice::new(&message.head[self.sent..]);
                count = 1;
            }
            if message.tail.size() > 0 {
                let offset = self.sent.saturating_sub(head);
                count += message.tail.slices(offset, &mut slices[count..]);
            }
            match self.stream.send(&slices[..count]) {
                // Only where there was nothing to send: a body without the bytes that its head
                // has announced. The peer waits for them in vain.
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(count) => {
                    self.sent += count;
                    self.bytes_sent += count as u64;
                    self.sent_at = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Only now: see Waiter::register_for_reading.
                    if self.room == Room::Assumed {
                        waiter.set_writing(self.stream.as_fd(), true)?;
                    }
                    self.room = Room::Awaited;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.outbox.clear();
                    self.sent = 0;
                    // The word of it may not have come here, and the peer's last words are there.
                    self.readable = true;
                    self.send_error = Some(error);
                    return Ok(false);
                }
            }
            if self.sent >= size {
                self.sent = 0;
                self.outbox.pop_front();
                progress = true;
            }
        }
        let drained = progress && self.outbox.is_empty();
        if drained && self.room != Room::Assumed {
            waiter.set_writing(self.stream.as_fd(), false)?;
            self.room = Room::Assumed;
        }
        Ok(drained)
    }
}

impl<B> Drop for Connection<B> {
    fn drop(&mut self) {
        self.stream.shutdown();
    }
}
