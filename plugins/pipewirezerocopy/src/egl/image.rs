// SPDX-License-Identifier: MIT OR Apache-2.0

//! An imported DMA-BUF.

use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use khronos_egl as egl;

use super::display::Inner;
use super::{DmaBuf, Error, MAX_PLANES};

// From eglext.h.
const LINUX_DMA_BUF_EXT: egl::Enum = 0x3270;
const LINUX_DRM_FOURCC_EXT: egl::Attrib = 0x3271;
/// For each plane: descriptor, offset, pitch, low and high half of the modifier.
const PLANE_ATTRIBUTES: [[egl::Attrib; 5]; MAX_PLANES] = [
    [0x3272, 0x3273, 0x3274, 0x3443, 0x3444],
    [0x3275, 0x3276, 0x3277, 0x3445, 0x3446],
    [0x3278, 0x3279, 0x327A, 0x3447, 0x3448],
    [0x3440, 0x3441, 0x3442, 0x3449, 0x344A],
];

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
    /// Imports a DMA-BUF; see [`Display::import`](super::Display::import).
    pub(super) fn import(display: &Arc<Inner>, buffer: &DmaBuf) -> Result<Self, Error> {
        let refused = |reason: &str| Error::Refused(display.about(buffer, reason));
        if buffer.planes.is_empty() || buffer.planes.len() > MAX_PLANES {
            return Err(refused(&format!("it has {} planes", buffer.planes.len())));
        }
        let attributes = attributes(buffer, display.with_modifiers)
            .ok_or_else(|| refused("the driver cannot import with a modifier"))?;
        // SAFETY: a null context and a null client buffer are what this target wants.
        let (context, source) = unsafe {
            (
                egl::Context::from_ptr(egl::NO_CONTEXT),
                egl::ClientBuffer::from_ptr(ptr::null_mut()),
            )
        };
        let raw = display
            .egl
            .create_image(display.raw, context, LINUX_DMA_BUF_EXT, source, &attributes)
            .map_err(|error| refused(&format!("eglCreateImage: {error}")))?;
        Ok(Self {
            about: display.about(buffer, ""),
            display: display.clone(),
            raw,
            width: buffer.width,
            height: buffer.height,
        })
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

/// What `eglCreateImage` is told, or `None` where a modifier cannot be said and must be.
fn attributes(buffer: &DmaBuf, with_modifiers: bool) -> Option<Vec<egl::Attrib>> {
    /// drm_fourcc.h: rows one after another, which is what a driver without modifiers takes.
    const LINEAR: u64 = 0;
    let modifier = if with_modifiers {
        buffer.modifier
    } else {
        match buffer.modifier {
            None | Some(LINEAR) => None,
            Some(_) => return None,
        }
    };
    let mut list = vec![
        egl::WIDTH as egl::Attrib,
        buffer.width as egl::Attrib,
        egl::HEIGHT as egl::Attrib,
        buffer.height as egl::Attrib,
        LINUX_DRM_FOURCC_EXT,
        buffer.fourcc as egl::Attrib,
    ];
    for (plane, names) in buffer.planes.iter().zip(PLANE_ATTRIBUTES) {
        let [fd, offset, pitch, low, high] = names;
        list.extend([fd, plane.fd.as_raw_fd() as egl::Attrib]);
        list.extend([offset, plane.offset as egl::Attrib]);
        list.extend([pitch, plane.stride as egl::Attrib]);
        if let Some(modifier) = modifier {
            list.extend([low, (modifier & 0xffff_ffff) as egl::Attrib]);
            list.extend([high, (modifier >> 32) as egl::Attrib]);
        }
    }
    list.push(egl::ATTRIB_NONE);
    Some(list)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::super::Plane;
    use super::*;

    const XR24: u32 = 0x3432_5258;

    #[test]
    fn every_plane_is_said_with_its_offset_stride_and_modifier() {
        let file = File::open("/dev/null").unwrap();
        let fd = file.as_raw_fd() as egl::Attrib;
        let plane = |offset, stride| Plane {
            fd: file.as_fd(),
            offset,
            stride,
        };
        let planes = [plane(0, 1408), plane(5120, 704)];
        let buffer = DmaBuf {
            fourcc: XR24,
            modifier: Some(0x0300_0000_0060_6014),
            width: 1366,
            height: 768,
            planes: &planes,
        };
        let list = attributes(&buffer, true).unwrap();
        let (pairs, end) = list.as_chunks::<2>();
        assert_eq!(end, [egl::ATTRIB_NONE]);
        let wanted = [
            [0x3057, 1366],
            [0x3056, 768],
            [0x3271, XR24 as usize],
            [0x3272, fd],
            [0x3273, 0],
            [0x3274, 1408],
            [0x3443, 0x0060_6014],
            [0x3444, 0x0300_0000],
            [0x3275, fd],
            [0x3276, 5120],
            [0x3277, 704],
            [0x3445, 0x0060_6014],
            [0x3446, 0x0300_0000],
        ];
        assert_eq!(pairs, wanted);
    }

    #[test]
    fn a_driver_without_modifiers_takes_linear_only() {
        let file = File::open("/dev/null").unwrap();
        let planes = [Plane {
            fd: file.as_fd(),
            offset: 0,
            stride: 64,
        }];
        let buffer = |modifier| DmaBuf {
            fourcc: XR24,
            modifier,
            width: 16,
            height: 16,
            planes: &planes,
        };
        assert_eq!(attributes(&buffer(Some(0)), false).unwrap().len(), 13);
        assert_eq!(attributes(&buffer(None), true).unwrap().len(), 13);
        assert!(attributes(&buffer(Some(1)), false).is_none());
    }
}
