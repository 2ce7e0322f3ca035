// SPDX-License-Identifier: MIT OR Apache-2.0

//! What this process has open: figures that must not grow.

use std::fs;

/// What a process has at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    fds: usize,
    threads: usize,
    /// Bytes on the heap.
    memory: u64,
}

/// Bytes more that are no leak. Seen are 10 to 30 kB after 200 starts and stops, 120 kB after 1000.
const MOST_MORE: u64 = 256 << 10;

impl Usage {
    /// Of this process.
    pub fn now() -> Self {
        Self {
            fds: open_fds(),
            threads: threads(),
            memory: heap(),
        }
    }

    /// What has leaked since `before`, in words, if so. To be asked after so many cycles, hundreds, that a
    /// leak of each shows.
    pub fn leak_since(&self, before: &Self) -> Option<String> {
        // GLib's pool may keep an idle thread more or less, and a peer close a socket a moment later.
        let has_leaked = self.fds > before.fds + 2
            || self.threads > before.threads + 2
            || self.memory >= before.memory + MOST_MORE;
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

/// Bytes on the heap that are in use. Not what is in RAM, of which allocators keep more or less.
pub fn heap() -> u64 {
    // SAFETY: it only reads the allocator's own figures, under its own locks.
    let info = unsafe { nix::libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}
