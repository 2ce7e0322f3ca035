// SPDX-License-Identifier: MIT OR Apache-2.0

//! Finds the encoder that `--encoder` stands for: an element that exists may still be without its
//! hardware, so it must encode a picture before it is believed.

use std::sync::mpsc;
use std::time::Duration;

use gst_video::{VideoFormat, VideoInfo};

use crate::encoder::{Encoder, Output};
use crate::picture::Picture;
use crate::settings::{EncoderError, EncoderSpec, Keyframes, Tuning};

/// How long an encoder may take for its first picture. Drivers that load firmware need seconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// The encoder that `text` names: `auto`, or an element and its properties.
pub fn encoder(text: &str) -> Result<EncoderSpec, EncoderError> {
    if text != "auto" {
        let spec = EncoderSpec::parse(text)?;
        return match works(&spec) {
            Ok(()) => Ok(spec),
            Err(reason) => Err(EncoderError::Broken {
                name: spec.name().to_string(),
                reason,
            }),
        };
    }
    for spec in EncoderSpec::candidates() {
        match works(&spec) {
            Ok(()) => return Ok(spec),
            Err(reason) => tracing::info!(encoder = %spec.name(), reason, "does not work here"),
        }
    }
    Err(EncoderError::NoneWorks(EncoderSpec::known_names()))
}

/// Encodes one grey picture. In a thread of its own, since a driver may hang.
fn works(spec: &EncoderSpec) -> Result<(), String> {
    let (outcome, outcomes) = mpsc::channel();
    let spec = spec.clone();
    std::thread::Builder::new()
        .name("helix-probe".to_owned())
        .spawn(move || {
            let (output, outputs) = mpsc::channel();
            let result = start(&spec, output).and_then(|encoder| {
                let result = match outputs.recv_timeout(PATIENCE) {
                    Ok(Output::Unit(..)) => Ok(()),
                    Ok(Output::Failed(reason)) => Err(reason),
                    Ok(Output::Skipped(())) | Err(_) => Err("no picture came out".to_owned()),
                };
                // The verdict is in; taking the encoder down may take its time.
                let _ = outcome.send(result.clone());
                drop(encoder);
                result
            });
            let _ = outcome.send(result);
        })
        .map_err(|error| error.to_string())?;
    outcomes
        .recv_timeout(2 * PATIENCE)
        .unwrap_or_else(|_| Err("it hangs".to_owned()))
}

fn start(spec: &EncoderSpec, output: mpsc::Sender<Output<()>>) -> Result<Encoder<()>, String> {
    let tuning = Tuning {
        bitrate: None,
        profile: 77,
        keyframes: Keyframes::OnDemand,
    };
    let mut encoder = Encoder::start(spec, &tuning, move |what| {
        // Nobody may be waiting any more.
        let _ = output.send(what);
    })?;
    let info = VideoInfo::builder(VideoFormat::Nv12, 640, 480)
        .fps((60, 1))
        .build()
        .map_err(|error| error.to_string())?;
    let buffer = gst::Buffer::from_mut_slice(vec![128; info.size()]);
    encoder.push(Picture { buffer, info }, false, 0, ())?;
    Ok(encoder)
}
