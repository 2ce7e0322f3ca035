// SPDX-License-Identifier: MIT OR Apache-2.0

//! A picture in a DMA-BUF that the GPU's own driver has made: a texture, exported
//! (EGL_MESA_image_dma_buf_export). What a compositor hands over is made the same way.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use glow::HasContext;
use gstpipewirezerocopy::egl::{self, Current, DmaBuf, Gl};
use zerocopy_test_producer::{Block, Canvas, Offer, Pixels};

use crate::Outcome;
use crate::egl::{Egl, Memory};
use crate::feed::{self, TEXTURE};

/// Rounds of work for each pixel of a picture that is captured: some milliseconds of a slow GPU.
const WORK: u32 = 200;

/// One triangle that covers everything.
const VERTEX_SHADER: &str = "#version 300 es
void main() {
    vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 4.0 - 1.0;
    gl_Position = vec4(corner, 0.0, 1.0);
}";

/// The known picture of a number (Pixels::byte of zerocopy-test-producer), after some work that takes time.
const FRAGMENT_SHADER: &str = "#version 300 es
precision highp float;
precision highp int;
uniform int number;
uniform int work;
out vec4 colour;
void main() {
    float value = fract(gl_FragCoord.x * 0.37);
    for (int i = 0; i < work; i++) value = fract(sin(value) * 43758.5);
    ivec2 at = ivec2(gl_FragCoord.xy) & 255;
    vec4 bytes = vec4(at.x, at.y, number, 255) / 255.0;
    colour = value > 2.0 ? vec4(0.0) : bytes.ORDER;
}";

/// A texture of four bytes a pixel and the DMA-BUF that it lies in, with a GL context of its own. What is
/// drawn has the bytes of Pixels::Rgba or Pixels::Bgrx in memory, whichever its format is.
pub struct Exported {
    // Before the context that they are of.
    framebuffer: glow::Framebuffer,
    program: glow::Program,
    texture: glow::Texture,
    gl: Gl,
    size: (u32, u32),
    /// A DMA-BUF, or nothing where the driver exports none, and why.
    fd: OwnedFd,
    memory: Memory,
    why_not: Option<String>,
}

impl Exported {
    /// Makes one of this many pixels, on the GPU of a display. Where the driver does not export it or takes
    /// no DMA-BUF, it can be imported all the same (see `feed`).
    pub fn new(display: &egl::Display, size: (u32, u32)) -> Outcome<Self> {
        let egl = Egl::get()?;
        let gl = Gl::new(display, 3)?;
        let current = gl.enter()?;
        // SAFETY: the context is current, what is exported is what was made just now and lives as long as the
        // value that is made of it, as does the context.
        unsafe {
            let mut texture = new_texture(&current, size)?;
            let (egl_display, context) = ((egl.current_display)(), (egl.current_context)());
            let image = egl.image_of(egl_display, context, texture.0.get())?;
            // What is exported may be nothing that can be imported: llvmpipe's is on some displays.
            let exported = egl.export(egl_display, image).and_then(|(fd, memory)| {
                let imported =
                    memory.with(&fd, memory.fourcc, size, |dmabuf| display.import(dmabuf));
                imported.map_err(|error| error.to_string())?;
                Ok((fd, memory))
            });
            (egl.destroy_image)(egl_display, image);
            let (fd, memory, why_not) = match exported {
                Ok((fd, memory)) => (fd, memory, None),
                Err(error) => {
                    // Another one, that was never exported: drivers move what is.
                    current.delete_texture(texture);
                    texture = new_texture(&current, size)?;
                    let memory = Memory {
                        fourcc: u32::from_le_bytes(*b"AB24"),
                        modifier: TEXTURE,
                        stride: 0,
                        offset: feed::number_of(egl_display, context, texture.0.get()),
                    };
                    (File::open("/dev/null")?.into(), memory, Some(error))
                }
            };
            let framebuffer = current.create_framebuffer()?;
            current.bind_framebuffer(glow::FRAMEBUFFER, Some(framebuffer));
            current.framebuffer_texture_2d(
                glow::FRAMEBUFFER,
                glow::COLOR_ATTACHMENT0,
                glow::TEXTURE_2D,
                Some(texture),
                0,
            );
            let program = link(&current, memory.fourcc)?;
            drop(current);
            Ok(Self {
                framebuffer,
                program,
                texture,
                gl,
                size,
                fd,
                memory,
                why_not,
            })
        }
    }

    /// For people.
    pub fn describe(&self) -> String {
        let (width, height) = self.size;
        if let Some(why) = &self.why_not {
            return format!("a texture of {width}x{height}, which is no DMA-BUF: {why}");
        }
        let name = self.memory.fourcc.to_le_bytes();
        format!(
            "exported {width}x{height} {} modifier {:#x} stride {} offset {}",
            String::from_utf8_lossy(&name),
            self.memory.modifier,
            self.memory.stride,
            self.memory.offset
        )
    }

    /// The error says why it is no DMA-BUF.
    pub fn is_dmabuf(&self) -> Outcome<()> {
        match &self.why_not {
            None => Ok(()),
            Some(why) => {
                Err(format!("the GPU's driver exports nothing that it imports: {why}").into())
            }
        }
    }

    /// Pixels.
    pub fn size(&self) -> (u32, u32) {
        self.size
    }

    /// What a PipeWire producer calls it.
    pub fn offer(&self) -> Outcome<Offer> {
        Ok(Offer {
            pixels: self.pixels()?,
            size: self.size,
            modifiers: vec![self.memory.modifier],
            shared: false,
            most: Some(60),
        })
    }

    /// How its pixels lie in memory.
    pub fn pixels(&self) -> Outcome<Pixels> {
        match &self.memory.fourcc.to_le_bytes() {
            b"AB24" => Ok(Pixels::Rgba),
            b"AR24" | b"XR24" => Ok(Pixels::Bgrx),
            _ => Err(format!("a texture in an unexpected format: {}", self.describe()).into()),
        }
    }

    /// DRM's names under which it can be imported: its own, and that of the same memory with its colours the
    /// other way round.
    pub fn fourccs(&self) -> Vec<u32> {
        let swapped = u32::from_le_bytes(if blue_first(self.memory.fourcc) {
            *b"AB24"
        } else {
            *b"XR24"
        });
        match &self.why_not {
            None => vec![self.memory.fourcc, swapped],
            Some(_) => vec![self.memory.fourcc],
        }
    }

    /// What is imported.
    pub fn with_dmabuf<T>(&self, use_it: impl FnOnce(&DmaBuf<'_>) -> T) -> T {
        self.with_dmabuf_as(self.memory.fourcc, use_it)
    }

    /// The same memory, called something else.
    pub fn with_dmabuf_as<T>(&self, fourcc: u32, use_it: impl FnOnce(&DmaBuf<'_>) -> T) -> T {
        self.memory.with(&self.fd, fourcc, self.size, use_it)
    }

    /// The GPU begins to draw picture `number`; the more `work`, the longer it takes.
    pub fn draw(&self, number: u8, work: u32) -> Outcome<()> {
        let current = self.gl.enter()?;
        let (width, height) = (self.size.0 as i32, self.size.1 as i32);
        // SAFETY: the context is current, and all objects are its own.
        unsafe {
            while current.get_error() != glow::NO_ERROR {}
            current.bind_framebuffer(glow::FRAMEBUFFER, Some(self.framebuffer));
            current.viewport(0, 0, width, height);
            current.use_program(Some(self.program));
            let place = |name| current.get_uniform_location(self.program, name);
            current.uniform_1_i32(place("number").as_ref(), number.into());
            current.uniform_1_i32(place("work").as_ref(), work as i32);
            current.draw_arrays(glow::TRIANGLES, 0, 3);
            current.flush();
            match current.get_error() {
                glow::NO_ERROR => Ok(()),
                error => Err(format!("drawing a picture failed (GL error {error:#x})").into()),
            }
        }
    }

    /// A sync file that is signalled when it is drawn.
    pub fn fence(&self) -> Outcome<OwnedFd> {
        let egl = Egl::get()?;
        let current = self.gl.enter()?;
        // SAFETY: the context is current.
        let fence = unsafe { egl.fence((egl.current_display)(), || current.flush()) };
        Ok(fence?)
    }

    /// Returns when it is drawn.
    pub fn finish(&self) -> Outcome<()> {
        let current = self.gl.enter()?;
        // SAFETY: the context is current.
        unsafe { current.finish() };
        Ok(())
    }

    /// What draws, in its own words.
    pub fn renderer(&self) -> Outcome<String> {
        let current = self.gl.enter()?;
        // SAFETY: the context is current.
        Ok(unsafe { current.get_parameter_string(glow::RENDERER) })
    }
}

impl Canvas for Exported {
    fn blocks(&self) -> Vec<Block<'_>> {
        let (offset, stride) = (self.memory.offset as usize, self.memory.stride as usize);
        let length = stride * self.size.1 as usize;
        vec![Block {
            fd: self.fd.as_fd(),
            size: offset + length,
            offset,
            stride,
            length,
        }]
    }

    /// Flushed, not finished: as a compositor leaves it.
    fn draw(&self, number: u8, _by_device: bool) -> Outcome<()> {
        Self::draw(self, number, WORK)
    }
}

/// A texture of four bytes a pixel.
fn new_texture(gl: &Current<'_>, (width, height): (u32, u32)) -> Outcome<glow::Texture> {
    // SAFETY: the context is current.
    unsafe {
        let texture = gl.create_texture()?;
        gl.bind_texture(glow::TEXTURE_2D, Some(texture));
        gl.tex_storage_2d(
            glow::TEXTURE_2D,
            1,
            glow::RGBA8,
            width as i32,
            height as i32,
        );
        Ok(texture)
    }
}

/// Makes the program that draws into memory of that format.
fn link(gl: &Current<'_>, fourcc: u32) -> Outcome<glow::Program> {
    let order = if blue_first(fourcc) { "bgra" } else { "rgba" };
    let fragment = FRAGMENT_SHADER.replace("ORDER", order);
    let stages = [
        (glow::VERTEX_SHADER, VERTEX_SHADER),
        (glow::FRAGMENT_SHADER, &fragment),
    ];
    // SAFETY: the context is current. Shaders that are attached are deleted with the program.
    unsafe {
        let program = gl.create_program()?;
        for (stage, source) in stages {
            let shader = gl.create_shader(stage)?;
            gl.shader_source(shader, source);
            gl.compile_shader(shader);
            gl.attach_shader(program, shader);
            gl.delete_shader(shader);
        }
        gl.link_program(program);
        if !gl.get_program_link_status(program) {
            return Err(gl.get_program_info_log(program).into());
        }
        Ok(program)
    }
}

/// Whether the first byte of a pixel is blue.
fn blue_first(fourcc: u32) -> bool {
    matches!(&fourcc.to_le_bytes(), b"AR24" | b"XR24")
}

impl Drop for Exported {
    fn drop(&mut self) {
        if let Ok(current) = self.gl.enter() {
            // SAFETY: the context is current and the objects are its own.
            unsafe {
                current.delete_program(self.program);
                current.delete_framebuffer(self.framebuffer);
                current.delete_texture(self.texture);
            }
        }
    }
}
