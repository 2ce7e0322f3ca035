// SPDX-License-Identifier: MIT OR Apache-2.0

//! The figures behind the `stats` property.

use zerocopy_plugin_common::Quantiles;

/// Counted since the element was started.
#[derive(Clone, Debug, Default)]
pub(super) struct Figures {
    pub frames: u64,
    pub keyframes: u64,
    pub dropped: u64,
    pub errors: u64,
    pub reconnects: u64,
    pub resyncs: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// From capture to arrival, where the host's clock can be read here.
    pub latency: Quantiles,
}

impl Figures {
    /// The value of `stats`; docs/elements/scanoutsrc.md explains the fields.
    pub fn structure(&self) -> gst::Structure {
        let (p50, p99) = self.latency.p50_p99_us();
        gst::Structure::builder("scanoutsrc-stats")
            .field("frames", self.frames)
            .field("bytes-sent", self.bytes_sent)
            .field("bytes-received", self.bytes_received)
            .field("dropped", self.dropped)
            .field("errors", self.errors)
            .field("reconnects", self.reconnects)
            .field("transfer", "h264")
            .field("keyframes", self.keyframes)
            .field("resyncs", self.resyncs)
            .field("latency-p50-us", p50)
            .field("latency-p99-us", p99)
            .build()
    }
}
