// SPDX-License-Identifier: MIT OR Apache-2.0

//! # qemudisplaysrc
//!
//! One console of a running QEMU, as a stock QEMU (7.2 and newer) shows it over D-Bus.
//!
//! `address` names the bus that QEMU was given with `-display dbus,addr=`. Without a bus, with
//! `-display dbus,p2p=on`, `qmp-socket` names its QMP socket instead. `console` says which
//! console; `width` and `height` ask the guest for a size, which a guest with virtio-gpu follows.
//!
//! A frame leaves when the screen changes, at most `max-framerate` times a second: changes that
//! come faster become one frame, the latest. What of it has changed lies beside it as
//! `GstDesktopDamage`. A still screen sends nothing; who comes late gets the last frame on a
//! RECONFIGURE event, which linking a new branch to a tee sends, or on GstForceKeyUnit.
//!
//! The memory that QEMU draws into goes out as it is, where QEMU offers it and does not draw into
//! it all the time; docs/elements/qemudisplaysrc.md says how that keeps frames whole.
//!
//! When QEMU ends, the element posts an error. Set it to READY and to PLAYING again to find the
//! next one. An element message `qemu-display` with the field `state` (streaming, off) tells when
//! the guest switches the console off and on.
//!
//! ## Example
//!
//! ```sh
//! dbus-daemon --session --address=unix:path=/tmp/vm-bus --fork
//! qemu-system-x86_64 -display dbus,addr=unix:path=/tmp/vm-bus -vga virtio ... &
//! gst-launch-1.0 qemudisplaysrc address=unix:path=/tmp/vm-bus ! videoconvert ! autovideosink
//! ```
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
use qemu_display::{Config, Consoles, Display, Error, Level, Log, Status};
use zerocopy_plugin_common::Unlock;
use zerocopy_plugin_common::wait::{Deadline, Waiter};

use super::buffers::Buffers;
use super::caps;
use super::figures::Figures;
use super::settings::{Settings, interval};
use super::streaming::{Negotiated, Streaming};

pub(super) static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "qemudisplaysrc",
        gst::DebugColorFlags::empty(),
        Some("Console of a running QEMU"),
    )
});

/// Limit for connecting; a display gives up earlier.
const START_LIMIT: Duration = Duration::from_secs(15);

/// The highest rate that latency is reckoned with where there is no limit.
const USUAL_FRAMERATE: (i32, i32) = (60, 1);

/// The implementation of [`super::QemuDisplaySrc`].
#[derive(Default)]
pub struct QemuDisplaySrc {
    pub(super) settings: Mutex<Settings>,
    pub(super) streaming: Mutex<Option<Streaming>>,
    /// Locked while pixels are copied, and so apart from the rest.
    pub(super) buffers: Mutex<Buffers>,
    pub(super) figures: Mutex<Figures>,
    /// Ends the streaming thread's waits; apart from the rest, so that it never waits itself.
    unlock: Unlock,
}

/// None of these locks is held where something could panic and leave a half-made change.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[glib::object_subclass]
impl ObjectSubclass for QemuDisplaySrc {
    const NAME: &'static str = "GstQemuDisplaySrc";
    type Type = super::QemuDisplaySrc;
    type ParentType = gst_base::PushSrc;
}

impl ObjectImpl for QemuDisplaySrc {
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
        match pspec.name() {
            "width" | "height" => self.ask_for_size(),
            // An overlay is a matter of caps.
            "cursor" => self.obj().src_pad().mark_reconfigure(),
            _ => {}
        }
        // The thread may be waiting for a moment that the old value gave.
        self.wake();
    }

    fn property(&self, _id: usize, pspec: &glib::ParamSpec) -> glib::Value {
        match pspec.name() {
            "stats" => {
                let streaming = lock(&self.streaming);
                let screen = streaming.as_ref().map(|now| now.screen.figures());
                drop(streaming);
                lock(&self.figures).structure(screen).to_value()
            }
            _ => lock(&self.settings).get(pspec),
        }
    }
}

impl GstObjectImpl for QemuDisplaySrc {}

impl ElementImpl for QemuDisplaySrc {
    fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
        static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
            gst::subclass::ElementMetadata::new(
                "QEMU console source",
                "Source/Video",
                "A console of a running QEMU, through its D-Bus display",
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
                &caps::template(),
            );
            vec![src.expect("the template is valid")]
        });
        &TEMPLATES
    }

    /// QEMU converts and sends what changes to whoever listens. So it is listened to from PLAYING on, and
    /// QEMU 7.2 only while frames can leave. A newer one keeps each listener that it ever had: it goes on with
    /// the same one in PAUSED too.
    fn change_state(
        &self,
        transition: gst::StateChange,
    ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
        if transition == gst::StateChange::PausedToPlaying
            && let Some(streaming) = &mut *lock(&self.streaming)
        {
            streaming.listening = Some(streaming.screen.listen());
            // A pause that is over before the connection's thread has noticed it brings no new picture.
            (streaming.again, streaming.missed) = (true, true);
        }
        let change = || self.parent_change_state(transition);
        let result = self.unlock.change_state(transition, change);
        if transition == gst::StateChange::PausedToPlaying {
            self.wake();
        }
        if transition == gst::StateChange::PlayingToPaused {
            if let Some(streaming) = &mut *lock(&self.streaming) {
                streaming.listening = None;
            }
            lock(&self.buffers).forget();
        }
        result
    }
}

impl BaseSrcImpl for QemuDisplaySrc {
    fn start(&self) -> Result<(), gst::ErrorMessage> {
        let settings = lock(&self.settings).clone();
        let unusable = |text: String| gst::error_msg!(gst::ResourceError::Settings, ["{text}"]);
        let address = settings.address().map_err(unusable)?;
        let size = settings.size().map_err(unusable)?;
        let failed = |error: std::io::Error| {
            gst::error_msg!(gst::ResourceError::Failed, ["cannot start: {error}"])
        };
        let mut waiter = Waiter::new().map_err(failed)?;
        let waker = waiter.waker();
        gst::info!(CAT, imp = self, "console {} of {address}", settings.console);
        let display = Display::start(Config {
            address,
            consoles: Consoles::One(settings.console),
            notify: Arc::new(move |_| waker.wake()),
            log: self.log(),
        });
        let display = display.map_err(failed)?;
        // So that the application learns at once, from the state change, that there is no such
        // console. The display gives up by itself, unless it has failed in a way of its own.
        let deadline = Deadline::after(START_LIMIT);
        let screen = loop {
            match display.status() {
                Status::Connecting if deadline.has_passed() => break None,
                Status::Connecting => {}
                Status::Connected => break display.screen(settings.console),
                Status::Failed(error) => return Err(error_message(&error)),
            }
            waiter.wait(deadline).map_err(failed)?;
        };
        let Some(screen) = screen else {
            return Err(gst::error_msg!(
                gst::LibraryError::Failed,
                [
                    "no connection to console {}, and no reason given",
                    settings.console
                ]
            ));
        };
        *lock(&self.figures) = Figures::default();
        self.unlock.started(waiter.waker());
        *lock(&self.streaming) = Some(Streaming::new(display, screen, waiter));
        if size.is_some() {
            self.ask_for_size();
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), gst::ErrorMessage> {
        self.unlock.stopped();
        let streaming = lock(&self.streaming).take();
        if let Some(streaming) = &streaming {
            lock(&self.figures).screen = streaming.screen.figures();
        }
        // Dropped with no lock held: it joins the connection's thread, which logs.
        drop(streaming);
        lock(&self.buffers).reset();
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
        // What downstream had is flushed, and a still screen sends nothing by itself.
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.missed = true;
        }
        self.ask_for_frame();
        Ok(())
    }

    fn query(&self, query: &mut gst::QueryRef) -> bool {
        if let gst::QueryViewMut::Latency(latency) = query.view_mut() {
            // A change waits for the next frame's time at most. Frames may be kept downstream as
            // long as anybody likes.
            latency.set(true, self.latency(), gst::ClockTime::NONE);
            return true;
        }
        BaseSrcImplExt::parent_query(self, query)
    }

    fn event(&self, event: &gst::Event) -> bool {
        let asks_for_keyframe = event
            .structure()
            .is_some_and(|structure| structure.name() == "GstForceKeyUnit");
        if asks_for_keyframe || event.type_() == gst::EventType::Reconfigure {
            self.ask_for_frame();
        }
        asks_for_keyframe || self.parent_event(event)
    }

    /// Sets caps for the picture that is there; before, there is nothing to agree on.
    fn negotiate(&self) -> Result<(), gst::LoggableError> {
        let wanted = lock(&self.streaming).as_ref().and_then(|now| now.wanted);
        let Some(form) = wanted else {
            return Ok(());
        };
        let live = lock(&self.settings).live;
        let allowed = self
            .obj()
            .src_pad()
            .peer_query_caps(Some(&caps::template()));
        let caps_for = |form: &caps::Form| {
            let overlay = live.wants_overlay(form.is_dmabuf()) && !form.is_flipped();
            let found = caps::caps_for(form, &allowed, live.max_framerate(), overlay);
            found.map(|(caps, overlay)| (caps, overlay, form.is_dmabuf()))
        };
        // A DMA-BUF that downstream cannot take is copied, where a processor can read it.
        let found = caps_for(&form).or_else(|| caps_for(&form.in_memory()?));
        let Some((caps, overlay, on_gpu)) = found else {
            return Err(gst::loggable_error!(
                CAT,
                "QEMU gives {}, and downstream takes {allowed}",
                form.describe()
            ));
        };
        gst::info!(CAT, imp = self, "caps {caps}");
        // Downstream is called: no lock is held.
        self.obj()
            .set_caps(&caps)
            .map_err(|_| gst::loggable_error!(CAT, "downstream refused {caps}"))?;
        let rate = caps
            .structure(0)
            .and_then(|fields| fields.get("framerate").ok());
        lock(&self.buffers).reset();
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.negotiated = Some(Negotiated {
                form,
                info: gst_video::VideoInfo::from_caps(&caps)
                    .ok()
                    .filter(|_| !on_gpu),
                any_layout: false,
                framerate: rate.filter(|rate: &gst::Fraction| rate.numer() > 0),
                overlay,
            });
        }
        Ok(())
    }

    /// Takes note of what downstream knows. Buffers are QEMU's memory, or copies in a pool of our
    /// own.
    fn decide_allocation(
        &self,
        query: &mut gst::query::Allocation,
    ) -> Result<(), gst::LoggableError> {
        let any_layout = query
            .find_allocation_meta::<gst_video::VideoMeta>()
            .is_some();
        if let Some(streaming) = &mut *lock(&self.streaming)
            && let Some(negotiated) = &mut streaming.negotiated
        {
            negotiated.any_layout = any_layout;
        }
        // The base class would make the pool work that downstream proposes.
        while query.allocation_pools().next().is_some() {
            query.remove_nth_allocation_pool(0);
        }
        Ok(())
    }
}

impl PushSrcImpl for QemuDisplaySrc {
    fn create(
        &self,
        _buffer: Option<&mut gst::BufferRef>,
    ) -> Result<CreateSuccess, gst::FlowError> {
        let taken = lock(&self.streaming)
            .as_mut()
            .and_then(|streaming| streaming.waiter.take());
        let Some(mut waiter) = taken else {
            return Err(gst::FlowError::Flushing);
        };
        let next = || self.next_buffer(&mut waiter);
        let result = self.unlock.create(&*self.obj(), next);
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.waiter = Some(waiter);
        }
        result.map(CreateSuccess::NewBuffer)
    }
}

impl QemuDisplaySrc {
    fn wake(&self) {
        self.unlock.wake();
    }

    /// Whether what fails now may fail because everything is being stopped, flushed or paused.
    pub(super) fn is_flushing(&self) -> bool {
        let pad = self.obj().src_pad().clone();
        self.unlock.is_cancelled() || pad.pad_flags().contains(gst::PadFlags::FLUSHING)
    }

    /// Has the picture sent once more, new or not.
    fn ask_for_frame(&self) {
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.again = true;
        }
        self.wake();
    }

    /// Asks the guest for the size that is set, if there is one and there is a guest.
    fn ask_for_size(&self) {
        let settings = lock(&self.settings).clone();
        let Ok(Some(size)) = settings.size() else {
            return;
        };
        let element = self.obj().downgrade();
        let console = settings.console;
        let done = move |answer: Result<(), String>| {
            let Some(element) = element.upgrade() else {
                return;
            };
            let (width, height) = size;
            match answer {
                Ok(()) => gst::info!(CAT, obj = element, "asked for {width}x{height}"),
                // The picture comes in the size that it has.
                Err(reason) => gst::element_warning!(
                    element,
                    gst::ResourceError::Settings,
                    ["console {console} cannot be told to be {width}x{height}: {reason}"]
                ),
            }
        };
        let display = lock(&self.streaming)
            .as_ref()
            .map(|now| now.display.clone());
        if let Some(display) = display {
            display.set_size(console, size, done);
        }
    }

    /// The time from one frame to the next.
    fn latency(&self) -> gst::ClockTime {
        let live = lock(&self.settings).live;
        let usual = gst::Fraction::new(USUAL_FRAMERATE.0, USUAL_FRAMERATE.1);
        let interval = interval(live.max_framerate().unwrap_or(usual));
        gst::ClockTime::try_from(interval).unwrap_or(gst::ClockTime::SECOND)
    }

    /// A log for the connection's thread, which knows no GStreamer.
    fn log(&self) -> Log {
        let element = self.obj().downgrade();
        Arc::new(move |level, message| {
            let Some(element) = element.upgrade() else {
                return;
            };
            match level {
                Level::Warning => gst::warning!(CAT, obj = element, "{message}"),
                Level::Info => gst::info!(CAT, obj = element, "{message}"),
            }
        })
    }
}

/// An error of the display's, with what to do about it.
pub(super) fn error_message(error: &Error) -> gst::ErrorMessage {
    match error {
        Error::Unreachable { .. } => {
            gst::error_msg!(gst::ResourceError::OpenRead, ["{error}"])
        }
        Error::NoConsole { .. } => gst::error_msg!(gst::ResourceError::NotFound, ["{error}"]),
        Error::Gone { .. } => gst::error_msg!(
            gst::ResourceError::Read,
            [
                "{error}. When QEMU runs again, set this element to READY and to PLAYING: it \
                 does not come back by itself"
            ]
        ),
        Error::Nonsense(_) => gst::error_msg!(
            gst::StreamError::Failed,
            ["{error}. It is not listened to any longer"]
        ),
        Error::System(_) => gst::error_msg!(gst::ResourceError::Failed, ["{error}"]),
    }
}
