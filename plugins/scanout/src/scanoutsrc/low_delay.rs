// SPDX-License-Identifier: MIT OR Apache-2.0

//! `low-delay-vui`: keyframes whose parameter sets say that nothing is reordered (L27).

use helix_protocol::Payload;
use helix_protocol::sps::{self, Changes, Patch, SpsError};

/// The parameter sets that a keyframe needs instead of its own; none where they say it already.
pub fn patches(keyframe: &[u8]) -> Result<Vec<Patch>, SpsError> {
    let changes = Changes {
        visible: None,
        low_delay: true,
    };
    sps::patches(keyframe, changes)
}

/// An access unit as a buffer, with the patches in their places. Nothing else is copied: a buffer
/// with a patch is made of several memories.
pub fn buffer(access_unit: Payload, patches: Vec<Patch>) -> gst::Buffer {
    let whole = gst::Memory::from_mut_slice(access_unit);
    let mut buffer = gst::Buffer::new();
    let parts = buffer.make_mut();
    let mut at = 0;
    for patch in patches {
        parts.append_memory(whole.share(at..patch.range.start));
        parts.append_memory(gst::Memory::from_mut_slice(patch.nal));
        at = patch.range.end;
    }
    if at == 0 {
        parts.append_memory(whole);
    } else {
        parts.append_memory(whole.share(at..));
    }
    buffer
}
