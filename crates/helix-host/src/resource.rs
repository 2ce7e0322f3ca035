// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures that stay where they are: FRAME_REQUESTs that name a virtio-gpu resource of the
//! client's machine instead of carrying pixels.

use std::fmt;

use helix_protocol::Address;
use helix_protocol::message::{ErrorCode, PixelFormat};

/// Finds the pixels behind resource ids: what a virtual machine monitor can do and a helix-host
/// beside a stock QEMU cannot. Given to [`crate::Config::resolver`]; HELLO_RESP then announces
/// that resource ids are resolved.
///
/// # Contract
///
/// - **Thread**: [`ResourceResolver::resolve`] is called on the thread of the client that asked,
///   for several clients at the same time. It may block for about the time of a frame. While it
///   does, that client alone is not served; when it blocks for longer than five seconds, the host
///   ends without waiting for it.
/// - **Identity**: resource ids mean something inside one virtual machine. Which one, the resolver
///   must know from the [`ClientIdentity`], never from the id, and must not resolve ids of other
///   machines: a client could watch them.
/// - **Sizes**: size, format and stride in [`Resource`] come from the client. The host has checked
///   that they fit to each other and that [`Resource::bytes`] is within its `max_frame_bytes`,
///   before the call. The resolver checks, before it reads a byte, that they fit to the resource
///   as it really is, and answers [`ResolveError::Mismatch`] where not.
/// - **Lifetime** (lesson L30): a guest may free or overwrite its memory at any time. The buffer
///   that is returned owns its bytes, or keeps them mapped and unchanged by anybody until its last
///   reference is dropped, from whichever thread. A snapshot is the plain way, and the only copy
///   on the way to the encoder; plain references to guest memory are not enough.
/// - **Layout**: at least [`Resource::bytes`] bytes of CPU-readable memory, laid out as the pixels
///   of a FRAME_REQUEST would be (docs/protocol.md). More bytes are not looked at; fewer are
///   answered with ERROR -99, and nothing is read beyond them.
/// - A panic ends that client's connection and no other.
pub trait ResourceResolver: fmt::Debug + Send + Sync {
    /// The pixels of a resource.
    fn resolve(
        &self,
        client: &ClientIdentity,
        resource: &Resource,
    ) -> Result<gst::Buffer, ResolveError>;
}

/// Who asks, as far as the host can know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientIdentity {
    /// Counts the host's connections.
    pub connection: u64,
    /// Where the host accepted it: a unix socket for each machine tells them apart.
    pub listener: Address,
    /// The machine's context id, over AF_VSOCK. The kernel vouches for it.
    pub cid: Option<u32>,
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The virtio-gpu resource id, never 0.
    pub id: u32,
    /// 1 to 8192 pixels.
    pub width: u32,
    /// 1 to 8192 pixels.
    pub height: u32,
    /// Order of the components.
    pub format: PixelFormat,
    /// Bytes from one row of the first plane to the next; the width where the format is NV12.
    pub stride: u32,
    /// Bytes of the whole picture.
    pub bytes: usize,
}

/// Why there are no pixels. The connection goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// No such resource, or not that client's. ERROR -2: clients then send pixels.
    #[error("there is no such resource")]
    NotFound,
    /// The resource is not of this size, format or stride. ERROR -1.
    #[error("{0}")]
    Mismatch(String),
    /// The resource is there, and its memory cannot be read. ERROR -4.
    #[error("{0}")]
    Unreadable(String),
}

impl ResolveError {
    /// The number for ERROR.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NotFound => ErrorCode::RESOURCE_NOT_FOUND,
            Self::Mismatch(_) => ErrorCode::INVALID_MESSAGE,
            Self::Unreadable(_) => ErrorCode::NO_NATIVE_SURFACE,
        }
    }
}
