// SPDX-License-Identifier: MIT OR Apache-2.0

//! What can go wrong, told so that somebody can do something about it.

/// Why there is no picture, or none any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// QEMU's display cannot be reached.
    #[error("cannot reach QEMU's display at {address}: {reason}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// What happened, and what to do.
        reason: String,
    },
    /// QEMU has no console of this number.
    #[error("QEMU at {address} has no console {console}, only {existing}")]
    NoConsole {
        /// Where QEMU is.
        address: String,
        /// The number that was asked for.
        console: u32,
        /// Those that there are.
        existing: String,
    },
    /// The connection has ended.
    #[error("QEMU at {address} has gone: {reason}")]
    Gone {
        /// Where it was.
        address: String,
        /// How that was noticed.
        reason: String,
    },
    /// QEMU sent what cannot be.
    #[error("QEMU sent {0}")]
    Nonsense(String),
    /// Something of this machine failed.
    #[error("{0}")]
    System(String),
}
