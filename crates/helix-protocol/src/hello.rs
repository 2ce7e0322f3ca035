// SPDX-License-Identifier: MIT OR Apache-2.0

//! What HELLO and HELLO_RESP hold beyond other messages: a fixed part that may grow, and TLVs.

use zerocopy::{FromBytes, IntoBytes};

use crate::decode::text;
use crate::error::DecodeError;
use crate::message::{AuthToken, Capabilities, Hello};
use crate::wire;

/// The TLVs of a HELLO as bytes.
pub fn tlvs(hello: &Hello) -> Vec<u8> {
    let tlvs = [
        (wire::TLV_NAME, hello.name.as_deref().map(str::as_bytes)),
        (
            wire::TLV_ENCODER,
            hello.encoder.as_deref().map(str::as_bytes),
        ),
        (
            wire::TLV_AUTH_TOKEN,
            hello.auth_token.as_ref().map(|token| token.0.as_slice()),
        ),
        (wire::TLV_CLOCK_ID, hello.clock_id.as_deref()),
    ];
    let mut body = Vec::new();
    for (kind, value) in tlvs {
        // A value too long for its length field is left out rather than cut.
        let Some((value, length)) =
            value.and_then(|value| Some((value, u16::try_from(value.len()).ok()?)))
        else {
            continue;
        };
        body.extend_from_slice(
            wire::Tlv {
                kind: kind.into(),
                length: length.into(),
            }
            .as_bytes(),
        );
        body.extend_from_slice(value);
    }
    body
}

/// The payload of a HELLO, which holds at least its fixed part, as fields.
pub fn parse(message: &'static str, payload: &[u8]) -> Result<Hello, DecodeError> {
    let (wire, _) = wire::Hello::read_from_prefix(payload).expect("begin checked the size");
    let fixed = usize::from(wire.fixed_size.get());
    if fixed < size_of::<wire::Hello>() {
        return Err(DecodeError::TooSmall {
            message,
            field: "fixed_size",
            value: fixed as u64,
            needed: size_of::<wire::Hello>() as u64,
        });
    }
    let over = |field, value: usize, limit: usize| DecodeError::OverLimit {
        message,
        field,
        value: value as u64,
        limit: limit as u64,
    };
    let mut rest = payload
        .get(fixed..)
        .ok_or_else(|| over("fixed_size", fixed, payload.len()))?;
    let mut hello = Hello {
        version: wire.version.get(),
        max_in_flight: wire.max_in_flight.get(),
        capabilities: Capabilities(wire.capabilities.get()),
        codecs: wire.codecs.get(),
        max_message: wire.max_message.get(),
        max_width: wire.max_width.get(),
        max_height: wire.max_height.get(),
        ..Hello::default()
    };
    while !rest.is_empty() {
        let Ok((tlv, after)) = wire::Tlv::read_from_prefix(rest) else {
            return Err(DecodeError::Trailing {
                message,
                field: "the last TLV",
                count: rest.len() as u64,
            });
        };
        let length = usize::from(tlv.length.get());
        let Some((value, after)) = after.split_at_checked(length) else {
            return Err(over("TLV length", length, after.len()));
        };
        match tlv.kind.get() {
            wire::TLV_NAME => hello.name = Some(text(value)),
            wire::TLV_ENCODER => hello.encoder = Some(text(value)),
            wire::TLV_AUTH_TOKEN => hello.auth_token = Some(AuthToken(value.to_vec())),
            wire::TLV_CLOCK_ID => hello.clock_id = Some(value.to_vec()),
            _ => {}
        }
        rest = after;
    }
    Ok(hello)
}
