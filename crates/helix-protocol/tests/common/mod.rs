// SPDX-License-Identifier: MIT OR Apache-2.0

//! Messages to bytes and back, for the tests and the fuzz targets.

#![allow(dead_code, reason = "each of them uses a part")]

use helix_protocol::message::FrameResponse;
use helix_protocol::{DecodeError, Decoder, Envelope, Limits, Message, encode};

/// The bytes of a message as this crate sends it; `None` for [`Message::Unknown`], whose payload
/// is gone.
pub fn encode(envelope: &Envelope) -> Option<Vec<u8>> {
    let id = envelope.session_id;
    let (head, body) = match &envelope.message {
        Message::FrameRequest(request, pixels) => {
            let pixels = pixels.as_deref().unwrap_or_default();
            let head = encode::frame_request(id, request, pixels.len() as u32);
            (head, pixels.to_vec())
        }
        Message::FrameResponse(response, unit) => {
            let head = encode::frame_response(id, response, unit.len() as u32);
            (head, unit.to_vec())
        }
        Message::KeyframeReq => (encode::keyframe_req(id), vec![]),
        Message::ConfigReq(config) => (encode::config_req(id, config), vec![]),
        Message::ConfigResp(config) => (encode::config_resp(id, config), vec![]),
        Message::Ping => (encode::ping(id), vec![]),
        Message::Pong => (encode::pong(id), vec![]),
        Message::EnableScanout(enable) => (encode::enable_scanout(id, enable), vec![]),
        Message::DisableScanout { scanout_id } => {
            (encode::disable_scanout(id, *scanout_id), vec![])
        }
        Message::ScanoutResp(resp) => (encode::scanout_resp(id, resp), vec![]),
        Message::Subscribe { scanout_id } => (encode::subscribe(*scanout_id), vec![]),
        Message::SubscribeResp {
            scanout_id,
            success,
        } => (encode::subscribe_resp(*scanout_id, *success), vec![]),
        Message::Hello(hello) => encode::hello(id, hello),
        Message::HelloResp(hello) => encode::hello_resp(id, hello),
        Message::Error(error) => (encode::error(id, error), vec![]),
        Message::Unknown { .. } => return None,
    };
    Some([&head[..], &body].concat())
}

/// Everything a message says, for comparison: the type and its fields as text, the bulk bytes.
pub fn content(envelope: &Envelope) -> (String, Vec<u8>) {
    let bulk = match &envelope.message {
        Message::FrameRequest(_, Some(bulk)) | Message::FrameResponse(_, bulk) => bulk.to_vec(),
        // It does not print itself.
        Message::Hello(hello) | Message::HelloResp(hello) => hello
            .auth_token
            .as_ref()
            .map(|token| token.0.clone())
            .unwrap_or_default(),
        _ => vec![],
    };
    (format!("{envelope:?}"), bulk)
}

/// Feeds `bytes` to a decoder in pieces of the given sizes, over and over, as a socket would:
/// the messages, and how the stream ended.
pub fn decode(
    limits: Limits,
    bytes: &[u8],
    pieces: &[usize],
) -> (Vec<Envelope>, Result<(), DecodeError>) {
    let mut decoder = Decoder::new(limits);
    let mut messages = Vec::new();
    let mut pieces = pieces.iter().copied().cycle();
    let mut rest = bytes;
    loop {
        loop {
            match decoder.next() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(
                        decoder.next().as_ref().err(),
                        Some(&error),
                        "an error stays"
                    );
                    return (messages, Err(error));
                }
            }
        }
        if rest.is_empty() {
            return (messages, decoder.finish());
        }
        let space = decoder.space();
        assert!(!space.is_empty(), "the decoder wants bytes and has no room");
        let piece = pieces.next().unwrap_or(usize::MAX).max(1);
        let count = piece.min(rest.len()).min(space.len());
        space[..count].copy_from_slice(&rest[..count]);
        decoder.advance(count);
        rest = &rest[count..];
    }
}

/// A FRAME_RESPONSE in several parts, which nobody but tests sends towards this crate.
pub fn response_parts(id: u16, response: &FrameResponse, nals: &[&[u8]]) -> Vec<u8> {
    let (head, body) = encode::frame_response_parts(id, response, nals);
    [&head[..], &body].concat()
}
