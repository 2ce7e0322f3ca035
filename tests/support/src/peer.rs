// SPDX-License-Identifier: MIT OR Apache-2.0

//! A host that does what a test tells it, right or wrong, in the test's own process.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use helix_protocol::connection::{ConnectionError, Event};
pub use helix_protocol::message::Hello;
use helix_protocol::message::{Capabilities, FrameRequest, FrameResponse};
use helix_protocol::wait::{Deadline, Waiter, Waker};
use helix_protocol::{Address, Connection, Envelope, Limits, Listener, Message, encode};

/// Generous: an event that has not come by then never will.
pub const LONG: Duration = Duration::from_secs(20);

/// An access unit with the parameter sets of a 1280x720 constrained baseline stream at 30 frames
/// a second, as x264 wrote them, and something like an IDR slice.
pub const KEYFRAME: &[u8] = &[
    0, 0, 0, 1, 0x67, 0x42, 0xc0, 0x1f, 0xda, 0x01, 0x40, 0x16, 0xec, 0x05, 0xa8, 0x08, 0x08, 0x0a,
    0x00, 0x00, 0x03, 0x00, 0x02, 0x00, 0x00, 0x03, 0x00, 0x79, 0x1e, 0x30, 0x65, 0x40, 0, 0, 0, 1,
    0x68, 0xce, 0x3c, 0x80, 0, 0, 1, 0x65, 0x88, 0x84, 0x0a, 0xf1,
];

/// An access unit with something like a P slice.
pub const DELTA: &[u8] = &[0, 0, 0, 1, 0x41, 0x9a, 0x02, 0x04];

/// What the peer's side saw.
#[derive(Debug)]
pub enum Seen {
    /// A client has come.
    Connected,
    /// A message of its.
    Message(Envelope),
    /// It has gone, or the script has closed.
    Closed,
}

/// What a script wants after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Go on.
    GoOn,
    /// Close the connection.
    Close,
    /// Close it once all that was queued is sent.
    CloseAfterSending,
    /// Read and send nothing any more, but stay connected: a dead host behind NAT.
    PlayDead,
}

/// Who greets the clients.
#[derive(Clone, Debug)]
pub enum Greets {
    /// Nobody: the script sees HELLO and the PING behind it.
    Script,
    /// A legacy host: HELLO is skipped, the PING behind it answered. The script sees neither.
    Legacy,
    /// A host that answers with this HELLO_RESP. The script sees neither message.
    With(Hello),
}

/// What a host says of itself that can do `capabilities` and has no other limits.
pub fn hello(capabilities: Capabilities) -> Hello {
    Hello {
        version: 1,
        max_in_flight: 16,
        capabilities,
        codecs: 1,
        max_message: 1 << 27,
        max_width: 8192,
        max_height: 8192,
        name: Some("test".to_owned()),
        ..Hello::default()
    }
}

/// The scripted side of a connection.
pub struct Link {
    connection: Connection<Vec<u8>>,
}

impl Link {
    /// Sends the access unit of a request, with its tag: [`KEYFRAME`] where one was asked for, else
    /// [`DELTA`].
    pub fn answer(&mut self, request: &FrameRequest) {
        let data = if request.force_keyframe {
            KEYFRAME
        } else {
            DELTA
        };
        let response = FrameResponse {
            pts: request.pts,
            dts: request.pts,
            is_keyframe: request.force_keyframe,
            tag: request.tag,
            ..FrameResponse::default()
        };
        self.reply(1, &response, data);
    }

    /// Sends a FRAME_RESPONSE.
    pub fn respond(&mut self, session_id: u16, pts: i64, is_keyframe: bool, data: &[u8]) {
        let response = FrameResponse {
            pts,
            dts: pts,
            is_keyframe,
            ..FrameResponse::default()
        };
        self.reply(session_id, &response, data);
    }

    /// The same, as a test has it.
    pub fn reply(&mut self, session_id: u16, response: &FrameResponse, data: &[u8]) {
        let head = encode::frame_response(session_id, response, data.len() as u32);
        self.connection.send_with(head, data.to_vec());
    }

    /// Sends a message that is all head.
    pub fn send(&mut self, head: encode::Head) {
        self.connection.send(head);
    }

    /// Sends HELLO_RESP.
    pub fn hello_resp(&mut self, hello: &Hello) {
        let (head, tlvs) = encode::hello_resp(1, hello);
        self.connection.send_bytes(head, tlvs);
    }

    /// Puts bytes on the wire that may be no message.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.connection.stream().send(&[IoSlice::new(bytes)])
    }

    /// Answers a PING, and nothing else; whether it was one.
    pub fn pong(&mut self, envelope: &Envelope) -> bool {
        let ping = matches!(envelope.message, Message::Ping);
        if ping {
            self.send(encode::pong(envelope.session_id));
        }
        ping
    }
}

/// A listening peer. Dropping it closes its socket and connections, and fails the test where a
/// client has done what none may.
pub struct Peer {
    address: Address,
    waker: Waker,
    seen: Receiver<Seen>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// A legacy host on a free port of 127.0.0.1, which runs `script` for each message of each
    /// client, one client after the other.
    pub fn new(script: impl FnMut(&mut Link, &Envelope) -> Then + Send + 'static) -> Self {
        Self::greeting(Greets::Legacy, script)
    }

    /// The same with another greeting.
    pub fn greeting(
        greets: Greets,
        script: impl FnMut(&mut Link, &Envelope) -> Then + Send + 'static,
    ) -> Self {
        let address = "tcp:127.0.0.1:0".parse().expect("an address");
        Self::on(&address, greets, script)
    }

    /// Answers each request and each PING.
    pub fn answering() -> Self {
        Self::new(|link, envelope| {
            if let Message::FrameRequest(request, _) = &envelope.message {
                link.answer(request);
            }
            link.pong(envelope);
            Then::GoOn
        })
    }

    /// The same on a given address.
    pub fn on(
        address: &Address,
        greets: Greets,
        mut script: impl FnMut(&mut Link, &Envelope) -> Then + Send + 'static,
    ) -> Self {
        let listener = Listener::bind(address).expect("a test can listen");
        let address = listener.address().clone();
        let mut waiter = Waiter::new().expect("a waiter");
        let waker = waiter.waker();
        let (tell, seen) = channel();
        // Pictures of every size.
        let limits = Limits {
            pixels: u32::MAX,
            ..Limits::default()
        };
        let thread = thread::spawn(move || {
            waiter
                .register(listener.as_fd())
                .expect("a listener can be waited for");
            while !waiter.waker().is_cancelled() {
                let Some(stream) = listener.accept().expect("accept") else {
                    waiter.wait(Deadline::NEVER).expect("wait");
                    continue;
                };
                let connection = Connection::new(stream, limits, &waiter).expect("register");
                // A test that has seen enough no longer listens.
                let _ = tell.send(Seen::Connected);
                let mut link = Link { connection };
                let mut closing = false;
                let mut greeted = matches!(greets, Greets::Script);
                loop {
                    let envelope = match link.connection.next(&mut waiter, Deadline::NEVER) {
                        Ok(Event::Message(envelope)) => envelope,
                        Ok(Event::Drained) if closing => break,
                        Ok(_) => continue,
                        Err(ConnectionError::Cancelled) => return,
                        Err(_) => break,
                    };
                    if !greeted {
                        if let (Message::Hello(_), Greets::With(hello)) =
                            (&envelope.message, &greets)
                        {
                            link.hello_resp(hello);
                        }
                        greeted = link.pong(&envelope);
                        continue;
                    }
                    if let Message::FrameRequest(request, None) = &envelope.message {
                        // Some hosts would send a picture of the VM's console (quirk 5).
                        assert_ne!(request.resource_id, 0, "neither a resource nor pixels");
                    }
                    let then = script(&mut link, &envelope);
                    let _ = tell.send(Seen::Message(envelope));
                    match then {
                        Then::GoOn => {}
                        Then::Close => break,
                        Then::CloseAfterSending => closing = true,
                        Then::PlayDead => {
                            while !waiter.waker().is_cancelled() {
                                waiter.wait(Deadline::NEVER).expect("wait");
                            }
                        }
                    }
                }
                // A test that hears of it may count what is left.
                drop(link);
                let _ = tell.send(Seen::Closed);
            }
        });
        Self {
            address,
            waker,
            seen,
            thread: Some(thread),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Its TCP port.
    pub fn port(&self) -> u32 {
        match self.address {
            Address::Tcp { port, .. } => port.into(),
            _ => panic!("{} has no TCP port", self.address),
        }
    }

    /// The next thing its side saw.
    pub fn next(&self) -> Seen {
        match self.seen.recv_timeout(LONG) {
            Ok(seen) => seen,
            Err(RecvTimeoutError::Timeout) => panic!("the peer saw nothing within {LONG:?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("the peer's thread has ended"),
        }
    }

    /// Waits for something that `pick` picks from what it saw.
    pub fn wait_for<T>(&self, mut pick: impl FnMut(Seen) -> Option<T>) -> T {
        loop {
            if let Some(found) = pick(self.next()) {
                return found;
            }
        }
    }

    /// What it has seen by now and nobody has asked for.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.try_iter().collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.waker.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the peer's thread panicked");
        }
    }
}
