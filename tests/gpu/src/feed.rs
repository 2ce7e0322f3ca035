// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the import is fed with: images of the DMA-BUFs that the driver exports, made as the element makes
//! them; or, where the driver exports or imports none, as without a DRM node, of the textures themselves: then all but
//! the import of a DMA-BUF is checked.

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gstpipewirezerocopy::cuda;
use gstpipewirezerocopy::egl::{self, DmaBuf, Error};

use crate::egl::{Context, Display, Egl};

/// Stands for the modifier of what is no DMA-BUF; `offset` is then the number of a texture.
pub const TEXTURE: u64 = u64::MAX;

/// A texture that is imported without a DMA-BUF.
#[derive(Clone, Copy)]
struct Texture {
    display: Display,
    context: Context,
    name: u32,
}

// SAFETY: they are handed to EGL, which locks its displays.
unsafe impl Send for Texture {}

static TEXTURES: Mutex<Vec<Texture>> = Mutex::new(Vec::new());

fn textures() -> MutexGuard<'static, Vec<Texture>> {
    TEXTURES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives a texture a number.
///
/// # Safety
///
/// Texture, context and display must live as long as anything is imported by that number.
pub unsafe fn number_of(display: Display, context: Context, name: u32) -> u32 {
    let mut textures = textures();
    textures.push(Texture {
        display,
        context,
        name,
    });
    textures.len() as u32 - 1
}

/// Imports on a display.
pub struct Feed(pub egl::Display);

/// An image of either kind.
pub enum Image {
    DmaBuf(egl::Image),
    Texture(TextureImage),
}

/// An EGLImage of a texture.
pub struct TextureImage {
    egl: &'static Egl,
    display: Display,
    raw: *mut c_void,
}

impl Drop for TextureImage {
    fn drop(&mut self) {
        // SAFETY: it is an image of this display and is destroyed once.
        unsafe { (self.egl.destroy_image)(self.display, self.raw) };
    }
}

// SAFETY: what `raw` gives is an EGLImage until the image is dropped.
unsafe impl cuda::Display for Feed {
    type Image = Image;

    fn import(&self, buffer: &DmaBuf<'_>) -> Result<Image, Error> {
        if buffer.modifier != Some(TEXTURE) {
            return self.0.import(buffer).map(Image::DmaBuf);
        }
        let egl = Egl::get().map_err(Error::Unavailable)?;
        let number = buffer.planes.first().map(|plane| plane.offset as usize);
        let known = number.and_then(|number| textures().get(number).copied());
        let texture = known.ok_or_else(|| Error::Refused("no such texture".into()))?;
        // SAFETY: `number_of`'s caller has vouched for them.
        let raw = unsafe { egl.image_of(texture.display, texture.context, texture.name) };
        Ok(Image::Texture(TextureImage {
            egl,
            display: texture.display,
            raw: raw.map_err(Error::Refused)?,
        }))
    }

    fn raw(image: &Image) -> *mut c_void {
        match image {
            Image::DmaBuf(image) => <egl::Display as cuda::Display>::raw(image),
            Image::Texture(image) => image.raw,
        }
    }

    fn egl(&self) -> Result<&egl::Display, Error> {
        Ok(&self.0)
    }
}
