// SPDX-License-Identifier: MIT OR Apache-2.0

//! Times of many frames in a line.

use std::time::{Duration, Instant};

/// Wall-clock time of each frame, and the process's CPU time of all.
pub struct Times {
    wall: Vec<Duration>,
    cpu: Duration,
}

impl Times {
    /// Calls `frame` so often, after a few times that do not count.
    pub fn take<E>(frames: usize, mut frame: impl FnMut() -> Result<(), E>) -> Result<Self, E> {
        for _ in 0..20.min(frames) {
            frame()?;
        }
        let mut wall = Vec::with_capacity(frames);
        let before = cpu_time();
        for _ in 0..frames {
            let start = Instant::now();
            frame()?;
            wall.push(start.elapsed());
        }
        let cpu = cpu_time().saturating_sub(before);
        wall.sort_unstable();
        Ok(Self { wall, cpu })
    }

    /// Milliseconds: median, 99th percentile and longest, and CPU time of one.
    pub fn line(&self) -> String {
        let last = self.wall.len() - 1;
        let at = |part: usize| self.wall[last * part / 100].as_secs_f64() * 1e3;
        let cpu = self.cpu.as_secs_f64() * 1e3 / self.wall.len() as f64;
        format!(
            "p50 {:.3} p99 {:.3} max {:.3} ms; CPU {cpu:.3} ms a frame, over {} frames",
            at(50),
            at(99),
            at(100),
            last + 1
        )
    }
}

/// CPU time of the whole process: drivers have threads.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure that is written is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
