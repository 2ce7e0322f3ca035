// SPDX-License-Identifier: MIT OR Apache-2.0

//! What comes back from the session: frames to finish, on a thread that may wait for downstream;
//! things to tell, on the session's.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_video::prelude::*;
use helix_protocol::message::{Capabilities, Config};
use helix_protocol::{Address, Agreement};
use zerocopy_plugin_common::{ConnectionState, H264Caps, accepted_downstream, connection_message};

use super::imp::{CAT, VsockEnc, lock};
use super::latency::Latency;
use super::release;
use crate::session::{AccessUnit, Client, Counts, REFUSALS, Way};

/// A bitrate that differs by more than a tenth is worth a warning (L28).
const NOTABLE: u32 = 10;

/// What the session's threads leave for the others.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each says one thing, and all combinations occur"
)]
#[derive(Default)]
pub(super) struct Output {
    caps: H264Caps,
    /// What those of the stream were last.
    stream_caps: Option<gst::Caps>,
    /// Downstream is to be told them again, with what the input's new caps say.
    caps_due: bool,
    /// What downstream said, for the next frame.
    flow: Option<gst::FlowError>,
    /// Frames with events that were dropped before there were caps; the base class still holds
    /// them.
    unfinished: Vec<u32>,
    /// The next access unit that leaves follows the one before it: not the first one, nor after a
    /// flush or a loss, nor where downstream did not take that one. Else it is a keyframe, and marked:
    /// the base class marks only the picture it got first, which may be lost.
    continues: bool,
    /// Downstream did not take what the next ones refer to. A keyframe is to be asked for once it may.
    refused: bool,
    /// Access units that came while there were no caps.
    useless: u32,
    /// A picture that was to be a keyframe was not sent: the next one is to be one.
    pub keyframe_due: bool,
    /// The host said that it resolves resource ids.
    pub resolves: bool,
    pub frames: u64,
    pub dropped: u64,
    /// What the session counts. It stays, as all of this, until the element is started again.
    pub counts: Arc<Mutex<Counts>>,
    latency: Latency,
    /// Frames that the host takes at once; none while that is not known.
    host_in_flight: Option<u32>,
}

impl Output {
    /// The input has other caps from now on.
    pub fn input_changed(&mut self, latency: Latency) {
        self.latency = latency;
        self.caps_due = true;
    }

    /// The caps to be set before this access unit, if any.
    fn caps_before(&mut self, is_keyframe: bool, access_unit: &[u8]) -> Option<gst::Caps> {
        if is_keyframe && let Some(caps) = self.caps.update(access_unit) {
            self.stream_caps = Some(caps);
            self.caps_due = true;
        }
        let due = self.stream_caps.is_some() && std::mem::take(&mut self.caps_due);
        due.then(|| self.stream_caps.clone()).flatten()
    }

    /// Whether a keyframe is to be asked for that nobody else asks for: the last one was of no use, or
    /// was not sent, or downstream, if it is `linked` again, lacks what comes before.
    pub fn needs_keyframe(&mut self, linked: bool) -> bool {
        self.keyframe_due |= linked && std::mem::take(&mut self.refused);
        self.keyframe_due || (self.stream_caps.is_none() && self.useless > 0)
    }

    /// What upstream is to be told. An element that is not there, or flushing on its own, may be
    /// replaced: that is said once and tried again.
    pub fn take_flow(&mut self) -> Result<gst::FlowSuccess, gst::FlowError> {
        use gst::FlowError::{Flushing, NotLinked};
        let flow = self.flow;
        self.flow
            .take_if(|error| matches!(error, NotLinked | Flushing));
        flow.map_or(Ok(gst::FlowSuccess::Ok), Err)
    }

    /// Forgets what belongs to frames that were flushed.
    pub fn flush(&mut self) {
        self.flow = None;
        self.unfinished.clear();
        self.continues = false;
        // What comes after a flush begins with a keyframe anyhow.
        self.refused = false;
    }
}

/// Carries what the session says to the element, if it is still there.
pub(super) struct Handle {
    element: glib::WeakRef<super::VsockEnc>,
    address: Address,
}

impl Handle {
    pub fn new(element: &super::VsockEnc, address: Address) -> Self {
        Self {
            element: element.downgrade(),
            address,
        }
    }

    fn post(&self, state: ConnectionState, peer: &str, way: Option<Way>, reason: &str) {
        if let Some(element) = self.element.upgrade() {
            let way = way.map_or("", Way::name);
            let message = connection_message(&element, state, &self.address, peer, way, reason);
            // Fails where there is no bus: then nobody wants to know.
            let _ = element.post_message(message);
        }
    }
}

impl Client for Handle {
    fn connected(&self, peer: &str, host: &Agreement, way: Option<Way>) {
        if let Some(element) = self.element.upgrade() {
            gst::info!(
                CAT,
                obj = element,
                "connected to {} ({peer}), {host:?}",
                self.address
            );
            let imp = element.imp();
            imp.set_resolves(host.can(Capabilities::RESOURCE_IDS));
            lock(&imp.output).host_in_flight = Some(host.max_in_flight.into());
            imp.report_latency();
        }
        self.post(ConnectionState::Connected, peer, way, "");
    }

    fn configured(&self, given: &Config, in_force: &Config) {
        let Some(element) = self.element.upgrade() else {
            return;
        };
        gst::info!(CAT, obj = element, "the host has in force: {in_force:?}");
        let (wanted, got) = (given.bitrate, in_force.bitrate);
        // 0 = the host does not know yet.
        if got != 0 && wanted.abs_diff(got) > wanted / NOTABLE {
            gst::warning!(
                CAT,
                obj = element,
                "the host encodes with {got} bit/s, not with the {wanted} bit/s of `bitrate`"
            );
        }
    }

    fn transfer(&self, way: Way, reason: &str) {
        if let Some(element) = self.element.upgrade() {
            let why = if reason.is_empty() { "" } else { ": " };
            gst::info!(
                CAT,
                obj = element,
                "transfer is {} now{why}{reason}",
                way.name()
            );
        }
        self.post(ConnectionState::Connected, "", Some(way), reason);
    }

    fn encoded(&self, frame: u32, access_unit: AccessUnit) {
        if let Some(element) = self.element.upgrade() {
            element.imp().see_latency(access_unit.took);
            let _leaving = leaving(&element);
            element.imp().finish_with_output(frame, access_unit);
        }
    }

    fn dropped(&self, frame: u32, reason: &str) {
        if let Some(element) = self.element.upgrade() {
            gst::warning!(CAT, obj = element, "frame {frame} is lost: {reason}");
            let _leaving = leaving(&element);
            element.imp().finish_without_output(frame, reason);
        }
    }

    fn refused(&self, reason: &str) {
        if let Some(element) = self.element.upgrade() {
            gst::element_warning!(element, gst::StreamError::Encode, ("{reason}"));
        }
    }

    fn reconnecting(&self, reason: &str) {
        if let Some(element) = self.element.upgrade() {
            gst::warning!(CAT, obj = element, "{reason}; calling again");
        }
        self.post(ConnectionState::Reconnecting, "", None, reason);
    }

    fn failed(&self, reason: &str) {
        self.post(ConnectionState::Lost, "", None, reason);
        if let Some(element) = self.element.upgrade() {
            gst::element_error!(element, gst::ResourceError::OpenReadWrite, ("{reason}"));
        }
    }
}

impl VsockEnc {
    /// Finishes a frame that has no access unit.
    pub(super) fn finish_without_output(&self, number: u32, reason: &str) {
        gst::debug!(CAT, imp = self, "frame {number} is dropped: {reason}");
        let obj = self.obj();
        let Some(mut frame) = obj.frame(number as i32) else {
            return;
        };
        lock(&self.output).dropped += 1;
        // Not where downstream has refused them, or of `without_caps`.
        let state = obj.output_state();
        let has_caps = state.is_some_and(|state| state.info().width() > 0);
        if has_caps {
            // Downstream has no part in a frame that does not come.
            let _ = obj.finish_frame(frame);
        } else if release::has_events(&frame) {
            // They wait for the caps. What is large in it need not.
            release::input(&mut frame);
            lock(&self.output).unfinished.push(number);
        } else {
            release::without_caps(obj.upcast_ref(), frame);
        }
    }

    /// Finishes a frame with its access unit, with new caps before it where the stream changed.
    fn finish_with_output(&self, number: u32, access_unit: AccessUnit) {
        let AccessUnit {
            response,
            data,
            after_loss,
            forced,
            ..
        } = access_unit;
        let obj = self.obj();
        let linked = obj.src_pad().is_linked();
        // Kept until one really leaves.
        lock(&self.output).continues &= !after_loss;
        // None after a flush. Holds the stream lock.
        let Some(mut frame) = obj.frame(number as i32) else {
            return;
        };
        let continues;
        let caps = {
            let mut output = lock(&self.output);
            let caps = output.caps_before(response.is_keyframe, &data);
            let has_caps = output.stream_caps.is_some();
            if !has_caps || (!output.continues && !response.is_keyframe) {
                // Asked for again, unless it was on its way before downstream was seen not to take what
                // it refers to.
                output.refused |= forced;
                output.useless += u32::from(!has_caps);
                let is_hopeless = !has_caps && output.useless == REFUSALS;
                drop(output);
                drop(frame);
                self.finish_without_output(number, "no keyframe with parameter sets came yet");
                if is_hopeless {
                    self.see_useless();
                } else if has_caps && !linked {
                    self.see_flow(gst::FlowError::NotLinked);
                }
                return;
            }
            output.refused = false;
            output.frames += 1;
            continues = std::mem::replace(&mut output.continues, true);
            caps
        };
        if let Some(caps) = caps
            && let Err(error) = self.set_output_caps(caps)
        {
            drop(frame);
            self.finish_without_output(number, "its caps are not taken");
            return self.see_flow(error);
        }
        self.finish_unfinished();
        if response.is_keyframe {
            frame.set_flags(gst_video::VideoCodecFrameFlags::SYNC_POINT);
        }
        // The hosts do not reorder, and some say nonsense here.
        frame.set_dts(frame.pts());
        let mut buffer = gst::Buffer::from_mut_slice(data);
        if !continues {
            buffer.make_mut().set_flags(gst::BufferFlags::DISCONT);
        }
        frame.set_output_buffer(buffer);
        gst::trace!(CAT, imp = self, "frame {number} is encoded");
        if let Err(error) = obj.finish_frame(frame) {
            self.see_flow(error);
        }
    }

    /// Reports more latency where a host takes longer than was reported.
    fn see_latency(&self, took: Duration) {
        if lock(&self.output).latency.took(took) {
            self.report_latency();
        }
    }

    /// Tells the base class what the latency is now; it posts a latency message where that is
    /// something else than before.
    pub(super) fn report_latency(&self) {
        let mut told = None;
        loop {
            let in_flight = lock(&self.settings).max_in_flight;
            let now = {
                let output = lock(&self.output);
                let in_flight = in_flight.min(output.host_in_flight.unwrap_or(in_flight));
                let latency = &output.latency;
                (latency.reported(), latency.most(in_flight))
            };
            // Another thread may have told what was true before.
            if told.replace(now) == Some(now) {
                return;
            }
            let [least, most] = [now.0, now.1]
                .map(|time| gst::ClockTime::try_from(time).unwrap_or(gst::ClockTime::MAX));
            gst::info!(CAT, imp = self, "latency is {least} now, at most {most}");
            self.obj().set_latency(least, most);
        }
    }

    /// Finishes the frames that were dropped before there were caps.
    fn finish_unfinished(&self) {
        let unfinished = std::mem::take(&mut lock(&self.output).unfinished);
        for number in unfinished {
            if let Some(frame) = self.obj().frame(number as i32) {
                // What downstream thinks of it, it says of the next one, too.
                let _ = self.obj().finish_frame(frame);
            }
        }
    }

    /// Downstream takes no more: upstream learns it with its next frame, or at the end; whoever
    /// watches the bus, now, if it is an error on its own.
    fn see_flow(&self, error: gst::FlowError) {
        use gst::FlowError::{Eos, Flushing, NotLinked};
        gst::debug!(CAT, imp = self, "downstream says {error:?}");
        let is_news = {
            let mut output = lock(&self.output);
            output.continues = false;
            output.refused = true;
            // An error stays one.
            let before = output.flow;
            let is_news = before.is_none_or(|before| matches!(before, Flushing | NotLinked));
            if is_news {
                output.flow = Some(error);
            }
            is_news
        };
        if is_news && !matches!(error, Flushing | Eos | NotLinked) {
            gst::element_imp_error!(
                self,
                gst::StreamError::Failed,
                ("downstream of the encoder takes no more: {error}")
            );
        }
    }

    /// The host sends no stream that could be described, however often it is asked.
    fn see_useless(&self) {
        lock(&self.output).flow = Some(gst::FlowError::Error);
        gst::element_imp_error!(
            self,
            gst::StreamError::Encode,
            ("the host has sent {REFUSALS} access units, and none was a keyframe with parameter \
                 sets (SPS and PPS) that can be read: nothing can be decoded without them. Does its \
                 encoder put them before each keyframe?")
        );
    }

    fn set_output_caps(&self, caps: gst::Caps) -> Result<(), gst::FlowError> {
        let obj = self.obj();
        let input = lock(&self.streaming)
            .as_ref()
            .and_then(|streaming| streaming.input.clone())
            .ok_or(gst::FlowError::Flushing)?;
        gst::info!(CAT, imp = self, "the host sends {caps}");
        // negotiate() does not fail where downstream refuses: its event is kept for later.
        let caps = accepted_downstream(obj.src_pad(), caps).map_err(|reason| {
            gst::element_imp_error!(self, gst::CoreError::Negotiation, ("{reason}"));
            lock(&self.output).flow = Some(gst::FlowError::NotNegotiated);
            gst::FlowError::NotNegotiated
        })?;
        let structure = caps.structure(0).ok_or(gst::FlowError::NotNegotiated)?;
        let side = |name| structure.get::<i32>(name).map(i32::unsigned_abs);
        let (Ok(width), Ok(height)) = (side("width"), side("height")) else {
            return Err(gst::FlowError::NotNegotiated);
        };
        let mut state = obj.set_output_state(caps, Some(&input.state))?;
        if let Ok(info) = gst_video::VideoInfo::builder(input.info.format(), width, height)
            .fps(input.info.fps())
            .par(input.info.par())
            .colorimetry(&input.info.colorimetry())
            .build()
        {
            state.set_info(info);
        }
        obj.negotiate(state)
    }
}

/// Held from the look for a frame to what downstream said of it, so that a flush comes before or
/// after, not between: it would let the frame out that it forgets, or miss downstream's answer. It
/// is the lock that a task of the pad would hold, and which deactivating the pad waits for. Not the
/// encoder's stream lock: that one has to be free while downstream is blocked, for frames to come.
/// Whoever takes both takes this one first.
pub(super) fn leaving(element: &super::VsockEnc) -> gst::StreamLock<'_> {
    element.src_pad().stream_lock()
}
