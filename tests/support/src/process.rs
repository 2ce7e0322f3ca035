// SPDX-License-Identifier: MIT OR Apache-2.0

//! What this process has open: figures that must not grow.

use std::fs;

/// Open descriptors of this process.
pub fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd")
        .expect("Linux has /proc")
        .count()
}

/// Threads of this process.
pub fn threads() -> usize {
    fs::read_dir("/proc/self/task")
        .expect("Linux has /proc")
        .count()
}
