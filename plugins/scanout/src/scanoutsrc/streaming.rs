// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the streaming thread does from one frame to the next: wait for it, and find the host
//! again when it is lost.

use std::sync::atomic::Ordering;

use gst::prelude::*;
use gst::subclass::prelude::*;
use helix_protocol::Address;
use helix_protocol::wait::{Deadline, Waiter, Wake};
use zerocopy_plugin_common::{Backoff, ConnectionState, connection_message};

use super::imp::{CAT, ScanoutSrc, lock};
use super::output::Output;
use super::settings::Settings;
use crate::subscription::{Subscription, SubscriptionError, Target};

/// What lives from `start()` to `stop()`.
pub(super) struct Streaming {
    waiter: Waiter,
    target: Target,
    settings: Settings,
    subscription: Option<Subscription>,
    /// Runs from the loss of a host until another has pushed a frame.
    backoff: Option<Backoff>,
    /// Bytes of the subscription, sent and received, that are in the figures.
    bytes: (u64, u64),
    output: Output,
}

impl Streaming {
    /// Nobody has been called yet.
    pub fn new(settings: Settings, scanout_id: u16, waiter: Waiter) -> Self {
        Self {
            waiter,
            target: settings.target(scanout_id),
            output: Output::new(settings.low_delay_vui),
            settings,
            subscription: None,
            backoff: None,
            bytes: (0, 0),
        }
    }

    /// The host.
    pub fn address(&self) -> &Address {
        &self.target.address
    }

    /// Says what there is to say at the end, and closes.
    pub fn end(mut self) {
        if let Some(subscription) = self.subscription {
            // The base class has unlocked, and now there is something to say once more.
            self.waiter.waker().reset();
            subscription.end(&mut self.waiter);
        }
    }
}

impl ScanoutSrc {
    /// Waits for what comes next.
    pub(super) fn next_buffer(
        &self,
        streaming: &mut Streaming,
    ) -> Result<gst::Buffer, gst::FlowError> {
        if streaming.subscription.is_none() {
            match Subscription::start(streaming.target.clone(), &mut streaming.waiter) {
                Ok(subscription) => self.subscribed(streaming, subscription),
                Err(SubscriptionError::Cancelled) => return Err(gst::FlowError::Flushing),
                Err(SubscriptionError::Unwanted(error)) => {
                    let reason = streaming.settings.connection.refusal(&error);
                    return Err(self.fail(streaming, &reason));
                }
                Err(error) => return Err(self.fail(streaming, &error.to_string())),
            }
        }
        loop {
            let Some(subscription) = &mut streaming.subscription else {
                return Err(gst::FlowError::Error);
            };
            let result = subscription.next(&mut streaming.waiter, &self.wishes);
            self.count_bytes(streaming);
            match result {
                Ok(pushed) => {
                    if let Some(buffer) = self.buffer(&mut streaming.output, pushed)? {
                        streaming.backoff = None;
                        return Ok(buffer);
                    }
                }
                Err(SubscriptionError::Cancelled) => return Err(gst::FlowError::Flushing),
                Err(error) => {
                    {
                        let mut figures = lock(&self.figures);
                        match error {
                            SubscriptionError::OutOfStep(_) => figures.resyncs += 1,
                            SubscriptionError::Said(_) => figures.errors += 1,
                            _ => {}
                        }
                    }
                    self.resubscribe(streaming, &error.to_string())?;
                }
            }
        }
    }

    fn subscribed(&self, streaming: &mut Streaming, subscription: Subscription) {
        let peer = subscription.peer();
        gst::info!(
            CAT,
            imp = self,
            "subscribed at {} ({peer}), {:?}",
            streaming.target.address,
            subscription.host()
        );
        let deaf = !subscription.makes_keyframes();
        if deaf {
            gst::info!(
                CAT,
                imp = self,
                "this host makes keyframes when it wants to: requests for one are given up"
            );
        }
        self.wishes.host_is_deaf.store(deaf, Ordering::Release);
        streaming.output.connected(subscription.clock());
        streaming.subscription = Some(subscription);
        streaming.bytes = (0, 0);
        self.post(streaming, ConnectionState::Connected, &peer, "");
    }

    /// Calls the host again until it pushes once more, or the time is up.
    fn resubscribe(&self, streaming: &mut Streaming, reason: &str) -> Result<(), gst::FlowError> {
        streaming.subscription = None;
        streaming.output.lost();
        let limit = streaming.settings.connection.reconnect_timeout();
        let lost = format!("lost {}: {reason}", streaming.target.address);
        if limit.is_zero() {
            return Err(self.fail(streaming, &lost));
        }
        gst::warning!(CAT, imp = self, "{lost}; calling again");
        self.post(streaming, ConnectionState::Reconnecting, "", &lost);
        let mut outcome = String::new();
        while let Some(at) = streaming
            .backoff
            .get_or_insert_with(|| Backoff::new(limit))
            .next_attempt()
        {
            loop {
                match streaming.waiter.wait(Deadline::at(at)) {
                    Ok(Wake::TimedOut) => break,
                    Ok(Wake::Cancelled) => return Err(gst::FlowError::Flushing),
                    Ok(Wake::Ready | Wake::Woken) => {}
                    Err(error) => return Err(self.fail(streaming, &error.to_string())),
                }
            }
            match Subscription::start(streaming.target.clone(), &mut streaming.waiter) {
                Ok(subscription) => {
                    lock(&self.figures).reconnects += 1;
                    self.wish_bitrate();
                    self.subscribed(streaming, subscription);
                    return Ok(());
                }
                Err(SubscriptionError::Cancelled) => return Err(gst::FlowError::Flushing),
                // Another token does not come by trying again.
                Err(SubscriptionError::Unwanted(error)) => {
                    let reason = streaming.settings.connection.refusal(&error);
                    return Err(self.fail(streaming, &reason));
                }
                Err(error) => outcome = format!("; {error}"),
            }
        }
        let tried = limit.as_millis();
        let text =
            format!("{lost}; not found again within {tried} ms (reconnect-timeout){outcome}");
        Err(self.fail(streaming, &text))
    }

    fn count_bytes(&self, streaming: &mut Streaming) {
        let Some(subscription) = &streaming.subscription else {
            return;
        };
        let bytes = subscription.bytes();
        let mut figures = lock(&self.figures);
        figures.bytes_sent += bytes.0 - streaming.bytes.0;
        figures.bytes_received += bytes.1 - streaming.bytes.1;
        streaming.bytes = bytes;
    }

    fn fail(&self, streaming: &mut Streaming, reason: &str) -> gst::FlowError {
        lock(&self.figures).errors += 1;
        self.post(streaming, ConnectionState::Lost, "", reason);
        gst::element_imp_error!(self, gst::ResourceError::OpenRead, ("{reason}"));
        gst::FlowError::Error
    }

    fn post(&self, streaming: &Streaming, state: ConnectionState, peer: &str, reason: &str) {
        let obj = self.obj();
        let address = &streaming.target.address;
        let message = connection_message(&*obj, state, address, peer, "", reason);
        // Fails where there is no bus: then nobody wants to know.
        let _ = obj.post_message(message);
    }
}
