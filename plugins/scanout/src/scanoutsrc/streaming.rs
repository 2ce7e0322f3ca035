// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the streaming thread does from one frame to the next: wait for it, and find the host
//! again when it is lost.

use std::sync::atomic::Ordering;
use std::time::Duration;

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

/// A subscription that has lasted for so long, or for `reconnect-timeout`, was one, even if the
/// screen had nothing to show: the host does not fail again and again.
const LASTING: Duration = Duration::from_secs(5);

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
    /// Why there is no host, while one is called again.
    wrong: Option<String>,
    /// Runs from the loss of a host until another has pushed a frame, or has lasted.
    backoff: Option<Backoff>,
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
            wrong: None,
            backoff: None,
            bytes: (0, 0),
        }
    }

    /// Says what there is to say at the end, and closes.
    pub fn end(mut self) {
        if let Some(subscription) = self.subscription {
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
        if streaming.wrong.is_some() {
            // A pause or a flush has interrupted the calls: the time until now does not count.
            streaming.backoff = None;
        }
        loop {
            let Some(subscription) = &mut streaming.subscription else {
                match streaming.wrong {
                    Some(_) => self.call_again(streaming)?,
                    None => self.call(streaming)?,
                }
                continue;
            };
            let result = subscription.next(&mut streaming.waiter, &self.wishes);
            let lasted = subscription.lasted();
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
                    if lasted >= LASTING.min(limit) {
                        streaming.backoff = None;
                    }
                    let reason = format!("lost {}: {error}", streaming.address);
                    self.lost(streaming, reason)?;
                }
            }
        }
    }

    /// Calls the host for the first time.
    fn call(&self, streaming: &mut Streaming) -> Result<(), gst::FlowError> {
        let target = match self.target(streaming, Deadline::NEVER) {
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
                self.lost(streaming, reason)
            }
            Err(error @ (SubscriptionError::NotOn { .. } | SubscriptionError::Unanswered(_))) => {
                self.lost(streaming, error.to_string())
            }
            Err(error) => Err(self.fail(streaming, &error.to_string())),
        }
    }

    /// What to subscribe to, until `give_up` at the latest.
    fn target(&self, streaming: &mut Streaming, give_up: Deadline) -> Result<Target, LeaseError> {
        let lease = lock(&self.lease);
        if lease.as_ref().is_some_and(|lease| !lease.is_alive()) {
            // The manager may have lent it to somebody else by now.
            streaming.scanout_id = None;
        }
        drop(lease);
        let id = match streaming.scanout_id {
            Some(id) => id,
            None => self.borrow(streaming, give_up)?,
        };
        streaming.scanout_id = Some(id);
        Ok(streaming.settings.target(id, give_up))
    }

    /// Waits until it is known which scanout was lent.
    fn borrow(&self, streaming: &mut Streaming, give_up: Deadline) -> Result<u16, LeaseError> {
        // One that has ended before its answer was read is asked for once more.
        let mut again = true;
        loop {
            let held = lock(&self.lease).take();
            let mut lease = match held {
                Some(lease) => lease,
                None => streaming.settings.ask_for_lease()?,
            };
            let deadline = streaming.settings.connection.reply_deadline().min(give_up);
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
        streaming.wrong = None;
        streaming.bytes = (0, 0);
        self.wish_bitrate();
        self.post(streaming, ConnectionState::Connected, &peer, "");
    }

    /// There is no host: it is to be called again, unless that is not wanted.
    fn lost(&self, streaming: &mut Streaming, why: String) -> Result<(), gst::FlowError> {
        if streaming.settings.connection.reconnect_timeout().is_zero() {
            return Err(self.fail(streaming, &why));
        }
        gst::warning!(CAT, imp = self, "{why}; calling again");
        self.post(streaming, ConnectionState::Reconnecting, "", &why);
        streaming.wrong = Some(why);
        Ok(())
    }

    /// Calls the host again until it lets this client subscribe, or the time is up.
    fn call_again(&self, streaming: &mut Streaming) -> Result<(), gst::FlowError> {
        let limit = streaming.settings.connection.reconnect_timeout();
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
            let give_up = streaming.backoff.as_ref().map(Backoff::attempt_deadline);
            let target = match self.target(streaming, give_up.unwrap_or(Deadline::NEVER)) {
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
        let why = streaming.wrong.take().unwrap_or_default();
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

    /// Gives up. Should the element be played again, that is a start like the first.
    fn fail(&self, streaming: &mut Streaming, reason: &str) -> gst::FlowError {
        streaming.wrong = None;
        streaming.backoff = None;
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
