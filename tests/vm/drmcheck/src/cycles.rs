// SPDX-License-Identifier: MIT OR Apache-2.0

//! `vsockenc` started and stopped again and again, each time with another DMA-BUF.

use gst::prelude::*;
use zerocopy_test_support::process::{Usage, without_caches};

use crate::Outcome;
use crate::frames::Frames;
use crate::memory::{self, Memory};

/// Cycles before the count begins: the first ones fill GStreamer's own pools of threads and memory.
const WARM_UP: u32 = 15;
/// Pixels. No other picture has this size, so that the host's trace of them is clear.
const SIZE: (u32, u32) = (48, 32);
/// For the end of the stream, on an emulated processor.
const LIMIT: gst::ClockTime = gst::ClockTime::from_seconds(30);

/// How often, and where to.
#[derive(Debug, clap::Args)]
pub struct Options {
    memory: Memory,
    /// The encoder's properties, as gst-launch has them.
    #[arg(long)]
    encoder: String,
    /// Cycles that must leave nothing behind.
    #[arg(long, default_value_t = 200)]
    count: u32,
}

/// Every other cycle ends with its stream. The others are stopped after the first of two pictures, so the
/// host is to answer no second one: it is open then. Says "resource ID WIDTHxHEIGHT KIND" of each buffer,
/// "marker ID" of a resource that is made after them, and "flat" where no descriptor, thread or memory
/// is left.
pub fn show(options: &Options) -> Outcome<()> {
    without_caches();
    gst::init()?;
    for number in 0..WARM_UP {
        cycle(options, number)?;
    }
    let before = Usage::now();
    for number in 0..options.count {
        cycle(options, number)?;
    }
    let leak = Usage::now().leak_since(&before);
    memory::mark(options.memory)?;
    if let Some(leak) = leak {
        return Err(format!("{} cycles left {leak}", options.count).into());
    }
    println!("flat");
    Ok(())
}

fn cycle(options: &Options, number: u32) -> Outcome<()> {
    let (width, height) = SIZE;
    let (memory, stride) = memory::make(options.memory, width, height)?;
    let frames = Frames::play(
        &format!(
            "appsrc name=begin format=time caps=\"video/x-raw(memory:DMABuf), format=BGRx, \
             width={width}, height={height}, framerate=30/1\" ! vsockenc {}",
            options.encoder
        ),
        "video/x-h264",
    )?;
    let source = frames.pipeline.by_name("begin");
    let source = source.and_downcast::<gst_app::AppSrc>();
    let source = source.ok_or("no appsrc")?;
    let runs_to_end = number.is_multiple_of(2);
    for number in 0..if runs_to_end { 1 } else { 2 } {
        let mut buffer = gst::Buffer::new();
        let writable = buffer.get_mut().ok_or("a new buffer is ours")?;
        writable.append_memory(memory.clone());
        writable.set_pts(gst::ClockTime::SECOND / 30 * number);
        gst_video::VideoMeta::add_full(
            writable,
            gst_video::VideoFrameFlags::empty(),
            gst_video::VideoFormat::Bgrx,
            width,
            height,
            &[0],
            &[stride as i32],
        )?;
        source.push_buffer(buffer)?;
    }
    frames.next()?;
    if runs_to_end {
        source.end_of_stream()?;
        if frames.sink.try_pull_sample(LIMIT).is_some() || !frames.sink.is_eos() {
            return Err(format!("the stream does not end: {}", frames.error()).into());
        }
    }
    Ok(())
}
