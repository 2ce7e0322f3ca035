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

/// Bytes of memory of this process that are in RAM (proc_pid_status(5), `VmRSS`).
pub fn resident_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok());
    kib.expect("Linux has it") * 1024
}
