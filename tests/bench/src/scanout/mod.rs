// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ci/bench scanout`: a recording pushed by helix-host to scanoutsrc, beside bare sockets and beside
//! what GStreamer has for it.

pub mod case;
mod film;
pub mod push;
mod table;
pub mod watch;

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use clap::Args;
use serde::Serialize;

use self::case::{Case, Contender, Outcome, Served, Target};
use crate::report::{Machine, Spread, publish, quantile};

/// From the moment a frame is due to the moment it is out, at one subscriber, in microseconds.
const P99_US: f64 = 2000.0;

#[derive(Args)]
pub struct Options {
    /// How often each measurement is made; contenders take turns
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Frames of a measurement, at 60 a second
    #[arg(long, default_value_t = 240)]
    frames: u32,
    /// Only cases in whose name this occurs, as in "1x64" or "unix"
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// One round of a few frames: shows that it works, and no figures worth reading
    #[arg(long)]
    smoke: bool,
    /// Where to write all figures
    #[arg(long, value_name = "FILE", default_value = "target/bench/scanout.json")]
    json: PathBuf,
    /// The host, if not beside this program
    #[arg(long, value_name = "FILE")]
    helix_host: Option<PathBuf>,
}

/// What one contender took in one case. Times are in microseconds; each is made for each round, and
/// their median is shown.
#[derive(Serialize)]
struct Line {
    contender: &'static str,
    p50_us: Spread,
    p99_us: Spread,
    max_us: Spread,
    /// CPU time for a frame and subscriber.
    host_us: Spread,
    client_us: Spread,
    host_switches: Spread,
    /// Over all rounds.
    expected: u64,
    lost: u64,
}

impl Line {
    fn of(contender: Contender, outcomes: &[Outcome]) -> Self {
        let latency = |share| {
            Spread::of(outcomes.iter().map(|outcome| {
                let mut sorted = outcome.latency_us.clone();
                sorted.sort_by(f64::total_cmp);
                quantile(&sorted, share)
            }))
        };
        let each = |what: fn(&Outcome) -> f64| Spread::of(outcomes.iter().map(what));
        let sum = |what: fn(&Outcome) -> u64| outcomes.iter().map(what).sum();
        Self {
            contender: contender.name(),
            p50_us: latency(0.5),
            p99_us: latency(0.99),
            max_us: latency(1.0),
            host_us: each(|outcome| outcome.host_us),
            client_us: each(|outcome| outcome.client_us),
            host_switches: each(|outcome| outcome.host_switches),
            expected: sum(|outcome| outcome.expected),
            lost: sum(|outcome| outcome.lost),
        }
    }
}

/// All contenders of one case.
#[derive(Serialize)]
struct Compared {
    name: String,
    lines: Vec<Line>,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rounds: u32,
    frames: u32,
    cases: Vec<Compared>,
    missed: Vec<String>,
}

pub fn bench(options: &Options) -> Result<(), Box<dyn Error>> {
    gst::init()?;
    let program = std::env::current_exe()?;
    let helix_host = options
        .helix_host
        .clone()
        .unwrap_or_else(|| program.with_file_name("helix-host"));
    if !helix_host.exists() {
        return Err(format!("no {} here; ci/bench builds it", helix_host.display()).into());
    }
    let folder = tempfile::tempdir()?;
    let film = folder.path().join("film.h264");
    film::make(&film)?;
    let bench = Bench {
        program,
        helix_host,
        folder: folder.path().to_owned(),
        rounds: if options.smoke {
            1
        } else {
            options.rounds.max(1)
        },
        frames: if options.smoke {
            10
        } else {
            options.frames.max(1)
        },
    };
    let mut report = Report {
        machine: Machine::this(),
        rounds: bench.rounds,
        frames: bench.frames,
        cases: Vec::new(),
        missed: Vec::new(),
    };
    println!("{}", report.machine);
    let sizes: &[(u32, u32)] = if options.smoke {
        &[(2, 2)]
    } else {
        &[(1, 1), (1, 16), (1, 64), (16, 1)]
    };
    for &(scanouts, subscribers) in sizes {
        for unix in [false, true] {
            let case = Case {
                contender: Contender::Scanoutsrc,
                scanouts,
                subscribers,
                unix,
                film: film.display().to_string(),
                warm_up: if options.smoke { 1 } else { 30 },
                frames: bench.frames,
            };
            let name = case.name();
            if options.only.iter().all(|text| name.contains(text)) {
                eprintln!("{name} ...");
                let compared = bench.compare(&case)?;
                if !options.smoke {
                    report.missed.extend(missed(&case, &compared));
                }
                report.cases.push(compared);
            }
        }
    }
    if report.cases.is_empty() {
        return Err("no case has such a name".into());
    }
    table::print(&report);
    publish(&report, &options.json, &report.missed)
}

struct Bench {
    program: PathBuf,
    helix_host: PathBuf,
    /// For sockets.
    folder: PathBuf,
    rounds: u32,
    frames: u32,
}

/// A host's process. It ends with this.
struct Host {
    child: Child,
    served: Served,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Bench {
    /// All rounds of one case.
    fn compare(&self, case: &Case) -> Result<Compared, Box<dyn Error>> {
        use Contender::{Gdp, Plain, Scanoutsrc, Source};
        let mut contenders = vec![Scanoutsrc, Plain];
        // tcpserversink knows TCP alone; the recording itself knows neither sockets nor subscribers.
        if !case.unix {
            contenders.push(Gdp);
        }
        if !case.unix && case.subscribers == 1 {
            contenders.push(Source);
        }
        let mut outcomes: BTreeMap<Contender, Vec<Outcome>> = BTreeMap::new();
        for round in 0..self.rounds {
            for &contender in &contenders {
                let case = Case {
                    contender,
                    ..case.clone()
                };
                let outcome = self
                    .run(&case)
                    .map_err(|error| format!("{} {}: {error}", case.name(), contender.name()))?;
                outcomes.entry(contender).or_default().push(outcome);
            }
            if round % 2 == 0 {
                contenders.reverse();
            }
        }
        Ok(Compared {
            name: case.name(),
            lines: outcomes
                .iter()
                .map(|(contender, outcomes)| Line::of(*contender, outcomes))
                .collect(),
        })
    }

    /// One measurement, with a host and subscribers of its own.
    fn run(&self, case: &Case) -> Result<Outcome, Box<dyn Error>> {
        let host = match case.contender {
            Contender::Scanoutsrc => Some(self.helix_host(case)?),
            Contender::Plain | Contender::Gdp => Some(self.other_host(case)?),
            Contender::Source => None,
        };
        let mut command = Command::new(&self.program);
        command.arg("watch").arg(serde_json::to_string(case)?);
        if let Some(host) = &host {
            command.arg(serde_json::to_string(&host.served)?);
        }
        let output = command.stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            return Err(format!("its subscribers: {}", output.status).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn helix_host(&self, case: &Case) -> Result<Host, Box<dyn Error>> {
        let listen = if case.unix {
            format!("unix:{}", self.folder.join("helix").display())
        } else {
            "tcp:127.0.0.1:0".to_owned()
        };
        let mut command = Command::new(&self.helix_host);
        // The recording is encoded already: there is no encoder to look for.
        command.args(["--encoder", "x264enc", "--listen", &listen]);
        for id in 0..case.scanouts {
            command.args(["--scanout", &format!("{id}={}", case.front())]);
        }
        // Its log has lines about each client; they are of use when something is wrong.
        let (child, said) = start(command.env("RUST_LOG", "warn"))?;
        let address = said
            .strip_prefix("listening on ")
            .ok_or_else(|| format!("helix-host said {said:?}"))?;
        let served = Served {
            pid: child.id() as i32,
            targets: (0..case.scanouts)
                .map(|scanout_id| Target {
                    address: address.to_owned(),
                    scanout_id,
                })
                .collect(),
            base: 0,
        };
        Ok(Host { child, served })
    }

    fn other_host(&self, case: &Case) -> Result<Host, Box<dyn Error>> {
        let mut command = Command::new(&self.program);
        command.arg("push").arg(serde_json::to_string(case)?);
        let (child, said) = start(&mut command)?;
        let served = serde_json::from_str(&said)?;
        Ok(Host { child, served })
    }
}

/// Starts a host, and returns the first line that it says.
fn start(command: &mut Command) -> Result<(Child, String), Box<dyn Error>> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().ok_or("it has an output")?;
    let mut said = String::new();
    BufReader::new(output).read_line(&mut said)?;
    if said.is_empty() {
        return Err(format!("the host ended: {}", child.wait()?).into());
    }
    Ok((child, said.trim().to_owned()))
}

/// The targets that a case missed, in words.
fn missed(case: &Case, compared: &Compared) -> Vec<String> {
    let ours = compared
        .lines
        .iter()
        .find(|line| line.contender == Contender::Scanoutsrc.name());
    let Some(line) = ours else {
        return Vec::new();
    };
    let Compared { name, .. } = compared;
    let Line { lost, expected, .. } = line;
    let p99 = line.p99_us.median;
    let alone = case.scanouts * case.subscribers == 1;
    let lossy = (*lost > 0).then(|| format!("{name}: {lost} of {expected} frames lost"));
    let slow =
        (alone && p99 > P99_US).then(|| format!("{name}: p99 {p99:.0} us, at most {P99_US}"));
    lossy.into_iter().chain(slow).collect()
}

/// CLOCK_MONOTONIC in ns.
fn monotonic_now() -> i64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| std::time::Duration::from(time).as_nanos() as i64)
}
