// SPDX-License-Identifier: MIT OR Apache-2.0

//! The bytes on the wire: numbers of message types, and one packed little-endian struct for each
//! fixed-size layout in docs/protocol.md. Private: the rest of the crate turns these into the
//! types of [`crate::message`].

use zerocopy::little_endian::{I32, I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// 'HXFR': these four bytes in memory order are 48 58 46 52.
pub const MAGIC: u32 = 0x5246_5848;

pub const HEADER_SIZE: usize = size_of::<Header>();

pub const FRAME_REQUEST: u8 = 0x01;
pub const FRAME_RESPONSE: u8 = 0x02;
pub const KEYFRAME_REQ: u8 = 0x03;
pub const CONFIG_REQ: u8 = 0x04;
pub const CONFIG_RESP: u8 = 0x05;
pub const PING: u8 = 0x10;
pub const PONG: u8 = 0x11;
pub const ENABLE_SCANOUT: u8 = 0x20;
pub const DISABLE_SCANOUT: u8 = 0x21;
pub const SCANOUT_RESP: u8 = 0x22;
pub const SUBSCRIBE: u8 = 0x30;
pub const SUBSCRIBE_RESP: u8 = 0x31;
pub const HELLO: u8 = 0x40;
pub const HELLO_RESP: u8 = 0x41;
pub const ERROR: u8 = 0xff;

/// Flag of `FRAME_REQUEST`: raw pixels follow the fixed part.
pub const FLAG_PIXEL_DATA: u8 = 0x01;

macro_rules! wire_struct {
    ($(#[$meta:meta])* $name:ident, $size:literal { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $(pub $field: $type),*
        }
        const _: () = assert!(size_of::<$name>() == $size);

        impl Layout for $name {
            const FIELDS: &[(&str, usize)] = &[$((
                stringify!($field),
                std::mem::offset_of!($name, $field) + size_of::<$type>(),
            )),*];
        }
    };
}

/// Names and ends of a struct's fields, so that an error can say which one is not whole.
pub trait Layout {
    /// Name of each field, and the offset of the byte after it, in order.
    const FIELDS: &[(&str, usize)];
}

/// The first of `fields` that `received` bytes do not hold whole, and how many bytes it lacks.
pub fn unfinished(
    fields: &[(&'static str, usize)],
    received: usize,
) -> Option<(&'static str, usize)> {
    fields
        .iter()
        .find(|&&(_, end)| end > received)
        .map(|&(name, end)| (name, end - received))
}

/// The fields that a message of this type begins with, before pixels, NAL units or TLVs.
pub fn fixed_fields(msg_type: u8) -> &'static [(&'static str, usize)] {
    match msg_type {
        FRAME_REQUEST => FrameRequest::FIELDS,
        FRAME_RESPONSE => FrameResponse::FIELDS,
        CONFIG_REQ | CONFIG_RESP => Config::FIELDS,
        ENABLE_SCANOUT => EnableScanout::FIELDS,
        DISABLE_SCANOUT | SUBSCRIBE => ScanoutId::FIELDS,
        SCANOUT_RESP => ScanoutResp::FIELDS,
        SUBSCRIBE_RESP => SubscribeResp::FIELDS,
        HELLO | HELLO_RESP => Hello::FIELDS,
        ERROR => Error::FIELDS,
        _ => &[],
    }
}

wire_struct!(Header, 12 {
    magic: U32,
    msg_type: u8,
    flags: u8,
    session_id: U16,
    payload_size: U32,
});

wire_struct!(
    /// The request tag lies in what legacy peers call reserved bytes.
    FrameRequest, 44 {
    resource_id: U32,
    width: U32,
    height: U32,
    format: U32,
    stride: U32,
    pts: I64,
    duration: I64,
    force_keyframe: u8,
    epoch: u8,
    request_id: U16,
    reserved: [u8; 4],
});

wire_struct!(FrameResponse, 24 {
    pts: I64,
    dts: I64,
    is_keyframe: u8,
    epoch: u8,
    request_id: U16,
    nal_count: U32,
});

wire_struct!(Config, 28 {
    width: U32,
    height: U32,
    bitrate: U32,
    framerate_num: U32,
    framerate_den: U32,
    profile: u8,
    level: u8,
    realtime: u8,
    reserved: [u8; 5],
});

wire_struct!(EnableScanout, 16 {
    scanout_id: U32,
    width: U32,
    height: U32,
    refresh_rate: U32,
});

wire_struct!(ScanoutId, 4 { scanout_id: U32 });

wire_struct!(ScanoutResp, 72 {
    scanout_id: U32,
    success: U32,
    connector: [u8; 64],
});

wire_struct!(SubscribeResp, 8 {
    scanout_id: U32,
    success: U32,
});

wire_struct!(Error, 260 {
    error_code: I32,
    message: [u8; 256],
});

wire_struct!(
    /// What ERROR grows by where both peers announced request ids.
    ErrorTag, 4 {
    epoch: u8,
    reserved: u8,
    request_id: U16,
});

wire_struct!(Hello, 32 {
    version: U16,
    fixed_size: U16,
    max_in_flight: U16,
    reserved_0: U16,
    capabilities: U64,
    codecs: U32,
    max_message: U32,
    max_width: U16,
    max_height: U16,
    reserved_1: U32,
});

wire_struct!(Tlv, 4 {
    kind: U16,
    length: U16,
});

pub const TLV_NAME: u16 = 1;
pub const TLV_ENCODER: u16 = 2;
pub const TLV_AUTH_TOKEN: u16 = 3;
pub const TLV_CLOCK_ID: u16 = 4;

/// The name of a message type as docs/protocol.md writes it.
pub fn name(msg_type: u8) -> &'static str {
    match msg_type {
        FRAME_REQUEST => "FRAME_REQUEST",
        FRAME_RESPONSE => "FRAME_RESPONSE",
        KEYFRAME_REQ => "KEYFRAME_REQ",
        CONFIG_REQ => "CONFIG_REQ",
        CONFIG_RESP => "CONFIG_RESP",
        PING => "PING",
        PONG => "PONG",
        ENABLE_SCANOUT => "ENABLE_SCANOUT",
        DISABLE_SCANOUT => "DISABLE_SCANOUT",
        SCANOUT_RESP => "SCANOUT_RESP",
        SUBSCRIBE => "SUBSCRIBE",
        SUBSCRIBE_RESP => "SUBSCRIBE_RESP",
        HELLO => "HELLO",
        HELLO_RESP => "HELLO_RESP",
        ERROR => "ERROR",
        _ => "unknown message",
    }
}
