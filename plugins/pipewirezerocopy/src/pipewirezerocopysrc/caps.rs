// SPDX-License-Identifier: MIT OR Apache-2.0

//! Caps: what can leave at all, and what a format that the producer has fixed leaves as.

use gst::glib::translate::FromGlib;
use gst::prelude::*;
use gst_allocators::CAPS_FEATURE_MEMORY_DMABUF;
use gst_video::{
    VideoCapsBuilder, VideoColorMatrix, VideoColorPrimaries, VideoColorRange, VideoColorimetry,
    VideoFormat, VideoInfo, VideoTransferFunction,
};

use super::abilities::Abilities;
use super::gpu::{drm_format, from_drm_format};
use super::settings::Wanted;
use crate::capture::dmabuf::{IMPLICIT, LINEAR};
use crate::capture::negotiate::Color;
use crate::capture::{PixelFormat, StreamFormat};
use crate::cuda::MEMORY_FEATURE;

/// The format of caps that say a DRM format and a modifier, known from GStreamer 1.24 on.
pub(super) const DMA_DRM: &str = "DMA_DRM";
pub(super) const SAYS_MODIFIERS: bool = cfg!(feature = "v1_24");

/// In which memory buffers leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OutputMemory {
    System,
    DmaBuf,
    Cuda,
}

impl OutputMemory {
    /// Its name in statistics and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::DmaBuf => "dmabuf",
            Self::Cuda => "cuda",
        }
    }
}

/// The same format in GStreamer, which names it alike.
pub(super) fn video_format(format: PixelFormat) -> VideoFormat {
    VideoFormat::from_string(format.name())
}

/// Everything that the element can put out somewhere, in the memories that are wanted.
pub(super) fn somewhere(wanted: Wanted) -> gst::Caps {
    let mut caps = gst::Caps::new_empty();
    let writable = caps.make_mut();
    if wanted.cuda {
        writable.append(cuda(&CUDA_FORMATS));
    }
    if wanted.dmabuf && SAYS_MODIFIERS {
        writable.append(dma_drm(None));
    }
    if wanted.dmabuf {
        writable.append(plain_dmabuf(&PixelFormat::ALL.map(video_format)));
    }
    if wanted.system {
        writable.append(system());
    }
    caps
}

pub(super) fn system() -> gst::Caps {
    VideoCapsBuilder::new()
        .format_list(PixelFormat::ALL.map(video_format))
        .build()
}

/// The formats that CUDA memory can have: those of libgstcuda that are copied byte by byte.
pub(super) const CUDA_FORMATS: [PixelFormat; 7] = [
    PixelFormat::Bgra,
    PixelFormat::Rgba,
    PixelFormat::Argb,
    PixelFormat::Abgr,
    PixelFormat::Bgrx,
    PixelFormat::Rgbx,
    PixelFormat::Nv12,
];

pub(super) fn cuda(formats: &[PixelFormat]) -> gst::Caps {
    VideoCapsBuilder::new()
        .features([MEMORY_FEATURE])
        .format_list(formats.iter().copied().map(video_format))
        .build()
}

pub(super) fn plain_dmabuf(formats: &[VideoFormat]) -> gst::Caps {
    VideoCapsBuilder::new()
        .features([CAPS_FEATURE_MEMORY_DMABUF])
        .format_list(formats.iter().copied())
        .build()
}

/// Caps with these DRM formats, or with any.
pub(super) fn dma_drm(formats: Option<Vec<String>>) -> gst::Caps {
    let mut caps = plain_dmabuf(&[VideoFormat::Bgrx]);
    if let Some(structure) = caps.make_mut().structure_mut(0) {
        structure.set("format", DMA_DRM);
        if let Some(formats) = formats {
            structure.set("drm-format", gst::List::new(formats));
        }
    }
    caps
}

/// Whether caps with these features are for CUDA memory.
pub(super) fn is_cuda(features: &gst::CapsFeaturesRef) -> bool {
    features.contains(MEMORY_FEATURE)
}

/// Whether caps with these features are for DMA-BUFs.
pub(super) fn is_dmabuf(features: &gst::CapsFeaturesRef) -> bool {
    features.contains(CAPS_FEATURE_MEMORY_DMABUF)
}

/// The memory that fixed caps say, and size, colours and layout of pictures in it. For DMA-BUFs the
/// layout is a guess, which the buffers' GstVideoMeta puts right.
pub(super) fn video_info(caps: &gst::CapsRef) -> Option<(OutputMemory, VideoInfo)> {
    if caps.features(0).is_some_and(is_cuda) {
        return Some((OutputMemory::Cuda, VideoInfo::from_caps(caps).ok()?));
    }
    if !caps.features(0).is_some_and(is_dmabuf) {
        return Some((OutputMemory::System, VideoInfo::from_caps(caps).ok()?));
    }
    let mut plain = caps.structure(0)?.to_owned();
    // Without 1.24, gst_video_info_from_caps() does not know the format.
    if let Ok(name) = plain.get::<String>("drm-format") {
        plain.set("format", from_drm_format(&name)?.0.name());
        plain.remove_field("drm-format");
    }
    let plain: gst::Caps = [plain].into_iter().collect();
    Some((OutputMemory::DmaBuf, VideoInfo::from_caps(&plain).ok()?))
}

/// Caps for frames of `format` as far as `allowed` lets them be, or none.
///
/// DMA-BUFs leave in CUDA memory or as they are where they can, whichever comes first in `allowed`, else as
/// copies in system memory. Any framerate that downstream fixes is taken: capture follows the screen's changes whatever the caps say. Where
/// downstream leaves it open, it is the producer's.
pub(super) fn caps_for(
    format: &StreamFormat,
    allowed: &gst::Caps,
    can: &Abilities,
) -> Option<gst::Caps> {
    let names = [Some(format.format), format.format.sibling()];
    let names = names.into_iter().flatten();
    let Some(modifier) = format.modifier else {
        return names
            .filter(|_| can.system)
            .find_map(|name| fitting(format, name, plain_fields(name), allowed));
    };
    let dmabuf = || {
        // Padding cannot leave as alpha without a copy.
        let names = names
            .clone()
            .filter(|name| *name == format.format || name.alpha_byte().is_none());
        let feature = || gst::CapsFeatures::new([CAPS_FEATURE_MEMORY_DMABUF]);
        names.flat_map(move |name| {
            let drm = drm_format(name, modifier).filter(|_| SAYS_MODIFIERS);
            let drm = drm.map(|drm| {
                gst::Structure::builder("video/x-raw")
                    .field("format", DMA_DRM)
                    .field("drm-format", drm)
                    .build()
            });
            let plain = [LINEAR, IMPLICIT].contains(&modifier);
            let plain = plain.then(|| plain_fields(name).0);
            let both = drm.into_iter().chain(plain);
            both.map(move |fields| (name, (fields, feature())))
        })
    };
    let copied = can.copyable(format.format).contains(&modifier);
    let copied = names
        .clone()
        // What the GPU copies, it copies as it is.
        .filter(|name| *name == format.format || name.alpha_byte().is_none())
        .filter(|name| copied && CUDA_FORMATS.contains(name))
        .find_map(|name| {
            let feature = gst::CapsFeatures::new([MEMORY_FEATURE]);
            fitting(format, name, (plain_fields(name).0, feature), allowed)
        });
    let passed = can.passable(format.format).contains(&modifier);
    let passed = passed
        .then(dmabuf)
        .into_iter()
        .flatten()
        .find_map(|(name, fields)| fitting(format, name, fields, allowed));
    let place = |caps: &gst::Caps| {
        let (kind, memory) = caps.structure(0).zip(caps.features(0))?;
        let mut kinds = allowed.iter_with_features();
        kinds.position(|(other, features)| features.is_equal(memory) && other.can_intersect(kind))
    };
    let as_dmabuf = copied.into_iter().chain(passed).min_by_key(place);
    as_dmabuf.or_else(|| {
        let read = can.readable(format.format).contains(&modifier);
        names
            .filter(|_| read)
            .find_map(|name| fitting(format, name, plain_fields(name), allowed))
    })
}

/// What caps say of format and memory.
type Fields = (gst::Structure, gst::CapsFeatures);

fn plain_fields(name: PixelFormat) -> Fields {
    let fields = gst::Structure::builder("video/x-raw").field("format", name.name());
    let memory = gst::CapsFeatures::new([gst::CAPS_FEATURE_MEMORY_SYSTEM_MEMORY]);
    (fields.build(), memory)
}

/// Caps for frames of `format` that leave under the name `name`, if `allowed` lets them.
fn fitting(
    format: &StreamFormat,
    name: PixelFormat,
    (mut fields, features): Fields,
    allowed: &gst::Caps,
) -> Option<gst::Caps> {
    let rate = fraction(format.framerate);
    fields.set("width", format.width as i32);
    fields.set("height", format.height as i32);
    fields.set("pixel-aspect-ratio", gst::Fraction::new(1, 1));
    fields.set("interlace-mode", "progressive");
    let rates = gst::FractionRange::new(gst::Fraction::new(0, 1), gst::Fraction::new(i32::MAX, 1));
    fields.set("framerate", rates);
    if let Some(max) = format.max_framerate.filter(|_| rate.numer() == 0) {
        fields.set("max-framerate", fraction(max));
    }
    if let Some(colorimetry) = colorimetry(format, name) {
        fields.set("colorimetry", colorimetry.to_string());
    }
    let mut wanted = gst::Caps::new_empty();
    wanted
        .get_mut()?
        .append_structure_full(fields, Some(features));
    let mut caps = wanted.intersect_with_mode(allowed, gst::CapsIntersectMode::First);
    // What is information, or a guess, downstream need not agree with.
    let guessed = format.color == Color::default();
    for field in ["max-framerate", "colorimetry"] {
        if caps.is_empty() && (guessed || field != "colorimetry") {
            wanted.get_mut()?.structure_mut(0)?.remove_field(field);
            caps = wanted.intersect_with_mode(allowed, gst::CapsIntersectMode::First);
        }
    }
    if caps.is_empty() {
        return None;
    }
    caps.truncate();
    let structure = caps.get_mut()?.structure_mut(0)?;
    // Where 0/1 is not among what downstream takes: the nearest to what can come.
    let nearest = if rate.numer() == 0 && !allows_variable(structure) {
        format.max_framerate.map_or(rate, fraction)
    } else {
        rate
    };
    structure.fixate_field_nearest_fraction("framerate", nearest);
    if structure
        .get::<gst::Fraction>("framerate")
        .is_ok_and(|rate| rate.numer() > 0)
    {
        structure.remove_field("max-framerate");
    }
    caps.fixate();
    Some(caps)
}

/// What the producer says of its colours, and GStreamer's own guess where it says nothing.
fn colorimetry(format: &StreamFormat, name: PixelFormat) -> Option<VideoColorimetry> {
    let info = VideoInfo::builder(video_format(name), format.width, format.height).build();
    let guess = info.ok()?.colorimetry();
    let Color {
        range,
        matrix,
        transfer,
        primaries,
    } = format.color;
    // SAFETY: Converting a number only wraps it: one that GStreamer does not know becomes an
    // unknown value of the enumeration. The numbers are the same in both worlds.
    let (range, matrix, transfer, primaries) = unsafe {
        (
            VideoColorRange::from_glib(range as i32),
            VideoColorMatrix::from_glib(matrix as i32),
            VideoTransferFunction::from_glib(transfer as i32),
            VideoColorPrimaries::from_glib(primaries as i32),
        )
    };
    // RGB has no other matrix, and GStreamer knows no other range of it.
    let rgb = guess.matrix() == VideoColorMatrix::Rgb;
    let unknown_range = matches!(
        range,
        VideoColorRange::Unknown | VideoColorRange::__Unknown(_)
    );
    let unknown_matrix = matches!(
        matrix,
        VideoColorMatrix::Unknown | VideoColorMatrix::Rgb | VideoColorMatrix::__Unknown(_)
    );
    let unknown_transfer = matches!(
        transfer,
        VideoTransferFunction::Unknown | VideoTransferFunction::__Unknown(_)
    );
    let unknown_primaries = matches!(
        primaries,
        VideoColorPrimaries::Unknown | VideoColorPrimaries::__Unknown(_)
    );
    let choose = |unknown| rgb || unknown;
    Some(VideoColorimetry::new(
        if choose(unknown_range) {
            guess.range()
        } else {
            range
        },
        if choose(unknown_matrix) {
            guess.matrix()
        } else {
            matrix
        },
        if unknown_transfer {
            guess.transfer()
        } else {
            transfer
        },
        if unknown_primaries {
            guess.primaries()
        } else {
            primaries
        },
    ))
}

fn allows_variable(structure: &gst::StructureRef) -> bool {
    structure.value("framerate").is_ok_and(|allowed| {
        allowed
            .intersect(&gst::Fraction::new(0, 1).to_value())
            .is_some()
    })
}

fn fraction((num, den): (u32, u32)) -> gst::Fraction {
    let limit = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    gst::Fraction::new(limit(num), limit(den.max(1)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::abilities::{Refusal, Use};
    use super::super::gpu::Importable;
    use super::*;
    use crate::egl::Format;
    use std::str::FromStr;

    fn caps(text: &str) -> gst::Caps {
        gst::init().unwrap();
        gst::Caps::from_str(text).unwrap()
    }

    /// No GPU, and no wish to leave anything out.
    pub fn able() -> Abilities {
        Abilities {
            system: true,
            dmabuf: true,
            cuda: false,
            gpu: None,
            refused: Vec::new(),
        }
    }

    /// The same with a GPU that imports BGRx and BGRA, in a tiling of its own or linear.
    pub fn with_gpu() -> Abilities {
        let format = |format: PixelFormat| Format {
            fourcc: format.fourcc(),
            modifiers: vec![7, LINEAR],
            external: Vec::new(),
        };
        let formats = [PixelFormat::Bgrx, PixelFormat::Bgra].map(format);
        Abilities {
            gpu: Some(Importable(formats.to_vec())),
            ..able()
        }
    }

    /// `text` as far as the element can do that.
    pub fn allowed(text: &str, can: &Abilities) -> gst::Caps {
        caps(text).intersect_with_mode(&can.caps(), gst::CapsIntersectMode::First)
    }

    fn caps_to(format: &StreamFormat, text: &str) -> Option<gst::Caps> {
        caps_for(format, &allowed(text, &able()), &able())
    }

    fn mutter() -> StreamFormat {
        StreamFormat {
            format: PixelFormat::Bgrx,
            width: 1280,
            height: 720,
            framerate: (0, 1),
            max_framerate: Some((60, 1)),
            color: Color::default(),
            modifier: None,
        }
    }

    fn colorimetry_of(caps: &gst::Caps) -> String {
        caps.structure(0).unwrap().get("colorimetry").unwrap()
    }

    fn framerate(caps: &gst::Caps) -> gst::Fraction {
        caps.structure(0).unwrap().get("framerate").unwrap()
    }

    #[test]
    fn gstreamer_knows_every_format_by_its_name() {
        for format in PixelFormat::ALL {
            assert_ne!(video_format(format), VideoFormat::Unknown);
        }
    }

    #[test]
    fn any_framerate_that_downstream_fixes_is_put_on_the_caps() {
        let got = caps_to(&mutter(), "video/x-raw,framerate=25/1").unwrap();
        assert_eq!(framerate(&got), gst::Fraction::new(25, 1));
        assert!(!got.structure(0).unwrap().has_field("max-framerate"));
    }

    #[test]
    fn an_open_framerate_stays_the_producers() {
        let got = caps_to(&mutter(), "video/x-raw").unwrap();
        assert_eq!(framerate(&got), gst::Fraction::new(0, 1));
        let max: gst::Fraction = got.structure(0).unwrap().get("max-framerate").unwrap();
        assert_eq!(max, gst::Fraction::new(60, 1));
        let got = caps_to(&mutter(), "video/x-raw,framerate=[1/1,30/1]").unwrap();
        assert_eq!(framerate(&got), gst::Fraction::new(30, 1));
    }

    #[test]
    fn a_maximum_that_downstream_does_not_share_is_left_out() {
        let got = caps_to(&mutter(), "video/x-raw,max-framerate=30/1").unwrap();
        assert_eq!(framerate(&got), gst::Fraction::new(0, 1));
    }

    #[test]
    fn siblings_stand_for_each_other_but_other_formats_do_not() {
        let got = caps_to(&mutter(), "video/x-raw,format=BGRA").unwrap();
        assert_eq!(got.structure(0).unwrap().get::<&str>("format"), Ok("BGRA"));
        let got = caps_to(&mutter(), "video/x-raw,format={BGRA,BGRx}").unwrap();
        assert_eq!(got.structure(0).unwrap().get::<&str>("format"), Ok("BGRx"));
        assert!(caps_to(&mutter(), "video/x-raw,format=RGBA").is_none());
        assert!(caps_to(&mutter(), "video/x-raw,width=640").is_none());
    }

    #[test]
    fn colours_are_said_as_the_producer_says_them_or_guessed() {
        let caps_to_any = |format: &StreamFormat| caps_to(format, "video/x-raw");
        let got = caps_to_any(&mutter()).unwrap();
        assert_eq!(colorimetry_of(&got), "sRGB");
        let nv12 = StreamFormat {
            format: PixelFormat::Nv12,
            ..mutter()
        };
        assert_eq!(colorimetry_of(&caps_to_any(&nv12).unwrap()), "bt709");
        let full = StreamFormat {
            // SPA_VIDEO_COLOR_RANGE_0_255, _MATRIX_BT601, SPA_VIDEO_TRANSFER_BT709, an unknown one
            color: Color {
                range: 1,
                matrix: 4,
                transfer: 5,
                primaries: 999,
            },
            ..nv12
        };
        assert_eq!(colorimetry_of(&caps_to_any(&full).unwrap()), "1:4:5:1");
        let odd = StreamFormat {
            color: full.color,
            ..mutter()
        };
        assert_eq!(colorimetry_of(&caps_to_any(&odd).unwrap()), "1:1:5:1");
    }

    #[test]
    fn a_guess_of_colours_gives_way_and_what_the_producer_says_does_not() {
        let other = "video/x-raw,colorimetry=bt601";
        assert_eq!(colorimetry_of(&caps_to(&mutter(), other).unwrap()), "bt601");
        let sure = StreamFormat {
            color: Color {
                transfer: 7,
                ..Color::default()
            },
            ..mutter()
        };
        assert!(caps_to(&sure, other).is_none());
    }

    fn in_dmabufs(modifier: u64) -> StreamFormat {
        StreamFormat {
            modifier: Some(modifier),
            ..mutter()
        }
    }

    fn memory(caps: &gst::Caps) -> OutputMemory {
        video_info(caps).unwrap().0
    }

    #[test]
    fn only_what_can_leave_is_in_caps() {
        gst::init().unwrap();
        let is_dmabuf = |caps: &gst::Caps| caps.iter_with_features().any(|(_, f)| is_dmabuf(f));
        assert!(!is_dmabuf(&able().caps()), "there is no GPU");
        let can = with_gpu();
        assert!(is_dmabuf(&can.caps()));
        assert!(can.caps().is_subset(&somewhere(Wanted::ALL)));
        let strict = Abilities {
            system: false,
            ..can
        };
        assert!(
            strict
                .caps()
                .iter_with_features()
                .all(|(_, f)| super::is_dmabuf(f))
        );
        let rgba = caps("video/x-raw(memory:DMABuf),format=RGBA");
        assert!(
            !rgba.can_intersect(&strict.caps()),
            "this GPU does not import it"
        );
    }

    #[test]
    fn dmabufs_are_passed_on_where_caps_can_say_what_they_are() {
        let can = with_gpu();
        let plain = allowed("video/x-raw(memory:DMABuf),format=BGRx; video/x-raw", &can);
        for modifier in [LINEAR, IMPLICIT] {
            let got = caps_for(&in_dmabufs(modifier), &plain, &can).unwrap();
            assert_eq!(memory(&got), OutputMemory::DmaBuf);
            assert_eq!(got.structure(0).unwrap().get::<&str>("format"), Ok("BGRx"));
        }
        let got = caps_for(&in_dmabufs(7), &plain, &can).unwrap();
        assert_eq!(memory(&got), OutputMemory::System, "it is read");
        assert!(caps_for(&in_dmabufs(9), &plain, &can).is_none());
        let alpha = allowed("video/x-raw(memory:DMABuf),format=BGRA", &can);
        assert!(caps_for(&in_dmabufs(LINEAR), &alpha, &can).is_none());
    }

    #[test]
    fn downstreams_order_decides_between_cuda_memory_and_dmabufs() {
        let can = Abilities {
            cuda: true,
            ..with_gpu()
        };
        let (cuda, dmabuf) = (
            "video/x-raw(memory:CUDAMemory),format=BGRx",
            "video/x-raw(memory:DMABuf),format=BGRx",
        );
        for (text, first) in [
            (format!("{cuda};{dmabuf}"), OutputMemory::Cuda),
            (format!("{dmabuf};{cuda}"), OutputMemory::DmaBuf),
        ] {
            let got = caps_for(&in_dmabufs(LINEAR), &allowed(&text, &can), &can).unwrap();
            assert_eq!(memory(&got), first, "{text}");
        }
        // What is first may be of another kind.
        let text = format!("video/x-raw(memory:DMABuf),format=RGBA;{cuda}");
        let got = caps_for(&in_dmabufs(LINEAR), &allowed(&text, &can), &can).unwrap();
        assert_eq!(memory(&got), OutputMemory::Cuda);
    }

    #[test]
    fn modifiers_have_names_from_gstreamer_1_24_on() {
        let can = with_gpu();
        let all = can.caps();
        let got = caps_for(&in_dmabufs(7), &all, &can).unwrap();
        if !SAYS_MODIFIERS {
            assert_eq!(memory(&got), OutputMemory::System);
            return;
        }
        let structure = got.structure(0).unwrap();
        assert_eq!(structure.get::<&str>("format"), Ok(DMA_DRM));
        assert_eq!(
            structure.get::<&str>("drm-format"),
            Ok("XR24:0x0000000000000007")
        );
        let (memory, info) = video_info(&got).unwrap();
        assert_eq!(memory, OutputMemory::DmaBuf);
        assert_eq!(info.format(), VideoFormat::Bgrx);
        assert_eq!((info.width(), info.height()), (1280, 720));
    }

    #[test]
    fn a_refused_modifier_is_read_instead() {
        let mut can = with_gpu();
        can.refused.push(Refusal {
            format: PixelFormat::Bgrx,
            modifier: LINEAR,
            what: Use::PassOn,
        });
        let both = allowed("video/x-raw(memory:DMABuf),format=BGRx; video/x-raw", &can);
        let got = caps_for(&in_dmabufs(LINEAR), &both, &can).unwrap();
        assert_eq!(memory(&got), OutputMemory::System);
        can.refused.push(Refusal {
            what: Use::Read,
            ..can.refused[0]
        });
        assert!(caps_for(&in_dmabufs(LINEAR), &both, &can).is_none());
    }
}
