// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is no message is refused, with an error that names message, field and limit.

mod common;

use common::{decode, encode, response_parts};
use helix_protocol::message::{
    AuthToken, Config, EnableScanout, ErrorCode, ErrorMessage, FrameRequest, FrameResponse, Hello,
    RequestTag, ScanoutResp,
};
use helix_protocol::{DecodeError, Envelope, Limits, Message};

/// Name and size of a field.
type Field = (&'static str, usize);

const HEADER: [Field; 5] = [
    ("magic", 4),
    ("msg_type", 1),
    ("flags", 1),
    ("session_id", 2),
    ("payload_size", 4),
];

const CONFIG: [Field; 9] = [
    ("width", 4),
    ("height", 4),
    ("bitrate", 4),
    ("framerate_num", 4),
    ("framerate_den", 4),
    ("profile", 1),
    ("level", 1),
    ("realtime", 1),
    ("reserved", 5),
];

const FRAME_REQUEST: [Field; 11] = [
    ("resource_id", 4),
    ("width", 4),
    ("height", 4),
    ("format", 4),
    ("stride", 4),
    ("pts", 8),
    ("duration", 8),
    ("force_keyframe", 1),
    ("epoch", 1),
    ("request_id", 2),
    ("reserved", 4),
];

const FRAME_RESPONSE: [Field; 6] = [
    ("pts", 8),
    ("dts", 8),
    ("is_keyframe", 1),
    ("epoch", 1),
    ("request_id", 2),
    ("nal_count", 4),
];

const HELLO: [Field; 10] = [
    ("version", 2),
    ("fixed_size", 2),
    ("max_in_flight", 2),
    ("reserved_0", 2),
    ("capabilities", 8),
    ("codecs", 4),
    ("max_message", 4),
    ("max_width", 2),
    ("max_height", 2),
    ("reserved_1", 4),
];

fn bytes(message: Message) -> Vec<u8> {
    encode(&Envelope {
        session_id: 1,
        message,
    })
    .unwrap()
}

fn hello() -> Hello {
    Hello {
        version: 1,
        name: Some("somebody".to_owned()),
        auth_token: Some(AuthToken(b"secret".to_vec())),
        ..Hello::default()
    }
}

fn error(tag: Option<RequestTag>) -> Message {
    Message::Error(ErrorMessage {
        code: ErrorCode::ENCODE_FAILED,
        text: "no".to_owned(),
        tag,
    })
}

/// One message of each type: its name, its bytes, and the fields of its payload in order.
fn samples() -> Vec<(&'static str, Vec<u8>, Vec<Field>)> {
    let with = |fields: &[Field], more: &[Field]| [fields, more].concat();
    let scanout = [("scanout_id", 4)];
    vec![
        (
            "FRAME_REQUEST",
            bytes(Message::FrameRequest(FrameRequest::default(), None)),
            FRAME_REQUEST.to_vec(),
        ),
        (
            "FRAME_REQUEST",
            bytes(Message::FrameRequest(
                FrameRequest::default(),
                Some(vec![7; 100].into()),
            )),
            with(&FRAME_REQUEST, &[("pixels", 100)]),
        ),
        (
            "FRAME_RESPONSE",
            response_parts(1, &FrameResponse::default(), &[&[1; 30], &[2], &[3; 9]]),
            with(
                &FRAME_RESPONSE,
                &[
                    ("NAL size", 4),
                    ("NAL bytes", 30),
                    ("NAL size", 4),
                    ("NAL bytes", 1),
                    ("NAL size", 4),
                    ("NAL bytes", 9),
                ],
            ),
        ),
        ("KEYFRAME_REQ", bytes(Message::KeyframeReq), vec![]),
        (
            "CONFIG_REQ",
            bytes(Message::ConfigReq(Config::default())),
            CONFIG.to_vec(),
        ),
        (
            "CONFIG_RESP",
            bytes(Message::ConfigResp(Config::default())),
            CONFIG.to_vec(),
        ),
        ("PING", bytes(Message::Ping), vec![]),
        ("PONG", bytes(Message::Pong), vec![]),
        (
            "ENABLE_SCANOUT",
            bytes(Message::EnableScanout(EnableScanout::default())),
            with(
                &scanout,
                &[("width", 4), ("height", 4), ("refresh_rate", 4)],
            ),
        ),
        (
            "DISABLE_SCANOUT",
            bytes(Message::DisableScanout { scanout_id: 1 }),
            scanout.to_vec(),
        ),
        (
            "SCANOUT_RESP",
            bytes(Message::ScanoutResp(ScanoutResp::default())),
            with(&scanout, &[("success", 4), ("connector", 64)]),
        ),
        (
            "SUBSCRIBE",
            bytes(Message::Subscribe { scanout_id: 1 }),
            scanout.to_vec(),
        ),
        (
            "SUBSCRIBE_RESP",
            bytes(Message::SubscribeResp {
                scanout_id: 1,
                success: true,
            }),
            with(&scanout, &[("success", 4)]),
        ),
        (
            "HELLO",
            bytes(Message::Hello(hello())),
            with(&HELLO, &[("TLVs", 4 + 8 + 4 + 6)]),
        ),
        (
            "HELLO_RESP",
            bytes(Message::HelloResp(hello())),
            with(&HELLO, &[("TLVs", 4 + 8 + 4 + 6)]),
        ),
        (
            "ERROR",
            bytes(error(None)),
            vec![("error_code", 4), ("message", 256)],
        ),
        (
            "ERROR",
            bytes(error(Some(RequestTag::default()))),
            vec![("error_code", 4), ("message", 256), ("request tag", 4)],
        ),
        (
            "unknown message",
            [b"HXFR\x77\0\0\0\x05\0\0\0", &b"abcde"[..]].concat(),
            vec![("payload", 5)],
        ),
    ]
}

#[test]
fn a_stream_that_ends_inside_a_message_is_truncated_wherever_that_is() {
    for (name, bytes, payload) in samples() {
        let fields: Vec<_> = HEADER.iter().chain(&payload).collect();
        let size: usize = fields.iter().map(|(_, size)| size).sum();
        assert_eq!(size, bytes.len(), "the test's own table of {name}");
        for cut in 1..bytes.len() {
            let mut end = 0;
            let (field, missing) = fields
                .iter()
                .find_map(|(field, size)| {
                    end += size;
                    (end > cut).then(|| (*field, (end - cut) as u64))
                })
                .unwrap();
            let message = if cut < 12 { "a header" } else { name };
            for pieces in [&[1][..], &[usize::MAX]] {
                let (messages, end) = decode(Limits::default(), &bytes[..cut], pieces);
                assert!(messages.is_empty());
                let truncated = DecodeError::Truncated {
                    message,
                    field,
                    missing,
                };
                assert_eq!(end, Err(truncated), "{name} cut at {cut}");
            }
        }
        let (messages, end) = decode(Limits::default(), &bytes, &[]);
        assert_eq!((messages.len(), end), (1, Ok(())));
    }
}

#[test]
fn nothing_at_all_is_a_whole_stream() {
    assert_eq!(decode(Limits::default(), &[], &[]).1, Ok(()));
}

/// Sets `payload_size`, and nothing else.
fn announce(mut bytes: Vec<u8>, size: u32) -> Vec<u8> {
    bytes[8..12].copy_from_slice(&size.to_le_bytes());
    bytes
}

#[track_caller]
fn refused(limits: Limits, bytes: &[u8], expected: &DecodeError) {
    for pieces in [&[1][..], &[usize::MAX]] {
        let (messages, end) = decode(limits, bytes, pieces);
        assert!(messages.is_empty(), "{messages:?}");
        assert_eq!(end.as_ref(), Err(expected));
    }
    let text = expected.to_string();
    match expected {
        DecodeError::OverLimit {
            message,
            field,
            value,
            limit,
        } => assert_eq!(
            text,
            format!("{message}: {field} is {value}, over the limit of {limit}")
        ),
        DecodeError::TooSmall {
            message,
            field,
            value,
            needed,
        } => assert_eq!(
            text,
            format!("{message}: {field} is {value}, the message needs {needed}")
        ),
        _ => {}
    }
}

#[test]
fn a_payload_size_too_small_or_too_large_for_its_type_is_refused_by_the_header_alone() {
    let limits = Limits {
        pixels: 1000,
        access_unit: 2000,
        nal_count: 3,
        hello: 500,
        skipped: 700,
    };
    for (name, bytes, _) in samples() {
        let pixels = bytes[5] & 1 != 0;
        let (least, most) = match name {
            "FRAME_REQUEST" if pixels => (44, 1044),
            "FRAME_REQUEST" => (44, 44),
            "FRAME_RESPONSE" => (24, 24 + 2000 + 3 * 4),
            "HELLO" | "HELLO_RESP" => (32, 500),
            "unknown message" => (0, 700),
            "ERROR" => (260, 264),
            _ => (bytes.len() - 12, bytes.len() - 12),
        };
        let header = bytes[..12].to_vec();
        for size in [0, 1, least / 2, least.saturating_sub(1)] {
            if size < least {
                refused(
                    limits,
                    &announce(header.clone(), size as u32),
                    &DecodeError::TooSmall {
                        message: name,
                        field: "payload_size",
                        value: size as u64,
                        needed: least as u64,
                    },
                );
            }
        }
        for size in [most + 1, 2 * most + 1, 1 << 26, u32::MAX as usize] {
            refused(
                limits,
                &announce(header.clone(), size as u32),
                &DecodeError::OverLimit {
                    message: name,
                    field: "payload_size",
                    value: size as u64,
                    limit: most as u64,
                },
            );
        }
    }
}

#[test]
fn an_error_between_its_two_sizes_is_refused() {
    for size in 261..264 {
        refused(
            Limits::default(),
            &announce(bytes(error(None)), size),
            &DecodeError::TooSmall {
                message: "ERROR",
                field: "payload_size",
                value: size.into(),
                needed: 264,
            },
        );
    }
}

#[test]
fn the_limits_themselves_are_still_accepted() {
    let limits = Limits {
        pixels: 1000,
        access_unit: 2000,
        nal_count: 3,
        hello: 500,
        skipped: 700,
    };
    let mut hello = hello();
    hello.name = Some("n".repeat(500 - 32 - 4 - 4 - 6));
    let stream = [
        bytes(Message::FrameRequest(
            FrameRequest::default(),
            Some(vec![1; 1000].into()),
        )),
        response_parts(1, &FrameResponse::default(), &[&[1; 1000], &[2; 999], &[3]]),
        bytes(Message::Hello(hello)),
        [&b"HXFR\x77\0\0\0\xbc\x02\0\0"[..], &[0; 700]].concat(),
    ]
    .concat();
    let (messages, end) = decode(limits, &stream, &[333]);
    assert_eq!((messages.len(), end), (4, Ok(())));
}

#[test]
fn limits_of_each_side_refuse_what_only_the_other_side_receives() {
    let pixels = bytes(Message::FrameRequest(
        FrameRequest::default(),
        Some(vec![1; 1].into()),
    ));
    refused(
        Limits::client(),
        &pixels,
        &DecodeError::OverLimit {
            message: "FRAME_REQUEST",
            field: "payload_size",
            value: 45,
            limit: 44,
        },
    );
    let unit = response_parts(1, &FrameResponse::default(), &[&[1]]);
    refused(
        Limits::host(),
        &unit,
        &DecodeError::OverLimit {
            message: "FRAME_RESPONSE",
            field: "NAL bytes",
            value: 1,
            limit: 0,
        },
    );
}

#[test]
fn bytes_without_the_magic_are_refused_as_another_protocol() {
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], b"RFXHxxxxxxxx"] {
        let found = u32::from_le_bytes(garbage[..4].try_into().unwrap());
        refused(Limits::default(), garbage, &DecodeError::BadMagic { found });
    }
    let text = DecodeError::BadMagic { found: 1 }.to_string();
    assert!(text.contains("magic is 0x00000001"), "{text}");
}

/// A FRAME_RESPONSE that announces other things than it holds.
fn response(nal_count: u32, list: &[u8]) -> Vec<u8> {
    let mut bytes = response_parts(1, &FrameResponse::default(), &[]);
    bytes[32..36].copy_from_slice(&nal_count.to_le_bytes());
    bytes.extend_from_slice(list);
    let size = bytes.len() as u32 - 12;
    announce(bytes, size)
}

#[test]
fn a_list_of_nal_units_that_does_not_fit_its_message_is_refused() {
    let over = |field, value, limit| DecodeError::OverLimit {
        message: "FRAME_RESPONSE",
        field,
        value,
        limit,
    };
    let limits = Limits {
        access_unit: 50,
        nal_count: 3,
        ..Limits::default()
    };
    refused(limits, &response(4, &[0; 16]), &over("nal_count", 4, 3));
    refused(
        limits,
        &response(u32::MAX, &[0; 16]),
        &over("nal_count", u32::MAX.into(), 3),
    );
    // One size field less than units.
    refused(
        limits,
        &response(3, &[0; 11]),
        &DecodeError::TooSmall {
            message: "FRAME_RESPONSE",
            field: "payload_size",
            value: 24 + 11,
            needed: 24 + 12,
        },
    );
    // What the spare size fields of fewer units would have left room for.
    refused(limits, &response(1, &[0; 56]), &over("NAL bytes", 52, 50));
    // Sizes: one over what is left, and the largest.
    refused(
        limits,
        &response(2, b"\x03\0\0\0abc\x03\0\0\0de"),
        &over("NAL size", 3, 2),
    );
    refused(
        limits,
        &response(1, b"\xff\xff\xff\xffabc"),
        &over("NAL size", u32::MAX.into(), 3),
    );
    let trailing = |count| DecodeError::Trailing {
        message: "FRAME_RESPONSE",
        field: "the last NAL unit",
        count,
    };
    refused(limits, &response(1, b"\x03\0\0\0abcde"), &trailing(2));
    refused(limits, &response(0, b"abc"), &trailing(3));
}

#[test]
fn a_hello_whose_sizes_do_not_fit_is_refused() {
    let with = |fixed_size: u16, tlvs: &[u8]| {
        let (head, _) = helix_protocol::encode::hello(1, &Hello::default());
        let mut bytes = [&head, tlvs].concat();
        bytes[14..16].copy_from_slice(&fixed_size.to_le_bytes());
        let size = bytes.len() as u32 - 12;
        announce(bytes, size)
    };
    for fixed_size in [0, 31] {
        refused(
            Limits::default(),
            &with(fixed_size, &[]),
            &DecodeError::TooSmall {
                message: "HELLO",
                field: "fixed_size",
                value: fixed_size.into(),
                needed: 32,
            },
        );
    }
    let over = |field, value, limit| DecodeError::OverLimit {
        message: "HELLO",
        field,
        value,
        limit,
    };
    refused(
        Limits::default(),
        &with(u16::MAX, b"\x01\0\0\0"),
        &over("fixed_size", u16::MAX.into(), 36),
    );
    for (length, text) in [(4_u16, &b"abc"[..]), (1, b""), (u16::MAX, b"abcd")] {
        let tlv = [&[1, 0], &length.to_le_bytes()[..], text].concat();
        refused(
            Limits::default(),
            &with(32, &tlv),
            &over("TLV length", length.into(), text.len() as u64),
        );
    }
    for rest in 1..4_usize {
        let tlvs = [&b"\x01\0\x02\0ab"[..], &[0; 3][..rest]].concat();
        refused(
            Limits::default(),
            &with(32, &tlvs),
            &DecodeError::Trailing {
                message: "HELLO",
                field: "the last TLV",
                count: rest as u64,
            },
        );
    }
}

#[test]
fn an_error_is_repeated_and_nothing_after_it_is_believed() {
    let mut decoder = helix_protocol::Decoder::new(Limits::default());
    let bytes = [&b"HXFX\x10\0\0\0\0\0\0\0"[..], b"HXFR\x10\0\0\0\0\0\0\0"].concat();
    decoder.space()[..bytes.len()].copy_from_slice(&bytes);
    decoder.advance(bytes.len());
    let error = decoder.next().unwrap_err();
    for _ in 0..3 {
        assert_eq!(decoder.next().unwrap_err(), error);
        assert_eq!(decoder.finish().unwrap_err(), error);
        // Somebody who reads on regardless fills no memory.
        let count = decoder.space().len();
        decoder.advance(count);
    }
}

#[test]
fn a_token_is_not_printed() {
    let text = format!("{:?}", Message::Hello(hello()));
    assert!(!text.contains("secret") && !text.contains("115"), "{text}");
}
