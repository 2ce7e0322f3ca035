// SPDX-License-Identifier: MIT OR Apache-2.0

//! From what the processes say to the figures that people read.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use crate::meter::Outcome;

/// The value that `share` of all values do not exceed; `values` is sorted.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let rank = (values.len() as f64 * share).ceil() as usize;
    values[rank.clamp(1, values.len()) - 1]
}

/// What came of several rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Self {
            // Of an even number, between the two in the middle.
            median: f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]),
            min: values[0],
            max: values[values.len() - 1],
        }
    }
}

/// Microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
}

impl Latency {
    /// The quantiles of each round, and of those the medians: one round that something else on the
    /// machine has disturbed does not decide.
    pub fn of(outcomes: &[Outcome]) -> Self {
        let median_of = |share| {
            let rounds = outcomes.iter().map(|outcome| {
                let mut frames = outcome.latency_us.clone();
                frames.sort_by(f64::total_cmp);
                quantile(&frames, share)
            });
            Spread::of(rounds).median
        };
        Self {
            p50: median_of(0.5),
            p99: median_of(0.99),
        }
    }
}

/// An element's latency and a bare socket's.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Compared {
    pub element: Latency,
    pub plain: Latency,
    /// The first less the second, round by round, and of that the median: what the element adds to the
    /// peer's time and the transfer.
    pub added: Latency,
}

impl Compared {
    pub fn of(element: &[Outcome], plain: &[Outcome]) -> Self {
        let added = |quantile: fn(Latency) -> f64| {
            let of = |outcome| quantile(Latency::of(std::slice::from_ref(outcome)));
            let rounds = element.iter().zip(plain);
            Spread::of(rounds.map(|(element, plain)| of(element) - of(plain))).median
        };
        Self {
            element: Latency::of(element),
            plain: Latency::of(plain),
            added: Latency {
                p50: added(|latency| latency.p50),
                p99: added(|latency| latency.p99),
            },
        }
    }
}

/// Where and when figures were taken.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    pub gstreamer: String,
    /// Over the last minute, before the benchmark: what else ran here.
    pub load: f64,
    pub date: String,
}

impl Machine {
    pub fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| {
                Some(
                    line.strip_prefix("model name")?
                        .split_once(':')?
                        .1
                        .trim()
                        .to_owned(),
                )
            })
            .unwrap_or_else(|| "unknown CPU".to_owned());
        let date = Command::new("date").args(["-u", "+%F %R UTC"]).output();
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            gstreamer: gst::version_string().to_string(),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or_default(),
            date: date.map_or_else(
                |_| "unknown date".to_owned(),
                |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            ),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}, {} cores, Linux {}, {}, load {} before; {}",
            self.cpu, self.cores, self.kernel, self.gstreamer, self.load, self.date
        )
    }
}

/// The counts of one outcome less those of another.
pub fn less(
    counts: &BTreeMap<String, f64>,
    other: &BTreeMap<String, f64>,
) -> BTreeMap<String, f64> {
    counts
        .iter()
        .map(|(name, count)| (name.clone(), count - other.get(name).unwrap_or(&0.0)))
        .collect()
}

/// Writes all figures to `json`, and says which targets were missed. It is an error if any were.
pub fn publish(
    report: &impl Serialize,
    json: &Path,
    missed: &[String],
) -> Result<(), Box<dyn Error>> {
    if let Some(folder) = json.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(json, serde_json::to_string_pretty(report)?)?;
    println!("\nAll figures: {}", json.display());
    for text in missed {
        println!("missed: {text}");
    }
    match missed.len() {
        0 => Ok(()),
        1 => Err("a target was missed".into()),
        count => Err(format!("{count} targets were missed").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_target_is_an_error_after_the_figures_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let json = folder.path().join("new").join("figures.json");
        publish(&1, &json, &["too slow".to_owned()]).unwrap_err();
        assert_eq!(fs::read_to_string(&json).unwrap(), "1");
        publish(&2, &json, &[]).unwrap();
        assert_eq!(fs::read_to_string(&json).unwrap(), "2");
    }

    #[test]
    fn a_quantile_is_a_value_that_was_measured() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert!((quantile(&values, 0.5) - 100.0).abs() < f64::EPSILON);
        assert!((quantile(&values, 0.99) - 198.0).abs() < f64::EPSILON);
        assert!((quantile(&[7.0], 0.99) - 7.0).abs() < f64::EPSILON);
    }
}
