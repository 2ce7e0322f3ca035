// SPDX-License-Identifier: MIT OR Apache-2.0

//! What must hold when a parameter set is rewritten. The `h264-reader` crate, which reads and
//! writes all of it, says what the result has to be, bit for bit.

use h264_reader::nal::sps::{BitstreamRestrictions, FrameCropping, SeqParameterSet};
use h264_reader::nal::{NalHeader, WritableNal};
use h264_reader::rbsp::{self, BitReader};
use helix_protocol::sps::{Changes, Sps};

pub fn read(nal: &[u8]) -> Option<SeqParameterSet> {
    let rbsp = rbsp::decode_nal(nal).ok()?;
    SeqParameterSet::from_bits(BitReader::new(rbsp.as_ref())).ok()
}

pub fn write(header: u8, sps: &SeqParameterSet) -> Vec<u8> {
    sps.to_vec_with_header(NalHeader::new(header).unwrap())
}

/// Rewrites a parameter set; the NAL unit that is the result, if it was understood and the
/// changes are possible.
pub fn check(nal: &[u8], changes: Changes) -> Option<Vec<u8>> {
    let sps = Sps::parse(nal).ok()?;
    let info = sps.info();
    assert!((1..=16384).contains(&info.width) && (1..=16384).contains(&info.height));
    // Only what was written in the one way to write it can be compared.
    let reference = read(nal).filter(|reference| write(nal[0], reference) == nal);
    if let Some(reference) = &reference {
        let size = reference.pixel_dimensions().unwrap();
        assert_eq!((info.width, info.height), size);
    }
    let Some(new) = sps.rewritten(changes).ok()? else {
        return Some(nal.to_vec());
    };
    assert_ne!(new, nal);
    let start_code = |three: &[u8]| three[..2] == [0, 0] && three[2] < 3;
    assert!(!new.windows(3).any(start_code), "a start code inside");
    let again = Sps::parse(&new).expect("what was written can be read");
    assert_eq!(again.rewritten(changes), Ok(None), "it says it now");
    let now = again.info();
    assert_eq!(now.framerate, info.framerate);
    match changes.visible {
        None => assert_eq!(now, info),
        Some((width, height)) => {
            // At most fields of 4:2:0: steps of 2 and 4.
            assert!((width..width + 2).contains(&now.width));
            assert!((height..height + 4).contains(&now.height));
        }
    }
    if let Some(reference) = reference {
        let wanted = write(nal[0], &changed(reference, changes));
        assert_eq!(new, wanted, "something else was changed");
    }
    Some(new)
}

/// What the changes mean, said with the other crate's words.
fn changed(mut sps: SeqParameterSet, changes: Changes) -> SeqParameterSet {
    if let Some((width, height)) = changes.visible {
        let said = sps.frame_cropping.take();
        let before = said.clone().unwrap_or_default();
        // One step of cropping is what one step takes away.
        let (whole, smaller) = (dimensions(&sps, 0), dimensions(&sps, 1));
        let unit = (whole.0 - smaller.0, whole.1 - smaller.1);
        let crop = FrameCropping {
            right_offset: (whole.0 - before.left_offset * unit.0 - width) / unit.0,
            bottom_offset: (whole.1 - before.top_offset * unit.1 - height) / unit.1,
            ..before.clone()
        };
        sps.frame_cropping = if crop == before {
            // Left as it was said, even if at length: offsets that are all 0.
            said
        } else {
            (crop != FrameCropping::default()).then_some(crop)
        };
    }
    if changes.low_delay {
        let buffering = sps.max_num_ref_frames;
        let vui = sps.vui_parameters.get_or_insert_default();
        let restrictions = vui
            .bitstream_restrictions
            .get_or_insert(BitstreamRestrictions {
                motion_vectors_over_pic_boundaries_flag: true,
                max_bytes_per_pic_denom: 2,
                max_bits_per_mb_denom: 1,
                log2_max_mv_length_horizontal: 15,
                log2_max_mv_length_vertical: 15,
                max_num_reorder_frames: 0,
                max_dec_frame_buffering: 0,
            });
        restrictions.max_num_reorder_frames = 0;
        restrictions.max_dec_frame_buffering = buffering;
    }
    sps
}

/// Width and height with so many steps of cropping on each axis.
fn dimensions(sps: &SeqParameterSet, steps: u32) -> (u32, u32) {
    let mut sps = sps.clone();
    sps.frame_cropping = Some(FrameCropping {
        right_offset: steps,
        bottom_offset: steps,
        ..FrameCropping::default()
    });
    sps.pixel_dimensions().unwrap()
}
