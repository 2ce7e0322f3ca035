// SPDX-License-Identifier: MIT OR Apache-2.0

//! The hosts that helix-host is compared with. Each says where it serves, and ends with its
//! standard input.

use std::error::Error;
use std::io::{self, IoSlice, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use gst::prelude::*;
use helix_protocol::encode;
use helix_protocol::message::FrameResponse;

use super::case::{Case, Contender, RATE, Served, Target};
use super::film::{self, Unit};
use super::monotonic_now;

pub fn serve(case: &Case) -> Result<(), Box<dyn Error>> {
    gst::init()?;
    let folder = tempfile::tempdir()?;
    let mut pipeline = None;
    let (targets, base) = match case.contender {
        Contender::Plain => (plain(case, folder.path())?, 0),
        Contender::Gdp => {
            let (running, targets) = gdp(case)?;
            let base = running.base_time().ok_or("it plays")?.nseconds() as i64;
            pipeline = Some(running);
            (targets, base)
        }
        Contender::Scanoutsrc | Contender::Source => {
            return Err("this one's host is not in here".into());
        }
    };
    let served = Served {
        pid: std::process::id() as i32,
        targets,
        base,
    };
    println!("{}", serde_json::to_string(&served)?);
    io::copy(&mut io::stdin(), &mut io::sink())?;
    if let Some(pipeline) = pipeline {
        pipeline.set_state(gst::State::Null)?;
    }
    Ok(())
}

/// A thread for each scanout, which begins when all its subscribers are there.
fn plain(case: &Case, folder: &std::path::Path) -> Result<Vec<Target>, Box<dyn Error>> {
    let units: Arc<[Unit]> = film::read(&case.film)?.into();
    let mut targets = Vec::new();
    for scanout_id in 0..case.scanouts {
        let (units, subscribers) = (units.clone(), case.subscribers);
        let address = if case.unix {
            let path = folder.join(scanout_id.to_string());
            let listener = UnixListener::bind(&path)?;
            thread::spawn(move || push(&units, accept(listener.incoming(), subscribers)));
            format!("unix:{}", path.display())
        } else {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let address = format!("tcp:{}", listener.local_addr()?);
            thread::spawn(move || {
                let streams = accept(listener.incoming(), subscribers);
                for stream in &streams {
                    // It fails where the subscriber has gone already, and then nobody waits.
                    let _ = stream.set_nodelay(true);
                }
                push(&units, streams);
            });
            address
        };
        targets.push(Target {
            address,
            scanout_id,
        });
    }
    Ok(targets)
}

fn accept<T>(incoming: impl Iterator<Item = io::Result<T>>, count: u32) -> Vec<T> {
    incoming.flatten().take(count as usize).collect()
}

/// Writes each access unit, in the same message as helix-host's, when it is due.
fn push<T: Write>(units: &[Unit], mut streams: Vec<T>) {
    let (start, base) = (Instant::now(), monotonic_now());
    for (number, unit) in (0..).zip(units) {
        let due = Duration::from_secs(number) / RATE;
        thread::sleep((start + due).saturating_duration_since(Instant::now()));
        let pts = base + due.as_nanos() as i64;
        let response = FrameResponse {
            pts,
            dts: pts,
            is_keyframe: unit.keyframe,
            ..FrameResponse::default()
        };
        let head = encode::frame_response(0, &response, unit.bytes.len() as u32);
        streams.retain_mut(|stream| {
            let mut slices = &mut [IoSlice::new(&head), IoSlice::new(&unit.bytes)][..];
            while !slices.is_empty() {
                match stream.write_vectored(slices) {
                    Ok(sent) => IoSlice::advance_slices(&mut slices, sent),
                    Err(_) => return false,
                }
            }
            true
        });
    }
}

/// A branch for each scanout of a pipeline that plays at once.
fn gdp(case: &Case) -> Result<(gst::Pipeline, Vec<Target>), Box<dyn Error>> {
    let branches: Vec<String> = (0..case.scanouts)
        .map(|number| {
            let front = case.front();
            format!("{front} ! gdppay ! tcpserversink name=sink-{number} host=127.0.0.1 port=0")
        })
        .collect();
    let pipeline = gst::parse::launch(&branches.join(" "))?
        .downcast::<gst::Pipeline>()
        .map_err(|_| "it is a pipeline")?;
    pipeline.use_clock(Some(&gst::SystemClock::obtain()));
    pipeline.set_state(gst::State::Playing)?;
    let (result, ..) = pipeline.state(gst::ClockTime::from_seconds(10));
    result?;
    let targets = (0..case.scanouts)
        .map(|scanout_id| {
            let sink = pipeline.by_name(&format!("sink-{scanout_id}"));
            let port: i32 = sink.ok_or("it is there")?.property("current-port");
            Ok(Target {
                address: format!("tcp:127.0.0.1:{port}"),
                scanout_id,
            })
        })
        .collect::<Result<_, Box<dyn Error>>>()?;
    Ok((pipeline, targets))
}
