// SPDX-License-Identifier: MIT OR Apache-2.0

//! How much memory a peer can make the decoder take, counted by an allocator of this program's
//! own. Counts are per thread, as tests run side by side.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use helix_protocol::decode::STAGE;
use helix_protocol::message::{ErrorMessage, FrameRequest, FrameResponse};
use helix_protocol::{Decoder, Limits, Message, Payload, encode};
use proptest::prelude::*;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

impl Counting {
    fn grew(by: isize) {
        // A thread that ends frees memory after its counters are gone.
        let _ = LIVE.try_with(|live| {
            live.set(live.get() + by);
            PEAK.with(|peak| peak.set(peak.get().max(live.get())));
        });
    }

    fn called() {
        let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
    }
}

// SAFETY: every call goes on to the system's allocator unchanged; the counters touch no memory
// that is handed out, and allocate none (they are `const` thread locals without destructors).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::called();
        Self::grew(layout.size() as isize);
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        Self::grew(-(layout.size() as isize));
        // SAFETY: `ptr` came from `System` through this allocator.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        Self::called();
        // The old block may be there until the new one is filled.
        Self::grew(new_size as isize);
        // SAFETY: `ptr` came from `System` through this allocator.
        let new = unsafe { System.realloc(ptr, layout, new_size) };
        Self::grew(-(layout.size() as isize));
        new
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that were live at most during `work`, beyond those before it.
fn peak(work: impl FnOnce()) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    work();
    (PEAK.get() - before) as usize
}

/// Calls that took memory during `work`.
fn calls(work: impl FnOnce()) -> usize {
    let before = CALLS.get();
    work();
    CALLS.get() - before
}

/// Puts all of `bytes` into the decoder, and drops what comes out.
fn feed(decoder: &mut Decoder, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let space = decoder.space();
        let count = space.len().min(bytes.len());
        space[..count].copy_from_slice(&bytes[..count]);
        decoder.advance(count);
        bytes = &bytes[count..];
        while decoder.next().unwrap().is_some() {}
    }
    // As a connection does before it reads: where would more go?
    assert!(!decoder.space().is_empty());
}

/// The stage, the first piece of a payload, and change.
const CONSTANT: usize = STAGE + 64 * 1024 + 1024;

const ANNOUNCED: u32 = 64 * 1024 * 1024;

fn limits() -> Limits {
    Limits {
        access_unit: ANNOUNCED,
        hello: ANNOUNCED,
        ..Limits::default()
    }
}

/// The beginnings of the largest message of each type that has a large one.
fn large_messages() -> Vec<(&'static str, Vec<u8>)> {
    let header = |msg_type: u8| {
        let size = ANNOUNCED.to_le_bytes();
        [&b"HXFR"[..], &[msg_type, 0, 1, 0], &size].concat()
    };
    let unit = ANNOUNCED - 4 * limits().nal_count;
    vec![
        (
            "pixels",
            encode::frame_request(1, &FrameRequest::default(), ANNOUNCED).to_vec(),
        ),
        (
            "access unit",
            encode::frame_response(1, &FrameResponse::default(), unit).to_vec(),
        ),
        ("HELLO", header(0x40)),
        ("HELLO_RESP", header(0x41)),
        ("unknown", header(0x77)),
    ]
}

#[test]
fn an_announcement_alone_takes_little_memory() {
    for (name, head) in large_messages() {
        let taken = peak(|| {
            let mut decoder = Decoder::new(limits());
            feed(&mut decoder, &head);
            // The header alone, with nothing of the fixed part, too.
            let mut decoder = Decoder::new(limits());
            feed(&mut decoder, &head[..12]);
        });
        assert!(taken <= 2 * CONSTANT, "{name}: {taken} bytes");
    }
}

#[test]
fn many_announced_units_take_little_memory() {
    let limits = limits();
    let mut bytes = encode::frame_response(1, &FrameResponse::default(), 1 << 20).to_vec();
    bytes[32..36].copy_from_slice(&limits.nal_count.to_le_bytes());
    bytes[36..40].copy_from_slice(&1000_u32.to_le_bytes());
    let taken = peak(|| feed(&mut Decoder::new(limits), &bytes));
    assert!(taken <= CONSTANT, "{taken} bytes");
}

#[test]
fn memory_follows_the_bytes_received_and_not_those_announced() {
    let megabyte = vec![0; 1 << 20];
    for (name, head) in large_messages() {
        let mut received = 0;
        let taken = peak(|| {
            let mut decoder = Decoder::new(limits());
            feed(&mut decoder, &head);
            for _ in 0..5 {
                feed(&mut decoder, &megabyte);
                received += megabyte.len();
            }
        });
        // A buffer doubles, and the old half lives while it is copied.
        assert!(taken <= 4 * received + CONSTANT, "{name}: {taken} bytes");
        if name == "unknown" {
            assert!(taken <= CONSTANT, "{name}: {taken} bytes are kept");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_a_peer_sends_takes_more_memory_than_its_bytes(
        headers in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u32>()), 1..20),
        noise in proptest::collection::vec(any::<u8>(), 0..5000),
    ) {
        let mut bytes = Vec::new();
        for (msg_type, flags, size) in headers {
            bytes.extend_from_slice(b"HXFR");
            bytes.extend_from_slice(&[msg_type, flags, 0, 0]);
            bytes.extend_from_slice(&(size % 2000).to_le_bytes());
            bytes.extend(noise.iter().cycle().take((size % 2000) as usize));
        }
        let taken = peak(|| {
            let mut decoder = Decoder::new(Limits::default());
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let space = decoder.space();
                let count = space.len().min(rest.len());
                space[..count].copy_from_slice(&rest[..count]);
                decoder.advance(count);
                rest = &rest[count..];
                loop {
                    match decoder.next() {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => return,
                    }
                }
            }
        });
        prop_assert!(taken <= 4 * bytes.len() + 2 * CONSTANT, "{taken} for {}", bytes.len());
    }
}

fn frame_stream(frame: &[u8]) -> Vec<u8> {
    let head = encode::frame_request(1, &FrameRequest::default(), frame.len() as u32);
    let unit = encode::frame_response(1, &FrameResponse::default(), frame.len() as u32 / 4);
    let ping = encode::ping(1);
    [&head, frame, &ping, &unit, &frame[..frame.len() / 4], &ping].concat()
}

#[test]
fn a_stream_of_frames_takes_no_memory_once_it_flows() {
    let bytes = frame_stream(&vec![3; 400_000]);
    let mut decoder = Decoder::new(Limits::default());
    feed(&mut decoder, &bytes);
    feed(&mut decoder, &bytes);
    let calls = calls(|| {
        for _ in 0..30 {
            feed(&mut decoder, &bytes);
        }
    });
    assert_eq!(calls, 0);
}

#[test]
fn frames_held_for_a_while_take_no_new_memory_either() {
    let pixels = vec![3; 100_000];
    let head = encode::frame_request(1, &FrameRequest::default(), pixels.len() as u32);
    let bytes = [&head[..], &pixels].concat();
    let mut decoder = Decoder::new(Limits::default());
    let mut frames: std::collections::VecDeque<Payload> = std::collections::VecDeque::new();
    let mut pass = |decoder: &mut Decoder| {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let space = decoder.space();
            let count = space.len().min(rest.len());
            space[..count].copy_from_slice(&rest[..count]);
            decoder.advance(count);
            rest = &rest[count..];
            while let Some(envelope) = decoder.next().unwrap() {
                let Message::FrameRequest(_, Some(pixels)) = envelope.message else {
                    panic!("{envelope:?}");
                };
                frames.push_back(pixels);
                if frames.len() > 2 {
                    frames.pop_front();
                }
            }
        }
    };
    for _ in 0..4 {
        pass(&mut decoder);
    }
    let calls = calls(|| {
        for _ in 0..30 {
            pass(&mut decoder);
        }
    });
    assert_eq!(calls, 0);
}

#[test]
fn memory_of_large_frames_goes_back_when_the_frames_become_small() {
    let mut decoder = Decoder::new(Limits::default());
    let large = vec![3; 8 << 20];
    let head = encode::frame_request(1, &FrameRequest::default(), large.len() as u32);
    let before = LIVE.get();
    {
        // Four at once, as a client with several requests in flight has them.
        let mut frames = Vec::new();
        for _ in 0..4 {
            let bytes = [&head[..], &large].concat();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let space = decoder.space();
                let count = space.len().min(rest.len());
                space[..count].copy_from_slice(&rest[..count]);
                decoder.advance(count);
                rest = &rest[count..];
                frames.extend(decoder.next().unwrap());
            }
        }
        assert_eq!(frames.len(), 4);
    }
    let small = frame_stream(&[3; 4000]);
    for _ in 0..4 {
        feed(&mut decoder, &small);
    }
    let kept = LIVE.get() - before;
    assert!(kept < 1 << 20, "{kept} bytes are still held");
}

#[test]
fn encoding_takes_no_memory() {
    let error = ErrorMessage {
        code: helix_protocol::message::ErrorCode::INTERNAL,
        text: "text".to_owned(),
        tag: None,
    };
    let calls = calls(|| {
        std::hint::black_box(encode::frame_request(1, &FrameRequest::default(), 1 << 20));
        std::hint::black_box(encode::frame_response(1, &FrameResponse::default(), 1000));
        std::hint::black_box(encode::error(1, &error));
    });
    assert_eq!(calls, 0);
}
