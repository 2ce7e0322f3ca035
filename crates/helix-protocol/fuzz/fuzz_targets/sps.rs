// SPDX-License-Identifier: MIT OR Apache-2.0

//! A parameter set, or an access unit, from a hostile encoder, rewritten.
//!
//! The first three bytes of the input say what is to be changed; the rest is the parameter set.

#![no_main]

#[path = "../../tests/common/sps.rs"]
mod oracle;

use helix_protocol::sps::{Changes, patches};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&[what, width, height], rest)) = data.split_first_chunk() else {
        return;
    };
    let visible = (u32::from(width), u32::from(height));
    let changes = Changes {
        visible: (what & 1 != 0).then_some(visible),
        low_delay: what & 2 != 0,
    };
    oracle::check(rest, changes);
    let nal = [&[0x67], rest].concat();
    oracle::check(&nal, changes);

    let mut end = 0;
    for patch in patches(rest, changes).unwrap_or_default() {
        assert!(end <= patch.range.start, "patches overlap");
        end = patch.range.end;
        assert_eq!(
            oracle::check(&rest[patch.range], changes),
            Some(patch.nal),
            "something else than the parameter set"
        );
    }
    assert!(end <= rest.len());
});
