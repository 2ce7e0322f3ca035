// SPDX-License-Identifier: MIT OR Apache-2.0

//! Figures for the elements' `stats` properties.

use std::time::Duration;

/// Samples that count: the last ones.
const WINDOW: usize = 512;

/// Quantiles over the last 512 durations. Adding one costs nothing but a store.
#[derive(Clone, Debug, Default)]
pub struct Quantiles {
    micros: Vec<u32>,
    next: usize,
}

impl Quantiles {
    /// Adds a duration; over 71 minutes counts as 71 minutes.
    pub fn add(&mut self, sample: Duration) {
        let micros = u32::try_from(sample.as_micros()).unwrap_or(u32::MAX);
        if self.micros.len() < WINDOW {
            self.micros.push(micros);
        } else {
            self.micros[self.next] = micros;
        }
        self.next = (self.next + 1) % WINDOW;
    }

    /// The median and the 99th percentile in microseconds; 0 without samples.
    pub fn p50_p99_us(&self) -> (u64, u64) {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        let at = |percent: usize| {
            let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
            sorted.get(index).copied().unwrap_or(0).into()
        };
        (at(50), at(99))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_samples_count() {
        let mut quantiles = Quantiles::default();
        assert_eq!(quantiles.p50_p99_us(), (0, 0));
        quantiles.add(Duration::from_micros(7));
        assert_eq!(quantiles.p50_p99_us(), (7, 7));
        for micros in 1..=5 * WINDOW as u64 {
            quantiles.add(Duration::from_micros(micros));
        }
        let end = 5 * WINDOW as u64;
        assert_eq!(quantiles.p50_p99_us(), (end - 256, end - 5));
        quantiles.add(Duration::MAX);
        assert_eq!(quantiles.micros.len(), WINDOW);
    }
}
