// SPDX-License-Identifier: MIT OR Apache-2.0

//! A picture in a DMA-BUF that the GPU's own driver has made: a texture, exported
//! (EGL_MESA_image_dma_buf_export). What a compositor hands over is made the same way.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

use glow::HasContext;
use gstpipewirezerocopy::egl::{DmaBuf, Gl, Plane};
use libloading::Library;

use crate::Outcome;

/// `EGL_GL_TEXTURE_2D` (egl.h)
const GL_TEXTURE_2D: u32 = 0x30B1;

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

/// A texture of four bytes a pixel and the DMA-BUF that it lies in.
pub struct Exported<'a> {
    gl: &'a Gl,
    texture: glow::Texture,
    size: (u32, u32),
    fd: OwnedFd,
    fourcc: u32,
    modifier: u64,
    stride: u32,
    offset: u32,
}

impl<'a> Exported<'a> {
    /// Makes one of this many pixels.
    pub fn new(gl: &'a Gl, size: (u32, u32)) -> Outcome<Self> {
        let egl = Egl::get()?;
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
            Ok(Self {
                gl,
                texture,
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

    /// Pixels.
    pub fn size(&self) -> (u32, u32) {
        self.size
    }

    /// GStreamer's name for the same bytes.
    pub fn format(&self) -> Outcome<gst_video::VideoFormat> {
        match &self.fourcc.to_le_bytes() {
            b"AB24" => Ok(gst_video::VideoFormat::Rgba),
            b"XB24" => Ok(gst_video::VideoFormat::Rgbx),
            b"AR24" => Ok(gst_video::VideoFormat::Bgra),
            b"XR24" => Ok(gst_video::VideoFormat::Bgrx),
            _ => Err(format!("a texture in an unexpected format: {}", self.describe()).into()),
        }
    }

    /// Whether the first byte of a pixel is blue.
    pub fn blue_first(&self) -> bool {
        matches!(&self.fourcc.to_le_bytes(), b"AR24" | b"XR24")
    }

    /// What is imported.
    pub fn with_dmabuf<T>(&self, use_it: impl FnOnce(&DmaBuf<'_>) -> T) -> T {
        let plane = Plane {
            fd: self.fd.as_fd(),
            offset: self.offset,
            stride: self.stride,
        };
        use_it(&DmaBuf {
            fourcc: self.fourcc,
            modifier: Some(self.modifier),
            width: self.size.0,
            height: self.size.1,
            planes: &[plane],
        })
    }

    /// Puts these R, G, B, A bytes in, and waits until they are there.
    pub fn fill(&self, pixels: &[u8]) -> Outcome<()> {
        let (width, height) = (self.size.0 as i32, self.size.1 as i32);
        let current = self.gl.enter()?;
        // SAFETY: the context is current and the texture its own; there are as many bytes as pixels
        // need, which is asserted.
        unsafe {
            assert_eq!(
                pixels.len(),
                self.size.0 as usize * self.size.1 as usize * 4
            );
            current.bind_texture(glow::TEXTURE_2D, Some(self.texture));
            current.tex_sub_image_2d(
                glow::TEXTURE_2D,
                0,
                0,
                0,
                width,
                height,
                glow::RGBA,
                glow::UNSIGNED_BYTE,
                glow::PixelUnpackData::Slice(Some(pixels)),
            );
            current.finish();
        }
        Ok(())
    }

    /// Draws it full of one colour, and waits until it is there.
    pub fn clear(&self, colour: [u8; 4]) -> Outcome<()> {
        let current = self.gl.enter()?;
        let [red, green, blue, alpha] = colour.map(|value| f32::from(value) / 255.0);
        // SAFETY: the context is current, and all objects are its own.
        unsafe {
            let framebuffer = current.create_framebuffer()?;
            current.bind_framebuffer(glow::FRAMEBUFFER, Some(framebuffer));
            current.framebuffer_texture_2d(
                glow::FRAMEBUFFER,
                glow::COLOR_ATTACHMENT0,
                glow::TEXTURE_2D,
                Some(self.texture),
                0,
            );
            current.clear_color(red, green, blue, alpha);
            current.clear(glow::COLOR_BUFFER_BIT);
            current.finish();
            current.delete_framebuffer(framebuffer);
        }
        Ok(())
    }
}

impl Drop for Exported<'_> {
    fn drop(&mut self) {
        if let Ok(current) = self.gl.enter() {
            // SAFETY: the context is current and the texture its own.
            unsafe { current.delete_texture(self.texture) };
        }
    }
}

/// What draws, in its own words.
pub fn renderer(gl: &Gl) -> Outcome<String> {
    let current = gl.enter()?;
    // SAFETY: the context is current.
    Ok(unsafe { current.get_parameter_string(glow::RENDERER) })
}
