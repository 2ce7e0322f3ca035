// SPDX-License-Identifier: MIT OR Apache-2.0

//! CUDA memory that is agreed on anew, or cannot be had any more: also on a screen that has gone still, where
//! the picture that was to be copied is the last for a long time.

use std::time::{Duration, Instant};

use zerocopy_test_producer::{Offer, Pixels, When};

use super::{
    ALL, CUDA, Failing, Gpu, LAUNCH_FAILED, NOT_SUPPORTED, OUT_OF_MEMORY, fake, fallen_back, start,
};
use crate::Outcome;
use crate::capture::canvas::Memory;
use crate::capture::{AGAIN, LIMIT, LINEAR, Stage, expect, offer, padded};

/// Shows a picture once to an element whose `call` fails: it must leave all the same.
fn once(stage: &Stage, number: u8, call: &str) -> Outcome<()> {
    let end = Instant::now() + LIMIT;
    let mut tried = false;
    fake().calls();
    while Instant::now() < end {
        // PipeWire throws a picture away that meets a busy machine.
        if !tried {
            stage.show(number, When::Before)?;
        }
        while let Some(frame) = stage.run.frame(if tried { LIMIT } else { AGAIN })? {
            if stage.compare(&frame, number).is_ok() {
                return Ok(());
            }
        }
        if tried {
            return Err("the picture that could not be copied did not leave".into());
        }
        tried = fake().calls().iter().any(|made| made == call);
    }
    Err("no picture came to the element".into())
}

/// The first picture, of a kind that the driver refuses; a later one, when the GPU has no memory left, and
/// when it is lost.
pub fn fallback(node: &str) -> Outcome<()> {
    let _gpu = Gpu::new()?;
    let node = |name: &str| format!("{node}-{name}");
    {
        let calls = ["cuGraphicsEGLRegisterImage", "cuGraphicsGLRegisterImage"];
        let _failing = calls.map(|call| Failing::now(call, NOT_SUPPORTED));
        let stage = start(&node("refused"), Pixels::Bgrx, "auto", ALL)?;
        once(&stage, 1, calls[0])?;
        fallen_back(&stage, "cannot be copied into CUDA memory")?;
    }
    for (name, call, code) in [
        ("exhausted", "cuMemAllocPitch_v2", OUT_OF_MEMORY),
        ("lost", "cuMemcpy2DAsync_v2", LAUNCH_FAILED),
    ] {
        let stage = start(&node(name), Pixels::Bgrx, "auto", ALL)?;
        // The pool has one buffer, and this is in it.
        let _first = stage.shown(1)?;
        let _failing = Failing::now(call, code);
        once(&stage, 2, call)?;
        fallen_back(&stage, "CUDA")?;
    }
    Ok(())
}

/// A picture that is kept, for want of a fence, when downstream takes other memory all of a sudden.
pub fn kept(node: &str) -> Outcome<()> {
    let _gpu = Gpu::new()?;
    let offer = Offer {
        // A frame's time.
        most: Some(1),
        ..offer(Pixels::Bgrx, &[LINEAR], false)
    };
    let either = "video/x-raw(memory:CUDAMemory); video/x-raw";
    let stage = Stage::taking(node, offer, padded(Memory::Dumb), "auto", (either, false))?;
    stage.shown(1)?;
    expect("sync", stage.run.stat("sync"), "latch")?;
    let end = Instant::now() + LIMIT;
    let until = |held: bool, limit: Duration| {
        let end = Instant::now() + limit;
        while (stage.run.stat("held-buffers") != "0") != held && Instant::now() < end {
            // Nobody tells when a buffer is held.
            std::thread::sleep(Duration::from_millis(5));
        }
        Instant::now() < end
    };
    until(false, LIMIT);
    loop {
        stage.show(2, When::Before)?;
        if until(true, AGAIN) {
            break;
        }
        if Instant::now() > end {
            return Err("no picture came to the element".into());
        }
    }
    stage.run.change_caps("video/x-raw")?;
    while let Some(frame) = stage.run.frame(LIMIT)? {
        if stage.compare(&frame, 2).is_ok() {
            return expect("the memory", stage.run.stat("memory"), "system");
        }
    }
    Err("the picture that was kept did not leave".into())
}

/// Agreeing once more on what was agreed on gives no memory back, for which the GPU would stand still.
pub fn agreed_again(node: &str) -> Outcome<()> {
    let _gpu = Gpu::new()?;
    let stage = start(node, Pixels::Bgrx, "cuda", CUDA)?;
    stage.shown(1)?;
    fake().calls();
    stage.run.change_caps(CUDA)?;
    for number in 2..=4 {
        stage.shown(number)?;
    }
    let calls = fake().calls();
    let freed = |call: &&String| call.starts_with("cuMemFree");
    match calls.iter().find(freed) {
        None => Ok(()),
        Some(call) => Err(format!("{call} for the same caps: {calls:?}").into()),
    }
}
