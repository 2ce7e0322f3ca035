// SPDX-License-Identifier: MIT OR Apache-2.0

//! Parameter sets of real encoders and of none, rewritten.

#[path = "common/sps.rs"]
mod oracle;

use h264_reader::nal::sps::{
    AspectRatioInfo, BitstreamRestrictions, ChromaFormat, ChromaInfo, ChromaLocInfo,
    ColourDescription, CpbSpec, FrameCropping, FrameMbsFlags, HrdParameters, OverscanAppropriate,
    PicOrderCntType, ScalingLists4x4, ScalingLists8x8, SeqParamSetId, SeqParameterSet,
    SeqScalingMatrix, TimingInfo, VideoFormat, VideoSignalType, VuiParameters,
};
use helix_protocol::h264::StreamInfo;
use helix_protocol::sps::{Changes, Sps, SpsError, patches};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

const LOW_DELAY: Changes = Changes {
    visible: None,
    low_delay: true,
};

fn visible(width: u32, height: u32) -> Changes {
    Changes {
        visible: Some((width, height)),
        low_delay: false,
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

/// What encoders wrote (x264 164 and OpenH264 2.3 through GStreamer 1.22): settings, size, bytes.
const REAL: [(&str, (u32, u32), &str); 12] = [
    (
        "x264 main zerolatency",
        (1280, 720),
        "674d401fda014016ec05a808080a000003000200000300791e306540",
    ),
    (
        "x264 baseline",
        (34, 18),
        "6742c015da35e2223016a0c0c0d4a0000003002000000f11e2c5d4",
    ),
    (
        "x264 high, B pictures",
        (1920, 1080),
        "67640028acd940780227e5c05a808080a000007d20001d4c11e30632c0",
    ),
    (
        "x264 HRD, 64:45, chroma location",
        (640, 480),
        "6764001eacd940a03db01b5060606a500000030010000003032f0207d00012bce8b0c03e2c5b2c",
    ),
    (
        "x264 interlaced",
        (720, 576),
        "6764001eacd940b4126c0528303035280000030008000003019478b16cb0",
    ),
    (
        "x264 high 10",
        (320, 240),
        "676e000da6cd94141fb016a0c0c0d4a0000003002000000651e28532c0",
    ),
    (
        "x264 4:2:2",
        (330, 242),
        "677a000dbcd9415087923f016a0c0c0c800000030080000019478a14cb",
    ),
    (
        "x264 4:4:4",
        (333, 241),
        "67f4000d919b282a10f242180b50606064000003000400000300ca3c50a658",
    ),
    (
        "x264 over all levels",
        (8192, 8192),
        "674d403eda0020000401b016a0202028000003000800000301e478402150",
    ),
    (
        "OpenH264 constrained baseline",
        (1280, 720),
        "6742c01f8c8d402802dd00f08846a0",
    ),
    (
        "OpenH264 main",
        (640, 360),
        "674d4c1e8c8d405017fcb00f08846a",
    ),
    (
        "OpenH264 high",
        (330, 242),
        "67640c0dac191a815085922201e1108d40",
    ),
];

#[test]
fn real_encoders_are_understood_and_rewritten() {
    for (name, size, hex) in REAL {
        let nal = bytes(hex);
        let sps = Sps::parse(&nal).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((sps.info().width, sps.info().height), size, "{name}");
        for width in [size.0, size.0 - 1, size.0 - 7, 1] {
            for low_delay in [false, true] {
                let changes = Changes {
                    visible: Some((width, size.1)),
                    low_delay,
                };
                assert!(oracle::check(&nal, changes).is_some(), "{name}");
            }
        }
        assert!(oracle::check(&nal, LOW_DELAY).is_some(), "{name}");
        assert_eq!(sps.rewritten(Changes::default()), Ok(None), "{name}");
        assert_eq!(sps.rewritten(visible(size.0, size.1)), Ok(None), "{name}");
    }
}

#[test]
fn what_encoders_for_low_delay_write_already_says_so() {
    let already: Vec<_> = REAL
        .into_iter()
        .filter(|(.., hex)| {
            let sps = Sps::parse(&bytes(hex)).unwrap();
            sps.rewritten(LOW_DELAY) == Ok(None)
        })
        .map(|(name, ..)| name)
        .collect();
    assert_eq!(
        already,
        [
            "x264 main zerolatency",
            "x264 baseline",
            "x264 over all levels",
            "OpenH264 constrained baseline",
            "OpenH264 main",
            "OpenH264 high"
        ]
    );
}

#[test]
fn cropping_is_rounded_up_to_what_can_be_said() {
    let sps = bytes(REAL[1].2);
    for (wanted, said) in [
        ((33, 17), (34, 18)),
        ((6, 4), (6, 4)),
        ((1, 1), (2, 2)),
        ((48, 32), (48, 32)),
    ] {
        let new = oracle::check(&sps, visible(wanted.0, wanted.1)).unwrap();
        let StreamInfo { width, height, .. } = StreamInfo::from_sps(&new).unwrap();
        assert_eq!((width, height), said);
    }
    for (width, height) in [(0, 4), (4, 0), (49, 32), (48, 33), (u32::MAX, 1)] {
        let error = Sps::parse(&sps)
            .unwrap()
            .rewritten(visible(width, height))
            .unwrap_err();
        assert!(matches!(error, SpsError::Crop { .. }), "{error}");
    }
}

#[test]
fn cropping_that_says_nothing_is_left_when_it_is_right() {
    let mut sps = oracle::read(&bytes(REAL[9].2)).unwrap();
    sps.frame_cropping = Some(FrameCropping::default());
    let nal = oracle::write(0x67, &sps);
    let size = Sps::parse(&nal).unwrap().info();
    let changes = Changes {
        low_delay: true,
        ..visible(size.width, size.height)
    };
    assert_eq!(
        oracle::check(&nal, changes),
        oracle::check(&nal, LOW_DELAY),
        "nothing was to be cropped"
    );
    // Found by the fuzz target sps: the same, and a change behind it.
    let found =
        bytes("27464158aeeff7008eef8b2df32a0000030240f771710130000004009e4a8e8ebd007175717171");
    let changes = Changes {
        low_delay: true,
        ..visible(15, 16)
    };
    assert!(oracle::check(&found, changes).is_some());
}

#[test]
fn only_the_parameter_sets_of_an_access_unit_are_patched() {
    let sps = bytes(REAL[9].2);
    let with_b = bytes(REAL[2].2);
    let unit = [
        &[0, 0, 0, 1, 9, 0x10, 0, 0, 0, 1][..],
        &with_b,
        &[0, 0, 1],
        &sps,
        &[0, 0, 1, 0x68, 0xce, 0x3c, 0x80, 0, 0, 1, 0x65, 1, 2, 3],
        // Nothing after the first slice is looked at.
        &[0, 0, 1],
        &with_b,
    ]
    .concat();
    let patches = patches(&unit, LOW_DELAY).unwrap();
    assert_eq!(patches.len(), 1);
    assert_eq!(unit[patches[0].range.clone()], with_b);
    assert_eq!(patches[0].range.start, 10);
    assert_eq!(
        Some(&patches[0].nal),
        oracle::check(&with_b, LOW_DELAY).as_ref()
    );
    let cut = [&[0, 0, 1][..], &with_b[..12]].concat();
    assert!(matches!(
        helix_protocol::sps::patches(&cut, LOW_DELAY),
        Err(SpsError::Ends(_))
    ));
}

#[test]
fn damaged_parameter_sets_harm_nothing() {
    for (_, _, hex) in REAL {
        let nal = bytes(hex);
        for end in 0..nal.len() {
            assert!(Sps::parse(&nal[..end]).is_err() || nal[end..] == [0x40]);
        }
        for at in 0..nal.len() {
            for bit in 0..8 {
                let mut damaged = nal.clone();
                damaged[at] ^= 1 << bit;
                oracle::check(&damaged, LOW_DELAY);
                oracle::check(&damaged, visible(16, 16));
            }
        }
    }
    let endless = [&[0x67][..], &[0xff; 10_000]].concat();
    assert_eq!(Sps::parse(&endless).unwrap_err(), SpsError::NotSps);
    // Found by the fuzz target h264: 976 rows of pairs of macroblocks.
    let high = [0x67, 0, 0, 0xff, 0xf9, 0, 0x3d, 0, 0xfd, 0xd5, 1];
    assert_eq!(
        Sps::parse(&high).unwrap_err(),
        SpsError::Value("height in pixels", 31232)
    );
    let start_code = [0x67, 0x42, 0, 0, 1, 0x80];
    assert_eq!(Sps::parse(&start_code).unwrap_err(), SpsError::Emulation);
}

fn chroma() -> impl Strategy<Value = (u8, ChromaInfo)> {
    let lists4 = any::<[Option<[u8; 16]>; 6]>();
    // Arrays of 64 are too long for proptest.
    let long_list = || vec(any::<u8>(), 64).prop_map(|list| <[u8; 64]>::try_from(list).unwrap());
    let lists8 = vec(option::of(long_list()), 6);
    let matrix = option::of((lists4, lists8));
    let profiles = prop::sample::select(vec![66u8, 77, 88, 100, 110, 122, 244, 44]);
    (profiles, 0..4u8, 0..7u8, any::<[bool; 2]>(), matrix).prop_map(
        |(profile, format, depth, [planes, lossless], matrix)| {
            if matches!(profile, 66 | 77 | 88) {
                return (profile, ChromaInfo::default());
            }
            let chroma_format = [
                ChromaFormat::Monochrome,
                ChromaFormat::YUV420,
                ChromaFormat::YUV422,
                ChromaFormat::YUV444,
            ][usize::from(format)];
            let scaling_matrix = matrix.map(|(lists4, lists8)| {
                let lists8: Vec<_> = lists8.into_iter().map(|list| list.map(ended)).collect();
                Box::new(SeqScalingMatrix {
                    scaling_lists4x4: ScalingLists4x4(lists4.map(|list| list.map(ended))),
                    scaling_lists8x8: if format == 3 {
                        ScalingLists8x8::YCbCr(lists8.try_into().unwrap())
                    } else {
                        ScalingLists8x8::Y([lists8[0], lists8[1]])
                    },
                })
            });
            let info = ChromaInfo {
                chroma_format,
                separate_colour_plane_flag: planes && format == 3,
                bit_depth_luma_minus8: depth,
                bit_depth_chroma_minus8: 6 - depth,
                qpprime_y_zero_transform_bypass_flag: lossless,
                scaling_matrix,
            };
            (profile, info)
        },
    )
}

/// A 0 in a scaling list ends it.
fn ended<const SIZE: usize>(mut list: [u8; SIZE]) -> [u8; SIZE] {
    if let Some(end) = list.iter().position(|&scale| scale == 0) {
        list[end..].fill(0);
    }
    list
}

fn picture_order() -> impl Strategy<Value = PicOrderCntType> {
    let offset = || -0x7fff_ffff..0x7fff_ffff_i32;
    prop_oneof![
        (0..=12u8).prop_map(
            |log2_max_pic_order_cnt_lsb_minus4| PicOrderCntType::TypeZero {
                log2_max_pic_order_cnt_lsb_minus4
            }
        ),
        (any::<bool>(), offset(), offset(), vec(offset(), 0..40)).prop_map(
            |(always_zero, non_ref, bottom, offsets_for_ref_frame)| PicOrderCntType::TypeOne {
                delta_pic_order_always_zero_flag: always_zero,
                offset_for_non_ref_pic: non_ref,
                offset_for_top_to_bottom_field: bottom,
                offsets_for_ref_frame,
            }
        ),
        Just(PicOrderCntType::TypeTwo),
    ]
}

fn hrd() -> impl Strategy<Value = Option<HrdParameters>> {
    let spec =
        (0..u32::MAX, 0..u32::MAX, any::<bool>()).prop_map(|(rate, size, cbr_flag)| CpbSpec {
            bit_rate_value_minus1: rate,
            cpb_size_value_minus1: size,
            cbr_flag,
        });
    option::of(
        (vec(spec, 1..=32), 0..16u8, 0..32u8).prop_map(|(cpb_specs, scale, length)| {
            HrdParameters {
                bit_rate_scale: scale,
                cpb_size_scale: 15 - scale,
                cpb_specs,
                initial_cpb_removal_delay_length_minus1: length,
                cpb_removal_delay_length_minus1: 31 - length,
                dpb_output_delay_length_minus1: 0,
                time_offset_length: length,
            }
        }),
    )
}

fn vui(reference_frames: u32) -> impl Strategy<Value = VuiParameters> {
    let aspect = prop_oneof![
        Just(AspectRatioInfo::Ratio1_1),
        any::<(u16, u16)>().prop_map(|(x, y)| AspectRatioInfo::Extended(x, y)),
    ];
    let overscan = prop::sample::select(vec![
        OverscanAppropriate::Unspecified,
        OverscanAppropriate::Appropriate,
        OverscanAppropriate::Inappropriate,
    ]);
    let colours =
        option::of(
            any::<[u8; 3]>().prop_map(|[primaries, transfer, matrix]| ColourDescription {
                colour_primaries: primaries,
                transfer_characteristics: transfer,
                matrix_coefficients: matrix,
            }),
        );
    let signal = (any::<bool>(), colours).prop_map(|(full, colour_description)| VideoSignalType {
        video_format: VideoFormat::NTSC,
        video_full_range_flag: full,
        colour_description,
    });
    let timing = any::<(u32, u32, bool)>().prop_map(|(ticks, scale, fixed)| TimingInfo {
        num_units_in_tick: ticks,
        time_scale: scale,
        fixed_frame_rate_flag: fixed,
    });
    let restrictions = (any::<bool>(), 0..=16u32, reference_frames..=16).prop_flat_map(
        |(vectors, small, buffering)| {
            (0..=buffering).prop_map(move |reorder| BitstreamRestrictions {
                motion_vectors_over_pic_boundaries_flag: vectors,
                max_bytes_per_pic_denom: small,
                max_bits_per_mb_denom: 16 - small,
                log2_max_mv_length_horizontal: small,
                log2_max_mv_length_vertical: 3,
                max_num_reorder_frames: reorder,
                max_dec_frame_buffering: buffering,
            })
        },
    );
    (
        option::of(aspect),
        overscan,
        option::of(signal),
        option::of((0..6u32, 0..6u32)),
        option::of(timing),
        hrd(),
        hrd(),
        any::<[bool; 2]>(),
        option::of(restrictions),
    )
        .prop_map(
            |(aspect, overscan, signal, chroma, timing, nal, vcl, [delay, structure], restrict)| {
                let low_delay_hrd_flag = (nal.is_some() || vcl.is_some()).then_some(delay);
                VuiParameters {
                    aspect_ratio_info: aspect,
                    overscan_appropriate: overscan,
                    video_signal_type: signal,
                    chroma_loc_info: chroma.map(|(top, bottom)| ChromaLocInfo {
                        chroma_sample_loc_type_top_field: top,
                        chroma_sample_loc_type_bottom_field: bottom,
                    }),
                    timing_info: timing,
                    nal_hrd_parameters: nal,
                    vcl_hrd_parameters: vcl,
                    low_delay_hrd_flag,
                    pic_struct_present_flag: structure,
                    bitstream_restrictions: restrict,
                }
            },
        )
}

/// Any parameter set with pictures of less than 512 pixels a side, which every number of reference
/// pictures is allowed for.
fn parameter_set() -> impl Strategy<Value = SeqParameterSet> {
    (0..=16u32).prop_flat_map(|max_num_ref_frames| {
        (
            chroma(),
            picture_order(),
            (0..16u32, 0..16u32, 0..32u32, 0..=12u8),
            any::<[bool; 4]>(),
            option::of(any::<[u32; 4]>()),
            option::of(vui(max_num_ref_frames)),
        )
            .prop_map(
                move |((profile, chroma_info), order, (wide, high, id, log2), flags, crop, vui)| {
                    let frame_mbs_flags = if flags[0] {
                        FrameMbsFlags::Frames
                    } else {
                        FrameMbsFlags::Fields {
                            mb_adaptive_frame_field_flag: flags[1],
                        }
                    };
                    SeqParameterSet {
                        profile_idc: profile.into(),
                        constraint_flags: 0.into(),
                        level_idc: 62,
                        seq_parameter_set_id: SeqParamSetId::from_u32(id).unwrap(),
                        chroma_info,
                        log2_max_frame_num_minus4: log2,
                        pic_order_cnt: order,
                        max_num_ref_frames,
                        gaps_in_frame_num_value_allowed_flag: flags[2],
                        pic_width_in_mbs_minus1: wide,
                        pic_height_in_map_units_minus1: high,
                        frame_mbs_flags,
                        direct_8x8_inference_flag: flags[3],
                        // Two of at most 3 steps of 2 or 4 leave something of 16.
                        frame_cropping: crop.map(|steps| FrameCropping {
                            left_offset: steps[0] % 2,
                            right_offset: steps[1] % 4,
                            top_offset: steps[2] % 2,
                            bottom_offset: steps[3] % 3,
                        }),
                        vui_parameters: vui,
                    }
                },
            )
    })
}

proptest! {
    #[test]
    fn nothing_but_what_is_asked_for_changes(
        sps in parameter_set(),
        low_delay: bool,
        size in option::of((1..9u32, 1..9u32)),
    ) {
        let nal = oracle::write(0x67, &sps);
        let changes = Changes { visible: size, low_delay };
        prop_assert_eq!(oracle::read(&nal), Some(sps), "it can be compared");
        prop_assert!(oracle::check(&nal, changes).is_some(), "{:?}", Sps::parse(&nal));
    }
}
