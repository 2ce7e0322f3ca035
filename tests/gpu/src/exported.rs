// SPDX-License-Identifier: MIT OR Apache-2.0

//! A picture in a DMA-BUF that the GPU's own driver has made: a texture, exported
//! (EGL_MESA_image_dma_buf_export). What a compositor hands over is made the same way.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

use glow::HasContext;
use gstpipewirezerocopy::egl::{self, Current, DmaBuf, Gl, Plane};
use libloading::Library;
use zerocopy_test_producer::{Block, Canvas, Offer, Pixels};

use crate::Outcome;

/// `EGL_GL_TEXTURE_2D` (egl.h)
const GL_TEXTURE_2D: u32 = 0x30B1;

/// Rounds of work for each pixel of a picture that is captured: some milliseconds of a slow GPU.
const WORK: u32 = 200;

type Display = *mut c_void;
type Image = *mut c_void;
type Lookup = unsafe extern "C" fn(*const c_char) -> *mut c_void;

/// A function of EGL.
///
/// # Safety
///
/// `F` must be its type.
unsafe fn find<F: Copy>(lookup: Lookup, name: &CStr) -> Result<F, String> {
    // SAFETY: any name may be asked for.
    let found = unsafe { lookup(name.as_ptr()) };
    if found.is_null() {
        return Err(format!("EGL has no {}", name.to_string_lossy()));
    }
    // SAFETY: it is a function, and the caller vouches for its type.
    Ok(unsafe { std::mem::transmute_copy(&found) })
}

/// The functions of EGL that the plugin does not need.
struct Egl {
    current_display: unsafe extern "C" fn() -> Display,
    current_context: unsafe extern "C" fn() -> *mut c_void,
    create_image:
        unsafe extern "C" fn(Display, *mut c_void, u32, *mut c_void, *const isize) -> Image,
    destroy_image: unsafe extern "C" fn(Display, Image) -> u32,
    query: unsafe extern "C" fn(Display, Image, *mut c_int, *mut c_int, *mut u64) -> u32,
    export: unsafe extern "C" fn(Display, Image, *mut c_int, *mut c_int, *mut c_int) -> u32,
}

impl Egl {
    fn get() -> Outcome<&'static Self> {
        static EGL: LazyLock<Result<Egl, String>> = LazyLock::new(|| {
            // SAFETY: libEGL is loaded already, and the types are those of egl.h and eglext.h.
            unsafe {
                let library = Library::new("libEGL.so.1").map_err(|error| error.to_string())?;
                let library: &'static Library = Box::leak(Box::new(library));
                let lookup = *library
                    .get::<Lookup>(b"eglGetProcAddress\0")
                    .map_err(|error| error.to_string())?;
                Ok(Egl {
                    current_display: find(lookup, c"eglGetCurrentDisplay")?,
                    current_context: find(lookup, c"eglGetCurrentContext")?,
                    create_image: find(lookup, c"eglCreateImage")?,
                    destroy_image: find(lookup, c"eglDestroyImage")?,
                    query: find(lookup, c"eglExportDMABUFImageQueryMESA")?,
                    export: find(lookup, c"eglExportDMABUFImageMESA")?,
                })
            }
        });
        EGL.as_ref().map_err(|text| text.clone().into())
    }
}

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
    float value = gl_FragCoord.x;
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
    fd: OwnedFd,
    fourcc: u32,
    modifier: u64,
    stride: u32,
    offset: u32,
}

impl Exported {
    /// Makes one of this many pixels, on the GPU of a display.
    pub fn new(display: &egl::Display, size: (u32, u32)) -> Outcome<Self> {
        let egl = Egl::get()?;
        let gl = Gl::new(display, 3)?;
        let current = gl.enter()?;
        // SAFETY: the context is current, what is exported is what was made just now, and all that
        // is written is ours. One plane is asked for and there is room for four.
        unsafe {
            let texture = current.create_texture()?;
            current.bind_texture(glow::TEXTURE_2D, Some(texture));
            let (width, height) = (size.0 as i32, size.1 as i32);
            current.tex_storage_2d(glow::TEXTURE_2D, 1, glow::RGBA8, width, height);
            let display = (egl.current_display)();
            let number = std::ptr::without_provenance_mut(texture.0.get() as usize);
            let context = (egl.current_context)();
            let image =
                (egl.create_image)(display, context, GL_TEXTURE_2D, number, std::ptr::null());
            if image.is_null() {
                return Err("eglCreateImage of a texture failed".into());
            }
            let (mut fourcc, mut planes, mut modifiers) = (0, 0, [0; 4]);
            let (mut fds, mut strides, mut offsets) = ([-1; 4], [0; 4], [0; 4]);
            let done = (egl.query)(
                display,
                image,
                &raw mut fourcc,
                &raw mut planes,
                modifiers.as_mut_ptr(),
            ) == 1
                && planes == 1
                && (egl.export)(
                    display,
                    image,
                    fds.as_mut_ptr(),
                    strides.as_mut_ptr(),
                    offsets.as_mut_ptr(),
                ) == 1
                && fds[0] >= 0;
            (egl.destroy_image)(display, image);
            if !done {
                return Err(format!("a texture of {planes} planes cannot be exported").into());
            }
            let framebuffer = current.create_framebuffer()?;
            current.bind_framebuffer(glow::FRAMEBUFFER, Some(framebuffer));
            current.framebuffer_texture_2d(
                glow::FRAMEBUFFER,
                glow::COLOR_ATTACHMENT0,
                glow::TEXTURE_2D,
                Some(texture),
                0,
            );
            let program = link(&current, fourcc.cast_unsigned())?;
            drop(current);
            Ok(Self {
                framebuffer,
                program,
                texture,
                gl,
                size,
                fd: OwnedFd::from_raw_fd(fds[0]),
                fourcc: fourcc.cast_unsigned(),
                modifier: modifiers[0],
                stride: strides[0].cast_unsigned(),
                offset: offsets[0].cast_unsigned(),
            })
        }
    }

    /// For people.
    pub fn describe(&self) -> String {
        let name = self.fourcc.to_le_bytes();
        format!(
            "exported {}x{} {} modifier {:#x} stride {} offset {}",
            self.size.0,
            self.size.1,
            String::from_utf8_lossy(&name),
            self.modifier,
            self.stride,
            self.offset
        )
    }

    /// DRM's name of its format.
    pub fn fourcc(&self) -> u32 {
        self.fourcc
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
            modifiers: vec![self.modifier],
            shared: false,
            most: Some(60),
        })
    }

    /// How its pixels lie in memory.
    pub fn pixels(&self) -> Outcome<Pixels> {
        match &self.fourcc.to_le_bytes() {
            b"AB24" => Ok(Pixels::Rgba),
            b"AR24" | b"XR24" => Ok(Pixels::Bgrx),
            _ => Err(format!("a texture in an unexpected format: {}", self.describe()).into()),
        }
    }

    /// The fourcc of the same memory with its colours the other way round.
    pub fn swapped(&self) -> u32 {
        u32::from_le_bytes(if blue_first(self.fourcc) {
            *b"AB24"
        } else {
            *b"XR24"
        })
    }

    /// What is imported.
    pub fn with_dmabuf<T>(&self, use_it: impl FnOnce(&DmaBuf<'_>) -> T) -> T {
        self.with_dmabuf_as(self.fourcc, use_it)
    }

    /// The same memory, called something else.
    pub fn with_dmabuf_as<T>(&self, fourcc: u32, use_it: impl FnOnce(&DmaBuf<'_>) -> T) -> T {
        let plane = Plane {
            fd: self.fd.as_fd(),
            offset: self.offset,
            stride: self.stride,
        };
        use_it(&DmaBuf {
            fourcc,
            modifier: Some(self.modifier),
            width: self.size.0,
            height: self.size.1,
            planes: &[plane],
        })
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
        let (offset, stride) = (self.offset as usize, self.stride as usize);
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
