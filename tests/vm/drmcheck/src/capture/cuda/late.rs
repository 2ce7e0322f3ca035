// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures whose fence comes too late: the GPU was told to wait for it, and neither the next picture nor a
//! stop hangs behind it.

use std::time::{Duration, Instant};

use zerocopy_test_producer::{Pixels, When};

use super::{CUDA, Gpu};
use crate::Outcome;
use crate::capture::canvas::{Memory, Style};
use crate::capture::run::Run;
use crate::capture::{LIMIT, LINEAR, Stage, offer, padded};

/// More than any stop takes, and less than a fence of vgem's, which ends by itself after 10 s.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Stopped while a picture is waited for, and while the one after it is.
pub fn stopped(node: &str) -> Outcome<()> {
    let _gpu = Gpu::new()?;
    let style = Style {
        promised: true,
        buffers: 8,
        ..padded(Memory::Dumb)
    };
    // Not with gl-texture: llvmpipe waits itself where a GPU is only told to. What a GPU is left with then is
    // for the tests of `GpuQueue`.
    for next in [false, true] {
        let node = format!("{node}-{next}");
        let settings = "cuda cuda-import=egl-image";
        let offer = offer(Pixels::Bgrx, &[LINEAR], true);
        let mut stage = Stage::taking(&node, offer, style, settings, (CUDA, true))?;
        stage.shown(1)?;
        stage.late(2)?;
        if next {
            given_up(&stage)?;
            stage.show(3, When::Before)?;
        }
        let took = stage.run.stop()?;
        if took > AT_ONCE {
            return Err(format!("stopping took {took:?}").into());
        }
        stage.run = Run::start(&node, settings, CUDA)?;
        stage.shown(4)?;
    }
    Ok(())
}

/// Returns when the picture that is not drawn is given up.
fn given_up(stage: &Stage) -> Outcome<()> {
    let end = Instant::now() + LIMIT;
    while stage.run.stat("corrupted") == "0" {
        if Instant::now() > end {
            return Err("the picture that is not drawn was not given up".into());
        }
        // Nobody tells when a frame is given up.
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
