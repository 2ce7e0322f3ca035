// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures as QEMU's `screendump` writes them.

/// Width, height, and three bytes a pixel: red, green, blue.
#[derive(Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Rows without padding.
    pub bytes: Vec<u8>,
}

impl Rgb {
    /// Reads a binary PPM with 8 bits a channel.
    pub fn from_ppm(file: &[u8]) -> Option<Self> {
        let mut rest = file;
        let mut words = [""; 4];
        for word in &mut words {
            let end = rest.iter().position(u8::is_ascii_whitespace)?;
            *word = std::str::from_utf8(&rest[..end]).ok()?;
            rest = &rest[end + 1..];
        }
        let (width, height) = (words[1].parse().ok()?, words[2].parse().ok()?);
        let right = words[0] == "P6" && words[3] == "255" && rest.len() == width * height * 3;
        right.then(|| Self {
            width,
            height,
            bytes: rest.to_vec(),
        })
    }

    /// Takes the colours out of pixels of four bytes: blue, green, red, anything.
    ///
    /// # Panics
    ///
    /// If there are fewer bytes than that takes.
    pub fn from_bgrx(width: usize, height: usize, stride: usize, bytes: &[u8]) -> Self {
        let rows = (0..height).map(|row| &bytes[row * stride..row * stride + width * 4]);
        let pixels = rows.flat_map(|row| row.chunks_exact(4));
        Self {
            width,
            height,
            bytes: pixels
                .flat_map(|bgrx| [bgrx[2], bgrx[1], bgrx[0]])
                .collect(),
        }
    }

    /// How many different colours there are, which says whether there is anything to see.
    pub fn colours(&self) -> usize {
        let pixels = self.bytes.chunks_exact(3);
        pixels.collect::<std::collections::HashSet<_>>().len()
    }
}

impl std::fmt::Debug for Rgb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let colours = self.colours();
        write!(f, "{}x{} in {colours} colours", self.width, self.height)
    }
}
