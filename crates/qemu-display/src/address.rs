// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a QEMU's display is.

use std::fmt;
use std::path::PathBuf;

/// Where a QEMU's display is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// The session bus: `-display dbus`.
    SessionBus,
    /// The bus of this D-Bus address: `-display dbus,addr=ADDRESS`.
    Bus(String),
    /// No bus. The QMP socket of a QEMU with `-display dbus,p2p=on`.
    Qmp(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SessionBus => f.write_str("the session bus"),
            Self::Bus(address) => write!(f, "D-Bus address {address}"),
            Self::Qmp(path) => write!(f, "QMP socket {}", path.display()),
        }
    }
}
