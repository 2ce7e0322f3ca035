// SPDX-License-Identifier: MIT OR Apache-2.0

//! HELLO: what this host says of itself, and what it then uses towards a client (docs/protocol.md).

use helix_protocol::connection::Body;
use helix_protocol::encode::Head;
use helix_protocol::message::{
    CODEC_H264, Capabilities, ErrorCode, HELLO_VERSION, Hello, RequestTag,
};

use crate::access_unit::AccessUnit;
use crate::client::Host;
use crate::picture::MAX_SIDE;

/// Requests and replies of one client at once. Beyond this nothing more is read from it.
pub const OPEN: usize = 16;
/// The clock of pushed frames' times (clock_gettime(2)).
const CLOCK: &[u8] = b"CLOCK_MONOTONIC";

/// What host and client both announced. Without HELLO: nothing.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The bits of both.
    pub capabilities: Capabilities,
    /// Bytes of the largest message that the client takes, header included.
    pub max_message: u32,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            capabilities: Capabilities::default(),
            max_message: u32::MAX,
        }
    }
}

impl Terms {
    /// Whether the client takes a message as large as this one.
    pub fn check_size(&self, head: &Head, unit: &AccessUnit) -> Result<(), String> {
        let size = head.len() + unit.size();
        if size <= self.max_message as usize {
            return Ok(());
        }
        Err(format!(
            "the picture takes {size} bytes, over the max_message of {} that the client's HELLO \
             announced; a lower bitrate makes it smaller",
            self.max_message
        ))
    }

    /// The tag of a reply or an ERROR about a request with this one.
    pub fn tag(&self, request: RequestTag) -> Option<RequestTag> {
        self.capabilities
            .contains(Capabilities::REQUEST_IDS)
            .then_some(request)
    }
}

/// Why a HELLO is not accepted: for the ERROR before the connection is closed.
pub type Refusal = (ErrorCode, String);

/// The answer to a client's HELLO, and what is agreed by it.
pub fn answer(host: &Host, hello: &Hello) -> Result<(Hello, Terms), Refusal> {
    let invalid = |text: String| (ErrorCode::INVALID_MESSAGE, text);
    if hello.version == 0 {
        return Err(invalid("HELLO: version is 0, must be 1 or more".to_owned()));
    }
    if hello.codecs != 0 && hello.codecs & CODEC_H264 == 0 {
        return Err(invalid(format!(
            "HELLO: codecs is {:#x}, and this host has only H.264 (bit 0)",
            hello.codecs
        )));
    }
    if let Some(token) = &host.token
        && !token.admits(hello.auth_token.as_ref())
    {
        let text = match hello.auth_token {
            Some(_) => {
                // Once a connection, which ends by it: somebody may be guessing.
                tracing::warn!("HELLO with a wrong token");
                "HELLO: the auth token is wrong"
            }
            None => "HELLO: the auth token is missing, and this host wants one",
        };
        return Err(invalid(text.to_owned()));
    }
    let own = capabilities(host);
    let terms = Terms {
        capabilities: own.and(hello.capabilities),
        max_message: match hello.max_message {
            0 => u32::MAX,
            limit => limit,
        },
    };
    let side = MAX_SIDE as u16;
    let response = Hello {
        version: HELLO_VERSION.min(hello.version),
        max_in_flight: OPEN as u16,
        capabilities: own,
        codecs: CODEC_H264,
        max_message: host.max_message(),
        max_width: side,
        max_height: side,
        name: Some(concat!("helix-host ", env!("CARGO_PKG_VERSION")).to_owned()),
        encoder: Some(host.encoder.name().to_string()),
        auth_token: None,
        clock_id: Some(CLOCK.to_vec()),
    };
    Ok((response, terms))
}

/// What this host can do.
fn capabilities(host: &Host) -> Capabilities {
    let always = Capabilities::REQUEST_IDS
        .or(Capabilities::CONFIG_RESP)
        .or(Capabilities::KEYFRAME_REQ)
        .or(Capabilities::CAPTURE_PTS);
    match host.resolver {
        Some(_) => always.or(Capabilities::RESOURCE_IDS),
        None => always,
    }
}
