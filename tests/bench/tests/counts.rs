// SPDX-License-Identifier: MIT OR Apache-2.0

//! What vsockenc does for a frame, counted from outside by a preloaded library (tests/bench/counter).
//! Counts, not times: they are the same on every machine.

use std::collections::BTreeMap;
use std::env;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_zerocopy-bench");

/// Bytes allocated for a frame: structures, and no access unit.
const SMALL: f64 = 4096.0;

/// Counts per frame may differ by as much from one size to another: reads and wake-ups are a
/// matter of timing.
const NOISE: f64 = 12.0;

struct Peer {
    child: Child,
    addresses: Value,
}

impl Peer {
    fn start() -> Self {
        let mut child = Command::new(PROGRAM)
            .arg("peer")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut first)
            .unwrap();
        Self {
            child,
            addresses: serde_json::from_str(&first).unwrap(),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends with its standard input.
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

/// Cargo builds the library for this test and puts it beside it.
fn counter() -> PathBuf {
    let library = env::current_exe()
        .unwrap()
        .with_file_name("libzerocopy_counter.so");
    assert!(library.exists(), "no {}", library.display());
    library
}

/// Counts per frame of a picture's way through `contender`.
fn counts(contender: &str, picture: &Value, address: &Value) -> BTreeMap<String, f64> {
    let case = json!({
        "contender": contender, "pace": "single", "picture": picture, "address": address,
        "warm_up": 16, "frames": 64,
    });
    let output = Command::new(PROGRAM)
        .args(["run", &case.to_string()])
        .env("LD_PRELOAD", counter())
        // GLib's own allocator would hide allocations from malloc().
        .env("G_SLICE", "always-malloc")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "{case}");
    let outcomes: Value = serde_json::from_slice(&output.stdout).unwrap();
    serde_json::from_value(outcomes[0]["counts"].clone()).unwrap()
}

fn picture(width: u32, height: u32, format: &str, padding: u32) -> Value {
    json!({ "width": width, "height": height, "format": format, "padding": padding })
}

/// Every layout that is sent in another way: tight, padded, padded by more than the pixels, and with
/// rows that are sent longer than they are.
fn layouts(width: u32, height: u32) -> Vec<Value> {
    vec![
        picture(width, height, "BGRA", 0),
        picture(width, height, "BGRA", 64),
        picture(width, height, "BGRA", 5 * width),
        picture(width, height, "NV12", 0),
        picture(width, height, "NV12", 64),
        picture(width, height, "NV12", 2 * width),
        picture(width - 1, height, "NV12", 1),
    ]
}

#[test]
fn no_allocation_grows_with_the_frame_and_no_pixel_is_copied() {
    let peer = Peer::start();
    for address in ["tcp", "unix"] {
        let address = &peer.addresses[address];
        for (small, large) in layouts(64, 48).iter().zip(&layouts(1280, 720)) {
            let few = counts("vsockenc", small, address);
            let many = counts("vsockenc", large, address);
            let said = format!("{large} to {address}: {many:?}, and {small}: {few:?}");
            assert!(many["allocations"] > 0.0, "nothing was counted: {said}");
            assert!(many["large_allocations"] == 0.0, "{said}");
            assert!(many["allocations"] <= few["allocations"] + NOISE, "{said}");
            assert!(many["allocated_bytes"] < SMALL, "{said}");
            // Structures are moved, more often where a picture goes in several pieces, and all the
            // more in a debug build. A picture's rows would be a megabyte and more.
            let grown = many["copied_bytes"] - few["copied_bytes"];
            assert!(grown < 1280.0 * 720.0 / 8.0, "{said}");
            // That of the access unit.
            assert!(many["large_copies"] <= 1.0, "{said}");
        }
    }
}

#[test]
fn a_copy_of_the_picture_would_be_counted() {
    // x264 takes its pictures into frames of its own.
    let counts = counts("x264enc", &picture(320, 240, "NV12", 64), &Value::from(""));
    assert!(counts["copied_bytes"] > 320.0 * 240.0, "{counts:?}");
}
