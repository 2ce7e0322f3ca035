// SPDX-License-Identifier: MIT OR Apache-2.0

//! The figures behind the `stats` property.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use zerocopy_plugin_common::Quantiles;

use super::caps::OutputMemory;
use crate::capture::Counters;
use crate::capture::frame::Sync;
use crate::cuda::Way;

/// Who has waited until a frame was drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum WaitedBy {
    /// Nobody: it was drawn already, or nothing says when it is.
    #[default]
    Nobody,
    /// The streaming thread.
    Thread,
    /// The GPU that copies it.
    Gpu,
}

impl WaitedBy {
    fn name(self) -> &'static str {
        match self {
            Self::Nobody => "none",
            Self::Thread => "thread",
            Self::Gpu => "gpu",
        }
    }
}

/// What is counted beside the capture's own [`Counters`].
#[derive(Default)]
pub(super) struct Figures {
    /// What the capture counts itself.
    pub counters: Arc<Counters>,
    /// Errors posted.
    pub errors: u64,
    /// Times that the producer has returned.
    pub reconnects: u64,
    frames: u64,
    keepalives: u64,
    copies: u64,
    /// The last frame was copied.
    copying: bool,
    /// Memory in which the last frame left.
    pub memory: Option<OutputMemory>,
    /// How the last frame was kept from being read too early.
    pub sync: Sync,
    /// Who waited until the last frame was drawn.
    pub waited: WaitedBy,
    /// The last frame was kept for a frame's time, because nothing said when it was drawn.
    pub latched: bool,
    /// How the last frame came into CUDA memory.
    pub way: Option<Way>,
    bytes_received: u64,
    bytes_sent: u64,
    latency: Quantiles,
}

impl Figures {
    /// Nothing has happened yet but what `counters` say.
    pub fn new(counters: Arc<Counters>) -> Self {
        Self {
            counters,
            ..Self::default()
        }
    }

    /// A frame of `bytes` is about to leave, `latency` after it was captured.
    pub fn add_frame(&mut self, bytes: usize, latency: Duration) {
        self.frames += 1;
        self.bytes_received += bytes as u64;
        self.bytes_sent += bytes as u64;
        self.latency.add(latency);
    }

    /// The last frame of `bytes` is about to leave with a pointer that has moved.
    pub fn add_pointer(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes_sent += bytes as u64;
    }

    /// The CPU has copied a frame, or it was not necessary.
    pub fn add_transfer(&mut self, copied: bool) {
        self.copies += u64::from(copied);
        self.copying = copied;
    }

    /// A frame of `bytes` is about to leave once more.
    pub fn add_keepalive(&mut self, bytes: usize) {
        self.keepalives += 1;
        self.bytes_sent += bytes as u64;
    }

    /// The value of `stats`; docs/elements/pipewirezerocopysrc.md explains the fields.
    pub fn structure(&self) -> gst::Structure {
        let counters = &self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (p50, p99) = self.latency.p50_p99_us();
        let memory = self.memory.unwrap_or(OutputMemory::System);
        let transfer = match memory {
            OutputMemory::Cuda => "gpu-copy",
            _ if self.copying => "copy",
            _ => "shared",
        };
        let sync = match self.sync {
            _ if self.latched => "latch",
            Sync::None => "none",
            Sync::Implicit => "implicit",
            Sync::Explicit => "explicit",
        };
        gst::Structure::builder("pipewirezerocopysrc-stats")
            .field("frames", self.frames)
            .field("bytes-sent", self.bytes_sent)
            .field("bytes-received", self.bytes_received)
            .field("dropped", load(&counters.dropped))
            .field("errors", self.errors)
            .field("reconnects", self.reconnects)
            .field("transfer", transfer)
            .field("keepalives", self.keepalives)
            .field("copies", self.copies)
            .field("corrupted", load(&counters.corrupted))
            .field("empty", load(&counters.empty))
            .field("held-buffers", load(&counters.held))
            .field("memory", memory.name())
            .field("import", self.way.map_or("none", Way::name))
            .field("sync", sync)
            .field("waited-by", self.waited.name())
            .field("latency-p50-us", p50)
            .field("latency-p99-us", p99)
            .build()
    }
}
