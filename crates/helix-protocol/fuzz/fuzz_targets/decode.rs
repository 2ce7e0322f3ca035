// SPDX-License-Identifier: MIT OR Apache-2.0

//! A stream from a hostile peer.
//!
//! The first byte of the input says how long a list of piece sizes follows it; the rest is the
//! stream. Whatever it is: nothing panics, the pieces make no difference, and what was understood
//! can be said again.

#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

use common::{content, decode, encode};
use helix_protocol::{Limits, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&count, rest)) = data.split_first() else {
        return;
    };
    let (pieces, stream) = rest.split_at(usize::from(count % 32).min(rest.len()));
    let pieces: Vec<_> = pieces.iter().map(|&piece| usize::from(piece) + 1).collect();

    let (whole, whole_end) = decode(Limits::default(), stream, &[]);
    let (split, split_end) = decode(Limits::default(), stream, &pieces);
    assert_eq!(whole_end, split_end, "the pieces change how it ends");
    assert_eq!(
        whole.len(),
        split.len(),
        "the pieces change how many messages there are"
    );
    for (one, other) in whole.iter().zip(&split) {
        assert_eq!(content(one), content(other), "the pieces change a message");
    }

    for message in &whole {
        let Some(bytes) = encode(message) else {
            continue;
        };
        // Broken UTF-8 in a HELLO comes out as replacement characters, three bytes for one.
        let limits = Limits {
            hello: 3 * Limits::default().hello,
            ..Limits::default()
        };
        let (mut again, end) = decode(limits, &bytes, &pieces);
        assert_eq!(end, Ok(()), "what we send for {message:?} is no message");
        assert_eq!(again.len(), 1);
        let again = again.remove(0);
        assert_eq!(
            encode(&again).as_ref(),
            Some(&bytes),
            "our own form is not stable"
        );
        if is_canonical(&message.message) {
            assert_eq!(content(message), content(&again), "we say something else");
        }
    }
});

/// Whether our own way to write a message says all that was read. Other ways to write the same:
/// an access unit in several parts, PIXEL_DATA without pixels, a session id that contradicts the
/// scanout id beside it, text that is cut or made of replacement characters.
fn is_canonical(message: &Message) -> bool {
    let text = |text: &str, room: usize| text.len() < room;
    match message {
        Message::FrameRequest(_, pixels) => pixels.as_ref().is_none_or(|p| !p.is_empty()),
        Message::FrameResponse(response, _) => response.nal_count == 1,
        Message::Subscribe { .. } | Message::SubscribeResp { .. } => false,
        Message::ScanoutResp(resp) => text(&resp.connector, 64),
        Message::Error(error) => text(&error.text, 256),
        _ => true,
    }
}
