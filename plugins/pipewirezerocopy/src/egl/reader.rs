// SPDX-License-Identifier: MIT OR Apache-2.0

//! Reads images back through OpenGL ES: slowly, and to be believed.

use glow::HasContext;

use super::Error;
use super::display::Display;
use super::gl::Gl;
use super::image::Image;

/// An OpenGL ES context of a display. It is current, on whatever thread, only while it works.
pub struct Reader {
    display: Display,
    gl: Gl,
}

impl Reader {
    /// Makes a context, with no surface to draw to.
    pub fn new(display: &Display) -> Result<Self, Error> {
        Ok(Self {
            display: display.clone(),
            gl: Gl::new(display, 2)?,
        })
    }

    /// What draws, in its own words; for logs.
    pub fn renderer(&mut self) -> String {
        let Ok(gl) = self.gl.enter() else {
            return "unknown".to_owned();
        };
        // SAFETY: the context is current on this thread.
        unsafe { gl.get_parameter_string(glow::RENDERER) }
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
        let refused = |reason: &str| Error::Refused(image.about(reason));
        if !image.belongs_to(self.display.inner()) {
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
        let gl = self.gl.enter()?;
        // SAFETY: the context is current on this thread. What is made here is deleted here, the image
        // outlives the texture, and there is room for all bytes that are read.
        let result = unsafe {
            while gl.get_error() != glow::NO_ERROR {}
            let texture = gl.create_texture().map_err(|text| refused(&text))?;
            gl.bind_texture(glow::TEXTURE_2D, Some(texture));
            gl.show_image(image.as_ptr());
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
}
