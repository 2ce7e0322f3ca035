// SPDX-License-Identifier: MIT OR Apache-2.0

//! The same over and over must leave neither GPU memory nor descriptors behind.

use std::time::{Duration, Instant};

use gst::prelude::*;
use gstpipewirezerocopy::cuda::{Context, Pool, Stream};

use crate::Outcome;
use crate::gpu::Gpu;

/// After so many, all has been made that is made once.
const SETTLED: usize = 10;
/// What one forgotten context keeps is 28 MiB (L17); less than one in all of them is none.
const MOST: usize = 14 << 20;
/// For what happens elsewhere after the last one.
const SETTLES: Duration = Duration::from_secs(10);
/// For all of them: the machine is lent for minutes.
const LIMIT: Duration = Duration::from_mins(3);

/// Calls `cycle` so often, less where that takes too long, and compares. False where something stays behind.
pub fn check(
    what: &str,
    gpu: &Gpu,
    cycles: usize,
    mut cycle: impl FnMut(usize) -> Outcome<()>,
) -> Outcome<bool> {
    let count = |folder: &str| std::fs::read_dir(folder).map(Iterator::count);
    let start = Instant::now();
    let (mut used, mut open) = (0, 0);
    let mut done = 0;
    while done < cycles && start.elapsed() < LIMIT {
        cycle(done)?;
        done += 1;
        if done <= SETTLED {
            used = used.max(gpu.used()?);
            open = open.max(count("/proc/self/fd")?);
        }
    }
    // A producer in this process is told later that its buffers are not wanted any more.
    let end = Instant::now() + SETTLES;
    while count("/proc/self/fd")? > open && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (used_now, open_now) = (gpu.used()?, count("/proc/self/fd")?);
    let right = used_now <= used + MOST && open_now <= open;
    println!(
        "{what}: {done} times in {:.1} s: {} MiB of the GPU in use before, {} after; {open} descriptors before, \
         {open_now} after; {} threads{}",
        start.elapsed().as_secs_f64(),
        used >> 20,
        used_now >> 20,
        count("/proc/self/task")?,
        if right { "" } else { ": WRONG" }
    );
    Ok(right)
}

/// A context, a stream, a pool and a buffer of it that is written and read back, without a picture.
pub fn without_pictures(gpu: &Gpu, device: u32, cycles: usize) -> Outcome<bool> {
    let format = gst_video::VideoFormat::Rgba;
    let info = gst_video::VideoInfo::builder(format, 1366, 768).build()?;
    let mut caps = info.to_caps()?;
    caps.make_mut()
        .set_features(0, Some(gst::CapsFeatures::new(["memory:CUDAMemory"])));
    check("contexts and pools", gpu, cycles, |number| {
        let context = Context::new(device)?;
        let stream = Stream::new(&context)?;
        let pool = Pool::new(&context, &stream, &caps, info.size() as u32)?.pool;
        pool.set_active(true)?;
        let mut buffer = pool.acquire_buffer(None)?;
        let value = number as u8;
        let writable = buffer.get_mut().ok_or("a buffer of the pool is in use")?;
        writable.map_writable()?.fill(value);
        let right = buffer.map_readable()?.iter().all(|byte| *byte == value);
        drop(buffer);
        pool.set_active(false)?;
        if right {
            Ok(())
        } else {
            Err("what was written to CUDA memory is not what is read back".into())
        }
    })
}
