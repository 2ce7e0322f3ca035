// SPDX-License-Identifier: MIT OR Apache-2.0

//! A pipeline, and the frames at its end.

use std::os::fd::BorrowedFd;

use gst::prelude::*;

use crate::{Outcome, dmabuf};

/// For a frame, or an error, on an emulated processor.
const LIMIT: gst::ClockTime = gst::ClockTime::from_seconds(30);

/// Caps for frames in DMA-BUFs, and in plain memory.
pub const ON_GPU: &str = "video/x-raw(memory:DMABuf)";
pub const IN_MEMORY: &str = "video/x-raw";

/// A pipeline that plays.
pub struct Frames {
    pub pipeline: gst::Pipeline,
    pub sink: gst_app::AppSink,
}

impl Frames {
    /// Plays a gst-launch description, with a sink that takes `caps`.
    pub fn play(description: &str, caps: &str) -> Outcome<Self> {
        let line = format!("{description} ! {caps} ! appsink name=sink sync=false");
        let pipeline = gst::parse::launch(&line)?.downcast::<gst::Pipeline>();
        let pipeline = pipeline.map_err(|_| "no pipeline")?;
        let sink = pipeline.by_name("sink").and_downcast::<gst_app::AppSink>();
        let sink = sink.ok_or("no appsink")?;
        // What a sink keeps for whoever wants a snapshot is not let go.
        sink.set_property("enable-last-sample", false);
        pipeline.set_state(gst::State::Playing)?;
        Ok(Self { pipeline, sink })
    }

    pub fn next(&self) -> Outcome<gst::Sample> {
        let sample = self.sink.try_pull_sample(LIMIT);
        sample.ok_or_else(|| self.error().into())
    }

    /// The next frame of which `is` does not say what is wrong with it. An error has its last words.
    pub fn wait_for(&self, is: impl Fn(&gst::Sample) -> Outcome<()>) -> Outcome<gst::Sample> {
        let start = std::time::Instant::now();
        let mut last = String::new();
        while start.elapsed() < LIMIT.into() {
            let sample = self.next().map_err(|error| format!("{error}; {last}"))?;
            match is(&sample) {
                Ok(()) => return Ok(sample),
                Err(wrong) => last = wrong.to_string(),
            }
        }
        Err(last.into())
    }

    /// The error that is on the bus, or comes.
    pub fn error(&self) -> String {
        let bus = self.pipeline.bus();
        let message = bus.and_then(|bus| bus.timed_pop_filtered(LIMIT, &[gst::MessageType::Error]));
        match message.as_deref().map(gst::MessageRef::view) {
            Some(gst::MessageView::Error(error)) => format!("{:?}", error.debug()),
            _ => "no frame and no error".to_owned(),
        }
    }

    /// The value of the tag `image-orientation` that has come last.
    pub fn orientation(&self) -> Option<String> {
        let pad = self.sink.static_pad("sink")?;
        let tags = (0..).map_while(|index| pad.sticky_event::<gst::event::Tag>(index));
        tags.filter_map(|event| {
            let tag = event.tag().get::<gst::tags::ImageOrientation>();
            tag.map(|value| value.get().to_owned())
        })
        .last()
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// What a frame of four bytes a pixel shows: bytes of a row, rows from the top of its memory.
pub fn rows(sample: &gst::Sample) -> Outcome<Vec<Vec<u8>>> {
    let (buffer, caps) = sample
        .buffer()
        .zip(sample.caps())
        .ok_or("an empty sample")?;
    let meta = buffer.meta::<gst_video::VideoMeta>();
    let (width, height, offset, stride) = if let Some(meta) = meta {
        let (offset, stride) = (meta.offset()[0], meta.stride()[0] as usize);
        (meta.width(), meta.height(), offset, stride)
    } else {
        let info = gst_video::VideoInfo::from_caps(caps)?;
        let stride = info.stride()[0] as usize;
        (info.width(), info.height(), 0, stride)
    };
    let bytes = match fd_of(buffer) {
        // As a GPU's driver would see it: nothing here has mapped it.
        Some(fd) => dmabuf::read(fd, buffer.size())?,
        None => buffer.map_readable()?.to_vec(),
    };
    let row = |y: u32| {
        let at = offset + y as usize * stride;
        let row = bytes.get(at..at + width as usize * 4);
        row.map(<[u8]>::to_vec)
            .ok_or_else(|| "too few bytes".into())
    };
    (0..height).map(row).collect()
}

/// The DMA-BUF that a frame is in.
pub fn fd_of(buffer: &gst::BufferRef) -> Option<BorrowedFd<'_>> {
    let memory = buffer.peek_memory(0);
    let memory = memory.downcast_memory_ref::<gst_allocators::DmaBufMemory>()?;
    // SAFETY: the descriptor is the memory's, which lives as long as the buffer is borrowed.
    Some(unsafe { BorrowedFd::borrow_raw(memory.fd()) })
}
