// SPDX-License-Identifier: MIT OR Apache-2.0

//! The session's thread: it connects, greets, talks, and calls a lost host again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_protocol::connection::ConnectionError;
use helix_protocol::greeting::{self, Agreement, GreetingError};
use helix_protocol::message::{CODEC_H264, Capabilities, ErrorCode, HELLO_VERSION, Hello};
use helix_protocol::wait::{Deadline, Waiter, Wake};
use helix_protocol::{Address, Connection, Limits, Stream};
use zerocopy_plugin_common::Backoff;

use super::conversation::{Conversation, SESSION_ID};
use super::delivery::Delivery;
use super::transfer::Choice;
use super::{Client, Format, Item, SessionSettings, Shared, Status};
use crate::pixels::Pixels;

/// What this side can make use of.
const CAPABILITIES: Capabilities = Capabilities::REQUEST_IDS
    .or(Capabilities::CONFIG_RESP)
    .or(Capabilities::RESOURCE_IDS);

/// Why a conversation ended.
pub(super) enum End {
    /// The session is being dropped.
    Cancelled,
    /// Another connection may do better.
    Lost(String),
    /// The host has no place for this client now.
    Full(String),
    /// No other connection would.
    Hopeless(String),
}

impl From<ConnectionError> for End {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Cancelled => Self::Cancelled,
            error => Self::Lost(error.to_string()),
        }
    }
}

pub(super) struct Worker {
    pub shared: Arc<Shared>,
    pub client: Arc<dyn Client>,
    pub address: Address,
    pub settings: SessionSettings,
    pub waiter: Waiter,
    /// The settings last given, sent again on each connection.
    pub format: Option<Format>,
    /// Runs from the loss of a host until another has answered a request.
    pub backoff: Option<Backoff>,
    /// The next request asks for a keyframe.
    pub force_keyframe: bool,
    pub since_keyframe: u32,
    /// Some host has encoded a frame of this session.
    pub encoded_any: bool,
    /// The epoch of the last request.
    pub epoch: u32,
}

impl Worker {
    pub fn new(
        shared: Arc<Shared>,
        client: Arc<dyn Client>,
        settings: SessionSettings,
        waiter: Waiter,
    ) -> Self {
        Self {
            shared,
            client,
            address: settings.connection.address(),
            settings,
            waiter,
            format: None,
            backoff: None,
            force_keyframe: true,
            since_keyframe: 0,
            encoded_any: false,
            epoch: 0,
        }
    }

    pub fn run(&mut self) {
        let mut connected = match self.connect() {
            Err(End::Full(reason)) => self.call_again(&reason),
            connected_or_not => connected_or_not,
        };
        let mut again = false;
        loop {
            let (mut connection, host) = match connected {
                Ok(connected) => connected,
                Err(End::Cancelled) => return,
                Err(End::Lost(reason) | End::Full(reason) | End::Hopeless(reason)) => {
                    return self.fail(&reason);
                }
            };
            let choice = match Choice::new(self.settings.transfer, host.capabilities) {
                Ok(choice) => choice,
                Err(reason) => return self.fail(&format!("{}: {reason}", self.address)),
            };
            let peer = connection.stream().peer();
            self.client.connected(&peer, &host, choice.only_way());
            let host = Arc::new(host);
            let mut conversation = Conversation::new(self, choice, host.clone(), again);
            self.shared.counts().reconnects += u64::from(again);
            self.shared.update(|state| {
                state.status = Status::Connected;
                state.host = Some(host);
            });
            let end = conversation.run(self, &mut connection);
            drop(connection);
            conversation.lose_frames(self);
            let reason = match end {
                End::Cancelled => return,
                End::Hopeless(reason) => return self.fail(&reason),
                End::Lost(reason) | End::Full(reason) => reason,
            };
            // Before it is called: until then, frames would wait for it.
            self.shared
                .update(|state| state.status = Status::Reconnecting);
            self.drop_queued_frames();
            self.force_keyframe = true;
            connected = self.call_again(&format!("lost {}: {reason}", self.address));
            again = true;
        }
    }

    /// A connection to a host that takes our frames.
    fn connect(&mut self) -> Result<(Connection<Pixels>, Agreement), End> {
        use helix_protocol::transport::ConnectError;
        let deadline = self.deadline();
        let stream = Stream::connect(&self.address, &mut self.waiter, deadline);
        let stream = stream.map_err(|error| match error {
            ConnectError::Cancelled => End::Cancelled,
            error => End::Lost(error.to_string()),
        })?;
        let mut connection = Connection::new(stream, Limits::client(), &self.waiter)
            .map_err(|error| End::Lost(format!("connect to {}: {error}", self.address)))?;
        let (hello, began, deadline) = (self.hello(), Instant::now(), self.deadline());
        let host = greeting::greet(
            &mut connection,
            &mut self.waiter,
            hello,
            SESSION_ID,
            deadline,
        )
        .map_err(|error| self.not_greeted(error, began.elapsed()))?;
        Self::is_of_use(&host)
            .map_err(|reason| End::Hopeless(format!("{}: {reason}", self.address)))?;
        Ok((connection, host))
    }

    /// Until when a step of the way to a host may take that begins now, of which there are two: no longer
    /// than a lost host is called, and a second where that is over.
    fn deadline(&self) -> Deadline {
        let own = self.settings.connection.reply_deadline();
        let backoff = self.backoff.as_ref().map(Backoff::attempt_deadline);
        own.min(backoff.unwrap_or(Deadline::NEVER))
    }

    fn hello(&self) -> Hello {
        let limits = Limits::client();
        Hello {
            version: HELLO_VERSION,
            max_in_flight: self.settings.max_in_flight,
            capabilities: CAPABILITIES,
            codecs: CODEC_H264,
            max_message: limits.access_unit,
            max_width: u16::MAX,
            max_height: u16::MAX,
            name: Some(concat!("vsockenc ", env!("CARGO_PKG_VERSION")).to_owned()),
            auth_token: self.settings.connection.auth_token(),
            ..Hello::default()
        }
    }

    /// What a greeting's end means that took so long.
    fn not_greeted(&self, error: GreetingError, took: Duration) -> End {
        let address = &self.address;
        match error {
            GreetingError::Connection(ConnectionError::Cancelled) => End::Cancelled,
            GreetingError::Refused(error) => {
                let text = self.settings.connection.refusal(&error);
                match error.code {
                    // It might have a place for us later.
                    ErrorCode::INTERNAL => End::Full(text),
                    _ => End::Hopeless(text),
                }
            }
            GreetingError::Silence => {
                let limit = self.timeout().filter(|limit| *limit <= took);
                let waited = limit.map_or_else(
                    || format!("{} ms", took.as_millis()),
                    |limit| format!("{} ms (timeout)", limit.as_millis()),
                );
                End::Lost(format!(
                    "{address} accepted the connection, but gave no sign of life for {waited}: \
                     neither HELLO nor PING was answered. Is that a helix-host?"
                ))
            }
            error => End::Lost(format!("greeting {address}: {error}")),
        }
    }

    /// Why nothing can come of a host, if so.
    fn is_of_use(host: &Agreement) -> Result<(), String> {
        if host.codecs & CODEC_H264 == 0 {
            return Err(format!(
                "the host encodes no H.264 (codecs {:#x} in its HELLO_RESP); give it an H.264 \
                 encoder, or use another host",
                host.codecs
            ));
        }
        if host.max_in_flight == 0 {
            return Err(
                "the host takes no requests (max_in_flight 0 in its HELLO_RESP)".to_owned(),
            );
        }
        Ok(())
    }

    /// Connects again and again, as long as the settings permit. `why` is what is wrong.
    fn call_again(&mut self, why: &str) -> Result<(Connection<Pixels>, Agreement), End> {
        let limit = self.settings.connection.reconnect_timeout();
        if limit.is_zero() {
            return Err(End::Lost(why.to_owned()));
        }
        self.client.reconnecting(why);
        let mut outcome = String::new();
        loop {
            let backoff = self.backoff.get_or_insert_with(|| Backoff::new(limit));
            let Some(at) = backoff.next_attempt() else {
                let tried = limit.as_millis();
                return Err(End::Lost(format!(
                    "{why}; called again for {tried} ms (reconnect-timeout) in vain{outcome}"
                )));
            };
            loop {
                match self.waiter.wait(Deadline::at(at)) {
                    Ok(Wake::Cancelled) => return Err(End::Cancelled),
                    Ok(Wake::TimedOut) => break,
                    Ok(Wake::Ready | Wake::Woken) => {}
                    Err(error) => return Err(End::Hopeless(error.to_string())),
                }
            }
            match self.connect() {
                Err(End::Lost(reason) | End::Full(reason)) => outcome = format!("; {reason}"),
                connected_or_not => return connected_or_not,
            }
        }
    }

    /// Frames that were accepted and not sent have no future after a loss; settings have.
    fn drop_queued_frames(&mut self) {
        let queue = std::mem::take(&mut self.shared.state().queue);
        for item in queue {
            match item {
                Item::Format(format) => self.format = Some(format),
                Item::Frame(request, epoch, _) => {
                    self.drop_frame(request.frame, epoch, "the host was lost");
                }
            }
        }
    }

    pub fn report_dropped(&self, frame: u32, epoch: u32, reason: &str) {
        self.shared.deliver(Delivery {
            frame,
            epoch,
            outcome: Err(reason.to_owned()),
        });
    }

    /// Whether a frame that was submitted in this epoch is nobody's any more.
    pub fn is_flushed(&self, epoch: u32) -> bool {
        self.shared.state().epoch != epoch
    }

    /// Gives the place of a frame that nobody wants reported back.
    pub fn release(&self) {
        self.shared.update(|state| state.open -= 1);
    }

    /// Reports a frame as dropped if somebody still wants to know.
    pub fn drop_frame(&self, frame: u32, epoch: u32, reason: &str) {
        if self.is_flushed(epoch) {
            self.release();
        } else {
            self.report_dropped(frame, epoch, reason);
        }
    }

    pub fn fail(&mut self, reason: &str) {
        self.drop_queued_frames();
        self.shared.fail(self.client.as_ref(), reason);
    }

    pub fn timeout(&self) -> Option<Duration> {
        self.settings.connection.timeout()
    }
}
