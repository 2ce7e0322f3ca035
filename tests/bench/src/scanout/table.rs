// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the benchmark prints.

use super::case::Contender;
use super::{Line, Report};

pub fn print(report: &Report) {
    println!(
        "\nScanouts x subscribers of each, 60 frames a second; {} rounds of {} frames.\n\
         Latency in ms, from when a frame is due to when it is out. CPU in us for a frame and\n\
         subscriber, of the host's process and the subscribers'; ratios are to plain's. Switches: a\n\
         thread of the host's gives the CPU away.\n",
        report.rounds, report.frames
    );
    println!(
        "{:10} {:>11} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>9} {:>8} {:>9}",
        "case",
        "",
        "p50",
        "p99",
        "max",
        "host",
        "ratio",
        "client",
        "ratio",
        "switches",
        "lost",
        "of"
    );
    for case in &report.cases {
        let plain = case
            .lines
            .iter()
            .find(|line| line.contender == Contender::Plain.name());
        for line in &case.lines {
            let ratio =
                |what: fn(&Line) -> f64| plain.map_or(0.0, |plain| what(line) / what(plain));
            println!(
                "{:10} {:>11} {:>7.2} {:>7.2} {:>7.2} {:>7.1} {:>7.2} {:>7.1} {:>7.2} {:>9.2} {:>8} {:>9}",
                case.name,
                line.contender,
                line.p50_us.median / 1e3,
                line.p99_us.median / 1e3,
                line.max_us.median / 1e3,
                line.host_us.median,
                ratio(|line| line.host_us.median),
                line.client_us.median,
                ratio(|line| line.client_us.median),
                line.host_switches.median,
                line.lost,
                line.expected,
            );
        }
    }
}
