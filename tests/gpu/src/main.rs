// SPDX-License-Identifier: MIT OR Apache-2.0

//! What pipewirezerocopysrc's import into CUDA memory does on a real GPU: right, fresh, and how fast.
//!
//! Ends with 0 when all was right, 1 when something was not, and 77 where there is no such GPU, or
//! what it would need is missing: then nothing was tested, and it says what is missing.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use gstpipewirezerocopy::cuda::{self, Context, Importer, Way};
use gstpipewirezerocopy::egl::{Display, Gl};

mod copies;
mod exported;
mod figures;
mod upload;

use exported::Exported;

/// What the parts return: the reason is for a person.
type Outcome<T> = Result<T, Box<dyn Error>>;

/// The exit status of a check that could not be made.
const NOT_RUN: u8 = 77;

/// The sizes at which time is taken. Pixels.
const SIZES: [(&str, (u32, u32)); 2] = [("1080p", (1920, 1080)), ("4K", (3840, 2160))];

/// Checks the import into CUDA memory on this machine's GPU, and takes its time.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// CUDA device.
    #[arg(long, default_value_t = 0)]
    device: u32,
    /// Pictures that are timed, for each way and size.
    #[arg(long, default_value_t = 1000)]
    frames: usize,
    /// DRM node to import with, instead of the EGL device that belongs to the CUDA device.
    #[arg(long)]
    render_node: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let prepared = gst::init()
        .map_err(Into::into)
        .and_then(|()| prepare(&options));
    let (context, display) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            println!("not run: {error}");
            return ExitCode::from(NOT_RUN);
        }
    };
    match check(&options, &context, &display) {
        Ok(true) => {
            println!("gpucheck: passed");
            ExitCode::SUCCESS
        }
        Ok(false) => {
            println!("gpucheck: FAILED");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("gpucheck: FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the checks need. An error here means that this machine cannot do them.
fn prepare(options: &Options) -> Outcome<(Context, Display)> {
    cuda::available()?;
    let context = Context::new(options.device)?;
    let display = match &options.render_node {
        Some(node) => Display::open(node)?,
        None => Display::of_cuda_device(options.device)?,
    };
    println!(
        "GStreamer {}; CUDA device {}; EGL display {} says CUDA device {:?}",
        gst::version_string(),
        context.device(),
        display.node().display(),
        display.cuda_device()
    );
    if Path::new("/dev/dri").exists() {
        println!("this machine has DRM nodes");
    } else {
        println!(
            "this machine has no DRM node: no compositor can run here, so nothing is captured; \
             DMA-BUFs are exported by EGL and go through the same import"
        );
    }
    Ok((context, display))
}

fn check(options: &Options, context: &Context, display: &Display) -> Outcome<bool> {
    let gl = Gl::new(display, 3)?;
    println!("renderer: {}", exported::renderer(&gl)?);
    let mut right = true;
    let mut worked = 0;
    for way in [Way::Image, Way::Texture] {
        let mut importer = Importer::new(display.clone(), context, way)?;
        let small = Exported::new(&gl, (1366, 768))?;
        println!("{}: {}", way.name(), small.describe());
        match small.with_dmabuf(|dmabuf| importer.prepare(dmabuf)) {
            Ok(_) if importer.way() != way => {
                println!("{}: REFUSED by the driver; textures do", way.name());
                continue;
            }
            Ok(_) => {}
            Err(error) => {
                println!("{}: REFUSED: {error}", way.name());
                continue;
            }
        }
        worked += 1;
        right &= copies::content(&mut importer, &small)?;
        drop(small);
        right &= copies::fresh(&gl, &mut importer, options.frames)?;
        for (name, size) in SIZES {
            copies::time(&gl, &mut importer, name, size, options.frames)?;
        }
        right &= copies::registrations(&gl, &mut importer)?;
    }
    if worked == 0 {
        println!("neither way works here");
        right = false;
    }
    for (name, size) in SIZES {
        upload::time(context, name, size, options.frames)?;
    }
    Ok(right)
}
