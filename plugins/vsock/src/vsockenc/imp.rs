// SPDX-License-Identifier: MIT OR Apache-2.0

//! # vsockenc
//!
//! Encodes raw video to H.264 on another machine: the host of this VM or container, where the
//! hardware encoder is. Frames go to a `helix-host` (or a host application that speaks the same
//! protocol) over a unix socket, TCP or AF_VSOCK, and access units come back.
//!
//! Frames are sent as they come and finished as their replies come, with at most `max-in-flight`
//! between; a frame's reply never waits for the next frame. When the host is lost, frames are
//! dropped, and counted, until it is found again or `reconnect-timeout` has passed; the stream
//! then goes on with a keyframe.
//!
//! `keyframe-interval` counts frames; a force-key-unit event from either side asks for a keyframe
//! at once. `bitrate` may be changed while playing.
//!
//! ## Example
//!
//! ```sh
//! helix-host --listen tcp:127.0.0.1:15937 &
//! gst-launch-1.0 videotestsrc num-buffers=300 ! video/x-raw,format=NV12,width=1280,height=720 ! \
//!   vsockenc tcp-host=127.0.0.1 bitrate=2000000 ! h264parse ! mp4mux ! filesink location=out.mp4
//! ```
//!
//! Since: 0.1

use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_video::prelude::*;
use gst_video::subclass::prelude::*;
use helix_protocol::message::Config;
use helix_protocol::wait::{Waiter, Waker};

use super::Transfer;
use super::formats;
use super::input::sent_size;
use super::latency::Latency;
use super::metas;
use super::output::{Handle, Output, leaving};
use super::release;
use super::settings::Settings;
use super::stream_lock::StreamUnlocked;
use crate::picture::Picture;
use crate::session::{Format, Request, SIGN_OF_LIFE, Session, SessionSettings, Submission};
use crate::virtgpu::Resources;

pub(super) static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "vsockenc",
        gst::DebugColorFlags::empty(),
        Some("H.264 encoding on a host"),
    )
});

/// Frames per second where the caps give none.
const DEFAULT_FRAMERATE: gst::Fraction = gst::Fraction::new_raw(60, 1);

/// `max-in-flight` at most.
pub(super) const MOST_IN_FLIGHT: u16 = 16;

/// Below this, a bitrate was probably meant in kbit/s (L28).
const LOW_BITRATE: u32 = 100_000;
/// Of pictures without a PTS, the host is told one so far from the last one's, in nanoseconds: more than a host
/// may be off by.
const NO_PTS_STEP_NS: i64 = 1_000_000;

/// What lives from `start()` to `stop()`.
pub(super) struct Streaming {
    session: Arc<Session>,
    /// The streaming thread's waiter, taken out while it waits.
    pub waiter: Option<Waiter>,
    pub input: Option<Input>,
    /// Who tells the resources behind DMA-BUFs; `None` = all pictures go as pixels.
    pub resources: Option<Arc<dyn Resources>>,
}

#[derive(Clone)]
pub(super) struct Input {
    pub state: gst_video::VideoCodecState<'static, gst_video::video_codec_state::Readable>,
    pub info: gst_video::VideoInfo,
    format: Format,
}

/// The implementation of [`super::VsockEnc`].
#[derive(Default)]
pub struct VsockEnc {
    pub(super) settings: Mutex<Settings>,
    pub(super) streaming: Mutex<Option<Streaming>>,
    pub(super) output: Mutex<Output>,
    /// Ends the streaming thread's waits; apart from the rest, so that it never waits itself.
    /// `None` where they are to stay ended, or there are none.
    pub(super) waker: Mutex<Option<Waker>>,
    /// Instead of a device, in tests.
    #[cfg(test)]
    pub(super) fake_resources: Mutex<Option<Arc<dyn Resources>>>,
}

/// None of these locks is held where something could panic and leave a half-made change.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[glib::object_subclass]
impl ObjectSubclass for VsockEnc {
    const NAME: &'static str = "GstVsockEnc";
    type Type = super::VsockEnc;
    type ParentType = gst_video::VideoEncoder;

    fn class_init(class: &mut Self::Class) {
        metas::leave_crops_behind(class.upcast_ref_mut());
        release::refuse_other_caps(class.upcast_ref_mut());
    }
}

impl ObjectImpl for VsockEnc {
    fn properties() -> &'static [glib::ParamSpec] {
        static PROPERTIES: LazyLock<Vec<glib::ParamSpec>> = LazyLock::new(Settings::properties);
        &PROPERTIES
    }

    fn set_property(&self, _id: usize, value: &glib::Value, pspec: &glib::ParamSpec) {
        lock(&self.settings).set(value, pspec);
        match pspec.name() {
            "bitrate" => self.change_bitrate(),
            "max-in-flight" => self.report_latency(),
            _ => {}
        }
    }

    fn property(&self, _id: usize, pspec: &glib::ParamSpec) -> glib::Value {
        match pspec.name() {
            "stats" => self.stats().to_value(),
            _ => lock(&self.settings).get(pspec),
        }
    }
}

impl GstObjectImpl for VsockEnc {}

impl ElementImpl for VsockEnc {
    fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
        static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
            gst::subclass::ElementMetadata::new(
                "H.264 encoder on the host",
                "Codec/Encoder/Video",
                "Encodes video on the host of this VM or container, over AF_VSOCK, TCP or a unix \
                 socket",
                "The gst-plugins-zerocopy authors",
            )
        });
        Some(&METADATA)
    }

    fn pad_templates() -> &'static [gst::PadTemplate] {
        static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(|| {
            let sink = formats::sink_caps(false);
            let src = gst::Caps::builder("video/x-h264")
                .field("stream-format", "byte-stream")
                .field("alignment", "au")
                .build();
            let template = |name, direction, caps| {
                gst::PadTemplate::new(name, direction, gst::PadPresence::Always, caps)
                    .expect("the template is valid")
            };
            vec![
                template("sink", gst::PadDirection::Sink, &sink),
                template("src", gst::PadDirection::Src, &src),
            ]
        });
        &TEMPLATES
    }

    fn change_state(
        &self,
        transition: gst::StateChange,
    ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
        if transition == gst::StateChange::PausedToReady {
            // The base class deactivates the pads first, and that waits for the streaming thread.
            self.cancel_for_good();
        }
        self.parent_change_state(transition)
    }
}

impl VideoEncoderImpl for VsockEnc {
    fn start(&self) -> Result<(), gst::ErrorMessage> {
        let settings = lock(&self.settings).clone();
        if settings.transfer == Transfer::Fd {
            return Err(gst::error_msg!(
                gst::ResourceError::Settings,
                ["transfer=fd is not built yet: use auto, resource-id or pixels"]
            ));
        }
        settings
            .connection
            .check()
            .map_err(|reason| gst::error_msg!(gst::ResourceError::Settings, ["{reason}"]))?;
        let resources = self.find_resources(&settings)?;
        let failed = |error: std::io::Error| {
            gst::error_msg!(
                gst::ResourceError::Failed,
                ["cannot start a session: {error}"]
            )
        };
        let waiter = Waiter::new().map_err(failed)?;
        let address = settings.connection.address();
        gst::info!(
            CAT,
            imp = self,
            "encoding on {address}, bitrate {} bit/s ({} kbit/s)",
            settings.bitrate,
            settings.bitrate / 1000
        );
        warn_of_low_bitrate(self, settings.bitrate);
        let output = Output::default();
        let counts = output.counts.clone();
        *lock(&self.output) = output;
        *lock(&self.waker) = Some(waiter.waker());
        let session = Session::start(
            SessionSettings {
                connection: settings.connection,
                keyframe_interval: settings.keyframe_interval,
                transfer: settings.transfer,
                // The property may change while playing.
                max_in_flight: MOST_IN_FLIGHT,
                sign_of_life: SIGN_OF_LIFE,
                counts,
            },
            waiter.waker(),
            Handle::new(&self.obj(), address),
        )
        .map_err(failed)?;
        *lock(&self.streaming) = Some(Streaming {
            session: Arc::new(session),
            waiter: Some(waiter),
            input: None,
            resources,
        });
        Ok(())
    }

    fn stop(&self) -> Result<(), gst::ErrorMessage> {
        self.cancel_for_good();
        // Dropped with no lock held: it joins a thread that may be calling us.
        let streaming = lock(&self.streaming).take();
        drop(streaming);
        Ok(())
    }

    fn caps(&self, filter: Option<&gst::Caps>) -> gst::Caps {
        let caps = formats::sink_caps(self.prefers_dmabufs());
        self.obj().proxy_getcaps(Some(&caps), filter)
    }

    fn set_format(
        &self,
        state: &gst_video::VideoCodecState<'static, gst_video::video_codec_state::Readable>,
    ) -> Result<(), gst::LoggableError> {
        let info = state.caps().and_then(formats::video_info);
        let Some(info) = info else {
            return Err(gst::loggable_error!(
                CAT,
                "{:?} cannot be sent",
                state.caps()
            ));
        };
        let refuse = |text: String| {
            gst::element_imp_error!(self, gst::StreamError::Format, ("{text}"));
            gst::loggable_error!(CAT, "{text}")
        };
        formats::check_progressive(&info).map_err(refuse)?;
        // What is under way belongs to the format before. Where a flush or a state change ends
        // this wait, or the next one, that is no error: upstream would take it for one.
        self.drain();
        let (num, den) = framerate(state);
        let (width, height) = sent_size(&info);
        let config = Config {
            width,
            height,
            bitrate: lock(&self.settings).bitrate,
            framerate_num: num,
            framerate_den: den,
            profile: self.wanted_profile(),
            level: level(width, height, num, den),
            realtime: true,
        };
        let pixels = self.pixels_of(&info);
        let mut format = Format { config, pixels };
        self.check_limits(&info, &format).map_err(refuse)?;
        let duration = gst::ClockTime::SECOND
            .mul_div_ceil(den.into(), num.into())
            .unwrap_or(gst::ClockTime::ZERO);
        lock(&self.output).input_changed(Latency::new(duration.into()));
        self.report_latency();
        if let Some(streaming) = &mut *lock(&self.streaming) {
            // The host was waited for since it was read, and change_bitrate() found no input.
            format.config.bitrate = lock(&self.settings).bitrate;
            streaming.session.configure(format);
            streaming.input = Some(Input {
                info,
                state: state.clone(),
                format,
            });
        }
        gst::debug!(CAT, imp = self, "{:?}", format.config);
        Ok(())
    }

    fn handle_frame(
        &self,
        frame: gst_video::VideoCodecFrame,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let number = frame.system_frame_number();
        let flags = frame.flags();
        let is_forced = flags.contains(gst_video::VideoCodecFrameFlags::FORCE_KEYFRAME);
        let flow = lock(&self.output).take_flow();
        let result = match flow {
            Ok(_) => match self.submit(frame) {
                // A flush or a state change, in which the base class forgets all frames.
                Err(gst::FlowError::Flushing) => return Err(gst::FlowError::Flushing),
                result => result,
            },
            Err(error) => {
                drop(frame);
                Err(error)
            }
        };
        if let Err(error) = result {
            // It keeps this one until it is finished, whatever is said of it here.
            self.pass_over(number, is_forced, &format!("{error}"))?;
        }
        result
    }

    fn finish(&self) -> Result<gst::FlowSuccess, gst::FlowError> {
        match self.drain() {
            Submission::Cancelled => Err(gst::FlowError::Flushing),
            Submission::Failed => Err(gst::FlowError::Error),
            Submission::CannotWait(reason) => Err(self.cannot_wait(reason)),
            Submission::Accepted | Submission::NoHost => lock(&self.output).take_flow(),
        }
    }

    fn flush(&self) -> bool {
        // The base class forgets the open frames.
        if let Some(streaming) = &*lock(&self.streaming) {
            streaming.session.flush();
        }
        lock(&self.output).flush();
        true
    }

    fn sink_event(&self, event: gst::Event) -> bool {
        match event.view() {
            gst::EventView::FlushStart(_) => self.cancel(),
            gst::EventView::FlushStop(_) => {
                if let Some(waker) = &*lock(&self.waker) {
                    waker.reset();
                }
                let obj = self.obj();
                // Free soon: FLUSH_START made downstream let go.
                let _leaving = leaving(&obj);
                return self.parent_sink_event(event);
            }
            _ => {}
        }
        self.parent_sink_event(event)
    }

    fn propose_allocation(
        &self,
        query: &mut gst::query::Allocation,
    ) -> Result<(), gst::LoggableError> {
        // Those in flight, and the one that waits to be.
        let buffers = lock(&self.settings).max_in_flight + 1;
        // The base class would offer memory for DMA-BUFs too, and call a query without caps an
        // error.
        formats::propose_allocation(query, buffers);
        Ok(())
    }
}

impl VsockEnc {
    /// Ends what waits, until a flush ends.
    fn cancel(&self) {
        if let Some(waker) = &*lock(&self.waker) {
            waker.cancel();
        }
    }

    /// Ends what waits until the element is started again: a flush that ends now must not undo it.
    fn cancel_for_good(&self) {
        if let Some(waker) = lock(&self.waker).take() {
            waker.cancel();
        }
    }

    /// Runs something that may wait for the session, on the streaming thread, with neither a lock
    /// of ours nor the stream lock held.
    /// `None` where there is no session.
    pub(super) fn wait<T>(&self, work: impl FnOnce(&Session, &mut Waiter) -> T) -> Option<T> {
        let (session, mut waiter) = {
            let mut streaming = lock(&self.streaming);
            let streaming = streaming.as_mut()?;
            (streaming.session.clone(), streaming.waiter.take()?)
        };
        let result = {
            let obj = self.obj();
            let _unlocked = StreamUnlocked::new(obj.upcast_ref());
            work(&session, &mut waiter)
        };
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.waiter = Some(waiter);
        }
        Some(result)
    }

    /// Finishes a frame that is not sent, on the streaming thread. With it leave the events of all
    /// frames up to it, which must not overtake the access units of those under way. A keyframe that it
    /// was to be is asked for with the next one: the base class has asked, and does not ask again.
    fn pass_over(
        &self,
        number: u32,
        force_keyframe: bool,
        reason: &str,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        lock(&self.output).keyframe_due |= force_keyframe;
        // These frames hold the stream lock.
        let has_events = self.obj().frames().iter().any(release::has_events);
        if has_events {
            match self.drain() {
                Submission::Cancelled => return Err(gst::FlowError::Flushing),
                // All is at its end, and may not have left yet.
                Submission::Failed | Submission::CannotWait(_) => return Ok(gst::FlowSuccess::Ok),
                Submission::Accepted | Submission::NoHost => {}
            }
        }
        self.finish_without_output(number, reason);
        Ok(gst::FlowSuccess::Ok)
    }

    /// Gives a frame to the session.
    fn submit(
        &self,
        frame: gst_video::VideoCodecFrame,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let number = frame.system_frame_number();
        let buffer = frame.input_buffer_owned().ok_or(gst::FlowError::Error)?;
        let nanos = |time: gst::ClockTime| time.nseconds() as i64;
        // Legacy hosts say by the PTS which picture they answer (quirk 3 of docs/protocol.md).
        let pts = frame
            .pts()
            .map_or_else(|| i64::from(number) * NO_PTS_STEP_NS, nanos);
        let duration = frame.duration().map_or(0, nanos);
        let flags = frame.flags();
        let linked = self.obj().src_pad().is_linked();
        let force_keyframe = lock(&self.output).needs_keyframe(linked)
            || flags.contains(gst_video::VideoCodecFrameFlags::FORCE_KEYFRAME);
        let is_late = self.obj().is_qos_enabled() && self.obj().max_encode_time(&frame) < 0;
        // It holds the stream lock (L24); its number finds it again.
        drop(frame);
        if is_late && !force_keyframe {
            // Raw frames may go, encoded ones may not (L26).
            return self.pass_over(number, false, "it is too late for the sink (qos)");
        }

        let (info, resources) = lock(&self.streaming)
            .as_ref()
            .and_then(|streaming| {
                let input = streaming.input.as_ref()?;
                Some((input.info.clone(), streaming.resources.clone()))
            })
            .ok_or(gst::FlowError::NotNegotiated)?;
        let picture = Picture::new(buffer, &info).map_err(|reason| {
            gst::element_imp_error!(
                self,
                gst::StreamError::Encode,
                ["a buffer cannot be read as a frame: {reason}"]
            );
            gst::FlowError::Error
        })?;
        if !self.wait_for_writers(&picture)? {
            return self.pass_over(number, force_keyframe, "what draws it is not done");
        }
        let request = Request {
            frame: number,
            pts,
            duration,
            force_keyframe,
            resource: self.resource(&picture, resources.as_deref())?,
            picture,
        };
        let max_in_flight = lock(&self.settings).max_in_flight;
        let submission =
            self.wait(|session, waiter| session.submit(waiter, max_in_flight, request));
        match submission.unwrap_or(Submission::Cancelled) {
            Submission::Accepted => {
                lock(&self.output).keyframe_due = false;
                Ok(gst::FlowSuccess::Ok)
            }
            Submission::NoHost => self.pass_over(number, force_keyframe, "no host"),
            Submission::Cancelled => Err(gst::FlowError::Flushing),
            Submission::Failed => Err(gst::FlowError::Error),
            Submission::CannotWait(reason) => Err(self.cannot_wait(reason)),
        }
    }

    /// Waits, on the streaming thread, until every frame is finished.
    fn drain(&self) -> Submission {
        if lock(&self.streaming)
            .as_ref()
            .is_none_or(|streaming| streaming.input.is_none())
        {
            return Submission::Accepted;
        }
        self.wait(Session::drain).unwrap_or(Submission::Cancelled)
    }

    fn change_bitrate(&self) {
        let mut streaming = lock(&self.streaming);
        // Read under that lock: of two changes at once, the host is told the last one last.
        let bitrate = lock(&self.settings).bitrate;
        if let Some(streaming) = &mut *streaming
            && let Some(input) = &mut streaming.input
        {
            input.format.config.bitrate = bitrate;
            streaming.session.configure(input.format);
        }
        drop(streaming);
        gst::info!(CAT, imp = self, "bitrate is now {bitrate} bit/s");
        warn_of_low_bitrate(self, bitrate);
    }

    /// The profile that downstream asks for, as `profile_idc`; main where it does not care.
    fn wanted_profile(&self) -> u8 {
        let caps = self.obj().src_pad().peer_query_caps(None);
        let wanted = caps.iter().find_map(|structure| {
            let profile = structure.value("profile").ok()?;
            profile.get::<String>().ok().or_else(|| {
                profile
                    .get::<gst::List>()
                    .ok()?
                    .first()?
                    .get::<String>()
                    .ok()
            })
        });
        match wanted.as_deref() {
            Some("constrained-baseline" | "baseline") => 66,
            Some(profile) if profile.contains("high") => 100,
            _ => 77,
        }
    }

    fn stats(&self) -> gst::Structure {
        let in_flight = lock(&self.streaming)
            .as_ref()
            .map_or(0, |streaming| streaming.session.in_flight());
        let (frames, dropped, counts) = {
            let output = lock(&self.output);
            (output.frames, output.dropped, lock(&output.counts).clone())
        };
        let (p50, p99) = counts.reply.p50_p99_us();
        gst::Structure::builder("vsockenc-stats")
            .field("frames", frames)
            .field("bytes-sent", counts.bytes_sent)
            .field("bytes-received", counts.bytes_received)
            .field("dropped", dropped)
            .field("errors", counts.errors)
            .field("reconnects", counts.reconnects)
            .field("transfer", counts.way.name())
            .field("in-flight", u64::from(in_flight))
            .field("pixel-bytes", counts.pixel_bytes)
            .field("resource-frames", counts.resource_frames)
            .field("fd-frames", 0u64)
            .field("reply-p50-us", p50)
            .field("reply-p99-us", p99)
            .field("unmatched", counts.unmatched)
            .build()
    }
}

fn warn_of_low_bitrate(imp: &VsockEnc, bitrate: u32) {
    if bitrate < LOW_BITRATE {
        gst::warning!(
            CAT,
            imp = imp,
            "bitrate is {bitrate} bit/s, which is very low: the property is in bit/s, not kbit/s"
        );
    }
}

/// `max-framerate` of the caps, else `framerate`, else 60/1.
fn framerate(
    state: &gst_video::VideoCodecState<'static, gst_video::video_codec_state::Readable>,
) -> (u32, u32) {
    let caps = state.caps();
    let field = |name| {
        let caps = caps.as_ref()?;
        caps.structure(0)?
            .get::<gst::Fraction>(name)
            .ok()
            .filter(|rate| rate.numer() > 0)
    };
    let rate = field("max-framerate")
        .or_else(|| field("framerate"))
        .unwrap_or(DEFAULT_FRAMERATE);
    (rate.numer().unsigned_abs(), rate.denom().unsigned_abs())
}

/// The lowest H.264 level, times ten, whose frame size and macroblock rate (ITU-T H.264, table
/// A-1) suffice.
fn level(width: u32, height: u32, framerate_num: u32, framerate_den: u32) -> u8 {
    const LEVELS: [(u8, u64, u64); 8] = [
        (31, 3_600, 108_000),
        (32, 5_120, 216_000),
        (40, 8_192, 245_760),
        (42, 8_704, 522_240),
        (50, 22_080, 589_824),
        (51, 36_864, 983_040),
        (52, 36_864, 2_073_600),
        (60, 139_264, 4_177_920),
    ];
    let size = u64::from(width.div_ceil(16)) * u64::from(height.div_ceil(16));
    let rate = size * u64::from(framerate_num) / u64::from(framerate_den.max(1));
    LEVELS
        .iter()
        .find(|(_, most, fastest)| size <= *most && rate <= *fastest)
        .map_or(62, |(level, ..)| *level)
}

#[cfg(test)]
mod tests {
    use super::level;

    #[test]
    fn the_lowest_level_that_suffices() {
        assert_eq!(level(1280, 720, 30, 1), 31);
        assert_eq!(level(1280, 720, 60, 1), 32);
        assert_eq!(level(1920, 1080, 30, 1), 40);
        assert_eq!(level(1920, 1080, 60, 1), 42);
        assert_eq!(level(3840, 2160, 60, 1), 52);
        assert_eq!(level(8192, 8192, 240, 1), 62);
    }
}
