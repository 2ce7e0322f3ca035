// SPDX-License-Identifier: MIT OR Apache-2.0

//! The subscribers of a measurement, in one process, and what they notice.

use std::error::Error;
use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use gst::prelude::*;
use helix_protocol::Address;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::case::{Case, Contender, Outcome, RATE, Served, Target};
use super::monotonic_now;
use crate::peer::Head;

/// Longer than it takes any number of subscribers to be served.
const JOINED: Duration = Duration::from_secs(20);
/// Longer than any frame is late.
const LATE: Duration = Duration::from_secs(3);
/// ns from one frame to the next.
const INTERVAL: f64 = 1e9 / RATE as f64;

/// What one subscriber has got.
#[derive(Default)]
struct Ledger(Mutex<Vec<Entry>>);

/// CLOCK_MONOTONIC, in ns.
#[derive(Clone, Copy)]
struct Entry {
    due: i64,
    out: i64,
}

impl Ledger {
    fn note(&self, due: i64) {
        let out = monotonic_now();
        self.entries().push(Entry { due, out });
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pipeline that plays. It ends with this.
struct Running(gst::Element);

impl Drop for Running {
    fn drop(&mut self) {
        // What could be done about it at the end of a process?
        let _ = self.0.set_state(gst::State::Null);
    }
}

/// What a process has used so far.
struct Usage {
    cpu_us: f64,
    switches: u64,
}

impl Usage {
    fn of(pid: i32) -> Result<Self, Box<dyn Error>> {
        let cpu = clock_gettime(ClockId::pid_cpu_clock_id(Pid::from_raw(pid))?)?;
        let mut switches = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            // One that ends meanwhile does not count.
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            switches += status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
                .and_then(|count| count.trim().parse::<u64>().ok())
                .unwrap_or_default();
        }
        Ok(Self {
            cpu_us: Duration::from(cpu).as_secs_f64() * 1e6,
            switches,
        })
    }
}

pub fn run(case: &Case, served: &Served) -> Result<Outcome, Box<dyn Error>> {
    gst::init()?;
    gstscanout::plugin_register_static()?;
    let mut ledgers = Vec::new();
    let mut pipelines = Vec::new();
    for target in &served.targets {
        for _ in 0..case.subscribers {
            let ledger = Arc::new(Ledger::default());
            // Nothing is allocated while frames come.
            ledger.entries().reserve(8192);
            match case.contender {
                Contender::Plain => subscribe_plainly(target, &ledger)?,
                _ => pipelines.push(subscribe(case, target, served.base, &ledger)?),
            }
            ledgers.push(ledger);
        }
    }
    let all = |what: &dyn Fn(&[Entry]) -> bool| ledgers.iter().all(|it| what(&it.entries()));
    let fault = || pipelines.iter().find_map(fault).unwrap_or_default();

    let warm = |entries: &[Entry]| entries.len() >= case.warm_up as usize;
    if !wait(JOINED, || all(&warm)) {
        return Err(format!("not all subscribers have frames {}", fault()).into());
    }
    let own = std::process::id() as i32;
    let begin = (monotonic_now(), Usage::of(served.pid)?, Usage::of(own)?);
    thread::sleep(Duration::from_secs(case.frames.into()) / RATE);
    let end = (monotonic_now(), Usage::of(served.pid)?, Usage::of(own)?);
    // What is due in the measured time is out, or lost, when something that is due later is out.
    let over = |entries: &[Entry]| entries.last().is_some_and(|last| last.due >= end.0);
    if !wait(LATE, || all(&over)) {
        return Err(format!("no frames any more for some subscribers {}", fault()).into());
    }
    let mut latency_us = Vec::new();
    let mut expected = 0;
    for ledger in &ledgers {
        let entries = ledger.entries();
        expected += due_between(entries[0].due, begin.0, end.0);
        let measured = entries
            .iter()
            .filter(|it| (begin.0..end.0).contains(&it.due));
        latency_us.extend(measured.map(|it| (it.out - it.due) as f64 / 1e3));
    }
    let frames = expected as f64;
    Ok(Outcome {
        host_us: (end.1.cpu_us - begin.1.cpu_us) / frames,
        client_us: (end.2.cpu_us - begin.2.cpu_us) / frames,
        host_switches: end.1.switches.saturating_sub(begin.1.switches) as f64 / frames,
        expected,
        lost: expected.saturating_sub(latency_us.len() as u64),
        latency_us,
    })
}

/// How many frames of a stream, one of which is due at `one`, are due from `begin` to before `end`.
fn due_between(one: i64, begin: i64, end: i64) -> u64 {
    let before = |moment: i64| ((moment - one) as f64 / INTERVAL).ceil() as i64;
    (before(end) - before(begin)).max(0) as u64
}

fn wait(limit: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if ready() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// What went wrong in a pipeline, if anything did.
fn fault(pipeline: &Running) -> Option<String> {
    let message = pipeline.0.bus()?.pop_filtered(&[gst::MessageType::Error])?;
    match message.view() {
        gst::MessageView::Error(error) => Some(format!("({})", error.error())),
        _ => None,
    }
}

/// A pipeline that is subscribed, or the recording's own.
fn subscribe(
    case: &Case,
    target: &Target,
    base: i64,
    ledger: &Arc<Ledger>,
) -> Result<Running, Box<dyn Error>> {
    let id = target.scanout_id;
    let source = match (case.contender, target.address.parse()) {
        (Contender::Source, _) => case.front(),
        (Contender::Gdp, Ok(Address::Tcp { host, port })) => {
            format!("tcpclientsrc host={host} port={port} ! gdpdepay")
        }
        (_, Ok(Address::Tcp { host, port })) => {
            format!("scanoutsrc scanout-id={id} tcp-host={host} tcp-port={port}")
        }
        (_, Ok(Address::Unix(path))) => {
            format!("scanoutsrc scanout-id={id} socket-path={}", path.display())
        }
        (_, address) => return Err(format!("no benchmark opens {address:?}").into()),
    };
    let element = gst::parse::launch(&format!("{source} ! fakesink name=sink sync=false"))?;
    let pipeline = element
        .downcast_ref::<gst::Pipeline>()
        .ok_or("it is a pipeline")?;
    pipeline.use_clock(Some(&gst::SystemClock::obtain()));
    let sink = pipeline.by_name("sink").ok_or("it has a sink")?;
    let (ledger, running) = (ledger.clone(), pipeline.downgrade());
    let own = case.contender == Contender::Source;
    let of_host = case.contender == Contender::Scanoutsrc;
    sink.static_pad("sink")
        .ok_or("a sink has a pad")?
        .add_probe(gst::PadProbeType::BUFFER, move |_, info| {
            let due = info.buffer().and_then(|buffer| {
                if of_host {
                    let meta = buffer.meta::<gst::ReferenceTimestampMeta>()?;
                    return Some(meta.timestamp().nseconds() as i64);
                }
                let base = if own {
                    running.upgrade()?.base_time()?.nseconds() as i64
                } else {
                    base
                };
                // h264parse gives a recording without a container DTS only.
                Some(base + buffer.pts().or(buffer.dts())?.nseconds() as i64)
            });
            if let Some(due) = due {
                ledger.note(due);
            }
            gst::PadProbeReturn::Ok
        });
    element.set_state(gst::State::Playing)?;
    Ok(Running(element))
}

/// A thread that reads message after message into the same memory.
fn subscribe_plainly(target: &Target, ledger: &Arc<Ledger>) -> Result<(), Box<dyn Error>> {
    let mut socket: Box<dyn Read + Send> = match target.address.parse()? {
        Address::Tcp { host, port } => Box::new(TcpStream::connect((host.as_str(), port))?),
        Address::Unix(path) => Box::new(UnixStream::connect(path)?),
        address @ Address::Vsock { .. } => {
            return Err(format!("no benchmark opens {address}").into());
        }
    };
    let ledger = ledger.clone();
    thread::spawn(move || -> std::io::Result<()> {
        let mut message = Vec::new();
        loop {
            let mut head = [0; Head::SIZE];
            socket.read_exact(&mut head)?;
            let size = Head::parse(&head)?.payload;
            message.resize(size.max(message.len()), 0);
            socket.read_exact(&mut message[..size])?;
            // FRAME_RESPONSE begins with the time (docs/protocol.md).
            if let Some(pts) = message.first_chunk() {
                ledger.note(i64::from_le_bytes(*pts));
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_that_are_due_are_counted_from_any_of_them() {
        let second = 1_000_000_000;
        for one in [0, 5 * second, -3 * second + 7] {
            assert_eq!(due_between(one, second, 2 * second), u64::from(RATE));
        }
        assert_eq!(due_between(0, 0, 1), 1);
        assert_eq!(due_between(0, 1, 2), 0);
    }
}
