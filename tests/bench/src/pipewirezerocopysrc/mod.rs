// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ci/bench pipewirezerocopysrc`: the element beside PipeWire's own `pipewiresrc`, on two nodes of
//! one compositor that show the same moving picture; and how exact its keepalives are.

mod contender;
mod rounds;
mod table;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use zerocopy_test_support::desktop::{Desktop, Recording};

use crate::capture::{Capture, Seen, Source};
use crate::report::{Machine, Spread, publish};
use Source::{Pipewiresrc, Pipewirezerocopysrc};
use contender::{Contender, look};
use rounds::{Pace, Pair, Places, Turn};

/// Pixels of the window in which the picture moves. mutter, on the processor, draws a few whole pictures of 4K in a
/// second: that would be what is measured.
const MOVING: (u32, u32) = (640, 360);

/// Pixels of the screen, and of the picture, where it is only to be seen that all works.
const SMALL: (u32, u32) = (320, 240);

/// CPU time of a frame, as a multiple of pipewiresrc's.
const RATIO: f64 = 1.0;
/// Microseconds that a frame may take longer than through pipewiresrc, 99th percentile.
const ADDED_US: f64 = 2000.0;
/// Milliseconds between keepalives.
const KEEPALIVE: u32 = 100;
/// Milliseconds by which one may be early or late.
const KEEPALIVE_OFF: f64 = 5.0;

#[derive(Args)]
pub struct Options {
    /// How often each measurement is made; contenders take turns, so that an even number is fair
    #[arg(long, default_value_t = 6)]
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

/// What a size took.
#[derive(Serialize)]
struct Line {
    name: String,
    /// One after the other.
    alone: Pace,
    /// Both at once.
    together: Pace,
    /// Both at once, at the same place in the compositor's order.
    places: Places,
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
    moving: (u32, u32),
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
        moving: if options.smoke { SMALL } else { MOVING },
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
        vec![SMALL]
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
    table::print(&report);
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
        let (mut alone, mut together) = (Vec::new(), Vec::new());
        for round in 0..self.rounds {
            let mut pair = [Pipewirezerocopysrc, Pipewiresrc];
            if round % 2 == 1 {
                pair.reverse();
            }
            let contenders = [0, 1].map(|cast| case(pair[cast], cast));
            let start = |desktop: &Desktop, which: usize| {
                Contender::start(desktop, &contenders[which], None)
            };
            // mutter keeps every picture of a client that nobody captures: one always does.
            let mut one = start(desktop, 0)?;
            let client = desktop.moving_window(self.fps, self.moving);
            let [seen] = look(self.seconds, [&mut one])?;
            let mut other = start(desktop, 1)?;
            drop(one);
            let [seen_other] = look(self.seconds, [&mut other])?;
            let pair_of = |[one, other]: [Seen; 2]| Pair::new([(pair[0], one), (pair[1], other)]);
            alone.push(pair_of([seen, seen_other]));
            // mutter serves them in the order in which they came, so each of them comes second once.
            let mut one = start(desktop, 0)?;
            let other_first = pair_of(look(self.seconds, [&mut one, &mut other])?);
            drop(other);
            let mut other = start(desktop, 1)?;
            let one_first = pair_of(look(self.seconds, [&mut one, &mut other])?);
            desktop.stop(client);
            let (ours_first, theirs_first) = match pair[0] {
                Pipewirezerocopysrc => (one_first, other_first),
                Pipewiresrc => (other_first, one_first),
            };
            together.push(Turn {
                ours_first,
                theirs_first,
            });
        }
        let counts = self.counts(desktop, case)?;
        for cast in &casts {
            desktop.close(cast);
        }
        let both: Vec<&Pair> = together.iter().flat_map(Turn::windows).collect();
        let alone: Vec<&Pair> = alone.iter().collect();
        let all = || alone.iter().chain(&both);
        let delivered = |who| both.iter().map(|pair| pair.of(who).frames.len()).sum();
        Ok(Line {
            name,
            alone: Pace::of(&alone),
            together: Pace::of(&both),
            places: Places::of(&together),
            delivered: [Pipewirezerocopysrc, Pipewiresrc]
                .map(|who| (who, delivered(who)))
                .into(),
            dropped: both
                .iter()
                .map(|pair| pair.of(Pipewirezerocopysrc).dropped)
                .sum(),
            copies: all().map(|pair| pair.of(Pipewirezerocopysrc).copies).sum(),
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
        let client = desktop.moving_window(self.fps, self.moving);
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
        let cpu = line.alone.cpu_ratio.median;
        check(&line.name, "of pipewiresrc's CPU time", cpu, RATIO);
        let added = line.places.added_p99_us.median;
        check(&line.name, "us more than pipewiresrc, p99", added, ADDED_US);
        // At the edges of a window a frame may be in one's and not in the other's.
        let edges = f64::from(report.rounds);
        check(&line.name, "frames less than pipewiresrc", lost, edges);
        check(&line.name, "copies", line.copies as f64, 0.0);
        let counted = line.counts[&Pipewirezerocopysrc].get("large_copies");
        let counted = counted.copied().unwrap_or(f64::INFINITY);
        check(
            &line.name,
            "large copies a frame, by the library",
            counted,
            0.0,
        );
    }
    for keepalives in &report.keepalives {
        let most = keepalives.most;
        check("keepalives", "ms off the period", most, KEEPALIVE_OFF);
    }
    missed
}
