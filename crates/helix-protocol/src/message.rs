// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the messages say, as Rust types. [`crate::encode`] writes them, [`crate::decode`] reads
//! them. Units: sizes in pixels, strides in bytes, times in nanoseconds, bitrates in bit/s.

use std::fmt;

use crate::payload::Payload;

/// A message and the session id from its header.
///
/// The session id is 1 for encode sessions by habit, and the scanout id on SUBSCRIBE and on
/// pushed frames; a PONG echoes the one of its PING.
#[derive(Debug)]
pub struct Envelope {
    /// `session_id` of the header.
    pub session_id: u16,
    /// The message itself.
    pub message: Message,
}

/// Every message of the protocol.
#[derive(Debug)]
pub enum Message {
    /// 0x01, guest to host: encode this frame.
    FrameRequest(FrameRequest, Option<Payload>),
    /// 0x02, host to guest: one access unit in Annex B form, start codes included, the NAL units
    /// of the message joined (their boundaries are the start codes).
    FrameResponse(FrameResponse, Payload),
    /// 0x03, guest to host: make the next frame a keyframe.
    KeyframeReq,
    /// 0x04, guest to host: settings of the encoder.
    ConfigReq(Config),
    /// 0x05, host to guest: the settings in force.
    ConfigResp(Config),
    /// 0x10: asks for a PONG.
    Ping,
    /// 0x11: answers a PING.
    Pong,
    /// 0x20, guest to host: switch a scanout on.
    EnableScanout(EnableScanout),
    /// 0x21, guest to host: switch a scanout off. Has no reply.
    DisableScanout {
        /// Which one.
        scanout_id: u32,
    },
    /// 0x22, host to guest: the answer to ENABLE_SCANOUT.
    ScanoutResp(ScanoutResp),
    /// 0x30, client to host: push the frames of a scanout to me.
    Subscribe {
        /// Which one.
        scanout_id: u32,
    },
    /// 0x31, host to client: the answer to SUBSCRIBE.
    SubscribeResp {
        /// Which one.
        scanout_id: u32,
        /// Whether frames will come.
        success: bool,
    },
    /// 0x40, client to host: what I can do.
    Hello(Hello),
    /// 0x41, host to client: what I can do, in answer to a HELLO.
    HelloResp(Hello),
    /// 0xFF, host to guest: what could not be done.
    Error(ErrorMessage),
    /// A type this crate does not know; its payload was skipped, as deployed peers do.
    Unknown {
        /// The number in the header.
        msg_type: u8,
        /// Bytes skipped.
        payload_size: u32,
    },
}

/// Names a request, so that its reply can be told from others: sent by peers that both announced
/// [`Capabilities::REQUEST_IDS`], zero otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestTag {
    /// Counted up by the client at each flush; replies of an older epoch are dropped.
    pub epoch: u8,
    /// Counted up by the client at each request.
    pub request_id: u16,
}

/// The fixed part of FRAME_REQUEST.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameRequest {
    /// virtio-gpu resource that holds the pixels, or 0 when the pixels follow. A request with
    /// neither made deployed hosts encode the wrong screen; never send it.
    pub resource_id: u32,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// DRM fourcc, see [`PixelFormat`].
    pub format: u32,
    /// Bytes from one row of plane 0 to the next.
    pub stride: u32,
    /// Nanoseconds; comes back in the reply, there perhaps off by up to a microsecond.
    pub pts: i64,
    /// Nanoseconds.
    pub duration: i64,
    /// Encode as IDR, with parameter sets.
    pub force_keyframe: bool,
    /// Zero towards legacy peers.
    pub tag: RequestTag,
}

/// The fixed part of FRAME_RESPONSE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameResponse {
    /// Nanoseconds; of the request, or of the push stream.
    pub pts: i64,
    /// Nanoseconds; deployed hosts may send 0 or `i64::MIN` here.
    pub dts: i64,
    /// Whether decoding can start here.
    pub is_keyframe: bool,
    /// Zero from legacy peers.
    pub tag: RequestTag,
    /// In how many parts the access unit came. Deployed hosts send 1, with everything in it.
    pub nal_count: u32,
}

/// The payload of CONFIG_REQ and CONFIG_RESP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// bit/s.
    pub bitrate: u32,
    /// Frames, in `framerate_den` seconds.
    pub framerate_num: u32,
    /// Seconds.
    pub framerate_den: u32,
    /// H.264 `profile_idc`: 66 baseline, 77 main, 100 high.
    pub profile: u8,
    /// H.264 `level_idc`: ten times the level.
    pub level: u8,
    /// Latency goes before compression.
    pub realtime: bool,
}

/// The payload of ENABLE_SCANOUT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EnableScanout {
    /// Which one; 0 is the VM's own console.
    pub scanout_id: u32,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Hz.
    pub refresh_rate: u32,
}

/// The payload of SCANOUT_RESP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanoutResp {
    /// Which one.
    pub scanout_id: u32,
    /// Whether it is on now.
    pub success: bool,
    /// The guest's connector: "Virtual-N" with N = scanout id + 1. At most 63 bytes go out.
    pub connector: String,
}

/// The payload of ERROR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorMessage {
    /// See [`ErrorCode`].
    pub code: ErrorCode,
    /// For a person. At most 255 bytes go out.
    pub text: String,
    /// Which request it is about, where the peers agreed on tags: then the message is four bytes
    /// longer.
    pub tag: Option<RequestTag>,
}

/// The numbers in ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorCode(pub i32);

impl ErrorCode {
    /// The message makes no sense.
    pub const INVALID_MESSAGE: Self = Self(-1);
    /// No such resource id.
    pub const RESOURCE_NOT_FOUND: Self = Self(-2);
    /// The resource has no texture of the host's graphics system.
    pub const NO_NATIVE_TEXTURE: Self = Self(-3);
    /// The texture has no surface that the encoder can read.
    pub const NO_NATIVE_SURFACE: Self = Self(-4);
    /// The encoder failed.
    pub const ENCODE_FAILED: Self = Self(-5);
    /// A message that must come first has not come.
    pub const NOT_CONFIGURED: Self = Self(-6);
    /// Anything else.
    pub const INTERNAL: Self = Self(-99);
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match *self {
            Self(0) => "ok",
            Self::INVALID_MESSAGE => "invalid message",
            Self::RESOURCE_NOT_FOUND => "resource not found",
            Self::NO_NATIVE_TEXTURE => "no native texture",
            Self::NO_NATIVE_SURFACE => "no native surface",
            Self::ENCODE_FAILED => "encode failed",
            Self::NOT_CONFIGURED => "not configured",
            Self::INTERNAL => "internal error",
            _ => "unknown error code",
        };
        write!(f, "{text} ({})", self.0)
    }
}

/// The only version of HELLO so far.
pub const HELLO_VERSION: u16 = 1;
/// The bit of H.264 in [`Hello::codecs`].
pub const CODEC_H264: u32 = 1 << 0;

/// What a peer says of itself in HELLO and HELLO_RESP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// 1 today; the lower of both peers' counts.
    pub version: u16,
    /// Requests that may be open at once.
    pub max_in_flight: u16,
    /// What the peer can do.
    pub capabilities: Capabilities,
    /// Bit 0 H.264, 1 H.265, 2 AV1.
    pub codecs: u32,
    /// Bytes of the largest message it takes, header included.
    pub max_message: u32,
    /// Pixels.
    pub max_width: u16,
    /// Pixels.
    pub max_height: u16,
    /// Who it is, for logs.
    pub name: Option<String>,
    /// Which encoder it uses, for logs.
    pub encoder: Option<String>,
    /// What lets the client in.
    pub auth_token: Option<AuthToken>,
    /// Which clock the timestamps of pushed frames are of.
    pub clock_id: Option<Vec<u8>>,
}

/// The capability bits of HELLO.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Request ids and epochs, see [`RequestTag`].
    pub const REQUEST_IDS: Self = Self(1 << 0);
    /// CONFIG_REQ is answered with CONFIG_RESP.
    pub const CONFIG_RESP: Self = Self(1 << 1);
    /// KEYFRAME_REQ is honoured.
    pub const KEYFRAME_REQ: Self = Self(1 << 2);
    /// virtio-gpu resource ids are resolved.
    pub const RESOURCE_IDS: Self = Self(1 << 3);
    /// Decoding is offered.
    pub const DECODE: Self = Self(1 << 4);
    /// Descriptors may be passed.
    pub const FD_PASSING: Self = Self(1 << 5);
    /// LZ4 pixels are understood.
    pub const LZ4: Self = Self(1 << 6);
    /// Damaged rectangles are understood.
    pub const DAMAGE: Self = Self(1 << 7);
    /// Pushed frames carry their capture time.
    pub const CAPTURE_PTS: Self = Self(1 << 8);

    /// The bits that both have: what two peers may use.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The bits that either has.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all bits of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A secret: it does not print itself.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthToken(pub Vec<u8>);

impl AuthToken {
    /// Bytes of a token. With other TLVs it must fit into a HELLO, which has at most 4096.
    pub const MAX_SIZE: usize = 1024;
}

impl fmt::Debug for AuthToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthToken(..)")
    }
}

/// The pixel formats of the protocol. The numbers are DRM fourccs (drm_fourcc.h), which name the
/// components of a little-endian word; the names here give the order in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelFormat {
    /// B, G, R, A or unused: DRM_FORMAT_ARGB8888, "AR24".
    Bgra,
    /// R, G, B, A or unused: DRM_FORMAT_ABGR8888, "AB24".
    Rgba,
    /// A plane of Y, a plane of U and V in turn at half the size: DRM_FORMAT_NV12.
    Nv12,
}

impl PixelFormat {
    /// The DRM fourcc.
    pub const fn fourcc(self) -> u32 {
        match self {
            Self::Bgra => 0x3432_5241,
            Self::Rgba => 0x3432_4241,
            Self::Nv12 => 0x3231_564e,
        }
    }

    /// The format of a DRM fourcc, if the protocol has it.
    pub const fn from_fourcc(fourcc: u32) -> Option<Self> {
        match fourcc {
            0x3432_5241 => Some(Self::Bgra),
            0x3432_4241 => Some(Self::Rgba),
            0x3231_564e => Some(Self::Nv12),
            _ => None,
        }
    }
}
