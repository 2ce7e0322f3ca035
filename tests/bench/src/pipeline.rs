// SPDX-License-Identifier: MIT OR Apache-2.0

//! A source, an element and a sink.

use std::error::Error;
use std::sync::Arc;

use gst::prelude::*;
use helix_protocol::Address;

use crate::case::{Case, Contender, Format, Pace};
use crate::meter::{Meter, Outcome};
use crate::plain::Plain;
use crate::source::{BenchSrc, Neighbour, STUCK};

/// The element's outcome, and that of a bare socket which took turns with it, where the case is paced.
pub fn run(case: &Case) -> Result<Vec<Outcome>, Box<dyn Error>> {
    gst::init()?;
    gstvsock::plugin_register_static()?;
    let meter = Arc::new(Meter::new(case));
    let pipeline = gst::Pipeline::new();
    let beside = Arc::new(Meter::new(case));
    let neighbour = match case.pace {
        Pace::Paced => Some(Neighbour {
            plain: Plain::connect(case)?,
            meter: beside.clone(),
        }),
        Pace::Flow | Pace::Single => None,
    };
    let source: gst::Element = BenchSrc::new(case, meter.clone(), neighbour).upcast();
    let sink = gst::ElementFactory::make("fakesink").build()?;
    pipeline.add_many([&source, &sink])?;
    match element(case)? {
        Some(description) => {
            let element = gst::parse::bin_from_description(&description, true)?;
            pipeline.add(&element)?;
            gst::Element::link_many([&source, element.upcast_ref(), &sink])?;
        }
        None => source.link(&sink)?,
    }
    let pad = sink.static_pad("sink").ok_or("a sink has a pad")?;
    let watching = meter.clone();
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, _| {
        watching.leave();
        gst::PadProbeReturn::Ok
    });
    pipeline.set_state(gst::State::Playing)?;
    let bus = pipeline.bus().ok_or("a pipeline has a bus")?;
    let types = [gst::MessageType::Eos, gst::MessageType::Error];
    let message = bus.timed_pop_filtered(gst::ClockTime::try_from(2 * STUCK)?, &types);
    pipeline.set_state(gst::State::Null)?;
    let message = message.ok_or("the pipeline is stuck")?;
    if let gst::MessageView::Error(error) = message.view() {
        return Err(format!("{case:?}: {} {:?}", error.error(), error.debug()).into());
    }
    let mut outcomes = vec![meter.finish()?];
    if case.pace == Pace::Paced {
        outcomes.push(beside.finish()?);
    }
    Ok(outcomes)
}

/// What is between the source and the sink, in gst-launch's words.
fn element(case: &Case) -> Result<Option<String>, Box<dyn Error>> {
    Ok(match case.contender {
        Contender::Fakesink | Contender::Plain | Contender::Rows => None,
        Contender::Vsockenc => Some(match case.address.parse()? {
            Address::Tcp { host, port } => format!("vsockenc tcp-host={host} tcp-port={port}"),
            Address::Unix(path) => format!("vsockenc socket-path={}", path.display()),
            address @ Address::Vsock { .. } => {
                return Err(format!("no benchmark opens {address}").into());
            }
        }),
        Contender::X264enc => {
            let encoder = "x264enc tune=zerolatency speed-preset=ultrafast";
            Some(match case.picture.format {
                Format::Bgra => format!("videoconvert ! {encoder}"),
                Format::Nv12 => encoder.to_owned(),
            })
        }
    })
}
