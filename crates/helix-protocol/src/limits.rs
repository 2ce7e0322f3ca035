// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a peer may send.

/// Upper limits for what is accepted from a peer, checked before memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of pixels in one FRAME_REQUEST. Deployed hosts take 64 MiB.
    pub pixels: u32,
    /// Bytes of one access unit in FRAME_RESPONSE.
    pub access_unit: u32,
    /// NAL units in one FRAME_RESPONSE. A picture of 8192 rows has 512 rows of macroblocks; with
    /// eight slices for each of them that is 4096. A unit takes no memory but for its bytes.
    pub nal_count: u32,
    /// Bytes of HELLO with its TLVs.
    pub hello: u32,
    /// Bytes of an unknown message that are skipped. Deployed peers skip up to 64 MiB.
    pub skipped: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pixels: 64 * 1024 * 1024,
            access_unit: 16 * 1024 * 1024,
            nal_count: 4096,
            hello: 4096,
            skipped: 64 * 1024 * 1024,
        }
    }
}

impl Limits {
    /// For a client: nobody sends it pixels.
    pub fn client() -> Self {
        Self {
            pixels: 0,
            ..Self::default()
        }
    }

    /// For a host: nobody sends it access units.
    pub fn host() -> Self {
        Self {
            access_unit: 0,
            ..Self::default()
        }
    }
}
