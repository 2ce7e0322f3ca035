// SPDX-License-Identifier: MIT OR Apache-2.0

//! What an H.264 access unit in Annex B form (ITU-T H.264, annex B) says of itself.

use std::ops::{Range, RangeInclusive};

use crate::sps::Sps;

/// `nal_unit_type` of slices (ITU-T H.264, table 7-1).
const SLICES: RangeInclusive<u8> = 1..=5;
/// `nal_unit_type` of an IDR slice.
const NAL_IDR: u8 = 5;
/// `nal_unit_type` of a sequence parameter set.
pub(crate) const NAL_SPS: u8 = 7;

/// The NAL units of an access unit, without start codes and the zero bytes after a unit.
pub fn nal_units(annex_b: &[u8]) -> impl Iterator<Item = &[u8]> {
    units(annex_b, |_| false).map(|unit| &annex_b[unit])
}

/// Where the NAL units before the first slice are: parameter sets among them. What follows is not
/// looked at.
pub(crate) fn headers(annex_b: &[u8]) -> impl Iterator<Item = Range<usize>> {
    units(annex_b, |kind| SLICES.contains(&kind))
}

/// Where the NAL units are, up to the first whose `nal_unit_type` is one to stop at.
fn units(annex_b: &[u8], stop: impl Fn(u8) -> bool) -> impl Iterator<Item = Range<usize>> {
    let mut next = find_start_code(annex_b).map(|code| code + 3);
    std::iter::from_fn(move || {
        let start = next.take()?;
        let unit = &annex_b[start..];
        if unit.first().is_some_and(|header| stop(header & 0x1f)) {
            return None;
        }
        let end = find_start_code(unit);
        next = end.map(|end| start + end + 3);
        let end = end.unwrap_or(unit.len());
        let last = unit[..end]
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |last| last + 1);
        Some(start..start + last)
    })
    .filter(|unit| !unit.is_empty())
}

fn find_start_code(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    // Start codes end in a 1, and few other bytes are 1.
    while let Some(one) = bytes.get(from..)?.iter().position(|&byte| byte == 1) {
        let at = from + one;
        if at >= 2 && bytes[at - 2] == 0 && bytes[at - 1] == 0 {
            return Some(at - 2);
        }
        from = at + 1;
    }
    None
}

/// The first sequence parameter set in the access unit: a NAL unit, its header byte included.
pub fn find_sps(annex_b: &[u8]) -> Option<&[u8]> {
    headers(annex_b)
        .map(|unit| &annex_b[unit])
        .find(|unit| unit[0] & 0x1f == NAL_SPS)
}

/// Whether the access unit holds an IDR slice.
pub fn has_idr(annex_b: &[u8]) -> bool {
    nal_units(annex_b).any(|unit| unit[0] & 0x1f == NAL_IDR)
}

/// What a sequence parameter set says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamInfo {
    /// Pixels, after cropping.
    pub width: u32,
    /// Pixels, after cropping.
    pub height: u32,
    /// Frames per second as a fraction, where the VUI gives it.
    pub framerate: Option<(u32, u32)>,
}

impl StreamInfo {
    /// Reads a sequence parameter set, given as NAL unit. `None` where it is damaged or unlikely
    /// (a side of 0 or over 16384 pixels).
    pub fn from_sps(sps: &[u8]) -> Option<Self> {
        Sps::parse(sps).ok().map(|sps| sps.info())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_found_with_either_start_code() {
        let stream = [
            0, 0, 0, 1, 0x67, 1, 2, 0, 0, 1, 0x68, 3, 0, 0, 0, 1, 0x65, 0, 1, 4,
        ];
        let units: Vec<_> = nal_units(&stream).collect();
        assert_eq!(units, [&[0x67, 1, 2][..], &[0x68, 3], &[0x65, 0, 1, 4]]);
        assert_eq!(find_sps(&stream), Some(&[0x67, 1, 2][..]));
        assert!(has_idr(&stream));
    }

    #[test]
    fn no_start_code_no_units() {
        for stream in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 0, 1],
            &[0, 0, 0, 1],
            &[1, 2, 3],
        ] {
            assert_eq!(nal_units(stream).count(), 0, "{stream:?}");
        }
    }

    /// Baseline, 1280x720 at 30 frames per second, as x264 wrote it.
    const SPS_720P30: [u8; 28] = [
        0x67, 0x42, 0xc0, 0x1f, 0xda, 0x01, 0x40, 0x16, 0xec, 0x05, 0xa8, 0x08, 0x08, 0x0a, 0x00,
        0x00, 0x03, 0x00, 0x02, 0x00, 0x00, 0x03, 0x00, 0x79, 0x1e, 0x30, 0x65, 0x40,
    ];

    #[test]
    fn size_and_framerate_come_from_the_sps() {
        let info = StreamInfo::from_sps(&SPS_720P30).unwrap();
        assert_eq!((info.width, info.height), (1280, 720));
        let (num, den) = info.framerate.unwrap();
        assert_eq!(num / den, 30);
    }

    #[test]
    fn damaged_parameter_sets_are_refused() {
        for end in 0..8 {
            assert_eq!(StreamInfo::from_sps(&SPS_720P30[..end]), None);
        }
        for at in 1..SPS_720P30.len() {
            for bit in 0..8 {
                let mut sps = SPS_720P30;
                sps[at] ^= 1 << bit;
                // Any answer will do; it must be an answer.
                let _ = StreamInfo::from_sps(&sps);
            }
        }
        assert_eq!(StreamInfo::from_sps(&[0x68, 0xce, 0x3c, 0x80]), None);
    }
}
