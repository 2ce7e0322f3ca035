// SPDX-License-Identifier: MIT OR Apache-2.0

//! From what QEMU gives and what downstream takes to caps.

use gst_video::{VideoCapsBuilder, VideoFormat};
use qemu_display::{MAX_SIZE, PixelFormat, Pixels};

/// All formats of pictures in plain memory; the usual one first.
const FORMATS: [PixelFormat; 8] = [
    PixelFormat::Bgrx,
    PixelFormat::Rgbx,
    PixelFormat::Xrgb,
    PixelFormat::Xbgr,
    PixelFormat::Bgr,
    PixelFormat::Rgb,
    PixelFormat::Rgb16,
    PixelFormat::Rgb15,
];

/// `DRM_FORMAT_*` of drm_fourcc.h whose GStreamer names are known without its DRM functions (they
/// come with 1.24), as caps before 1.24 say them.
const DRM_FORMATS: [(&[u8; 4], VideoFormat); 4] = [
    (b"XR24", VideoFormat::Bgrx),
    (b"AR24", VideoFormat::Bgra),
    (b"XB24", VideoFormat::Rgbx),
    (b"AB24", VideoFormat::Rgba),
];

/// `DRM_FORMAT_MOD_INVALID` of drm_fourcc.h: how the pixels lie is not said, and not known either.
const MOD_INVALID: u64 = 0x00ff_ffff_ffff_ffff;

/// `DRM_FORMAT_MOD_LINEAR` of drm_fourcc.h, and what passes for it before GStreamer 1.24.
#[cfg(not(feature = "v1_24"))]
const PLAIN_MODIFIERS: [u64; 2] = [0, MOD_INVALID];

/// The feature of caps with an overlay beside the picture.
const OVERLAY: &str = "meta:GstVideoOverlayComposition";

/// Of a picture, what caps say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    kind: Kind,
    width: u32,
    height: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw(PixelFormat),
    DmaBuf {
        fourcc: u32,
        modifier: u64,
        /// What a processor reads there, if it can.
        readable: Option<PixelFormat>,
        /// The last row lies first.
        flipped: bool,
    },
}

impl Form {
    pub fn of(pixels: &Pixels) -> Self {
        let (width, height) = pixels.size();
        let kind = match pixels {
            Pixels::Bytes { layout, .. } | Pixels::Shared { layout, .. } => {
                Kind::Raw(layout.format)
            }
            Pixels::DmaBuf { buffer, .. } => Kind::DmaBuf {
                fourcc: buffer.fourcc,
                modifier: buffer.modifier,
                readable: buffer.layout().map(|layout| layout.format),
                flipped: buffer.flipped,
            },
        };
        Self {
            kind,
            width,
            height,
        }
    }

    pub fn is_dmabuf(&self) -> bool {
        matches!(self.kind, Kind::DmaBuf { .. })
    }

    /// Whether a frame in the memory that it came in is upside down.
    pub fn is_flipped(&self) -> bool {
        matches!(self.kind, Kind::DmaBuf { flipped: true, .. })
    }

    /// The same picture as a copy in plain memory, where one can be made of a DMA-BUF.
    pub fn in_memory(&self) -> Option<Self> {
        match self.kind {
            Kind::Raw(_) => None,
            Kind::DmaBuf { readable, .. } => Some(Self {
                kind: Kind::Raw(readable?),
                ..*self
            }),
        }
    }

    /// For messages.
    pub fn describe(&self) -> String {
        let (width, height) = (self.width, self.height);
        match self.kind {
            Kind::Raw(format) => format!("{width}x{height} pixels of {}", video_format(format)),
            Kind::DmaBuf {
                fourcc, modifier, ..
            } => {
                let name = String::from_utf8_lossy(&fourcc.to_le_bytes()).into_owned();
                format!("{width}x{height} pixels in a DMA-BUF of {name}, modifier {modifier:#x}")
            }
        }
    }

    /// Caps with all framerates, if there are any for this form.
    fn caps(&self, overlay: bool) -> Option<gst::Caps> {
        let builder = gst::Caps::builder("video/x-raw")
            .field("width", self.width as i32)
            .field("height", self.height as i32)
            .field("pixel-aspect-ratio", gst::Fraction::new(1, 1))
            .field("interlace-mode", "progressive")
            .field("framerate", any_framerate());
        let mut features = Vec::new();
        let builder = match self.kind {
            Kind::Raw(format) => builder.field("format", video_format(format).to_str()),
            Kind::DmaBuf {
                fourcc, modifier, ..
            } => {
                features.push("memory:DMABuf");
                dmabuf_fields(builder, fourcc, modifier)?
            }
        };
        if overlay {
            features.push(OVERLAY);
        }
        if features.is_empty() {
            return Some(builder.build());
        }
        Some(builder.features(features).build())
    }
}

#[cfg(feature = "v1_24")]
fn dmabuf_fields(
    builder: gst::caps::Builder<gst::caps::NoFeature>,
    fourcc: u32,
    modifier: u64,
) -> Option<gst::caps::Builder<gst::caps::NoFeature>> {
    if !has_drm_name(fourcc, modifier) {
        return None;
    }
    let format = gst_video::dma_drm_fourcc_to_string(fourcc, modifier);
    let builder = builder.field("format", "DMA_DRM");
    Some(builder.field("drm-format", format.as_str()))
}

#[cfg(not(feature = "v1_24"))]
fn dmabuf_fields(
    builder: gst::caps::Builder<gst::caps::NoFeature>,
    fourcc: u32,
    modifier: u64,
) -> Option<gst::caps::Builder<gst::caps::NoFeature>> {
    let plain = PLAIN_MODIFIERS.contains(&modifier);
    let format = drm_video_format(fourcc).filter(|_| plain)?;
    Some(builder.field("format", format.to_str()))
}

/// Whether `drm-format` can say it; GStreamer's function takes nothing else.
#[cfg(any(feature = "v1_24", test))]
fn has_drm_name(fourcc: u32, modifier: u64) -> bool {
    fourcc != 0 && modifier != MOD_INVALID
}

/// The GStreamer format of a DRM one, if it is a common one.
pub(super) fn drm_video_format(fourcc: u32) -> Option<VideoFormat> {
    let found = DRM_FORMATS
        .iter()
        .find(|(code, _)| u32::from_le_bytes(**code) == fourcc);
    found.map(|(_, format)| *format)
}

/// The same format in GStreamer.
pub(super) fn video_format(format: PixelFormat) -> VideoFormat {
    match format {
        PixelFormat::Bgrx => VideoFormat::Bgrx,
        PixelFormat::Rgbx => VideoFormat::Rgbx,
        PixelFormat::Xrgb => VideoFormat::Xrgb,
        PixelFormat::Xbgr => VideoFormat::Xbgr,
        PixelFormat::Bgr => VideoFormat::Bgr,
        PixelFormat::Rgb => VideoFormat::Rgb,
        PixelFormat::Rgb16 => VideoFormat::Rgb16,
        PixelFormat::Rgb15 => VideoFormat::Rgb15,
    }
}

fn any_framerate() -> gst::FractionRange {
    gst::FractionRange::new(gst::Fraction::new(0, 1), gst::Fraction::new(i32::MAX, 1))
}

/// Everything that the element can put out.
pub(super) fn template() -> gst::Caps {
    let raw = || {
        VideoCapsBuilder::new()
            .format_list(FORMATS.map(video_format))
            .width_range(1..=MAX_SIZE as i32)
            .height_range(1..=MAX_SIZE as i32)
    };
    let mut caps = raw().build();
    caps.merge(raw().features([OVERLAY]).build());
    for features in [vec!["memory:DMABuf"], vec!["memory:DMABuf", OVERLAY]] {
        let dmabuf = gst::Caps::builder("video/x-raw")
            .field("width", gst::IntRange::new(1, MAX_SIZE as i32))
            .field("height", gst::IntRange::new(1, MAX_SIZE as i32))
            .field("framerate", any_framerate());
        #[cfg(feature = "v1_24")]
        let dmabuf = dmabuf.field("format", "DMA_DRM");
        #[cfg(not(feature = "v1_24"))]
        let dmabuf = dmabuf.field(
            "format",
            gst::List::new(DRM_FORMATS.map(|(_, format)| format.to_str().to_string())),
        );
        caps.merge(dmabuf.features(features).build());
    }
    caps
}

/// Caps for pictures of `form` as far as `allowed` lets them be, and whether they come with an
/// overlay, which they do if that is `wanted` and possible. None if downstream takes no such
/// pictures.
///
/// Any framerate that downstream fixes is taken: frames leave when the screen changes. Where it
/// leaves that open, the caps say so and give `most`, the limit that is kept.
pub(super) fn caps_for(
    form: &Form,
    allowed: &gst::Caps,
    most: Option<gst::Fraction>,
    wanted: bool,
) -> Option<(gst::Caps, bool)> {
    let first = wanted.then_some(true).into_iter();
    first.chain([false]).find_map(|overlay| {
        let possible = form.caps(overlay)?;
        let mut caps = possible.intersect_with_mode(allowed, gst::CapsIntersectMode::First);
        if caps.is_empty() {
            return None;
        }
        caps.truncate();
        let structure = caps.make_mut().structure_mut(0)?;
        structure.fixate_field_nearest_fraction("framerate", gst::Fraction::new(0, 1));
        let variable = structure
            .get::<gst::Fraction>("framerate")
            .is_ok_and(|rate| rate.numer() == 0);
        if let Some(most) = most.filter(|_| variable && !structure.has_field("max-framerate")) {
            structure.set("max-framerate", most);
        }
        caps.fixate();
        Some((caps, overlay))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::str::FromStr;

    fn most() -> gst::Fraction {
        gst::Fraction::new(60, 1)
    }

    fn form(kind: Kind) -> Form {
        gst::init().unwrap();
        Form {
            kind,
            width: 640,
            height: 480,
        }
    }

    fn bgrx() -> Form {
        form(Kind::Raw(PixelFormat::Bgrx))
    }

    fn caps(form: &Form, allowed: &str, wanted: bool) -> Option<(gst::Caps, bool)> {
        let allowed = gst::Caps::from_str(allowed).unwrap();
        caps_for(form, &allowed, Some(most()), wanted)
    }

    #[test]
    fn an_open_framerate_is_said_to_vary() {
        let (caps, overlay) = caps(&bgrx(), "ANY", false).unwrap();
        assert!(!overlay && caps.is_fixed());
        let structure = caps.structure(0).unwrap();
        let zero = gst::Fraction::new(0, 1);
        assert_eq!(structure.get::<gst::Fraction>("framerate"), Ok(zero));
        assert_eq!(structure.get::<gst::Fraction>("max-framerate"), Ok(most()));
        assert_eq!(structure.get::<&str>("format"), Ok("BGRx"));
    }

    #[test]
    fn a_framerate_that_downstream_fixes_is_taken() {
        let (caps, _) = caps(&bgrx(), "video/x-raw,framerate=30/1", false).unwrap();
        let structure = caps.structure(0).unwrap();
        let rate = structure.get::<gst::Fraction>("framerate").unwrap();
        assert_eq!(rate, gst::Fraction::new(30, 1));
        assert!(!structure.has_field("max-framerate"));
    }

    #[test]
    fn what_downstream_does_not_take_has_no_caps() {
        assert!(caps(&bgrx(), "video/x-raw,format=NV12", false).is_none());
        assert!(caps(&bgrx(), "video/x-raw,width=641", false).is_none());
        assert!(caps(&bgrx(), "video/x-raw(memory:DMABuf)", false).is_none());
    }

    #[test]
    fn an_overlay_goes_to_who_takes_it_and_wants_it() {
        let both = "video/x-raw;video/x-raw(meta:GstVideoOverlayComposition)";
        assert!(caps(&bgrx(), both, true).unwrap().1);
        assert!(!caps(&bgrx(), both, false).unwrap().1);
        assert!(!caps(&bgrx(), "video/x-raw", true).unwrap().1);
    }

    #[test]
    fn a_linear_dmabuf_has_caps() {
        let fourcc = u32::from_le_bytes(*b"XR24");
        let form = form(Kind::DmaBuf {
            fourcc,
            modifier: 0,
            readable: Some(PixelFormat::Bgrx),
            flipped: true,
        });
        let (caps, _) = caps(&form, "video/x-raw(memory:DMABuf)", false).unwrap();
        assert!(caps.is_subset(&template()), "{caps}");
        assert!(form.describe().contains("XR24"));
        assert_eq!(form.in_memory(), Some(bgrx()));
        assert!(form.is_flipped() && !bgrx().is_flipped());
    }

    #[test]
    fn a_dmabuf_whose_pixels_lie_nobody_says_how_has_no_drm_format() {
        let xr24 = u32::from_le_bytes(*b"XR24");
        assert!(has_drm_name(xr24, 0) && has_drm_name(xr24, 1 << 56));
        for (fourcc, modifier) in [(xr24, MOD_INVALID), (0, 0), (0, MOD_INVALID)] {
            assert!(!has_drm_name(fourcc, modifier));
            let form = form(Kind::DmaBuf {
                fourcc,
                modifier,
                readable: None,
                flipped: false,
            });
            let named = caps(&form, "video/x-raw(memory:DMABuf)", false).is_some();
            // Before GStreamer 1.24, caps say nothing of modifiers.
            let plain = cfg!(not(feature = "v1_24")) && fourcc == xr24;
            assert_eq!(named, plain, "{}", form.describe());
            assert_eq!(form.in_memory(), None);
        }
    }

    #[test]
    fn all_formats_are_in_the_template() {
        let template = template();
        for format in FORMATS {
            let (caps, _) = caps(&form(Kind::Raw(format)), "ANY", false).unwrap();
            assert!(caps.is_subset(&template), "{caps}");
        }
    }
}
