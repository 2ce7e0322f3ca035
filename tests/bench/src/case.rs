// SPDX-License-Identifier: MIT OR Apache-2.0

//! What one process measures: who does the work, on which pictures, at which pace.

use helix_protocol::message::PixelFormat;
use serde::{Deserialize, Serialize};

/// Who carries the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Contender {
    /// The source alone: what a measurement of an element contains and is not its own.
    Fakesink,
    /// The element.
    Vsockenc,
    /// A blocking socket, and nothing else in the process.
    Plain,
    /// The same, with each row sent from where it lies: what a picture with padding costs without
    /// a copy. NV12 only, which must be tight on the wire.
    Rows,
    /// The encoder that a machine without GPU would use instead.
    X264enc,
}

/// When the next frame goes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pace {
    /// As soon as it is taken; two may be open.
    Flow,
    /// When the one before is out.
    Single,
    /// 60 times a second, in turn with a bare socket in the same process.
    Paced,
}

/// A raw format of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Format {
    /// 4 bytes a pixel.
    Bgra,
    /// 1.5 bytes a pixel.
    Nv12,
}

/// A picture's layout in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picture {
    /// Pixels.
    pub width: u32,
    /// Pixels, even.
    pub height: u32,
    /// Of the pixels.
    pub format: Format,
    /// Bytes after each row, said in a GstVideoMeta.
    pub padding: u32,
}

impl Picture {
    /// Bytes from one row to the next.
    pub fn stride(self) -> usize {
        let row = match self.format {
            Format::Bgra => 4 * self.width,
            Format::Nv12 => self.width,
        };
        (row + self.padding) as usize
    }

    /// Bytes of a row that are pixels.
    pub fn row(self) -> usize {
        self.stride() - self.padding as usize
    }

    /// Bytes of a frame in memory.
    pub fn size(self) -> usize {
        let rows = match self.format {
            Format::Bgra => self.height,
            Format::Nv12 => self.height + self.height / 2,
        };
        self.stride() * rows as usize
    }

    /// Bytes of a frame on the wire: the protocol wants NV12 tight, and takes BGRA with its padding.
    pub fn wire_size(self) -> usize {
        match self.format {
            Format::Bgra => self.size(),
            Format::Nv12 => Self { padding: 0, ..self }.size(),
        }
    }

    /// As requests say it.
    pub fn pixel_format(self) -> PixelFormat {
        match self.format {
            Format::Bgra => PixelFormat::Bgra,
            Format::Nv12 => PixelFormat::Nv12,
        }
    }

    /// A picture with something in it, which moves with `number`. Encoders have work with it.
    pub fn paint(self, number: usize) -> Vec<u8> {
        let stride = self.stride();
        (0..self.size())
            .map(|at| {
                let (x, y) = (at % stride, at / stride);
                ((x / 4 + 8 * number) ^ (y / 2)) as u8
            })
            .collect()
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    /// Who.
    pub contender: Contender,
    /// When.
    pub pace: Pace,
    /// What.
    pub picture: Picture,
    /// Where the peer listens; not looked at by those that have none.
    pub address: String,
    /// Frames before the measurement begins, at least one.
    pub warm_up: u32,
    /// Frames that are measured.
    pub frames: u32,
}

impl Case {
    /// Frames in all.
    pub fn total(&self) -> u32 {
        self.warm_up + self.frames
    }
}
