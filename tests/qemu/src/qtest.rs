// SPDX-License-Identifier: MIT OR Apache-2.0

//! A machine of a real QEMU without a guest: its processor stands still, and a test does what one
//! would, over QEMU's qtest protocol (its docs/devel/testing/qtest.rst).
//!
//! So pictures and cursors are there when a test wants them, and on an emulated processor as well.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::eventually;

/// Where the card that a test programs is: device 2 of PCI's first bus.
pub(crate) const SLOT: &str = "addr=2";
const CONFIGURATION: u32 = 1 << 31 | 2 << 11;
/// Ports of PCI's configuration space: address and data.
const PCI: (u32, u32) = (0xcf8, 0xcfc);

/// The machine.
pub(crate) struct Qtest {
    commands: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Qtest {
    /// Takes over a QEMU that has just started.
    pub fn connect(socket: &Path) -> Self {
        // QEMU makes it some time after QMP's.
        let commands = eventually("a qtest socket", || UnixStream::connect(socket).ok());
        commands.set_read_timeout(Some(crate::LIMIT)).unwrap();
        let answers = BufReader::new(commands.try_clone().unwrap());
        Self { commands, answers }
    }

    /// Writes a register of the card's PCI configuration.
    pub fn configure(&mut self, register: u32, value: u32) {
        self.port('l', PCI.0, CONFIGURATION | register);
        self.port('l', PCI.1, value);
    }

    /// Writes to a port; `width` is b, w or l, for 8, 16 or 32 bits.
    pub fn port(&mut self, width: char, port: u32, value: u32) {
        self.command(&format!("out{width} {port:#x} {value:#x}"));
    }

    /// Writes a number to an address; `width` may be q as well, for 64 bits.
    pub fn write(&mut self, width: char, address: u32, value: u64) {
        self.command(&format!("write{width} {address:#x} {value:#x}"));
    }

    /// Reads 16 bits from an address.
    pub fn read_16(&mut self, address: u32) -> u16 {
        let answer = self.command(&format!("readw {address:#x}"));
        u64::from_str_radix(answer.trim_start_matches("0x"), 16).expect("a number") as u16
    }

    /// Writes bytes to an address.
    pub fn write_bytes(&mut self, address: u32, bytes: &[u8]) {
        let mut line = format!("write {address:#x} {:#x} 0x", bytes.len());
        for byte in bytes {
            let _ = write!(line, "{byte:02x}");
        }
        self.command(&line);
    }

    /// Writes a picture of so many pixels in 32-bit words without padding: `colour` says red, green and blue of
    /// each.
    pub fn write_picture(
        &mut self,
        address: u32,
        (width, height): (u32, u32),
        colour: impl Fn(u32, u32) -> [u8; 3],
    ) {
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        let bytes = pixels.flat_map(|(x, y)| {
            let [red, green, blue] = colour(x, y);
            [blue, green, red, 0]
        });
        self.write_bytes(address, &bytes.collect::<Vec<_>>());
    }

    fn command(&mut self, line: &str) -> String {
        writeln!(self.commands, "{line}").expect("QEMU reads");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("QEMU answers");
        let value = answer.trim_end().strip_prefix("OK");
        let value = value.unwrap_or_else(|| panic!("{line:.40}: {answer}"));
        value.trim().to_owned()
    }
}
