// SPDX-License-Identifier: MIT OR Apache-2.0

//! DMA-BUFs into CUDA memory, without a CPU that touches a pixel.
//!
//! An [`Importer`] takes what [`egl`](crate::egl) can import, and copies it on the GPU into buffers
//! of `GstCudaMemory`, which cudaconvertscale and nvh264enc take. There are two ways to the pixels
//! ([`Way`]), and one interface.
//!
//! libcuda and libgstcuda are loaded at run time, when first needed, and never unloaded. A machine
//! that lacks one of them, or whose GStreamer is older than 1.24, gets an [`Error`] that says which
//! ([`available`]); nothing else of the plugin changes.
//!
//! | module | job |
//! | --- | --- |
//! | `symbols` | a table of a library's functions |
//! | `driver` | what is called of libcuda, raw |
//! | `gstcuda` | what is called of libgstcuda, raw |
//! | `context` | contexts, streams and pools of libgstcuda, safe |
//! | `share` | which context: downstream's, the application's, or one of our own |
//! | `device` | which CUDA device a display's GPU is |
//! | `resource` | what the driver has registered |
//! | `texture` | drawing an image into a texture of our own |
//! | `import` | the copy itself |
//!
//! No PipeWire here.

use std::fmt;

mod context;
mod device;
mod driver;
mod gstcuda;
mod import;
mod resource;
mod share;
mod symbols;
mod texture;

pub use context::{Context, MEMORY_FEATURE, Pool, Stream};
pub use device::of_display;
pub use import::{Begun, Display, Importer, Source, Way, image_formats};
pub use resource::EglResource;
pub use share::{CONTEXT_TYPE, Slot, answer, ensure, given_to, set_context, shared_with};

/// Why something did not work: what was tried, on what, and what was the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// This machine cannot do it at all.
    Unavailable(String),
    /// It cannot be done with this picture; another layout or another way may do.
    Refused(String),
    /// The GPU has no memory left.
    Exhausted(String),
    /// The context or the GPU is gone: nothing of it can be used any more.
    Lost(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(text)
            | Self::Refused(text)
            | Self::Exhausted(text)
            | Self::Lost(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

impl From<crate::egl::Error> for Error {
    fn from(error: crate::egl::Error) -> Self {
        match error {
            crate::egl::Error::Unavailable(text) => Self::Unavailable(text),
            crate::egl::Error::Refused(text) => Self::Refused(text),
        }
    }
}

/// Whether this machine has all that CUDA memory needs: the libraries and a device. The error says
/// what is missing. Looked at once.
pub fn available() -> Result<(), Error> {
    // Before anything is loaded: libcuda's start takes long.
    gstcuda::check_version()?;
    // libgstcuda loads libcuda too, and takes a machine without a device for an error in its log.
    driver::driver()?;
    gstcuda::library()?;
    crate::egl::available()?;
    Ok(())
}
