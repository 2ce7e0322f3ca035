// SPDX-License-Identifier: MIT OR Apache-2.0

//! Any bytes as an access unit: it is taken apart or refused.
#![no_main]

use helix_protocol::h264;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let bytes: usize = h264::nal_units(data).map(<[u8]>::len).sum();
    assert!(bytes <= data.len(), "NAL units do not overlap");
    let _ = h264::has_idr(data);
    if let Some(sps) = h264::find_sps(data) {
        let _ = h264::StreamInfo::from_sps(sps);
    }
});
