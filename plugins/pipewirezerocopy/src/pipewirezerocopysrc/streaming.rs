// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the streaming thread does from one buffer to the next: wait, copy a frame, resend the
//! last one, tell the application what has happened to the producer.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;
use zerocopy_plugin_common::mark_damage;
use zerocopy_plugin_common::wait::{Deadline, Waiter, Wake};

use super::OnDisconnect;
use super::imp::{CAT, PipeWireZeroCopySrc, failure_message, lock};
use super::output::{Takes, can_leave_in_place, copy_frame, draw, in_place, orientation};
use super::pointer::Pointer;
use super::schedule::Schedule;
use super::settings::LiveSettings;
use crate::capture::damage::Damage;
use crate::capture::meta::{Cursor, Transform};
use crate::capture::{Capture, Counters, Interest, Look, Monotonic, Offer, StreamFormat};

/// What downstream and the producer have agreed on.
#[derive(Clone, Debug)]
pub(super) struct Negotiated {
    pub source: StreamFormat,
    pub info: gst_video::VideoInfo,
}

/// The end of the stream, as the application asked for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Ending {
    #[default]
    No,
    /// Resend the last frame, then end.
    ResendLast,
    Now,
}

/// What lives from `start()` to `stop()`.
pub(super) struct Streaming {
    pub capture: Capture,
    /// The streaming thread's waiter, taken out while it waits: nothing is locked then (L11).
    pub waiter: Option<Waiter>,
    /// For messages.
    pub target: String,
    pub offer: Offer,
    /// What the frame that is there needs.
    pub wanted: Option<StreamFormat>,
    pub negotiated: Option<Negotiated>,
    /// A format that downstream takes no longer, which the producer was asked to change. Frames
    /// of it may still be under way.
    pub stale: Option<StreamFormat>,
    /// The last frame, for resending it.
    pub last: Option<gst::Buffer>,
    /// What downstream can do with buffers.
    pub takes: Takes,
    pub pointer: Pointer,
    /// What downstream knows of it.
    transform: Transform,
    pub last_pts: Option<gst::ClockTime>,
    pub schedule: Schedule,
    /// Since when the first frame, or the first of a new format, is waited for.
    pub waiting_since: Option<Instant>,
    pub frame_seen: bool,
    /// The application knows that the producer is there.
    pub announced: bool,
    /// The producer is gone; there is nothing to keep alive.
    pub vanished: bool,
    pub ending: Ending,
}

/// What the streaming thread does next.
enum Step {
    Push(StreamFormat),
    Negotiate(StreamFormat),
    Discard,
    Resend,
    End,
    Vanished(String),
    Fail(gst::ErrorMessage),
    Wait(Deadline),
}

impl Streaming {
    /// Nothing has come yet of `target`.
    pub fn new(capture: Capture, waiter: Waiter, target: String) -> Self {
        Self {
            capture,
            waiter: Some(waiter),
            target,
            offer: Offer::default(),
            wanted: None,
            negotiated: None,
            stale: None,
            last: None,
            takes: Takes::default(),
            pointer: Pointer::default(),
            transform: Transform::default(),
            last_pts: None,
            schedule: Schedule::default(),
            waiting_since: None,
            frame_seen: false,
            announced: false,
            vanished: false,
            ending: Ending::No,
        }
    }

    /// Decides what to do at `now`.
    fn next_step(&mut self, settings: &LiveSettings, counters: &Counters, now: Instant) -> Step {
        match self.ending {
            Ending::No => {}
            Ending::ResendLast if self.last.is_some() => {
                self.ending = Ending::Now;
                return Step::Resend;
            }
            Ending::ResendLast | Ending::Now => return Step::End,
        }
        let early = settings
            .min_interval()
            .and_then(|interval| self.schedule.frame_at(interval))
            .filter(|due| *due > now);
        let interest = early.map_or(Interest::All, |_| Interest::News);
        match (self.capture.inbox().look(interest), early) {
            // A frame is held back, or `look` was asked to be silent about one: until then, a
            // newer one may take its place.
            (Look::Frame(_) | Look::Cursor | Look::Nothing, Some(due)) => {
                Step::Wait(Deadline::at(due))
            }
            (Look::Frame(format), None) if self.stale == Some(format) => Step::Discard,
            (Look::Frame(format), None) => match &self.negotiated {
                Some(negotiated) if negotiated.source == format => Step::Push(format),
                _ => Step::Negotiate(format),
            },
            (Look::Cursor, None) if self.last.is_some() && !self.vanished => Step::Resend,
            (Look::Vanished(reason), _) => Step::Vanished(reason),
            (Look::Failed(failure), _) => Step::Fail(failure_message(&failure)),
            (Look::Absent(reason), _) if settings.on_disconnect != OnDisconnect::None => {
                Step::Fail(gst::error_msg!(gst::ResourceError::NotFound, ["{reason}"]))
            }
            // Its return is waited for; look again for what else there is.
            (Look::Absent(_), _) => Step::Wait(Deadline::at(now)),
            // Without a picture to draw it on, a pointer waits for the next one.
            (Look::Cursor | Look::Nothing, None) => self.idle_step(settings, counters, now),
        }
    }

    /// What to do while no frame comes.
    fn idle_step(&mut self, settings: &LiveSettings, counters: &Counters, now: Instant) -> Step {
        if self.vanished {
            return Step::Wait(Deadline::NEVER);
        }
        if !self.frame_seen {
            let since = *self.waiting_since.get_or_insert(now);
            let limit = settings.first_frame_timeout;
            if limit == 0 {
                return Step::Wait(Deadline::NEVER);
            }
            let end = since + Duration::from_millis(limit.into());
            if end > now {
                return Step::Wait(Deadline::at(end));
            }
            return Step::Fail(gst::error_msg!(
                gst::ResourceError::Read,
                [
                    "no frame from {} within {limit} ms (first-frame-timeout): {} (what is \
                     downstream takes {})",
                    self.target,
                    counters.stage().advice(),
                    self.offer
                ]
            ));
        }
        let due = settings
            .keepalive()
            .filter(|_| self.last.is_some())
            .and_then(|period| self.schedule.keepalive_at(period));
        match due {
            Some(due) if due <= now => Step::Resend,
            Some(due) => Step::Wait(Deadline::at(due)),
            None => Step::Wait(Deadline::NEVER),
        }
    }
}

impl PipeWireZeroCopySrc {
    /// Waits for the next thing to push. Nothing is locked while it waits.
    pub(super) fn next_buffer(&self, waiter: &mut Waiter) -> Result<gst::Buffer, gst::FlowError> {
        let counters = lock(&self.figures).counters.clone();
        loop {
            if self.obj().src_pad().needs_reconfigure() && !self.obj().negotiate() {
                return Err(if self.is_flushing() {
                    gst::FlowError::Flushing
                } else {
                    gst::FlowError::NotNegotiated
                });
            }
            let settings = lock(&self.settings).live;
            let step = match &mut *lock(&self.streaming) {
                Some(streaming) => streaming.next_step(&settings, &counters, Instant::now()),
                None => return Err(gst::FlowError::Flushing),
            };
            match step {
                Step::Push(format) => {
                    if let Some(buffer) = self.take_frame(&format, &settings)? {
                        return Ok(buffer);
                    }
                }
                Step::Negotiate(format) => self.renegotiate(format)?,
                Step::Discard => self.discard_stale(),
                Step::Resend => {
                    if let Some(buffer) = self.resend(&settings)? {
                        return Ok(buffer);
                    }
                }
                Step::End => return Err(gst::FlowError::Eos),
                Step::Vanished(reason) => self.see_vanished(&reason, settings.on_disconnect)?,
                Step::Fail(message) => return self.fail(message),
                Step::Wait(deadline) => match waiter.wait(deadline) {
                    Ok(Wake::Cancelled) => return Err(gst::FlowError::Flushing),
                    Ok(_) => {}
                    Err(error) => {
                        return self.fail(gst::error_msg!(
                            gst::ResourceError::Failed,
                            ["waiting for a frame failed: {error}"]
                        ));
                    }
                },
            }
        }
    }

    /// Sets caps for a frame that is there.
    fn renegotiate(&self, format: StreamFormat) -> Result<(), gst::FlowError> {
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.wanted = Some(format);
        }
        let agreed = self.obj().negotiate();
        if self.is_flushing() {
            return Err(gst::FlowError::Flushing);
        }
        if !agreed {
            gst::element_imp_error!(
                self,
                gst::CoreError::Negotiation,
                [
                    "downstream does not take what the producer gives: {} of {}x{} pixels in \
                     system memory (videoconvert or videoscale help)",
                    format.format.name(),
                    format.width,
                    format.height
                ]
            );
            return Err(gst::FlowError::NotNegotiated);
        }
        Ok(())
    }

    /// The format that frames have now is of no use any more; another is on its way.
    pub(super) fn forget_format(&self) {
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.stale = streaming.wanted.take();
            streaming.negotiated = None;
            streaming.last = None;
            streaming.frame_seen = false;
            streaming.waiting_since = None;
        }
    }

    fn discard_stale(&self) {
        let frame = lock(&self.streaming)
            .as_ref()
            .and_then(|streaming| streaming.capture.inbox().take(&streaming.stale?, |_| true));
        if frame.is_some() {
            let figures = lock(&self.figures);
            figures.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The frame that is there as a buffer: in place where that can be, else copied, and PipeWire's
    /// buffer given back. None if a frame of another format has taken its place.
    fn take_frame(
        &self,
        format: &StreamFormat,
        settings: &LiveSettings,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let (inbox, last, info, takes) = {
            let mut streaming = lock(&self.streaming);
            let Some(streaming) = &mut *streaming else {
                return Err(gst::FlowError::Flushing);
            };
            let Some(negotiated) = &streaming.negotiated else {
                return Ok(None);
            };
            (
                streaming.capture.inbox().clone(),
                streaming.last.take(),
                negotiated.info.clone(),
                streaming.takes,
            )
        };
        // A new frame replaces it, and may leave in place only because its buffer is back.
        drop(last);
        let spared = inbox.take(format, |frame| {
            can_leave_in_place(frame, &info, takes) && frame.reserve()
        });
        let (mut frame, pooled) = if let Some(frame) = spared {
            (frame, None)
        } else {
            // The pool may make us wait: no frame is held meanwhile (L4).
            let buffer = self.pooled_buffer()?;
            match inbox.take(format, |_| true) {
                Some(frame) => (frame, Some(buffer)),
                None => return Ok(None),
            }
        };
        let (captured, transform) = (frame.captured, frame.transform);
        let damage = std::mem::replace(&mut frame.damage, Damage::Everything);
        let copied = pooled.is_some();
        let picture = match pooled {
            None => in_place(frame, &info),
            Some(buffer) => {
                let copy = copy_frame(&frame, buffer, &info);
                drop(frame);
                if matches!(copy, Ok(None)) {
                    gst::debug!(CAT, imp = self, "the producer has shrunk a frame's memory");
                    let figures = lock(&self.figures);
                    figures.counters.corrupted.fetch_add(1, Ordering::Relaxed);
                    inbox.miss();
                    return Ok(None);
                }
                copy.ok().flatten()
            }
        };
        let Some(picture) = picture else {
            return self.fail(gst::error_msg!(
                gst::StreamError::Failed,
                [
                    "a frame of {}x{} does not fit a buffer",
                    info.width(),
                    info.height()
                ]
            ));
        };
        self.turn(transform);
        lock(&self.figures).add_transfer(copied);
        let buffer = self.leave(&picture, damage, captured)?;
        let now = Instant::now();
        lock(&self.figures).add_frame(info.size(), Monotonic::now().since(captured));
        let mut announce = None;
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.frame_seen = true;
            streaming.waiting_since = None;
            streaming.schedule.frame_left(now, settings.min_interval());
            let keep = settings.keepalive_time > 0
                || settings.resend_last
                || streaming.pointer.overlay().is_some();
            streaming.last = keep.then_some(picture);
            if !streaming.announced {
                announce = Some("streaming");
            } else if streaming.vanished {
                announce = Some("returned");
            }
            streaming.announced = true;
            streaming.vanished = false;
        }
        if let Some(state) = announce {
            if state == "returned" {
                lock(&self.figures).reconnects += 1;
            }
            self.announce(state, None);
        }
        gst::trace!(CAT, imp = self, "frame {:?}", buffer.pts());
        Ok(Some(buffer))
    }

    /// The last frame once more, with the pointer where it is now: the same memory, a new timestamp.
    fn resend(&self, settings: &LiveSettings) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let (last, moved) = {
            let mut streaming = lock(&self.streaming);
            let Some(streaming) = streaming.as_mut() else {
                return Err(gst::FlowError::Flushing);
            };
            let Some(last) = streaming.last.clone() else {
                return Ok(None);
            };
            let moved = streaming.capture.inbox().has_cursor();
            let (now, interval) = (Instant::now(), settings.min_interval());
            if moved {
                streaming.schedule.frame_left(now, interval);
            } else {
                let period = settings.keepalive().unwrap_or_default();
                streaming.schedule.keepalive_left(now, period, interval);
            }
            (last, moved)
        };
        let buffer = self.leave(&last, Damage::Rects(Vec::new()), Monotonic::now())?;
        let mut figures = lock(&self.figures);
        if moved {
            figures.add_pointer(buffer.size());
        } else {
            figures.add_keepalive(buffer.size());
        }
        drop(figures);
        gst::trace!(CAT, imp = self, "resent {:?}", buffer.pts());
        Ok(Some(buffer))
    }

    /// A picture as it leaves: with the pointer, a timestamp, and what has changed.
    fn leave(
        &self,
        picture: &gst::Buffer,
        mut damage: Damage,
        captured: Monotonic,
    ) -> Result<gst::Buffer, gst::FlowError> {
        let (overlay, info, takes) = {
            let mut streaming = lock(&self.streaming);
            let Some(Streaming {
                capture,
                pointer,
                negotiated: Some(negotiated),
                takes,
                ..
            }) = streaming.as_mut()
            else {
                return Err(gst::FlowError::Flushing);
            };
            if let Some(cursor) = capture.inbox().take_cursor() {
                pointer.update(cursor);
            }
            let info = negotiated.info.clone();
            damage.add(Damage::Rects(pointer.leaves(info.width(), info.height())));
            (pointer.overlay().cloned(), info, *takes)
        };
        let mut buffer;
        if let Some(overlay) = overlay.as_ref().filter(|_| !takes.overlays) {
            buffer = self.pooled_buffer()?;
            if let Err(error) = draw(picture, overlay, &mut buffer, &info) {
                return self.fail(gst::error_msg!(
                    gst::StreamError::Failed,
                    ["drawing the pointer into the picture failed: {error}"]
                ));
            }
            lock(&self.figures).add_transfer(true);
        } else {
            buffer = picture.copy();
            if let Some(buffer) = buffer.get_mut() {
                // So that a pool does not reuse the memory while downstream has this buffer.
                gst::ParentBufferMeta::add(buffer, picture);
                if let Some(overlay) = &overlay {
                    gst_video::VideoOverlayCompositionMeta::add(buffer, overlay);
                }
            }
        }
        // A frame that may have changed everywhere says nothing.
        if let (Damage::Rects(rects), Some(buffer)) = (&damage, buffer.get_mut()) {
            let rects = rects.iter().map(|rect| {
                let start = [rect.x, rect.y].map(|n| n.max(0).unsigned_abs());
                [start[0], start[1], rect.width, rect.height]
            });
            mark_damage(buffer, rects);
        }
        self.stamp(&mut buffer, captured);
        Ok(buffer)
    }

    /// A buffer of the pool that was negotiated with downstream; waits for one.
    fn pooled_buffer(&self) -> Result<gst::Buffer, gst::FlowError> {
        let pool = self.obj().buffer_pool();
        pool.ok_or(gst::FlowError::NotNegotiated)?
            .acquire_buffer(None)
    }

    /// Says downstream how the frames from now on are turned.
    fn turn(&self, transform: Transform) {
        if let Some(streaming) = &mut *lock(&self.streaming) {
            if streaming.transform == transform {
                return;
            }
            streaming.transform = transform;
        }
        let mut tags = gst::TagList::new();
        if let Some(tags) = tags.get_mut() {
            let orientation = orientation(transform);
            tags.set_scope(gst::TagScope::Stream);
            tags.add::<gst::tags::ImageOrientation>(&orientation, gst::TagMergeMode::Replace);
        }
        gst::info!(CAT, imp = self, "tags {tags}");
        // The base class sends it before the next buffer, and after the segment.
        self.parent_send_event(gst::event::Tag::new(tags));
    }

    /// Sets the running time at which the buffer was captured, later than that of the one before.
    fn stamp(&self, buffer: &mut gst::Buffer, captured: Monotonic) {
        let obj = self.obj();
        let now = obj
            .clock()
            .zip(obj.base_time())
            .map(|(clock, base)| clock.time().saturating_sub(base));
        let age = gst::ClockTime::try_from(Monotonic::now().since(captured));
        let mut pts = now.map(|now| now.saturating_sub(age.unwrap_or_default()));
        if let Some(streaming) = &mut *lock(&self.streaming) {
            // A capture time before a keepalive's is moved behind it.
            let least = streaming
                .last_pts
                .map(|last| last + gst::ClockTime::from_nseconds(1));
            pts = pts.max(least);
            streaming.last_pts = pts;
        }
        if let Some(buffer) = buffer.get_mut() {
            buffer.set_pts(pts);
            buffer.set_dts(gst::ClockTime::NONE);
        }
    }

    fn see_vanished(&self, reason: &str, meaning: OnDisconnect) -> Result<(), gst::FlowError> {
        self.announce("vanished", Some(reason));
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.vanished = true;
            streaming.pointer.update(Cursor::default());
        }
        match meaning {
            OnDisconnect::Error => self.fail(gst::error_msg!(
                gst::ResourceError::NotFound,
                ["the producer has vanished: {reason}"]
            )),
            OnDisconnect::Eos => {
                gst::info!(CAT, imp = self, "EOS: {reason}");
                self.end_or_resend();
                Ok(())
            }
            OnDisconnect::None => {
                gst::info!(CAT, imp = self, "waiting for the node's return: {reason}");
                Ok(())
            }
        }
    }

    /// Ends the stream, after the last frame once more where that is wanted.
    fn end_or_resend(&self) {
        let resend = lock(&self.settings).live.resend_last;
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.ending = if resend {
                Ending::ResendLast
            } else {
                Ending::Now
            };
        }
    }

    /// Posts an error and ends the stream.
    fn fail<T>(&self, message: gst::ErrorMessage) -> Result<T, gst::FlowError> {
        lock(&self.figures).errors += 1;
        self.post_error_message(message);
        Err(gst::FlowError::Error)
    }

    fn announce(&self, state: &str, reason: Option<&str>) {
        let structure = gst::Structure::builder("pipewire-capture")
            .field("state", state)
            .field("memory", "system")
            .field("reason", reason.unwrap_or_default())
            .build();
        let message = gst::message::Element::builder(structure)
            .src(&*self.obj())
            .build();
        // Fails only while the element is being disposed of.
        let _ = self.obj().post_message(message);
    }
}
