// SPDX-License-Identifier: MIT OR Apache-2.0

//! Known pictures.

use libspa::param::video::VideoFormat;

/// How pixels lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pixels {
    /// Blue first, and padding last.
    Bgrx,
    /// Red first, and alpha last.
    Rgba,
    /// Two planes.
    Nv12,
}

impl Pixels {
    const ALL: [Self; 3] = [Self::Bgrx, Self::Rgba, Self::Nv12];

    /// PipeWire's name.
    pub fn spa(self) -> VideoFormat {
        match self {
            Self::Bgrx => VideoFormat::BGRx,
            Self::Rgba => VideoFormat::RGBA,
            Self::Nv12 => VideoFormat::NV12,
        }
    }

    /// The one of that name, if it is one of these.
    pub fn from_spa(format: VideoFormat) -> Option<Self> {
        Self::ALL.into_iter().find(|pixels| pixels.spa() == format)
    }

    /// GStreamer's name and DRM's fourcc (drm_fourcc.h).
    pub fn names(self) -> [&'static str; 2] {
        match self {
            Self::Bgrx => ["BGRx", "XR24"],
            Self::Rgba => ["RGBA", "AB24"],
            Self::Nv12 => ["NV12", "NV12"],
        }
    }

    /// Bytes in a row, and rows, of each plane.
    pub fn planes(self, (width, height): (u32, u32)) -> Vec<(usize, usize)> {
        let (width, height) = (width as usize, height as usize);
        match self {
            Self::Bgrx | Self::Rgba => vec![(4 * width, height)],
            Self::Nv12 => vec![(width, height), (width, height / 2)],
        }
    }

    /// The byte of picture `number` at this place of a plane: no two rows, columns, planes or pictures are
    /// alike, as long as they are few.
    pub fn byte(self, number: u8, plane: usize, row: usize, column: usize) -> u8 {
        match (self, column % 4) {
            (Self::Nv12, _) => (number ^ (column as u8).wrapping_mul(3))
                .wrapping_add(row as u8)
                .wrapping_add(90 * plane as u8),
            (_, 0) => (column / 4) as u8,
            (_, 1) => row as u8,
            (_, 2) => number,
            _ => 0xff,
        }
    }
}
