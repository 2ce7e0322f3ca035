// SPDX-License-Identifier: MIT OR Apache-2.0

//! Draws EGL images into textures of our own, which CUDA has registered.
//!
//! A texture's bytes are in the order in which the shader puts them, so a picture has its bytes in
//! the order of its own format, whatever the driver makes of that (L9).

use std::ffi::c_void;
use std::os::fd::BorrowedFd;

use glow::HasContext;

use super::driver::RawStream;
use super::import::Plane;
use super::resource::{GlResource, Pixels};
use super::{Context, Error};
use crate::egl::{Current, Display, Gl};

/// One triangle that covers everything.
const VERTEX_SHADER: &str = "#version 300 es
void main() {
    vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 4.0 - 1.0;
    gl_Position = vec4(corner, 0.0, 1.0);
}";

/// Pixel for pixel, without a filter.
const FRAGMENT_SHADER: &str = "#version 300 es
precision highp float;
uniform highp sampler2D picture;
uniform ivec2 start;
out vec4 colour;
void main() {
    colour = texelFetch(picture, ivec2(gl_FragCoord.xy) + start, 0).ORDER;
}";

/// A texture of our own, as large as what is drawn.
struct Canvas {
    size: (u32, u32),
    format: u32,
    texture: glow::Texture,
    framebuffer: glow::Framebuffer,
    resource: GlResource,
}

struct Program {
    fourcc: u32,
    linked: glow::Program,
    start: Option<glow::UniformLocation>,
}

/// Draws the planes of pictures. Everything lasts from one picture to the next.
pub(super) struct Painter {
    /// One for each plane.
    canvases: Vec<Canvas>,
    programs: Vec<Program>,
    /// Shows the image that is being drawn.
    source: glow::Texture,
    context: Context,
    gl: Gl,
}

impl Painter {
    /// Draws on the GPU of `display`, for `context`.
    pub fn new(display: &Display, context: &Context) -> Result<Self, Error> {
        let gl = Gl::new(display, 3)?;
        let current = gl.enter()?;
        // SAFETY: the context is current.
        let source = unsafe { current.create_texture() }.map_err(refused)?;
        drop(current);
        Ok(Self {
            canvases: Vec::new(),
            programs: Vec::new(),
            source,
            context: context.clone(),
            gl,
        })
    }

    /// Lets what is drawn from here on begin only when all these sync files are signalled. Where this
    /// fails, nobody but the caller waits.
    pub fn wait_for(&self, fences: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let gl = self.gl.enter()?;
        Ok(fences.iter().try_for_each(|fence| gl.wait_for(*fence))?)
    }

    /// Begins to draw the part of a picture that begins at pixel `at`, one image for each of its planes.
    pub fn draw(
        &mut self,
        images: impl Iterator<Item = *mut c_void>,
        planes: &[Plane],
        at: (u32, u32),
        size: (u32, u32),
    ) -> Result<(), Error> {
        let Self {
            canvases,
            programs,
            source,
            context,
            gl,
        } = self;
        let gl = gl.enter()?;
        for (index, (image, plane)) in images.zip(planes).enumerate() {
            let scaled =
                |(x, y): (u32, u32)| (x.div_ceil(plane.subsampling), y.div_ceil(plane.subsampling));
            let size = scaled(size);
            let format = format_of(plane.bytes_per_pixel);
            let fits = canvases
                .get(index)
                .is_some_and(|canvas| canvas.size == size && canvas.format == format);
            if !fits {
                // Those behind it go with it; they are made anew below.
                for canvas in canvases.drain(index.min(canvases.len())..) {
                    canvas.delete(&gl);
                }
                canvases.push(Canvas::new(&gl, context, size, format)?);
            }
            let known = programs.iter().position(|one| one.fourcc == plane.fourcc);
            let known = known.map_or_else(
                || {
                    programs.push(Program::new(&gl, plane.fourcc)?);
                    Ok::<_, Error>(programs.len() - 1)
                },
                Ok,
            )?;
            let program = &programs[known];
            let start = (at.0 / plane.subsampling, at.1 / plane.subsampling);
            // SAFETY: the context is current, all objects are its own, and the image lives as long
            // as the caller's borrow, past the end of the drawing.
            unsafe {
                while gl.get_error() != glow::NO_ERROR {}
                gl.bind_framebuffer(glow::FRAMEBUFFER, Some(canvases[index].framebuffer));
                gl.viewport(0, 0, size.0 as i32, size.1 as i32);
                gl.use_program(Some(program.linked));
                gl.uniform_2_i32(program.start.as_ref(), start.0 as i32, start.1 as i32);
                gl.bind_texture(glow::TEXTURE_2D, Some(*source));
                gl.show_image(image);
                gl.tex_parameter_i32(
                    glow::TEXTURE_2D,
                    glow::TEXTURE_MIN_FILTER,
                    glow::NEAREST as i32,
                );
                gl.draw_arrays(glow::TRIANGLES, 0, 3);
                check(&gl, "drawing an image")?;
            }
        }
        // SAFETY: the context is current.
        unsafe { gl.flush() };
        Ok(())
    }

    /// Returns when drawing is finished (L16).
    pub fn finish(&self) -> Result<(), Error> {
        let gl = self.gl.enter()?;
        // SAFETY: the context is current.
        unsafe { gl.finish() };
        Ok(())
    }

    /// Calls `copy` with what was drawn of a plane.
    pub fn pixels(
        &mut self,
        plane: usize,
        stream: RawStream,
        copy: impl FnOnce(Pixels) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let _current = self.gl.enter()?;
        self.canvases[plane].resource.mapped(stream, copy)
    }
}

impl Drop for Painter {
    fn drop(&mut self) {
        // Without the context its objects cannot be reached; they go with it.
        if let Ok(gl) = self.gl.enter() {
            for canvas in self.canvases.drain(..) {
                canvas.delete(&gl);
            }
        }
    }
}

impl Canvas {
    fn new(
        gl: &Current<'_>,
        context: &Context,
        size: (u32, u32),
        format: u32,
    ) -> Result<Self, Error> {
        // SAFETY: the GL context is current. What cannot be finished is deleted again.
        unsafe {
            while gl.get_error() != glow::NO_ERROR {}
            let texture = gl.create_texture().map_err(refused)?;
            gl.bind_texture(glow::TEXTURE_2D, Some(texture));
            gl.tex_storage_2d(glow::TEXTURE_2D, 1, format, size.0 as i32, size.1 as i32);
            let framebuffer = gl.create_framebuffer().map_err(refused)?;
            gl.bind_framebuffer(glow::FRAMEBUFFER, Some(framebuffer));
            gl.framebuffer_texture_2d(
                glow::FRAMEBUFFER,
                glow::COLOR_ATTACHMENT0,
                glow::TEXTURE_2D,
                Some(texture),
                0,
            );
            let made = check(gl, "making a texture")
                .and_then(|()| GlResource::new(context, texture.0.get()));
            match made {
                Ok(resource) => Ok(Self {
                    size,
                    format,
                    texture,
                    framebuffer,
                    resource,
                }),
                Err(error) => {
                    gl.delete_framebuffer(framebuffer);
                    gl.delete_texture(texture);
                    Err(error)
                }
            }
        }
    }

    fn delete(self, gl: &Current<'_>) {
        drop(self.resource);
        // SAFETY: the context that they belong to is current.
        unsafe {
            gl.delete_framebuffer(self.framebuffer);
            gl.delete_texture(self.texture);
        }
    }
}

impl Program {
    fn new(gl: &Current<'_>, fourcc: u32) -> Result<Self, Error> {
        let fragment = FRAGMENT_SHADER.replace("ORDER", order(fourcc));
        let stages = [
            (glow::VERTEX_SHADER, VERTEX_SHADER),
            (glow::FRAGMENT_SHADER, &fragment),
        ];
        // SAFETY: the context is current. Shaders that are attached are deleted with the program.
        unsafe {
            let program = gl.create_program().map_err(refused)?;
            for (stage, source) in stages {
                let shader = gl.create_shader(stage).map_err(refused)?;
                gl.shader_source(shader, source);
                gl.compile_shader(shader);
                gl.attach_shader(program, shader);
                gl.delete_shader(shader);
            }
            gl.link_program(program);
            if !gl.get_program_link_status(program) {
                let log = gl.get_program_info_log(program);
                gl.delete_program(program);
                return Err(refused(format!("a shader cannot be linked: {log}")));
            }
            Ok(Self {
                fourcc,
                linked: program,
                start: gl.get_uniform_location(program, "start"),
            })
        }
    }
}

/// The components of a sampled colour in the order of the format's bytes in memory. DRM's names are
/// of little-endian words, so they read backwards.
fn order(fourcc: u32) -> &'static str {
    match &fourcc.to_le_bytes() {
        b"AR24" | b"XR24" => "bgra",
        b"RA24" | b"RX24" => "abgr",
        b"BA24" | b"BX24" => "argb",
        // AB24, XB24, R8, GR88
        _ => "rgba",
    }
}

/// A texture whose pixels have this many bytes.
fn format_of(bytes_per_pixel: u32) -> u32 {
    match bytes_per_pixel {
        1 => glow::R8,
        2 => glow::RG8,
        _ => glow::RGBA8,
    }
}

fn refused(text: impl std::fmt::Display) -> Error {
    Error::Refused(format!("OpenGL ES: {text}"))
}

fn check(gl: &Current<'_>, what: &str) -> Result<(), Error> {
    // SAFETY: the context is current.
    match unsafe { gl.get_error() } {
        glow::NO_ERROR => Ok(()),
        glow::OUT_OF_MEMORY => Err(Error::Exhausted(format!(
            "OpenGL ES: {what}: out of memory"
        ))),
        error => Err(refused(format!("{what} failed (error {error:#x})"))),
    }
}
