// SPDX-License-Identifier: MIT OR Apache-2.0

//! The programs of `ci/bench`: how fast and how frugal the elements are, beside the least that the
//! same work costs. docs/performance.md says how to read what they print.
//!
//! What is measured runs in a process of its own, so that its CPU time is its own: this program
//! calls itself with [`Command::Run`] or
//! [`Command::Capture`] for that, and with [`Command::Peer`] for the other end.

mod capture;
mod case;
mod meter;
mod peer;
mod pipeline;
mod pipewirezerocopysrc;
mod plain;
mod report;
mod scanout;
mod source;
mod vsockenc;

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;

use crate::case::{Case, Contender};
use crate::scanout::case as pushing;

#[derive(Parser)]
#[command(about = "Benchmarks of gst-plugins-zerocopy")]
enum Command {
    /// vsockenc against an answering peer, a bare socket and x264enc
    Vsockenc(vsockenc::Options),
    /// pipewirezerocopysrc against pipewiresrc, on a desktop of their own
    Pipewirezerocopysrc(pipewirezerocopysrc::Options),
    /// helix-host and scanoutsrc against bare sockets and tcpserversink
    Scanout(scanout::Options),
    /// Answer requests at full speed, until standard input ends
    #[command(hide = true)]
    Peer,
    /// Run one case and print what it took
    #[command(hide = true)]
    Run {
        /// The case, as JSON
        #[arg(value_parser = |text: &str| serde_json::from_str::<Case>(text))]
        case: Case,
    },
    /// Capture a node and say what that takes, until standard input ends
    #[command(hide = true)]
    Capture {
        /// The contender, as JSON
        #[arg(value_parser = |text: &str| serde_json::from_str::<capture::Capture>(text))]
        case: capture::Capture,
    },
    /// Push a recording, until standard input ends
    #[command(hide = true)]
    Push {
        /// The case, as JSON
        #[arg(value_parser = |text: &str| serde_json::from_str::<pushing::Case>(text))]
        case: pushing::Case,
    },
    /// Subscribe, and print what was noticed
    #[command(hide = true)]
    Watch {
        /// The case, as JSON
        #[arg(value_parser = |text: &str| serde_json::from_str::<pushing::Case>(text))]
        case: pushing::Case,
        /// Where, as JSON; the recording itself needs no host
        #[arg(value_parser = |text: &str| serde_json::from_str::<pushing::Served>(text))]
        served: Option<pushing::Served>,
    },
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Vsockenc(options) => vsockenc::bench(&options),
        Command::Pipewirezerocopysrc(options) => pipewirezerocopysrc::bench(&options),
        Command::Peer => peer::serve(),
        Command::Run { case } => run(&case),
        Command::Capture { case } => capture::run(&case),
        Command::Scanout(options) => scanout::bench(&options),
        Command::Push { case } => scanout::push::serve(&case),
        Command::Watch { case, served } => watch(&case, served),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("zerocopy-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(case: &Case) -> Result<(), Box<dyn Error>> {
    let outcomes = match case.contender {
        Contender::Plain | Contender::Rows => plain::run(case)?,
        Contender::Fakesink | Contender::Vsockenc | Contender::X264enc => pipeline::run(case)?,
    };
    println!("{}", serde_json::to_string(&outcomes)?);
    Ok(())
}

fn watch(case: &pushing::Case, served: Option<pushing::Served>) -> Result<(), Box<dyn Error>> {
    let served = served.unwrap_or_else(|| pushing::Served::here(case));
    let outcome = scanout::watch::run(case, &served)?;
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}
