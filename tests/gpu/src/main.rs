// SPDX-License-Identifier: MIT OR Apache-2.0

//! What pipewirezerocopysrc's import into CUDA memory does on a real GPU: right, fresh, and how fast.
//!
//! Ends with 0 when all was right, 1 when something was not, and 77 where there is no such GPU, or
//! what it would need is missing: then nothing was tested, and it says what is missing.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use gstpipewirezerocopy::cuda::{self, Context, Importer, Way};
use gstpipewirezerocopy::egl::Display;

mod captured;
mod copies;
mod dumb;
mod egl;
mod exported;
mod feed;
mod figures;
mod gpu;
mod pictures;
mod report;
mod session;
mod steady;
mod upload;

use exported::Exported;
use feed::Feed;
use gpu::Gpu;
use session::Session;

/// What the parts return: the reason is for a person.
type Outcome<T> = Result<T, Box<dyn Error>>;

/// The exit status of a check that could not be made.
const NOT_RUN: u8 = 77;

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
    /// Starts and stops of the pipeline.
    #[arg(long, default_value_t = 500)]
    cycles: usize,
    /// Size at which time is taken, WIDTHxHEIGHT in pixels; may be given several times.
    #[arg(long, value_parser = size, default_values = ["1920x1080", "3840x2160"])]
    size: Vec<Size>,
    /// DRM node to import with, instead of the EGL device that belongs to the CUDA device.
    #[arg(long)]
    render_node: Option<PathBuf>,
}

/// Pixels.
type Size = (u32, u32);

fn size(text: &str) -> Result<Size, String> {
    let number = |text: &str| text.parse().ok().filter(|number| *number > 0);
    text.split_once('x')
        .and_then(|(width, height)| number(width).zip(number(height)))
        .ok_or_else(|| format!("{text:?} is no size like 1920x1080"))
}

fn main() -> ExitCode {
    let options = Options::parse();
    // First: there is one thread yet, and the environment is changed.
    let session = Session::start();
    let gpu = match prepare(&options) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("not run: {error}");
            return ExitCode::from(NOT_RUN);
        }
    };
    report::print(&gpu);
    let mut verdict = Verdict::default();
    check(&options, &gpu, session, &mut verdict);
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

/// What everything needs. An error here means that nothing can be done on this machine.
fn prepare(options: &Options) -> Outcome<Gpu> {
    gst::init()?;
    cuda::available()?;
    gstpipewirezerocopy::plugin_register_static()?;
    Gpu::new(options.device)
}

/// All parts: those that need least first, so that an answer is there when a later one hangs.
fn check(options: &Options, gpu: &Gpu, session: Outcome<Session>, verdict: &mut Verdict) {
    match &session {
        Ok(_) => println!("PipeWire: runs"),
        Err(error) => println!("PipeWire: {error}"),
    }
    let few = options.cycles.div_ceil(10);
    verdict.note(
        "contexts and pools",
        steady::without_pictures(gpu, options.device, few),
    );
    let mut rows = Vec::new();
    for &size in &options.size {
        match Context::new(options.device)
            .map_err(Into::into)
            .and_then(|context| upload::time(&context, size, options.frames))
        {
            Ok(row) => rows.extend(row),
            Err(error) => println!("cudaupload {}: not measured: {error}", figures::name(size)),
        }
    }
    let display = match &options.render_node {
        Some(node) => Display::open(node),
        None => Display::of_cuda_device(options.device),
    };
    match display {
        Ok(display) => with_display(options, gpu, &display, session, &mut rows, verdict),
        Err(error) => {
            verdict.skip("all that needs EGL", &error.to_string());
            figures::print(&rows);
        }
    }
}

/// The parts that draw.
fn with_display(
    options: &Options,
    gpu: &Gpu,
    display: &Display,
    session: Outcome<Session>,
    rows: &mut Vec<figures::Row>,
    verdict: &mut Verdict,
) {
    println!(
        "EGL display {} is CUDA device {}; formats that it imports: {}",
        display.node().display(),
        cuda::of_display(display)
            .map_or_else(|error| error.to_string(), |device| device.to_string()),
        display.formats().map_or_else(
            |error| error.to_string(),
            |formats| formats.len().to_string()
        )
    );
    let session = session.map(|mut session| {
        session.link();
        session
    });
    let pipewire = |part: &str, settings: &[(&str, String)], cycles, verdict: &mut Verdict| {
        let name = format!("{part}, through PipeWire");
        let painter = match &session {
            Ok(_) => captured::painter(display, options.render_node.as_deref()),
            Err(error) => Err(error.to_string().into()),
        };
        match painter {
            Ok(painter) => {
                let steady = (gpu, cycles);
                let checked = captured::check(part, painter, settings, options.frames, steady);
                verdict.note(&name, checked);
            }
            Err(error) => verdict.skip(&name, &error.to_string()),
        }
    };
    for way in [Way::Image, Way::Texture] {
        let name = way.name();
        match import(options, display, way, verdict) {
            Ok(measured) => rows.extend(measured),
            Err(error) => verdict.skip(&format!("{name}: the import"), &error.to_string()),
        }
        let mut settings = vec![
            ("output-mode", "cuda".to_owned()),
            ("cuda-device-id", options.device.to_string()),
            ("cuda-import", name.to_owned()),
        ];
        let node = options.render_node.as_ref();
        settings.extend(node.map(|node| ("render-node", node.display().to_string())));
        pipewire(name, &settings, options.cycles.div_ceil(10), verdict);
    }
    figures::print(rows);
    // As most applications have it: nothing is named, and who is downstream says what is taken.
    pipewire("auto", &[], options.cycles, verdict);
}

/// The import by itself. An error means that nothing of it could be tried.
fn import(
    options: &Options,
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
    let context = Context::new(options.device)?;
    let mut importer = Importer::new(Feed(display.clone()), &context, way)?;
    small.with_dmabuf(|dmabuf| importer.prepare(dmabuf))?;
    if importer.way() != way {
        return Err("the driver refuses it; textures do".into());
    }
    verdict.note(name, copies::content(&mut importer, &small));
    verdict.note(name, copies::registrations(&mut importer, &small));
    drop(small);
    let mut rows = Vec::new();
    for &size in &options.size {
        verdict.note(name, copies::fenced(display, &mut importer, size));
        let raced = copies::race(display, &mut importer, size, options.frames);
        verdict.note(name, raced);
        match copies::time(display, &mut importer, size, options.frames) {
            Ok(measured) => rows.extend(measured),
            Err(error) => verdict.note(name, Err(error)),
        }
    }
    Ok(rows)
}
