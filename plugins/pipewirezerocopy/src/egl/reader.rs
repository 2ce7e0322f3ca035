// SPDX-License-Identifier: MIT OR Apache-2.0

//! Reads images back through OpenGL ES: slowly, and to be believed.

use std::ffi::c_void;

use glow::HasContext;
use khronos_egl as egl;

use super::display::{Display, Inner};
use super::image::Image;
use super::{Error, library};

/// GL_OES_EGL_image. `GLeglImageOES` is a `void *`.
type ImageTargetTexture = unsafe extern "system" fn(u32, *mut c_void);

/// An OpenGL ES context of a display. It is current, on whatever thread, only while it works.
pub struct Reader {
    display: Display,
    context: egl::Context,
    gl: glow::Context,
    image_target_texture: ImageTargetTexture,
}

// SAFETY: a context that is current nowhere may become so on any thread, and the functions of OpenGL
// are the same for all threads.
unsafe impl Send for Reader {}

/// A context is current on this thread, until this is dropped.
struct Current<'a>(&'a Inner);

impl<'a> Current<'a> {
    fn new(inner: &'a Inner, context: egl::Context) -> Result<Self, String> {
        let failed = |call: &str, error: egl::Error| format!("{call}: {error}");
        // Each thread has a setting of its own, which says below which kind of context goes.
        let bound = inner.egl.bind_api(egl::OPENGL_ES_API);
        bound.map_err(|error| failed("eglBindAPI", error))?;
        let current = inner.egl.make_current(inner.raw, None, None, Some(context));
        current.map_err(|error| failed("eglMakeCurrent", error))?;
        Ok(Self(inner))
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        // Cannot fail for a context that is current.
        let _ = self.0.egl.make_current(self.0.raw, None, None, None);
    }
}

impl Reader {
    /// Makes a context, with no surface to draw to.
    pub fn new(display: &Display) -> Result<Self, Error> {
        let inner = display.inner();
        let (egl, raw) = (inner.egl, inner.raw);
        let unavailable =
            |text: String| Error::Unavailable(format!("{}: {text}", display.node().display()));
        for extension in ["EGL_KHR_surfaceless_context", "EGL_KHR_no_config_context"] {
            if !display.has_extension(extension) {
                return Err(unavailable(format!("its driver has no {extension}")));
            }
        }
        // SAFETY: EGL_NO_CONFIG_KHR is null, and the display takes it.
        let no_config = unsafe { egl::Config::from_ptr(std::ptr::null_mut()) };
        let attributes = [egl::CONTEXT_CLIENT_VERSION, 2, egl::NONE];
        let context = egl
            .bind_api(egl::OPENGL_ES_API)
            .and_then(|()| egl.create_context(raw, no_config, None, &attributes))
            .map_err(|error| unavailable(format!("eglCreateContext: {error}")))?;
        Self::with_context(display, context).inspect_err(|_| {
            let _ = egl.destroy_context(raw, context);
        })
    }

    fn with_context(display: &Display, context: egl::Context) -> Result<Self, Error> {
        let inner = display.inner();
        let _current = Current::new(inner, context)
            .map_err(|text| Error::Unavailable(format!("{}: {text}", display.node().display())))?;
        let egl = inner.egl;
        // SAFETY: the type is that of GL_OES_EGL_image.
        let image_target_texture =
            unsafe { library::extension(egl, "glEGLImageTargetTexture2DOES") }?;
        // SAFETY: the context is current, and the functions are the driver's own.
        let gl = unsafe {
            glow::Context::from_loader_function(|name| {
                egl.get_proc_address(name)
                    .map_or(std::ptr::null(), |function| function as *const c_void)
            })
        };
        Ok(Self {
            display: display.clone(),
            context,
            gl,
            image_target_texture,
        })
    }

    /// What draws, in its own words; for logs.
    pub fn renderer(&mut self) -> String {
        let Ok(_current) = Current::new(self.display.inner(), self.context) else {
            return "unknown".to_owned();
        };
        // SAFETY: the context is current on this thread.
        unsafe { self.gl.get_parameter_string(glow::RENDERER) }
    }

    /// The pixels of a part of the image as R, G, B, A bytes, rows from top to bottom. An error
    /// says that what was imported cannot be read.
    pub fn read(
        &mut self,
        image: &Image,
        x: u32,
        y: u32,
        width: u32,
        height: u32,
    ) -> Result<Vec<u8>, Error> {
        let inner = self.display.inner();
        let refused = |reason: &str| Error::Refused(image.about(reason));
        if !image.belongs_to(inner) {
            return Err(refused("it was imported on another display"));
        }
        let fits = |from: u32, size: u32, all: u32| {
            size > 0 && from.checked_add(size).is_some_and(|end| end <= all)
        };
        if !fits(x, width, image.width()) || !fits(y, height, image.height()) {
            return Err(refused(&format!(
                "has no part of {width}x{height} pixels at {x}, {y}"
            )));
        }
        let mut bytes = vec![0; width as usize * height as usize * 4];
        let _current = Current::new(inner, self.context).map_err(|text| refused(&text))?;
        let gl = &self.gl;
        // SAFETY: the context is current on this thread. What is made here is deleted here, the image outlives the texture, and there is room
        // for all bytes that are read.
        let result = unsafe {
            while gl.get_error() != glow::NO_ERROR {}
            let texture = gl.create_texture().map_err(|text| refused(&text))?;
            gl.bind_texture(glow::TEXTURE_2D, Some(texture));
            (self.image_target_texture)(glow::TEXTURE_2D, image.as_ptr());
            let framebuffer = gl.create_framebuffer();
            let result = framebuffer
                .as_ref()
                .map_err(String::clone)
                .and_then(|&framebuffer| {
                    gl.bind_framebuffer(glow::FRAMEBUFFER, Some(framebuffer));
                    gl.framebuffer_texture_2d(
                        glow::FRAMEBUFFER,
                        glow::COLOR_ATTACHMENT0,
                        glow::TEXTURE_2D,
                        Some(texture),
                        0,
                    );
                    let status = gl.check_framebuffer_status(glow::FRAMEBUFFER);
                    if status != glow::FRAMEBUFFER_COMPLETE {
                        return Err(format!(
                            "no picture can be read from it (status {status:#x})"
                        ));
                    }
                    gl.pixel_store_i32(glow::PACK_ALIGNMENT, 1);
                    gl.read_pixels(
                        x as i32,
                        y as i32,
                        width as i32,
                        height as i32,
                        glow::RGBA,
                        glow::UNSIGNED_BYTE,
                        glow::PixelPackData::Slice(Some(&mut bytes)),
                    );
                    match gl.get_error() {
                        glow::NO_ERROR => Ok(()),
                        error => Err(format!("reading it failed (GL error {error:#x})")),
                    }
                });
            gl.bind_framebuffer(glow::FRAMEBUFFER, None);
            if let Ok(framebuffer) = framebuffer {
                gl.delete_framebuffer(framebuffer);
            }
            gl.delete_texture(texture);
            result
        };
        result.map(|()| bytes).map_err(|text| refused(&text))
    }

    /// Whether the image can be read at all: one pixel of each corner.
    pub fn check(&mut self, image: &Image) -> Result<(), Error> {
        for (x, y) in [(0, 0), (image.width() - 1, image.height() - 1)] {
            self.read(image, x, y, 1, 1)?;
        }
        Ok(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let inner = self.display.inner();
        // Cannot fail for a context of ours that is current nowhere.
        let _ = inner.egl.destroy_context(inner.raw, self.context);
    }
}
