// SPDX-License-Identifier: MIT OR Apache-2.0

//! CUDA on a machine that may lack it. In a process of its own: what was loaded once stays.

use gstpipewirezerocopy::cuda;

#[test]
fn what_cuda_lacks_here_is_named() {
    gst::init().unwrap();
    let Err(error) = cuda::available() else {
        println!("this machine has all that CUDA memory needs: nothing is missing here");
        return;
    };
    let cuda::Error::Unavailable(text) = &error else {
        panic!("{error:?}");
    };
    let named = ["libcuda.so.1 ", "libgstcuda-1.0.so.0 ", "GStreamer 1."];
    assert!(named.iter().any(|name| text.contains(name)), "{text}");
    assert_eq!(cuda::available(), Err(error), "and it stays that way");
}
