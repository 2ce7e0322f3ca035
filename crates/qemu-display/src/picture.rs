// SPDX-License-Identifier: MIT OR Apache-2.0

//! A picture of a screen, and how it lies in memory.

use std::sync::Arc;
use std::time::Instant;

use crate::cursor::Cursor;
use crate::damage::Damage;
use crate::dmabuf::DmaBuf;
use crate::error::Error;
use crate::format::PixelFormat;
use crate::memory::{Canvas, Lease, SharedFile};

/// The largest picture in each direction, in pixels.
pub const MAX_SIZE: u32 = 8192;

/// How a picture lies in plain memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Of each pixel.
    pub format: PixelFormat,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Bytes from one row to the next; at least those of a row.
    pub stride: u32,
}

impl Layout {
    /// A layout as QEMU says it.
    pub(crate) fn checked(width: u32, height: u32, stride: u32, code: u32) -> Result<Self, Error> {
        let format = PixelFormat::from_pixman(code)
            .ok_or_else(|| Error::Nonsense(format!("an unknown pixel format, {code:#x}")))?;
        Self::of_rows(width, height, stride, format)
    }

    /// A layout of pixels of a known format.
    pub(crate) fn of_rows(
        width: u32,
        height: u32,
        stride: u32,
        format: PixelFormat,
    ) -> Result<Self, Error> {
        check_size(width, height)?;
        let layout = Self {
            format,
            width,
            height,
            stride,
        };
        // Four times what is needed is more than any alignment; the product stays far below 2^64.
        let row = layout.row_bytes();
        let most = 4 * row as u64 + 4096;
        if (stride as usize) < row || u64::from(stride) > most {
            return Err(Error::Nonsense(format!(
                "a stride of {stride} bytes for {width} pixels of {row} bytes"
            )));
        }
        Ok(layout)
    }

    /// Bytes of a row's pixels.
    pub fn row_bytes(&self) -> usize {
        self.width as usize * self.format.bytes_per_pixel()
    }

    /// Bytes from the first pixel to the last.
    pub(crate) fn used_bytes(&self) -> usize {
        self.stride as usize * (self.height as usize - 1) + self.row_bytes()
    }

    /// What a picture like this fills of `out`, where rows are `stride` bytes apart.
    pub(crate) fn room<'a>(&self, out: &'a mut [u8], stride: usize) -> Result<&'a mut [u8], Error> {
        let row = self.row_bytes();
        let needed = stride * (self.height as usize - 1) + row;
        let there = out.len();
        out.get_mut(..needed)
            .filter(|_| stride >= row)
            .ok_or_else(|| {
                Error::System(format!(
                    "{there} bytes with a stride of {stride} for a picture of {}x{}",
                    self.width, self.height
                ))
            })
    }

    /// Bytes of the picture, the padding of each row included.
    pub fn bytes(&self) -> usize {
        self.stride as usize * self.height as usize
    }
}

/// Whether a picture may have this size.
pub(crate) fn check_size(width: u32, height: u32) -> Result<(), Error> {
    let range = 1..=MAX_SIZE;
    if range.contains(&width) && range.contains(&height) {
        return Ok(());
    }
    Err(Error::Nonsense(format!(
        "a picture of {width}x{height} pixels (at most {MAX_SIZE}x{MAX_SIZE} can be shown)"
    )))
}

/// Where a picture's pixels are.
#[derive(Clone, Debug)]
pub enum Pixels {
    /// Here. Nobody writes to them while this is kept.
    Bytes {
        /// How they lie.
        layout: Layout,
        /// [`Layout::bytes`] or more of them.
        canvas: Arc<Canvas>,
    },
    /// In memory that QEMU draws into without asking.
    Shared {
        /// How they lie.
        layout: Layout,
        /// The memory.
        file: Arc<SharedFile>,
        /// Where they begin in it, in bytes.
        offset: u64,
        /// To be kept until whoever shows the picture has done with it, be it this memory or a
        /// copy of it.
        lease: Lease,
        /// QEMU has drawn lately while a lease was out, and may do so again: take a copy.
        busy: bool,
    },
    /// On a GPU.
    DmaBuf {
        /// What and how.
        buffer: Arc<DmaBuf>,
        /// To be kept until whoever shows the picture has done with it: QEMU lets the guest draw
        /// then.
        lease: Lease,
    },
}

impl Pixels {
    /// Width and height in pixels.
    pub fn size(&self) -> (u32, u32) {
        match self {
            Self::Bytes { layout, .. } | Self::Shared { layout, .. } => {
                (layout.width, layout.height)
            }
            Self::DmaBuf { buffer, .. } => (buffer.width, buffer.height),
        }
    }

    /// How the pixels lie; `None` where only a GPU can read them.
    pub fn layout(&self) -> Option<Layout> {
        match self {
            Self::Bytes { layout, .. } | Self::Shared { layout, .. } => Some(*layout),
            Self::DmaBuf { buffer, .. } => buffer.layout(),
        }
    }

    /// Copies the picture into `out`, its top row first, with `stride` bytes from one row to the
    /// next.
    pub fn copy_to(&self, out: &mut [u8], stride: usize) -> Result<(), Error> {
        let layout = match self {
            Self::Bytes { layout, .. } | Self::Shared { layout, .. } => *layout,
            Self::DmaBuf { buffer, .. } => return buffer.read()?.copy_to(out, stride),
        };
        let row = layout.row_bytes();
        let as_it_lies = stride == layout.stride as usize;
        let out = layout.room(out, stride)?;
        let copy = |at: usize, out: &mut [u8]| match self {
            Self::Bytes { canvas, .. } => {
                // The length was checked when the picture came.
                out.copy_from_slice(&(**canvas).as_ref()[at..at + out.len()]);
                Ok(())
            }
            Self::Shared { file, offset, .. } => file.read(offset + at as u64, out),
            Self::DmaBuf { .. } => Ok(()),
        };
        if as_it_lies {
            return copy(0, out);
        }
        for (index, to) in out.chunks_mut(stride).enumerate() {
            copy(index * layout.stride as usize, &mut to[..row])?;
        }
        Ok(())
    }
}

/// A picture of a screen.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The screen without the cursor.
    pub pixels: Pixels,
    /// What of it has changed since a picture was taken last.
    pub damage: Damage,
    /// The cursor has changed since then.
    pub cursor_changed: bool,
    /// The cursor, if QEMU sends one.
    pub cursor: Cursor,
    /// When the newest change in it came.
    pub arrived: Instant,
}

impl Picture {
    /// Whether this was to be seen before, all of it.
    pub fn is_repeated(&self) -> bool {
        self.damage.is_none() && !self.cursor_changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const X8R8G8B8: u32 = 0x2002_0888;

    #[test]
    fn layouts_that_cannot_be_are_refused() {
        let layout = Layout::checked(640, 480, 2560, X8R8G8B8).unwrap();
        assert_eq!((layout.row_bytes(), layout.bytes()), (2560, 2560 * 480));
        assert!(Layout::checked(8192, 8192, 32768, X8R8G8B8).is_ok());
        for (width, height, stride, format) in [
            (0, 480, 2560, X8R8G8B8),
            (640, 0, 2560, X8R8G8B8),
            (640, 480, 2559, X8R8G8B8),
            (640, 480, u32::MAX, X8R8G8B8),
            (8193, 1, 32772, X8R8G8B8),
            (u32::MAX, u32::MAX, u32::MAX, X8R8G8B8),
            (0x4000_0001, 1, 4, X8R8G8B8),
            (640, 480, 2560, 0),
        ] {
            assert!(Layout::checked(width, height, stride, format).is_err());
        }
    }
}
