// SPDX-License-Identifier: MIT OR Apache-2.0

//! # scanoutsrc
//!
//! The screen of a VM, as the H.264 stream that the VM's host pushes: a `helix-host`, or a host
//! application that speaks the same protocol. The element subscribes to one scanout and emits one
//! access unit a buffer, beginning with a keyframe.
//!
//! A still screen may send nothing for as long as it likes; the host is then asked with a PING
//! whether it is there. When the host is lost, the element calls again for `reconnect-timeout`,
//! and goes on with a keyframe and a DISCONT flag.
//!
//! Buffers are stamped with the running time of their capture where the host says when that was,
//! else of their arrival. The host's own timestamp travels beside it as
//! `GstReferenceTimestampMeta` with caps `timestamp/x-helix-host`: a helix-host sends its
//! `CLOCK_MONOTONIC` at the time of capture, deployed hosts a made-up one.
//!
//! Without `scanout-id` the id is that of the environment, of the session's file, or of a scanout
//! that `drm-socket` lends from READY on.
//!
//! ## Example
//!
//! ```sh
//! helix-host --scanout 1="videotestsrc is-live=true ! video/x-raw,width=1280,height=720" &
//! gst-launch-1.0 scanoutsrc scanout-id=1 tcp-host=127.0.0.1 ! h264parse ! avdec_h264 ! \
//!   videoconvert ! autovideosink
//! ```
//!
//! Since: 0.1

use std::sync::atomic::Ordering;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;
use gst_base::subclass::base_src::CreateSuccess;
use gst_base::subclass::prelude::*;
use helix_protocol::wait::Waiter;
use zerocopy_plugin_common::Unlock;

use super::figures::Figures;
use super::scanout_id;
use super::settings::Settings;
use super::streaming::Streaming;
use crate::lease::Lease;
use crate::subscription::Wishes;

pub(super) static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "scanoutsrc",
        gst::DebugColorFlags::empty(),
        Some("Screen of a VM, pushed by its host"),
    )
});

/// The implementation of [`super::ScanoutSrc`].
#[derive(Default)]
pub struct ScanoutSrc {
    settings: Mutex<Settings>,
    /// The scanout that was asked for, from READY on; taken out while its answer is waited for.
    pub(super) lease: Mutex<Option<Lease>>,
    /// What belongs to the streaming thread; taken out while that thread works.
    streaming: Mutex<Option<Streaming>>,
    pub(super) figures: Mutex<Figures>,
    pub(super) wishes: Wishes,
    /// Ends the streaming thread's waits; apart from the rest, so that it never waits itself.
    unlock: Unlock,
    /// What a latency query is answered with.
    pub(super) latency: Mutex<gst::ClockTime>,
}

/// None of these locks is held where something could panic and leave a half-made change.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[glib::object_subclass]
impl ObjectSubclass for ScanoutSrc {
    const NAME: &'static str = "GstScanoutSrc";
    type Type = super::ScanoutSrc;
    type ParentType = gst_base::PushSrc;
}

impl ObjectImpl for ScanoutSrc {
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
        if pspec.name() == "bitrate" {
            self.wish_bitrate();
        }
    }

    fn property(&self, _id: usize, pspec: &glib::ParamSpec) -> glib::Value {
        match pspec.name() {
            "stats" => lock(&self.figures).structure().to_value(),
            _ => lock(&self.settings).get(pspec),
        }
    }

    fn constructed(&self) {
        self.parent_constructed();
        let obj = self.obj();
        obj.set_live(true);
        obj.set_format(gst::Format::Time);
    }
}

impl GstObjectImpl for ScanoutSrc {}

impl ElementImpl for ScanoutSrc {
    fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
        static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
            gst::subclass::ElementMetadata::new(
                "VM screen source",
                "Source/Video",
                "The screen of a VM as the H.264 stream that the VM's host pushes",
                "The gst-plugins-zerocopy authors",
            )
        });
        Some(&METADATA)
    }

    fn pad_templates() -> &'static [gst::PadTemplate] {
        static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(|| {
            let caps = gst::Caps::builder("video/x-h264")
                .field("stream-format", "byte-stream")
                .field("alignment", "au")
                .build();
            vec![
                gst::PadTemplate::new(
                    "src",
                    gst::PadDirection::Src,
                    gst::PadPresence::Always,
                    &caps,
                )
                .expect("the template is valid"),
            ]
        });
        &TEMPLATES
    }

    fn change_state(
        &self,
        transition: gst::StateChange,
    ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
        if transition == gst::StateChange::NullToReady
            && let Err(reason) = self.find_scanout()
        {
            gst::element_imp_error!(self, gst::ResourceError::Settings, ("{reason}"));
            return Err(gst::StateChangeError);
        }
        let change = || self.parent_change_state(transition);
        let result = self.unlock.change_state(transition, change);
        // A state change that fails is not undone: the lease goes with the element to NULL.
        if transition == gst::StateChange::ReadyToNull {
            self.release();
        }
        result
    }
}

impl BaseSrcImpl for ScanoutSrc {
    fn start(&self) -> Result<(), gst::ErrorMessage> {
        let settings = lock(&self.settings).clone();
        let wrong = |reason| gst::error_msg!(gst::ResourceError::Settings, ["{reason}"]);
        settings.connection.check().map_err(wrong)?;
        let scanout_id = self.find_scanout().map_err(wrong)?;
        let waiter = Waiter::new().map_err(|error| {
            gst::error_msg!(
                gst::ResourceError::Failed,
                ["cannot make a waiter: {error}"]
            )
        })?;
        let waker = waiter.waker();
        let streaming = Streaming::new(settings, scanout_id, waiter);
        *lock(&self.figures) = Figures::default();
        *lock(&self.latency) = gst::ClockTime::ZERO;
        self.unlock.started(waker);
        self.wishes.begin();
        *lock(&self.streaming) = Some(streaming);
        Ok(())
    }

    fn stop(&self) -> Result<(), gst::ErrorMessage> {
        self.unlock.stopped();
        let streaming = lock(&self.streaming).take();
        if let Some(streaming) = streaming {
            streaming.end();
        }
        Ok(())
    }

    fn unlock(&self) -> Result<(), gst::ErrorMessage> {
        self.unlock.unlock();
        Ok(())
    }

    fn unlock_stop(&self) -> Result<(), gst::ErrorMessage> {
        self.unlock.unlock_stop();
        Ok(())
    }

    fn is_seekable(&self) -> bool {
        false
    }

    fn negotiate(&self) -> Result<(), gst::LoggableError> {
        // The stream itself says what its caps are, with the first keyframe.
        Ok(())
    }

    fn query(&self, query: &mut gst::QueryRef) -> bool {
        if let gst::QueryViewMut::Latency(latency) = query.view_mut() {
            // The network and the host may hold a frame back for as long as they like.
            latency.set(true, *lock(&self.latency), gst::ClockTime::NONE);
            return true;
        }
        BaseSrcImplExt::parent_query(self, query)
    }

    fn event(&self, event: &gst::Event) -> bool {
        if event
            .structure()
            .is_some_and(|structure| structure.name() == "GstForceKeyUnit")
        {
            return self.wish_keyframe();
        }
        self.parent_event(event)
    }
}

impl PushSrcImpl for ScanoutSrc {
    fn create(
        &self,
        _buffer: Option<&mut gst::BufferRef>,
    ) -> Result<CreateSuccess, gst::FlowError> {
        let Some(mut streaming) = lock(&self.streaming).take() else {
            return Err(gst::FlowError::Flushing);
        };
        let next = || self.next_buffer(&mut streaming);
        let result = self.unlock.create(&*self.obj(), next);
        *lock(&self.streaming) = Some(streaming);
        result.map(CreateSuccess::NewBuffer)
    }
}

impl ScanoutSrc {
    /// The scanout's id, unless it is the one of a lease, which is asked for now. The manager's
    /// answer is waited for in the streaming thread: nobody can interrupt a state change.
    fn find_scanout(&self) -> Result<Option<u16>, String> {
        let settings = lock(&self.settings).clone();
        let id = scanout_id::find(settings.scanout_id, |name| std::env::var_os(name))?;
        if id.is_some() {
            // Perhaps set in READY, and what was lent is not needed any more.
            self.release();
            return Ok(id);
        }
        let mut lease = lock(&self.lease);
        if lease.as_ref().is_none_or(|lease| !lease.is_alive()) {
            let asked = settings.ask_for_lease();
            *lease = Some(asked.map_err(|error| scanout_id::not_lent(&error))?);
        }
        Ok(None)
    }

    /// Gives back what was lent.
    fn release(&self) {
        let lease = lock(&self.lease).take();
        if let Some(lease) = lease
            && let Err(error) = lease.release()
        {
            // It has gone back all the same: the connection is closed.
            gst::debug!(CAT, imp = self, "giving the scanout back: {error}");
        }
    }

    /// Asks for a keyframe; whether that is of any use.
    fn wish_keyframe(&self) -> bool {
        if self.wishes.host_is_deaf.load(Ordering::Acquire) {
            gst::debug!(
                CAT,
                imp = self,
                "no keyframe: this host makes none when asked"
            );
            return false;
        }
        gst::debug!(CAT, imp = self, "asking for a keyframe");
        self.wishes.keyframe.store(true, Ordering::Release);
        self.wake();
        true
    }

    /// Asks for the bitrate that is set, if one is.
    pub(super) fn wish_bitrate(&self) {
        let bitrate = lock(&self.settings).bitrate;
        if bitrate > 0 {
            self.wishes.bitrate.store(bitrate, Ordering::Release);
            self.wake();
        }
    }

    fn wake(&self) {
        self.unlock.wake();
    }
}
