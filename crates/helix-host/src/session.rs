// SPDX-License-Identifier: MIT OR Apache-2.0

//! What one client has asked its encoder for, and the answers in the order of the questions.
//!
//! Deployed clients match replies to requests by order alone (docs/protocol.md, quirk 3), so an
//! error waits behind the frames that were asked for before it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use helix_protocol::Connection;
use helix_protocol::connection::Body;
use helix_protocol::encode;
use helix_protocol::message::{
    Config, ErrorCode, ErrorMessage, FrameRequest, FrameResponse, RequestTag,
};
use helix_protocol::wait::Waker;

use crate::access_unit::AccessUnit;
use crate::encoder::{Encoder, Output};
use crate::greeting::{Refusal, Terms};
use crate::layout::Layout;
use crate::monitor::figures::Encoded;
use crate::picture::{MAX_SIDE, Picture};
use crate::settings::{EncoderSpec, Keyframes, Tuning};

/// After this long without a word an encoder is taken to hang.
const PATIENCE: Duration = Duration::from_secs(10);
/// Encoders made one after the other without a single picture between them.
const FAILURES: u32 = 3;
/// Rest after that many failures.
const REST: Duration = Duration::from_secs(1);

/// The lowest and the highest frame rate that an encoder is told: a picture a minute, and more than
/// any screen has. They matter to its rate control only.
const FRAMERATES: [(i32, i32); 2] = [(1, 60), (1000, 1)];

/// One client's encoder.
pub struct Session {
    spec: Arc<EncoderSpec>,
    figures: Arc<Encoded>,
    terms: Terms,
    tuning: Tuning,
    /// H.264 `level_idc` of the last keyframe; 0 before the first.
    level: u8,
    framerate: gst::Fraction,
    encoder: Option<Running>,
    /// Former encoders that still have frames to finish.
    retiring: Vec<Running>,
    outputs: Arc<Outputs>,
    next_generation: u64,
    replies: VecDeque<Reply>,
    next_number: u64,
    keyframe_wanted: bool,
    failures: u32,
    rest_until: Option<Instant>,
}

/// An encoder, and how many there were before it: what a former one says is not taken for the
/// present one's.
struct Running {
    generation: u64,
    encoder: Encoder<u64>,
}

/// An open request, or its answer that waits for those before it.
enum Reply {
    Encoding {
        number: u64,
        generation: u64,
        session_id: u16,
        request: FrameRequest,
        bytes: usize,
    },
    Encoded {
        session_id: u16,
        request: FrameRequest,
        unit: AccessUnit,
    },
    Refused {
        session_id: u16,
        tag: RequestTag,
        code: ErrorCode,
        text: String,
    },
}

/// From the encoder's thread to the client's.
struct Outputs {
    queue: Mutex<VecDeque<(u64, Output<u64>)>>,
    waker: Waker,
}

impl Session {
    /// A session without an encoder; the first frame makes one. `waker` wakes the client's thread
    /// when there is something to [`Session::collect`].
    pub fn new(spec: Arc<EncoderSpec>, figures: Arc<Encoded>, waker: Waker) -> Self {
        Self {
            spec,
            figures,
            terms: Terms::default(),
            level: 0,
            tuning: Tuning {
                bitrate: None,
                profile: 77,
                keyframes: Keyframes::OnDemand,
            },
            framerate: gst::Fraction::new(60, 1),
            encoder: None,
            retiring: Vec::new(),
            outputs: Arc::new(Outputs {
                queue: Mutex::default(),
                waker,
            }),
            next_generation: 0,
            replies: VecDeque::new(),
            next_number: 0,
            keyframe_wanted: false,
            failures: 0,
            rest_until: None,
        }
    }

    /// HELLO: replies are under these terms from now on.
    pub fn agree(&mut self, terms: Terms) {
        self.terms = terms;
    }

    /// Requests without an answer.
    pub fn open(&self) -> usize {
        self.replies.len()
    }

    /// Bytes of the pixels that the encoder holds, and of the pictures that wait for their turn.
    pub fn bytes(&self) -> usize {
        self.replies
            .iter()
            .map(|reply| match reply {
                Reply::Encoding { bytes, .. } => *bytes,
                Reply::Encoded { unit, .. } => unit.size(),
                Reply::Refused { .. } => 0,
            })
            .sum()
    }

    /// When to call [`Session::collect`] even if nobody woke the thread.
    pub fn deadline(&self) -> Option<Instant> {
        self.encoder
            .iter()
            .chain(&self.retiring)
            .filter_map(|running| running.encoder.busy_since())
            .min()
            .map(|since| since + PATIENCE)
    }

    /// CONFIG_REQ: takes effect with the next frame.
    pub fn configure(&mut self, config: &Config) {
        if config.bitrate > 0 && self.tuning.bitrate != Some(config.bitrate) {
            self.tuning.bitrate = Some(config.bitrate);
            if let Some(running) = &self.encoder
                && !running.encoder.set_bitrate(config.bitrate)
            {
                self.retire();
            }
        }
        self.framerate = framerate(config);
        if config.profile != 0 && config.profile != self.tuning.profile {
            let changes = self.spec.profile_caps(config.profile)
                != self.spec.profile_caps(self.tuning.profile);
            self.tuning.profile = config.profile;
            if changes {
                self.retire();
            }
        }
    }

    /// What is in force after a CONFIG_REQ, for CONFIG_RESP. Sizes come back as asked for, as far
    /// as this host goes: each picture brings its own.
    pub fn in_force(&self, asked: &Config) -> Config {
        Config {
            width: asked.width.min(MAX_SIDE),
            height: asked.height.min(MAX_SIDE),
            bitrate: match &self.encoder {
                Some(running) => running.encoder.bitrate(),
                None => self.spec.bitrate_with(&self.tuning),
            },
            framerate_num: self.framerate.numer().unsigned_abs(),
            framerate_den: self.framerate.denom().unsigned_abs(),
            profile: self.spec.profile_idc(self.tuning.profile),
            level: self.level,
            realtime: true,
        }
    }

    /// KEYFRAME_REQ: the next frame is one.
    pub fn want_keyframe(&mut self) {
        self.keyframe_wanted = true;
    }

    /// FRAME_REQUEST. `pixels` gives the memory, once the request's fields are found to be right.
    pub fn encode(
        &mut self,
        session_id: u16,
        request: &FrameRequest,
        pixels: impl FnOnce(&Layout) -> Result<gst::Buffer, Refusal>,
    ) {
        let invalid = |text| (ErrorCode::INVALID_MESSAGE, text);
        let result = Layout::of(request).map_err(invalid).and_then(|layout| {
            let buffer = pixels(&layout)?;
            let bytes = buffer.size();
            let picture = Picture::new(&layout, buffer, self.framerate).map_err(invalid)?;
            self.push(session_id, request, picture, bytes)
                .map_err(|text| (ErrorCode::ENCODE_FAILED, text))
        });
        if let Err((code, text)) = result {
            self.refuse(session_id, request.tag, code, text);
        }
    }

    /// Answers a request with an ERROR, after all requests before it.
    pub fn refuse(&mut self, session_id: u16, tag: RequestTag, code: ErrorCode, text: String) {
        tracing::debug!(code = code.0, text, "request refused");
        self.replies.push_back(Reply::Refused {
            session_id,
            tag,
            code,
            text,
        });
    }

    /// Takes what the encoder has done and queues the answers whose turn it is.
    pub fn collect(&mut self, connection: &mut Connection<AccessUnit>) {
        let outputs = std::mem::take(
            &mut *self
                .outputs
                .queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for (generation, output) in outputs {
            match output {
                Output::Unit(number, unit) => self.encoded(number, unit),
                Output::Skipped(number) => {
                    self.fail_one(number, "the encoder skipped this frame");
                }
                Output::Failed(reason) => {
                    if let Some(running) = self.take(generation) {
                        self.fail(&running, &reason);
                    }
                }
            }
        }
        self.retiring
            .retain(|running| running.encoder.in_flight() > 0);
        if let Some(running) = self.hanging() {
            self.fail(&running, "it hangs");
        }
        let ready = self
            .replies
            .iter()
            .take_while(|reply| !matches!(reply, Reply::Encoding { .. }))
            .count();
        let terms = self.terms;
        let refuse = |session_id, tag, code, text| {
            let tag = terms.tag(tag);
            encode::error(session_id, &ErrorMessage { code, text, tag })
        };
        for reply in self.replies.drain(..ready) {
            match reply {
                Reply::Encoded {
                    session_id,
                    request,
                    unit,
                } => {
                    let response = FrameResponse {
                        pts: request.pts,
                        // Nothing is reordered.
                        dts: request.pts,
                        is_keyframe: unit.is_keyframe(),
                        tag: terms.tag(request.tag).unwrap_or_default(),
                        nal_count: 1,
                    };
                    let head = encode::frame_response(session_id, &response, unit.size() as u32);
                    if let Err(text) = terms.check_size(&head, &unit) {
                        // The pictures after it refer to it.
                        self.keyframe_wanted = true;
                        let code = ErrorCode::ENCODE_FAILED;
                        connection.send(refuse(session_id, request.tag, code, text));
                    } else {
                        connection.send_with(head, unit);
                    }
                }
                Reply::Refused {
                    session_id,
                    tag,
                    code,
                    text,
                } => connection.send(refuse(session_id, tag, code, text)),
                Reply::Encoding { .. } => {}
            }
        }
    }

    fn push(
        &mut self,
        session_id: u16,
        request: &FrameRequest,
        picture: Picture,
        bytes: usize,
    ) -> Result<(), String> {
        let number = self.next_number;
        let keyframe = request.force_keyframe || self.keyframe_wanted;
        let running = self.running()?;
        let generation = running.generation;
        if let Err(reason) = running.encoder.push(picture, keyframe, request.pts, number) {
            // If it was the picture's fault, a new encoder costs a keyframe and no more.
            self.retire();
            return Err(reason);
        }
        self.next_number += 1;
        self.keyframe_wanted = false;
        self.replies.push_back(Reply::Encoding {
            number,
            generation,
            session_id,
            request: *request,
            bytes,
        });
        Ok(())
    }

    /// The encoder; a new one if there is none.
    fn running(&mut self) -> Result<&mut Running, String> {
        let running = match self.encoder.take() {
            Some(running) => running,
            None => self.start()?,
        };
        Ok(self.encoder.insert(running))
    }

    fn start(&mut self) -> Result<Running, String> {
        if self.failures >= FAILURES {
            let now = Instant::now();
            if now < *self.rest_until.get_or_insert(now + REST) {
                return Err(format!(
                    "{} failed {FAILURES} times in a row; the next attempt is a second away",
                    self.spec.name()
                ));
            }
            self.rest_until = None;
        }
        let generation = self.next_generation;
        self.next_generation += 1;
        let outputs = self.outputs.clone();
        let encoder = Encoder::start(&self.spec, &self.tuning, move |output| {
            outputs
                .queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push_back((generation, output));
            outputs.waker.wake();
        })
        .inspect_err(|_| self.failures += 1)?;
        tracing::debug!(encoder = %self.spec.name(), "encoder started");
        Ok(Running {
            generation,
            encoder,
        })
    }

    /// Has the next frame start a new encoder; the old one finishes what it has.
    fn retire(&mut self) {
        self.retiring.extend(self.encoder.take());
    }

    /// Takes out the encoder of a generation.
    fn take(&mut self, generation: u64) -> Option<Running> {
        let wanted = |running: &mut Running| running.generation == generation;
        self.encoder.take_if(wanted).or_else(|| {
            let index = self
                .retiring
                .iter()
                .position(|running| running.generation == generation)?;
            Some(self.retiring.swap_remove(index))
        })
    }

    /// Takes out an encoder that has not said anything for too long.
    fn hanging(&mut self) -> Option<Running> {
        let generation = self
            .encoder
            .iter()
            .chain(&self.retiring)
            .find(|running| {
                running
                    .encoder
                    .busy_since()
                    .is_some_and(|since| since.elapsed() >= PATIENCE)
            })?
            .generation;
        self.take(generation)
    }

    fn encoded(&mut self, number: u64, unit: AccessUnit) {
        self.failures = 0;
        self.figures.add(unit.size());
        if unit.is_keyframe()
            && let Some(level) = unit.level()
        {
            self.level = level;
        }
        if let Some(reply) = self.find(number)
            && let Reply::Encoding {
                session_id,
                request,
                ..
            } = *reply
        {
            *reply = Reply::Encoded {
                session_id,
                request,
                unit,
            };
        }
    }

    fn fail_one(&mut self, number: u64, text: &str) {
        self.figures.add_error();
        if let Some(reply) = self.find(number)
            && let Reply::Encoding {
                session_id,
                request,
                ..
            } = *reply
        {
            *reply = Reply::Refused {
                session_id,
                tag: request.tag,
                code: ErrorCode::ENCODE_FAILED,
                text: text.to_owned(),
            };
        }
    }

    /// Answers everything that a broken encoder leaves undone.
    fn fail(&mut self, running: &Running, reason: &str) {
        tracing::warn!(encoder = %self.spec.name(), reason, "encoding failed");
        self.failures += 1;
        for reply in &mut self.replies {
            if let Reply::Encoding {
                session_id,
                generation,
                request,
                ..
            } = *reply
                && generation == running.generation
            {
                self.figures.add_error();
                *reply = Reply::Refused {
                    session_id,
                    tag: request.tag,
                    code: ErrorCode::ENCODE_FAILED,
                    text: format!("{}: {reason}", self.spec.name()),
                };
            }
        }
    }

    fn find(&mut self, wanted: u64) -> Option<&mut Reply> {
        self.replies
            .iter_mut()
            .find(|reply| matches!(reply, Reply::Encoding { number, .. } if *number == wanted))
    }
}

/// The frame rate of a CONFIG_REQ: 60 where it has none, the nearest of [`FRAMERATES`] where no
/// screen has such a one.
fn framerate(config: &Config) -> gst::Fraction {
    let (mut num, mut den) = (config.framerate_num, config.framerate_den);
    if num == 0 || den == 0 {
        return gst::Fraction::new(60, 1);
    }
    // GStreamer's fractions have signs. What the last bit is worth is less than any clock's error.
    if num.max(den) > i32::MAX as u32 {
        (num, den) = (num.div_ceil(2), den.div_ceil(2));
    }
    let signed = |part: u32| i32::try_from(part).unwrap_or(i32::MAX);
    let [least, most] = FRAMERATES.map(|(num, den)| gst::Fraction::new(num, den));
    gst::Fraction::new(signed(num), signed(den)).clamp(least, most)
}
