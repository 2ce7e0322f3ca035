// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the benchmark prints.

use super::rounds::Figures;
use super::{KEEPALIVE, Report};
use crate::capture::Source::{Pipewiresrc, Pipewirezerocopysrc};
use crate::report::{Latency, Spread};

pub fn print(report: &Report) {
    println!(
        "\nMedians of {} rounds of {} s, a moving picture with {} frames a second. Ours is \
         pipewirezerocopysrc, theirs pipewiresrc.\nCPU in us a frame, and what of it is the kernel's; \
         switches are voluntary, a frame.\n",
        report.rounds, report.seconds, report.fps
    );
    println!(
        "{:10} {:8} {:>11} {:>11} {:>17} {:>11} {:>11}",
        "size", "", "fps", "CPU", "ratio (range)", "kernel", "switches"
    );
    for line in &report.lines {
        for (name, pace) in [("alone", &line.alone), ("together", &line.together)] {
            let pair = |what: fn(&Figures) -> f64, digits: usize| {
                let [ours, theirs] =
                    [Pipewirezerocopysrc, Pipewiresrc].map(|who| what(&pace.figures[&who]));
                format!("{ours:.digits$}/{theirs:.digits$}")
            };
            println!(
                "{:10} {name:8} {:>11} {:>11} {:>17} {:>11} {:>11}",
                line.name,
                pair(|figures| figures.fps, 1),
                pair(|figures| figures.cpu_us, 0),
                spread(pace.cpu_ratio, 1.0, 2),
                pair(|figures| figures.system_us, 0),
                pair(|figures| figures.switches, 1),
            );
        }
    }
    println!(
        "\nLatency in ms, p50/p99, from the frame's header to its way out: alone; both at once, served \
         first and second by the\ncompositor; and by how much ours has the higher p99 at the same place.\n"
    );
    println!(
        "{:10} {:8} {:>15} {:>15} {:>15} {:>21}",
        "size", "", "alone", "first", "second", "added p99 (range)"
    );
    for line in &report.lines {
        for (name, who) in [("ours", Pipewirezerocopysrc), ("theirs", Pipewiresrc)] {
            let latency =
                |latency: Latency| format!("{:.2}/{:.2}", latency.p50 / 1e3, latency.p99 / 1e3);
            println!(
                "{:10} {name:8} {:>15} {:>15} {:>15} {:>21}",
                line.name,
                latency(line.alone.figures[&who].latency),
                latency(line.places.first[&who]),
                latency(line.places.second[&who]),
                match who {
                    Pipewirezerocopysrc => spread(line.places.added_p99_us, 1e-3, 1),
                    Pipewiresrc => String::new(),
                },
            );
        }
    }
    println!("\nFrames of the same time, both at once; and per frame, ours/theirs:\n");
    println!(
        "{:10} {:>11} {:>8} {:>7} {:>13} {:>15} {:>15} {:>13}",
        "size",
        "delivered",
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
            "{:10} {delivered:>11} {:>8} {:>7} {:>13} {:>15} {:>15} {:>13}",
            line.name,
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

/// A median and its range, times `factor`.
fn spread(spread: Spread, factor: f64, digits: usize) -> String {
    let [median, min, max] = [spread.median, spread.min, spread.max].map(|value| value * factor);
    format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
}
