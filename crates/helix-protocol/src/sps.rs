// SPDX-License-Identifier: MIT OR Apache-2.0

//! H.264 sequence parameter sets: what they say, and how to make one say something else.
//!
//! A parameter set is a string of bits without an index: to know where one syntax element lies,
//! all those before it must be read. [`Sps::parse`] does that and remembers where those lie that
//! may be changed. [`Sps::rewritten`] cuts them out and puts others in; every other bit is carried
//! over as it is. Clause and table numbers are those of ITU-T H.264 (08/2021).
//!
//! The `h264-reader` crate can read and write parameter sets too, and its emulation prevention is
//! used here. Its reader refuses what no level allows, which deployed encoders write all the
//! same: 8192x8192, or a decoded picture buffer larger than the level's.

use std::io::Write;
use std::ops::Range;

use h264_reader::rbsp::{self, ByteWriter};

use crate::h264::{self, NAL_SPS, StreamInfo};

/// The longest parameter set that is read, in bytes. The longest possible has twelve scaling
/// lists, 255 offsets and 64 buffer descriptions, which is about 4 KiB.
const LONGEST: usize = 8192;
/// The longest side of a coded picture, in macroblocks: 16384 pixels.
const MOST_MACROBLOCKS: u32 = 1024;
/// `aspect_ratio_idc` that is followed by a width and a height (table E-1).
const EXTENDED_SAR: u32 = 255;
/// Bits from `aspect_ratio_info_present_flag` to `pic_struct_present_flag` of a VUI in which none
/// of the optional parts is there.
const EMPTY_VUI: u32 = 8;

/// Why a parameter set is left as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpsError {
    /// Another kind of NAL unit, or one far too long.
    #[error("it is no sequence parameter set")]
    NotSps,
    /// Bytes that a NAL unit may not have (7.4.1).
    #[error("the parameter set holds a start code: its emulation prevention is broken")]
    Emulation,
    /// It is cut, or damaged before this element.
    #[error("the parameter set ends before its {0}")]
    Ends(&'static str),
    /// A value that the standard does not allow, or that nobody encodes.
    #[error("the parameter set's {0} is {1}")]
    Value(&'static str, u32),
    /// There are bits behind the end that are neither an end nor nothing.
    #[error("the parameter set goes on behind its end")]
    Trailing,
    /// The picture is not so large.
    #[error("{wanted:?} pixels cannot be cropped out of {coded:?}")]
    Crop {
        /// Width and height that were asked for.
        wanted: (u32, u32),
        /// Width and height of what is encoded, without what is cropped on the left and top.
        coded: (u32, u32),
    },
}

/// What a parameter set is to say instead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Show this width and height, in pixels, from the upper left corner on. Rounded up to what
    /// cropping can say: in 4:2:0 to even numbers.
    pub visible: Option<(u32, u32)>,
    /// Say that pictures come in the order in which they are shown, and that a decoder needs to
    /// keep reference pictures only (L27). A decoder then shows each picture at once; it shows a
    /// stream with B pictures out of order.
    pub low_delay: bool,
}

/// A parameter set that was understood.
#[derive(Clone, Debug)]
pub struct Sps {
    /// The NAL unit's header byte.
    header: u8,
    /// The bits: without header and emulation prevention.
    rbsp: Vec<u8>,
    max_num_ref_frames: u32,
    /// Pixels in one step of cropping, horizontally and vertically.
    crop_unit: (u32, u32),
    /// Pixels of the coded picture.
    coded: (u32, u32),
    crop: Crop,
    /// Bits of `frame_cropping_flag` and what belongs to it.
    crop_bits: Range<usize>,
    /// Ticks a second and ticks of one field.
    timing: Option<(u32, u32)>,
    restriction: Restriction,
}

/// Steps of cropping (7.4.2.1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Crop {
    left: u32,
    right: u32,
    top: u32,
    bottom: u32,
}

/// Where the bitstream restrictions are (E.1.1), or would be.
#[derive(Clone, Debug)]
enum Restriction {
    /// There is no VUI; its flag is at this bit.
    NoVui(usize),
    /// There is a VUI without them; their flag is at this bit.
    Absent(usize),
    /// There they are: the bits of `max_num_reorder_frames` and `max_dec_frame_buffering`, and
    /// their values.
    Present(Range<usize>, (u32, u32)),
}

impl Sps {
    /// Reads a NAL unit, its header byte included, without start code.
    pub fn parse(nal: &[u8]) -> Result<Self, SpsError> {
        match nal.first() {
            // With forbidden_zero_bit.
            Some(header) if header & 0x9f == NAL_SPS && nal.len() <= LONGEST => {}
            _ => return Err(SpsError::NotSps),
        }
        let rbsp = rbsp::decode_nal(nal).map_err(|_| SpsError::Emulation)?;
        let mut bits = Bits::new(&rbsp);
        let profile_idc = bits.read(8, "profile_idc")?;
        bits.skip(16, "level_idc")?;
        bits.limited("seq_parameter_set_id", 31)?;
        let chroma = Chroma::read(&mut bits, profile_idc)?;
        bits.limited("log2_max_frame_num_minus4", 12)?;
        skip_picture_order(&mut bits)?;
        let max_num_ref_frames = bits.limited("max_num_ref_frames", 16)?;
        bits.skip(1, "gaps_in_frame_num_value_allowed_flag")?;
        let most = MOST_MACROBLOCKS - 1;
        let width = 16 * (bits.limited("pic_width_in_mbs_minus1", most)? + 1);
        let height = bits.limited("pic_height_in_map_units_minus1", most)? + 1;
        let frames_only = bits.flag("frame_mbs_only_flag")?;
        if !frames_only {
            bits.skip(1, "mb_adaptive_frame_field_flag")?;
        }
        // A map unit of a stream with fields is a pair of macroblocks (7.4.2.1.1).
        let fields = if frames_only { 1 } else { 2 };
        let coded = (width, 16 * fields * height);
        if coded.1 > 16 * MOST_MACROBLOCKS {
            return Err(SpsError::Value("height in pixels", coded.1));
        }
        bits.skip(1, "direct_8x8_inference_flag")?;
        let crop_unit = (chroma.step.0, chroma.step.1 * fields);
        let crop_start = bits.at;
        let crop = Crop::read(&mut bits, crop_unit, coded)?;
        let crop_bits = crop_start..bits.at;
        let (timing, restriction) = read_vui(&mut bits)?;
        bits.finish()?;
        Ok(Self {
            header: nal[0],
            rbsp: rbsp.into_owned(),
            max_num_ref_frames,
            crop_unit,
            coded,
            crop,
            crop_bits,
            timing,
            restriction,
        })
    }

    /// Size and frame rate.
    pub fn info(&self) -> StreamInfo {
        let Crop {
            left,
            right,
            top,
            bottom,
        } = self.crop;
        StreamInfo {
            width: self.coded.0 - (left + right) * self.crop_unit.0,
            height: self.coded.1 - (top + bottom) * self.crop_unit.1,
            framerate: self
                .timing
                // A tick is a field: two make a frame.
                .and_then(|(scale, ticks)| Some((scale, ticks.checked_mul(2)?)))
                .filter(|&(scale, ticks)| scale > 0 && ticks > 0),
        }
    }

    /// The NAL unit with the changes made, or `None` where it says all that already.
    pub fn rewritten(&self, changes: Changes) -> Result<Option<Vec<u8>>, SpsError> {
        let crop = match changes.visible {
            Some(wanted) => self.crop_to(wanted)?,
            None => self.crop,
        };
        let buffering = (0, self.max_num_ref_frames);
        let restricted =
            matches!(&self.restriction, Restriction::Present(_, now) if *now == buffering);
        let restrict = changes.low_delay && !restricted;
        if crop == self.crop && !restrict {
            return Ok(None);
        }
        let mut out = BitString::default();
        out.copy(&self.rbsp, 0..self.crop_bits.start);
        if crop == self.crop {
            out.copy(&self.rbsp, self.crop_bits.clone());
        } else {
            crop.write(&mut out);
        }
        let from = self.crop_bits.end;
        let end = Bits::new(&self.rbsp).end();
        match &self.restriction {
            _ if !restrict => out.copy(&self.rbsp, from..end),
            Restriction::NoVui(flag) => {
                out.copy(&self.rbsp, from..*flag);
                out.write(1, 1);
                out.write(EMPTY_VUI, 0);
                out.write_restriction(buffering);
                out.copy(&self.rbsp, flag + 1..end);
            }
            Restriction::Absent(flag) => {
                out.copy(&self.rbsp, from..*flag);
                out.write_restriction(buffering);
                out.copy(&self.rbsp, flag + 1..end);
            }
            Restriction::Present(range, _) => {
                out.copy(&self.rbsp, from..range.start);
                out.write_ue(buffering.0);
                out.write_ue(buffering.1);
                out.copy(&self.rbsp, range.end..end);
            }
        }
        // rbsp_trailing_bits: a 1, and the rest of the byte.
        out.write(1, 1);
        Ok(Some(nal(self.header, &out.bytes)))
    }

    fn crop_to(&self, wanted: (u32, u32)) -> Result<Crop, SpsError> {
        let Crop { left, top, .. } = self.crop;
        let coded = (
            self.coded.0 - left * self.crop_unit.0,
            self.coded.1 - top * self.crop_unit.1,
        );
        match (coded.0.checked_sub(wanted.0), coded.1.checked_sub(wanted.1)) {
            (Some(right), Some(bottom)) if wanted.0 > 0 && wanted.1 > 0 => Ok(Crop {
                left,
                right: right / self.crop_unit.0,
                top,
                bottom: bottom / self.crop_unit.1,
            }),
            _ => Err(SpsError::Crop { wanted, coded }),
        }
    }
}

/// Another parameter set for a part of an access unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The bytes that it stands in for.
    pub range: Range<usize>,
    /// A NAL unit, without start code.
    pub nal: Vec<u8>,
}

/// The parameter sets of an access unit in Annex B form that have to be others so that it says
/// what `changes` wants, in the order of their places; none where it says so already. The error
/// tells of the first that is not understood; then nothing should be changed.
///
/// Reads no further than the first slice: parameter sets come before it (7.4.1.2.3).
pub fn patches(annex_b: &[u8], changes: Changes) -> Result<Vec<Patch>, SpsError> {
    let mut patches = Vec::new();
    for range in h264::headers(annex_b) {
        let unit = &annex_b[range.clone()];
        if unit[0] & 0x1f == NAL_SPS
            && let Some(nal) = Sps::parse(unit)?.rewritten(changes)?
        {
            patches.push(Patch { range, nal });
        }
    }
    Ok(patches)
}

/// What the chroma part of a parameter set decides.
struct Chroma {
    /// Pixels in one step of cropping, before fields are considered (table 6-1).
    step: (u32, u32),
}

impl Chroma {
    fn read(bits: &mut Bits, profile_idc: u32) -> Result<Self, SpsError> {
        // 7.3.2.1.1: all others are 4:2:0 with 8 bits.
        if ![100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135].contains(&profile_idc) {
            return Ok(Self { step: (2, 2) });
        }
        let format = bits.limited("chroma_format_idc", 3)?;
        if format == 3 {
            bits.skip(1, "separate_colour_plane_flag")?;
        }
        bits.limited("bit_depth_luma_minus8", 6)?;
        bits.limited("bit_depth_chroma_minus8", 6)?;
        bits.skip(1, "qpprime_y_zero_transform_bypass_flag")?;
        if bits.flag("seq_scaling_matrix_present_flag")? {
            for list in 0..if format == 3 { 12 } else { 8 } {
                if bits.flag("seq_scaling_list_present_flag")? {
                    skip_scaling_list(bits, if list < 6 { 16 } else { 64 })?;
                }
            }
        }
        let step = match format {
            1 => (2, 2),
            2 => (2, 1),
            _ => (1, 1),
        };
        Ok(Self { step })
    }
}

impl Crop {
    fn read(bits: &mut Bits, unit: (u32, u32), coded: (u32, u32)) -> Result<Self, SpsError> {
        if !bits.flag("frame_cropping_flag")? {
            return Ok(Self::default());
        }
        // Something must be left of each side.
        let (most_x, most_y) = ((coded.0 - 1) / unit.0, (coded.1 - 1) / unit.1);
        let left = bits.limited("frame_crop_left_offset", most_x)?;
        let right = bits.limited("frame_crop_right_offset", most_x - left)?;
        let top = bits.limited("frame_crop_top_offset", most_y)?;
        let bottom = bits.limited("frame_crop_bottom_offset", most_y - top)?;
        Ok(Self {
            left,
            right,
            top,
            bottom,
        })
    }

    fn write(self, out: &mut BitString) {
        if self == Self::default() {
            out.write(1, 0);
            return;
        }
        out.write(1, 1);
        for steps in [self.left, self.right, self.top, self.bottom] {
            out.write_ue(steps);
        }
    }
}

/// 7.3.2.1.1.1
fn skip_scaling_list(bits: &mut Bits, length: usize) -> Result<(), SpsError> {
    let mut last = 8u8;
    for _ in 0..length {
        // Modulo 256, so that the lower bits of the difference are enough.
        last = last.wrapping_add(bits.read_se("delta_scale")? as u8);
        if last == 0 {
            break;
        }
    }
    Ok(())
}

fn skip_picture_order(bits: &mut Bits) -> Result<(), SpsError> {
    match bits.limited("pic_order_cnt_type", 2)? {
        0 => {
            bits.limited("log2_max_pic_order_cnt_lsb_minus4", 12)?;
        }
        1 => {
            bits.skip(1, "delta_pic_order_always_zero_flag")?;
            bits.read_se("offset_for_non_ref_pic")?;
            bits.read_se("offset_for_top_to_bottom_field")?;
            for _ in 0..bits.limited("num_ref_frames_in_pic_order_cnt_cycle", 255)? {
                bits.read_se("offset_for_ref_frame")?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// E.1.1
fn read_vui(bits: &mut Bits) -> Result<(Option<(u32, u32)>, Restriction), SpsError> {
    let at = bits.at;
    if !bits.flag("vui_parameters_present_flag")? {
        return Ok((None, Restriction::NoVui(at)));
    }
    if bits.flag("aspect_ratio_info_present_flag")?
        && bits.read(8, "aspect_ratio_idc")? == EXTENDED_SAR
    {
        bits.skip(32, "sar_height")?;
    }
    if bits.flag("overscan_info_present_flag")? {
        bits.skip(1, "overscan_appropriate_flag")?;
    }
    if bits.flag("video_signal_type_present_flag")? {
        bits.skip(4, "video_full_range_flag")?;
        if bits.flag("colour_description_present_flag")? {
            bits.skip(24, "matrix_coefficients")?;
        }
    }
    if bits.flag("chroma_loc_info_present_flag")? {
        bits.read_ue("chroma_sample_loc_type_top_field")?;
        bits.read_ue("chroma_sample_loc_type_bottom_field")?;
    }
    let mut timing = None;
    if bits.flag("timing_info_present_flag")? {
        let ticks = bits.read(32, "num_units_in_tick")?;
        timing = Some((bits.read(32, "time_scale")?, ticks));
        bits.skip(1, "fixed_frame_rate_flag")?;
    }
    let nal_hrd = skip_hrd(bits, "nal_hrd_parameters_present_flag")?;
    let vcl_hrd = skip_hrd(bits, "vcl_hrd_parameters_present_flag")?;
    if nal_hrd || vcl_hrd {
        bits.skip(1, "low_delay_hrd_flag")?;
    }
    bits.skip(1, "pic_struct_present_flag")?;
    let at = bits.at;
    if !bits.flag("bitstream_restriction_flag")? {
        return Ok((timing, Restriction::Absent(at)));
    }
    bits.skip(1, "motion_vectors_over_pic_boundaries_flag")?;
    for name in [
        "max_bytes_per_pic_denom",
        "max_bits_per_mb_denom",
        "log2_max_mv_length_horizontal",
        "log2_max_mv_length_vertical",
    ] {
        bits.read_ue(name)?;
    }
    let start = bits.at;
    let reorder = bits.read_ue("max_num_reorder_frames")?;
    let buffering = bits.read_ue("max_dec_frame_buffering")?;
    let present = Restriction::Present(start..bits.at, (reorder, buffering));
    Ok((timing, present))
}

/// E.1.2; returns whether it is there.
fn skip_hrd(bits: &mut Bits, flag: &'static str) -> Result<bool, SpsError> {
    if !bits.flag(flag)? {
        return Ok(false);
    }
    let count = bits.limited("cpb_cnt_minus1", 31)? + 1;
    bits.skip(8, "cpb_size_scale")?;
    for _ in 0..count {
        bits.read_ue("bit_rate_value_minus1")?;
        bits.read_ue("cpb_size_value_minus1")?;
        bits.skip(1, "cbr_flag")?;
    }
    bits.skip(20, "time_offset_length")?;
    Ok(true)
}

/// Reads from a string of bits, the highest of each byte first.
struct Bits<'a> {
    bytes: &'a [u8],
    /// The next bit.
    at: usize,
}

impl<'a> Bits<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn flag(&mut self, name: &'static str) -> Result<bool, SpsError> {
        let byte = self.bytes.get(self.at / 8).ok_or(SpsError::Ends(name))?;
        let bit = byte >> (7 - self.at % 8) & 1;
        self.at += 1;
        Ok(bit == 1)
    }

    /// `count` bits, at most 32.
    fn read(&mut self, count: u32, name: &'static str) -> Result<u32, SpsError> {
        (0..count).try_fold(0, |value, _| Ok(value << 1 | u32::from(self.flag(name)?)))
    }

    fn skip(&mut self, count: u32, name: &'static str) -> Result<(), SpsError> {
        self.read(count, name).map(drop)
    }

    /// ue(v): unsigned Exp-Golomb (9.1).
    fn read_ue(&mut self, name: &'static str) -> Result<u32, SpsError> {
        let mut zeros = 0;
        while !self.flag(name)? {
            zeros += 1;
            if zeros > 31 {
                return Err(SpsError::Value(name, u32::MAX));
            }
        }
        Ok((1 << zeros) - 1 + self.read(zeros, name)?)
    }

    /// se(v): signed Exp-Golomb (9.1.1).
    fn read_se(&mut self, name: &'static str) -> Result<i32, SpsError> {
        let code = self.read_ue(name)?;
        let size = code.div_ceil(2) as i32;
        Ok(if code % 2 == 0 { -size } else { size })
    }

    /// ue(v) of at most `most`.
    fn limited(&mut self, name: &'static str, most: u32) -> Result<u32, SpsError> {
        match self.read_ue(name)? {
            value if value <= most => Ok(value),
            value => Err(SpsError::Value(name, value)),
        }
    }

    /// Where the last 1 is, which ends the string.
    fn end(&self) -> usize {
        self.bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| {
                8 * last + 7 - self.bytes[last].trailing_zeros() as usize
            })
    }

    /// Checks that nothing but the end follows.
    fn finish(&self) -> Result<(), SpsError> {
        match self.end().cmp(&self.at) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => Err(SpsError::Ends("rbsp_stop_one_bit")),
            std::cmp::Ordering::Greater => Err(SpsError::Trailing),
        }
    }
}

/// A string of bits that grows.
#[derive(Default)]
struct BitString {
    bytes: Vec<u8>,
    /// Bits of the last byte that are not used.
    room: u32,
}

impl BitString {
    /// The lowest `count` bits of `value`.
    fn write(&mut self, count: u32, value: u32) {
        for bit in (0..count).rev() {
            if self.room == 0 {
                self.bytes.push(0);
                self.room = 8;
            }
            self.room -= 1;
            if let Some(last) = self.bytes.last_mut() {
                *last |= ((value >> bit & 1) as u8) << self.room;
            }
        }
    }

    /// ue(v); for values far from `u32::MAX`.
    fn write_ue(&mut self, value: u32) {
        let digits = (value + 1).ilog2();
        self.write(digits, 0);
        self.write(digits + 1, value + 1);
    }

    fn copy(&mut self, bytes: &[u8], range: Range<usize>) {
        for at in range {
            self.write(1, u32::from(bytes[at / 8] >> (7 - at % 8) & 1));
        }
    }

    /// `bitstream_restriction_flag` and all that follows it. But for the last two, these are the
    /// values that stand for a parameter set without them (E.2.1), so that they restrict nothing.
    fn write_restriction(&mut self, (reorder, buffering): (u32, u32)) {
        self.write(1, 1);
        // motion_vectors_over_pic_boundaries_flag
        self.write(1, 1);
        // max_bytes_per_pic_denom, max_bits_per_mb_denom, log2_max_mv_length_horizontal, _vertical
        for value in [2, 1, 15, 15] {
            self.write_ue(value);
        }
        self.write_ue(reorder);
        self.write_ue(buffering);
    }
}

/// The NAL unit of these bits: with header and emulation prevention.
fn nal(header: u8, rbsp: &[u8]) -> Vec<u8> {
    let mut nal = Vec::with_capacity(rbsp.len() + rbsp.len() / 2 + 1);
    nal.push(header);
    let mut writer = ByteWriter::new(nal);
    if writer.write_all(rbsp).is_err() {
        unreachable!("a Vec takes all bytes");
    }
    writer.into_writer()
}
