// SPDX-License-Identifier: MIT OR Apache-2.0

//! What can be wrong with bytes from a peer.

/// Why bytes are not a message. The stream cannot be followed after any of these: close it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The four bytes that start every message are others: the peer speaks another protocol, or
    /// part of a message got lost.
    #[error(
        "header: magic is {found:#010x} instead of 0x52465848 \
         (another protocol, or the stream lost part of a message)"
    )]
    BadMagic {
        /// What stands there.
        found: u32,
    },
    /// A number is over what this side accepts.
    #[error("{message}: {field} is {value}, over the limit of {limit}")]
    OverLimit {
        /// Name of the message type.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
        /// What stands there.
        value: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// A number is under what the message needs.
    #[error("{message}: {field} is {value}, the message needs {needed}")]
    TooSmall {
        /// Name of the message type.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
        /// What stands there.
        value: u64,
        /// The least that makes sense.
        needed: u64,
    },
    /// Bytes of the payload belong to no field.
    #[error("{message}: {count} bytes after {field} belong to nothing")]
    Trailing {
        /// Name of the message type.
        message: &'static str,
        /// The last field that was understood.
        field: &'static str,
        /// How many bytes are too many.
        count: u64,
    },
    /// The stream ended inside a message.
    #[error("the stream ended inside {message}, in {field}: {missing} bytes are missing")]
    Truncated {
        /// Name of the message type.
        message: &'static str,
        /// The field that is not whole.
        field: &'static str,
        /// How many bytes that field still needs.
        missing: u64,
    },
}
