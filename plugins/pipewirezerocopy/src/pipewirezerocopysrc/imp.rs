// SPDX-License-Identifier: MIT OR Apache-2.0

//! # pipewirezerocopysrc
//!
//! Captures a node of PipeWire that gives video: a desktop's ScreenCast (mutter, weston, sway, any
//! portal), or anything else.
//!
//! The node is named by `pipewire-node-id`, which the ScreenCast session gives, or by
//! `target-object`, its name or serial. Nodes of the portal are visible only over the socket from
//! OpenPipeWireRemote: hand that to `pipewire-fd`.
//!
//! Desktops are captured by damage: a still one gives one frame and then nothing. The last frame
//! is therefore resent after `keepalive-time`, with a new timestamp and the same memory, marked
//! by an empty `GstDesktopDamage` meta; encoders and viewers downstream stay alive. Set it to 0
//! where gaps are welcome. `target-fps` limits the rate the other way: of frames that come
//! faster, the newest leaves when its time has come.
//!
//! A node that vanishes is told apart from a still screen; `on-disconnect` says what that means.
//! An element message `pipewire-capture` with the field `state` (streaming, vanished, returned)
//! tells the application.
//!
//! Two streams on one node disturb each other: use one source and a tee.
//!
//! Frames leave in the producer's own memory: as DMA-BUFs where downstream takes those and there is a
//! GPU, else as system memory, without a copy where that is sealed against shrinking and the producer
//! can spare it. `output-mode` narrows that down.
//!
//! ## Examples
//!
//! ```sh
//! gst-launch-1.0 pipewirezerocopysrc pipewire-node-id=42 ! videoconvert ! autovideosink
//! ```
//! shows what node 42 shows.
//!
//! ```sh
//! gst-launch-1.0 pipewirezerocopysrc target-object=desk keepalive-time=500 ! \
//!   queue max-size-buffers=1 leaky=downstream ! videoconvert ! \
//!   x264enc tune=zerolatency speed-preset=superfast ! h264parse ! mp4mux ! \
//!   filesink location=desk.mp4 -e
//! ```
//! records the node called "desk"; frames that the encoder is too slow for are dropped before it.
//!
//! Since: 0.1

use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;
use gst_base::subclass::base_src::CreateSuccess;
use gst_base::subclass::prelude::*;
use zerocopy_plugin_common::Unlock;
use zerocopy_plugin_common::wait::{Deadline, Waiter, Wake};

use super::caps;
use super::figures::Figures;
use super::negotiation::Possible;
use super::settings::{Settings, Wanted};
use super::streaming::{Ending, Negotiated, Streaming};
use crate::capture::{Capture, Config, Counters, Failure, Level, Log};
use crate::cuda;

pub(super) static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "pipewirezerocopysrc",
        gst::DebugColorFlags::empty(),
        Some("Frames of a PipeWire node"),
    )
});

/// Limit for connecting to a unix socket, which the kernel does or refuses at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The highest framerate of a producer that does not say, for the latency.
const USUAL_FRAMERATE: (u32, u32) = (60, 1);

/// The implementation of [`super::PipeWireZeroCopySrc`].
#[derive(Default)]
pub struct PipeWireZeroCopySrc {
    pub(super) settings: Mutex<Settings>,
    pub(super) streaming: Mutex<Option<Streaming>>,
    pub(super) figures: Mutex<Figures>,
    /// What the caps query said before the start: each link asks several times.
    pub(super) possible: Mutex<Option<Possible>>,
    /// The CUDA context that this element and its neighbours share.
    pub(super) cuda: cuda::Slot,
    /// Ends the streaming thread's waits; apart from the rest, so that it never waits itself.
    unlock: Unlock,
}

/// None of these locks is held where something could panic and leave a half-made change.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[glib::object_subclass]
impl ObjectSubclass for PipeWireZeroCopySrc {
    const NAME: &'static str = "GstPipeWireZeroCopySrc";
    type Type = super::PipeWireZeroCopySrc;
    type ParentType = gst_base::PushSrc;
}

impl ObjectImpl for PipeWireZeroCopySrc {
    fn constructed(&self) {
        self.parent_constructed();
        let obj = self.obj();
        obj.set_live(true);
        obj.set_format(gst::Format::Time);
    }

    fn properties() -> &'static [glib::ParamSpec] {
        static PROPERTIES: LazyLock<Vec<glib::ParamSpec>> = LazyLock::new(|| {
            let mut properties = Settings::properties();
            properties.push(
                glib::ParamSpecBoxed::builder::<gst::Structure>("stats")
                    .nick("Statistics")
                    .blurb("What happened since the element was started; see the element's page")
                    .read_only()
                    .build(),
            );
            properties
        });
        &PROPERTIES
    }

    fn set_property(&self, _id: usize, value: &glib::Value, pspec: &glib::ParamSpec) {
        lock(&self.settings).set(value, pspec);
        // The thread may be waiting for a moment that the old value gave.
        self.wake();
    }

    fn property(&self, _id: usize, pspec: &glib::ParamSpec) -> glib::Value {
        match pspec.name() {
            "stats" => lock(&self.figures).structure().to_value(),
            _ => lock(&self.settings).get(pspec),
        }
    }
}

impl GstObjectImpl for PipeWireZeroCopySrc {}

impl ElementImpl for PipeWireZeroCopySrc {
    fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
        static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
            gst::subclass::ElementMetadata::new(
                "PipeWire screen capture",
                "Source/Video",
                "Captures a desktop's ScreenCast, or another video node of PipeWire",
                "The gst-plugins-zerocopy authors",
            )
        });
        Some(&METADATA)
    }

    fn pad_templates() -> &'static [gst::PadTemplate] {
        static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(|| {
            let src = gst::PadTemplate::new(
                "src",
                gst::PadDirection::Src,
                gst::PadPresence::Always,
                &caps::somewhere(Wanted::ALL),
            );
            vec![src.expect("the template is valid")]
        });
        &TEMPLATES
    }

    fn set_context(&self, context: &gst::Context) {
        cuda::set_context(&self.cuda, context);
        self.parent_set_context(context);
    }

    fn change_state(
        &self,
        transition: gst::StateChange,
    ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
        let change = || self.parent_change_state(transition);
        self.unlock.change_state(transition, change)
    }

    fn send_event(&self, event: gst::Event) -> bool {
        // The base class would end the stream at once, without another buffer.
        if event.type_() == gst::EventType::Eos
            && lock(&self.settings).live.resend_last
            && let Some(streaming) = &mut *lock(&self.streaming)
        {
            gst::debug!(CAT, imp = self, "EOS: resending the last frame first");
            streaming.ending = Ending::ResendLast;
            self.wake();
            return true;
        }
        self.parent_send_event(event)
    }
}

impl BaseSrcImpl for PipeWireZeroCopySrc {
    fn start(&self) -> Result<(), gst::ErrorMessage> {
        let settings = lock(&self.settings).clone();
        let unusable = |text: String| gst::error_msg!(gst::ResourceError::Settings, ["{text}"]);
        settings.check().map_err(unusable)?;
        let target = settings.target().map_err(unusable)?;
        let remote = settings.remote().map_err(unusable)?;
        *lock(&self.possible) = None;
        self.cuda.reset(settings.cuda_device());
        let downstream = self.downstream(&settings);
        let (can, display, cuda_device) = self.look_for_gpu(&settings, downstream)?;
        let failed = |error: std::io::Error| {
            gst::error_msg!(
                gst::ResourceError::Failed,
                ["cannot start capturing: {error}"]
            )
        };
        let mut waiter = Waiter::new().map_err(failed)?;
        let counters = Arc::new(Counters::default());
        let described = target.to_string();
        gst::info!(CAT, imp = self, "capturing {described}");
        let config = Config {
            remote,
            target,
            name: self.obj().name().replace('\0', ""),
            sync: display.as_ref().and_then(|display| self.timelines(display)),
            log: self.log(),
        };
        let capture = Capture::start(config, waiter.waker(), counters.clone()).map_err(failed)?;
        wait_for_connection(&capture, &mut waiter)?;
        *lock(&self.figures) = Figures::new(counters);
        self.unlock.started(waiter.waker());
        let streaming = Streaming::new(capture, waiter, described, can, display, cuda_device);
        *lock(&self.streaming) = Some(streaming);
        Ok(())
    }

    fn stop(&self) -> Result<(), gst::ErrorMessage> {
        self.unlock.stopped();
        // Dropped with no lock held: it joins the loop thread, which logs.
        let streaming = lock(&self.streaming).take();
        if let Some(mut streaming) = streaming {
            // Their buffers can go back only while the capture is there.
            streaming.last = None;
            streaming.latch.take();
        }
        // After all that was made in it.
        self.cuda.reset(None);
        Ok(())
    }

    fn is_seekable(&self) -> bool {
        false
    }

    fn unlock(&self) -> Result<(), gst::ErrorMessage> {
        self.unlock.unlock();
        Ok(())
    }

    fn unlock_stop(&self) -> Result<(), gst::ErrorMessage> {
        self.unlock.unlock_stop();
        Ok(())
    }

    fn query(&self, query: &mut gst::QueryRef) -> bool {
        if let gst::QueryViewMut::Latency(latency) = query.view_mut() {
            // A frame is here at the latest when the next one is drawn. Downstream may keep as many
            // as it likes, as long as it likes: frames are copied where the producer runs short.
            latency.set(true, self.latency(), gst::ClockTime::NONE);
            return true;
        }
        if let gst::QueryViewMut::Context(query) = query.view_mut()
            && cuda::answer(&self.cuda, query)
        {
            return true;
        }
        BaseSrcImplExt::parent_query(self, query)
    }

    fn event(&self, event: &gst::Event) -> bool {
        if event.type_() == gst::EventType::Reconfigure {
            // The thread may be waiting for a frame, which on a still screen never comes.
            self.wake();
        }
        self.parent_event(event)
    }

    fn caps(&self, filter: Option<&gst::Caps>) -> Option<gst::Caps> {
        let caps = self.possible_caps();
        Some(match filter {
            Some(filter) => filter.intersect_with_mode(&caps, gst::CapsIntersectMode::First),
            None => caps,
        })
    }

    /// Buffers leave at once. The default says the same at greater length, for each of them.
    fn times(&self, _buffer: &gst::BufferRef) -> (Option<gst::ClockTime>, Option<gst::ClockTime>) {
        (None, None)
    }

    fn negotiate(&self) -> Result<(), gst::LoggableError> {
        self.agree().map_err(|reason| {
            self.tell_disagreement(&reason);
            gst::loggable_error!(CAT, "{reason}")
        })
    }

    fn decide_allocation(
        &self,
        query: &mut gst::query::Allocation,
    ) -> Result<(), gst::LoggableError> {
        self.decide(query)
            .inspect_err(|reason| self.tell_disagreement(reason))
    }

    // Not that of PushSrc: the way there is longer.
    fn create(
        &self,
        _offset: u64,
        _buffer: Option<&mut gst::BufferRef>,
        _length: u32,
    ) -> Result<CreateSuccess, gst::FlowError> {
        let taken = lock(&self.streaming)
            .as_mut()
            .and_then(|streaming| streaming.waiter.take());
        let Some(mut waiter) = taken else {
            return Err(gst::FlowError::Flushing);
        };
        let result = self.unlock.create(&*self.obj(), || {
            let result = self.next_buffer(&mut waiter);
            if result == Err(gst::FlowError::Flushing)
                && let Some(streaming) = &mut *lock(&self.streaming)
            {
                // Time in PAUSED is not waited for the producer.
                streaming.waiting_since = None;
            }
            result
        });
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.waiter = Some(waiter);
        }
        result.map(CreateSuccess::NewBuffer)
    }
}

impl PushSrcImpl for PipeWireZeroCopySrc {}

impl PipeWireZeroCopySrc {
    fn wake(&self) {
        self.unlock.wake();
    }

    /// Whether what fails now may fail because everything is being stopped, flushed or paused.
    pub(super) fn is_flushing(&self) -> bool {
        let pad = self.obj().src_pad().clone();
        self.unlock.is_cancelled() || pad.pad_flags().contains(gst::PadFlags::FLUSHING)
    }

    /// A frame's time, and another one where frames are kept for that long.
    fn latency(&self) -> gst::ClockTime {
        let (negotiated, latching) = match &*lock(&self.streaming) {
            Some(streaming) => (streaming.negotiated.clone(), streaming.latch.active),
            None => (None, false),
        };
        let interval = Self::interval(negotiated.as_deref());
        if latching { interval * 2 } else { interval }
    }

    /// The time from one frame to the next at the highest rate that the producer has.
    pub(super) fn interval(negotiated: Option<&Negotiated>) -> gst::ClockTime {
        let (num, den) = negotiated
            .and_then(|negotiated| {
                let format = &negotiated.source;
                let fixed = Some(format.framerate).filter(|rate| rate.0 > 0);
                fixed.or(format.max_framerate)
            })
            .unwrap_or(USUAL_FRAMERATE);
        gst::ClockTime::SECOND
            .mul_div_ceil(den.into(), num.max(1).into())
            .unwrap_or(gst::ClockTime::SECOND)
    }

    /// A log for the capture's thread, which knows no GStreamer.
    fn log(&self) -> Log {
        let element = self.obj().downgrade();
        Arc::new(move |level, message| {
            let Some(element) = element.upgrade() else {
                return;
            };
            match level {
                Level::Warning => gst::warning!(CAT, obj = element, "{message}"),
                Level::Info => gst::info!(CAT, obj = element, "{message}"),
                Level::Debug => gst::debug!(CAT, obj = element, "{message}"),
                Level::Trace => gst::trace!(CAT, obj = element, "{message}"),
            }
        })
    }
}

/// Waits until the loop thread has a connection, so that the application learns at once, from the
/// state change, that it cannot have one.
fn wait_for_connection(capture: &Capture, waiter: &mut Waiter) -> Result<(), gst::ErrorMessage> {
    let deadline = Deadline::after(CONNECT_LIMIT);
    loop {
        match capture.inbox().connection() {
            Some(Ok(())) => return Ok(()),
            Some(Err(failure)) => return Err(failure_message(&failure, "")),
            None => {}
        }
        match waiter.wait(deadline) {
            Ok(Wake::TimedOut) => {
                return Err(gst::error_msg!(
                    gst::ResourceError::OpenRead,
                    [
                        "connecting to PipeWire took longer than {} s",
                        CONNECT_LIMIT.as_secs()
                    ]
                ));
            }
            Ok(_) => {}
            Err(error) => {
                return Err(gst::error_msg!(
                    gst::ResourceError::Failed,
                    ["waiting for PipeWire failed: {error}"]
                ));
            }
        }
    }
}

/// A failure, and what may have led to it, for the application.
pub(super) fn failure_message(failure: &Failure, before: &str) -> gst::ErrorMessage {
    let text = format!("{failure}{before}");
    match failure {
        Failure::Connect(_) => gst::error_msg!(gst::ResourceError::OpenRead, ["{text}"]),
        Failure::Target(_) => gst::error_msg!(gst::ResourceError::Settings, ["{text}"]),
        Failure::Daemon(_) => gst::error_msg!(gst::ResourceError::Read, ["{text}"]),
        Failure::Stream(_) => gst::error_msg!(gst::CoreError::Negotiation, ["{text}"]),
    }
}
