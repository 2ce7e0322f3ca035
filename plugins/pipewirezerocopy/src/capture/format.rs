// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pixel formats, and their names in each of the three worlds that a frame passes through.
//!
//! PipeWire (SPA) and GStreamer name the order of the bytes in memory. DRM names a little-endian
//! word, which reads the other way round. The same letters therefore mean different things: SPA's
//! `BGRA` is DRM's `ARGB8888`. Mapping by letter swaps red and blue (lesson L9), so the mapping is
//! written out here once, and nowhere else.

use libspa::param::video::VideoFormat;

/// A pixel format that this source can carry, named by the order of its bytes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The name says all there is: bytes in memory order, x = padding.
pub enum PixelFormat {
    Bgra,
    Rgba,
    Argb,
    Abgr,
    Bgrx,
    Rgbx,
    Xrgb,
    Xbgr,
    Bgr,
    Rgb,
    /// A plane of luma, then one of interleaved Cb and Cr at half size both ways.
    Nv12,
}

/// How one plane of a format relates to the frame's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaneShape {
    /// Bytes for each sample position of the plane.
    pub bytes_per_sample: usize,
    /// Frame pixels for each sample, in both directions.
    pub subsampling: usize,
}

impl PlaneShape {
    const fn packed(bytes_per_sample: usize) -> Self {
        Self {
            bytes_per_sample,
            subsampling: 1,
        }
    }

    /// Bytes of pixels in a row of this plane of a frame `width` pixels wide.
    pub fn row_bytes(self, width: u32) -> Option<usize> {
        (width as usize)
            .div_ceil(self.subsampling)
            .checked_mul(self.bytes_per_sample)
    }

    /// Rows of this plane of a frame `height` pixels high.
    pub fn rows(self, height: u32) -> usize {
        (height as usize).div_ceil(self.subsampling)
    }
}

impl PixelFormat {
    /// Every format, in the order in which they are offered when nobody prefers one: with
    /// padding first, because a desktop is opaque, and what GPUs draw natively before the rest.
    pub const ALL: [Self; 11] = [
        Self::Bgrx,
        Self::Bgra,
        Self::Rgbx,
        Self::Rgba,
        Self::Xrgb,
        Self::Argb,
        Self::Xbgr,
        Self::Abgr,
        Self::Nv12,
        Self::Bgr,
        Self::Rgb,
    ];

    /// The name that GStreamer and SPA share.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bgra => "BGRA",
            Self::Rgba => "RGBA",
            Self::Argb => "ARGB",
            Self::Abgr => "ABGR",
            Self::Bgrx => "BGRx",
            Self::Rgbx => "RGBx",
            Self::Xrgb => "xRGB",
            Self::Xbgr => "xBGR",
            Self::Bgr => "BGR",
            Self::Rgb => "RGB",
            Self::Nv12 => "NV12",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// The same format in PipeWire (`spa/param/video/raw.h`).
    pub const fn spa(self) -> VideoFormat {
        match self {
            Self::Bgra => VideoFormat::BGRA,
            Self::Rgba => VideoFormat::RGBA,
            Self::Argb => VideoFormat::ARGB,
            Self::Abgr => VideoFormat::ABGR,
            Self::Bgrx => VideoFormat::BGRx,
            Self::Rgbx => VideoFormat::RGBx,
            Self::Xrgb => VideoFormat::xRGB,
            Self::Xbgr => VideoFormat::xBGR,
            Self::Bgr => VideoFormat::BGR,
            Self::Rgb => VideoFormat::RGB,
            Self::Nv12 => VideoFormat::NV12,
        }
    }

    /// The format that PipeWire means, unless it is one that this source does not carry.
    pub fn from_spa(format: VideoFormat) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|candidate| candidate.spa() == format)
    }

    /// The same format as a DRM fourcc (`drm_fourcc.h`).
    pub const fn fourcc(self) -> u32 {
        u32::from_le_bytes(match self {
            Self::Bgra => *b"AR24", // DRM_FORMAT_ARGB8888
            Self::Rgba => *b"AB24", // DRM_FORMAT_ABGR8888
            Self::Argb => *b"BA24", // DRM_FORMAT_BGRA8888
            Self::Abgr => *b"RA24", // DRM_FORMAT_RGBA8888
            Self::Bgrx => *b"XR24", // DRM_FORMAT_XRGB8888
            Self::Rgbx => *b"XB24", // DRM_FORMAT_XBGR8888
            Self::Xrgb => *b"BX24", // DRM_FORMAT_BGRX8888
            Self::Xbgr => *b"RX24", // DRM_FORMAT_RGBX8888
            Self::Bgr => *b"RG24",  // DRM_FORMAT_RGB888
            Self::Rgb => *b"BG24",  // DRM_FORMAT_BGR888
            Self::Nv12 => *b"NV12", // DRM_FORMAT_NV12
        })
    }

    /// The format of that DRM fourcc.
    pub fn from_fourcc(fourcc: u32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|format| format.fourcc() == fourcc)
    }

    /// The format that differs only in whether the fourth byte is alpha or padding. The two
    /// stand for each other: who asks for one gets frames of the other under its name.
    pub const fn sibling(self) -> Option<Self> {
        Some(match self {
            Self::Bgra => Self::Bgrx,
            Self::Bgrx => Self::Bgra,
            Self::Rgba => Self::Rgbx,
            Self::Rgbx => Self::Rgba,
            Self::Argb => Self::Xrgb,
            Self::Xrgb => Self::Argb,
            Self::Abgr => Self::Xbgr,
            Self::Xbgr => Self::Abgr,
            Self::Bgr | Self::Rgb | Self::Nv12 => return None,
        })
    }

    /// Where in a pixel the alpha byte is, where there is one.
    pub const fn alpha_byte(self) -> Option<usize> {
        match self {
            Self::Bgra | Self::Rgba => Some(3),
            Self::Argb | Self::Abgr => Some(0),
            _ => None,
        }
    }

    /// The planes of a frame.
    pub const fn planes(self) -> &'static [PlaneShape] {
        const PACKED_4: &[PlaneShape] = &[PlaneShape::packed(4)];
        const PACKED_3: &[PlaneShape] = &[PlaneShape::packed(3)];
        const NV12: &[PlaneShape] = &[
            PlaneShape::packed(1),
            PlaneShape {
                bytes_per_sample: 2,
                subsampling: 2,
            },
        ];
        match self {
            Self::Bgr | Self::Rgb => PACKED_3,
            Self::Nv12 => NV12,
            _ => PACKED_4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drm_names_the_word_where_spa_names_the_bytes() {
        // The table of lesson L9, written from drm_fourcc.h and not from the code above.
        for (format, fourcc) in [
            (PixelFormat::Bgra, *b"AR24"),
            (PixelFormat::Rgba, *b"AB24"),
            (PixelFormat::Xrgb, *b"BX24"),
            (PixelFormat::Rgb, *b"BG24"),
        ] {
            assert_eq!(
                format.fourcc().to_le_bytes(),
                fourcc,
                "{} in DRM",
                format.name()
            );
        }
    }

    #[test]
    fn every_mapping_goes_both_ways() {
        for format in PixelFormat::ALL {
            assert_eq!(PixelFormat::from_spa(format.spa()), Some(format));
            assert_eq!(PixelFormat::from_fourcc(format.fourcc()), Some(format));
            assert_eq!(PixelFormat::from_name(format.name()), Some(format));
        }
        assert_eq!(PixelFormat::from_spa(VideoFormat::YUY2), None);
        assert_eq!(PixelFormat::from_fourcc(u32::from_le_bytes(*b"YUYV")), None);
    }

    #[test]
    fn siblings_are_mutual_and_differ_in_alpha_only() {
        for format in PixelFormat::ALL {
            if let Some(sibling) = format.sibling() {
                assert_eq!(sibling.sibling(), Some(format));
                assert_eq!(
                    sibling.name().to_lowercase().replace('a', "x"),
                    format.name().to_lowercase().replace('a', "x")
                );
                assert_ne!(
                    sibling.alpha_byte().is_some(),
                    format.alpha_byte().is_some()
                );
            }
        }
    }

    #[test]
    fn alpha_is_where_the_name_says() {
        for format in PixelFormat::ALL {
            let expected = if format == PixelFormat::Nv12 {
                None
            } else {
                format.name().find('A')
            };
            assert_eq!(format.alpha_byte(), expected, "{}", format.name());
        }
    }

    #[test]
    fn odd_sizes_round_chroma_up() {
        let [luma, chroma] = PixelFormat::Nv12.planes() else {
            panic!("NV12 has two planes");
        };
        assert_eq!((luma.row_bytes(5), luma.rows(3)), (Some(5), 3));
        assert_eq!((chroma.row_bytes(5), chroma.rows(3)), (Some(6), 2));
    }
}
