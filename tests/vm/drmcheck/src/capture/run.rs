// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pipewirezerocopysrc ! appsink` on a producer, and what comes out of it.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use gst::prelude::*;

use zerocopy_test_producer::Pixels;

use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::{Outcome, virtgpu};

/// An error that has ended the stream is on the bus already, behind other messages.
const SAID: Duration = Duration::from_secs(1);

/// The element gives a daemon 5 s to answer, which a busy emulated machine may take.
const STARTS: u32 = 3;

/// The pipeline. It ends with the value.
pub struct Run {
    pipeline: gst::Pipeline,
    source: gst::Element,
    sink: gst_app::AppSink,
}

/// A frame that has come.
#[derive(Debug)]
pub struct Frame {
    sample: gst::Sample,
}

impl Run {
    /// Plays what the node shows, for a sink that takes `caps`. `settings` are the `output-mode` and what
    /// else is set: "cuda cuda-device-id=1".
    pub fn start(node: &str, settings: &str, caps: &str) -> Outcome<Self> {
        Self::watched(node, settings, caps, |_, _| Ok(()))
    }

    /// The same, where `watch` sees the pipeline and its sink's pad before they play.
    pub fn watched(
        node: &str,
        settings: &str,
        caps: &str,
        watch: impl FnOnce(&gst::Pipeline, &gst::Pad) -> Outcome<()>,
    ) -> Outcome<Self> {
        let mut settings = settings.split(' ');
        let mode = settings.next().unwrap_or_default();
        let source = gst::ElementFactory::make("pipewirezerocopysrc")
            .property("target-object", node)
            .property("keepalive-time", 0_u32)
            // The waits here have limits of their own.
            .property("first-frame-timeout", 0_u32)
            .property_from_str("output-mode", mode)
            // It may not have shown up in the registry yet.
            .property_from_str("on-disconnect", "none")
            .build()?;
        for (name, value) in settings.filter_map(|setting| setting.split_once('=')) {
            source.set_property_from_str(name, value);
        }
        let sink = gst_app::AppSink::builder()
            .sync(false)
            .caps(&caps.parse()?)
            .build();
        // Else it would keep the last buffer that it gave out.
        sink.set_property("enable-last-sample", false);
        let pipeline = gst::Pipeline::new();
        pipeline.add_many([&source, sink.upcast_ref()])?;
        source.link(&sink)?;
        watch(
            &pipeline,
            &sink.static_pad("sink").ok_or("a sink without a pad")?,
        )?;
        let run = Self {
            pipeline,
            source,
            sink,
        };
        for _ in 1..STARTS {
            if run.pipeline.set_state(gst::State::Playing).is_ok() {
                return Ok(run);
            }
            run.stop()?;
        }
        if run.pipeline.set_state(gst::State::Playing).is_err() {
            return Err(run.error(SAID)?.into());
        }
        Ok(run)
    }

    /// From now on the sink answers that it takes DMA-BUFs, and refuses their caps when they come.
    pub fn refuse_dmabufs(&self) -> Outcome<()> {
        let pad = self.sink.static_pad("sink").ok_or("a sink without a pad")?;
        pad.add_probe(gst::PadProbeType::QUERY_DOWNSTREAM, |_, info| {
            let Some(gst::QueryViewMut::AcceptCaps(query)) =
                info.query_mut().map(gst::QueryRef::view_mut)
            else {
                return gst::PadProbeReturn::Ok;
            };
            let features = query.caps().features(0);
            if !features.is_some_and(|all| all.contains(gst_allocators::CAPS_FEATURE_MEMORY_DMABUF))
            {
                return gst::PadProbeReturn::Ok;
            }
            query.set_result(false);
            gst::PadProbeReturn::Handled
        });
        Ok(())
    }

    /// The most that a frame comes late, as the element says.
    pub fn latency(&self) -> Outcome<Duration> {
        let mut query = gst::query::Latency::new();
        if !self.source.query(&mut query) {
            return Err("the element does not say its latency".into());
        }
        Ok(query.result().1.into())
    }

    /// The element's source pad.
    pub fn pad(&self) -> Outcome<gst::Pad> {
        Ok(self
            .source
            .static_pad("src")
            .ok_or("a source without a pad")?)
    }

    /// From now on the sink takes other caps, and says so.
    pub fn change_caps(&self, caps: &str) -> Outcome<()> {
        self.sink.set_caps(Some(&caps.parse()?));
        let pad = self.sink.static_pad("sink").ok_or("a sink without a pad")?;
        pad.push_event(gst::event::Reconfigure::new());
        Ok(())
    }

    /// From now on the sink keeps the last buffer that it gave out, as sinks do.
    pub fn keep_last(&self) {
        self.sink.set_property("enable-last-sample", true);
    }

    /// The reason that the element's message gives for frames in that memory, and not in another.
    pub fn reason(&self, memory: &str) -> Outcome<String> {
        let bus = self.pipeline.bus().ok_or("a pipeline without a bus")?;
        while let Some(message) = bus.pop_filtered(&[gst::MessageType::Element]) {
            let said = message
                .structure()
                .filter(|said| said.name() == "pipewire-capture");
            if let Some(said) = said.filter(|said| said.get::<&str>("memory") == Ok(memory)) {
                return Ok(said.get("reason")?);
            }
        }
        Err(format!("no message with memory={memory}").into())
    }

    /// The next frame, if one comes in time. What the bus says of an error is one here.
    pub fn frame(&self, limit: Duration) -> Outcome<Option<Frame>> {
        let limit = gst::ClockTime::try_from(limit)?;
        if let Some(sample) = self.sink.try_pull_sample(limit) {
            return Ok(Some(Frame { sample }));
        }
        if self.sink.is_eos() {
            return Err(self.error(SAID)?.into());
        }
        Ok(None)
    }

    /// The text of the error that ends the stream within `limit`.
    pub fn error(&self, limit: Duration) -> Outcome<String> {
        let bus = self.pipeline.bus().ok_or("a pipeline without a bus")?;
        let limit = gst::ClockTime::try_from(limit)?;
        let message = bus.timed_pop_filtered(limit, &[gst::MessageType::Error]);
        match message.as_ref().map(|message| message.view()) {
            Some(gst::MessageView::Error(error)) => {
                let debug = error.debug().unwrap_or_default();
                Ok(format!("{} ({debug})", error.error()).replace('\n', " "))
            }
            _ => Err("the element says no error".into()),
        }
    }

    /// A field of the element's statistics, as text.
    pub fn stat(&self, name: &str) -> String {
        let stats = self.source.property::<gst::Structure>("stats");
        let value = stats.value(name).ok();
        value.map_or_else(String::new, |value| match value.get::<String>() {
            Ok(text) => text,
            Err(_) => value
                .get::<u64>()
                .map_or_else(|_| String::new(), |n| n.to_string()),
        })
    }

    /// Frames that have come to an end in the element: they have left, or were dropped.
    pub fn seen(&self) -> [String; 2] {
        ["frames", "dropped"].map(|name| self.stat(name))
    }

    /// Pauses the pipeline.
    pub fn pause(&self) -> Outcome<()> {
        self.pipeline.set_state(gst::State::Paused)?;
        Ok(())
    }

    /// Plays again what was stopped or paused.
    pub fn play(&self) -> Outcome<()> {
        match self.pipeline.set_state(gst::State::Playing) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.error(SAID)?.into()),
        }
    }

    /// Ends the pipeline. Returns how long that took.
    pub fn stop(&self) -> Outcome<Duration> {
        let start = Instant::now();
        self.pipeline.set_state(gst::State::Null)?;
        Ok(start.elapsed())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

impl Frame {
    /// The pool that its buffer is of.
    pub fn pool(&self) -> Option<gst::BufferPool> {
        let buffer = self.sample.buffer()?;
        // One that is kept for later leaves as a copy that refers to it.
        let parent = buffer.meta::<gst::ParentBufferMeta>();
        let made = parent.as_ref().map_or(buffer, |meta| meta.parent());
        // SAFETY: the pool of a buffer is a pool or null, and stays as long as the buffer.
        unsafe { gst::glib::translate::from_glib_none((*made.as_ptr()).pool) }
    }

    /// Whether it lies in DMA-BUFs, all of it; and whether its caps say so.
    pub fn is_dmabuf(&self) -> Outcome<bool> {
        let buffer = self.sample.buffer().ok_or("a sample without a buffer")?;
        let caps = self.sample.caps().ok_or("a sample without caps")?;
        let features = caps.features(0).ok_or("caps without features")?;
        let said = features.contains(gst_allocators::CAPS_FEATURE_MEMORY_DMABUF);
        let mut memories = buffer.iter_memories();
        let is = memories.all(gst::MemoryRef::is_memory_type::<gst_allocators::DmaBufMemory>);
        if said && !is {
            return Err(format!("caps {caps} on other memory").into());
        }
        Ok(said)
    }

    /// How many memories it is in.
    pub fn memories(&self) -> usize {
        self.sample.buffer().map_or(0, gst::BufferRef::n_memory)
    }

    /// The host's number of its memory.
    pub fn resource(&self) -> Outcome<u32> {
        let buffer = self.sample.buffer().ok_or("a sample without a buffer")?;
        let memory = buffer.peek_memory(0);
        let memory = memory
            .downcast_memory_ref::<gst_allocators::FdMemory>()
            .ok_or("memory without a descriptor")?;
        // SAFETY: the memory has the descriptor for as long as it lives, longer than this call.
        let fd = unsafe { BorrowedFd::borrow_raw(memory.fd()) };
        Ok(virtgpu::resource_of(
            &Node::open(VIRTIO_GPU, Kind::Render)?,
            fd,
        )?)
    }

    /// Its caps in short: width, height, format and, where it has one, DRM format.
    pub fn caps(&self) -> String {
        let caps = self.sample.caps().map(gst::CapsRef::to_owned);
        let structure = caps.as_ref().and_then(|caps| caps.structure(0));
        let Some(structure) = structure else {
            return "no caps".to_owned();
        };
        let number = |name| structure.get::<i32>(name).unwrap_or_default();
        let text = |name| structure.get::<String>(name).unwrap_or_default();
        let (width, height) = (number("width"), number("height"));
        format!("{width}x{height} {} {}", text("format"), text("drm-format"))
            .trim_end()
            .to_owned()
    }

    /// Compares every byte with picture `number`. Says what is wrong.
    pub fn compare(&self, pixels: Pixels, size: (u32, u32), number: u8) -> Outcome<()> {
        let caps = self.caps();
        let [name, fourcc] = pixels.names();
        let (width, height) = size;
        let shape = format!("{width}x{height}");
        let formats = [
            format!("{shape} {name}"),
            format!("{shape} DMA_DRM {fourcc}"),
            format!("{shape} DMA_DRM {fourcc}:0x0000000000000000"),
        ];
        if !formats.contains(&caps) {
            return Err(format!("it is {caps}, not {}", formats[0]).into());
        }
        let buffer = self.sample.buffer().ok_or("a sample without a buffer")?;
        let extents = pixels.planes(size);
        let format = gst_video::VideoFormat::from_string(name);
        let info = gst_video::VideoInfo::builder(format, width, height).build()?;
        // Only the meta knows how the producer's memory is laid out.
        let from_meta = buffer.meta::<gst_video::VideoMeta>();
        let (offsets, strides) = from_meta.as_ref().map_or_else(
            || (info.offset(), info.stride()),
            |meta| (meta.offset(), meta.stride()),
        );
        let bytes = buffer.map_readable()?;
        for (plane, (columns, rows)) in extents.into_iter().enumerate() {
            for row in 0..rows {
                let start = offsets[plane] + row * strides[plane] as usize;
                let line = bytes
                    .get(start..start + columns)
                    .ok_or_else(|| format!("plane {plane} ends before row {row}"))?;
                for (column, seen) in line.iter().enumerate() {
                    let drawn = pixels.byte(number, plane, row, column);
                    if *seen != drawn && !(pixels == Pixels::Bgrx && column % 4 == 3) {
                        return Err(format!(
                            "byte {column} of row {row}, plane {plane}: {seen:#04x}, not {drawn:#04x}"
                        )
                        .into());
                    }
                }
            }
        }
        Ok(())
    }
}
