// SPDX-License-Identifier: MIT OR Apache-2.0

//! CUDA memory that cannot be had any more when the screen has gone still: the picture that was to be copied
//! is the last for a long time.

use std::time::Instant;

use zerocopy_test_producer::{Pixels, When};

use super::{
    ALL, Failing, Gpu, LAUNCH_FAILED, NOT_SUPPORTED, OUT_OF_MEMORY, fake, fallen_back, start,
};
use crate::Outcome;
use crate::capture::{AGAIN, LIMIT, Stage};

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
        while let Some(frame) = stage.run.frame(AGAIN)? {
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
