// SPDX-License-Identifier: MIT OR Apache-2.0

//! The byte vectors, written by a second implementation that shares no code with this crate: each
//! message is written as exactly those bytes and read as exactly those fields, and each malformed
//! one is refused with an error that names the field. `vectors/README.md` describes the file.

mod common;

use common::{decode, encode, response_parts};
use helix_protocol::message::{
    AuthToken, Capabilities, Config, EnableScanout, ErrorCode, ErrorMessage, FrameRequest,
    FrameResponse, Hello, RequestTag, ScanoutResp,
};
use helix_protocol::{DecodeError, Envelope, Limits, Message};
use serde_json::{Map, Value, json};

fn vectors() -> Value {
    serde_json::from_str(include_str!("../vectors/vectors.json")).unwrap()
}

fn list(vectors: &Value, name: &str) -> Vec<Value> {
    let list = vectors[name].as_array().unwrap().clone();
    assert!(!list.is_empty(), "no {name}");
    list
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn bytes(vector: &Value) -> Vec<u8> {
    unhex(vector["hex"].as_str().unwrap())
}

/// The fields of a vector, taken by name; none may be left over.
struct Fields<'a> {
    name: &'a str,
    left: Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn new(vector: &'a Value) -> Self {
        Self {
            name: vector["name"].as_str().unwrap(),
            left: vector["fields"].as_object().unwrap().clone(),
        }
    }

    fn take(&mut self, field: &str) -> Value {
        self.left
            .remove(field)
            .unwrap_or_else(|| panic!("{} has no {field}", self.name))
    }

    /// A number that fits what the protocol gives it.
    fn number<T: TryFrom<i128>>(&mut self, field: &str) -> T {
        let value = self.take(field);
        let wide = value.as_i64().map(i128::from);
        wide.or(value.as_u64().map(i128::from))
            .and_then(|wide| T::try_from(wide).ok())
            .unwrap_or_else(|| panic!("{}: {field} is {value}", self.name))
    }

    fn flag(&mut self, field: &str) -> bool {
        match self.number::<u32>(field) {
            0 => false,
            1 => true,
            other => panic!("{}: {field} is {other}", self.name),
        }
    }

    fn text(&mut self, field: &str) -> String {
        self.take(field).as_str().unwrap().to_owned()
    }

    fn hex(&mut self, field: &str) -> Option<Vec<u8>> {
        Some(unhex(self.left.remove(field)?.as_str().unwrap()))
    }

    fn tag(&mut self) -> Option<RequestTag> {
        self.left.contains_key("epoch").then(|| RequestTag {
            epoch: self.number("epoch"),
            request_id: self.number("request_id"),
        })
    }

    fn hello(&mut self) -> Hello {
        assert!(self.number::<u16>("fixed_size") >= 32);
        let mut hello = Hello {
            version: self.number("version"),
            max_in_flight: self.number("max_in_flight"),
            capabilities: Capabilities(self.number("capabilities")),
            codecs: self.number("codecs"),
            max_message: self.number("max_message"),
            max_width: self.number("max_width"),
            max_height: self.number("max_height"),
            ..Hello::default()
        };
        for tlv in self.take("tlvs").as_array().unwrap() {
            let value = unhex(tlv["value"].as_str().unwrap());
            let text = || Some(String::from_utf8(value.clone()).unwrap());
            match tlv["type"].as_u64().unwrap() {
                1 => hello.name = text(),
                2 => hello.encoder = text(),
                3 => hello.auth_token = Some(AuthToken(value)),
                4 => hello.clock_id = Some(value),
                _ => {}
            }
        }
        hello
    }

    fn config(&mut self) -> Config {
        Config {
            width: self.number("width"),
            height: self.number("height"),
            bitrate: self.number("bitrate"),
            framerate_num: self.number("framerate_num"),
            framerate_den: self.number("framerate_den"),
            profile: self.number("profile"),
            level: self.number("level"),
            realtime: self.flag("realtime"),
        }
    }
}

/// What a vector says, as this crate's types, and its NAL units one by one.
struct Described {
    envelope: Envelope,
    nals: Option<Vec<Vec<u8>>>,
    /// Whether the bytes of the tag mean something.
    tagged: bool,
}

fn described(vector: &Value) -> Described {
    let mut fields = Fields::new(vector);
    let tag = fields.tag();
    let mut nals = None;
    let message = match vector["type"].as_u64().unwrap() {
        0x01 => Message::FrameRequest(
            FrameRequest {
                resource_id: fields.number("resource_id"),
                width: fields.number("width"),
                height: fields.number("height"),
                format: fields.number("format"),
                stride: fields.number("stride"),
                pts: fields.number("pts"),
                duration: fields.number("duration"),
                force_keyframe: fields.flag("force_keyframe"),
                tag: tag.unwrap_or_default(),
            },
            fields.hex("pixels").map(Into::into),
        ),
        0x02 => {
            let list = fields.take("nals");
            let list: Vec<_> = list.as_array().unwrap().iter().collect();
            let list: Vec<_> = list
                .iter()
                .map(|nal| unhex(nal.as_str().unwrap()))
                .collect();
            let response = FrameResponse {
                pts: fields.number("pts"),
                dts: fields.number("dts"),
                is_keyframe: fields.flag("is_keyframe"),
                tag: tag.unwrap_or_default(),
                nal_count: fields.number("nal_count"),
            };
            let unit = list.concat();
            nals = Some(list);
            Message::FrameResponse(response, unit.into())
        }
        0x03 => Message::KeyframeReq,
        0x04 => Message::ConfigReq(fields.config()),
        0x05 => Message::ConfigResp(fields.config()),
        0x10 => Message::Ping,
        0x11 => Message::Pong,
        0x20 => Message::EnableScanout(EnableScanout {
            scanout_id: fields.number("scanout_id"),
            width: fields.number("width"),
            height: fields.number("height"),
            refresh_rate: fields.number("refresh_rate"),
        }),
        0x21 => Message::DisableScanout {
            scanout_id: fields.number("scanout_id"),
        },
        0x22 => Message::ScanoutResp(ScanoutResp {
            scanout_id: fields.number("scanout_id"),
            success: fields.flag("success"),
            connector: fields.text("connector"),
        }),
        0x30 => Message::Subscribe {
            scanout_id: fields.number("scanout_id"),
        },
        0x31 => Message::SubscribeResp {
            scanout_id: fields.number("scanout_id"),
            success: fields.flag("success"),
        },
        0x40 => Message::Hello(fields.hello()),
        0x41 => Message::HelloResp(fields.hello()),
        0xff => Message::Error(ErrorMessage {
            code: ErrorCode(fields.number("error_code")),
            text: fields.text("message"),
            tag,
        }),
        msg_type => Message::Unknown {
            msg_type: msg_type as u8,
            payload_size: bytes(vector).len() as u32 - 12,
        },
    };
    assert!(fields.left.is_empty(), "{}: {:?}", fields.name, fields.left);
    Described {
        envelope: Envelope {
            session_id: vector["session_id"].as_u64().unwrap() as u16,
            message,
        },
        nals,
        tagged: tag.is_some(),
    }
}

/// What a message says, for comparison. The bytes of the tag count only where peers agreed.
fn content(mut envelope: Envelope, tagged: bool) -> (String, Vec<u8>) {
    if !tagged {
        match &mut envelope.message {
            Message::FrameRequest(request, _) => request.tag = RequestTag::default(),
            Message::FrameResponse(response, _) => response.tag = RequestTag::default(),
            _ => {}
        }
    }
    common::content(&envelope)
}

#[test]
fn each_message_is_written_as_exactly_these_bytes() {
    for vector in list(&vectors(), "messages") {
        let Described { envelope, nals, .. } = described(&vector);
        let written = match (&envelope.message, nals) {
            (Message::FrameResponse(response, _), Some(nals)) if nals.len() != 1 => {
                let nals: Vec<_> = nals.iter().map(Vec::as_slice).collect();
                response_parts(envelope.session_id, response, &nals)
            }
            _ => encode(&envelope).unwrap(),
        };
        assert_eq!(hex(&written), vector["hex"], "{}", vector["name"]);
    }
}

#[test]
fn each_message_is_read_as_exactly_these_fields() {
    let vectors = vectors();
    for name in ["messages", "decode_only"] {
        for vector in list(&vectors, name) {
            let Described {
                envelope, tagged, ..
            } = described(&vector);
            let expected = content(envelope, tagged);
            for pieces in [&[1][..], &[7], &[usize::MAX]] {
                let (mut messages, end) = decode(Limits::default(), &bytes(&vector), pieces);
                assert_eq!(end, Ok(()), "{}", vector["name"]);
                assert_eq!(messages.len(), 1, "{}", vector["name"]);
                let read = content(messages.remove(0), tagged);
                assert_eq!(read, expected, "{}", vector["name"]);
            }
        }
    }
}

#[test]
fn the_stream_of_all_of_them_comes_out_the_same_in_whatever_pieces() {
    let vectors = vectors();
    let all = [list(&vectors, "messages"), list(&vectors, "decode_only")].concat();
    let stream: Vec<u8> = all.iter().flat_map(bytes).collect();
    for piece in [1, 2, 3, 11, 12, 13, 100, 4096, usize::MAX] {
        let (messages, end) = decode(Limits::default(), &stream, &[piece]);
        assert_eq!(
            (messages.len(), end),
            (all.len(), Ok(())),
            "pieces of {piece}"
        );
        for (message, vector) in messages.into_iter().zip(&all) {
            let Described {
                envelope, tagged, ..
            } = described(vector);
            assert_eq!(content(message, tagged), content(envelope, tagged));
        }
    }
}

#[test]
fn a_prefix_is_a_message_that_is_not_there_yet() {
    let vectors = vectors();
    for name in ["messages", "decode_only"] {
        for vector in list(&vectors, name) {
            let bytes = bytes(&vector);
            for cut in 1..bytes.len() {
                let (messages, end) = decode(Limits::default(), &bytes[..cut], &[]);
                assert!(messages.is_empty());
                assert!(
                    matches!(end, Err(DecodeError::Truncated { .. })),
                    "{} cut at {cut}: {end:?}",
                    vector["name"]
                );
            }
        }
    }
}

#[test]
fn the_limits_assumed_are_those_of_this_crate() {
    let limits = Limits::default();
    assert_eq!(
        vectors()["limits"],
        json!({
            "pixels": limits.pixels,
            "nal_count": limits.nal_count,
            "access_unit": limits.access_unit,
            "unknown": limits.skipped,
        })
    );
}

/// What a refusal is about: field, value, limit.
fn blamed(error: &DecodeError) -> (&'static str, u64, Option<u64>) {
    match *error {
        DecodeError::BadMagic { found } => ("magic", found.into(), Some(0x5246_5848)),
        DecodeError::OverLimit {
            field,
            value,
            limit,
            ..
        } => (field, value, Some(limit)),
        DecodeError::TooSmall {
            field,
            value,
            needed,
            ..
        } => (field, value, Some(needed)),
        DecodeError::Trailing { field, count, .. } => (field, count, None),
        DecodeError::Truncated { field, missing, .. } => (field, missing, None),
    }
}

#[test]
fn what_breaks_the_framing_is_refused_and_the_field_is_named() {
    let mut seen = 0;
    for vector in list(&vectors(), "malformed") {
        if vector["level"] != "framing" {
            continue;
        }
        seen += 1;
        let name = vector["name"].as_str().unwrap();
        // What the vector calls a field has more words in our errors. Where two numbers
        // contradict each other, either may be called wrong: "two units" in a payload that the
        // first one fills leaves the first too large, or the second without a place.
        let field = match (name, vector["field"].as_str().unwrap()) {
            (
                "frame_response_nal_count_more_than_payload" | "frame_response_nal_size_cut",
                "nal_count",
            ) => None,
            (_, "size") => Some("NAL size"),
            (_, "length") => Some("TLV length"),
            (_, "TLVs") => Some("the last TLV"),
            (_, field) => Some(field),
        };
        for pieces in [&[1][..], &[usize::MAX]] {
            let (messages, end) = decode(Limits::default(), &bytes(&vector), pieces);
            assert!(messages.is_empty(), "{name}: {messages:?}");
            let error = end.expect_err(name);
            assert!(
                !matches!(error, DecodeError::Truncated { .. }),
                "{name} was not refused, only waited for: {error}"
            );
            let (blamed, value, limit) = blamed(&error);
            let text = error.to_string();
            assert!(text.contains(blamed), "{name}: {text}");
            let Some(field) = field else {
                assert_eq!(blamed, "NAL size", "{name}: {text}");
                continue;
            };
            assert_eq!(blamed, field, "{name}: {text}");
            assert_eq!(value, vector["value"].as_u64().unwrap(), "{name}: {text}");
            if let (Some(limit), Some(expected)) = (limit, vector["limit"].as_u64()) {
                assert_eq!(limit, expected, "{name}: {text}");
            }
        }
    }
    assert!(seen > 0);
}

#[test]
fn what_only_a_host_can_judge_keeps_the_framing_whole() {
    let mut seen = 0;
    for vector in list(&vectors(), "malformed") {
        if vector["level"] != "content" {
            continue;
        }
        seen += 1;
        let stream = [&bytes(&vector)[..], &helix_protocol::encode::ping(5)].concat();
        let (messages, end) = decode(Limits::default(), &stream, &[]);
        assert_eq!((messages.len(), end), (2, Ok(())), "{}", vector["name"]);
        assert!(matches!(messages[0].message, Message::FrameRequest(..)));
    }
    assert!(seen > 0);
}

#[test]
fn the_example_in_the_documentation_is_what_it_says() {
    let page = include_str!("../../../docs/protocol.md");
    let (_, rest) = page.split_once("```hex\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let digits: String = example
        .lines()
        .map(|line| line.split('#').next().unwrap().replace(' ', ""))
        .collect();
    let bytes = unhex(&digits);
    let (messages, end) = decode(Limits::default(), &bytes, &[]);
    assert_eq!(end, Ok(()));
    let [config, request, response, asked, answered] = &messages[..] else {
        panic!("{messages:?}");
    };
    for (message, expected) in [(asked, "Ping"), (answered, "Pong")] {
        assert_eq!(format!("{:?}", message.message), expected);
    }
    assert!(messages.iter().all(|message| message.session_id == 1));
    let Message::ConfigReq(config) = config.message else {
        panic!("{config:?}");
    };
    assert_eq!(
        config,
        Config {
            width: 2,
            height: 2,
            bitrate: 4_000_000,
            framerate_num: 60,
            framerate_den: 1,
            profile: 77,
            level: 30,
            realtime: true,
        }
    );
    let Message::FrameRequest(request, Some(pixels)) = &request.message else {
        panic!("{request:?}");
    };
    assert_eq!(
        *request,
        FrameRequest {
            width: 2,
            height: 2,
            format: u32::from_le_bytes(*b"AR24"),
            stride: 8,
            pts: 25_000_000,
            duration: 16_666_667,
            force_keyframe: true,
            ..FrameRequest::default()
        }
    );
    assert_eq!(pixels.len(), 16);
    let Message::FrameResponse(response, unit) = &response.message else {
        panic!("{response:?}");
    };
    assert_eq!((response.pts, response.nal_count), (25_000_000, 1));
    assert!(response.is_keyframe);
    assert_eq!(helix_protocol::h264::nal_units(unit).count(), 3);
}
