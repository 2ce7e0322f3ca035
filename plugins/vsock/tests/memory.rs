// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a host can make vsockenc allocate: memory for the bytes that it sends, and none for those
//! that it only announces. The tests of this file are a program of their own, as its allocator
//! counts.

use gst_check::Harness;
use helix_protocol::message::FrameResponse;
use helix_protocol::{Message, encode};
use zerocopy_test_support::allocations::{Counting, largest_request, most_in_use};
use zerocopy_test_support::peer::{KEYFRAME, Peer, Then};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes; no message of these tests has a thousandth of it.
const MUCH: usize = 256 * 1024;

/// A host's reply to a FRAME_REQUEST, in part.
struct Reply {
    bytes: Vec<u8>,
    what: String,
}

/// The fields of a FRAME_RESPONSE with a number in it: where they are in the message.
const PAYLOAD_SIZE: usize = 8;
const NAL_COUNT: usize = 32;
const NAL_SIZE: usize = 36;

fn response() -> Vec<u8> {
    let response = FrameResponse {
        is_keyframe: true,
        ..FrameResponse::default()
    };
    let head = encode::frame_response(1, &response, KEYFRAME.len() as u32);
    [&head[..], KEYFRAME].concat()
}

/// Replies that announce what does not come, as much as they may and more.
fn liars() -> Vec<Reply> {
    const MIB: u32 = 1 << 20;
    let lies: [&[(usize, u32)]; 8] = [
        &[(PAYLOAD_SIZE, u32::MAX)],
        &[(PAYLOAD_SIZE, u32::MAX), (NAL_SIZE, u32::MAX - 28)],
        &[(PAYLOAD_SIZE, 16 * MIB), (NAL_SIZE, 16 * MIB - 28)],
        &[(PAYLOAD_SIZE, 28 + 16 * MIB), (NAL_SIZE, 16 * MIB)],
        &[(NAL_COUNT, u32::MAX)],
        &[(NAL_COUNT, 4096), (PAYLOAD_SIZE, 16 * MIB)],
        &[(NAL_COUNT, 4097), (PAYLOAD_SIZE, 16 * MIB)],
        &[(NAL_SIZE, u32::MAX)],
    ];
    let lie = |lies: &[(usize, u32)]| {
        let mut bytes = response();
        for (at, number) in lies {
            bytes[*at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        let what = format!("{lies:?}");
        Reply { bytes, what }
    };
    lies.into_iter().map(lie).collect()
}

/// Replies of which one byte is another, up to the first one of H.264.
fn corrupt() -> Vec<Reply> {
    let flip = |at: usize, bits: u8| {
        let mut bytes = response();
        bytes[at] ^= bits;
        let what = format!("byte {at} ^ {bits:#x}");
        Reply { bytes, what }
    };
    (0..NAL_SIZE + 4)
        .flat_map(|at| [0x01, 0x80, 0xff].map(|bits| flip(at, bits)))
        .collect()
}

/// Has one picture encoded by a host that replies like this. How many access units come of it.
fn exchange(reply: Vec<u8>, then: Then) -> u32 {
    let peer = Peer::new(move |link, envelope| {
        if matches!(envelope.message, Message::FrameRequest(..)) {
            // It is less than any socket holds.
            assert_eq!(link.raw(&reply).unwrap(), reply.len());
            return then;
        }
        Then::GoOn
    });
    let mut harness = Harness::new_parse(&format!(
        "vsockenc tcp-host=127.0.0.1 tcp-port={} reconnect-timeout=0",
        peer.port()
    ));
    harness.set_src_caps_str("video/x-raw,format=BGRx,width=2,height=2,framerate=60/1");
    let mut buffer = gst::Buffer::from_slice([0; 16]);
    let writable = buffer.get_mut().unwrap();
    writable.set_pts(gst::ClockTime::ZERO);
    harness.push(buffer).unwrap();
    // Waits until something has become of the picture.
    harness.push_event(gst::event::Eos::new());
    harness.buffers_received()
}

#[test]
fn what_a_host_announces_takes_no_memory() {
    gst::init().unwrap();
    gstvsock::plugin_register_static().unwrap();
    let before = most_in_use();
    assert_eq!(exchange(response(), Then::GoOn), 1);
    for Reply { bytes, what } in liars().into_iter().chain(corrupt()) {
        exchange(bytes, Then::Close);
        let largest = largest_request();
        assert!(largest < MUCH, "{what}: {largest} bytes at once");
        let grown = most_in_use() - before;
        assert!(grown < 4 * MUCH, "{what}: {grown} bytes in all");
    }
}
