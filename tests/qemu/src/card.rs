// SPDX-License-Identifier: MIT OR Apache-2.0

//! A graphics card of a real QEMU, programmed by the test in a guest's place.
//!
//! It is `ati-vga`: of those with a cursor of their own it is the one with the fewest registers, and its
//! modes are set as those of QEMU's standard VGA.

use std::path::Path;

use crate::qtest::Qtest;

/// QEMU's device. Its firmware is not run, and not looked for.
pub(crate) const DEVICE: &str = "ati-vga,romfile=";

/// Registers of PCI: the first base address, the third, and the command register.
const BASE_0: u32 = 0x10;
const BASE_2: u32 = 0x18;
const COMMAND: u32 = 0x04;

/// Where the card's memory is to be seen, and its registers: addresses that nobody else has.
const MEMORY: u32 = 0xe000_0000;
const REGISTERS: u32 = 0xf000_0000;
/// Where cursors' shapes lie in the card's memory in turns, behind all pictures.
const SHAPES: [u32; 2] = [0x0080_0000, 0x0080_1000];

/// Bochs' VBE DISPI (QEMU, docs/specs/standard-vga.rst): ports of index and value, and indices.
const DISPI: (u32, u32) = (0x1ce, 0x1d0);
const XRES: u32 = 1;
const YRES: u32 = 2;
const BPP: u32 = 3;
const ENABLE: u32 = 4;
/// Enabled, linear; memory is cleared.
const ENABLED: u32 = 0x41;
/// VGA's attribute controller, and its bit without which the screen is blank.
const ATTRIBUTE: (u32, u32) = (0x3c0, 0x20);

/// Registers of ATI's Rage 128 (QEMU, hw/display/ati_regs.h).
const CRTC_GEN_CNTL: u32 = 0x50;
const CUR_OFFSET: u32 = 0x260;
const CUR_HORZ_VERT_POSN: u32 = 0x264;
const CUR_CLR0: u32 = 0x26c;
const CUR_CLR1: u32 = 0x270;
/// In `CRTC_GEN_CNTL`: the cursor is to be seen.
const CUR_EN: u32 = 1 << 16;

/// The sides of every cursor, in pixels; all beyond [`Cursor::size`] is transparent.
pub const CURSOR_SIDE: u32 = 64;

/// A cursor's shape: a rectangle whose left half has another colour than its right one.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    /// Pixels; the width in steps of 16.
    pub size: (u32, u32),
    /// Red, green and blue of the left half.
    pub left: [u8; 3],
    /// Of the right half.
    pub right: [u8; 3],
}

impl Cursor {
    /// Red, green and blue of a pixel; none where the cursor is transparent.
    pub fn pixel(&self, x: u32, y: u32) -> Option<[u8; 3]> {
        let (width, height) = self.size;
        if x >= width || y >= height {
            return None;
        }
        Some(if x < width / 2 { self.left } else { self.right })
    }

    /// As the card wants it: for each row 64 bits that say what is transparent, and 64 that choose
    /// between two colours.
    fn bits(&self) -> Vec<u8> {
        let row = |y| {
            let bit = |x, is: bool| u64::from(is) << (CURSOR_SIDE - 1 - x);
            let (mut clear, mut second) = (0, 0);
            for x in 0..CURSOR_SIDE {
                clear |= bit(x, self.pixel(x, y).is_none());
                second |= bit(x, self.pixel(x, y) == Some(self.right));
            }
            [u64::to_be_bytes(clear), u64::to_be_bytes(second)].concat()
        };
        (0..CURSOR_SIDE).flat_map(row).collect()
    }
}

/// The card.
pub struct Card {
    qtest: Qtest,
    /// Of the mode that is set, in pixels.
    size: (u32, u32),
    /// Where the cursor's shape lies.
    shape: u32,
}

impl Card {
    /// Takes over the card of a QEMU that has just started, over its qtest socket.
    ///
    /// # Panics
    ///
    /// If there is no such QEMU.
    pub(crate) fn take(socket: &Path) -> Self {
        let mut qtest = Qtest::connect(socket);
        qtest.configure(BASE_0, MEMORY);
        qtest.configure(BASE_2, REGISTERS);
        // It may be talked to over ports and memory.
        qtest.configure(COMMAND, 3);
        qtest.port('b', ATTRIBUTE.0, ATTRIBUTE.1);
        Self {
            qtest,
            size: (0, 0),
            shape: SHAPES[0],
        }
    }

    /// Sets a mode of 32 bits a pixel, with a black picture. Widths come in steps of 8.
    ///
    /// # Panics
    ///
    /// If QEMU has ended.
    pub fn set_mode(&mut self, width: u32, height: u32) {
        self.size = (width, height);
        for (index, value) in [
            (ENABLE, 0),
            (XRES, width),
            (YRES, height),
            (BPP, 32),
            (ENABLE, ENABLED),
        ] {
            self.qtest.port('w', DISPI.0, index);
            self.qtest.port('w', DISPI.1, value);
        }
    }

    /// Draws the whole picture: red, green and blue of each pixel.
    ///
    /// # Panics
    ///
    /// If QEMU has ended.
    pub fn draw(&mut self, colour: impl Fn(u32, u32) -> [u8; 3]) {
        self.qtest.write_picture(MEMORY, self.size, colour);
    }

    /// Gives the cursor a shape.
    ///
    /// # Panics
    ///
    /// If QEMU has ended.
    pub fn define_cursor(&mut self, cursor: &Cursor) {
        let word = |[red, green, blue]: [u8; 3]| u32::from_be_bytes([0, red, green, blue]);
        let [first, second] = SHAPES;
        self.shape = if self.shape == first { second } else { first };
        self.qtest.write_bytes(MEMORY + self.shape, &cursor.bits());
        self.register(CUR_CLR0, word(cursor.left));
        self.register(CUR_CLR1, word(cursor.right));
        // The card reads the shape when this changes.
        self.register(CUR_OFFSET, self.shape);
    }

    /// Shows the cursor with its left upper corner there, or not at all.
    ///
    /// # Panics
    ///
    /// If QEMU has ended.
    pub fn show_cursor(&mut self, at: Option<(u32, u32)>) {
        if let Some((x, y)) = at {
            self.register(CUR_HORZ_VERT_POSN, x << 16 | y);
        }
        let shown = if at.is_some() { CUR_EN } else { 0 };
        self.register(CRTC_GEN_CNTL, shown);
    }

    fn register(&mut self, offset: u32, value: u32) {
        self.qtest.write('l', REGISTERS + offset, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_transparent_but_for_its_halves() {
        let cursor = Cursor {
            size: (32, 8),
            left: [1, 2, 3],
            right: [4, 5, 6],
        };
        let bits = cursor.bits();
        assert_eq!(bits.len(), 64 * 16);
        assert_eq!(bits[..8], [0, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!(bits[8..16], [0, 0, 255, 255, 0, 0, 0, 0]);
        assert_eq!(bits[8 * 16..][..8], [255; 8]);
        assert_eq!(cursor.pixel(31, 7), Some([4, 5, 6]));
        assert_eq!(cursor.pixel(32, 7), None);
    }
}
