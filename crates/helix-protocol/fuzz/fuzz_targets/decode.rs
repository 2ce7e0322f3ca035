// SPDX-License-Identifier: MIT OR Apache-2.0

//! Any bytes in any split: the decoder gives messages or one error, the same for every split, and
//! never more bytes than it was given.
//!
//! The first byte of the input says in which pieces the rest arrives.
#![no_main]

use helix_protocol::Limits;
use helix_protocol::decode::Decoder;
use libfuzzer_sys::fuzz_target;

/// What came of a stream: each message, then the error if there was one, as text.
fn decode(mut bytes: &[u8], piece: usize) -> Vec<String> {
    let mut decoder = Decoder::new(Limits::default());
    let mut seen = Vec::new();
    loop {
        loop {
            match decoder.next() {
                Ok(Some(envelope)) => seen.push(format!("{envelope:?}")),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.next().unwrap_err(), error, "an error stays");
                    seen.push(error.to_string());
                    return seen;
                }
            }
        }
        if bytes.is_empty() {
            seen.push(format!("{:?}", decoder.finish().is_ok()));
            return seen;
        }
        let space = decoder.space();
        let count = space.len().min(piece).min(bytes.len());
        assert!(count > 0, "there is always space");
        space[..count].copy_from_slice(&bytes[..count]);
        decoder.advance(count);
        bytes = &bytes[count..];
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&piece, stream)) = data.split_first() else {
        return;
    };
    let split = decode(stream, usize::from(piece).max(1));
    assert_eq!(
        split,
        decode(stream, usize::MAX),
        "the split does not matter"
    );
});
