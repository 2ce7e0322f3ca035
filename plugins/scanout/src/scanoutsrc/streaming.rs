// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the streaming thread does from one frame to the next: wait for it, and find the host
//! again when it is lost.

use std::sync::atomic::Ordering;
use std::time::Instant;

use gst::prelude::*;
use gst::subclass::prelude::*;
use helix_protocol::Address;
use helix_protocol::wait::{Deadline, Waiter, Wake};
use zerocopy_plugin_common::{Backoff, ConnectionState, connection_message};

use super::imp::{CAT, ScanoutSrc, lock};
use super::output::Output;
use super::scanout_id::not_lent;
use super::settings::Settings;
use crate::lease::LeaseError;
use crate::subscription::{Subscription, SubscriptionError, Target};

/// What lives from `start()` to `stop()`.
pub(super) struct Streaming {
    waiter: Waiter,
    address: Address,
    settings: Settings,
    /// `None` until it is known which one was lent.
    scanout_id: Option<u16>,
    subscription: Option<Subscription>,
    /// There has been one.
    connected: bool,
    /// Why the host is called again, while it is.
    lost: Option<String>,
    /// Runs from the loss of a host until another has pushed a frame, or has been there for as long as it
    /// would have been called.
    backoff: Option<Backoff>,
    /// When this subscription began.
    since: Instant,
    /// Bytes of the subscription, sent and received, that are in the figures.
    bytes: (u64, u64),
    output: Output,
}

impl Streaming {
    /// Nobody has been called yet.
    pub fn new(settings: Settings, scanout_id: Option<u16>, waiter: Waiter) -> Self {
        Self {
            waiter,
            address: settings.connection.address(),
            scanout_id,
            output: Output::new(settings.low_delay_vui),
            settings,
            subscription: None,
            connected: false,
            lost: None,
            backoff: None,
            since: Instant::now(),
            bytes: (0, 0),
        }
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
            if let Some(why) = streaming.lost.clone() {
                // The element was paused or flushed while it called: that time does not count.
                streaming.backoff = None;
                self.call_again(streaming, &why)?;
            } else {
                self.call_first(streaming)?;
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
                    streaming.subscription = None;
                    streaming.output.lost();
                    let limit = streaming.settings.connection.reconnect_timeout();
                    if streaming.since.elapsed() >= limit {
                        streaming.backoff = None;
                    }
                    let reason = format!("lost {}: {error}", streaming.address);
                    self.call_again(streaming, &reason)?;
                }
            }
        }
    }

    /// Calls a host for the first time. One that cannot serve this client now is called again.
    fn call_first(&self, streaming: &mut Streaming) -> Result<(), gst::FlowError> {
        let target = match self.target(streaming) {
            Ok(target) => target,
            Err(LeaseError::Cancelled) => return Err(gst::FlowError::Flushing),
            Err(error) => {
                lock(&self.figures).errors += 1;
                let reason = not_lent(&error);
                gst::element_imp_error!(self, gst::ResourceError::OpenRead, ("{reason}"));
                return Err(gst::FlowError::Error);
            }
        };
        match Subscription::start(target, &mut streaming.waiter) {
            Ok(subscription) => {
                self.subscribed(streaming, subscription);
                Ok(())
            }
            Err(SubscriptionError::Cancelled) => Err(gst::FlowError::Flushing),
            Err(SubscriptionError::Unwanted(error)) => {
                let reason = streaming.settings.connection.refusal(&error);
                Err(self.fail(streaming, &reason))
            }
            Err(SubscriptionError::Full(error)) => {
                let reason = streaming.settings.connection.refusal(&error);
                self.call_again(streaming, &reason)
            }
            Err(error @ SubscriptionError::NotOn { .. }) => {
                self.call_again(streaming, &error.to_string())
            }
            Err(error) => Err(self.fail(streaming, &error.to_string())),
        }
    }

    /// What to subscribe to.
    fn target(&self, streaming: &mut Streaming) -> Result<Target, LeaseError> {
        let lease = lock(&self.lease);
        if lease.as_ref().is_some_and(|lease| !lease.is_alive()) {
            // The manager may have lent it to somebody else by now.
            streaming.scanout_id = None;
        }
        drop(lease);
        let id = match streaming.scanout_id {
            Some(id) => id,
            None => self.borrow(streaming)?,
        };
        streaming.scanout_id = Some(id);
        Ok(streaming.settings.target(id))
    }

    /// Waits until it is known which scanout was lent.
    fn borrow(&self, streaming: &mut Streaming) -> Result<u16, LeaseError> {
        let timeout = streaming.settings.connection.timeout();
        // One that has ended before its answer was read is asked for once more.
        let mut again = true;
        loop {
            let held = lock(&self.lease).take();
            let mut lease = match held {
                Some(lease) => lease,
                None => streaming.settings.ask_for_lease()?,
            };
            let deadline = timeout.map_or(Deadline::NEVER, Deadline::after);
            match lease.scanout_id(&mut streaming.waiter, deadline) {
                Ok(id) => {
                    let connector = lease.connector();
                    gst::info!(CAT, imp = self, "borrowed scanout {id} ({connector})");
                    *lock(&self.lease) = Some(lease);
                    return Ok(id);
                }
                Err(LeaseError::Cancelled) => {
                    *lock(&self.lease) = Some(lease);
                    return Err(LeaseError::Cancelled);
                }
                Err(LeaseError::Ended { .. }) if std::mem::take(&mut again) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn subscribed(&self, streaming: &mut Streaming, subscription: Subscription) {
        let peer = subscription.peer();
        gst::info!(
            CAT,
            imp = self,
            "subscribed at {} ({peer}), {:?}",
            streaming.address,
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
        if std::mem::replace(&mut streaming.connected, true) {
            lock(&self.figures).reconnects += 1;
        }
        streaming.output.connected(subscription.clock());
        streaming.subscription = Some(subscription);
        streaming.lost = None;
        streaming.since = Instant::now();
        streaming.bytes = (0, 0);
        self.wish_bitrate();
        self.post(streaming, ConnectionState::Connected, &peer, "");
    }

    /// Calls the host again until it lets this client subscribe, or the time is up. `why` is what
    /// is wrong.
    fn call_again(&self, streaming: &mut Streaming, why: &str) -> Result<(), gst::FlowError> {
        let limit = streaming.settings.connection.reconnect_timeout();
        if limit.is_zero() {
            return Err(self.fail(streaming, why));
        }
        gst::warning!(CAT, imp = self, "{why}; calling again");
        streaming.lost = Some(why.to_owned());
        self.post(streaming, ConnectionState::Reconnecting, "", why);
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
            let target = match self.target(streaming) {
                Ok(target) => target,
                Err(LeaseError::Cancelled) => return Err(gst::FlowError::Flushing),
                // The manager may come back as the host may.
                Err(error) => {
                    outcome = format!("; {error}");
                    continue;
                }
            };
            match Subscription::start(target, &mut streaming.waiter) {
                Ok(subscription) => {
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
            format!("{why}; called again for {tried} ms (reconnect-timeout) in vain{outcome}");
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
        let address = &streaming.address;
        let message = connection_message(&*obj, state, address, peer, "", reason);
        // Fails where there is no bus: then nobody wants to know.
        let _ = obj.post_message(message);
    }
}
