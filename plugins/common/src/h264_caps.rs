// SPDX-License-Identifier: MIT OR Apache-2.0

//! Caps that say what the stream itself says.

use gst::prelude::*;
use gst_pbutils::codec_utils_h264_caps_set_level_and_profile;
use helix_protocol::h264::{self, StreamInfo};

/// Follows the sequence parameter sets of a stream and turns each new one into caps.
#[derive(Debug, Default)]
pub struct H264Caps {
    sps: Vec<u8>,
}

impl H264Caps {
    /// Forgets the stream; the next parameter set counts as new.
    pub fn reset(&mut self) {
        self.sps.clear();
    }

    /// The caps of the stream from this access unit on, if they may differ from those before:
    /// `video/x-h264` with `stream-format`, `alignment`, `width`, `height`, `profile`, `level`,
    /// and `framerate` where the stream gives one.
    ///
    /// To be called with keyframes: others carry no parameter sets.
    pub fn update(&mut self, access_unit: &[u8]) -> Option<gst::Caps> {
        let sps = h264::find_sps(access_unit)?;
        if sps == self.sps {
            return None;
        }
        let info = StreamInfo::from_sps(sps)?;
        let mut caps = gst::Caps::builder("video/x-h264")
            .field("stream-format", "byte-stream")
            .field("alignment", "au")
            .field("width", info.width as i32)
            .field("height", info.height as i32)
            .build();
        {
            let caps = caps.make_mut();
            if let Some((num, den)) = info.framerate
                && let (Ok(num), Ok(den)) = (num.try_into(), den.try_into())
            {
                caps.set("framerate", gst::Fraction::new(num, den));
            }
            // Wants profile_idc, the constraint flags and level_idc: what follows the NAL header.
            // Fails for a profile it has no name for; the caps then lack those two fields.
            let _ = codec_utils_h264_caps_set_level_and_profile(caps, &sps[1..]);
        }
        self.sps.clear();
        self.sps.extend_from_slice(sps);
        Some(caps)
    }
}

/// Profiles whose decoders can decode a stream of the given one (ITU-T H.264, A.2).
fn wider_profiles(profile: &str) -> &'static [&'static str] {
    match profile {
        "constrained-baseline" => &["baseline", "main", "high"],
        "main" | "constrained-high" => &["high"],
        _ => &[],
    }
}

/// `caps` as downstream of `pad` takes them: as they are, or with a profile whose decoders can
/// decode the stream as well. The error says what downstream wants.
pub fn accepted_downstream(pad: &gst::Pad, caps: gst::Caps) -> Result<gst::Caps, String> {
    if pad.peer_query_accept_caps(&caps) {
        return Ok(caps);
    }
    let profile = caps
        .structure(0)
        .and_then(|caps| caps.get::<String>("profile").ok());
    for wider in profile.as_deref().map_or(&[][..], wider_profiles) {
        let mut other = caps.clone();
        other.make_mut().set("profile", *wider);
        if pad.peer_query_accept_caps(&other) {
            return Ok(other);
        }
    }
    let wanted = pad.peer_query_caps(None);
    Err(format!(
        "the host sends {caps}, but downstream takes only {wanted}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Constrained baseline, level 3.1, 1280x720 at 30 frames per second, as x264 wrote it.
    const ACCESS_UNIT: [u8; 36] = [
        0, 0, 0, 1, 0x67, 0x42, 0xc0, 0x1f, 0xda, 0x01, 0x40, 0x16, 0xec, 0x05, 0xa8, 0x08, 0x08,
        0x0a, 0x00, 0x00, 0x03, 0x00, 0x02, 0x00, 0x00, 0x03, 0x00, 0x79, 0x1e, 0x30, 0x65, 0x40,
        0, 0, 1, 0x65,
    ];

    #[test]
    fn each_new_parameter_set_gives_caps_once() {
        gst::init().unwrap();
        let mut caps = H264Caps::default();
        assert!(caps.update(&[0, 0, 1, 0x41, 1]).is_none());
        let found = caps.update(&ACCESS_UNIT).unwrap().to_string();
        for field in [
            "width=(int)1280",
            "height=(int)720",
            "framerate=(fraction)30/1",
            "profile=(string)constrained-baseline",
            "level=(string)3.1",
            "alignment=(string)au",
        ] {
            assert!(found.contains(field), "{field} in {found}");
        }
        assert!(caps.update(&ACCESS_UNIT).is_none());
        caps.reset();
        assert!(caps.update(&ACCESS_UNIT).is_some());
    }
}
