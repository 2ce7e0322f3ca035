// SPDX-License-Identifier: MIT OR Apache-2.0

//! One contender of `ci/bench pipewirezerocopysrc`: captures a node and says what that took.
//!
//! It says "ready" first. Then it answers each [`Window`] that it reads, a line of JSON, with what
//! it has [`Seen`] in it, and ends with its standard input. Several of them look at the same window
//! that way, each a process of its own.

use std::error::Error;
use std::io::{BufRead, stdin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gst::prelude::*;
use serde::{Deserialize, Serialize};

use crate::meter::{Counter, Outcome, Reading};

/// How long the first frame is waited for. A compositor may draw none on a still screen.
const FIRST_FRAME: Duration = Duration::from_secs(3);

/// How long after a window frames of it are waited for that were captured in it.
const LATE: Duration = Duration::from_millis(250);

/// How often a source is woken for nothing.
const WAKE_EVERY: Duration = Duration::from_millis(3);

/// Who captures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The element.
    Pipewirezerocopysrc,
    /// PipeWire's own, in its best setting: frames leave in the producer's memory.
    Pipewiresrc,
}

/// One process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Capture {
    /// Who.
    pub source: Source,
    /// What: the id of a PipeWire node.
    pub node: u32,
    /// After how many milliseconds without a frame the last one is resent; 0 = never.
    pub keepalive: u32,
    /// Whether the source is woken all the time, for nothing.
    pub woken: bool,
}

/// From one moment to another, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Window {
    pub from: u64,
    pub until: u64,
}

impl Window {
    fn has(&self, moment: u64) -> bool {
        (self.from..self.until).contains(&moment)
    }
}

/// When a frame was captured, by its header, and when it left the source.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Frame {
    pub captured: u64,
    pub pushed: u64,
}

/// What there was in a window.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Per frame that left in it.
    pub usage: Outcome,
    /// Those that were captured in it.
    pub frames: Vec<Frame>,
    /// Copies of a frame, as the element counts them.
    pub copies: u64,
    /// Frames that did not leave, as the element counts them.
    pub dropped: u64,
}

/// The clock of all that is here.
pub fn now() -> u64 {
    gst::SystemClock::obtain().time().nseconds()
}

fn sleep_until(moment: u64) {
    std::thread::sleep(Duration::from_nanos(moment.saturating_sub(now())));
}

#[derive(Default)]
struct Frames(Mutex<Vec<Frame>>);

impl Frames {
    fn lock(&self) -> MutexGuard<'_, Vec<Frame>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub fn run(case: &Capture) -> Result<(), Box<dyn Error>> {
    go_first();
    gst::init()?;
    // As an application has it: from its file, as pipewiresrc is from its own.
    let plugin = std::env::current_exe()?.with_file_name("libgstpipewirezerocopy.so");
    gst::Plugin::load_file(&plugin).map_err(|error| format!("{}: {error}", plugin.display()))?;
    let Capture {
        node, keepalive, ..
    } = case;
    let source = match case.source {
        Source::Pipewirezerocopysrc => {
            format!("pipewirezerocopysrc pipewire-node-id={node} keepalive-time={keepalive}")
        }
        Source::Pipewiresrc => {
            format!("pipewiresrc path={node} always-copy=false keepalive-time={keepalive}")
        }
    };
    let description = format!("{source} name=source ! video/x-raw ! fakesink sync=false");
    let pipeline = gst::parse::launch(&description)?
        .downcast::<gst::Pipeline>()
        .map_err(|_| "it is a pipeline")?;
    // Timestamps are then those of the frames' headers, which are of this clock.
    pipeline.use_clock(Some(&gst::SystemClock::obtain()));
    pipeline.set_start_time(gst::ClockTime::NONE);
    pipeline.set_base_time(gst::ClockTime::ZERO);
    let source = pipeline.by_name("source").ok_or("it has a source")?;
    let frames = Arc::new(Frames(Mutex::new(Vec::with_capacity(1 << 16))));
    let (tell, first) = channel();
    watch(&source, frames.clone(), tell)?;

    pipeline.set_state(gst::State::Playing)?;
    let _ = first.recv_timeout(FIRST_FRAME);
    println!("\"ready\"");
    for line in stdin().lock().lines() {
        let window = serde_json::from_str(&line?)?;
        let seen = look(case, &source, &frames, window)?;
        println!("{}", serde_json::to_string(&seen)?);
    }
    pipeline.set_state(gst::State::Null)?;
    Ok(())
}

/// Notes each frame that leaves `source`.
fn watch(source: &gst::Element, frames: Arc<Frames>, first: Sender<()>) -> Result<(), String> {
    let pad = source.static_pad("src").ok_or("a source has a pad")?;
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        let pushed = now();
        let mut frames = frames.lock();
        if frames.is_empty() {
            let _ = first.send(());
        }
        let pts = info.buffer().and_then(|buffer| buffer.pts());
        frames.push(Frame {
            captured: pts.map_or(pushed, gst::ClockTime::nseconds),
            pushed,
        });
        gst::PadProbeReturn::Ok
    });
    Ok(())
}

/// What happens in `window`.
fn look(
    case: &Capture,
    source: &gst::Element,
    frames: &Frames,
    window: Window,
) -> Result<Seen, Box<dyn Error>> {
    let counter = Counter::find();
    let stats = |name| {
        let ours = case.source == Source::Pipewirezerocopysrc;
        let structure = ours.then(|| source.property::<gst::Structure>("stats"));
        structure.map_or(0, |stats| stats.get::<u64>(name).unwrap_or_default())
    };
    let read = || {
        let counts = [stats("copies"), stats("dropped")];
        (counts, Reading::now(counter.as_ref()))
    };
    let done = AtomicBool::new(false);
    let ([copies, dropped], start, end) = std::thread::scope(|scope| {
        if case.woken {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    source.set_property("keepalive-time", case.keepalive);
                    std::thread::sleep(WAKE_EVERY);
                }
            });
        }
        sleep_until(window.from);
        let (before, start) = read();
        sleep_until(window.until);
        let (after, end) = read();
        done.store(true, Ordering::Relaxed);
        ([after[0] - before[0], after[1] - before[1]], start, end)
    });
    std::thread::sleep(LATE);
    let all = frames.lock();
    let left = all.iter().filter(|frame| window.has(frame.pushed)).count();
    let frames: Vec<Frame> = all
        .iter()
        .filter(|frame| window.has(frame.captured))
        .copied()
        .collect();
    if left == 0 || frames.is_empty() {
        return Err(format!("{case:?}: no frame in {window:?}").into());
    }
    let latency_us = frames
        .iter()
        .map(|frame| frame.pushed.saturating_sub(frame.captured) as f64 / 1e3)
        .collect();
    Ok(Seen {
        usage: Outcome::between(&start, &end, left as u32, latency_us),
        frames,
        copies,
        dropped,
    })
}

/// Where the bench was started with real-time priority, all that it starts has inherited that, the
/// compositor too. What is measured goes before it.
fn go_first() {
    let mut param = libc::sched_param { sched_priority: 0 };
    // SAFETY: These calls are about this process, and `param` has room for the answer.
    unsafe {
        let policy = libc::sched_getscheduler(0);
        if policy == libc::SCHED_RR && libc::sched_getparam(0, &raw mut param) == 0 {
            param.sched_priority += 1;
            // Fails only where the process may not, and is then as it was.
            libc::sched_setscheduler(0, policy, &raw const param);
        }
    }
}
