// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ci/bench vsockenc`: the element against an answering peer, beside a bare socket that carries
//! the same bytes to the same peer, and beside x264enc.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use clap::Args;
use serde::Serialize;

use crate::case::{Case, Contender, Format, Pace, Picture};
use crate::meter::Outcome;
use crate::peer::Addresses;
use crate::report::{Compared, Machine, Spread, less, publish};

/// What the element may take, as a multiple of the bare socket.
const RATIO: f64 = 1.15;
/// What it may add to a frame's way at 60 frames a second, in microseconds.
const ADDED_US: f64 = 1000.0;
/// Bytes of a measurement that is not paced: about a second, whatever the picture.
const BULK: usize = 4_000_000_000;
/// Bytes: far less than any picture of the benchmark, and more than an access unit.
const SMALL: f64 = 64.0 * 1024.0;

#[derive(Args)]
pub struct Options {
    /// How often each measurement is made; contenders take turns
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Frames of a measurement at 60 frames a second. The others take as many as have 4 GB
    #[arg(long, default_value_t = 300)]
    frames: u32,
    /// Only cases in whose name this occurs, as in "NV12" or "3840x2160" or "unix"
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// One round of a few small frames: shows that it works, and no figures worth reading
    #[arg(long)]
    smoke: bool,
    /// Where to write all figures
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/vsockenc.json"
    )]
    json: PathBuf,
    /// The library that counts, if not beside this program
    #[arg(long, value_name = "FILE")]
    counter: Option<PathBuf>,
}

/// The outcomes of a pace, round by round.
#[derive(Default)]
struct Rounds(BTreeMap<&'static str, Vec<Outcome>>);

impl Rounds {
    fn of(&self, who: Contender) -> &[Outcome] {
        self.0.get(name(who)).map_or(&[], Vec::as_slice)
    }

    fn add(&mut self, who: Contender, outcome: Outcome) {
        self.0.entry(name(who)).or_default().push(outcome);
    }

    fn median(&self, who: Contender, what: impl Fn(&Outcome) -> f64) -> Option<f64> {
        let outcomes = self.of(who);
        (!outcomes.is_empty()).then(|| Spread::of(outcomes.iter().map(what)).median)
    }
}

fn name(who: Contender) -> &'static str {
    match who {
        Contender::Fakesink => "fakesink",
        Contender::Vsockenc => "vsockenc",
        Contender::Plain => "plain",
        Contender::Rows => "rows",
        Contender::X264enc => "x264enc",
    }
}

/// A line of the table. Times are of one frame, in microseconds.
#[derive(Serialize)]
struct Line {
    name: String,
    bytes: usize,
    /// Frames a second, medians.
    fps: BTreeMap<&'static str, f64>,
    /// CPU time of the process, medians; the source's is taken off that of elements.
    cpu_us: BTreeMap<&'static str, f64>,
    /// vsockenc's time for a frame as a multiple of the bare socket's, round by round.
    time_ratio: Spread,
    /// The same of its CPU time.
    cpu_ratio: Spread,
    /// The two again, over a bare socket that gathers the rows itself; where they are padded NV12.
    rows: Option<(Spread, Spread)>,
    /// One frame at a time.
    single: Compared,
    /// 60 frames a second.
    paced: Compared,
    /// Voluntary context switches, medians.
    switches: BTreeMap<&'static str, f64>,
    /// By the preloaded library, the source's taken off.
    counts: BTreeMap<String, f64>,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rounds: u32,
    frames: u32,
    lines: Vec<Line>,
    missed: Vec<String>,
}

pub fn bench(options: &Options) -> Result<(), Box<dyn Error>> {
    let bench = Bench::new(options)?;
    let mut report = Report {
        machine: Machine::this(),
        rounds: bench.rounds,
        frames: bench.frames,
        lines: Vec::new(),
        missed: Vec::new(),
    };
    println!("{}", report.machine);
    for (picture, socket, address) in bench.cases() {
        let name = case_name(picture, socket);
        if !options.only.iter().all(|text| name.contains(text)) {
            continue;
        }
        eprintln!("{name} ...");
        let line = bench.line(name, picture, &address)?;
        if !options.smoke {
            report.missed.extend(missed(&line));
        }
        report.lines.push(line);
    }
    if report.lines.is_empty() {
        return Err("no case has such a name".into());
    }
    print(&report);
    publish(&report, &options.json, &report.missed)
}

fn case_name(picture: Picture, socket: &str) -> String {
    let Picture {
        width,
        height,
        format,
        padding,
    } = picture;
    let layout = match padding {
        0 => "tight".to_owned(),
        padding => format!("+{padding}"),
    };
    let format = match format {
        Format::Bgra => "BGRA",
        Format::Nv12 => "NV12",
    };
    format!("{width}x{height} {format} {layout} {socket}")
}

struct Bench {
    peer: Child,
    addresses: Addresses,
    rounds: u32,
    frames: u32,
    /// Bytes of the other measurements.
    bulk: usize,
    sizes: Vec<(u32, u32)>,
    counter: PathBuf,
}

impl Drop for Bench {
    fn drop(&mut self) {
        // It ends with its standard input.
        drop(self.peer.stdin.take());
        let _ = self.peer.wait();
    }
}

impl Bench {
    fn new(options: &Options) -> Result<Self, Box<dyn Error>> {
        gst::init()?;
        let program = std::env::current_exe()?;
        let mut peer = Command::new(&program)
            .arg("peer")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut first = String::new();
        let output = peer.stdout.take().ok_or("the peer has an output")?;
        BufReader::new(output).read_line(&mut first)?;
        let (rounds, frames, bulk) = if options.smoke {
            (1, 5, 0)
        } else {
            (options.rounds.max(1), options.frames.max(1), BULK)
        };
        Ok(Self {
            addresses: serde_json::from_str(&first)?,
            peer,
            rounds,
            frames,
            bulk,
            sizes: if options.smoke {
                vec![(320, 240)]
            } else {
                vec![(1920, 1080), (3840, 2160)]
            },
            counter: options
                .counter
                .clone()
                .unwrap_or_else(|| program.with_file_name("libzerocopy_counter.so")),
        })
    }

    fn cases(&self) -> Vec<(Picture, &'static str, String)> {
        let mut cases = Vec::new();
        for &(width, height) in &self.sizes {
            for format in [Format::Bgra, Format::Nv12] {
                for padding in [0, 64] {
                    let picture = Picture {
                        width,
                        height,
                        format,
                        padding,
                    };
                    cases.push((picture, "tcp", self.addresses.tcp.clone()));
                    cases.push((picture, "unix", self.addresses.unix.clone()));
                }
            }
        }
        cases
    }

    /// All rounds of one case.
    fn line(&self, name: String, picture: Picture, address: &str) -> Result<Line, Box<dyn Error>> {
        use Contender::{Fakesink, Plain, Rows, Vsockenc, X264enc};
        let [mut flow, mut single, mut paced] = [(); 3].map(|()| Rounds::default());
        let bulk = u32::try_from(self.bulk / picture.wire_size())?.max(5);
        let case = |contender, pace| Case {
            contender,
            pace,
            picture,
            address: address.to_owned(),
            warm_up: 12.min(2 * self.frames),
            frames: if pace == Pace::Paced {
                self.frames
            } else {
                bulk
            },
        };
        for round in 0..self.rounds {
            let rows = picture.format == Format::Nv12 && picture.padding > 0;
            let mut pair = [Vsockenc, Plain];
            if round % 2 == 1 {
                pair.reverse();
            }
            flow.add(Fakesink, self.alone(&case(Fakesink, Pace::Flow), false)?);
            for who in pair {
                flow.add(who, self.alone(&case(who, Pace::Flow), false)?);
            }
            if rows {
                flow.add(Rows, self.alone(&case(Rows, Pace::Flow), false)?);
            }
            for who in pair {
                single.add(who, self.alone(&case(who, Pace::Single), false)?);
            }
            // The two take turns in one process.
            let [element, plain] = self.run(&case(Vsockenc, Pace::Paced), false)?;
            paced.add(Vsockenc, element);
            paced.add(Plain, plain);
            // No socket is in it: once a round and picture is enough.
            if picture.padding == 0 && address == self.addresses.tcp {
                let case = Case {
                    frames: bulk.div_ceil(4),
                    ..case(X264enc, Pace::Flow)
                };
                flow.add(X264enc, self.alone(&case, false)?);
            }
        }
        let counted = self.alone(&case(Vsockenc, Pace::Single), true)?;
        let source = self.alone(&case(Fakesink, Pace::Single), true)?;

        let source_us = flow.median(Fakesink, |o| o.cpu_us).unwrap_or_default();
        let each = |what: fn(&Outcome) -> f64| -> BTreeMap<&'static str, f64> {
            [Fakesink, Vsockenc, Plain, Rows, X264enc]
                .into_iter()
                .filter_map(|who| Some((self::name(who), flow.median(who, what)?)))
                .collect()
        };
        let mut cpu_us = each(|outcome| outcome.cpu_us);
        for who in ["vsockenc", "x264enc"] {
            if let Some(cpu) = cpu_us.get_mut(who) {
                *cpu -= source_us;
            }
        }
        let ratios = |other| {
            let rounds = || flow.of(Vsockenc).iter().zip(flow.of(other));
            let time = |(ours, other): (&Outcome, &Outcome)| other.fps / ours.fps;
            let cpu =
                |(ours, other): (&Outcome, &Outcome)| (ours.cpu_us - source_us) / other.cpu_us;
            (
                Spread::of(rounds().map(time)),
                Spread::of(rounds().map(cpu)),
            )
        };
        let (time_ratio, cpu_ratio) = ratios(Plain);
        Ok(Line {
            name,
            bytes: picture.wire_size(),
            fps: each(|outcome| outcome.fps),
            cpu_us,
            time_ratio,
            cpu_ratio,
            rows: (!flow.of(Rows).is_empty()).then(|| ratios(Rows)),
            single: Compared::of(single.of(Vsockenc), single.of(Plain)),
            paced: Compared::of(paced.of(Vsockenc), paced.of(Plain)),
            switches: each(|outcome| outcome.voluntary_switches),
            counts: less(&counted.counts, &source.counts),
        })
    }

    /// Runs a case in a process of its own, from which so many outcomes come.
    fn run<const N: usize>(
        &self,
        case: &Case,
        counted: bool,
    ) -> Result<[Outcome; N], Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("run").arg(serde_json::to_string(case)?);
        if counted {
            if !self.counter.exists() {
                return Err(format!("no {} here", self.counter.display()).into());
            }
            command
                .env("LD_PRELOAD", &self.counter)
                // GLib's own allocator would hide allocations from malloc().
                .env("G_SLICE", "always-malloc");
        }
        let output = command.stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            return Err(format!("{} with {case:?}", output.status).into());
        }
        let outcomes: Vec<Outcome> = serde_json::from_slice(&output.stdout)?;
        outcomes
            .try_into()
            .map_err(|outcomes: Vec<_>| format!("{} outcomes of {case:?}", outcomes.len()).into())
    }

    /// The outcome of a case that is not paced.
    fn alone(&self, case: &Case, counted: bool) -> Result<Outcome, Box<dyn Error>> {
        let [outcome] = self.run(case, counted)?;
        Ok(outcome)
    }
}

/// The targets that a case missed, in words.
fn missed(line: &Line) -> Vec<String> {
    let count = |name| line.counts.get(name).copied().unwrap_or_default();
    // What the system takes for gathering rows is not the element's.
    let (time, cpu) = line.rows.unwrap_or((line.time_ratio, line.cpu_ratio));
    let checks = [
        ("of the bare socket's time", time.median, RATIO),
        ("of the bare socket's CPU time", cpu.median, RATIO),
        ("us added at 60 fps, p99", line.paced.added.p99, ADDED_US),
        ("large allocations a frame", count("large_allocations"), 0.0),
        ("bytes copied a frame", count("copied_bytes"), SMALL),
        // The access unit's: what is smaller than the decoder's stage passes through it.
        ("large copies a frame", count("large_copies"), 1.0),
    ];
    checks
        .into_iter()
        .filter(|(_, is, may)| is > may)
        .map(|(what, is, may)| format!("{}: {is:.2} {what}, at most {may}", line.name))
        .collect()
}

fn print(report: &Report) {
    let of = |figures: &BTreeMap<&str, f64>, who: &str, scale: f64, digits: usize| {
        figures.get(who).map_or("-".to_owned(), |value| {
            format!("{:.digits$}", value * scale)
        })
    };
    println!(
        "\nFull speed, two frames open; medians of {} rounds. CPU in ms a frame.\n",
        report.rounds
    );
    println!(
        "{:30} {:>26} {:>17} {:>26} {:>17}",
        "", "frames a second", "time ratio", "CPU", "CPU ratio"
    );
    println!(
        "{:30} {:>8} {:>8} {:>8} {:>17} {:>8} {:>8} {:>8} {:>17}",
        "case",
        "vsockenc",
        "plain",
        "x264enc",
        "median (range)",
        "vsockenc",
        "plain",
        "x264enc",
        "median (range)"
    );
    let ratio =
        |spread: Spread| format!("{:.2} ({:.2}-{:.2})", spread.median, spread.min, spread.max);
    for line in &report.lines {
        println!(
            "{:30} {:>8} {:>8} {:>8} {:>17} {:>8} {:>8} {:>8} {:>17}",
            line.name,
            of(&line.fps, "vsockenc", 1.0, 0),
            of(&line.fps, "plain", 1.0, 0),
            of(&line.fps, "x264enc", 1.0, 0),
            ratio(line.time_ratio),
            of(&line.cpu_us, "vsockenc", 1e-3, 2),
            of(&line.cpu_us, "plain", 1e-3, 2),
            of(&line.cpu_us, "x264enc", 1e-3, 2),
            ratio(line.cpu_ratio),
        );
    }
    for line in &report.lines {
        if let Some((time, cpu)) = line.rows {
            println!(
                "{:30} over a bare socket that sends row by row: time {}, CPU {}",
                line.name,
                ratio(time),
                ratio(cpu)
            );
        }
    }
    println!("\nLatency in ms, p50/p99: a frame's way in to its access unit's way out.\n");
    println!(
        "{:30} {:^45} {:^45}",
        "", "one frame at a time", "60 frames a second"
    );
    println!(
        "{:30} {:>15}{:>15}{:>15} {:>15}{:>15}{:>15}",
        "case", "vsockenc", "plain", "added", "vsockenc", "plain", "added"
    );
    for line in &report.lines {
        print!("{:30} ", line.name);
        for compared in [line.single, line.paced] {
            for latency in [compared.element, compared.plain, compared.added] {
                let text = format!("{:.2}/{:.2}", latency.p50 / 1e3, latency.p99 / 1e3);
                print!("{text:>15}");
            }
            print!(" ");
        }
        println!();
    }
    println!("\nPer frame of vsockenc, one at a time; voluntary context switches at full speed.\n");
    println!(
        "{:30} {:>6} {:>6} {:>6} {:>7} {:>6} {:>6} {:>6} {:>6} {:>6} {:>9} {:>6}",
        "case",
        "allocs",
        "bytes",
        "large",
        "copied",
        "large",
        "sends",
        "recvs",
        "waits",
        "writes",
        "switches",
        "plain"
    );
    for line in &report.lines {
        print!("{:30}", line.name);
        let widths = [
            ("allocations", 6),
            ("allocated_bytes", 6),
            ("large_allocations", 6),
            ("copied_bytes", 7),
            ("large_copies", 6),
            ("sends", 6),
            ("receives", 6),
            ("waits", 6),
            ("writes", 6),
        ];
        for (count, width) in widths {
            print!(
                " {:>width$.1}",
                line.counts.get(count).copied().unwrap_or_default()
            );
        }
        println!(
            " {:>9} {:>6}",
            of(&line.switches, "vsockenc", 1.0, 1),
            of(&line.switches, "plain", 1.0, 1)
        );
    }
}
