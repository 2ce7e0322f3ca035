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
//! Buffers are stamped with the running time of their arrival. The host's own timestamp travels
//! beside it as `GstReferenceTimestampMeta` with caps `timestamp/x-helix-host`: a helix-host sends
//! its `CLOCK_MONOTONIC` at the time of capture, deployed hosts a made-up one.
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
use helix_protocol::message::EnableScanout;
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};
use zerocopy_plugin_common::{
    Backoff, ConnectionSettings, ConnectionState, H264Caps, accepted_downstream, connection_message,
};

use super::low_delay;
use crate::subscription::{Pushed, Subscription, SubscriptionError, Target, Wishes};

static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "scanoutsrc",
        gst::DebugColorFlags::empty(),
        Some("Screen of a VM, pushed by its host"),
    )
});

/// Caps of the meta that carries the host's timestamp.
static HOST_TIMESTAMP: LazyLock<gst::Caps> =
    LazyLock::new(|| gst::Caps::new_empty_simple("timestamp/x-helix-host"));

/// At most this many scanouts exist (quirk 12 of docs/protocol.md); ids fit the header's 16 bits.
const LAST_SCANOUT: i32 = u16::MAX as i32;

#[derive(Clone, Debug)]
struct Settings {
    connection: ConnectionSettings,
    scanout_id: i32,
    enable: bool,
    width: u32,
    height: u32,
    refresh_rate: u32,
    bitrate: u32,
    low_delay_vui: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connection: ConnectionSettings::default(),
            scanout_id: -1,
            enable: false,
            width: 1920,
            height: 1080,
            refresh_rate: 60,
            bitrate: 0,
            low_delay_vui: false,
        }
    }
}

/// What belongs to the streaming thread; taken out of its mutex while that thread works.
struct Streaming {
    waiter: Waiter,
    target: Target,
    settings: Settings,
    subscription: Option<Subscription>,
    /// Runs from the loss of a host until another has pushed a frame.
    backoff: Option<Backoff>,
    /// Bytes of the subscription that are in [`Counts`].
    bytes: (u64, u64),
    caps: H264Caps,
    /// Deltas cannot be decoded before this is set.
    had_keyframe: bool,
    discont: bool,
    last_pts: Option<gst::ClockTime>,
}

#[derive(Clone, Debug, Default)]
struct Counts {
    frames: u64,
    keyframes: u64,
    dropped: u64,
    errors: u64,
    reconnects: u64,
    resyncs: u64,
    bytes_sent: u64,
    bytes_received: u64,
}

/// The implementation of [`super::ScanoutSrc`].
#[derive(Default)]
pub struct ScanoutSrc {
    settings: Mutex<Settings>,
    streaming: Mutex<Option<Streaming>>,
    counts: Mutex<Counts>,
    wishes: Wishes,
    /// Ends the streaming thread's waits; apart from the rest, so that it never waits itself.
    waker: Mutex<Option<Waker>>,
}

/// None of these locks is held where something could panic and leave a half-made change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
            let default = Settings::default();
            let mut properties = ConnectionSettings::properties();
            properties.extend([
                glib::ParamSpecInt::builder("scanout-id")
                    .nick("Scanout id")
                    .blurb(
                        "Which scanout (-1 = environment HELIX_SCANOUT_ID, else the file \
                         helix-scanout-id in XDG_RUNTIME_DIR)",
                    )
                    .minimum(-1)
                    .maximum(LAST_SCANOUT)
                    .default_value(default.scanout_id)
                    .mutable_ready()
                    .build(),
                glib::ParamSpecBoolean::builder("enable")
                    .nick("Enable")
                    .blurb("Switch the scanout on before subscribing, and off at the end")
                    .default_value(default.enable)
                    .mutable_ready()
                    .build(),
                glib::ParamSpecUInt::builder("width")
                    .nick("Width")
                    .blurb("Width in pixels that the scanout is switched on with (enable)")
                    .minimum(1)
                    .maximum(8192)
                    .default_value(default.width)
                    .mutable_ready()
                    .build(),
                glib::ParamSpecUInt::builder("height")
                    .nick("Height")
                    .blurb("Height in pixels that the scanout is switched on with (enable)")
                    .minimum(1)
                    .maximum(8192)
                    .default_value(default.height)
                    .mutable_ready()
                    .build(),
                glib::ParamSpecUInt::builder("refresh-rate")
                    .nick("Refresh rate")
                    .blurb("Refresh rate in Hz that the scanout is switched on with (enable)")
                    .minimum(1)
                    .maximum(1000)
                    .default_value(default.refresh_rate)
                    .mutable_ready()
                    .build(),
                glib::ParamSpecInt::builder("bitrate")
                    .nick("Bitrate")
                    .blurb(
                        "Bitrate in bit/s (not kbit/s) to ask the host for (0 = leave it to the \
                         host); may be changed while playing",
                    )
                    .minimum(0)
                    .default_value(default.bitrate as i32)
                    .mutable_playing()
                    .build(),
                glib::ParamSpecBoolean::builder("low-delay-vui")
                    .nick("Low delay VUI")
                    .blurb(
                        "Rewrite the stream's parameter sets so that decoders hold no picture \
                         back; not for streams with B pictures",
                    )
                    .default_value(default.low_delay_vui)
                    .mutable_ready()
                    .build(),
                glib::ParamSpecBoxed::builder::<gst::Structure>("stats")
                    .nick("Statistics")
                    .blurb("What happened since the element was started; see the element's page")
                    .read_only()
                    .build(),
            ]);
            properties
        });
        &PROPERTIES
    }

    fn set_property(&self, _id: usize, value: &glib::Value, pspec: &glib::ParamSpec) {
        let mut settings = lock(&self.settings);
        if settings.connection.set(value, pspec) {
            return;
        }
        let checked = "GObject checked the type";
        match pspec.name() {
            "scanout-id" => settings.scanout_id = value.get().expect(checked),
            "enable" => settings.enable = value.get().expect(checked),
            "width" => settings.width = value.get().expect(checked),
            "height" => settings.height = value.get().expect(checked),
            "refresh-rate" => settings.refresh_rate = value.get().expect(checked),
            "bitrate" => {
                settings.bitrate = value.get::<i32>().expect(checked).unsigned_abs();
                let bitrate = settings.bitrate;
                drop(settings);
                self.wish_bitrate(bitrate);
            }
            "low-delay-vui" => settings.low_delay_vui = value.get().expect(checked),
            name => unreachable!("no writable property {name} was installed"),
        }
    }

    fn property(&self, _id: usize, pspec: &glib::ParamSpec) -> glib::Value {
        let settings = lock(&self.settings);
        if let Some(value) = settings.connection.get(pspec) {
            return value;
        }
        match pspec.name() {
            "scanout-id" => settings.scanout_id.to_value(),
            "enable" => settings.enable.to_value(),
            "width" => settings.width.to_value(),
            "height" => settings.height.to_value(),
            "refresh-rate" => settings.refresh_rate.to_value(),
            "bitrate" => (settings.bitrate as i32).to_value(),
            "low-delay-vui" => settings.low_delay_vui.to_value(),
            "stats" => {
                drop(settings);
                self.stats().to_value()
            }
            name => unreachable!("no property {name} was installed"),
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
}

impl BaseSrcImpl for ScanoutSrc {
    fn start(&self) -> Result<(), gst::ErrorMessage> {
        let settings = lock(&self.settings).clone();
        let scanout_id = find_scanout_id(settings.scanout_id)
            .map_err(|reason| gst::error_msg!(gst::ResourceError::Settings, ["{reason}"]))?;
        let target = Target {
            address: settings.connection.address(),
            scanout_id,
            enable: settings.enable.then_some(EnableScanout {
                scanout_id,
                width: settings.width,
                height: settings.height,
                refresh_rate: settings.refresh_rate,
            }),
            timeout: settings.connection.timeout(),
            auth_token: settings.connection.auth_token(),
        };
        let waiter = Waiter::new().map_err(|error| {
            gst::error_msg!(
                gst::ResourceError::Failed,
                ["cannot make a waiter: {error}"]
            )
        })?;
        gst::info!(
            CAT,
            imp = self,
            "scanout {scanout_id} of {}",
            target.address
        );
        *lock(&self.counts) = Counts::default();
        *lock(&self.waker) = Some(waiter.waker());
        self.wish_bitrate(settings.bitrate);
        *lock(&self.streaming) = Some(Streaming {
            waiter,
            target,
            settings,
            subscription: None,
            backoff: None,
            bytes: (0, 0),
            caps: H264Caps::default(),
            had_keyframe: false,
            discont: true,
            last_pts: None,
        });
        Ok(())
    }

    fn stop(&self) -> Result<(), gst::ErrorMessage> {
        *lock(&self.waker) = None;
        let streaming = lock(&self.streaming).take();
        if let Some(Streaming {
            mut waiter,
            subscription: Some(subscription),
            ..
        }) = streaming
        {
            // The base class has unlocked, and now there is something to say once more.
            waiter.waker().reset();
            subscription.end(&mut waiter);
        }
        Ok(())
    }

    fn unlock(&self) -> Result<(), gst::ErrorMessage> {
        if let Some(waker) = &*lock(&self.waker) {
            waker.cancel();
        }
        Ok(())
    }

    fn unlock_stop(&self) -> Result<(), gst::ErrorMessage> {
        if let Some(waker) = &*lock(&self.waker) {
            waker.reset();
        }
        Ok(())
    }

    fn is_seekable(&self) -> bool {
        false
    }

    fn negotiate(&self) -> Result<(), gst::LoggableError> {
        // The stream itself says what its caps are, with the first keyframe.
        Ok(())
    }

    fn event(&self, event: &gst::Event) -> bool {
        if event
            .structure()
            .is_some_and(|structure| structure.name() == "GstForceKeyUnit")
        {
            gst::debug!(CAT, imp = self, "asking for a keyframe");
            self.wishes.keyframe.store(true, Ordering::Release);
            self.wake();
            return true;
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
        let result = self.next_buffer(&mut streaming);
        *lock(&self.streaming) = Some(streaming);
        result.map(CreateSuccess::NewBuffer)
    }
}

impl ScanoutSrc {
    fn next_buffer(&self, streaming: &mut Streaming) -> Result<gst::Buffer, gst::FlowError> {
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
                    if let Some(buffer) = self.buffer(streaming, pushed)? {
                        return Ok(buffer);
                    }
                }
                Err(SubscriptionError::Cancelled) => return Err(gst::FlowError::Flushing),
                Err(error) => {
                    {
                        let mut counts = lock(&self.counts);
                        match error {
                            SubscriptionError::OutOfStep(_) => counts.resyncs += 1,
                            SubscriptionError::Said(_) => counts.errors += 1,
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
        streaming.subscription = Some(subscription);
        streaming.bytes = (0, 0);
        self.post(streaming, ConnectionState::Connected, &peer, "");
    }

    /// Calls the host again until it pushes once more, or the time is up.
    fn resubscribe(&self, streaming: &mut Streaming, reason: &str) -> Result<(), gst::FlowError> {
        streaming.subscription = None;
        streaming.had_keyframe = false;
        streaming.discont = true;
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
                    lock(&self.counts).reconnects += 1;
                    self.wish_bitrate(lock(&self.settings).bitrate);
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

    /// The access unit as a buffer, unless nothing could be decoded from it.
    fn buffer(
        &self,
        streaming: &mut Streaming,
        pushed: Pushed,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let Pushed { response, data } = pushed;
        if data.is_empty() {
            return Ok(None);
        }
        if response.is_keyframe {
            if let Some(caps) = streaming.caps.update(&data) {
                gst::info!(CAT, imp = self, "the host sends {caps}");
                let obj = self.obj();
                let caps = accepted_downstream(obj.src_pad(), caps).map_err(|reason| {
                    gst::element_imp_error!(self, gst::CoreError::Negotiation, ("{reason}"));
                    gst::FlowError::NotNegotiated
                })?;
                self.obj().set_caps(&caps).map_err(|error| {
                    gst::debug!(CAT, imp = self, "{error}");
                    gst::FlowError::NotNegotiated
                })?;
            }
            streaming.had_keyframe = streaming.caps.is_known();
        }
        if !streaming.had_keyframe {
            gst::debug!(
                CAT,
                imp = self,
                "dropping what cannot be decoded before a keyframe"
            );
            lock(&self.counts).dropped += 1;
            return Ok(None);
        }
        {
            let mut counts = lock(&self.counts);
            counts.frames += 1;
            counts.keyframes += u64::from(response.is_keyframe);
        }
        streaming.backoff = None;
        let now = self.obj().current_running_time();
        // Two in one tick of the clock must still differ.
        let pts = match (now, streaming.last_pts) {
            (Some(now), Some(last)) => Some(now.max(last + gst::ClockTime::from_nseconds(1))),
            (now, _) => now,
        };
        streaming.last_pts = pts;
        let patches = if response.is_keyframe && streaming.settings.low_delay_vui {
            low_delay::patches(&data).unwrap_or_else(|error| {
                gst::warning!(CAT, imp = self, "low-delay-vui changes nothing: {error}");
                Vec::new()
            })
        } else {
            Vec::new()
        };
        let mut buffer = low_delay::buffer(data, patches);
        let writable = buffer.make_mut();
        writable.set_pts(pts);
        writable.set_dts(pts);
        if !response.is_keyframe {
            writable.set_flags(gst::BufferFlags::DELTA_UNIT);
        }
        if std::mem::take(&mut streaming.discont) {
            writable.set_flags(gst::BufferFlags::DISCONT);
        }
        if let Ok(host) = u64::try_from(response.pts) {
            gst::ReferenceTimestampMeta::add(
                writable,
                &HOST_TIMESTAMP,
                gst::ClockTime::from_nseconds(host),
                gst::ClockTime::NONE,
            );
        }
        gst::trace!(CAT, imp = self, "{buffer:?}");
        Ok(Some(buffer))
    }

    fn count_bytes(&self, streaming: &mut Streaming) {
        let Some(subscription) = &streaming.subscription else {
            return;
        };
        let bytes = subscription.bytes();
        let mut counts = lock(&self.counts);
        counts.bytes_sent += bytes.0 - streaming.bytes.0;
        counts.bytes_received += bytes.1 - streaming.bytes.1;
        streaming.bytes = bytes;
    }

    fn fail(&self, streaming: &mut Streaming, reason: &str) -> gst::FlowError {
        lock(&self.counts).errors += 1;
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

    fn wake(&self) {
        if let Some(waker) = &*lock(&self.waker) {
            waker.wake();
        }
    }

    fn wish_bitrate(&self, bitrate: u32) {
        if bitrate > 0 {
            self.wishes.bitrate.store(bitrate, Ordering::Release);
            self.wake();
        }
    }

    fn stats(&self) -> gst::Structure {
        let counts = lock(&self.counts).clone();
        gst::Structure::builder("scanoutsrc-stats")
            .field("frames", counts.frames)
            .field("bytes-sent", counts.bytes_sent)
            .field("bytes-received", counts.bytes_received)
            .field("dropped", counts.dropped)
            .field("errors", counts.errors)
            .field("reconnects", counts.reconnects)
            .field("transfer", "h264")
            .field("keyframes", counts.keyframes)
            .field("resyncs", counts.resyncs)
            // Needs the host's clock, which only HELLO will tell.
            .field("latency-p50-us", 0u64)
            .field("latency-p99-us", 0u64)
            .build()
    }
}

/// The property, else the environment, else the file that a desktop's session left.
fn find_scanout_id(property: i32) -> Result<u32, String> {
    if let Ok(id) = u32::try_from(property) {
        return Ok(id);
    }
    let parse = |text: &str, from: &str| match text.trim().parse::<u16>() {
        Ok(id) => Ok(id.into()),
        Err(_) => Err(format!(
            "{from} is '{}', which is no scanout id",
            text.trim()
        )),
    };
    if let Ok(text) = std::env::var("HELIX_SCANOUT_ID") {
        return parse(&text, "the environment's HELIX_SCANOUT_ID");
    }
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR") {
        let file = std::path::Path::new(&dir).join("helix-scanout-id");
        if let Ok(text) = std::fs::read_to_string(&file) {
            return parse(&text, &file.display().to_string());
        }
    }
    Err(
        "which scanout? Set scanout-id or the environment's HELIX_SCANOUT_ID, or have the session \
         write $XDG_RUNTIME_DIR/helix-scanout-id"
            .to_owned(),
    )
}
