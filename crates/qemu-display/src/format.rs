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

    /// Which bytes of a pixel are blue, green and red; none where they are parts of a word.
    fn channels(self) -> Option<[usize; 3]> {
        match self {
            Self::Bgrx | Self::Bgr => Some([0, 1, 2]),
            Self::Rgbx | Self::Rgb => Some([2, 1, 0]),
            Self::Xrgb => Some([3, 2, 1]),
            Self::Xbgr => Some([1, 2, 3]),
            Self::Rgb16 | Self::Rgb15 => None,
        }
    }

    /// Draws a premultiplied pixel of blue, green, red and alpha over an opaque one of this format.
    pub(crate) fn draw_over(self, pixel: &mut [u8], [blue, green, red, alpha]: [u8; 4]) {
        // Of `most` steps that a channel has.
        let over = |below: u16, above: u8, most: u16| {
            let shine = u32::from(below) * u32::from(255 - alpha);
            let own = u32::from(above) * u32::from(most);
            (shine + own + 127).div_euclid(255).min(most.into()) as u16
        };
        if let Some(channels) = self.channels() {
            for (at, above) in channels.into_iter().zip([blue, green, red]) {
                pixel[at] = over(pixel[at].into(), above, 255) as u8;
            }
            return;
        }
        let greens = if self == Self::Rgb16 { 6 } else { 5 };
        let word = u16::from_le_bytes([pixel[0], pixel[1]]);
        let most = (1 << greens) - 1;
        let blue = over(word & 31, blue, 31);
        let green = over(word >> 5 & most, green, most);
        let red = over(word >> (5 + greens) & 31, red, 31);
        let word = red << (5 + greens) | green << 5 | blue;
        pixel[..2].copy_from_slice(&word.to_le_bytes());
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

    #[test]
    fn a_pixel_is_drawn_over_another_whatever_the_unused_byte_says() {
        // 200 * 127 / 255 is 100; so is 100 * 255 / 255.
        let over = [50, 0, 120, 128];
        for (format, mut pixel, expected) in [
            (
                PixelFormat::Bgrx,
                vec![200, 200, 100, 0],
                vec![150, 100, 170, 0],
            ),
            (
                PixelFormat::Rgbx,
                vec![100, 200, 200, 9],
                vec![170, 100, 150, 9],
            ),
            (
                PixelFormat::Xrgb,
                vec![7, 100, 200, 200],
                vec![7, 170, 100, 150],
            ),
            (
                PixelFormat::Xbgr,
                vec![0, 200, 200, 100],
                vec![0, 150, 100, 170],
            ),
            (PixelFormat::Bgr, vec![200, 200, 100], vec![150, 100, 170]),
            (PixelFormat::Rgb, vec![100, 200, 200], vec![170, 100, 150]),
        ] {
            format.draw_over(&mut pixel, over);
            assert_eq!(pixel, expected, "{format:?}");
            format.draw_over(&mut pixel, [0; 4]);
            assert_eq!(pixel, expected, "nothing of {format:?}");
        }
        for (format, white, red) in [
            (PixelFormat::Rgb16, 0xffff_u16, 0xf800_u16),
            (PixelFormat::Rgb15, 0x7fff, 0x7c00),
        ] {
            let mut pixel = white.to_le_bytes();
            format.draw_over(&mut pixel, [0; 4]);
            assert_eq!(pixel, white.to_le_bytes());
            format.draw_over(&mut pixel, [0, 0, 255, 255]);
            assert_eq!(pixel, red.to_le_bytes());
        }
    }
}
