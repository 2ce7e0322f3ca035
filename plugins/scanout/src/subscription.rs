// SPDX-License-Identifier: MIT OR Apache-2.0

//! A subscription to the pushed frames of one scanout; no GStreamer in it.
//!
//! One thread owns it and waits in [`Subscription::next`]. Others leave a wish in [`Wishes`] and
//! wake that thread.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use helix_protocol::connection::{ConnectionError, Event};
use helix_protocol::greeting::{self, GreetingError};
use helix_protocol::message::{
    AuthToken, CODEC_H264, Capabilities, Config, EnableScanout, ErrorCode, ErrorMessage,
    FrameResponse, HELLO_VERSION, Hello,
};
use helix_protocol::transport::{ConnectError, is_local};
use helix_protocol::wait::{Deadline, Waiter};
use helix_protocol::{Address, Agreement, Connection, Limits, Message, Payload, Stream, encode};

use crate::timeline::{CLOCK_MONOTONIC, HostClock};

/// Deployed hosts close a connection whose client says nothing for 60 s or more (quirk 10 of
/// docs/protocol.md).
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

/// How a header begins: magic, `msg_type`, flags, `session_id` (docs/protocol.md).
const HEADER: usize = 8;
const MAGIC: [u8; 4] = *b"HXFR";
const FRAME_RESPONSE: u8 = 0x02;
const PONG: u8 = 0x11;

/// What other threads want said to the host.
#[derive(Debug, Default)]
pub struct Wishes {
    /// A keyframe.
    pub keyframe: AtomicBool,
    /// Another bitrate, in bit/s; 0 = none.
    pub bitrate: AtomicU32,
    /// The host makes no keyframe when asked: there is no use in wishing for one.
    pub host_is_deaf: AtomicBool,
}

impl Wishes {
    /// Forgets what was wished of another host.
    pub fn begin(&self) {
        self.keyframe.store(false, Ordering::Release);
        self.bitrate.store(0, Ordering::Release);
        self.host_is_deaf.store(false, Ordering::Release);
    }
}

/// What is subscribed to.
#[derive(Clone, Debug)]
pub struct Target {
    /// The host.
    pub address: Address,
    /// The scanout.
    pub scanout_id: u32,
    /// Switch it on first.
    pub enable: Option<EnableScanout>,
    /// Limit for connecting, for each reply and for the answer to a PING; `None` = none.
    pub timeout: Option<Duration>,
    /// When to give up before there is a subscription, if `timeout` does not end it earlier.
    pub give_up: Deadline,
    /// What lets this client in.
    pub auth_token: Option<AuthToken>,
}

impl Target {
    /// Until when a step of the way to a subscription may take that begins now.
    fn deadline(&self) -> Deadline {
        let own = self.timeout.map_or(Deadline::NEVER, Deadline::after);
        own.min(self.give_up)
    }
}

/// Why there is no subscription, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum SubscriptionError {
    /// The waker was used.
    #[error("cancelled")]
    Cancelled,
    /// There is no connection.
    #[error("{0}")]
    Connect(ConnectError),
    /// The host refuses; asking again is of no use.
    #[error("{0}")]
    Refused(String),
    /// The host does not switch the scanout on now, and may do so later.
    #[error(
        "{address} does not switch on scanout {scanout_id}: its QEMU is away, serves another client or \
         takes no sizes, or there is no such scanout (the log of helix-host says which)"
    )]
    NotOn {
        /// The host.
        address: Address,
        /// The scanout.
        scanout_id: u32,
    },
    /// The host did not say in time whether it switches the scanout on, and may do so later.
    #[error(
        "{0} accepted the connection but does not answer ENABLE_SCANOUT (is its QEMU busy? does it push \
         screens?)"
    )]
    Unanswered(Address),
    /// The host does not want this client.
    #[error("{}: {}", .0.code, .0.text)]
    Unwanted(ErrorMessage),
    /// The host has no place for this client now, and may have one later.
    #[error("{}: {}", .0.code, .0.text)]
    Full(ErrorMessage),
    /// The connection ended; another one may do better.
    #[error("{0}")]
    Lost(String),
    /// What comes is not the messages that were sent: the stream is out of step (quirk 8 of
    /// docs/protocol.md), and only a new connection begins at a message.
    #[error("the stream is out of step: {0}")]
    OutOfStep(String),
    /// The host said what is wrong.
    #[error("the host says: {0}")]
    Said(String),
}

impl From<ConnectError> for SubscriptionError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Cancelled => Self::Cancelled,
            error => Self::Connect(error),
        }
    }
}

impl From<ConnectionError> for SubscriptionError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Cancelled => Self::Cancelled,
            ConnectionError::Decode(error) => Self::OutOfStep(error.to_string()),
            error => Self::Lost(error.to_string()),
        }
    }
}

/// What the host pushed.
#[derive(Debug)]
pub struct Pushed {
    /// Times and kind of the access unit.
    pub response: FrameResponse,
    /// The access unit.
    pub data: Payload,
}

/// A subscription that the host has confirmed.
pub struct Subscription {
    connection: Connection<()>,
    target: Target,
    host: Agreement,
    /// Since when there is one.
    began: Instant,
    /// Bytes received when `heard` was set.
    received: u64,
    /// When the host last sent something.
    heard: Instant,
    /// When this side last sent something.
    spoke: Instant,
    /// When the host was asked whether it is there, if it has sent nothing since.
    asked: Option<Instant>,
}

impl Subscription {
    /// Connects, greets, switches the scanout on where that is wanted, and subscribes.
    pub fn start(target: Target, waiter: &mut Waiter) -> Result<Self, SubscriptionError> {
        let stream = Stream::connect(&target.address, waiter, target.deadline())?;
        let mut connection = Connection::new(stream, Limits::client(), waiter)
            .map_err(|error| SubscriptionError::Lost(error.to_string()))?;
        let host = greet(&target, &mut connection, waiter)?;
        let now = Instant::now();
        let mut this = Self {
            connection,
            target,
            host,
            began: now,
            received: 0,
            heard: now,
            spoke: now,
            asked: None,
        };
        let subscribed = match this.enable(waiter) {
            Ok(Some(true)) => this.subscribe(waiter),
            Ok(None) => Err(SubscriptionError::Unanswered(this.target.address.clone())),
            Ok(Some(false)) => {
                return Err(SubscriptionError::NotOn {
                    address: this.target.address,
                    scanout_id: this.target.scanout_id,
                });
            }
            Err(error) => Err(error),
        };
        match subscribed {
            Ok(()) => {
                this.began = Instant::now();
                Ok(this)
            }
            Err(error) => {
                // A screen that nobody watches is not left on, nor one that the host is about to
                // switch on.
                this.end(waiter);
                Err(error)
            }
        }
    }

    /// Switches the scanout on, where that is wanted, and waits for the answer: whether it is. `None`
    /// where there was none in time.
    fn enable(&mut self, waiter: &mut Waiter) -> Result<Option<bool>, SubscriptionError> {
        let Some(enable) = self.target.enable else {
            return Ok(Some(true));
        };
        let id = self.target.scanout_id;
        self.connection
            .send(encode::enable_scanout(id as u16, &enable));
        self.answer(waiter, |message| match message {
            Message::ScanoutResp(resp) if resp.scanout_id == id => Some(resp.success),
            _ => None,
        })
    }

    fn subscribe(&mut self, waiter: &mut Waiter) -> Result<(), SubscriptionError> {
        let id = self.target.scanout_id;
        self.connection.send(encode::subscribe(id));
        let subscribed = self.answer(waiter, |message| match message {
            Message::SubscribeResp {
                scanout_id,
                success,
            } if *scanout_id == id => Some(*success),
            _ => None,
        })?;
        match subscribed {
            Some(true) => Ok(()),
            Some(false) => Err(self.refused()),
            None => Err(SubscriptionError::Lost(format!(
                "{} accepted the connection but does not answer (does it push screens?)",
                self.target.address
            ))),
        }
    }

    /// Who is at the other end, for logs.
    pub fn peer(&self) -> String {
        self.connection.stream().peer()
    }

    /// How long there has been one.
    pub fn lasted(&self) -> Duration {
        self.began.elapsed()
    }

    /// What the host said of itself.
    pub fn host(&self) -> &Agreement {
        &self.host
    }

    /// Whether the host makes a keyframe when asked. Legacy hosts skip the question.
    pub fn makes_keyframes(&self) -> bool {
        self.host.can(Capabilities::KEYFRAME_REQ)
    }

    /// What the times of the pushed frames are of. That an address is one of this machine is all
    /// that is known of the clock's machine: see [`crate::timeline`].
    pub fn clock(&self) -> HostClock {
        if !self.host.can(Capabilities::CAPTURE_PTS) {
            return HostClock::Synthetic;
        }
        let monotonic = self.host.clock_id.as_deref() == Some(CLOCK_MONOTONIC);
        if monotonic && is_local(&self.target.address) {
            HostClock::Shared
        } else {
            HostClock::Foreign
        }
    }

    /// Bytes sent and received on this connection.
    pub fn bytes(&self) -> (u64, u64) {
        (
            self.connection.bytes_sent(),
            self.connection.bytes_received(),
        )
    }

    /// The next pushed access unit. Silence of frames is no error as long as the host answers
    /// PING.
    pub fn next(
        &mut self,
        waiter: &mut Waiter,
        wishes: &Wishes,
    ) -> Result<Pushed, SubscriptionError> {
        // When a message was first seen to have begun and not ended.
        let mut begun = None;
        loop {
            self.fulfil(wishes);
            let event = self.connection.next(waiter, self.next_check())?;
            if let Event::Drained = event {
                // Nothing was read: the host is not judged before the socket was looked at, where
                // its answer may lie.
                continue;
            }
            self.note_life();
            if let Event::Message(envelope) = event {
                begun = None;
                match envelope.message {
                    Message::FrameResponse(response, data) => {
                        self.check_whole(&data)?;
                        return Ok(Pushed { response, data });
                    }
                    Message::Error(error) => {
                        let text = format!("{}: {}", error.code, error.text);
                        return Err(SubscriptionError::Said(text));
                    }
                    _ => {}
                }
            }
            self.check_end(&mut begun)?;
            self.check_life()?;
        }
    }

    /// An access unit of a legacy host may have lost its end, and then what follows has taken that
    /// place (quirk 8): it must not reach a decoder.
    fn check_whole(&self, data: &[u8]) -> Result<(), SubscriptionError> {
        if self.host.capabilities.is_none() && holds_header(data, self.target.scanout_id as u16) {
            return Err(SubscriptionError::OutOfStep(
                "there is a message inside a pushed frame".to_owned(),
            ));
        }
        Ok(())
    }

    /// A size that is wrong and not absurd swallows whatever comes, PONGs too, and looks alive.
    fn check_end(&self, begun: &mut Option<Instant>) -> Result<(), SubscriptionError> {
        let Some(limit) = self.target.timeout else {
            return Ok(());
        };
        if !self.connection.is_inside_message() {
            *begun = None;
            return Ok(());
        }
        let waited = begun.get_or_insert_with(Instant::now).elapsed();
        if waited < 2 * limit {
            return Ok(());
        }
        Err(SubscriptionError::OutOfStep(format!(
            "a message has begun and does not end within {} ms (timeout)",
            waited.as_millis()
        )))
    }

    /// Switches the scanout off, if it was switched on here, and closes. Waits that are cancelled are not any
    /// more: this is what comes after that.
    pub fn end(mut self, waiter: &mut Waiter) {
        if self.target.enable.is_none() {
            return;
        }
        let id = self.target.scanout_id;
        self.connection.send(encode::disable_scanout(id as u16, id));
        // There is no reply. Of use only to a host that takes it now.
        let deadline = Deadline::after(Duration::from_millis(200));
        while self.connection.queued() > 0 {
            match self.connection.next(waiter, deadline) {
                Ok(Event::Message(_) | Event::Woken) => {}
                // Again and again: on the way to NULL, a pause and the end cancel one after the other.
                Err(ConnectionError::Cancelled) => waiter.waker().reset(),
                _ => return,
            }
        }
    }

    fn refused(&self) -> SubscriptionError {
        let Target {
            address,
            scanout_id,
            ..
        } = &self.target;
        SubscriptionError::Refused(format!(
            "{address} does not offer scanout {scanout_id} (is it configured there, and is scanout-id \
             right?)"
        ))
    }

    /// Waits for the message that `pick` finds an answer in. `None` where none comes in time.
    fn answer<T>(
        &mut self,
        waiter: &mut Waiter,
        pick: impl Fn(&Message) -> Option<T>,
    ) -> Result<Option<T>, SubscriptionError> {
        let deadline = self.target.deadline();
        loop {
            match self.connection.next(waiter, deadline)? {
                Event::Message(envelope) => {
                    if let Message::Error(error) = envelope.message {
                        return Err(refusal(error));
                    }
                    if let Some(answer) = pick(&envelope.message) {
                        return Ok(Some(answer));
                    }
                }
                Event::TimedOut => return Ok(None),
                Event::Drained | Event::Woken => {}
            }
        }
    }

    fn fulfil(&mut self, wishes: &Wishes) {
        let id = self.target.scanout_id as u16;
        if wishes.keyframe.swap(false, Ordering::AcqRel) && self.makes_keyframes() {
            self.connection.send(encode::keyframe_req(id));
        }
        let bitrate = wishes.bitrate.swap(0, Ordering::AcqRel);
        if bitrate > 0 {
            // On a subscribed connection only the bitrate counts (quirk 11).
            let config = Config {
                bitrate,
                framerate_num: 60,
                framerate_den: 1,
                profile: 77,
                realtime: true,
                ..Config::default()
            };
            self.connection.send(encode::config_req(id, &config));
        }
    }

    /// When silence must be looked into.
    fn next_check(&self) -> Deadline {
        let sign_of_life = Deadline::at(self.spoke + SIGN_OF_LIFE);
        match self.target.timeout {
            None => sign_of_life,
            Some(limit) => {
                let since = self.asked.unwrap_or(self.heard);
                Deadline::at(since + limit).min(sign_of_life)
            }
        }
    }

    fn note_life(&mut self) {
        let received = self.connection.bytes_received();
        if received != self.received {
            self.received = received;
            self.heard = Instant::now();
            self.asked = None;
        }
    }

    /// Asks a silent host, and gives it up when it does not answer. It has the whole limit from
    /// the question on: downstream may have kept this thread from asking for longer than that.
    fn check_life(&mut self) -> Result<(), SubscriptionError> {
        if let Some(limit) = self.target.timeout {
            match self.asked {
                Some(asked) if asked.elapsed() >= limit => {
                    return Err(SubscriptionError::Lost(format!(
                        "no sign of life for {} ms, not even to a PING (timeout)",
                        self.heard.elapsed().as_millis()
                    )));
                }
                None if self.heard.elapsed() >= limit => {
                    self.ping();
                    self.asked = Some(self.spoke);
                }
                _ => {}
            }
        }
        if self.spoke.elapsed() >= SIGN_OF_LIFE {
            self.ping();
        }
        Ok(())
    }

    fn ping(&mut self) {
        self.connection
            .send(encode::ping(self.target.scanout_id as u16));
        self.spoke = Instant::now();
    }
}

/// Whether a message of this session that a host sends while it pushes begins in `data`. Seven
/// bytes tell: no stream has them by chance.
fn holds_header(data: &[u8], session_id: u16) -> bool {
    let mut rest = data;
    while let Some(at) = rest.iter().position(|byte| *byte == MAGIC[0]) {
        rest = &rest[at..];
        if let Some(header) = rest.first_chunk::<HEADER>()
            && header[..4] == MAGIC
            && [FRAME_RESPONSE, PONG].contains(&header[4])
            && header[6..] == session_id.to_le_bytes()
        {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

/// What an ERROR in place of an answer means: -99 is about the host's state, all else about this
/// client.
fn refusal(error: ErrorMessage) -> SubscriptionError {
    match error.code {
        ErrorCode::INTERNAL => SubscriptionError::Full(error),
        _ => SubscriptionError::Unwanted(error),
    }
}

/// Says hello. Which codecs the host has is seen in its stream.
fn greet(
    target: &Target,
    connection: &mut Connection<()>,
    waiter: &mut Waiter,
) -> Result<Agreement, SubscriptionError> {
    let hello = Hello {
        version: HELLO_VERSION,
        max_in_flight: 1,
        capabilities: Capabilities::KEYFRAME_REQ
            .or(Capabilities::CONFIG_RESP)
            .or(Capabilities::CAPTURE_PTS),
        codecs: CODEC_H264,
        max_message: Limits::client().access_unit,
        max_width: u16::MAX,
        max_height: u16::MAX,
        name: Some(concat!("scanoutsrc ", env!("CARGO_PKG_VERSION")).to_owned()),
        auth_token: target.auth_token.clone(),
        ..Hello::default()
    };
    let deadline = target.deadline();
    let session_id = target.scanout_id as u16;
    let address = &target.address;
    greeting::greet(connection, waiter, hello, session_id, deadline).map_err(|error| match error {
        GreetingError::Refused(error) => refusal(error),
        GreetingError::Connection(error) => error.into(),
        error => SubscriptionError::Lost(format!(
            "{address} accepted the connection, but: {error} (timeout). Is that a helix-host?"
        )),
    })
}
