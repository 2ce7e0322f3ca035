// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the streaming thread does from one buffer to the next: wait, decide what is to leave, tell
//! the application what has happened to the producer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;
use zerocopy_plugin_common::wait::{Deadline, Waiter, Wake};

use super::OnDisconnect;
use super::abilities::Abilities;
use super::caps::OutputMemory;
use super::cuda::CudaOutput;
use super::imp::{CAT, PipeWireZeroCopySrc, failure_message, lock};
use super::latch::Latch;
use super::output::Takes;
use super::pointer::Pointer;
use super::schedule::Schedule;
use super::settings::LiveSettings;
use crate::capture::frame::Frame;
use crate::capture::meta::Transform;
use crate::capture::{Capture, Interest, Look, Offer, StreamFormat};
use crate::egl::{Display, Reader};

/// What downstream and the producer have agreed on.
#[derive(Clone, Debug)]
pub(super) struct Negotiated {
    pub source: StreamFormat,
    /// Size, format and colours of what leaves; of system memory also the layout.
    pub info: gst_video::VideoInfo,
    pub memory: OutputMemory,
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
    pub can: Abilities,
    /// The GPU's, where there is one.
    pub display: Option<Display>,
    /// The number of the CUDA device that it is, where CUDA memory is wanted and it is one.
    pub cuda_device: Option<u32>,
    /// Reads what only the GPU can; made when first needed.
    pub reader: Option<Reader>,
    /// Copies into CUDA memory; made when that is first negotiated.
    pub cuda: Option<CudaOutput>,
    /// Why a kind of DMA-BUFs is not used any more.
    pub fallback: Option<String>,
    pub offer: Offer,
    /// Frames of a driver that has no fences, and of a producer that does not say when they are drawn.
    pub latch: Latch<Box<Frame>>,
    /// What the frame that is there needs.
    pub wanted: Option<StreamFormat>,
    pub negotiated: Option<Arc<Negotiated>>,
    /// A format that downstream takes no longer, which the producer was asked to change. Frames
    /// of it may still be under way.
    pub stale: Option<StreamFormat>,
    /// The last frame, for resending it.
    pub last: Option<gst::Buffer>,
    /// What downstream can do with buffers.
    pub takes: Takes,
    pub pointer: Pointer,
    /// What downstream knows of it.
    pub transform: Transform,
    pub last_pts: Option<gst::ClockTime>,
    pub schedule: Schedule,
    /// Since when the first frame, or the first of a new format, is waited for.
    pub waiting_since: Option<Instant>,
    pub frame_seen: bool,
    /// The application knows that the producer is there, and in which memory frames leave.
    pub announced: Option<OutputMemory>,
    /// Downstream has as many of the producer's buffers as can be spared, and takes nothing else.
    pub waits_for_buffer: bool,
    /// The producer is gone; there is nothing to keep alive.
    pub vanished: bool,
    /// So is it, for this reason, once a frame that is kept has left.
    gone: Option<String>,
    pub ending: Ending,
}

/// What the streaming thread does next.
enum Step {
    Push(StreamFormat),
    /// The frame that was kept leaves without another one having come.
    Flush,
    Negotiate(StreamFormat),
    Discard(StreamFormat),
    Resend,
    End,
    Vanished(String),
    Fail(gst::ErrorMessage),
    Wait(Deadline),
}

impl Streaming {
    /// Nothing has come yet of `target`.
    pub fn new(
        capture: Capture,
        waiter: Waiter,
        target: String,
        can: Abilities,
        display: Option<Display>,
        cuda_device: Option<u32>,
    ) -> Self {
        // NVIDIA's driver has none (L14), and says so of itself or is libcuda's.
        let of_nvidia = display.as_ref().and_then(Display::cuda_device);
        let without_fences = cuda_device.or(of_nvidia).is_some();
        Self {
            capture,
            waiter: Some(waiter),
            target,
            can,
            display,
            cuda_device,
            reader: None,
            cuda: None,
            latch: Latch::new(without_fences),
            fallback: None,
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
            announced: None,
            waits_for_buffer: false,
            vanished: false,
            gone: None,
            ending: Ending::No,
        }
    }

    /// Decides what to do at `now`.
    fn next_step(&mut self, settings: &LiveSettings, now: Instant) -> Step {
        match self.ending {
            Ending::No => {}
            // What is kept is newer than what has left.
            Ending::ResendLast | Ending::Now if self.keeps_frame() => return Step::Flush,
            Ending::ResendLast if self.last.is_some() => {
                self.ending = Ending::Now;
                return Step::Resend;
            }
            Ending::ResendLast | Ending::Now => return Step::End,
        }
        if let Some(reason) = self.gone.take() {
            return Step::Vanished(reason);
        }
        let early = settings
            .min_interval()
            .and_then(|interval| self.schedule.frame_at(interval))
            .filter(|due| *due > now);
        let interest = match early {
            Some(_) => Interest::News,
            None if self.waits_for_buffer => Interest::Buffer,
            None => Interest::All,
        };
        self.waits_for_buffer = false;
        match (self.capture.inbox().look(interest), early) {
            // A frame is held back, or `look` was asked to be silent about one: until then, a
            // newer one may take its place.
            (Look::Frame(_) | Look::Cursor | Look::Nothing, Some(due)) => {
                Step::Wait(Deadline::at(due))
            }
            (Look::Frame(format), None) if self.is_stale(&format) => Step::Discard(format),
            (Look::Frame(format), None) => match &self.negotiated {
                Some(negotiated) if negotiated.source == format => Step::Push(format),
                // The new format is not that of the frame that is kept.
                Some(_) if self.keeps_frame() => Step::Flush,
                _ => Step::Negotiate(format),
            },
            (Look::Cursor, None)
                if self.last.is_some() && !self.vanished && self.pointer_has_moved() =>
            {
                Step::Resend
            }
            (Look::Vanished(reason), _) if self.keeps_frame() => {
                self.gone = Some(reason);
                Step::Flush
            }
            (Look::Vanished(reason), _) => Step::Vanished(reason),
            (Look::Failed(failure), _) => Step::Fail(failure_message(&failure, &self.given_up())),
            (Look::Absent(reason), _) if settings.on_disconnect != OnDisconnect::None => {
                Step::Fail(gst::error_msg!(gst::ResourceError::NotFound, ["{reason}"]))
            }
            // Its return is waited for; look again for what else there is.
            (Look::Absent(_), _) => Step::Wait(Deadline::at(now)),
            // A pointer that is hidden, or without a picture to draw it on, waits for the next one.
            (Look::Cursor | Look::Nothing, None) => self.idle_step(settings, now),
        }
    }

    /// Whether there was CUDA memory and is none any more: the producer's buffers may be imported for it still.
    pub fn has_given_up_cuda(&self) -> bool {
        self.cuda_device.is_some() && !self.can.cuda
    }

    /// Whether there is news of the pointer that makes another picture. Not of one that was and is hidden.
    pub fn pointer_has_moved(&self) -> bool {
        let news = self.capture.inbox().cursor();
        news.is_some_and(|news| news.bitmap.is_some() || self.pointer.overlay().is_some())
    }

    /// Whether the latch has a frame that can still leave.
    fn keeps_frame(&self) -> bool {
        self.latch.due().is_some() && self.negotiated.is_some()
    }

    fn is_stale(&self, format: &StreamFormat) -> bool {
        let stale = self.stale.as_ref();
        stale.is_some_and(|stale| is_stale(stale, format, &self.offer))
    }

    /// What was given up before, for messages about what that may have led to.
    #[cold]
    fn given_up(&self) -> String {
        let fallback = self.fallback.as_ref();
        fallback.map_or_else(String::new, |text| format!("; before that: {text}"))
    }

    /// What to do while no frame comes.
    fn idle_step(&mut self, settings: &LiveSettings, now: Instant) -> Step {
        if self.vanished {
            return Step::Wait(Deadline::NEVER);
        }
        match self.latch.due() {
            Some(due) if due <= now => return Step::Flush,
            Some(due) => return Step::Wait(Deadline::at(due)),
            None => {}
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
                     downstream takes {}){}",
                    self.target,
                    self.capture.stage().advice(),
                    self.offer,
                    self.given_up()
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

/// Whether frames of `format` are still those from before `offer`, when `stale` ones came. A crop may
/// have changed since, and with it their size.
fn is_stale(stale: &StreamFormat, format: &StreamFormat, offer: &Offer) -> bool {
    if stale == format {
        return true;
    }
    let offered = offer.0.iter().any(|entry| {
        let memory = match format.modifier {
            Some(modifier) => entry.modifiers.contains(&modifier),
            None => entry.modifiers.is_empty(),
        };
        memory
            && entry.formats.contains(&format.format)
            && entry.width.contains(format.width)
            && entry.height.contains(format.height)
    });
    let resized = StreamFormat {
        width: stale.width,
        height: stale.height,
        ..*format
    };
    resized == *stale && !offered
}

impl PipeWireZeroCopySrc {
    /// Waits for the next thing to push. Nothing is locked while it waits.
    pub(super) fn next_buffer(&self, waiter: &mut Waiter) -> Result<gst::Buffer, gst::FlowError> {
        loop {
            if self.obj().src_pad().needs_reconfigure() {
                self.renegotiate()?;
            }
            let settings = lock(&self.settings).live;
            let (step, remains) = match &mut *lock(&self.streaming) {
                Some(streaming) => (
                    streaming.next_step(&settings, Instant::now()),
                    streaming.capture.inbox().remains().take(),
                ),
                None => return Err(gst::FlowError::Flushing),
            };
            // Here, where nothing is locked: it may take long.
            drop(remains);
            match step {
                Step::Push(format) => {
                    if let Some(buffer) = self.take_frame(&format, &settings, waiter)? {
                        return Ok(buffer);
                    }
                }
                Step::Flush => {
                    if let Some(buffer) = self.flush_latch(&settings, waiter)? {
                        return Ok(buffer);
                    }
                }
                Step::Negotiate(format) => {
                    if let Some(streaming) = &mut *lock(&self.streaming) {
                        streaming.wanted = Some(format);
                    }
                    self.renegotiate()?;
                }
                Step::Discard(format) => self.discard(&format),
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

    /// Agrees with downstream and the producer anew, as far as the producer's format is known.
    #[cold]
    fn renegotiate(&self) -> Result<(), gst::FlowError> {
        let agreed = self.obj().negotiate();
        if self.is_flushing() {
            return Err(gst::FlowError::Flushing);
        }
        // Why not was told where it was found.
        agreed.then_some(()).ok_or(gst::FlowError::NotNegotiated)
    }

    /// Posts why nothing was agreed on: the base class would say no more than that it failed.
    pub(super) fn tell_disagreement(&self, reason: &dyn std::fmt::Display) {
        if !self.is_flushing() {
            lock(&self.figures).errors += 1;
            let reason = format!("{reason}{}", self.given_up());
            gst::element_imp_error!(self, gst::CoreError::Negotiation, ["{reason}"]);
        }
    }

    /// The format that frames have now is of no use any more; another is on its way.
    pub(super) fn forget_format(&self) {
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.stale = streaming.wanted.take();
            streaming.negotiated = None;
            streaming.last = None;
            streaming.latch.take();
            streaming.frame_seen = false;
            streaming.waiting_since = None;
        }
    }

    #[cold]
    fn see_vanished(&self, reason: &str, meaning: OnDisconnect) -> Result<(), gst::FlowError> {
        self.announce("vanished", Some(reason));
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.vanished = true;
            streaming.latch.take();
            streaming.pointer.forget();
        }
        match meaning {
            OnDisconnect::Error => self.fail(gst::error_msg!(
                gst::ResourceError::NotFound,
                ["the producer has vanished: {reason}{}", self.given_up()]
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

    /// See [`Streaming::given_up`].
    pub(super) fn given_up(&self) -> String {
        let streaming = lock(&self.streaming);
        streaming
            .as_ref()
            .map(Streaming::given_up)
            .unwrap_or_default()
    }

    /// Posts an error and ends the stream.
    #[cold]
    pub(super) fn fail<T>(&self, message: gst::ErrorMessage) -> Result<T, gst::FlowError> {
        lock(&self.figures).errors += 1;
        self.post_error_message(message);
        Err(gst::FlowError::Error)
    }

    #[cold]
    pub(super) fn announce(&self, state: &str, reason: Option<&str>) {
        let memory = match &*lock(&self.streaming) {
            Some(Streaming {
                negotiated: Some(negotiated),
                ..
            }) => negotiated.memory,
            _ => OutputMemory::System,
        };
        let structure = gst::Structure::builder("pipewire-capture")
            .field("state", state)
            .field("memory", memory.name())
            .field("reason", reason.unwrap_or_default())
            .build();
        let message = gst::message::Element::builder(structure)
            .src(&*self.obj())
            .build();
        // Fails only while the element is being disposed of.
        let _ = self.obj().post_message(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::capture::negotiate::Color;
    use crate::capture::tests::{frame, idle, put_frame, put_vanished};
    use crate::capture::{Counters, OfferEntry, PixelFormat, Span};

    /// Frames one pixel wide are agreed on, and the latch keeps one.
    fn keeping() -> (Streaming, Arc<Counters>) {
        gst::init().unwrap();
        let counters = Arc::new(Counters::default());
        let waiter = Waiter::new().unwrap();
        let capture = idle(waiter.waker(), &counters);
        let can = Abilities::default();
        let mut streaming = Streaming::new(capture, waiter, "nobody".into(), can, None, None);
        let kept = frame(1, &counters);
        let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::Bgrx, 1, 1);
        streaming.negotiated = Some(Arc::new(Negotiated {
            source: kept.format,
            info: info.build().unwrap(),
            memory: OutputMemory::Cuda,
        }));
        streaming.frame_seen = true;
        streaming.latch.active = true;
        let long = Duration::from_hours(1);
        let (left, _) = streaming.latch.exchange(kept, Instant::now(), long);
        assert!(left.is_none());
        (streaming, counters)
    }

    fn step(streaming: &mut Streaming) -> Step {
        streaming.next_step(&LiveSettings::default(), Instant::now())
    }

    #[test]
    fn a_kept_frame_waits_for_the_next_one() {
        let (mut streaming, counters) = keeping();
        assert!(matches!(step(&mut streaming), Step::Wait(_)));
        put_frame(&streaming.capture, frame(1, &counters));
        assert!(matches!(step(&mut streaming), Step::Push(_)));
    }

    #[test]
    fn a_kept_frame_leaves_before_the_end_of_the_stream() {
        for ending in [Ending::ResendLast, Ending::Now] {
            let (mut streaming, _) = keeping();
            streaming.ending = ending;
            assert!(matches!(step(&mut streaming), Step::Flush));
            streaming.latch.take();
            assert!(matches!(step(&mut streaming), Step::End));
        }
    }

    #[test]
    fn a_kept_frame_leaves_before_one_of_another_size() {
        let (mut streaming, counters) = keeping();
        put_frame(&streaming.capture, frame(2, &counters));
        assert!(matches!(step(&mut streaming), Step::Flush));
        streaming.latch.take();
        let next = step(&mut streaming);
        assert!(matches!(next, Step::Negotiate(format) if format.width == 2));
    }

    #[test]
    fn a_kept_frame_leaves_before_its_producers_end_is_told() {
        let (mut streaming, _) = keeping();
        put_vanished(&streaming.capture, "gone");
        assert!(matches!(step(&mut streaming), Step::Flush));
        streaming.latch.take();
        let next = step(&mut streaming);
        assert!(matches!(next, Step::Vanished(reason) if reason == "gone"));
    }

    fn format(format: PixelFormat, width: u32) -> StreamFormat {
        StreamFormat {
            format,
            width,
            height: 8,
            framerate: (0, 1),
            max_framerate: None,
            color: Color::default(),
            modifier: None,
        }
    }

    fn offer(format: PixelFormat, width: Span) -> Offer {
        Offer(vec![OfferEntry {
            formats: vec![format],
            modifiers: Vec::new(),
            width,
            height: Span::ANY,
        }])
    }

    #[test]
    fn a_frame_of_the_old_format_is_stale_whatever_its_crop() {
        let (old, new) = (PixelFormat::Bgrx, PixelFormat::Nv12);
        let offer = offer(new, Span::ANY);
        let stale = format(old, 16);
        assert!(is_stale(&stale, &format(old, 16), &offer));
        assert!(is_stale(&stale, &format(old, 12), &offer));
        assert!(!is_stale(&stale, &format(new, 16), &offer));
        // What was never asked for is another matter.
        assert!(!is_stale(&stale, &format(PixelFormat::Rgb, 16), &offer));
    }

    #[test]
    fn a_frame_of_the_size_that_was_asked_for_is_not_stale() {
        let same = PixelFormat::Bgrx;
        let offer = offer(same, Span { min: 32, max: 32 });
        let stale = format(same, 16);
        assert!(is_stale(&stale, &format(same, 12), &offer));
        assert!(!is_stale(&stale, &format(same, 32), &offer));
    }
}
