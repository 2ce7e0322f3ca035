// SPDX-License-Identifier: MIT OR Apache-2.0

//! The recording that all contenders push: H.264 of a constant bit rate, a keyframe a second.

use std::error::Error;
use std::path::Path;

use gst::prelude::*;
use helix_protocol::h264;

use super::case::RATE;

/// More than joining, warming up and measuring take.
const SECONDS: u32 = 30;
/// kbit/s; a frame is about 8 KiB.
const BITRATE: u32 = 4000;

/// An access unit of the recording.
pub struct Unit {
    pub bytes: Vec<u8>,
    pub keyframe: bool,
}

/// Encodes the recording.
pub fn make(path: &Path) -> Result<(), Box<dyn Error>> {
    // Filler units keep all frames at one size, which is what a desktop in motion gives.
    let description = format!(
        "videotestsrc num-buffers={frames} pattern=ball ! video/x-raw,format=I420,width=640,\
         height=360,framerate={RATE}/1 ! x264enc tune=zerolatency speed-preset=ultrafast \
         bitrate={BITRATE} vbv-buf-capacity=100 key-int-max={RATE} option-string=nal-hrd=cbr:filler=1 \
         ! video/x-h264,stream-format=byte-stream ! filesink location={path}",
        frames = SECONDS * RATE,
        path = path.display(),
    );
    let pipeline = gst::parse::launch(&description)?;
    pipeline.set_state(gst::State::Playing)?;
    let end = pipeline
        .bus()
        .ok_or("a pipeline has a bus")?
        .timed_pop_filtered(
            gst::ClockTime::from_seconds(120),
            &[gst::MessageType::Eos, gst::MessageType::Error],
        );
    pipeline.set_state(gst::State::Null)?;
    match end.as_deref().map(gst::MessageRef::view) {
        Some(gst::MessageView::Eos(_)) => Ok(()),
        Some(gst::MessageView::Error(error)) => Err(error.error().into()),
        _ => Err("the recording takes too long".into()),
    }
}

/// Its access units.
pub fn read(path: &str) -> Result<Vec<Unit>, Box<dyn Error>> {
    let pipeline = gst::parse::launch(&format!(
        "filesrc location={path} ! h264parse ! \
         video/x-h264,stream-format=byte-stream,alignment=au ! appsink name=sink sync=false"
    ))?
    .downcast::<gst::Pipeline>()
    .map_err(|_| "it is a pipeline")?;
    let sink = pipeline
        .by_name("sink")
        .and_downcast::<gst_app::AppSink>()
        .ok_or("there is an appsink")?;
    pipeline.set_state(gst::State::Playing)?;
    let mut units = Vec::new();
    while let Ok(sample) = sink.pull_sample() {
        let buffer = sample.buffer().ok_or("a sample has a buffer")?;
        let bytes = buffer.map_readable()?.to_vec();
        let keyframe = h264::has_idr(&bytes);
        units.push(Unit { bytes, keyframe });
    }
    pipeline.set_state(gst::State::Null)?;
    if units.is_empty() {
        return Err(format!("no access unit in {path}").into());
    }
    Ok(units)
}
