// SPDX-License-Identifier: MIT OR Apache-2.0

//! An access unit, or a parameter set, from a hostile host.

#![no_main]

use helix_protocol::h264::{StreamInfo, find_sps, has_idr, nal_units};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut size = 0;
    for unit in nal_units(data) {
        assert!(!unit.is_empty() && unit.last() != Some(&0));
        assert!(
            !unit.windows(3).any(|three| three == [0, 0, 1]),
            "a start code inside a unit"
        );
        size += unit.len() + 3;
    }
    assert!(size <= data.len(), "units overlap");
    assert!(size > 0 || !has_idr(data));
    if let Some(sps) = find_sps(data) {
        plausible(sps);
    }

    // The same bytes as a parameter set, so that the reader behind is reached more often.
    plausible(data);
    let sps = [&[0x67], data].concat();
    plausible(&sps);
});

fn plausible(sps: &[u8]) {
    let Some(info) = StreamInfo::from_sps(sps) else {
        return;
    };
    assert!((1..=16384).contains(&info.width) && (1..=16384).contains(&info.height));
    if let Some((num, den)) = info.framerate {
        assert!(num > 0 && den > 0);
    }
}
