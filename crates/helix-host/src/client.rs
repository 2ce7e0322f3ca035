// SPDX-License-Identifier: MIT OR Apache-2.0

//! One client: its thread, its connection, what it asked for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_protocol::connection::{Body, ConnectionError, Event, Reading};
use helix_protocol::encode;
use helix_protocol::message::{
    Capabilities, Config, ErrorCode, ErrorMessage, FrameResponse, Hello, RequestTag,
};
use helix_protocol::wait::{Deadline, Waiter, Wake};
use helix_protocol::{Connection, Limits, Message, Stream};

use crate::access::Token;
use crate::access_unit::AccessUnit;
use crate::enabling::Enabling;
use crate::greeting::{self, OPEN, Refusal, Terms};
use crate::layout::Layout;
use crate::monitor::figures::Encoded;
use crate::qemu::Qemu;
use crate::resource::{ClientIdentity, Resource, ResourceResolver};
use crate::scanout::{Scanout, Subscription};
use crate::session::Session;
use crate::settings::EncoderSpec;
use crate::subscriber::Next;

/// Pushed frames handed to the connection at once; more wait where they can still be dropped.
const PUSHED: usize = 4;
/// Without a frame for this long, the memory that the last ones needed goes back to the system. A
/// desktop at rest still sends some frames a second; more often than this is not worth it.
const IDLE: Duration = Duration::from_secs(5);
/// How long a client that is being closed may take to read what is left for it.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long the peer's last bytes are read and thrown away, so that the system does not reset
/// the connection before the peer has read why it ends.
const LINGER: Duration = Duration::from_secs(1);

/// What a client may send before it has shown the token: a HELLO, and nothing large.
const STRANGER: Limits = Limits {
    pixels: 0,
    access_unit: 0,
    nal_count: 0,
    hello: 4096,
    skipped: 4096,
};
/// Of every message, in front of its payload.
const HEADER: u32 = 12;
/// Of FRAME_REQUEST, in front of the pixels: the header and its fields.
const BEFORE_PIXELS: u32 = HEADER + 44;
/// How long a client may take to show the token. It sends it at once, but its machine may be busy.
const ADMISSION: Duration = Duration::from_secs(10);
const WANTS_TOKEN: &str = "this host lets in only those who begin with HELLO and its token \
    (auth-token of vsockenc and scanoutsrc)";

/// What all clients share.
pub struct Host {
    /// The encoder for FRAME_REQUESTs.
    pub encoder: Arc<EncoderSpec>,
    /// By id.
    pub scanouts: BTreeMap<u32, Arc<Scanout>>,
    /// Whose consoles are scanouts.
    pub qemu: Option<Qemu>,
    /// What a client must know; without one, everybody may come in.
    pub token: Option<Token>,
    /// Where the pixels behind resource ids are found.
    pub resolver: Option<Arc<dyn ResourceResolver>>,
    /// What clients had encoded.
    pub encoded: Arc<Encoded>,
    /// Bytes of pixels in one frame.
    pub max_frame_bytes: u32,
    /// See [`crate::server::Config::stall_limit`].
    pub stall_limit: Duration,
}

impl Host {
    /// What a client that is in may send.
    fn limits(&self) -> Limits {
        Limits {
            pixels: self.max_frame_bytes,
            ..Limits::host()
        }
    }

    /// What a client may send that was told [`Host::max_message`].
    fn limits_announced(&self) -> Limits {
        let limits = self.limits();
        Limits {
            skipped: limits.skipped.min(self.max_message() - HEADER),
            ..limits
        }
    }

    /// Bytes of the largest message that this host takes, header included.
    pub fn max_message(&self) -> u32 {
        BEFORE_PIXELS.saturating_add(self.max_frame_bytes)
    }

    /// The pixels of a FRAME_REQUEST that brings none.
    fn resolve(
        &self,
        client: &ClientIdentity,
        id: u32,
        layout: &Layout,
    ) -> Result<gst::Buffer, Refusal> {
        // Quirk 5: a host that took resource 0 for "the console" showed a guest what was not its.
        if id == 0 {
            return Err((
                ErrorCode::INVALID_MESSAGE,
                "FRAME_REQUEST: resource_id is 0 and no pixels follow; send one or the other"
                    .to_owned(),
            ));
        }
        let Some(resolver) = &self.resolver else {
            return Err((
                ErrorCode::RESOURCE_NOT_FOUND,
                format!(
                    "FRAME_REQUEST: resource_id {id} cannot be resolved by this host; send pixels"
                ),
            ));
        };
        if layout.size > self.max_frame_bytes as usize {
            return Err((
                ErrorCode::INVALID_MESSAGE,
                format!(
                    "FRAME_REQUEST: the picture has {} bytes, over the limit of {} \
                     (--max-frame-bytes)",
                    layout.size, self.max_frame_bytes
                ),
            ));
        }
        let resource = Resource {
            id,
            width: layout.width,
            height: layout.height,
            format: layout.pixels,
            stride: layout.strides[0].unsigned_abs(),
            bytes: layout.size,
        };
        let buffer = resolver.resolve(client, &resource).map_err(|error| {
            let text = format!("FRAME_REQUEST: resource_id {id}: {error}");
            (error.code(), text)
        })?;
        if buffer.size() < layout.size {
            return Err((
                ErrorCode::INTERNAL,
                format!(
                    "resource_id {id}: the host's resolver gave {} bytes of {}",
                    buffer.size(),
                    layout.size
                ),
            ));
        }
        Ok(buffer)
    }
}

/// One client, in its thread.
pub struct Client {
    host: Arc<Host>,
    identity: ClientIdentity,
    waiter: Waiter,
    connection: Connection<AccessUnit>,
    session: Session,
    subscription: Option<Subscription>,
    enabling: Enabling,
    connected: Instant,
    /// What the client's HELLO and ours agreed on.
    terms: Terms,
    /// Whether it has shown the token, where the host wants one.
    admitted: bool,
    /// Whether it has ever sent a message.
    spoke: bool,
    /// When its last frame came, while the memory for more of them is kept.
    last_frame: Option<Instant>,
    /// Set when nothing more is read: the client is gone when all is sent, or at this moment.
    closing: Option<Instant>,
    /// Why it goes: the ERROR that is the last thing sent, or `None` where the client closed.
    refused: Option<String>,
}

impl Client {
    /// Takes over a client's socket.
    pub fn new(
        host: Arc<Host>,
        stream: Stream,
        identity: ClientIdentity,
        waiter: Waiter,
    ) -> std::io::Result<Self> {
        let admitted = host.token.is_none();
        let limits = if admitted { host.limits() } else { STRANGER };
        let connection = Connection::new(stream, limits, &waiter)?;
        let session = Session::new(host.encoder.clone(), host.encoded.clone(), waiter.waker());
        let enabling = Enabling::new(waiter.waker());
        Ok(Self {
            host,
            identity,
            waiter,
            connection,
            session,
            subscription: None,
            enabling,
            connected: Instant::now(),
            terms: Terms::default(),
            admitted,
            spoke: false,
            last_frame: None,
            closing: None,
            refused: None,
        })
    }

    /// Serves the client until it goes, errs, or the host ends.
    pub fn run(mut self) {
        let reason = loop {
            if let Err(reason) = self.check_progress() {
                break reason;
            }
            self.trim();
            self.push_frames();
            self.session.collect(&mut self.connection);
            for answer in self.enabling.collect() {
                self.connection.send(answer);
            }
            let open = self.session.open() + self.enabling.open() + self.connection.queued();
            let deadline = match self.closing {
                Some(_) if open == 0 => break "it closed".to_owned(),
                Some(moment) if Instant::now() >= moment => {
                    break "it does not read what is left for it".to_owned();
                }
                Some(moment) => Deadline::at(moment),
                // Now and then: whether the client owes the rest of a message is not known before
                // the connection has looked at what it read together with the message before.
                None => Deadline::after(self.host.stall_limit),
            };
            let bytes = self.session.bytes() + self.connection.queued_bytes();
            let reading = if self.closing.is_some() || open > OPEN {
                Reading::Nothing
            } else if open == OPEN || bytes >= self.host.max_frame_bytes as usize {
                // A client that keeps to what HELLO says is full now, and may ask with a PING
                // whether anybody is still there.
                Reading::NoPixels
            } else {
                Reading::All
            };
            self.connection.set_reading(reading);
            let deadline = self
                .moments()
                .into_iter()
                .flatten()
                .fold(deadline, |deadline, moment| {
                    deadline.min(Deadline::at(moment))
                });
            match self.connection.next(&mut self.waiter, deadline) {
                Ok(Event::Message(envelope)) => self.handle(envelope.session_id, envelope.message),
                Ok(Event::Drained | Event::Woken | Event::TimedOut) => {}
                // It may have closed its sending side only, and still wait for replies.
                Err(ConnectionError::Closed) => self.close(),
                Err(ConnectionError::Decode(reason)) => {
                    let text = if self.admitted {
                        reason.to_string()
                    } else {
                        format!("{reason}; {WANTS_TOKEN}")
                    };
                    self.refuse_and_close(ErrorCode::INVALID_MESSAGE, text);
                }
                Err(ConnectionError::Cancelled) => break "the host ends".to_owned(),
                Err(ConnectionError::Io(error)) => break error.to_string(),
            }
        };
        self.subscription = None;
        if self.refused.is_some() {
            self.linger();
        }
        let reason = self.refused.unwrap_or(reason);
        tracing::info!(
            reason,
            received = self.connection.bytes_received(),
            sent = self.connection.bytes_sent(),
            "client gone"
        );
    }

    /// When there is something to do even if nothing happens.
    fn moments(&self) -> [Option<Instant>; 5] {
        let limit = self.host.stall_limit;
        [
            self.session.deadline(),
            self.connection.unsent_since().map(|since| since + limit),
            self.owed_by(),
            self.last_frame.map(|since| since + IDLE),
            // While frames wait for room in the connection there is nothing to ask for.
            self.subscription
                .as_ref()
                .filter(|_| self.closing.is_none() && self.connection.queued() < PUSHED)
                .and_then(Subscription::deadline),
        ]
    }

    /// When the rest of a message, or the first one, must have come. A client that is silent
    /// between two messages owes nothing: a still desktop has nothing to say, and a subscriber
    /// never must.
    fn owed_by(&self) -> Option<Instant> {
        if self.closing.is_some() {
            return None;
        }
        let limit = self.host.stall_limit;
        if !self.admitted {
            // A byte now and then must not keep a place for a stranger.
            return Some(self.connected + limit.min(ADMISSION));
        }
        let silent = self.connection.silent_since()?;
        if self.connection.is_inside_message() {
            Some(silent + limit)
        } else if self.spoke {
            None
        } else {
            Some(self.connected + limit)
        }
    }

    /// Sees to it that a client that makes no progress does not keep its place for ever. The error
    /// is for one that cannot even be told: it reads nothing.
    fn check_progress(&mut self) -> Result<(), String> {
        let limit = self.host.stall_limit;
        let seconds = limit.as_secs_f32();
        let unsent = self.connection.unsent_since();
        if unsent.is_some_and(|since| since.elapsed() >= limit) {
            return Err(format!("it read nothing for {seconds} s while data waited"));
        }
        if self
            .owed_by()
            .is_some_and(|moment| Instant::now() >= moment)
        {
            let text = if !self.admitted {
                format!("no token came in time; {WANTS_TOKEN}")
            } else if self.connection.is_inside_message() {
                format!("the rest of a message did not come within {seconds} s")
            } else {
                format!("no message came within {seconds} s of connecting")
            };
            self.refuse_and_close(ErrorCode::INVALID_MESSAGE, text);
        }
        Ok(())
    }

    /// Gives memory back when the client has sent no frame for some time.
    fn trim(&mut self) {
        if self.last_frame.is_some_and(|since| since.elapsed() >= IDLE) {
            self.last_frame = None;
            self.connection.trim();
        }
    }

    fn handle(&mut self, session_id: u16, message: Message) {
        let first = !std::mem::replace(&mut self.spoke, true);
        match message {
            Message::Hello(hello) if first => self.greet(session_id, &hello),
            _ if !self.admitted => {
                self.refuse_and_close(ErrorCode::NOT_CONFIGURED, WANTS_TOKEN.to_owned());
            }
            // Requests may be open already, and nobody could say which terms they are under.
            Message::Hello(_) => self.refuse_and_close(
                ErrorCode::INVALID_MESSAGE,
                "HELLO: must be the first message of a connection, and comes once".to_owned(),
            ),
            Message::FrameRequest(request, Some(pixels)) => {
                self.last_frame = Some(Instant::now());
                // Their memory goes back to the decoder when the encoder is done with them.
                let pixels = gst::Buffer::from_mut_slice(pixels);
                self.session.encode(session_id, &request, |_| Ok(pixels));
            }
            Message::FrameRequest(request, None) => {
                let (host, identity) = (&self.host, &self.identity);
                self.session.encode(session_id, &request, |layout| {
                    host.resolve(identity, request.resource_id, layout)
                });
            }
            Message::KeyframeReq => match &self.subscription {
                Some(subscription) => subscription.force_keyframe(),
                None => self.session.want_keyframe(),
            },
            Message::ConfigReq(config) => {
                tracing::debug!(?config, "CONFIG_REQ");
                self.configure(session_id, &config);
            }
            Message::Ping => self.connection.send(encode::pong(session_id)),
            Message::EnableScanout(enable) => {
                let done = self.enabling.enable(session_id, enable.scanout_id);
                match self.scanout(enable.scanout_id) {
                    Some(scanout) => scanout.enable(&enable, done),
                    None => done(Err("there is no such scanout".to_owned())),
                }
            }
            Message::DisableScanout { scanout_id } => {
                let done = self.enabling.disable(scanout_id);
                match self.scanout(scanout_id) {
                    Some(scanout) => scanout.disable(done),
                    None => done(Err("there is no such scanout".to_owned())),
                }
            }
            Message::Subscribe { scanout_id } => self.subscribe(scanout_id),
            Message::Unknown { .. } => {
                tracing::debug!(?message, "skipped");
            }
            Message::FrameResponse(..)
            | Message::ConfigResp(_)
            | Message::Pong
            | Message::ScanoutResp(_)
            | Message::SubscribeResp { .. }
            | Message::HelloResp(_)
            | Message::Error(_) => {
                tracing::debug!(?message, "a host's message from a client, skipped");
            }
        }
    }

    /// Answers the client's HELLO.
    fn greet(&mut self, session_id: u16, hello: &Hello) {
        match greeting::answer(&self.host, hello) {
            Ok((response, terms)) => {
                self.admitted = true;
                self.connection.set_limits(self.host.limits_announced());
                tracing::info!(client = hello.name, ?terms, "HELLO");
                self.terms = terms;
                self.session.agree(terms);
                let (head, tlvs) = encode::hello_resp(session_id, &response);
                self.connection.send_bytes(head, tlvs);
            }
            Err((code, text)) => self.refuse_and_close(code, text),
        }
    }

    /// CONFIG_REQ: for the scanout, where the client watches one, else for its own encoder.
    fn configure(&mut self, session_id: u16, config: &Config) {
        if let Some(subscription) = &self.subscription {
            if config.bitrate > 0 {
                subscription.set_bitrate(config.bitrate);
            }
        } else {
            self.session.configure(config);
        }
        if self.terms.capabilities.contains(Capabilities::CONFIG_RESP) {
            let in_force = match &self.subscription {
                Some(subscription) => subscription.in_force(),
                None => self.session.in_force(config),
            };
            self.connection
                .send(encode::config_resp(session_id, &in_force));
        }
    }

    /// The scanout of this id, if there is one.
    fn scanout(&self, id: u32) -> Option<&Arc<Scanout>> {
        let scanout = self.host.scanouts.get(&id)?;
        scanout.exists().then_some(scanout)
    }

    fn subscribe(&mut self, scanout_id: u32) {
        let subscription = match self.scanout(scanout_id) {
            None => {
                tracing::debug!(scanout = scanout_id, "SUBSCRIBE: there is no such scanout");
                None
            }
            Some(scanout) => scanout
                .subscribe(self.waiter.waker())
                .inspect_err(|error| tracing::error!(scanout = scanout_id, %error, "SUBSCRIBE"))
                .ok(),
        };
        self.connection
            .send(encode::subscribe_resp(scanout_id, subscription.is_some()));
        if subscription.is_some() {
            // A client must not fill the log: one line is enough of a connection.
            if self.subscription.is_none() {
                tracing::info!(scanout = scanout_id, "subscribed");
            } else {
                tracing::debug!(scanout = scanout_id, "subscribed anew");
            }
            self.subscription = subscription;
        }
    }

    /// Hands pushed frames to the connection.
    fn push_frames(&mut self) {
        if self.closing.is_some() {
            return;
        }
        let Some(subscription) = &self.subscription else {
            return;
        };
        let id = subscription.scanout_id();
        while self.connection.queued() < PUSHED {
            match subscription.next() {
                Next::Frame(frame) => {
                    let response = FrameResponse {
                        pts: frame.pts,
                        dts: frame.pts,
                        is_keyframe: frame.unit.is_keyframe(),
                        ..FrameResponse::default()
                    };
                    let head =
                        encode::frame_response(id as u16, &response, frame.unit.size() as u32);
                    if let Err(text) = self.terms.check_size(&head, &frame.unit) {
                        self.subscription = None;
                        self.refuse_and_close(ErrorCode::INTERNAL, text);
                        return;
                    }
                    self.connection.send_with(head, frame.unit);
                }
                Next::Ended(reason) => {
                    self.subscription = None;
                    self.refuse_and_close(ErrorCode::INTERNAL, reason);
                    return;
                }
                Next::Empty | Next::NeedsKeyframe => return,
            }
        }
    }

    /// Reads no more, and goes when all replies are out.
    fn close(&mut self) {
        self.subscription = None;
        self.closing
            .get_or_insert_with(|| Instant::now() + LAST_WORDS);
    }

    /// Answers with an ERROR behind all other replies, and closes.
    fn refuse_and_close(&mut self, code: ErrorCode, text: String) {
        self.session
            .refuse(0, RequestTag::default(), code, text.clone());
        self.refused = Some(text);
        self.close();
    }

    /// Ends the sending side and throws away what still comes, until the peer closes too.
    fn linger(&mut self) {
        let stream = self.connection.stream();
        if socket2::SockRef::from(stream)
            .shutdown(std::net::Shutdown::Write)
            .is_err()
        {
            return;
        }
        let deadline = Deadline::after(LINGER);
        let mut space = vec![0; 64 * 1024];
        while !deadline.has_passed() {
            match stream.recv(&mut space) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    match self.waiter.wait(deadline) {
                        Ok(Wake::Ready | Wake::Woken) => {}
                        Ok(Wake::TimedOut | Wake::Cancelled) | Err(_) => return,
                    }
                }
                Err(_) => return,
            }
        }
    }
}

/// For a client that cannot be served: says why, as far as the socket takes it at once.
pub fn turn_away(stream: &Stream, code: ErrorCode, text: &str) {
    let head = encode::error(
        0,
        &ErrorMessage {
            code,
            text: text.to_owned(),
            tag: None,
        },
    );
    // It is gone in the next moment; there is nothing to do about a failure.
    let _ = stream.send(&[std::io::IoSlice::new(&head)]);
    let _ = socket2::SockRef::from(stream).shutdown(std::net::Shutdown::Write);
}
