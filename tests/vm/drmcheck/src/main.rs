// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a kernel's DRM and DMA-BUF do with virtio-gpu, shown one fact a line.
//!
//! Runs in the guest of `ci/vm`, whose stage `drm` compares what it says with QEMU's own trace. Ends
//! with an error at the first fact that is not as the plugins of this project take it to be.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

mod buffers;
mod capture;
mod cuda;
mod cycles;
mod dmabuf;
mod draw;
mod egl;
mod foreign;
mod frames;
mod gl;
mod memory;
mod node;
mod outputs;
mod pool;
mod screen;
mod send;
mod virtgpu;

/// Shows what this kernel's DRM and DMA-BUF do with virtio-gpu.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes buffers in each way there is, exports them as DMA-BUFs and says which resource of the
    /// host each one is: "resource ID WIDTHxHEIGHT HOW".
    Buffers,
    /// Offers virtio-gpu what is not its own, which it must not import: "refused WHAT: ERRNO", or
    /// "absent WHAT: REASON" where this kernel cannot make such a thing.
    Refusals,
    /// Imports memory of each kind with EGL, reads it back and says what was found: "egl KIND HOW: right",
    /// "egl KIND HOW: refused: REASON", or that it was wrong.
    Egl,
    /// Copies DMA-BUFs into CUDA memory by drawing them, with a libcuda that only looks like one, and
    /// compares what is there: "cuda WHAT: right", or what else it is.
    Cuda,
    /// Plays scenes with a producer of PipeWire DMA-BUFs and pipewirezerocopysrc: "capture NAME: right", or
    /// what is wrong.
    Capture(capture::Options),
    /// Draws pictures into DMA-BUFs of one kind, sends them through vsockenc and records what comes back.
    Send(send::Options),
    /// Starts and stops vsockenc again and again, each time with another DMA-BUF.
    Cycles(cycles::Options),
    /// Has qemudisplaysrc show DMA-BUFs of each kind and compares: "screen KIND HOW: right", or what is
    /// wrong.
    Screen,
    /// Has qemudisplaysrc and helix-host show the screen of a stock QEMU with gl=on, and compares: "gl HOW:
    /// right", or what is wrong.
    Gl,
    /// Shows a known picture on each output, in its preferred mode, and says "drawn". Stays until it
    /// is killed.
    Draw {
        /// The connectors' names; the first one is output 0 in the picture.
        names: Vec<String>,
        /// A cursor on the first one, too.
        #[arg(long)]
        cursor: bool,
    },
    /// Waits until an output is connected with a size, or not connected without one, and says which
    /// outputs there are.
    Output {
        /// The connector's name, for example Virtual-2.
        name: String,
        /// Its preferred mode must have this width, in pixels.
        #[arg(requires = "height")]
        width: Option<u16>,
        /// And this height.
        height: Option<u16>,
        /// How long to wait, in seconds.
        #[arg(long, default_value_t = 20)]
        limit: u64,
    },
}

fn main() -> ExitCode {
    let done = match Options::parse().command {
        Command::Buffers => buffers::show(),
        Command::Refusals => foreign::show(),
        Command::Egl => egl::show(),
        Command::Cuda => cuda::show(),
        Command::Capture(options) => capture::show(&options),
        Command::Send(options) => send::show(&options),
        Command::Cycles(options) => cycles::show(&options),
        Command::Output {
            name,
            width,
            height,
            limit,
        } => outputs::wait_for(&name, width.zip(height), Duration::from_secs(limit)),
        Command::Draw { names, cursor } => draw::show(&names, cursor),
        Command::Screen => screen::show(),
        Command::Gl => gl::show(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("drmcheck: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the parts return: the reason is for a person, and ends the program.
type Outcome<T> = Result<T, Box<dyn Error>>;
