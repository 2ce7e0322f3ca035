// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a QEMU is, as the command line says it.

use std::str::FromStr;

use qemu_display::Address;

/// `dbus:ADDRESS` or `qmp:SOCKET`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuAddress(pub Address);

impl FromStr for QemuAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("dbus", address)) if !address.is_empty() => {
                Ok(Self(Address::Bus(address.to_owned())))
            }
            Some(("qmp", path)) if !path.is_empty() => Ok(Self(Address::Qmp(path.into()))),
            _ => Err(
                "it must be dbus:ADDRESS, where QEMU has -display dbus,addr=ADDRESS, or \
                 qmp:SOCKET, where it has -display dbus,p2p=on and -qmp unix:SOCKET,server=on,\
                 wait=off"
                    .to_owned(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_a_bus_or_a_socket() {
        let parsed = |text: &str| text.parse::<QemuAddress>().map(|address| address.0);
        assert_eq!(
            parsed("dbus:unix:path=/run/bus"),
            Ok(Address::Bus("unix:path=/run/bus".to_owned()))
        );
        assert_eq!(parsed("qmp:/run/a:b"), Ok(Address::Qmp("/run/a:b".into())));
        for text in ["", "dbus", "dbus:", "qmp:", "vnc:1", "/run/qmp"] {
            assert!(parsed(text).is_err(), "{text}");
        }
    }
}
