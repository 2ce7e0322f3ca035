// SPDX-License-Identifier: MIT OR Apache-2.0

//! Bytes to messages, without I/O.
//!
//! Read from the peer into [`Decoder::space`], say how much it was with [`Decoder::advance`], and
//! take messages from [`Decoder::next`] until it has none. Bytes may arrive in any split. Pixels
//! and access units are read straight to where they stay; only what arrives in one read together
//! with the header before them (at most [`STAGE`] bytes) is moved once.
//!
//! No length is believed before it was compared with [`Limits`], and memory grows with the bytes
//! that arrive, not with those announced. After an error the decoder repeats that error.

use std::sync::Arc;

use zerocopy::FromBytes;

use crate::error::DecodeError;
use crate::hello;
use crate::limits::Limits;
use crate::message::{
    Config, EnableScanout, Envelope, ErrorCode, ErrorMessage, FrameRequest, FrameResponse, Message,
    RequestTag, ScanoutResp,
};
use crate::payload::{Filling, Pool};
use crate::wire::{self, Layout};

/// Bytes read ahead of what is understood.
pub const STAGE: usize = 16 * 1024;

/// The decoder; one for each direction of a connection.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    pool: Arc<Pool>,
    stage: Box<[u8; STAGE]>,
    /// `stage[start..end]` was received and is not understood yet.
    start: usize,
    end: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    Header,
    /// The part of the payload whose size the type gives.
    Fixed(wire::Header),
    Pixels(wire::Header, FrameRequest, Filling),
    /// The size in front of a NAL unit.
    NalSize(Nals),
    /// The bytes of a NAL unit; how many are missing.
    Nal(Nals, usize),
    Hello(wire::Header, Filling),
    Skip(wire::Header, usize),
    Failed(DecodeError),
}

#[derive(Debug)]
struct Nals {
    header: wire::Header,
    response: FrameResponse,
    /// NAL units that have not begun.
    left: u32,
    data: Filling,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            pool: Arc::default(),
            stage: Box::new([0; STAGE]),
            start: 0,
            end: 0,
            state: State::Header,
        }
    }

    /// Other limits, for the messages that begin from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Gives the memory of large messages that are over back to the system, now and as their
    /// payloads are dropped, until the next large message begins. For peers that have gone quiet:
    /// a stream of messages would allocate for each of them.
    pub fn trim(&self) {
        self.pool.trim();
    }

    /// Where the next bytes from the peer belong. Never empty, if [`Decoder::next`] returned
    /// `None` before.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            match &mut self.state {
                State::Pixels(_, _, filling) | State::Hello(_, filling)
                    if filling.missing() > 0 =>
                {
                    return filling.space();
                }
                State::Nal(nals, missing) if *missing > 0 => {
                    let space = nals.data.space();
                    let end = space.len().min(*missing);
                    return &mut space[..end];
                }
                _ => (self.start, self.end) = (0, 0),
            }
        } else if self.end == STAGE {
            self.stage.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.stage[self.end..]
    }

    /// Says that `count` bytes from the peer were put at the front of [`Decoder::space`].
    pub fn advance(&mut self, count: usize) {
        if self.start == self.end {
            match &mut self.state {
                State::Pixels(_, _, filling) | State::Hello(_, filling)
                    if filling.missing() > 0 =>
                {
                    filling.advance(count);
                    return;
                }
                State::Nal(nals, missing) if *missing > 0 => {
                    let count = count.min(*missing);
                    nals.data.advance(count);
                    *missing -= count;
                    return;
                }
                _ => {}
            }
        }
        self.end = (self.end + count).min(STAGE);
    }

    /// Whether the next bytes are pixels of a FRAME_REQUEST. To be asked when [`Decoder::next`] has
    /// returned `None`.
    pub fn is_inside_pixels(&self) -> bool {
        matches!(self.state, State::Pixels(..))
    }

    /// The next message, if its bytes are all there.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator's None would mean the end"
    )]
    pub fn next(&mut self) -> Result<Option<Envelope>, DecodeError> {
        let result = self.step();
        if let Err(error) = &result {
            self.state = State::Failed(error.clone());
        }
        result
    }

    /// Whether the stream may end here: between two messages. To be asked when
    /// [`Decoder::next`] has returned `None`.
    pub fn finish(&self) -> Result<(), DecodeError> {
        let staged = self.end - self.start;
        let (header, (field, missing)) = match &self.state {
            State::Header => {
                return match wire::unfinished(wire::Header::FIELDS, staged) {
                    Some((field, missing)) if staged > 0 => Err(DecodeError::Truncated {
                        message: "a header",
                        field,
                        missing: missing as u64,
                    }),
                    _ => Ok(()),
                };
            }
            State::Fixed(header) => (
                header,
                wire::unfinished(wire::fixed_fields(header.msg_type), staged)
                    // What ERROR has beyond its legacy fields.
                    .unwrap_or(("request tag", fixed_size(header).saturating_sub(staged))),
            ),
            State::Pixels(header, _, filling) => (header, ("pixels", filling.missing())),
            State::NalSize(nals) => (&nals.header, ("NAL size", 4_usize.saturating_sub(staged))),
            State::Nal(nals, missing) => (&nals.header, ("NAL bytes", *missing)),
            State::Hello(header, filling) => {
                let received = header.payload_size.get() as usize - filling.missing();
                (
                    header,
                    wire::unfinished(wire::fixed_fields(header.msg_type), received)
                        .unwrap_or(("TLVs", filling.missing())),
                )
            }
            State::Skip(header, missing) => (header, ("payload", *missing)),
            State::Failed(error) => return Err(error.clone()),
        };
        Err(DecodeError::Truncated {
            message: wire::name(header.msg_type),
            field,
            missing: missing as u64,
        })
    }

    fn step(&mut self) -> Result<Option<Envelope>, DecodeError> {
        loop {
            // Taken out so that its parts can move on; put back where more bytes are needed.
            match std::mem::replace(&mut self.state, State::Header) {
                State::Header => {
                    let Some(header) = self.take::<wire::Header>() else {
                        return Ok(None);
                    };
                    self.state = self.begin(header)?;
                }
                State::Fixed(header) => {
                    if self.end - self.start < fixed_size(&header) {
                        self.state = State::Fixed(header);
                        return Ok(None);
                    }
                    if let Some(message) = self.fixed(header)? {
                        return Ok(Some(envelope(header, message)));
                    }
                }
                State::Pixels(header, request, mut filling) => {
                    self.start += filling.append(&self.stage[self.start..self.end], usize::MAX);
                    if filling.missing() > 0 {
                        self.state = State::Pixels(header, request, filling);
                        return Ok(None);
                    }
                    let message = Message::FrameRequest(request, Some(filling.finish()));
                    return Ok(Some(envelope(header, message)));
                }
                State::NalSize(mut nals) => {
                    if nals.left == 0 {
                        return finish_nals(nals).map(Some);
                    }
                    let Some(size) = self.take::<zerocopy::little_endian::U32>() else {
                        self.state = State::NalSize(nals);
                        return Ok(None);
                    };
                    if size.get() as usize > nals.data.missing() {
                        return Err(DecodeError::OverLimit {
                            message: wire::name(nals.header.msg_type),
                            field: "NAL size",
                            value: size.get().into(),
                            limit: nals.data.missing() as u64,
                        });
                    }
                    nals.left -= 1;
                    self.state = State::Nal(nals, size.get() as usize);
                }
                State::Nal(mut nals, missing) => {
                    let stage = &self.stage[self.start..self.end];
                    let count = nals.data.append(stage, missing);
                    self.start += count;
                    let missing = missing - count;
                    if missing > 0 {
                        self.state = State::Nal(nals, missing);
                        return Ok(None);
                    }
                    self.state = State::NalSize(nals);
                }
                State::Hello(header, mut filling) => {
                    self.start += filling.append(&self.stage[self.start..self.end], usize::MAX);
                    if filling.missing() > 0 {
                        self.state = State::Hello(header, filling);
                        return Ok(None);
                    }
                    let hello = hello::parse(wire::name(header.msg_type), &filling.finish())?;
                    let message = match header.msg_type {
                        wire::HELLO => Message::Hello(hello),
                        _ => Message::HelloResp(hello),
                    };
                    return Ok(Some(envelope(header, message)));
                }
                State::Skip(header, missing) => {
                    let count = missing.min(self.end - self.start);
                    self.start += count;
                    if count < missing {
                        self.state = State::Skip(header, missing - count);
                        return Ok(None);
                    }
                    let (msg_type, payload_size) = (header.msg_type, header.payload_size.get());
                    return Ok(Some(envelope(
                        header,
                        Message::Unknown {
                            msg_type,
                            payload_size,
                        },
                    )));
                }
                State::Failed(error) => return Err(error),
            }
        }
    }

    /// What follows a header, if its numbers are acceptable.
    fn begin(&self, header: wire::Header) -> Result<State, DecodeError> {
        if header.magic != wire::MAGIC {
            return Err(DecodeError::BadMagic {
                found: header.magic.get(),
            });
        }
        let fixed = |size: usize| -> Result<State, DecodeError> {
            at_least(&header, size)?;
            at_most(&header, size as u64)?;
            Ok(State::Fixed(header))
        };
        match header.msg_type {
            wire::FRAME_REQUEST => {
                let fixed = size_of::<wire::FrameRequest>();
                at_least(&header, fixed)?;
                let pixels = if header.flags & wire::FLAG_PIXEL_DATA == 0 {
                    0
                } else {
                    u64::from(self.limits.pixels)
                };
                at_most(&header, fixed as u64 + pixels)?;
                Ok(State::Fixed(header))
            }
            wire::FRAME_RESPONSE => {
                let fixed = size_of::<wire::FrameResponse>();
                at_least(&header, fixed)?;
                at_most(
                    &header,
                    fixed as u64
                        + 4 * u64::from(self.limits.nal_count)
                        + u64::from(self.limits.access_unit),
                )?;
                Ok(State::Fixed(header))
            }
            wire::KEYFRAME_REQ | wire::PING | wire::PONG => fixed(0),
            wire::CONFIG_REQ | wire::CONFIG_RESP => fixed(size_of::<wire::Config>()),
            wire::ENABLE_SCANOUT => fixed(size_of::<wire::EnableScanout>()),
            wire::DISABLE_SCANOUT | wire::SUBSCRIBE => fixed(size_of::<wire::ScanoutId>()),
            wire::SCANOUT_RESP => fixed(size_of::<wire::ScanoutResp>()),
            wire::SUBSCRIBE_RESP => fixed(size_of::<wire::SubscribeResp>()),
            wire::ERROR => {
                let long = size_of::<wire::Error>() + size_of::<wire::ErrorTag>();
                if header.payload_size.get() as usize > size_of::<wire::Error>() {
                    fixed(long)
                } else {
                    fixed(size_of::<wire::Error>())
                }
            }
            wire::HELLO | wire::HELLO_RESP => {
                at_least(&header, size_of::<wire::Hello>())?;
                at_most(&header, self.limits.hello.into())?;
                let size = header.payload_size.get() as usize;
                Ok(State::Hello(header, Filling::new(size, &self.pool)))
            }
            _ => {
                at_most(&header, self.limits.skipped.into())?;
                Ok(State::Skip(header, header.payload_size.get() as usize))
            }
        }
    }

    /// Reads the fixed part, which is all there. Either it is the message, or the state moves on.
    fn fixed(&mut self, header: wire::Header) -> Result<Option<Message>, DecodeError> {
        let payload_size = header.payload_size.get() as usize;
        let message = match header.msg_type {
            wire::FRAME_REQUEST => {
                let request = frame_request(&self.expect());
                if header.flags & wire::FLAG_PIXEL_DATA == 0 {
                    Message::FrameRequest(request, None)
                } else {
                    let size = payload_size - size_of::<wire::FrameRequest>();
                    self.state = State::Pixels(header, request, Filling::new(size, &self.pool));
                    return Ok(None);
                }
            }
            wire::FRAME_RESPONSE => {
                let response = frame_response(&self.expect());
                self.state = self.begin_nals(header, response)?;
                return Ok(None);
            }
            wire::KEYFRAME_REQ => Message::KeyframeReq,
            wire::PING => Message::Ping,
            wire::PONG => Message::Pong,
            wire::CONFIG_REQ => Message::ConfigReq(config(&self.expect())),
            wire::CONFIG_RESP => Message::ConfigResp(config(&self.expect())),
            wire::ENABLE_SCANOUT => {
                let wire: wire::EnableScanout = self.expect();
                Message::EnableScanout(EnableScanout {
                    scanout_id: wire.scanout_id.get(),
                    width: wire.width.get(),
                    height: wire.height.get(),
                    refresh_rate: wire.refresh_rate.get(),
                })
            }
            wire::DISABLE_SCANOUT => {
                let wire: wire::ScanoutId = self.expect();
                Message::DisableScanout {
                    scanout_id: wire.scanout_id.get(),
                }
            }
            wire::SUBSCRIBE => {
                let wire: wire::ScanoutId = self.expect();
                Message::Subscribe {
                    scanout_id: wire.scanout_id.get(),
                }
            }
            wire::SCANOUT_RESP => {
                let wire: wire::ScanoutResp = self.expect();
                Message::ScanoutResp(ScanoutResp {
                    scanout_id: wire.scanout_id.get(),
                    success: wire.success != 0,
                    connector: text(&wire.connector),
                })
            }
            wire::SUBSCRIBE_RESP => {
                let wire: wire::SubscribeResp = self.expect();
                Message::SubscribeResp {
                    scanout_id: wire.scanout_id.get(),
                    success: wire.success != 0,
                }
            }
            // The only type left that `begin` sends here.
            _ => {
                let wire: wire::Error = self.expect();
                let tag = (payload_size > size_of::<wire::Error>()).then(|| {
                    let tag: wire::ErrorTag = self.expect();
                    RequestTag {
                        epoch: tag.epoch,
                        request_id: tag.request_id.get(),
                    }
                });
                Message::Error(ErrorMessage {
                    code: ErrorCode(wire.error_code.get()),
                    text: text(&wire.message),
                    tag,
                })
            }
        };
        Ok(Some(message))
    }

    fn begin_nals(
        &self,
        header: wire::Header,
        response: FrameResponse,
    ) -> Result<State, DecodeError> {
        let message = wire::name(header.msg_type);
        let count = response.nal_count;
        if count > self.limits.nal_count {
            return Err(DecodeError::OverLimit {
                message,
                field: "nal_count",
                value: count.into(),
                limit: self.limits.nal_count.into(),
            });
        }
        let list = header.payload_size.get() as usize - size_of::<wire::FrameResponse>();
        let Some(data) = list.checked_sub(4 * count as usize) else {
            return Err(DecodeError::TooSmall {
                message,
                field: "payload_size",
                value: header.payload_size.get().into(),
                needed: size_of::<wire::FrameResponse>() as u64 + 4 * u64::from(count),
            });
        };
        if data > self.limits.access_unit as usize {
            return Err(DecodeError::OverLimit {
                message,
                field: "NAL bytes",
                value: data as u64,
                limit: self.limits.access_unit.into(),
            });
        }
        let data = Filling::new(data, &self.pool);
        Ok(State::NalSize(Nals {
            header,
            response,
            left: count,
            data,
        }))
    }

    /// Takes a `T` off the received bytes, if they suffice.
    fn take<T: FromBytes>(&mut self) -> Option<T> {
        let (value, _) = T::read_from_prefix(&self.stage[self.start..self.end]).ok()?;
        self.start += size_of::<T>();
        Some(value)
    }

    /// Takes a `T` whose bytes are known to be there: `begin` compared the announced size with
    /// the type's, and `step` waited for that many bytes.
    fn expect<T: FromBytes>(&mut self) -> T {
        self.take().expect("the fixed part was received whole")
    }
}

fn envelope(header: wire::Header, message: Message) -> Envelope {
    Envelope {
        session_id: header.session_id.get(),
        message,
    }
}

/// Bytes of the payload that must be there before the message, or its fixed part, can be read.
fn fixed_size(header: &wire::Header) -> usize {
    match header.msg_type {
        wire::FRAME_REQUEST => size_of::<wire::FrameRequest>(),
        wire::FRAME_RESPONSE => size_of::<wire::FrameResponse>(),
        _ => header.payload_size.get() as usize,
    }
}

fn at_least(header: &wire::Header, needed: usize) -> Result<(), DecodeError> {
    if (header.payload_size.get() as usize) < needed {
        return Err(DecodeError::TooSmall {
            message: wire::name(header.msg_type),
            field: "payload_size",
            value: header.payload_size.get().into(),
            needed: needed as u64,
        });
    }
    Ok(())
}

fn at_most(header: &wire::Header, limit: u64) -> Result<(), DecodeError> {
    if u64::from(header.payload_size.get()) > limit {
        return Err(DecodeError::OverLimit {
            message: wire::name(header.msg_type),
            field: "payload_size",
            value: header.payload_size.get().into(),
            limit,
        });
    }
    Ok(())
}

fn finish_nals(nals: Nals) -> Result<Envelope, DecodeError> {
    if nals.data.missing() > 0 {
        return Err(DecodeError::Trailing {
            message: wire::name(nals.header.msg_type),
            field: "the last NAL unit",
            count: nals.data.missing() as u64,
        });
    }
    let message = Message::FrameResponse(nals.response, nals.data.finish());
    Ok(envelope(nals.header, message))
}

fn frame_request(wire: &wire::FrameRequest) -> FrameRequest {
    FrameRequest {
        resource_id: wire.resource_id.get(),
        width: wire.width.get(),
        height: wire.height.get(),
        format: wire.format.get(),
        stride: wire.stride.get(),
        pts: wire.pts.get(),
        duration: wire.duration.get(),
        force_keyframe: wire.force_keyframe != 0,
        tag: RequestTag {
            epoch: wire.epoch,
            request_id: wire.request_id.get(),
        },
    }
}

fn frame_response(wire: &wire::FrameResponse) -> FrameResponse {
    FrameResponse {
        pts: wire.pts.get(),
        dts: wire.dts.get(),
        is_keyframe: wire.is_keyframe != 0,
        tag: RequestTag {
            epoch: wire.epoch,
            request_id: wire.request_id.get(),
        },
        nal_count: wire.nal_count.get(),
    }
}

fn config(wire: &wire::Config) -> Config {
    Config {
        width: wire.width.get(),
        height: wire.height.get(),
        bitrate: wire.bitrate.get(),
        framerate_num: wire.framerate_num.get(),
        framerate_den: wire.framerate_den.get(),
        profile: wire.profile,
        level: wire.level,
        realtime: wire.realtime != 0,
    }
}

/// Text up to the first NUL, made safe to print: a peer must not write to somebody's terminal.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end])
        .chars()
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}
