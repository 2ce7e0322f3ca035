// SPDX-License-Identifier: MIT OR Apache-2.0

//! Messages to bytes.
//!
//! Each function returns the [`Head`] of a message: its header and all of its payload that is
//! small. Where pixels, an access unit or TLVs follow, the function takes their size, and the
//! caller sends the bytes themselves right after the head, from where they lie
//! ([`crate::connection::Connection::send`] does both in one vectored write).

use std::fmt;
use std::ops::Deref;

use zerocopy::IntoBytes;

use crate::hello;
use crate::message::{
    Config, EnableScanout, ErrorMessage, FrameRequest, FrameResponse, Hello, RequestTag,
    ScanoutResp,
};
use crate::wire;

/// ERROR with a tag is the longest.
const HEAD_SIZE: usize = wire::HEADER_SIZE + size_of::<wire::Error>() + size_of::<wire::ErrorTag>();

/// The small part at the front of a message, ready to send. Lives on the stack.
#[derive(Clone)]
pub struct Head {
    bytes: [u8; HEAD_SIZE],
    len: usize,
}

impl Head {
    /// A header that announces `parts` and `body` bytes after them, and those parts.
    fn new(msg_type: u8, flags: u8, session_id: u16, parts: &[&[u8]], body: u32) -> Self {
        let fixed: usize = parts.iter().map(|part| part.len()).sum();
        let header = wire::Header {
            magic: wire::MAGIC.into(),
            msg_type,
            flags,
            session_id: session_id.into(),
            payload_size: (fixed as u32).saturating_add(body).into(),
        };
        let mut head = Self {
            bytes: [0; HEAD_SIZE],
            len: 0,
        };
        for part in std::iter::once(&header.as_bytes()).chain(parts) {
            head.bytes[head.len..head.len + part.len()].copy_from_slice(part);
            head.len += part.len();
        }
        head
    }
}

impl Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Head({}, {} bytes)", wire::name(self.bytes[4]), self.len)
    }
}

/// FRAME_REQUEST. `pixels` is the number of bytes that follow the head; 0 names a resource id.
pub fn frame_request(session_id: u16, request: &FrameRequest, pixels: u32) -> Head {
    let wire = wire::FrameRequest {
        resource_id: request.resource_id.into(),
        width: request.width.into(),
        height: request.height.into(),
        format: request.format.into(),
        stride: request.stride.into(),
        pts: request.pts.into(),
        duration: request.duration.into(),
        force_keyframe: request.force_keyframe.into(),
        epoch: request.tag.epoch,
        request_id: request.tag.request_id.into(),
        reserved: [0; 4],
    };
    let flags = if pixels > 0 { wire::FLAG_PIXEL_DATA } else { 0 };
    Head::new(
        wire::FRAME_REQUEST,
        flags,
        session_id,
        &[wire.as_bytes()],
        pixels,
    )
}

/// FRAME_RESPONSE with one part, as deployed clients expect it: `size` bytes of Annex B follow
/// the head. `response.nal_count` is not looked at.
pub fn frame_response(session_id: u16, response: &FrameResponse, size: u32) -> Head {
    let wire = wire_response(response, 1);
    let size_field = zerocopy::little_endian::U32::new(size);
    let parts = [wire.as_bytes(), size_field.as_bytes()];
    Head::new(wire::FRAME_RESPONSE, 0, session_id, &parts, size)
}

/// FRAME_RESPONSE with a part for each NAL unit, and the bytes that follow the head. For peers
/// known to take it; the units are copied.
pub fn frame_response_parts(
    session_id: u16,
    response: &FrameResponse,
    nals: &[&[u8]],
) -> (Head, Vec<u8>) {
    let mut body = Vec::with_capacity(nals.iter().map(|nal| nal.len() + 4).sum());
    for nal in nals {
        body.extend_from_slice(&(nal.len() as u32).to_le_bytes());
        body.extend_from_slice(nal);
    }
    let wire = wire_response(response, nals.len() as u32);
    let parts = [wire.as_bytes()];
    (
        Head::new(
            wire::FRAME_RESPONSE,
            0,
            session_id,
            &parts,
            body.len() as u32,
        ),
        body,
    )
}

fn wire_response(response: &FrameResponse, nal_count: u32) -> wire::FrameResponse {
    wire::FrameResponse {
        pts: response.pts.into(),
        dts: response.dts.into(),
        is_keyframe: response.is_keyframe.into(),
        epoch: response.tag.epoch,
        request_id: response.tag.request_id.into(),
        nal_count: nal_count.into(),
    }
}

/// KEYFRAME_REQ.
pub fn keyframe_req(session_id: u16) -> Head {
    Head::new(wire::KEYFRAME_REQ, 0, session_id, &[], 0)
}

/// CONFIG_REQ.
pub fn config_req(session_id: u16, config: &Config) -> Head {
    Head::new(
        wire::CONFIG_REQ,
        0,
        session_id,
        &[wire_config(config).as_bytes()],
        0,
    )
}

/// CONFIG_RESP.
pub fn config_resp(session_id: u16, config: &Config) -> Head {
    Head::new(
        wire::CONFIG_RESP,
        0,
        session_id,
        &[wire_config(config).as_bytes()],
        0,
    )
}

fn wire_config(config: &Config) -> wire::Config {
    wire::Config {
        width: config.width.into(),
        height: config.height.into(),
        bitrate: config.bitrate.into(),
        framerate_num: config.framerate_num.into(),
        framerate_den: config.framerate_den.into(),
        profile: config.profile,
        level: config.level,
        realtime: config.realtime.into(),
        reserved: [0; 5],
    }
}

/// PING.
pub fn ping(session_id: u16) -> Head {
    Head::new(wire::PING, 0, session_id, &[], 0)
}

/// PONG; `session_id` is the PING's.
pub fn pong(session_id: u16) -> Head {
    Head::new(wire::PONG, 0, session_id, &[], 0)
}

/// ENABLE_SCANOUT.
pub fn enable_scanout(session_id: u16, enable: &EnableScanout) -> Head {
    let wire = wire::EnableScanout {
        scanout_id: enable.scanout_id.into(),
        width: enable.width.into(),
        height: enable.height.into(),
        refresh_rate: enable.refresh_rate.into(),
    };
    Head::new(wire::ENABLE_SCANOUT, 0, session_id, &[wire.as_bytes()], 0)
}

/// DISABLE_SCANOUT.
pub fn disable_scanout(session_id: u16, scanout_id: u32) -> Head {
    let wire = wire::ScanoutId {
        scanout_id: scanout_id.into(),
    };
    Head::new(wire::DISABLE_SCANOUT, 0, session_id, &[wire.as_bytes()], 0)
}

/// SCANOUT_RESP. A connector name over 63 bytes is cut.
pub fn scanout_resp(session_id: u16, resp: &ScanoutResp) -> Head {
    let wire = wire::ScanoutResp {
        scanout_id: resp.scanout_id.into(),
        success: u32::from(resp.success).into(),
        connector: padded(&resp.connector),
    };
    Head::new(wire::SCANOUT_RESP, 0, session_id, &[wire.as_bytes()], 0)
}

/// SUBSCRIBE; the header's session id carries the scanout id too.
pub fn subscribe(scanout_id: u32) -> Head {
    let wire = wire::ScanoutId {
        scanout_id: scanout_id.into(),
    };
    Head::new(wire::SUBSCRIBE, 0, scanout_id as u16, &[wire.as_bytes()], 0)
}

/// SUBSCRIBE_RESP; the header's session id carries the scanout id too.
pub fn subscribe_resp(scanout_id: u32, success: bool) -> Head {
    let wire = wire::SubscribeResp {
        scanout_id: scanout_id.into(),
        success: u32::from(success).into(),
    };
    Head::new(
        wire::SUBSCRIBE_RESP,
        0,
        scanout_id as u16,
        &[wire.as_bytes()],
        0,
    )
}

/// ERROR. A text over 255 bytes is cut.
pub fn error(session_id: u16, error: &ErrorMessage) -> Head {
    let wire = wire::Error {
        error_code: error.code.0.into(),
        message: padded(&error.text),
    };
    let tag = error
        .tag
        .map(|RequestTag { epoch, request_id }| wire::ErrorTag {
            epoch,
            reserved: 0,
            request_id: request_id.into(),
        });
    let tag = tag.as_ref().map_or(&[][..], IntoBytes::as_bytes);
    Head::new(wire::ERROR, 0, session_id, &[wire.as_bytes(), tag], 0)
}

/// HELLO, and the TLVs that follow the head.
pub fn hello(session_id: u16, hello: &Hello) -> (Head, Vec<u8>) {
    hello_as(wire::HELLO, session_id, hello)
}

/// HELLO_RESP, and the TLVs that follow the head.
pub fn hello_resp(session_id: u16, hello: &Hello) -> (Head, Vec<u8>) {
    hello_as(wire::HELLO_RESP, session_id, hello)
}

fn hello_as(msg_type: u8, session_id: u16, hello: &Hello) -> (Head, Vec<u8>) {
    let wire = wire::Hello {
        version: hello.version.into(),
        fixed_size: (size_of::<wire::Hello>() as u16).into(),
        max_in_flight: hello.max_in_flight.into(),
        reserved_0: 0.into(),
        capabilities: hello.capabilities.0.into(),
        codecs: hello.codecs.into(),
        max_message: hello.max_message.into(),
        max_width: hello.max_width.into(),
        max_height: hello.max_height.into(),
        reserved_1: 0.into(),
    };
    let body = hello::tlvs(hello);
    (
        Head::new(
            msg_type,
            0,
            session_id,
            &[wire.as_bytes()],
            body.len() as u32,
        ),
        body,
    )
}

/// `text` in a NUL-terminated field, cut at a character where it is too long.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let end = text.floor_char_boundary(N - 1);
    bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
    bytes
}
