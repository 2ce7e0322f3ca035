// SPDX-License-Identifier: MIT OR Apache-2.0

//! An imported DMA-BUF.

use std::sync::Arc;

use khronos_egl as egl;

use super::DmaBuf;
use super::display::Inner;

/// An EGLImage of a DMA-BUF, alive from import to drop. Making one costs a call into the kernel
/// and now and then much more (lesson L15), so it is made once for a buffer and kept as long as
/// the producer keeps the buffer.
pub struct Image {
    display: Arc<Inner>,
    raw: egl::Image,
    /// Pixels.
    width: u32,
    height: u32,
    /// For errors.
    about: String,
}

// SAFETY: an EGLImage belongs to its display and not to a thread; EGL locks the display itself.
unsafe impl Send for Image {}
// SAFETY: see above; what is shared is only read.
unsafe impl Sync for Image {}

impl Image {
    pub(super) fn new(display: Arc<Inner>, raw: egl::Image, buffer: &DmaBuf) -> Self {
        let about = display.about(buffer, "");
        Self {
            display,
            raw,
            width: buffer.width,
            height: buffer.height,
            about,
        }
    }

    /// Pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The `EGLImage`, for calls that take one. It is valid as long as `self` lives.
    pub fn as_ptr(&self) -> egl::EGLImage {
        self.raw.as_ptr()
    }

    pub(super) fn belongs_to(&self, display: &Arc<Inner>) -> bool {
        Arc::ptr_eq(&self.display, display)
    }

    /// Says what went wrong with which buffer.
    pub(super) fn about(&self, reason: &str) -> String {
        format!("{}{reason}", self.about)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Fails only for what is no image of this display.
        let _ = self.display.egl.destroy_image(self.display.raw, self.raw);
    }
}
