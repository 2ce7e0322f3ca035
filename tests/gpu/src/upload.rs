// SPDX-License-Identifier: MIT OR Apache-2.0

//! The same pictures through the processor: cudaupload, from system memory.

use gst::prelude::*;
use gstpipewirezerocopy::cuda::Context;

use crate::Outcome;
use crate::figures::{Row, Times, UPLOAD, name};

/// Time of one frame through cudaupload, in the same context.
pub fn time(context: &Context, size: (u32, u32), frames: usize) -> Outcome<Option<Row>> {
    let Ok(upload) = gst::ElementFactory::make("cudaupload").build() else {
        println!(
            "cudaupload {}: not measured: GStreamer's nvcodec plugin does not register it here \
             (it wants libnvcuvid or libnvidia-encode)",
            name(size)
        );
        return Ok(None);
    };
    upload.set_context(&context.to_shared()?);
    let mut harness = gst_check::Harness::with_element(&upload, Some("sink"), Some("src"));
    let caps = gst_video::VideoCapsBuilder::new()
        .format(gst_video::VideoFormat::Rgba)
        .width(size.0 as i32)
        .height(size.1 as i32)
        .framerate(gst::Fraction::new(60, 1))
        .build();
    let mut uploaded = caps.clone();
    uploaded
        .make_mut()
        .set_features(0, Some(gst::CapsFeatures::new(["memory:CUDAMemory"])));
    harness.set_caps(caps, uploaded);
    let picture = gst::Buffer::from_slice(vec![7_u8; size.0 as usize * size.1 as usize * 4]);
    let times = Times::take(frames, || -> Outcome<()> {
        harness.push(picture.clone())?;
        harness.pull()?;
        Ok(())
    })?;
    Ok(Some(Row {
        way: "processor",
        size,
        what: UPLOAD,
        times,
    }))
}
