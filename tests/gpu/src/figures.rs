// SPDX-License-Identifier: MIT OR Apache-2.0

//! Times of many frames, in a table, and what they should be.

use std::time::{Duration, Instant};

/// What is done for each frame: the buffer is imported already.
pub const COPY: &str = "a frame";
/// The same of `cudaupload`, for comparison.
pub const UPLOAD: &str = "cudaupload";
/// Where the targets are looked at.
const TARGET_SIZE: (u32, u32) = (3840, 2160);

/// Targets for a frame at [`TARGET_SIZE`] on a data-centre GPU: 99 of 100, and each.
const MOST: [Duration; 2] = [Duration::from_micros(300), Duration::from_millis(2)];
/// How much less CPU time than `cudaupload`.
const LESS: f64 = 5.0;

/// Wall-clock time of each frame, and the process's CPU time of all.
pub struct Times {
    wall: Vec<Duration>,
    cpu: Duration,
}

/// One line of the table.
pub struct Row {
    /// How pixels are got at.
    pub way: &'static str,
    /// Pixels.
    pub size: (u32, u32),
    pub what: &'static str,
    pub times: Times,
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

    /// The time within which so many of 100 were done.
    fn within(&self, part: usize) -> Duration {
        let last = self.wall.len().saturating_sub(1);
        self.wall
            .get(last * part / 100)
            .copied()
            .unwrap_or_default()
    }

    /// Seconds of CPU for one.
    fn cpu(&self) -> f64 {
        self.cpu.as_secs_f64() / self.wall.len().max(1) as f64
    }
}

/// A size for people.
pub fn name(size: (u32, u32)) -> String {
    match size {
        (1920, 1080) => "1080p".into(),
        (3840, 2160) => "4K".into(),
        (width, height) => format!("{width}x{height}"),
    }
}

/// Prints all of them, and whether the targets are met.
pub fn print(rows: &[Row]) {
    println!();
    println!("| way | size | what | p50 ms | p99 ms | max ms | CPU ms each | of |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let ms = |part| row.times.within(part).as_secs_f64() * 1e3;
        println!(
            "| {} | {} | {} | {:.3} | {:.3} | {:.3} | {:.3} | {} |",
            row.way,
            name(row.size),
            row.what,
            ms(50),
            ms(99),
            ms(100),
            row.times.cpu() * 1e3,
            row.times.wall.len()
        );
    }
    println!();
    let at_target = |what| {
        rows.iter()
            .filter(move |row| row.what == what && row.size == TARGET_SIZE)
    };
    let upload = at_target(UPLOAD).map(|row| row.times.cpu()).next();
    for row in at_target(COPY) {
        let verdict = |held| if held { "held" } else { "MISSED" };
        let [p99, most] = MOST;
        println!(
            "{}: target of p99 under {p99:?} at {}: {}; none over {most:?}: {}; {LESS} times less CPU \
             than cudaupload: {}",
            row.way,
            name(TARGET_SIZE),
            verdict(row.times.within(99) < p99),
            verdict(row.times.within(100) <= most),
            upload.map_or("not measured", |cpu| verdict(row.times.cpu() * LESS <= cpu))
        );
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
