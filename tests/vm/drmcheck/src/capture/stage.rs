// SPDX-License-Identifier: MIT OR Apache-2.0

//! What all scenes do: show a picture, wait for the frame with it, and compare.

use std::cell::Cell;
use std::time::{Duration, Instant};

use zerocopy_test_producer::{Event, Offer, Pixels, Producer, STALE, Shown, SyncNode, When};

use super::canvas::Style;
use super::run::{Frame, Run};
use crate::Outcome;
use crate::node::{Kind, Node, VIRTIO_GPU};

/// What takes either memory.
pub const ANY: &str = "video/x-raw(memory:DMABuf); video/x-raw";
/// Catches a hang; nothing takes nearly as long, on a busy emulated processor either.
pub const LIMIT: Duration = Duration::from_mins(1);
/// A picture that meets a busy machine is thrown away by PipeWire: shown again after this.
pub const AGAIN: Duration = Duration::from_secs(1);
/// A frame that comes within this has not waited for its picture.
pub const TOO_EARLY: Duration = Duration::from_millis(300);
/// What comes later than this may have waited as long as the element ever does, on a busy machine.
pub const GIVEN_UP: Duration = Duration::from_millis(900);

/// A producer and who takes its frames.
pub struct Stage {
    pub producer: Producer,
    pub run: Run,
    pub pixels: Cell<Pixels>,
    pub size: Cell<(u32, u32)>,
}

impl Stage {
    pub fn start(node: &str, offer: Offer, style: Style, mode: &str) -> Outcome<Self> {
        Self::with_sync(node, offer, style, mode, false)
    }

    /// With a sink that does not take what it says that it takes.
    pub fn refused(node: &str, offer: Offer, style: Style) -> Outcome<Self> {
        let stage = Self::start(node, offer, style, "auto")?;
        stage.run.refuse_dmabufs()?;
        Ok(stage)
    }

    pub fn with_sync(
        node: &str,
        offer: Offer,
        style: Style,
        mode: &str,
        sync: bool,
    ) -> Outcome<Self> {
        Self::taking(node, offer, style, mode, (ANY, sync))
    }

    pub fn taking(
        node: &str,
        offer: Offer,
        style: Style,
        mode: &str,
        (caps, sync): (&str, bool),
    ) -> Outcome<Self> {
        Self::watched(node, offer, style, mode, (caps, sync), |_, _| Ok(()))
    }

    /// See [`Run::watched`].
    pub fn watched(
        node: &str,
        offer: Offer,
        style: Style,
        mode: &str,
        (caps, sync): (&str, bool),
        watch: impl FnOnce(&gst::Pipeline, &gst::Pad) -> Outcome<()>,
    ) -> Outcome<Self> {
        let (pixels, size) = (offer.pixels, offer.size);
        let timelines = || SyncNode::new(Node::open(VIRTIO_GPU, Kind::Render)?);
        let sync = sync.then(timelines).transpose()?;
        let producer = Producer::start(node, offer, style, sync)?;
        let run = Run::watched(node, mode, caps, watch)?;
        Ok(Self {
            producer,
            run,
            pixels: Cell::new(pixels),
            size: Cell::new(size),
        })
    }

    /// The modifier that is agreed on.
    pub fn agreed(&self) -> Outcome<Option<u64>> {
        self.producer.wait(LIMIT, |event| match event {
            Event::Format(modifier) => Some(modifier),
            _ => None,
        })
    }

    pub fn compare(&self, frame: &Frame, number: u8) -> Outcome<()> {
        frame.compare(self.pixels.get(), self.size.get(), number)
    }

    /// The frame with picture `number`, which is shown until it comes.
    pub fn shown(&self, number: u8) -> Outcome<(Frame, Shown)> {
        let end = Instant::now() + LIMIT;
        let mut why = "nothing came".to_owned();
        while Instant::now() < end {
            let shown = self.show(number, When::Before)?;
            while let Some(frame) = self.run.frame(AGAIN)? {
                match self.compare(&frame, number) {
                    Ok(()) => return Ok((frame, shown)),
                    // What was shown before, or its caps, may come once more.
                    Err(error) => why = error.to_string(),
                }
            }
        }
        Err(format!("picture {number} did not come: {why}").into())
    }

    /// Returns when the picture has left the producer.
    pub fn show(&self, number: u8, when: When) -> Outcome<Shown> {
        self.producer.show(number, when);
        self.producer.wait(LIMIT, |event| match event {
            Event::Shown(shown) => Some(shown),
            _ => None,
        })
    }

    pub fn finish(&self) -> Outcome<()> {
        self.producer.finish();
        let finished = |event| matches!(event, Event::Finished).then_some(());
        self.producer.wait(LIMIT, finished)
    }

    /// Shows a picture that is not drawn yet, and then draws it, unless a frame with nothing in it has come
    /// before. Returns what there is to know of its buffer; none where the machine was too busy to tell.
    pub fn late(&self, number: u8) -> Outcome<Option<Shown>> {
        let start = Instant::now();
        let shown = self.show(number, When::After)?;
        while let Some(frame) = self.run.frame(TOO_EARLY)? {
            // Before it is looked at: reading a DMA-BUF waits for fences on it.
            let came = start.elapsed();
            if self.compare(&frame, STALE).is_ok() {
                return match came {
                    early if early < GIVEN_UP => Err("it came before it was drawn".into()),
                    _ => Ok(None),
                };
            }
            // What was shown before may come once more.
        }
        Ok(Some(shown))
    }

    /// A frame that leaves undrawn must come when it is drawn, and not before.
    pub fn waited_for(&self, number: u8) -> Outcome<()> {
        let end = Instant::now() + LIMIT;
        while Instant::now() < end {
            let shown = self.late(number)?;
            self.finish()?;
            if shown.is_none() {
                continue;
            }
            while let Some(frame) = self.run.frame(AGAIN)? {
                if self.compare(&frame, number).is_ok() {
                    return Ok(());
                }
            }
        }
        Err("a picture that was drawn late did not come".into())
    }
}

/// Compares what was found with what should be.
pub fn expect(what: &str, seen: impl Into<String>, wanted: &str) -> Outcome<()> {
    let seen = seen.into();
    if seen == wanted {
        return Ok(());
    }
    Err(format!("{what} is {seen}, not {wanted}").into())
}

/// Whether a frame is in DMA-BUFs, and says so.
pub fn expect_dmabuf(frame: &Frame, wanted: bool) -> Outcome<()> {
    let words = |is: bool| if is { "DMA-BUF" } else { "system" };
    expect("its memory", words(frame.is_dmabuf()?), words(wanted))
}
