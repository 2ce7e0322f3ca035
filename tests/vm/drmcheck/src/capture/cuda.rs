// SPDX-License-Identifier: MIT OR Apache-2.0

//! DMA-BUFs that leave in CUDA memory, with a libcuda whose GPU memory is the process's own: all of the
//! element's way but the GPU.

use std::sync::LazyLock;

use zerocopy_cuda_fake::{Alive, Fake};

use super::canvas::{Memory, Pixels};
use super::{LINEAR, Stage, expect, offer, padded};
use crate::Outcome;

/// What takes all kinds of memory, CUDA's first.
const ALL: &str = "video/x-raw(memory:CUDAMemory); video/x-raw(memory:DMABuf); video/x-raw";
const CUDA: &str = "video/x-raw(memory:CUDAMemory)";
/// `CUDA_ERROR_OUT_OF_MEMORY` and `CUDA_ERROR_LAUNCH_FAILED` (cuda.h)
const OUT_OF_MEMORY: i32 = 2;
const LAUNCH_FAILED: i32 = 719;

/// The libcuda that everybody gets from now on.
pub fn fake() -> &'static Fake {
    static FAKE: LazyLock<Fake> = LazyLock::new(Fake::load);
    &FAKE
}

fn start(node: &str, pixels: Pixels, mode: &str, caps: &str) -> Outcome<Stage> {
    let offer = offer(pixels, &[LINEAR], false);
    Stage::taking(node, offer, padded(Memory::Dumb), mode, (caps, false))
}

/// Every picture arrives, and nothing of CUDA's is left at the end.
pub fn copied(node: &str, pixels: Pixels) -> Outcome<()> {
    let stage = start(node, pixels, "cuda", CUDA)?;
    for number in 1..=5 {
        stage.shown(number)?;
    }
    expect("the memory", stage.run.stat("memory"), "cuda")?;
    expect("the import", stage.run.stat("import"), "gl-texture")?;
    expect("the transfer", stage.run.stat("transfer"), "gpu-copy")?;
    expect("copies by the CPU", stage.run.stat("copies"), "0")?;
    drop(stage);
    match fake().alive() {
        left if left == Alive::default() => Ok(()),
        left => Err(format!("left behind: {left:?}").into()),
    }
}

/// A GPU that is lost while playing: DMA-BUFs leave instead.
pub fn lost(node: &str) -> Outcome<()> {
    let stage = start(node, Pixels::Bgrx, "auto", ALL)?;
    stage.shown(1)?;
    expect("the memory", stage.run.stat("memory"), "cuda")?;
    fake().fail("cuEventSynchronize", 0, LAUNCH_FAILED);
    let shown = stage.shown(2);
    fake().fail("cuEventSynchronize", 0, 0);
    shown?;
    expect("the memory", stage.run.stat("memory"), "dmabuf")
}

/// A GPU without memory at the start: DMA-BUFs leave.
pub fn exhausted(node: &str) -> Outcome<()> {
    fake().fail("cuMemAllocPitch_v2", 0, OUT_OF_MEMORY);
    let shown = start(node, Pixels::Bgrx, "auto", ALL).and_then(|stage| {
        stage.shown(1)?;
        expect("the memory", stage.run.stat("memory"), "dmabuf")
    });
    fake().fail("cuMemAllocPitch_v2", 0, 0);
    shown
}

/// The same where nothing else may leave: an error that says why.
pub fn strict(node: &str) -> Outcome<()> {
    let stage = start(node, Pixels::Bgrx, "cuda", CUDA)?;
    stage.shown(1)?;
    fake().fail("cuMemcpy2DAsync_v2", 0, LAUNCH_FAILED);
    let shown = stage.shown(2).map(drop);
    fake().fail("cuMemcpy2DAsync_v2", 0, 0);
    match shown {
        Err(error) if error.to_string().contains("CUDA_ERROR_LAUNCH_FAILED") => Ok(()),
        Err(error) => Err(format!("the error does not say why: {error}").into()),
        Ok(()) => Err("a picture came all the same".into()),
    }
}
