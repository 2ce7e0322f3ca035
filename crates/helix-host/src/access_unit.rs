// SPDX-License-Identifier: MIT OR Apache-2.0

//! Encoded pictures, shared by all who send them.

use std::fmt;
use std::io::IoSlice;
use std::iter;
use std::sync::Arc;

use helix_protocol::connection::Body;
use helix_protocol::h264;
use helix_protocol::sps::Patch;

/// One access unit in Annex B form, in the memory the encoder wrote it to. Cloning copies no
/// bytes.
#[derive(Clone)]
pub struct AccessUnit(Arc<Parts>);

struct Parts {
    bytes: gst::MappedBuffer<gst::buffer::Readable>,
    /// Parameter sets that are sent instead of those in `bytes`.
    patches: Vec<Patch>,
    keyframe: bool,
}

impl AccessUnit {
    /// Takes a buffer of `video/x-h264, stream-format=byte-stream, alignment=au`. `None` if its
    /// memory cannot be read.
    pub fn new(buffer: gst::Buffer) -> Option<Self> {
        Self::patched(buffer, |_| Vec::new())
    }

    /// The same; in a keyframe the parameter sets are sent as `patches` has them. Others have
    /// none.
    pub fn patched(buffer: gst::Buffer, patches: impl FnOnce(&[u8]) -> Vec<Patch>) -> Option<Self> {
        // h264parse calls every I picture a key unit; decoding can start at an IDR only.
        let delta = buffer.flags().contains(gst::BufferFlags::DELTA_UNIT);
        let bytes = buffer.into_mapped_buffer_readable().ok()?;
        let keyframe = !delta && h264::has_idr(&bytes);
        let patches = if keyframe {
            patches(&bytes)
        } else {
            Vec::new()
        };
        Some(Self(Arc::new(Parts {
            bytes,
            patches,
            keyframe,
        })))
    }

    /// Whether decoding can start here.
    pub fn is_keyframe(&self) -> bool {
        self.0.keyframe
    }

    /// The level times ten, where it holds a sequence parameter set.
    pub fn level(&self) -> Option<u8> {
        h264::find_sps(&self.0.bytes)?.get(3).copied()
    }

    /// What is sent, one after the other: the encoder's bytes around each patch, and the patch.
    fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let Parts { bytes, patches, .. } = &*self.0;
        let rest = patches.last().map_or(0, |last| last.range.end);
        let mut at = 0;
        patches
            .iter()
            .flat_map(move |patch| {
                let before = &bytes[at..patch.range.start];
                at = patch.range.end;
                [before, &patch.nal]
            })
            .chain(iter::once(&bytes[rest..]))
    }
}

impl fmt::Debug for AccessUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_keyframe() {
            "keyframe"
        } else {
            "delta"
        };
        write!(f, "AccessUnit({kind}, {} bytes)", self.size())
    }
}

impl Body for AccessUnit {
    fn size(&self) -> usize {
        self.pieces().map(<[u8]>::len).sum()
    }

    fn slices<'a>(&'a self, offset: usize, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = offset;
        let pieces = self.pieces().filter_map(|piece| {
            let left = piece.get(skip..);
            skip = skip.saturating_sub(piece.len());
            left.filter(|left| !left.is_empty())
        });
        slices
            .iter_mut()
            .zip(pieces)
            .map(|(slice, piece)| *slice = IoSlice::new(piece))
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_take_the_place_of_what_they_stand_for() {
        gst::init().unwrap();
        let buffer = gst::Buffer::from_slice([0, 0, 1, 0x67, 1, 2, 0, 0, 1, 0x65, 3]);
        let unit = AccessUnit::patched(buffer, |bytes| {
            assert_eq!(bytes.len(), 11);
            vec![Patch {
                range: 3..6,
                nal: vec![0x67, 4, 5, 6, 7],
            }]
        })
        .unwrap();
        let whole = [0, 0, 1, 0x67, 4, 5, 6, 7, 0, 0, 1, 0x65, 3];
        assert!(unit.is_keyframe());
        assert_eq!(unit.size(), whole.len());
        for offset in 0..whole.len() {
            for room in 1..5 {
                let mut slices = [IoSlice::new(&[]); 5];
                let count = unit.slices(offset, &mut slices[..room]);
                let bytes = slices[..count]
                    .iter()
                    .flat_map(|slice| slice.to_vec())
                    .collect::<Vec<_>>();
                assert!(!bytes.is_empty());
                assert!(whole[offset..].starts_with(&bytes), "{offset} {room}");
                if room >= 3 {
                    assert_eq!(bytes, whole[offset..]);
                }
            }
        }
        let delta = gst::Buffer::from_slice([0, 0, 1, 0x41, 1]);
        let unit = AccessUnit::patched(delta, |_| unreachable!("it has no parameter sets"));
        assert_eq!(unit.unwrap().size(), 5);
    }
}
