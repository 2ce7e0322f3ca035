// SPDX-License-Identifier: MIT OR Apache-2.0

//! What this process has open: figures that must not grow.

use std::fs;

/// What a process has at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    fds: usize,
    threads: usize,
    /// Bytes.
    memory: u64,
}

impl Usage {
    /// Of this process.
    pub fn now() -> Self {
        Self {
            fds: open_fds(),
            threads: threads(),
            memory: resident_memory(),
        }
    }

    /// What has leaked since `before`, in words, if so. To be asked after so many cycles, hundreds, that a
    /// leak of each shows.
    pub fn leak_since(&self, before: &Self) -> Option<String> {
        // GLib's pool may keep an idle thread more or less, and a peer close a socket a moment later.
        let has_leaked = self.fds > before.fds + 2
            || self.threads > before.threads + 2
            || self.memory >= before.memory + (4 << 20);
        has_leaked.then(|| format!("{self:?} of what was {before:?}"))
    }
}

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
fn resident_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok());
    kib.expect("Linux has it") * 1024
}
