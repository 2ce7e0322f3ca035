// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pushed frames as buffers: from which frame on, with which caps and times.

use std::sync::LazyLock;
use std::sync::atomic::Ordering;

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;
use helix_protocol::h264::{self, StreamInfo};
use zerocopy_plugin_common::{H264Caps, accepted_downstream};

use super::imp::{CAT, ScanoutSrc, lock};
use super::low_delay;
use crate::subscription::Pushed;
use crate::timeline::{Arrival, HostClock, Latency, Timeline, monotonic_now};

/// Caps of the meta that carries the host's timestamp.
static HOST_TIMESTAMP: LazyLock<gst::Caps> =
    LazyLock::new(|| gst::Caps::new_empty_simple("timestamp/x-helix-host"));

/// Whether a decoder can do something with a delta.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Not before a keyframe.
    Waiting {
        /// One was asked for.
        asked: bool,
        /// It was said that a keyframe is none.
        warned: bool,
    },
    /// It can.
    Flowing,
}

impl Default for Stage {
    fn default() -> Self {
        Self::Waiting {
            asked: false,
            warned: false,
        }
    }
}

/// What is known of the stream so far.
#[derive(Default)]
pub(super) struct Output {
    low_delay_vui: bool,
    caps: H264Caps,
    stage: Stage,
    /// Something is missing before the next frame.
    discont: bool,
    timeline: Timeline,
    latency: Latency,
}

impl Output {
    /// The stream begins with the first keyframe.
    pub fn new(low_delay_vui: bool) -> Self {
        Self {
            low_delay_vui,
            discont: true,
            ..Self::default()
        }
    }

    /// A connection whose host has this clock begins.
    pub fn connected(&mut self, clock: HostClock) {
        self.timeline.connected(clock);
    }

    /// The stream is interrupted, and goes on with a keyframe.
    pub fn lost(&mut self) {
        self.stage = Stage::default();
        self.discont = true;
    }
}

impl ScanoutSrc {
    /// The access unit as a buffer, unless nothing could be decoded from it.
    pub(super) fn buffer(
        &self,
        output: &mut Output,
        pushed: Pushed,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let Pushed { response, data } = pushed;
        if data.is_empty() {
            return Ok(None);
        }
        if response.is_keyframe {
            self.begin(output, &data)?;
        }
        if let Stage::Waiting { asked, .. } = &mut output.stage {
            output.discont = true;
            lock(&self.figures).dropped += 1;
            if !std::mem::replace(asked, true) {
                gst::debug!(CAT, imp = self, "dropping frames until a keyframe comes");
                self.wishes.keyframe.store(true, Ordering::Release);
            }
            return Ok(None);
        }
        {
            let mut figures = lock(&self.figures);
            figures.frames += 1;
            figures.keyframes += u64::from(response.is_keyframe);
        }
        let pts = self.stamp(output, response.pts);
        let patches = if response.is_keyframe && output.low_delay_vui {
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
        if std::mem::take(&mut output.discont) {
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

    /// Finds out whether decoding can begin, or go on, with this keyframe, and sets the caps that
    /// it brings.
    fn begin(&self, output: &mut Output, keyframe: &[u8]) -> Result<(), gst::FlowError> {
        let waiting = std::mem::replace(&mut output.stage, Stage::Flowing);
        if let Some(caps) = output.caps.update(keyframe) {
            gst::info!(CAT, imp = self, "the host sends {caps}");
            let obj = self.obj();
            let caps = accepted_downstream(obj.src_pad(), caps).map_err(|reason| {
                gst::element_imp_error!(self, gst::CoreError::Negotiation, ("{reason}"));
                gst::FlowError::NotNegotiated
            })?;
            return obj.set_caps(&caps).map_err(|error| {
                gst::debug!(CAT, imp = self, "{error}");
                gst::FlowError::NotNegotiated
            });
        }
        let what = match (h264::find_sps(keyframe), waiting) {
            (Some(sps), _) if StreamInfo::from_sps(sps).is_some() => return Ok(()),
            // A decoder that has one already can go on.
            (None, Stage::Flowing) => return Ok(()),
            (Some(_), _) => "a sequence parameter set that cannot be read",
            (None, _) => "no sequence parameter set",
        };
        let (asked, warned) = match waiting {
            Stage::Waiting { asked, warned } => (asked, warned),
            Stage::Flowing => (false, false),
        };
        if !warned {
            gst::warning!(
                CAT,
                imp = self,
                "dropping a keyframe of {} bytes with {what}, and what follows, until a keyframe \
                 has one (does the host send SPS and PPS in front of each keyframe?)",
                keyframe.len()
            );
        }
        output.stage = Stage::Waiting {
            asked,
            warned: true,
        };
        Ok(())
    }

    /// The running time of a frame that the host stamped with `host_pts`.
    fn stamp(&self, output: &mut Output, host_pts: i64) -> Option<gst::ClockTime> {
        let arrival = Arrival {
            running: self.obj().current_running_time()?.nseconds(),
            monotonic: monotonic_now(),
        };
        let believed = output.timeline.clock();
        let stamp = output.timeline.stamp(host_pts, arrival);
        if output.timeline.clock() != believed {
            gst::info!(
                CAT,
                imp = self,
                "the host's clock is not this machine's: behind its address is another machine"
            );
        }
        if let Some(latency) = stamp.latency {
            lock(&self.figures).latency.add(latency);
        }
        if output
            .latency
            .took(arrival.monotonic, arrival.running.saturating_sub(stamp.pts))
        {
            let latency = gst::ClockTime::from_nseconds(output.latency.reported());
            gst::info!(CAT, imp = self, "frames come with a latency of {latency}");
            *lock(&self.latency) = latency;
            let message = gst::message::Latency::builder().src(&*self.obj()).build();
            // Fails where there is no bus: then nobody asks for the latency either.
            let _ = self.obj().post_message(message);
        }
        Some(gst::ClockTime::from_nseconds(stamp.pts))
    }
}
