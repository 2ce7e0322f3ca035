// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a process uses: CPU time, context switches, and what the preloaded library counts.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::mem::transmute;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::{Deserialize, Serialize};

use crate::case::Case;

/// The counts of the preloaded library (tests/bench/counter).
const COUNTS: [&CStr; 10] = [
    c"allocations",
    c"allocated_bytes",
    c"large_allocations",
    c"copies",
    c"copied_bytes",
    c"large_copies",
    c"sends",
    c"receives",
    c"waits",
    c"writes",
];

/// What a case took. Per frame, where it says nothing else.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Frames a second.
    pub fps: f64,
    /// Microseconds of CPU time, of all threads, in user space and in the kernel.
    pub cpu_us: f64,
    /// The part of it in the kernel. Kernels that tell by their ticks say it only roughly.
    pub system_us: f64,
    /// Times that a thread gave the CPU away.
    pub voluntary_switches: f64,
    /// Times that the CPU was taken from a thread.
    pub involuntary_switches: f64,
    /// From each frame's way in to its way out, in microseconds.
    pub latency_us: Vec<f64>,
    /// What the preloaded library counted; empty where it was not.
    pub counts: BTreeMap<String, f64>,
}

impl Outcome {
    /// What `frames` frames took between two moments.
    pub fn between(start: &Reading, end: &Reading, frames: u32, latency_us: Vec<f64>) -> Self {
        let per_frame = |amount: f64| amount / f64::from(frames);
        let counts = COUNTS
            .iter()
            .zip(
                start
                    .counts
                    .iter()
                    .flatten()
                    .zip(end.counts.iter().flatten()),
            )
            .map(|(name, (start, end))| {
                let name = name.to_string_lossy().into_owned();
                (name, per_frame((end - start) as f64))
            })
            .collect();
        Self {
            fps: f64::from(frames) / (end.at - start.at).as_secs_f64(),
            cpu_us: per_frame((end.cpu - start.cpu) * 1e6),
            system_us: per_frame((end.system - start.system) * 1e6),
            voluntary_switches: per_frame((end.voluntary - start.voluntary) as f64),
            involuntary_switches: per_frame((end.involuntary - start.involuntary) as f64),
            latency_us,
            counts,
        }
    }
}

/// Watches frames go in and out. It allocates nothing while they do.
pub struct Meter {
    warm_up: u32,
    total: u32,
    counter: Option<Counter>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    entered: Vec<Instant>,
    latency_us: Vec<f64>,
    left: u32,
    start: Option<Reading>,
    end: Option<Reading>,
}

/// What this process has used up to a moment.
pub struct Reading {
    at: Instant,
    /// Seconds.
    cpu: f64,
    /// Of these, in the kernel.
    system: f64,
    voluntary: i64,
    involuntary: i64,
    /// None where the library is not preloaded.
    counts: Option<[u64; COUNTS.len()]>,
}

impl Reading {
    pub fn now(counter: Option<&Counter>) -> Self {
        let usage = getrusage(UsageWho::RUSAGE_SELF).expect("a process may ask about itself");
        let seconds = |time: TimeVal| time.num_microseconds() as f64 / 1e6;
        let system = seconds(usage.system_time());
        Self {
            at: Instant::now(),
            cpu: seconds(usage.user_time()) + system,
            system,
            voluntary: usage.voluntary_context_switches(),
            involuntary: usage.involuntary_context_switches(),
            counts: counter.map(|counter| COUNTS.map(|name| counter.get(name))),
        }
    }
}

impl Meter {
    pub fn new(case: &Case) -> Self {
        Self {
            warm_up: case.warm_up,
            total: case.total(),
            counter: Counter::find(),
            state: Mutex::new(State {
                entered: Vec::with_capacity(case.total() as usize),
                latency_us: Vec::with_capacity(case.frames as usize),
                left: 0,
                start: None,
                end: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame goes in.
    pub fn enter(&self) {
        self.state().entered.push(Instant::now());
    }

    /// The oldest frame that is in comes out.
    pub fn leave(&self) {
        let now = Instant::now();
        let mut state = self.state();
        let number = state.left;
        if number >= self.warm_up
            && let Some(&entered) = state.entered.get(number as usize)
        {
            state
                .latency_us
                .push((now - entered).as_nanos() as f64 / 1e3);
        }
        state.left += 1;
        if state.left == self.warm_up {
            state.start = Some(self.read());
        }
        if state.left == self.total {
            state.end = Some(self.read());
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until all frames that went in are out, but not longer than `limit`.
    pub fn wait_until_empty(&self, limit: Duration) {
        let state = self.state();
        let _ = self
            .changed
            .wait_timeout_while(state, limit, |state| {
                (state.left as usize) < state.entered.len()
            })
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Waits until all frames of the case are out, and says what they took.
    pub fn finish(&self) -> Result<Outcome, String> {
        let mut state = self.state();
        let (left, total) = (state.left, self.total);
        let (Some(start), Some(end)) = (state.start.take(), state.end.take()) else {
            return Err(format!("{left} of {total} frames came out"));
        };
        let latency_us = std::mem::take(&mut state.latency_us);
        let frames = total - self.warm_up;
        Ok(Outcome::between(&start, &end, frames, latency_us))
    }

    fn read(&self) -> Reading {
        Reading::now(self.counter.as_ref())
    }
}

/// The preloaded library's function.
pub struct Counter(unsafe extern "C" fn(*const c_char) -> u64);

impl Counter {
    /// None where the library is not preloaded.
    pub fn find() -> Option<Self> {
        // SAFETY: the name is a C string.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"zerocopy_count".as_ptr()) };
        if found.is_null() {
            return None;
        }
        // SAFETY: the only function of that name is the library's, and has this signature.
        Some(Self(unsafe {
            transmute::<*mut libc::c_void, unsafe extern "C" fn(*const c_char) -> u64>(found)
        }))
    }

    fn get(&self, name: &CStr) -> u64 {
        // SAFETY: the name is a C string.
        unsafe { self.0(name.as_ptr()) }
    }
}
