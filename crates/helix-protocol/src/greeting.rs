// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a client finds out whom it has called: HELLO, and a PING right behind it.
//!
//! | what comes | what it means |
//! | --- | --- |
//! | HELLO_RESP, then PONG | both use what both announced |
//! | PONG alone | a legacy host, which skipped the HELLO (quirk 2 of docs/protocol.md) |
//! | ERROR | the host does not want this client; its text says why |
//! | neither in time | no host |
//!
//! The first HELLO_RESP before the PONG counts. Another one, or one that comes later, is ignored
//! like any message that nobody asked for: what was agreed holds for the whole connection.
//!
//! [`Greeting`] is that, without I/O; [`greet`] holds the conversation on a [`Connection`].

use crate::connection::{Body, Connection, ConnectionError, Event};
use crate::encode::{self, Head};
use crate::limits::Limits;
use crate::message::{CODEC_H264, Capabilities, ErrorMessage, Hello, Message};
use crate::wait::{Deadline, Waiter};
use crate::wire;

/// What the host takes, and what both ends can do. For a legacy host, what those are known for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Announced by both; `None` from a legacy host, which announces nothing.
    pub capabilities: Option<Capabilities>,
    /// Bit 0 H.264, 1 H.265, 2 AV1.
    pub codecs: u32,
    /// Requests that the host wants open at most.
    pub max_in_flight: u16,
    /// Bytes of the largest message that the host takes, header included.
    pub max_message: u32,
    /// Pixels.
    pub max_width: u16,
    /// Pixels.
    pub max_height: u16,
    /// Who the host is, for logs.
    pub name: Option<String>,
    /// Which encoder it uses, for logs.
    pub encoder: Option<String>,
    /// Which clock the times of its pushed frames are of, where it says so.
    pub clock_id: Option<Vec<u8>>,
}

impl Agreement {
    /// Bytes of a FRAME_REQUEST in front of its pixels.
    const REQUEST: u32 = (wire::HEADER_SIZE + size_of::<wire::FrameRequest>()) as u32;

    /// With a legacy host: it encodes H.264, and says no other limit than that of pixels.
    pub fn legacy() -> Self {
        Self {
            capabilities: None,
            codecs: CODEC_H264,
            max_in_flight: u16::MAX,
            max_message: Limits::default().pixels + Self::REQUEST,
            max_width: u16::MAX,
            max_height: u16::MAX,
            name: None,
            encoder: None,
            clock_id: None,
        }
    }

    fn with(mine: &Hello, theirs: Hello) -> Self {
        /// What says nothing is as if there were no HELLO.
        fn said<T: Default + PartialEq>(value: T, otherwise: T) -> T {
            if value == T::default() {
                otherwise
            } else {
                value
            }
        }
        let legacy = Self::legacy();
        Self {
            capabilities: Some(mine.capabilities.and(theirs.capabilities)),
            codecs: said(theirs.codecs, legacy.codecs),
            max_in_flight: theirs.max_in_flight,
            max_message: said(theirs.max_message, legacy.max_message),
            max_width: said(theirs.max_width, legacy.max_width),
            max_height: said(theirs.max_height, legacy.max_height),
            name: theirs.name,
            encoder: theirs.encoder,
            clock_id: theirs.clock_id,
        }
    }

    /// Whether both announced all of `capability`.
    pub fn can(&self, capability: Capabilities) -> bool {
        self.capabilities
            .is_some_and(|agreed| agreed.contains(capability))
    }

    /// Bytes of pixels that fit into one FRAME_REQUEST.
    pub fn max_pixels(&self) -> u32 {
        self.max_message.saturating_sub(Self::REQUEST)
    }
}

/// The state between HELLO and PONG.
#[derive(Debug)]
pub struct Greeting {
    mine: Hello,
    theirs: Option<Hello>,
}

impl Greeting {
    /// To be followed by sending [`Greeting::messages`].
    pub fn new(mine: Hello) -> Self {
        Self { mine, theirs: None }
    }

    /// HELLO with its TLVs, and the PING: the first messages of a connection.
    pub fn messages(&self, session_id: u16) -> ((Head, Vec<u8>), Head) {
        (
            encode::hello(session_id, &self.mine),
            encode::ping(session_id),
        )
    }

    /// Takes a message of the host; what was agreed once it is the PONG.
    pub fn receive(&mut self, message: Message) -> Result<Option<Agreement>, GreetingError> {
        match message {
            Message::HelloResp(theirs) if self.theirs.is_none() => {
                // A peer answers with the lower version of both, and the lowest is 1.
                if theirs.version == 0 || theirs.version > self.mine.version {
                    return Err(GreetingError::Version(theirs.version));
                }
                self.theirs = Some(theirs);
            }
            Message::Pong => {
                let agreement = match self.theirs.take() {
                    Some(theirs) => Agreement::with(&self.mine, theirs),
                    None => Agreement::legacy(),
                };
                return Ok(Some(agreement));
            }
            Message::Error(error) => return Err(GreetingError::Refused(error)),
            // Hosts may send what this version does not know.
            _ => {}
        }
        Ok(None)
    }
}

/// Why there is no agreement. The connection is of no use then.
#[derive(Debug, thiserror::Error)]
pub enum GreetingError {
    /// The host does not want this client.
    #[error("refused: {}: {}", .0.code, .0.text)]
    Refused(ErrorMessage),
    /// HELLO_RESP names a version that was not offered.
    #[error("HELLO_RESP is of version {0}, which was not offered")]
    Version(u16),
    /// The time is over.
    #[error("no sign of life: neither HELLO nor PING was answered in time")]
    Silence,
    /// The connection ended, or brought something else than messages.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

/// Greets the host on a new connection and waits for what comes of it.
pub fn greet<B: Body>(
    connection: &mut Connection<B>,
    waiter: &mut Waiter,
    mine: Hello,
    session_id: u16,
    deadline: Deadline,
) -> Result<Agreement, GreetingError> {
    let mut greeting = Greeting::new(mine);
    let ((hello, tlvs), ping) = greeting.messages(session_id);
    connection.send_bytes(hello, tlvs);
    connection.send(ping);
    loop {
        match connection.next(waiter, deadline)? {
            Event::Message(envelope) => {
                if let Some(agreement) = greeting.receive(envelope.message)? {
                    return Ok(agreement);
                }
            }
            Event::TimedOut => return Err(GreetingError::Silence),
            Event::Drained | Event::Woken => {}
        }
        // A host that sends other things without end is none either.
        if deadline.has_passed() {
            return Err(GreetingError::Silence);
        }
    }
}
