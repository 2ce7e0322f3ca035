// SPDX-License-Identifier: MIT OR Apache-2.0

//! The figures behind the `stats` property.

use std::time::Duration;

use zerocopy_plugin_common::Quantiles;

/// What is counted beside the screen's own [`qemu_display::Figures`].
#[derive(Debug, Default)]
pub(super) struct Figures {
    /// Errors posted.
    pub errors: u64,
    /// Frames that left.
    pub frames: u64,
    /// Those among them that show nothing new.
    pub repeats: u64,
    /// Frames copied here.
    pub copies: u64,
    /// Bytes of all frames that left.
    pub bytes_sent: u64,
    /// Where the last picture lay.
    pub transfer: &'static str,
    /// From a change's arrival to its frame's departure.
    pub latency: Quantiles,
    /// What the screen said when it ended.
    pub screen: qemu_display::Figures,
}

impl Figures {
    /// A frame of `bytes` leaves, `age` after its newest change came.
    pub fn add_frame(&mut self, bytes: usize, age: Duration, repeated: bool, copied: bool) {
        self.frames += 1;
        self.bytes_sent += bytes as u64;
        self.copies += u64::from(copied);
        if repeated {
            self.repeats += 1;
        } else {
            self.latency.add(age);
        }
    }

    /// The value of `stats`; docs/elements/qemudisplaysrc.md explains the fields.
    pub fn structure(&self, screen: Option<qemu_display::Figures>) -> gst::Structure {
        let screen = screen.unwrap_or(self.screen);
        let (p50, p99) = self.latency.p50_p99_us();
        let memory = match self.transfer {
            "dmabuf" => "dmabuf",
            _ => "system",
        };
        gst::Structure::builder("qemudisplaysrc-stats")
            .field("frames", self.frames)
            .field("bytes-sent", self.bytes_sent)
            .field("bytes-received", screen.bytes)
            .field("dropped", screen.ignored)
            .field("errors", self.errors)
            .field("reconnects", 0u64)
            .field("transfer", self.transfer)
            .field("updates", screen.updates)
            .field("coalesced", screen.coalesced)
            .field("repeats", self.repeats)
            .field("copies", self.copies + screen.copies)
            .field("overlaps", screen.overlaps)
            .field("memory", memory)
            .field("latency-p50-us", p50)
            .field("latency-p99-us", p99)
            .build()
    }
}
