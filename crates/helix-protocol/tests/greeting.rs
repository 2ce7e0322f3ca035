// SPDX-License-Identifier: MIT OR Apache-2.0

//! The client's greeting, message by message.

use helix_protocol::encode;
use helix_protocol::greeting::{Greeting, GreetingError};
use helix_protocol::message::{
    AuthToken, CODEC_H264, Capabilities, ErrorCode, ErrorMessage, FrameResponse, HELLO_VERSION,
    Hello,
};
use helix_protocol::{Agreement, Decoder, Limits, Message};

fn mine() -> Hello {
    Hello {
        version: HELLO_VERSION,
        max_in_flight: 16,
        capabilities: Capabilities(0b1011),
        codecs: CODEC_H264,
        max_message: 1 << 24,
        max_width: 8192,
        max_height: 8192,
        auth_token: Some(AuthToken(b"secret".to_vec())),
        ..Hello::default()
    }
}

fn theirs() -> Hello {
    Hello {
        version: 1,
        max_in_flight: 4,
        capabilities: Capabilities(0b0111),
        codecs: 0b11,
        max_message: 1056,
        max_width: 1920,
        max_height: 1080,
        name: Some("a host".to_owned()),
        clock_id: Some(b"its clock".to_vec()),
        ..Hello::default()
    }
}

fn read(bytes: &[u8]) -> Vec<Message> {
    let mut decoder = Decoder::new(Limits::default());
    decoder.space()[..bytes.len()].copy_from_slice(bytes);
    decoder.advance(bytes.len());
    std::iter::from_fn(|| decoder.next().unwrap())
        .map(|envelope| envelope.message)
        .collect()
}

#[test]
fn hello_is_first_with_the_token_in_it_and_ping_is_next() {
    let ((hello, tlvs), ping) = Greeting::new(mine()).messages(7);
    let messages = read(&[&hello[..], &tlvs, &ping].concat());
    let [Message::Hello(hello), Message::Ping] = &messages[..] else {
        panic!("{messages:?}")
    };
    assert_eq!(*hello, mine());
}

#[test]
fn pong_alone_is_a_legacy_host() {
    let agreement = Greeting::new(mine()).receive(Message::Pong).unwrap();
    let agreement = agreement.expect("an end");
    assert_eq!(agreement, Agreement::legacy());
    assert_eq!(agreement.max_pixels(), 64 * 1024 * 1024);
    assert!(!agreement.can(Capabilities::REQUEST_IDS));
}

#[test]
fn hello_resp_then_pong_is_what_both_announced() {
    let mut greeting = Greeting::new(mine());
    assert_eq!(
        greeting.receive(Message::HelloResp(theirs())).unwrap(),
        None
    );
    let agreement = greeting.receive(Message::Pong).unwrap().expect("an end");
    assert_eq!(agreement.capabilities, Some(Capabilities(0b0011)));
    assert!(agreement.can(Capabilities::REQUEST_IDS));
    assert!(!agreement.can(Capabilities::KEYFRAME_REQ));
    assert_eq!(agreement.max_in_flight, 4);
    assert_eq!(agreement.max_pixels(), 1000);
    assert_eq!((agreement.max_width, agreement.max_height), (1920, 1080));
    assert_eq!(agreement.name.as_deref(), Some("a host"));
    assert_eq!(agreement.clock_id.as_deref(), Some(&b"its clock"[..]));
}

#[test]
fn what_says_nothing_is_as_with_a_legacy_host() {
    let silent = Hello {
        codecs: 0,
        max_message: 0,
        max_width: 0,
        max_height: 0,
        ..theirs()
    };
    let mut greeting = Greeting::new(mine());
    greeting.receive(Message::HelloResp(silent)).unwrap();
    let agreement = greeting.receive(Message::Pong).unwrap().expect("an end");
    let legacy = Agreement::legacy();
    assert_eq!(agreement.codecs, legacy.codecs);
    assert_eq!(agreement.max_message, legacy.max_message);
    let sides = |of: &Agreement| (of.max_width, of.max_height);
    assert_eq!(sides(&agreement), sides(&legacy));
}

#[test]
fn the_first_hello_resp_counts() {
    let mut greeting = Greeting::new(mine());
    greeting.receive(Message::HelloResp(theirs())).unwrap();
    let second = Hello {
        max_in_flight: 9,
        ..theirs()
    };
    greeting.receive(Message::HelloResp(second)).unwrap();
    let agreement = greeting.receive(Message::Pong).unwrap().expect("an end");
    assert_eq!(agreement.max_in_flight, 4);
}

#[test]
fn other_messages_in_between_change_nothing() {
    let mut greeting = Greeting::new(mine());
    let response = encode::frame_response(1, &FrameResponse::default(), 3);
    for message in read(&[&response[..], b"abc", &encode::ping(1)].concat()) {
        assert_eq!(greeting.receive(message).unwrap(), None);
    }
    assert!(greeting.receive(Message::Pong).unwrap().is_some());
}

#[test]
fn an_error_is_a_refusal_with_its_text() {
    for before in [None, Some(Message::HelloResp(theirs()))] {
        let mut greeting = Greeting::new(mine());
        if let Some(message) = before {
            greeting.receive(message).unwrap();
        }
        let error = ErrorMessage {
            code: ErrorCode::INVALID_MESSAGE,
            text: "no such token".to_owned(),
            tag: None,
        };
        let refusal = greeting.receive(Message::Error(error)).unwrap_err();
        assert!(matches!(refusal, GreetingError::Refused(_)));
        assert!(refusal.to_string().contains("no such token"), "{refusal}");
    }
}

#[test]
fn a_version_that_was_not_offered_is_an_error() {
    for version in [0, 2, u16::MAX] {
        let hello = Hello {
            version,
            ..theirs()
        };
        let result = Greeting::new(mine()).receive(Message::HelloResp(hello));
        assert!(
            matches!(result, Err(GreetingError::Version(said)) if said == version),
            "{result:?}"
        );
    }
}
