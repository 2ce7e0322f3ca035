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
use gstpipewirezerocopy::egl::Display;

mod captured;
mod copies;
mod dumb;
mod exported;
mod figures;
mod pictures;
mod session;
mod upload;

use exported::Exported;
use session::Session;

/// What the parts return: the reason is for a person.
type Outcome<T> = Result<T, Box<dyn Error>>;

/// The exit status of a check that could not be made.
const NOT_RUN: u8 = 77;

/// The sizes at which time is taken. Pixels.
const SIZES: [(&str, (u32, u32)); 2] = [
    ("1080p", (1920, 1080)),
    (figures::TARGET_SIZE, (3840, 2160)),
];

/// Checks the import into CUDA memory on this machine's GPU, and takes its time.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// CUDA device.
    #[arg(long, default_value_t = 0)]
    device: u32,
    /// Pictures that are timed or raced, for each way and size.
    #[arg(long, default_value_t = 1000)]
    frames: usize,
    /// DRM node to import with, instead of the EGL device that belongs to the CUDA device.
    #[arg(long)]
    render_node: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    // First: there is one thread yet, and the environment is changed.
    let session = Session::start();
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
    let mut verdict = Verdict::default();
    check(&options, &context, &display, session, &mut verdict);
    let (text, status) = match verdict {
        Verdict { wrong: 1.., .. } => ("FAILED", ExitCode::FAILURE),
        Verdict { right: 1.., .. } => ("passed", ExitCode::SUCCESS),
        _ => ("not run: nothing could be checked", ExitCode::from(NOT_RUN)),
    };
    println!(
        "gpucheck: {text} ({} parts right, {} wrong, {} not run)",
        verdict.right, verdict.wrong, verdict.not_run
    );
    status
}

/// What became of the parts.
#[derive(Clone, Copy, Debug, Default)]
struct Verdict {
    right: u32,
    wrong: u32,
    not_run: u32,
}

impl Verdict {
    /// Notes a part. An error of one does not keep the next from being run.
    fn note(&mut self, part: &str, outcome: Outcome<bool>) {
        match outcome {
            Ok(true) => self.right += 1,
            Ok(false) => self.wrong += 1,
            Err(error) => {
                println!("{part}: FAILED: {error}");
                self.wrong += 1;
            }
        }
    }

    fn skip(&mut self, part: &str, why: &str) {
        println!("{part}: not run: {why}");
        self.not_run += 1;
    }
}

/// What the checks need. An error here means that this machine cannot do them.
fn prepare(options: &Options) -> Outcome<(Context, Display)> {
    cuda::available()?;
    gstpipewirezerocopy::plugin_register_static()?;
    let context = Context::new(options.device)?;
    let display = match &options.render_node {
        Some(node) => Display::open(node)?,
        None => Display::of_cuda_device(options.device)?,
    };
    println!(
        "GStreamer {}; CUDA device {}; EGL display {} is CUDA device {}",
        gst::version_string(),
        context.device(),
        display.node().display(),
        cuda::of_display(&display)
            .map_or_else(|error| error.to_string(), |device| device.to_string())
    );
    if Path::new("/dev/dri").exists() {
        println!("this machine has DRM nodes");
    } else {
        println!(
            "this machine has no DRM node: no compositor can run here; the DMA-BUFs are textures that EGL \
             exports, handed over PipeWire by a producer of ours"
        );
    }
    Ok((context, display))
}

fn check(
    options: &Options,
    context: &Context,
    display: &Display,
    session: Outcome<Session>,
    verdict: &mut Verdict,
) {
    let mut rows = Vec::new();
    for size in SIZES {
        match upload::time(context, size, options.frames) {
            Ok(row) => rows.extend(row),
            Err(error) => println!("cudaupload {}: not measured: {error}", size.0),
        }
    }
    let session = session.map(|mut session| {
        session.link();
        session
    });
    for way in [Way::Image, Way::Texture] {
        let name = way.name();
        match import(options, context, display, way, verdict) {
            Ok(measured) => rows.extend(measured),
            Err(error) => verdict.skip(&format!("{name}: the import"), &error.to_string()),
        }
        let part = format!("{name}: through PipeWire");
        match &session {
            Ok(_) => {
                let node = options.render_node.as_deref();
                let checked = captured::check(display, node, options.device, way, options.frames);
                verdict.note(&part, checked);
            }
            Err(error) => verdict.skip(&part, &error.to_string()),
        }
    }
    figures::print(&rows);
}

/// The import by itself. An error means that nothing of it could be tried.
fn import(
    options: &Options,
    context: &Context,
    display: &Display,
    way: Way,
    verdict: &mut Verdict,
) -> Outcome<Vec<figures::Row>> {
    let name = way.name();
    let small = Exported::new(display, (1366, 768))?;
    println!(
        "renderer: {}; {name}: {}",
        small.renderer()?,
        small.describe()
    );
    let mut importer = Importer::new(display.clone(), context, way)?;
    small.with_dmabuf(|dmabuf| importer.prepare(dmabuf))?;
    if importer.way() != way {
        return Err("the driver refuses it; textures do".into());
    }
    verdict.note(name, copies::content(&mut importer, &small));
    verdict.note(name, copies::registrations(&mut importer, &small));
    drop(small);
    verdict.note(name, copies::race(display, &mut importer, options.frames));
    let mut rows = Vec::new();
    for size in SIZES {
        match copies::time(display, &mut importer, size, options.frames) {
            Ok(measured) => rows.extend(measured),
            Err(error) => verdict.note(name, Err(error)),
        }
    }
    Ok(rows)
}
