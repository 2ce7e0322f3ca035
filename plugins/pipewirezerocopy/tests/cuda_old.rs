// SPDX-License-Identifier: MIT OR Apache-2.0

//! A GPU's driver beside a GStreamer that is too old for CUDA memory. In a process of its own: what was
//! loaded once stays.

use gstpipewirezerocopy::cuda;
use zerocopy_cuda_fake::Fake;

#[test]
fn libcuda_is_left_alone_where_gstreamer_is_too_old() {
    gst::init().unwrap();
    let (major, minor, ..) = gst::version();
    if (major, minor) >= (1, 24) {
        println!("not run: GStreamer {major}.{minor} is new enough");
        return;
    }
    let fake = Fake::load();
    let error = cuda::available().unwrap_err();
    assert!(error.to_string().contains("GStreamer 1."), "{error}");
    // cuInit takes long, opens descriptors, and a process that has called it may not fork.
    assert_eq!(fake.calls(), Vec::<String>::new());
}
