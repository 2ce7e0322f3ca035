// SPDX-License-Identifier: MIT OR Apache-2.0

//! All of the element's way: a producer that draws known pictures into DMA-BUFs and hands them over
//! PipeWire, and `pipewirezerocopysrc ! cudadownload` behind it, which must get CUDA memory.

use std::path::Path;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gstpipewirezerocopy::egl::Display;
use zerocopy_test_producer::{
    Agreed, Canvas, Event, Offer, Outcome as Made, Pixels, Producer, When, Workshop,
};

use crate::dumb::Dumb;
use crate::exported::Exported;
use crate::gpu::Gpu;
use crate::{Outcome, pictures, steady};

/// Pixels that the GPU draws; a width with which its rows do not end.
const SIZE: (u32, u32) = (1366, 768);
/// Pixels that the processor draws, which may be an emulated one.
const SMALL: (u32, u32) = (250, 130);
/// Generous: catches a hang.
const LIMIT: Duration = Duration::from_mins(1);
/// A picture that meets a busy machine is thrown away by PipeWire: shown again after this.
const AGAIN: Duration = Duration::from_secs(1);
/// Of many starts, for the picture of one.
const SOON: Duration = Duration::from_secs(10);
/// Pictures that are shown one by one.
const ONE_BY_ONE: u8 = 10;
/// DRM_FORMAT_MOD_LINEAR.
const LINEAR: u64 = 0;

/// Who draws: the GPU, into what its driver exports; or the processor, into dumb buffers of a node.
pub enum Drawing {
    Gpu(Display),
    Processor(std::path::PathBuf),
}

impl Workshop for Drawing {
    fn make(&mut self, agreed: &Agreed) -> Made<Box<dyn Canvas>> {
        Ok(match self {
            Self::Gpu(display) => Box::new(Exported::new(display, agreed.size)?),
            Self::Processor(node) => Box::new(Dumb::new(node, agreed.pixels, agreed.size)?),
        })
    }
}

/// The element with its settings, and who reads what comes.
struct Consumer {
    pipeline: gst::Pipeline,
    source: gst::Element,
    sink: gst_app::AppSink,
    pixels: Pixels,
}

impl Consumer {
    fn start(producer: &str, settings: &[(&str, String)], pixels: Pixels) -> Outcome<Self> {
        let source = gst::ElementFactory::make("pipewirezerocopysrc")
            .name(format!("{producer}-consumer"))
            .property("target-object", producer)
            .property("keepalive-time", 0_u32)
            // The waits here have limits of their own.
            .property("first-frame-timeout", 0_u32)
            // It may not have shown up yet.
            .property_from_str("on-disconnect", "none")
            .build()?;
        for (name, value) in settings {
            source.set_property_from_str(name, value);
        }
        let sink = gst_app::AppSink::builder().sync(false).build();
        let pipeline = gst::Pipeline::new();
        pipeline.add_many([&source, sink.upcast_ref()])?;
        if let Some(download) = gst::ElementFactory::find("cudadownload") {
            let download = download.create().build()?;
            pipeline.add(&download)?;
            sink.set_caps(Some(&"video/x-raw".parse()?));
            gst::Element::link_many([&source, &download, sink.upcast_ref()])?;
        } else {
            sink.set_caps(Some(&"video/x-raw(memory:CUDAMemory)".parse()?));
            source.link(&sink)?;
        }
        let consumer = Self {
            pipeline,
            source,
            sink,
            pixels,
        };
        if consumer.pipeline.set_state(gst::State::Playing).is_err() {
            return Err(consumer.error());
        }
        Ok(consumer)
    }

    fn error(&self) -> Box<dyn std::error::Error> {
        let said = self.pipeline.bus().and_then(|bus| {
            bus.timed_pop_filtered(gst::ClockTime::SECOND, &[gst::MessageType::Error])
        });
        match said.as_ref().map(|message| message.view()) {
            Some(gst::MessageView::Error(error)) => {
                let debug = error.debug().unwrap_or_default();
                format!("{} ({debug})", error.error()).into()
            }
            _ => "the pipeline has ended without an error".into(),
        }
    }

    /// The next frame's picture, if one comes in time; `Err` inside says what is wrong with it.
    fn picture(&self, limit: Duration) -> Outcome<Option<Result<u8, String>>> {
        let Some(sample) = self.sink.try_pull_sample(gst::ClockTime::try_from(limit)?) else {
            if self.sink.is_eos() {
                return Err(self.error());
            }
            return Ok(None);
        };
        let buffer = sample.buffer().ok_or("a sample without a buffer")?;
        let caps = sample.caps().ok_or("a sample without caps")?;
        let info = gst_video::VideoInfo::from_caps(caps)?;
        let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(buffer, &info)?;
        Ok(Some(pictures::compare(&frame, self.pixels)))
    }

    /// Fields of the element's statistics.
    fn stats(&self, names: &[&str]) -> String {
        let stats = self.source.property::<gst::Structure>("stats");
        let said = names.iter().filter_map(|name| {
            let value = stats.value(*name).ok()?;
            let text = match value.get::<String>() {
                Ok(text) => text,
                Err(_) => value.get::<u64>().ok()?.to_string(),
            };
            Some(format!("{name} {text}"))
        });
        said.collect::<Vec<_>>().join(", ")
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// Who draws here, and what it offers. The error says why nobody can.
pub fn painter(display: &Display, node: Option<&Path>) -> Outcome<(Drawing, Offer)> {
    let exported = Exported::new(display, SIZE).and_then(|picture| {
        picture.is_dmabuf()?;
        Ok(picture)
    });
    match (exported, node) {
        (Ok(picture), _) => Ok((Drawing::Gpu(display.clone()), picture.offer()?)),
        (Err(error), Some(node)) => {
            println!("the processor draws into dumb buffers: {error}");
            let offer = Offer {
                pixels: Pixels::Bgrx,
                size: SMALL,
                modifiers: vec![LINEAR],
                shared: false,
                most: Some(60),
            };
            Ok((Drawing::Processor(node.to_owned()), offer))
        }
        (Err(error), None) => Err(error),
    }
}

/// Plays with these settings, then starts and stops so many times. False where a picture was wrong, or
/// something stayed behind.
pub fn check(
    part: &str,
    (drawing, offer): (Drawing, Offer),
    settings: &[(&str, String)],
    frames: usize,
    (gpu, cycles): (&Gpu, usize),
) -> Outcome<bool> {
    let pixels = offer.pixels;
    let name = format!("gpucheck-{part}");
    if gst::ElementFactory::find("cudadownload").is_none() {
        println!("cudadownload is not registered here: CUDA memory is mapped for reading instead");
    }
    let producer = Producer::start(&name, offer, drawing, None)?;
    let consumer = Consumer::start(&name, settings, pixels)?;
    let mut right = one_by_one(part, &producer, &consumer)?;
    right &= race(part, &producer, &consumer, frames)?;
    let stats = consumer.stats(&[
        "memory",
        "import",
        "sync",
        "waited-by",
        "frames",
        "dropped",
        "corrupted",
        "copies",
        "latency-p50-us",
        "latency-p99-us",
    ]);
    println!("{part}, through PipeWire: {stats}");
    if consumer.stats(&["memory"]) != "memory cuda" {
        println!("{part}, through PipeWire: WRONG: other memory than CUDA's");
        right = false;
    }
    drop(consumer);
    let what = format!("{part}, started and stopped");
    let mut missed = 0;
    right &= steady::check(&what, gpu, cycles, |number| {
        let consumer = Consumer::start(&name, settings, pixels)?;
        match arrives(&producer, &consumer, number as u8, SOON)? {
            Arrived::Right => Ok(()),
            Arrived::Wrong(wrong) => Err(wrong.into()),
            Arrived::Not => {
                missed += 1;
                Ok(())
            }
        }
    })?;
    // PipeWire's daemon now and then hands over buffers that the producer has not filled in yet, and says
    // "invalid memory type 8".
    println!("{what}: {missed} times without a picture");
    Ok(right && missed <= cycles / 4)
}

#[expect(clippy::needless_pass_by_value, reason = "as Producer::wait wants it")]
fn shown(event: Event) -> Option<()> {
    matches!(event, Event::Shown(_)).then_some(())
}

/// What has become of a picture.
enum Arrived {
    Right,
    /// Another came that is wrong, and what is.
    Wrong(String),
    Not,
}

/// Shows a picture until it arrives, though no other comes after it.
fn arrives(
    producer: &Producer,
    consumer: &Consumer,
    number: u8,
    limit: Duration,
) -> Outcome<Arrived> {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        producer.show(number, When::Before);
        producer.wait(LIMIT, shown)?;
        match consumer.picture(AGAIN)? {
            Some(Ok(found)) if found == number => return Ok(Arrived::Right),
            Some(Err(wrong)) => return Ok(Arrived::Wrong(wrong)),
            // What was shown before may come once more.
            Some(Ok(_)) | None => {}
        }
    }
    Ok(Arrived::Not)
}

/// Each picture arrives, the last one too.
fn one_by_one(part: &str, producer: &Producer, consumer: &Consumer) -> Outcome<bool> {
    for number in 1..=ONE_BY_ONE {
        match arrives(producer, consumer, number, LIMIT)? {
            Arrived::Right => {}
            Arrived::Wrong(wrong) => {
                println!("{part}, through PipeWire: WRONG: {wrong}");
                return Ok(false);
            }
            Arrived::Not => {
                return Err(format!("picture {number} has not come within {LIMIT:?}").into());
            }
        }
    }
    println!("{part}, through PipeWire: {ONE_BY_ONE} pictures, every pixel of each is right");
    Ok(true)
}

/// The producer draws as fast as it gets buffers back, and waits for nobody. Numbers only rise: one
/// that does not is of a buffer that was read before it was drawn.
fn race(part: &str, producer: &Producer, consumer: &Consumer, frames: usize) -> Outcome<bool> {
    let numbers = || (0..frames).map(|number| (u32::from(ONE_BY_ONE) + 1 + number as u32) as u8);
    // What was shown before may come once more.
    while consumer.picture(AGAIN)?.is_some() {}
    numbers().for_each(|number| producer.show(number, When::Before));
    let (mut seen, mut wrong, mut before) = (0, 0, ONE_BY_ONE);
    let end = Instant::now() + LIMIT.max(Duration::from_millis(100) * frames as u32);
    let mut left = 0;
    while Instant::now() < end {
        match consumer.picture(AGAIN)? {
            Some(Ok(number)) => {
                seen += 1;
                if number.wrapping_sub(before).cast_signed() <= 0 {
                    wrong += 1;
                    println!("{part}, through PipeWire: WRONG: picture {number} after {before}");
                }
                before = number;
            }
            Some(Err(text)) => {
                seen += 1;
                wrong += 1;
                println!("{part}, through PipeWire: WRONG: {text}");
            }
            None if left == frames => break,
            None => {}
        }
        while producer.wait(Duration::ZERO, shown).is_ok() {
            left += 1;
        }
    }
    println!(
        "{part}, through PipeWire: {wrong} stale or torn of {seen} frames that came of {frames} drawn"
    );
    Ok(wrong == 0)
}
