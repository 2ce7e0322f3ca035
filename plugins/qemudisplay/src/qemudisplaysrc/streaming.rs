// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the streaming thread does from one buffer to the next: wait for a change and for its time,
//! make a buffer of the picture, say what has changed in it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;
use gst_video::{VideoInfo, VideoOverlayComposition, VideoOverlayCompositionMeta};
use qemu_display::{Damage, Display, Listening, Look, Picture, Pixels, Rect, Screen};
use zerocopy_plugin_common::mark_damage;
use zerocopy_plugin_common::wait::{Deadline, Waiter, Wake};

use super::CursorMode;
use super::buffers::{Made, Terms};
use super::caps::Form;
use super::cursor::Overlays;
use super::imp::{CAT, QemuDisplaySrc, error_message, lock};
use super::pace::Pace;
use super::settings::{LiveSettings, interval};

/// What downstream and the picture have agreed on.
#[derive(Clone, Debug)]
pub(super) struct Negotiated {
    pub form: Form,
    /// Of pictures in system memory.
    pub info: Option<VideoInfo>,
    /// Downstream knows `GstVideoMeta`.
    pub any_layout: bool,
    /// The framerate that downstream fixed, if it did.
    pub framerate: Option<gst::Fraction>,
    /// Downstream takes overlays.
    pub overlay: bool,
}

/// What the application has been told about the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Streaming,
    Off,
}

/// What lives from `start()` to `stop()`.
pub(super) struct Streaming {
    pub display: Arc<Display>,
    pub screen: Arc<Screen>,
    /// While this is kept, QEMU says what the screen shows.
    pub listening: Option<Listening>,
    /// The streaming thread's waiter, taken out while it waits: nothing is locked then (L11).
    pub waiter: Option<Waiter>,
    /// What the picture that is there needs.
    pub wanted: Option<Form>,
    pub negotiated: Option<Negotiated>,
    /// Somebody has come late and wants the picture, new or not.
    pub again: bool,
    overlays: Overlays,
    pace: Pace,
    /// Downstream has missed something: what has changed for it is not known.
    pub missed: bool,
    /// Where the cursor was drawn.
    drawn: Option<Rect>,
    last_pts: Option<gst::ClockTime>,
    /// Downstream was told that frames are upside down.
    flipped: bool,
    told: Option<Told>,
}

/// What the streaming thread does next.
enum Step {
    Push,
    Wait(Deadline),
    Off,
    Fail(gst::ErrorMessage),
}

impl LiveSettings {
    /// Whether the cursor is to go beside the picture. It cannot be drawn into one on a GPU.
    pub fn wants_overlay(&self, on_gpu: bool) -> bool {
        self.cursor == CursorMode::Overlay || (self.cursor == CursorMode::Blend && on_gpu)
    }

    /// The least time between two frames, given the rate that downstream fixed, if it did.
    fn interval(&self, fixed: Option<gst::Fraction>) -> Option<Duration> {
        let rates = [self.max_framerate(), fixed];
        rates.into_iter().flatten().map(interval).max()
    }
}

impl Streaming {
    /// Nothing has left yet.
    pub fn new(display: Display, screen: Arc<Screen>, waiter: Waiter) -> Self {
        Self {
            display: Arc::new(display),
            screen,
            listening: None,
            waiter: Some(waiter),
            wanted: None,
            negotiated: None,
            again: false,
            overlays: Overlays::default(),
            pace: Pace::default(),
            missed: false,
            drawn: None,
            last_pts: None,
            flipped: false,
            told: None,
        }
    }

    fn next_step(&self, settings: &LiveSettings, now: Instant) -> Step {
        let shown = settings.cursor != CursorMode::None;
        match self.screen.look() {
            Look::Failed(error) => Step::Fail(error_message(&error)),
            Look::Off if self.told != Some(Told::Off) => Step::Off,
            Look::Off | Look::Empty => Step::Wait(Deadline::NEVER),
            Look::Still if !self.again => Step::Wait(Deadline::NEVER),
            Look::Cursor if !self.again && !shown => Step::Wait(Deadline::NEVER),
            Look::News | Look::Cursor | Look::Still => {
                match self.pace.next(self.interval(settings)) {
                    // Until then changes become one.
                    Some(due) if due > now => Step::Wait(Deadline::at(due)),
                    _ => Step::Push,
                }
            }
        }
    }

    fn interval(&self, settings: &LiveSettings) -> Option<Duration> {
        let fixed = self.negotiated.as_ref().and_then(|now| now.framerate);
        settings.interval(fixed)
    }

    /// What has changed since the frame before, the cursor included where it is drawn. None:
    /// everything may have.
    fn damage(&mut self, picture: &Picture, drawn: Option<Rect>) -> Option<Vec<[u32; 4]>> {
        let before = std::mem::replace(&mut self.drawn, drawn);
        let Damage::Rects(rects) = &picture.damage else {
            return None;
        };
        let moved = picture.cursor_changed || before != drawn;
        let cursors = before.into_iter().chain(drawn).filter(|_| moved);
        let array = |rect: Rect| [rect.x, rect.y, rect.width, rect.height];
        Some(rects.iter().copied().chain(cursors).map(array).collect())
    }
}

impl QemuDisplaySrc {
    /// Waits for the next thing to push. Nothing is locked while it waits.
    pub(super) fn next_buffer(&self, waiter: &mut Waiter) -> Result<gst::Buffer, gst::FlowError> {
        loop {
            if self.obj().src_pad().needs_reconfigure() && !self.obj().negotiate() {
                return Err(self.not_negotiated());
            }
            let settings = lock(&self.settings).live;
            let step = match &*lock(&self.streaming) {
                Some(streaming) => streaming.next_step(&settings, Instant::now()),
                None => return Err(gst::FlowError::Flushing),
            };
            match step {
                Step::Push => {
                    if let Some(buffer) = self.push(&settings)? {
                        return Ok(buffer);
                    }
                }
                Step::Off => {
                    lock(&self.buffers).forget();
                    self.announce(Told::Off, "");
                }
                Step::Fail(message) => return self.fail(message),
                Step::Wait(deadline) => match waiter.wait(deadline) {
                    Ok(Wake::Cancelled) => return Err(gst::FlowError::Flushing),
                    Ok(_) => {}
                    Err(error) => {
                        return self.fail(gst::error_msg!(
                            gst::ResourceError::Failed,
                            ["waiting for a picture failed: {error}"]
                        ));
                    }
                },
            }
        }
    }

    /// A buffer of the picture that is there; none if it has just gone.
    fn push(&self, settings: &LiveSettings) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let (taken, missed) = match &mut *lock(&self.streaming) {
            Some(streaming) => {
                // Until it has become a buffer, the picture is missing downstream.
                streaming.again = true;
                let missed = std::mem::replace(&mut streaming.missed, true);
                (streaming.screen.take(), missed)
            }
            None => return Err(gst::FlowError::Flushing),
        };
        let picture = match taken {
            Ok(Some(picture)) => picture,
            Ok(None) => return Ok(None),
            Err(error) => return self.fail(error_message(&error)),
        };
        self.agree_on(Form::of(&picture.pixels))?;
        let Ready {
            mut buffer,
            copied,
            flipped,
        } = match self.make(&picture, missed, settings) {
            Ok(Some(ready)) => ready,
            Ok(None) => return Err(gst::FlowError::Flushing),
            Err(reason) => {
                return self.fail(gst::error_msg!(
                    gst::ResourceError::Failed,
                    ["a picture did not become a buffer: {reason}"]
                ));
            }
        };
        self.turn(flipped);
        let repeated = picture.is_repeated();
        self.stamp(
            &mut buffer,
            if repeated {
                Instant::now()
            } else {
                picture.arrived
            },
        );
        let transfer = match picture.pixels {
            Pixels::Bytes { .. } => "bytes",
            Pixels::Shared { .. } => "memfd",
            Pixels::DmaBuf { .. } => "dmabuf",
        };
        {
            let mut figures = lock(&self.figures);
            figures.transfer = transfer;
            let age = picture.arrived.elapsed();
            figures.add_frame(buffer.size(), age, repeated, copied);
        }
        self.announce(Told::Streaming, transfer);
        gst::trace!(CAT, imp = self, "frame {:?}", buffer.pts());
        Ok(Some(buffer))
    }

    /// A buffer of a picture; none if the element is stopped. What takes time, copying its pixels, is done
    /// with no lock held that others need.
    fn make(
        &self,
        picture: &Picture,
        missed: bool,
        settings: &LiveSettings,
    ) -> Result<Option<Ready>, String> {
        let plan = match &mut *lock(&self.streaming) {
            Some(streaming) => streaming.plan(picture, settings)?,
            None => return Ok(None),
        };
        let made = lock(&self.buffers).make(&picture.pixels, &plan.terms, plan.drawn())?;
        match &mut *lock(&self.streaming) {
            Some(streaming) => streaming
                .finish(made, &plan, picture, missed, settings)
                .map(Some),
            None => Ok(None),
        }
    }

    /// Sets caps for pictures of this form, if they are others than now.
    fn agree_on(&self, form: Form) -> Result<(), gst::FlowError> {
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.wanted = Some(form);
            if streaming
                .negotiated
                .as_ref()
                .is_some_and(|now| now.form == form)
            {
                return Ok(());
            }
        }
        if self.obj().negotiate() {
            return Ok(());
        }
        Err(self.not_negotiated())
    }

    /// What a failed negotiation means; an error is posted if it means one.
    fn not_negotiated(&self) -> gst::FlowError {
        if self.is_flushing() {
            return gst::FlowError::Flushing;
        }
        let wanted = lock(&self.streaming).as_ref().and_then(|now| now.wanted);
        let (what, advice) = match wanted {
            Some(form) if form.is_dmabuf() && form.in_memory().is_none() => (
                form.describe(),
                "start QEMU without gl=on in -display to have it in system memory",
            ),
            Some(form) => (form.describe(), "videoconvert or videoscale help"),
            None => (String::new(), "nothing is known about it yet"),
        };
        lock(&self.figures).errors += 1;
        gst::element_imp_error!(
            self,
            gst::CoreError::Negotiation,
            ["downstream does not take what QEMU gives: {what} ({advice})"]
        );
        gst::FlowError::NotNegotiated
    }

    /// Tells downstream whether frames from now on are upside down.
    fn turn(&self, flipped: bool) {
        match &mut *lock(&self.streaming) {
            Some(streaming) if streaming.flipped != flipped => streaming.flipped = flipped,
            _ => return,
        }
        // Mirrored, then turned by half: that is upside down.
        let orientation = if flipped {
            "flip-rotate-180"
        } else {
            "rotate-0"
        };
        let mut tags = gst::TagList::new();
        if let Some(tags) = tags.get_mut() {
            tags.set_scope(gst::TagScope::Stream);
            tags.add::<gst::tags::ImageOrientation>(&orientation, gst::TagMergeMode::Replace);
        }
        gst::info!(CAT, imp = self, "tags {tags}");
        // The base class sends it before the next buffer, and after the segment.
        self.parent_send_event(gst::event::Tag::new(tags));
    }

    /// Sets the running time at which the picture came, later than that of the one before.
    fn stamp(&self, buffer: &mut gst::Buffer, arrived: Instant) {
        let obj = self.obj();
        let now = obj
            .clock()
            .zip(obj.base_time())
            .map(|(clock, base)| clock.time().saturating_sub(base));
        let age = gst::ClockTime::try_from(arrived.elapsed());
        let mut pts = now.map(|now| now.saturating_sub(age.unwrap_or_default()));
        if let Some(streaming) = &mut *lock(&self.streaming) {
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

    /// Posts an error and ends the stream.
    fn fail<T>(&self, message: gst::ErrorMessage) -> Result<T, gst::FlowError> {
        lock(&self.figures).errors += 1;
        self.post_error_message(message);
        Err(gst::FlowError::Error)
    }

    /// Tells the application what the screen does, once.
    fn announce(&self, state: Told, transfer: &str) {
        let (console, label) = {
            let mut streaming = lock(&self.streaming);
            let Some(streaming) = &mut *streaming else {
                return;
            };
            if streaming.told.replace(state) == Some(state) {
                return;
            }
            let screen = &streaming.screen;
            (screen.console(), screen.label().to_owned())
        };
        let state = match state {
            Told::Streaming => "streaming",
            Told::Off => "off",
        };
        gst::info!(CAT, imp = self, "console {console} ({label}): {state}");
        let structure = gst::Structure::builder("qemu-display")
            .field("state", state)
            .field("console", console)
            .field("label", label)
            .field("transfer", transfer)
            .build();
        let message = gst::message::Element::builder(structure)
            .src(&*self.obj())
            .build();
        // Fails only while the element is being disposed of.
        let _ = self.obj().post_message(message);
    }
}

/// How a picture becomes a buffer.
struct Plan {
    terms: Terms,
    cursor: Option<VideoOverlayComposition>,
    /// The cursor goes beside the picture.
    beside: bool,
    flipped: bool,
}

impl Plan {
    /// The cursor, where it is drawn into the picture. One that can go neither way is left out.
    fn drawn(&self) -> Option<&VideoOverlayComposition> {
        let on_gpu = self.terms.info.is_none();
        self.cursor.as_ref().filter(|_| !self.beside && !on_gpu)
    }
}

/// A buffer with everything but a timestamp.
struct Ready {
    buffer: gst::Buffer,
    /// Its pixels were.
    copied: bool,
    /// It is upside down.
    flipped: bool,
}

impl Streaming {
    fn plan(&mut self, picture: &Picture, settings: &LiveSettings) -> Result<Plan, String> {
        let negotiated = self.negotiated.as_ref().ok_or("nothing is agreed on")?;
        let on_gpu = negotiated.info.is_none();
        Ok(Plan {
            terms: Terms {
                info: negotiated.info.clone(),
                any_layout: negotiated.any_layout,
            },
            cursor: match settings.cursor {
                CursorMode::None => None,
                _ => self.overlays.of(&picture.cursor, picture.pixels.size()),
            },
            beside: negotiated.overlay,
            flipped: on_gpu && negotiated.form.is_flipped(),
        })
    }

    /// Says beside the buffer what belongs to it, and that it leaves.
    fn finish(
        &mut self,
        made: Made,
        plan: &Plan,
        picture: &Picture,
        missed: bool,
        settings: &LiveSettings,
    ) -> Result<Ready, String> {
        let size = picture.pixels.size();
        let covered = plan.drawn().and_then(|_| picture.cursor.covers(size));
        let mut buffer = made.buffer;
        let inner = buffer.get_mut().ok_or("a new buffer is shared")?;
        if let Some(cursor) = plan.cursor.as_ref().filter(|_| plan.beside) {
            VideoOverlayCompositionMeta::add(inner, cursor);
        }
        if let Some(mut rects) = self.damage(picture, covered).filter(|_| !missed) {
            if plan.flipped {
                // Where they lie in the frame, as its rows do.
                for [_, y, _, height] in &mut rects {
                    *y = size.1 - *y - *height;
                }
            }
            mark_damage(inner, rects);
        }
        let interval = self.interval(settings);
        self.pace.left(Instant::now(), interval);
        self.again = false;
        self.missed = false;
        Ok(Ready {
            buffer,
            copied: made.copied,
            flipped: plan.flipped,
        })
    }
}
