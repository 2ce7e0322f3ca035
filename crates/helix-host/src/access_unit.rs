// SPDX-License-Identifier: MIT OR Apache-2.0

//! Encoded pictures, shared by all who send them.

use std::fmt;
use std::io::IoSlice;
use std::sync::Arc;

use helix_protocol::connection::Body;
use helix_protocol::h264;

/// One access unit in Annex B form, in the memory the encoder wrote it to. Cloning copies no
/// bytes.
#[derive(Clone)]
pub struct AccessUnit {
    bytes: Arc<gst::MappedBuffer<gst::buffer::Readable>>,
    keyframe: bool,
}

impl AccessUnit {
    /// Takes a buffer of `video/x-h264, stream-format=byte-stream, alignment=au`. `None` if its
    /// memory cannot be read.
    pub fn new(buffer: gst::Buffer) -> Option<Self> {
        // h264parse calls every I picture a key unit; decoding can start at an IDR only.
        let delta = buffer.flags().contains(gst::BufferFlags::DELTA_UNIT);
        let bytes = buffer.into_mapped_buffer_readable().ok()?;
        let keyframe = !delta && h264::has_idr(&bytes);
        Some(Self {
            bytes: Arc::new(bytes),
            keyframe,
        })
    }

    /// Whether decoding can start here.
    pub fn is_keyframe(&self) -> bool {
        self.keyframe
    }
}

impl fmt::Debug for AccessUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.keyframe { "keyframe" } else { "delta" };
        write!(f, "AccessUnit({kind}, {} bytes)", self.bytes.size())
    }
}

impl AccessUnit {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many those are.
    pub fn size(&self) -> usize {
        self.bytes.size()
    }
}

/// What follows the head of a message to a client.
#[derive(Debug)]
pub enum Tail {
    /// Of FRAME_RESPONSE.
    Unit(AccessUnit),
    /// Of HELLO_RESP.
    Tlvs(Vec<u8>),
}

impl Tail {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Unit(unit) => unit.bytes(),
            Self::Tlvs(bytes) => bytes,
        }
    }
}

impl Body for Tail {
    fn size(&self) -> usize {
        self.bytes().len()
    }

    fn slices<'a>(&'a self, offset: usize, slices: &mut [IoSlice<'a>]) -> usize {
        slices[0] = IoSlice::new(&self.bytes()[offset..]);
        1
    }
}
