// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pixel formats of pictures in plain memory.

/// How a pixel lies in memory, named by its bytes in the order of their addresses (as GStreamer
/// names it), on a little-endian machine.
///
/// A screen is opaque whatever its format says: formats with alpha are those without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PixelFormat {
    /// Blue, green, red, nothing.
    Bgrx,
    /// Red, green, blue, nothing.
    Rgbx,
    /// Nothing, red, green, blue.
    Xrgb,
    /// Nothing, blue, green, red.
    Xbgr,
    /// Blue, green, red.
    Bgr,
    /// Red, green, blue.
    Rgb,
    /// 16-bit words of 5 bits red, 6 bits green, 5 bits blue.
    Rgb16,
    /// 16-bit words of 5 bits each, red in the highest ones.
    Rgb15,
}

impl PixelFormat {
    /// The format of a pixman format code (`PIXMAN_FORMAT` in pixman.h: bits per pixel, type and
    /// the bits of each channel; pixman's names are those of words, most significant bits first).
    pub fn from_pixman(code: u32) -> Option<Self> {
        match code {
            // x8r8g8b8, a8r8g8b8
            0x2002_0888 | 0x2002_8888 => Some(Self::Bgrx),
            // x8b8g8r8, a8b8g8r8
            0x2003_0888 | 0x2003_8888 => Some(Self::Rgbx),
            // b8g8r8x8, b8g8r8a8
            0x2008_0888 | 0x2008_8888 => Some(Self::Xrgb),
            // r8g8b8x8, r8g8b8a8
            0x2009_0888 | 0x2009_8888 => Some(Self::Xbgr),
            // r8g8b8
            0x1802_0888 => Some(Self::Bgr),
            // b8g8r8
            0x1803_0888 => Some(Self::Rgb),
            // r5g6b5
            0x1002_0565 => Some(Self::Rgb16),
            // x1r5g5b5
            0x1002_0555 => Some(Self::Rgb15),
            _ => None,
        }
    }

    /// The format of a DRM one (drm_fourcc.h; its names are those of little-endian words, most
    /// significant bits first).
    pub fn from_fourcc(fourcc: u32) -> Option<Self> {
        match &fourcc.to_le_bytes() {
            b"XR24" | b"AR24" => Some(Self::Bgrx),
            b"XB24" | b"AB24" => Some(Self::Rgbx),
            b"BX24" | b"BA24" => Some(Self::Xrgb),
            b"RX24" | b"RA24" => Some(Self::Xbgr),
            b"RG24" => Some(Self::Bgr),
            b"BG24" => Some(Self::Rgb),
            b"RG16" => Some(Self::Rgb16),
            b"XR15" => Some(Self::Rgb15),
            _ => None,
        }
    }

    /// Bytes of a pixel.
    pub fn bytes_per_pixel(self) -> usize {
        match self {
            Self::Bgrx | Self::Rgbx | Self::Xrgb | Self::Xbgr => 4,
            Self::Bgr | Self::Rgb => 3,
            Self::Rgb16 | Self::Rgb15 => 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `PIXMAN_FORMAT(bpp, type, a, r, g, b)` of pixman.h.
    fn code(bpp: u32, kind: u32, bits: u32) -> u32 {
        (bpp << 24) | (kind << 16) | bits
    }

    #[test]
    fn words_become_bytes_the_other_way_round() {
        // Types of pixman.h: 2 = ARGB, 3 = ABGR, 8 = BGRA, 9 = RGBA.
        for (code, format) in [
            (code(32, 2, 0x0888), PixelFormat::Bgrx),
            (code(32, 2, 0x8888), PixelFormat::Bgrx),
            (code(32, 3, 0x0888), PixelFormat::Rgbx),
            (code(32, 8, 0x0888), PixelFormat::Xrgb),
            (code(32, 9, 0x8888), PixelFormat::Xbgr),
            (code(24, 2, 0x0888), PixelFormat::Bgr),
            (code(24, 3, 0x0888), PixelFormat::Rgb),
            (code(16, 2, 0x0565), PixelFormat::Rgb16),
            (code(16, 2, 0x0555), PixelFormat::Rgb15),
        ] {
            assert_eq!(PixelFormat::from_pixman(code), Some(format), "{code:#x}");
        }
        assert_eq!(PixelFormat::from_pixman(0), None);
        assert_eq!(PixelFormat::from_pixman(code(8, 1, 0x8000)), None);
    }

    #[test]
    fn a_format_has_the_same_bytes_whoever_names_it() {
        // DRM's and pixman's names are both those of words (L9).
        for (fourcc, code) in [
            (b"XR24", code(32, 2, 0x0888)),
            (b"AB24", code(32, 3, 0x8888)),
            (b"BX24", code(32, 8, 0x0888)),
            (b"RA24", code(32, 9, 0x8888)),
            (b"RG24", code(24, 2, 0x0888)),
            (b"BG24", code(24, 3, 0x0888)),
            (b"RG16", code(16, 2, 0x0565)),
            (b"XR15", code(16, 2, 0x0555)),
        ] {
            let format = PixelFormat::from_fourcc(u32::from_le_bytes(*fourcc));
            assert!(format.is_some());
            assert_eq!(format, PixelFormat::from_pixman(code));
        }
        assert_eq!(PixelFormat::from_fourcc(u32::from_le_bytes(*b"NV12")), None);
    }

    #[test]
    fn sizes_agree_with_the_code() {
        for code in [0x2002_0888u32, 0x1802_0888, 0x1002_0565, 0x1002_0555] {
            let format = PixelFormat::from_pixman(code).unwrap();
            assert_eq!(format.bytes_per_pixel() as u32 * 8, code >> 24);
        }
    }
}
