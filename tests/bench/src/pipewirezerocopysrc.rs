// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ci/bench pipewirezerocopysrc`: the element beside PipeWire's own `pipewiresrc`, on two nodes of
//! one compositor that show the same moving picture; and how exact its keepalives are.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use clap::Args;
use serde::Serialize;
use zerocopy_test_support::desktop::{Desktop, Recording};

use crate::capture::{Capture, Seen, Source, Window, now};
use crate::meter::Outcome;
use crate::report::{Latency, Machine, Spread, publish};
use Source::{Pipewiresrc, Pipewirezerocopysrc};

/// CPU time of a frame, as a multiple of pipewiresrc's.
const RATIO: f64 = 1.0;
/// Microseconds that a frame may take longer than through pipewiresrc, 99th percentile.
const ADDED_US: f64 = 2000.0;
/// Milliseconds between keepalives.
const KEEPALIVE: u32 = 100;
/// Milliseconds by which one may be early or late.
const KEEPALIVE_OFF: f64 = 5.0;

/// Nanoseconds until all contenders have read that a window begins.
const SOON: u64 = 200_000_000;

#[derive(Args)]
pub struct Options {
    /// How often each measurement is made; contenders take turns
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of a measurement
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Frames a second of the moving picture
    #[arg(long, default_value_t = 30)]
    fps: u32,
    /// Only sizes in whose name this occurs, as in "1080"
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// One short round of a small picture: shows that it works, and no figures worth reading
    #[arg(long)]
    smoke: bool,
    /// Where to write all figures
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/pipewirezerocopysrc.json"
    )]
    json: PathBuf,
    /// The library that counts, if not beside this program
    #[arg(long, value_name = "FILE")]
    counter: Option<PathBuf>,
}

/// A contender that captures.
struct Contender {
    child: Child,
    /// None once it was told to end.
    windows: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Contender {
    /// Starts one and waits until it streams.
    fn start(
        desktop: &Desktop,
        case: &Capture,
        counter: Option<&Path>,
    ) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("capture")
            .arg(serde_json::to_string(case)?)
            .envs(desktop.environment().iter().cloned())
            .env_remove("PIPEWIRE_REMOTE")
            .env_remove("PIPEWIRE_RUNTIME_DIR")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(counter) = counter {
            if !counter.exists() {
                return Err(format!("no {} here", counter.display()).into());
            }
            command
                .env("LD_PRELOAD", counter)
                // GLib's own allocator would hide allocations from malloc().
                .env("G_SLICE", "always-malloc");
        }
        let mut child = command.spawn()?;
        let windows = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().ok_or("it has an output")?);
        let mut contender = Self {
            child,
            windows,
            answers,
        };
        let ready: String = contender.answer()?;
        debug_assert_eq!(ready, "ready");
        Ok(contender)
    }

    fn ask(&mut self, window: Window) -> Result<(), Box<dyn Error>> {
        let windows = self.windows.as_mut().ok_or("it has an input")?;
        Ok(writeln!(windows, "{}", serde_json::to_string(&window)?)?)
    }

    fn answer<T: for<'a> serde::Deserialize<'a>>(&mut self) -> Result<T, Box<dyn Error>> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            return Err("a contender has ended; it said why".into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        drop(self.windows.take());
        let _ = self.child.wait();
    }
}

/// What all `contenders` see in the same time from now on.
fn look<const N: usize>(
    seconds: f64,
    mut contenders: [&mut Contender; N],
) -> Result<[Seen; N], Box<dyn Error>> {
    let from = now() + SOON;
    let window = Window {
        from,
        until: from + (seconds * 1e9) as u64,
    };
    for contender in &mut contenders {
        contender.ask(window)?;
    }
    let mut seen = Vec::new();
    for contender in contenders {
        seen.push(contender.answer()?);
    }
    Ok(seen.try_into().map_err(|_| "one each")?)
}

/// What was seen, round by round.
#[derive(Default)]
struct Rounds(BTreeMap<Source, Vec<Seen>>);

impl Rounds {
    fn add(&mut self, who: Source, seen: Seen) {
        self.0.entry(who).or_default().push(seen);
    }

    fn of(&self, who: Source) -> &[Seen] {
        self.0.get(&who).map_or(&[], Vec::as_slice)
    }

    fn median(&self, who: Source, what: impl Fn(&Outcome) -> f64) -> f64 {
        Spread::of(self.of(who).iter().map(|seen| what(&seen.usage))).median
    }

    fn figures(&self, who: Source) -> Figures {
        let outcomes: Vec<Outcome> = self.of(who).iter().map(|s| s.usage.clone()).collect();
        Figures {
            fps: self.median(who, |usage| usage.fps),
            cpu_us: self.median(who, |usage| usage.cpu_us),
            switches: self.median(who, |usage| usage.voluntary_switches),
            latency: Latency::of(&outcomes),
        }
    }

    /// The element and pipewiresrc, round by round.
    fn pairs(&self) -> impl Iterator<Item = (&Outcome, &Outcome)> {
        let [ours, theirs] = [Pipewirezerocopysrc, Pipewiresrc].map(|who| self.of(who));
        let pairs = ours.iter().zip(theirs);
        pairs.map(|(ours, theirs)| (&ours.usage, &theirs.usage))
    }

    /// CPU time of the element as a multiple of pipewiresrc's.
    fn cpu_ratio(&self) -> Spread {
        let pairs = self.pairs();
        Spread::of(pairs.map(|(ours, theirs)| ours.cpu_us / theirs.cpu_us))
    }

    /// Microseconds by which the element's p99 is above pipewiresrc's.
    fn added_p99(&self) -> Spread {
        let p99 = |outcome: &Outcome| Latency::of(std::slice::from_ref(outcome)).p99;
        let pairs = self.pairs();
        Spread::of(pairs.map(|(ours, theirs)| p99(ours) - p99(theirs)))
    }

    fn delivered(&self, who: Source) -> usize {
        self.of(who).iter().map(|seen| seen.frames.len()).sum()
    }
}

/// Medians of the rounds, per frame. Times in microseconds.
#[derive(Serialize)]
struct Figures {
    /// Frames a second.
    fps: f64,
    cpu_us: f64,
    /// Voluntary context switches.
    switches: f64,
    /// From a frame's header to its way out of the source.
    latency: Latency,
}

/// What a size took.
#[derive(Serialize)]
struct Line {
    name: String,
    /// One after the other.
    alone: BTreeMap<Source, Figures>,
    alone_cpu_ratio: Spread,
    /// Both at once.
    together: BTreeMap<Source, Figures>,
    together_cpu_ratio: Spread,
    /// Of the same time: what the compositor was late with, both were.
    added_p99_us: Spread,
    /// Frames delivered of those captured while both looked.
    delivered: BTreeMap<Source, usize>,
    /// Of the element's, in the same time.
    dropped: u64,
    /// Copies of a frame in all windows, as the element counts them.
    copies: u64,
    /// By the preloaded library, per frame.
    counts: BTreeMap<Source, BTreeMap<String, f64>>,
}

/// How far the time between two keepalives is from what was asked for, in milliseconds.
#[derive(Serialize)]
struct Keepalives {
    woken: bool,
    count: usize,
    median: f64,
    most: f64,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rounds: u32,
    seconds: f64,
    fps: u32,
    lines: Vec<Line>,
    keepalives: Vec<Keepalives>,
    missed: Vec<String>,
}

struct Bench {
    rounds: u32,
    seconds: f64,
    fps: u32,
    counter: PathBuf,
}

pub fn bench(options: &Options) -> Result<(), Box<dyn Error>> {
    gst::init()?;
    let counter = options.counter.clone();
    let beside = std::env::current_exe()?.with_file_name("libzerocopy_counter.so");
    let bench = Bench {
        rounds: if options.smoke {
            1
        } else {
            options.rounds.max(1)
        },
        seconds: if options.smoke {
            1.0
        } else {
            options.seconds.max(1) as f64
        },
        fps: options.fps,
        counter: counter.unwrap_or(beside),
    };
    let mut report = Report {
        machine: Machine::this(),
        rounds: bench.rounds,
        seconds: bench.seconds,
        fps: bench.fps,
        lines: Vec::new(),
        keepalives: Vec::new(),
        missed: Vec::new(),
    };
    println!("{}", report.machine);
    let sizes = if options.smoke {
        vec![(320, 240)]
    } else {
        vec![(1280, 720), (1920, 1080), (3840, 2160)]
    };
    for (width, height) in sizes {
        let name = format!("{width}x{height}");
        if !options.only.iter().all(|text| name.contains(text)) {
            continue;
        }
        eprintln!("{name} ...");
        let mut desktop = Desktop::start(width, height);
        report.lines.push(bench.line(name, &mut desktop)?);
        if report.keepalives.is_empty() {
            eprintln!("keepalives ...");
            for woken in [false, true] {
                report
                    .keepalives
                    .push(bench.keepalives(&mut desktop, woken)?);
            }
        }
    }
    if report.lines.is_empty() {
        return Err("no size has such a name".into());
    }
    if !options.smoke {
        report.missed = missed(&report);
    }
    print(&report);
    publish(&report, &options.json, &report.missed)
}

impl Bench {
    /// All rounds of one size.
    fn line(&self, name: String, desktop: &mut Desktop) -> Result<Line, Box<dyn Error>> {
        let casts = [(); 2].map(|()| desktop.screencast(Recording::Monitor));
        let case = |source, cast: usize| Capture {
            source,
            node: casts[cast].node,
            keepalive: 0,
            woken: false,
        };
        let (mut alone, mut together) = (Rounds::default(), Rounds::default());
        for round in 0..self.rounds {
            let mut pair = [Pipewirezerocopysrc, Pipewiresrc];
            if round % 2 == 1 {
                pair.reverse();
            }
            // mutter keeps every picture of a client that nobody captures: capture comes first.
            let mut first = Contender::start(desktop, &case(pair[0], 0), None)?;
            let client = desktop.moving_picture(self.fps);
            let [seen] = look(self.seconds, [&mut first])?;
            alone.add(pair[0], seen);
            let mut second = Contender::start(desktop, &case(pair[1], 1), None)?;
            let seen = look(self.seconds, [&mut first, &mut second])?;
            for (who, seen) in pair.into_iter().zip(seen) {
                together.add(who, seen);
            }
            drop(first);
            let [seen] = look(self.seconds, [&mut second])?;
            alone.add(pair[1], seen);
            desktop.stop(client);
        }
        let counts = self.counts(desktop, case)?;
        for cast in &casts {
            desktop.close(cast);
        }
        let both = [Pipewirezerocopysrc, Pipewiresrc];
        let of = |rounds: &Rounds| both.map(|who| (who, rounds.figures(who))).into();
        let all = || alone.0.values().chain(together.0.values()).flatten();
        Ok(Line {
            name,
            alone: of(&alone),
            alone_cpu_ratio: alone.cpu_ratio(),
            together: of(&together),
            together_cpu_ratio: together.cpu_ratio(),
            added_p99_us: together.added_p99(),
            delivered: both.map(|who| (who, together.delivered(who))).into(),
            dropped: together
                .of(Pipewirezerocopysrc)
                .iter()
                .map(|seen| seen.dropped)
                .sum(),
            copies: all().map(|seen| seen.copies).sum(),
            counts,
        })
    }

    /// What the preloaded library counts of both, at once.
    fn counts(
        &self,
        desktop: &mut Desktop,
        case: impl Fn(Source, usize) -> Capture,
    ) -> Result<BTreeMap<Source, BTreeMap<String, f64>>, Box<dyn Error>> {
        let counter = Some(self.counter.as_path());
        let mut ours = Contender::start(desktop, &case(Pipewirezerocopysrc, 0), counter)?;
        let mut theirs = Contender::start(desktop, &case(Pipewiresrc, 1), counter)?;
        let client = desktop.moving_picture(self.fps);
        let seen = look(self.seconds.min(2.0), [&mut ours, &mut theirs])?;
        desktop.stop(client);
        let [ours, theirs] = seen.map(|seen| seen.usage.counts);
        Ok([(Pipewirezerocopysrc, ours), (Pipewiresrc, theirs)].into())
    }

    /// The element on a still screen.
    fn keepalives(&self, desktop: &mut Desktop, woken: bool) -> Result<Keepalives, Box<dyn Error>> {
        let screencast = desktop.screencast(Recording::Monitor);
        let case = Capture {
            source: Pipewirezerocopysrc,
            node: screencast.node,
            keepalive: KEEPALIVE,
            woken,
        };
        let mut contender = Contender::start(desktop, &case, None)?;
        let [seen] = look(2.0 * self.seconds, [&mut contender])?;
        drop(contender);
        desktop.close(&screencast);
        let off = seen.frames.windows(2).map(|pair| {
            let took = (pair[1].pushed - pair[0].pushed) as f64 / 1e6;
            (took - f64::from(KEEPALIVE)).abs()
        });
        let spread = Spread::of(off);
        Ok(Keepalives {
            woken,
            count: seen.frames.len(),
            median: spread.median,
            most: spread.max,
        })
    }
}

/// The targets that were missed, in words.
fn missed(report: &Report) -> Vec<String> {
    let mut missed = Vec::new();
    let mut check = |name: &str, what: &str, is: f64, may: f64| {
        if is > may {
            missed.push(format!("{name}: {is:.2} {what}, at most {may}"));
        }
    };
    for line in &report.lines {
        let lost =
            line.delivered[&Pipewiresrc] as f64 - line.delivered[&Pipewirezerocopysrc] as f64;
        let cpu = line.alone_cpu_ratio.median;
        check(&line.name, "of pipewiresrc's CPU time", cpu, RATIO);
        let added = line.added_p99_us.median;
        check(&line.name, "us more than pipewiresrc, p99", added, ADDED_US);
        // At the edges of a window a frame may be in one's and not in the other's.
        let edges = f64::from(report.rounds);
        check(&line.name, "frames less than pipewiresrc", lost, edges);
        check(&line.name, "copies", line.copies as f64, 0.0);
    }
    for keepalives in &report.keepalives {
        let most = keepalives.most;
        check("keepalives", "ms off the period", most, KEEPALIVE_OFF);
    }
    missed
}

fn print(report: &Report) {
    println!(
        "\nMedians of {} rounds of {} s, a moving picture with {} frames a second. Ours is \
         pipewirezerocopysrc, theirs pipewiresrc.\nCPU in us a frame, latency in ms from the \
         frame's header to its way out, p50/p99; switches are voluntary, a frame.\n",
        report.rounds, report.seconds, report.fps
    );
    println!(
        "{:10} {:8} {:>11} {:>11} {:>17} {:>13} {:>13} {:>11}",
        "size", "", "fps", "CPU", "ratio (range)", "latency ours", "theirs", "switches"
    );
    for line in &report.lines {
        let paces = [
            ("alone", &line.alone, line.alone_cpu_ratio),
            ("together", &line.together, line.together_cpu_ratio),
        ];
        for (pace, figures, ratio) in paces {
            let [ours, theirs] = [Pipewirezerocopysrc, Pipewiresrc].map(|who| &figures[&who]);
            let pair = |what: fn(&Figures) -> f64, digits: usize| {
                format!("{:.digits$}/{:.digits$}", what(ours), what(theirs))
            };
            let latency =
                |latency: Latency| format!("{:.2}/{:.2}", latency.p50 / 1e3, latency.p99 / 1e3);
            println!(
                "{:10} {pace:8} {:>11} {:>11} {:>17} {:>13} {:>13} {:>11}",
                line.name,
                pair(|figures| figures.fps, 1),
                pair(|figures| figures.cpu_us, 0),
                format!("{:.2} ({:.2}-{:.2})", ratio.median, ratio.min, ratio.max),
                latency(ours.latency),
                latency(theirs.latency),
                pair(|figures| figures.switches, 1),
            );
        }
    }
    println!("\nFrames of the same time, both at once; and per frame, ours/theirs:\n");
    println!(
        "{:10} {:>11} {:>12} {:>8} {:>7} {:>13} {:>15} {:>15} {:>13}",
        "size",
        "delivered",
        "added p99",
        "dropped",
        "copies",
        "large copies",
        "copied bytes",
        "allocations",
        "wake-ups"
    );
    for line in &report.lines {
        let pair = |name: &str, digits: usize| {
            let of = |who| line.counts[&who].get(name).copied().unwrap_or_default();
            let (ours, theirs) = (of(Pipewirezerocopysrc), of(Pipewiresrc));
            format!("{ours:.digits$}/{theirs:.digits$}")
        };
        let delivered = format!(
            "{}/{}",
            line.delivered[&Pipewirezerocopysrc], line.delivered[&Pipewiresrc]
        );
        println!(
            "{:10} {delivered:>11} {:>12.2} {:>8} {:>7} {:>13} {:>15} {:>15} {:>13}",
            line.name,
            line.added_p99_us.median / 1e3,
            line.dropped,
            line.copies,
            pair("large_copies", 2),
            pair("copied_bytes", 0),
            pair("allocations", 1),
            pair("waits", 1),
        );
    }
    println!("\nKeepalives every {KEEPALIVE} ms on a still screen: ms off the period\n");
    for keepalives in &report.keepalives {
        println!(
            "{:24} median {:.2}, most {:.2}, of {}",
            if keepalives.woken {
                "woken every 3 ms"
            } else {
                "undisturbed"
            },
            keepalives.median,
            keepalives.most,
            keepalives.count
        );
    }
}
