// SPDX-License-Identifier: MIT OR Apache-2.0

//! What this process has open: figures that must not grow.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::{env, fs};

/// What a process has at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    fds: usize,
    threads: usize,
    /// Bytes on the heap.
    memory: u64,
}

/// Bytes more that are no leak, where there are no caches. Seen are less than 1 kB, and 3 kB more where
/// one more thread than before ran at once: glibc keeps what it made for its thread-local variables.
const MOST_MORE: u64 = 10 << 10;

/// Keeps glibc from putting freed memory by for the thread that freed it, and GLib (before 2.76) for
/// all: both count as in use, 60 to 120 kB after 1000 starts and stops that leave nothing. One arena
/// for all threads, as the second has a size of its own.
const WITHOUT_CACHES: [(&str, &str); 2] = [
    (
        "GLIBC_TUNABLES",
        "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1",
    ),
    ("G_SLICE", "always-malloc"),
];

/// Starts this program over, with the same arguments, unless its allocators have no caches already:
/// then [`Usage`] is exact. To be called before anything else, as what was begun is lost.
pub fn without_caches() {
    if !has_caches() {
        return;
    }
    let error = itself().args(env::args_os().skip(1)).exec();
    panic!("cannot start this program over: {error}");
}

/// Runs the test of that name, as `--exact` takes it, in a process that has nothing else to do and whose
/// allocators have no caches; false where this is that process. Fails where the test does.
#[must_use]
pub fn done_alone(test: &str) -> bool {
    if !has_caches() {
        return false;
    }
    let output = itself().args(["--exact", test]).output();
    let output = output.expect("this program can be started");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    // It is content without a test of that name too.
    let passed = output.status.success() && said.contains("1 passed");
    assert!(passed, "{test} by itself:\n{said}{errors}");
    true
}

fn has_caches() -> bool {
    WITHOUT_CACHES
        .iter()
        .any(|(name, value)| env::var(name).as_deref() != Ok(value))
}

/// This program without caches.
fn itself() -> Command {
    let mut command = Command::new(env::current_exe().expect("Linux has /proc"));
    command.envs(WITHOUT_CACHES);
    command
}

impl Usage {
    /// Of this process.
    pub fn now() -> Self {
        Self {
            fds: open_fds(),
            threads: threads(),
            memory: heap(),
        }
    }

    /// What has leaked since `before`, in words, if so. To be asked [`without_caches`], and after so
    /// many cycles, hundreds, that a leak of each shows: 64 bytes of each of 200 do.
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

/// Bytes on the heap that are in use, or in caches that [`without_caches`] are not there. Not what is
/// in RAM, of which allocators keep more or less.
pub fn heap() -> u64 {
    // SAFETY: it only reads the allocator's own figures, under its own locks.
    let info = unsafe { nix::libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}
