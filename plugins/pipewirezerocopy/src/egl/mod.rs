// SPDX-License-Identifier: MIT OR Apache-2.0

//! DMA-BUFs on a GPU, through EGL: what a render node can import, and the import itself.
//!
//! A [`Display`] is the EGL side of one DRM node. It says which formats and modifiers it can
//! import ([`Display::formats`]), which is what may be offered to a producer (lesson L7), and makes
//! an [`Image`] of a [`DmaBuf`]. That the import succeeds proves nothing: a driver may only find
//! out when it reads. A [`Reader`] reads an image back, or says that it cannot be read. [`Gl`] is the
//! one way to a context, which a thread has only while it uses it.
//!
//! libEGL and libgbm are loaded at run time. A machine that lacks them gets an [`Error`] that says
//! so, and everything that needs no GPU works as before.
//!
//! No GStreamer and no PipeWire here.

use std::fmt;
use std::os::fd::BorrowedFd;

mod display;
mod gl;
mod image;
mod library;
mod reader;

pub use display::{Display, Format};
pub use gl::{Current, Gl};
pub use image::Image;
pub use reader::Reader;

/// Whether there is an EGL that would do. The error says what is missing. Looked at once.
pub fn available() -> Result<(), Error> {
    library::egl().map(drop)
}

/// The most planes that a DMA-BUF of EGL_EXT_image_dma_buf_import_modifiers can have.
pub const MAX_PLANES: usize = 4;

/// Why something did not work: what was tried, on what, and what was the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// This machine, or this node, cannot do it at all.
    Unavailable(String),
    /// It cannot be done with this buffer or this modifier.
    Refused(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(text) | Self::Refused(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

/// A picture in DMA-BUF memory. The descriptors stay the caller's.
#[derive(Clone, Copy, Debug)]
pub struct DmaBuf<'a> {
    /// DRM fourcc (drm_fourcc.h), for example `0x34325258`, XRGB8888.
    pub fourcc: u32,
    /// DRM format modifier; `None` where nobody said one, which leaves it to the driver.
    pub modifier: Option<u64>,
    /// Pixels. The memory may be larger: only what is said here is looked at.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// One to [`MAX_PLANES`] of them.
    pub planes: &'a [Plane<'a>],
}

/// One plane of a [`DmaBuf`]. Several planes may lie in one DMA-BUF.
#[derive(Clone, Copy, Debug)]
pub struct Plane<'a> {
    /// The memory.
    pub fd: BorrowedFd<'a>,
    /// Bytes from its beginning to the plane's first.
    pub offset: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
}

/// Says which picture is meant.
pub(crate) fn describe(buffer: &DmaBuf<'_>) -> String {
    let modifier = buffer
        .modifier
        .map_or("no modifier".to_owned(), |modifier| {
            format!("modifier {modifier:#x}")
        });
    let name = fourcc_name(buffer.fourcc);
    format!(
        "a {}x{} {name} DMA-BUF with {modifier}",
        buffer.width, buffer.height
    )
}

/// A fourcc as people read it, for example `XR24`.
pub(crate) fn fourcc_name(fourcc: u32) -> String {
    fourcc
        .to_le_bytes()
        .iter()
        .map(|&byte| {
            if byte.is_ascii_graphic() {
                char::from(byte)
            } else {
                '.'
            }
        })
        .collect()
}
