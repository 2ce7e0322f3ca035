// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a peer listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// TCP port of deployed hosts.
pub const DEFAULT_TCP_PORT: u16 = 15937;
/// AF_VSOCK port of deployed hosts.
pub const DEFAULT_VSOCK_PORT: u32 = 5000;
/// AF_VSOCK context id of the host, seen from a guest (VMADDR_CID_HOST in linux/vm_sockets.h).
pub const VSOCK_CID_HOST: u32 = 2;
/// AF_VSOCK context id of the machine itself (VMADDR_CID_LOCAL in linux/vm_sockets.h).
pub const VSOCK_CID_LOCAL: u32 = 1;
/// Every context id of this machine (VMADDR_CID_ANY in linux/vm_sockets.h).
pub const VSOCK_CID_ANY: u32 = u32::MAX;

/// Where a host listens or a client connects.
///
/// As text: `tcp:HOST:PORT` (an IPv6 address in brackets), `unix:PATH`, `vsock:PORT` or
/// `vsock:CID:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host name, IPv4 or IPv6 address, and a port.
    Tcp {
        /// Without brackets.
        host: String,
        /// 0 lets the system choose, when listening.
        port: u16,
    },
    /// A unix stream socket.
    Unix(PathBuf),
    /// AF_VSOCK.
    Vsock {
        /// [`VSOCK_CID_ANY`] when listening.
        cid: u32,
        /// Not a TCP port: 32 bits.
        port: u32,
    },
}

/// Why a text is no [`Address`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no address: {reason} (tcp:HOST:PORT, unix:PATH, vsock:PORT or vsock:CID:PORT)"
)]
pub struct ParseAddressError {
    text: String,
    reason: &'static str,
}

impl FromStr for Address {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        parse(text).map_err(|reason| ParseAddressError {
            text: text.to_owned(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<Address, &'static str> {
    let (kind, rest) = text.split_once(':').ok_or("it does not say which kind")?;
    match kind {
        "tcp" => {
            let (host, port) = rest.rsplit_once(':').ok_or("the port is missing")?;
            let port = port
                .parse()
                .map_err(|_| "the port is not a number from 0 to 65535")?;
            let host = match host
                .strip_prefix('[')
                .and_then(|host| host.strip_suffix(']'))
            {
                Some(inner) => inner,
                None if host.contains(':') => return Err("an IPv6 address needs brackets"),
                None => host,
            };
            if host.is_empty() {
                return Err("the host is missing");
            }
            Ok(Address::Tcp {
                host: host.to_owned(),
                port,
            })
        }
        "unix" if rest.is_empty() => Err("the path is missing"),
        "unix" => Ok(Address::Unix(rest.into())),
        "vsock" => {
            let (cid, port) = match rest.split_once(':') {
                Some((cid, port)) => (cid.parse().map_err(|_| "the CID is not a number")?, port),
                None => (VSOCK_CID_ANY, rest),
            };
            let port = port.parse().map_err(|_| "the port is not a number")?;
            Ok(Address::Vsock { cid, port })
        }
        _ => Err("its kind is none of tcp, unix and vsock"),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => {
                write!(f, "tcp:[{host}]:{port}")
            }
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Vsock {
                cid: VSOCK_CID_ANY,
                port,
            } => write!(f, "vsock:{port}"),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        for text in [
            "tcp:127.0.0.1:15937",
            "tcp:host.example:0",
            "tcp:[::1]:15937",
            "tcp:[fe80::1%eth0]:15937",
            "unix:/run/x.sock",
            "unix:relative:with:colons",
            "vsock:5000",
            "vsock:2:5000",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "which kind"),
            ("15937", "which kind"),
            ("udp:1.2.3.4:5", "none of"),
            ("tcp:host", "port is missing"),
            ("tcp::1", "host is missing"),
            ("tcp:::1:5", "brackets"),
            ("tcp:host:65536", "65535"),
            ("unix:", "path is missing"),
            ("vsock:x", "port"),
            ("vsock:-1:5000", "CID"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
