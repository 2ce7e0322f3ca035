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

/// Stopped while a picture is waited for, and while the one after it is.
pub fn stopped(node: &str) -> Outcome<()> {
    let _gpu = Gpu::new()?;
    let style = Style {
        promised: true,
        buffers: 8,
        ..padded(Memory::Dumb)
    };
    // With gl-texture, llvmpipe waits itself where a GPU is only told to, for the 10 s that a fence of vgem's
    // lasts; what a GPU is left with is for the tests of `GpuQueue`.
    for (way, next) in [
        ("egl-image", false),
        ("egl-image", true),
        ("gl-texture", false),
    ] {
        let node = format!("{node}-{way}-{next}");
        let settings = format!("cuda cuda-import={way}");
        let offer = offer(Pixels::Bgrx, &[LINEAR], true);
        let mut stage = Stage::taking(&node, offer, style, &settings, (CUDA, true))?;
        stage.shown(1)?;
        stage.late(2)?;
        if next {
            given_up(&stage)?;
            stage.show(3, When::Before)?;
        }
        let took = stage.run.stop()?;
        eprintln!("{way}: stopped within {took:?}");
        if took > LIMIT / 4 {
            return Err(format!("{way}: stopping took {took:?}").into());
        }
        stage.run = Run::start(&node, &settings, CUDA)?;
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
