// SPDX-License-Identifier: MIT OR Apache-2.0

//! Figures, and how they are written.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::scanout;

/// What clients had encoded since the start, counted by their threads.
#[derive(Debug, Default)]
pub struct Encoded {
    frames: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl Encoded {
    /// A frame of so many bytes.
    pub fn add(&self, bytes: usize) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A frame that no encoder made.
    pub fn add_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }
}

/// How things stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Connections of clients.
    pub clients: u64,
    /// Answered FRAME_REQUESTs.
    pub encoded_frames: u64,
    /// Bytes of their access units.
    pub encoded_bytes: u64,
    /// FRAME_REQUESTs that an encoder failed at.
    pub encode_errors: u64,
    /// By id.
    pub scanouts: Vec<(u32, scanout::Figures)>,
    /// Of `--qemu`, where it is given.
    pub qemu: Option<QemuFigures>,
}

/// How it stands with QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QemuFigures {
    /// There is a connection.
    pub connected: bool,
    /// Connections after the first.
    pub reconnects: u64,
}

impl Figures {
    /// Takes over what was counted.
    pub fn with_encoded(self, encoded: &Encoded) -> Self {
        Self {
            encoded_frames: encoded.frames.load(Ordering::Relaxed),
            encoded_bytes: encoded.bytes.load(Ordering::Relaxed),
            encode_errors: encoded.errors.load(Ordering::Relaxed),
            ..self
        }
    }

    /// The line in the log.
    pub fn log(&self) {
        let sum = |figure: fn(&scanout::Figures) -> u64| -> u64 {
            self.scanouts
                .iter()
                .map(|(_, figures)| figure(figures))
                .sum()
        };
        tracing::info!(
            clients = self.clients,
            encoded = self.encoded_frames,
            subscribers = sum(|figures| figures.subscribers),
            pushed = sum(|figures| figures.frames),
            dropped = sum(|figures| figures.dropped),
            errors = self.encode_errors + sum(|figures| figures.encode_errors),
            reconnects = self.qemu.map(|qemu| qemu.reconnects),
            "status"
        );
    }

    /// Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = Text::default();
        let one = |value| [(None, value)];
        text.family(
            "clients",
            "gauge",
            "Connections of clients.",
            one(self.clients),
        );
        text.family(
            "encoded_frames_total",
            "counter",
            "Frames encoded for clients that sent them.",
            one(self.encoded_frames),
        );
        text.family(
            "encoded_bytes_total",
            "counter",
            "Bytes of these frames.",
            one(self.encoded_bytes),
        );
        text.family(
            "encode_errors_total",
            "counter",
            "Frames of clients that an encoder failed at.",
            one(self.encode_errors),
        );
        for (name, kind, help, figure) in SCANOUT {
            let values = self.scanouts.iter();
            let values = values.map(|(id, figures)| (Some(*id), figure(figures)));
            text.family(name, kind, help, values);
        }
        if let Some(qemu) = self.qemu {
            text.family(
                "qemu_connected",
                "gauge",
                "1 while there is a connection to QEMU.",
                one(qemu.connected.into()),
            );
            text.family(
                "qemu_reconnects_total",
                "counter",
                "Connections to QEMU after the first.",
                one(qemu.reconnects),
            );
        }
        text.0
    }
}

/// A figure of each scanout: name, kind, help.
type OfScanout = (
    &'static str,
    &'static str,
    &'static str,
    fn(&scanout::Figures) -> u64,
);

const SCANOUT: [OfScanout; 5] = [
    (
        "scanout_subscribers",
        "gauge",
        "Clients that watch the scanout.",
        |figures| figures.subscribers,
    ),
    (
        "scanout_frames_total",
        "counter",
        "Frames of the scanout, counted once however many watch.",
        |figures| figures.frames,
    ),
    (
        "scanout_bytes_total",
        "counter",
        "Bytes of these frames.",
        |figures| figures.bytes,
    ),
    (
        "scanout_dropped_frames_total",
        "counter",
        "Frames that slow subscribers have missed, over all of them.",
        |figures| figures.dropped,
    ),
    (
        "scanout_encode_errors_total",
        "counter",
        "Frames that the scanout's encoder failed at or skipped.",
        |figures| figures.encode_errors,
    ),
];

#[derive(Default)]
struct Text(String);

impl Text {
    /// A metric and its values, each with the id of a scanout where it is of one.
    fn family(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        values: impl IntoIterator<Item = (Option<u32>, u64)>,
    ) {
        let mut write = |line: std::fmt::Arguments<'_>| {
            // Writing to a String does not fail.
            let _ = writeln!(self.0, "{line}");
        };
        write(format_args!("# HELP helix_{name} {help}"));
        write(format_args!("# TYPE helix_{name} {kind}"));
        for (scanout, value) in values {
            match scanout {
                Some(id) => write(format_args!("helix_{name}{{scanout=\"{id}\"}} {value}")),
                None => write(format_args!("helix_{name} {value}")),
            }
        }
    }
}
