// SPDX-License-Identifier: MIT OR Apache-2.0

//! Messages survive the way through bytes, whole streams of them, however the bytes are split.

mod common;

use common::{content, decode, encode, response_parts};
use helix_protocol::decode::STAGE;
use helix_protocol::message::{
    AuthToken, Capabilities, Config, EnableScanout, ErrorCode, ErrorMessage, FrameRequest,
    FrameResponse, Hello, RequestTag, ScanoutResp,
};
use helix_protocol::{Decoder, Envelope, Limits, Message, Payload};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn tag() -> impl Strategy<Value = RequestTag> {
    any::<(u8, u16)>().prop_map(|(epoch, request_id)| RequestTag { epoch, request_id })
}

fn frame_request() -> impl Strategy<Value = FrameRequest> {
    (
        any::<[u32; 5]>(),
        any::<i64>(),
        any::<i64>(),
        any::<bool>(),
        tag(),
    )
        .prop_map(
            |([resource_id, width, height, format, stride], pts, duration, force_keyframe, tag)| {
                FrameRequest {
                    resource_id,
                    width,
                    height,
                    format,
                    stride,
                    pts,
                    duration,
                    force_keyframe,
                    tag,
                }
            },
        )
}

fn frame_response() -> impl Strategy<Value = FrameResponse> {
    (any::<i64>(), any::<i64>(), any::<bool>(), tag()).prop_map(|(pts, dts, is_keyframe, tag)| {
        FrameResponse {
            pts,
            dts,
            is_keyframe,
            tag,
            nal_count: 1,
        }
    })
}

fn config() -> impl Strategy<Value = Config> {
    (any::<[u32; 5]>(), any::<u8>(), any::<u8>(), any::<bool>()).prop_map(
        |([width, height, bitrate, framerate_num, framerate_den], profile, level, realtime)| {
            Config {
                width,
                height,
                bitrate,
                framerate_num,
                framerate_den,
                profile,
                level,
                realtime,
            }
        },
    )
}

/// Text that is sent as it is: control characters are replaced by the receiver, and longer text
/// is cut by the sender.
fn text(limit: usize) -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..limit).prop_map(move |chars| {
        let text: String = chars.into_iter().filter(|c| !c.is_control()).collect();
        text[..text.floor_char_boundary(limit)].to_owned()
    })
}

fn hello() -> impl Strategy<Value = Hello> {
    (
        any::<[u16; 4]>(),
        any::<u64>(),
        any::<[u32; 2]>(),
        option::of(text(200)),
        option::of(text(200)),
        option::of(vec(any::<u8>(), 0..200).prop_map(AuthToken)),
        option::of(vec(any::<u8>(), 0..200)),
    )
        .prop_map(
            |(
                [version, max_in_flight, max_width, max_height],
                capabilities,
                [codecs, max_message],
                name,
                encoder,
                auth_token,
                clock_id,
            )| Hello {
                version,
                max_in_flight,
                capabilities: Capabilities(capabilities),
                codecs,
                max_message,
                max_width,
                max_height,
                name,
                encoder,
                auth_token,
                clock_id,
            },
        )
}

/// Bulk bytes; now and then more than the decoder's stage holds.
fn bulk() -> impl Strategy<Value = Payload> {
    prop_oneof![4 => 0..600_usize, 1 => 16_000..40_000_usize]
        .prop_flat_map(|size| vec(any::<u8>(), size))
        .prop_map(Payload::from)
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        frame_request().prop_map(|request| Message::FrameRequest(request, None)),
        (frame_request(), bulk()).prop_map(|(request, pixels)| {
            let pixels = (!pixels.is_empty()).then_some(pixels);
            Message::FrameRequest(request, pixels)
        }),
        (frame_response(), bulk()).prop_map(|(r, unit)| Message::FrameResponse(r, unit)),
        Just(()).prop_map(|()| Message::KeyframeReq),
        config().prop_map(Message::ConfigReq),
        config().prop_map(Message::ConfigResp),
        Just(()).prop_map(|()| Message::Ping),
        Just(()).prop_map(|()| Message::Pong),
        any::<[u32; 4]>().prop_map(|[scanout_id, width, height, refresh_rate]| {
            Message::EnableScanout(EnableScanout {
                scanout_id,
                width,
                height,
                refresh_rate,
            })
        }),
        any::<u32>().prop_map(|scanout_id| Message::DisableScanout { scanout_id }),
        (any::<u32>(), any::<bool>(), text(63)).prop_map(|(scanout_id, success, connector)| {
            Message::ScanoutResp(ScanoutResp {
                scanout_id,
                success,
                connector,
            })
        }),
        any::<u32>().prop_map(|scanout_id| Message::Subscribe { scanout_id }),
        any::<(u32, bool)>().prop_map(|(scanout_id, success)| Message::SubscribeResp {
            scanout_id,
            success
        }),
        hello().prop_map(Message::Hello),
        hello().prop_map(Message::HelloResp),
        (any::<i32>(), text(255), option::of(tag())).prop_map(|(code, text, tag)| {
            Message::Error(ErrorMessage {
                code: ErrorCode(code),
                text,
                tag,
            })
        }),
    ]
}

fn envelope() -> impl Strategy<Value = Envelope> {
    (any::<u16>(), message()).prop_map(|(session_id, message)| {
        let session_id = match message {
            // Carried twice.
            Message::Subscribe { scanout_id } | Message::SubscribeResp { scanout_id, .. } => {
                scanout_id as u16
            }
            _ => session_id,
        };
        Envelope {
            session_id,
            message,
        }
    })
}

fn stream(messages: &[Envelope]) -> Vec<u8> {
    messages.iter().filter_map(encode).flatten().collect()
}

fn contents(messages: &[Envelope]) -> Vec<(String, Vec<u8>)> {
    messages.iter().map(content).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn messages_come_back_in_order_however_the_stream_is_split(
        messages in vec(envelope(), 1..6),
        pieces in vec(1..5000_usize, 1..20),
    ) {
        let (decoded, end) = decode(Limits::default(), &stream(&messages), &pieces);
        prop_assert_eq!(contents(&decoded), contents(&messages));
        prop_assert_eq!(end, Ok(()));
    }

    #[test]
    fn one_byte_at_a_time_is_enough(messages in vec(envelope(), 1..4)) {
        let (decoded, end) = decode(Limits::default(), &stream(&messages), &[1]);
        prop_assert_eq!(contents(&decoded), contents(&messages));
        prop_assert_eq!(end, Ok(()));
    }

    #[test]
    fn parts_of_an_access_unit_are_joined(
        response in frame_response(),
        nals in vec(vec(any::<u8>(), 0..300), 0..10),
        pieces in vec(1..100_usize, 1..20),
    ) {
        let nals: Vec<_> = nals.iter().map(Vec::as_slice).collect();
        let mut bytes = response_parts(1, &response, &nals);
        bytes.extend_from_slice(&helix_protocol::encode::ping(9));
        let (decoded, end) = decode(Limits::default(), &bytes, &pieces);
        prop_assert_eq!(end, Ok(()));
        prop_assert_eq!(decoded.len(), 2);
        let Message::FrameResponse(got, unit) = &decoded[0].message else {
            panic!("{:?}", decoded[0]);
        };
        prop_assert_eq!(&**unit, nals.concat());
        let nal_count = nals.len() as u32;
        prop_assert_eq!(*got, FrameResponse { nal_count, ..response });
    }

    #[test]
    fn arbitrary_bytes_end_the_same_way_however_they_are_split(
        types in vec((0..14_usize, 0..300_u32, any::<u8>()), 0..6),
        noise in vec(any::<u8>(), 0..2000),
        pieces in vec(1..50_usize, 1..20),
    ) {
        const TYPES: [u8; 14] =
            [1, 2, 3, 4, 5, 0x10, 0x20, 0x21, 0x22, 0x30, 0x31, 0x40, 0xff, 0x77];
        // Headers that make sense, bytes between them that do not.
        let mut bytes = Vec::new();
        for (kind, size, flags) in types {
            bytes.extend_from_slice(b"HXFR");
            bytes.extend_from_slice(&[TYPES[kind], flags, 1, 0]);
            bytes.extend_from_slice(&size.to_le_bytes());
            bytes.extend(noise.iter().cycle().take(size as usize));
        }
        bytes.extend_from_slice(&noise);
        let (whole, whole_end) = decode(Limits::default(), &bytes, &[usize::MAX]);
        let (split, split_end) = decode(Limits::default(), &bytes, &pieces);
        prop_assert_eq!(contents(&whole), contents(&split));
        prop_assert_eq!(whole_end, split_end);
    }

    #[test]
    fn text_that_is_too_long_is_cut_between_characters(
        long in vec(any::<char>(), 64..400),
    ) {
        let long: String = long.into_iter().filter(|c| !c.is_control()).collect();
        let envelope = Envelope {
            session_id: 1,
            message: Message::Error(ErrorMessage {
                code: ErrorCode::INTERNAL,
                text: long.clone(),
                tag: None,
            }),
        };
        let (decoded, end) = decode(Limits::default(), &stream(&[envelope]), &[]);
        prop_assert_eq!(end, Ok(()));
        let Message::Error(error) = &decoded[0].message else { panic!("{:?}", decoded[0]) };
        prop_assert!(long.starts_with(&error.text));
        prop_assert!(error.text.len() == long.len() || error.text.len() > 255 - 4);
    }
}

#[test]
fn a_peer_cannot_write_to_a_terminal() {
    for (evil, shown) in [
        ("\x1b[2J\x07gone", "\u{fffd}[2J\u{fffd}gone"),
        ("a\r\nb", "a\u{fffd}\u{fffd}b"),
        ("\u{9b}31m", "\u{fffd}31m"),
    ] {
        let error = ErrorMessage {
            code: ErrorCode::INTERNAL,
            text: evil.to_owned(),
            tag: None,
        };
        let head = helix_protocol::encode::error(1, &error);
        let (decoded, _) = decode(Limits::default(), &head, &[]);
        let Message::Error(error) = &decoded[0].message else {
            panic!("{:?}", decoded[0]);
        };
        assert_eq!(error.text, shown);
    }
}

#[test]
fn text_without_a_terminator_or_with_broken_utf_8_is_still_text() {
    let mut bytes = encode(&Envelope {
        session_id: 1,
        message: Message::ScanoutResp(ScanoutResp::default()),
    })
    .unwrap();
    bytes[20..].fill(b'v');
    bytes[83] = 0xff;
    let (decoded, end) = decode(Limits::default(), &bytes, &[]);
    assert_eq!(end, Ok(()));
    let Message::ScanoutResp(resp) = &decoded[0].message else {
        panic!("{:?}", decoded[0]);
    };
    assert_eq!(resp.connector, format!("{}\u{fffd}", "v".repeat(63)));
}

#[test]
fn a_newer_hello_is_understood_as_far_as_it_is_known() {
    let known = Hello {
        version: 2,
        name: Some("newer".to_owned()),
        ..Hello::default()
    };
    let (head, tlvs) = helix_protocol::encode::hello(1, &known);
    let mut bytes = head.to_vec();
    // Eight more bytes of fixed part, an unknown TLV before the known one.
    bytes[14..16].copy_from_slice(&40_u16.to_le_bytes());
    bytes.extend_from_slice(&[0xaa; 8]);
    bytes.extend_from_slice(&[0x34, 0x12, 3, 0, 9, 9, 9]);
    bytes.extend_from_slice(&tlvs);
    let size = (bytes.len() - 12) as u32;
    bytes[8..12].copy_from_slice(&size.to_le_bytes());
    let (decoded, end) = decode(Limits::default(), &bytes, &[1]);
    assert_eq!(end, Ok(()));
    let Message::Hello(hello) = &decoded[0].message else {
        panic!("{:?}", decoded[0]);
    };
    assert_eq!(*hello, known);
}

#[test]
fn unknown_messages_are_skipped_and_reported() {
    let mut bytes = Vec::new();
    for (msg_type, size) in [(0x06_u8, 0_u32), (0x7f, 3), (0xfe, 100_000)] {
        bytes.extend_from_slice(b"HXFR");
        bytes.extend_from_slice(&[msg_type, 0xff, 5, 0]);
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend(std::iter::repeat_n(0x5a, size as usize));
    }
    bytes.extend_from_slice(&helix_protocol::encode::ping(7));
    for pieces in [&[1][..], &[4096], &[usize::MAX]] {
        let (decoded, end) = decode(Limits::default(), &bytes, pieces);
        assert_eq!(end, Ok(()));
        let seen: Vec<_> = decoded
            .iter()
            .map(|envelope| match envelope.message {
                Message::Unknown {
                    msg_type,
                    payload_size,
                } => (envelope.session_id, msg_type, payload_size),
                Message::Ping => (envelope.session_id, 0x10, 0),
                _ => panic!("{envelope:?}"),
            })
            .collect();
        assert_eq!(
            seen,
            [(5, 6, 0), (5, 0x7f, 3), (5, 0xfe, 100_000), (7, 0x10, 0)]
        );
    }
}

#[test]
fn many_small_messages_come_out_of_few_large_reads() {
    let messages: Vec<_> = (0..3000_u16)
        .map(|n| Envelope {
            session_id: n,
            message: match n % 4 {
                0 => Message::Ping,
                1 => Message::DisableScanout {
                    scanout_id: n.into(),
                },
                2 => Message::ConfigReq(Config {
                    width: n.into(),
                    ..Config::default()
                }),
                _ => Message::Error(ErrorMessage {
                    code: ErrorCode(n.into()),
                    text: n.to_string(),
                    tag: None,
                }),
            },
        })
        .collect();
    let bytes = stream(&messages);
    for piece in [usize::MAX, STAGE, 10_000, 5003] {
        let (decoded, end) = decode(Limits::default(), &bytes, &[piece]);
        assert_eq!(end, Ok(()));
        assert!(
            contents(&decoded) == contents(&messages),
            "pieces of {piece}"
        );
    }
}

#[test]
fn pixels_and_access_units_are_received_where_they_stay() {
    const SIZE: usize = 50_000;
    let request = helix_protocol::encode::frame_request(1, &FrameRequest::default(), SIZE as u32);
    let response =
        helix_protocol::encode::frame_response(1, &FrameResponse::default(), SIZE as u32);
    for head in [request, response] {
        let mut decoder = Decoder::new(Limits::default());
        decoder.space()[..head.len()].copy_from_slice(&head);
        decoder.advance(head.len());
        assert!(decoder.next().unwrap().is_none());
        let space = decoder.space();
        assert_eq!(space.len(), SIZE);
        let address = space.as_ptr();
        decoder.advance(SIZE);
        let message = decoder.next().unwrap().unwrap().message;
        let (Message::FrameRequest(_, Some(bulk)) | Message::FrameResponse(_, bulk)) = message
        else {
            panic!("{message:?}");
        };
        assert_eq!(bulk.as_ptr(), address);
    }
}

#[test]
fn a_payload_stays_whole_while_later_messages_arrive() {
    let messages: Vec<_> = (0..10_u8)
        .map(|n| Envelope {
            session_id: 1,
            message: Message::FrameRequest(
                FrameRequest::default(),
                Some(vec![n; 1000 * (11 - usize::from(n))].into()),
            ),
        })
        .collect();
    let bytes = stream(&messages);
    let mut decoder = Decoder::new(Limits::default());
    let mut kept = Vec::new();
    let mut count = 0;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let space = decoder.space();
        let piece = space.len().min(rest.len());
        space[..piece].copy_from_slice(&rest[..piece]);
        decoder.advance(piece);
        rest = &rest[piece..];
        while let Some(envelope) = decoder.next().unwrap() {
            count += 1;
            // Every other one is dropped, and its memory is used again.
            if count % 2 == 0 {
                kept.push(envelope);
            }
        }
    }
    assert_eq!(kept.len(), 5);
    for envelope in kept {
        let Message::FrameRequest(_, Some(pixels)) = envelope.message else {
            panic!("{envelope:?}");
        };
        assert_eq!(pixels.len(), 1000 * (11 - usize::from(pixels[0])));
        assert!(pixels.iter().all(|&byte| byte == pixels[0]));
    }
}
