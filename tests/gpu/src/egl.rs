// SPDX-License-Identifier: MIT OR Apache-2.0

//! The functions of EGL that the plugin does not need.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

use gstpipewirezerocopy::egl::{DmaBuf, Plane};
use libloading::Library;

pub type Display = *mut c_void;
pub type Context = *mut c_void;
pub type Image = *mut c_void;
pub type Lookup = unsafe extern "C" fn(*const c_char) -> *mut c_void;

/// `EGL_SYNC_NATIVE_FENCE_ANDROID` (eglext.h)
const NATIVE_FENCE: u32 = 0x3144;
/// `EGL_GL_TEXTURE_2D` (egl.h)
const GL_TEXTURE_2D: u32 = 0x30B1;

/// `eglGetProcAddress` of libEGL, which stays loaded.
pub fn lookup() -> Result<Lookup, String> {
    static LOOKUP: LazyLock<Result<Lookup, String>> = LazyLock::new(|| {
        // SAFETY: it is EGL by its name, and the type is that of egl.h.
        unsafe {
            let library = Library::new("libEGL.so.1").map_err(|error| error.to_string())?;
            let library: &'static Library = Box::leak(Box::new(library));
            let lookup = library.get::<Lookup>(b"eglGetProcAddress\0");
            lookup
                .map(|found| *found)
                .map_err(|error| error.to_string())
        }
    });
    LOOKUP.clone()
}

/// A function of EGL.
///
/// # Safety
///
/// `F` must be its type.
pub unsafe fn find<F: Copy>(lookup: Lookup, name: &CStr) -> Result<F, String> {
    // SAFETY: any name may be asked for.
    let found = unsafe { lookup(name.as_ptr()) };
    if found.is_null() {
        return Err(format!("EGL has no {}", name.to_string_lossy()));
    }
    // SAFETY: it is a function, and the caller vouches for its type.
    Ok(unsafe { std::mem::transmute_copy(&found) })
}

/// What textures become images with, and those DMA-BUFs.
pub struct Egl {
    pub current_display: unsafe extern "C" fn() -> Display,
    pub current_context: unsafe extern "C" fn() -> Context,
    create_image: unsafe extern "C" fn(Display, Context, u32, *mut c_void, *const isize) -> Image,
    pub destroy_image: unsafe extern "C" fn(Display, Image) -> u32,
    export: Result<Export, String>,
    fence: Result<Fence, String>,
}

/// EGL_MESA_image_dma_buf_export
#[derive(Clone)]
struct Export {
    query: unsafe extern "C" fn(Display, Image, *mut c_int, *mut c_int, *mut u64) -> u32,
    export: unsafe extern "C" fn(Display, Image, *mut c_int, *mut c_int, *mut c_int) -> u32,
}

/// EGL_ANDROID_native_fence_sync
#[derive(Clone)]
struct Fence {
    create: unsafe extern "C" fn(Display, u32, *const c_int) -> *mut c_void,
    dup: unsafe extern "C" fn(Display, *mut c_void) -> c_int,
    destroy: unsafe extern "C" fn(Display, *mut c_void) -> u32,
}

/// How an image lies in a DMA-BUF.
pub struct Memory {
    pub fourcc: u32,
    pub modifier: u64,
    pub stride: u32,
    pub offset: u32,
}

impl Memory {
    /// What is imported, of this many pixels and under that name of its format.
    pub fn with<T>(
        &self,
        fd: &OwnedFd,
        fourcc: u32,
        (width, height): (u32, u32),
        use_it: impl FnOnce(&DmaBuf<'_>) -> T,
    ) -> T {
        let plane = Plane {
            fd: fd.as_fd(),
            offset: self.offset,
            stride: self.stride,
        };
        use_it(&DmaBuf {
            fourcc,
            modifier: Some(self.modifier),
            width,
            height,
            planes: &[plane],
        })
    }
}

impl Egl {
    pub fn get() -> Result<&'static Self, String> {
        static EGL: LazyLock<Result<Egl, String>> = LazyLock::new(|| {
            let lookup = lookup()?;
            // SAFETY: the types are those of egl.h and eglext.h.
            unsafe {
                let query = find(lookup, c"eglExportDMABUFImageQueryMESA");
                let export = query.and_then(|query| {
                    let export = find(lookup, c"eglExportDMABUFImageMESA")?;
                    Ok(Export { query, export })
                });
                Ok(Egl {
                    current_display: find(lookup, c"eglGetCurrentDisplay")?,
                    current_context: find(lookup, c"eglGetCurrentContext")?,
                    create_image: find(lookup, c"eglCreateImage")?,
                    destroy_image: find(lookup, c"eglDestroyImage")?,
                    export,
                    fence: find(lookup, c"eglDupNativeFenceFDANDROID").and_then(|dup| {
                        Ok(Fence {
                            create: find(lookup, c"eglCreateSyncKHR")?,
                            dup,
                            destroy: find(lookup, c"eglDestroySyncKHR")?,
                        })
                    }),
                })
            }
        });
        EGL.as_ref().map_err(Clone::clone)
    }

    /// An image of a texture of a context, which need not be current.
    ///
    /// # Safety
    ///
    /// Display and context are initialised and alive, and the texture is one of the context.
    pub unsafe fn image_of(
        &self,
        display: Display,
        context: Context,
        texture: u32,
    ) -> Result<Image, String> {
        let number = std::ptr::without_provenance_mut(texture as usize);
        // SAFETY: the caller vouches for all of it.
        let image = unsafe {
            (self.create_image)(display, context, GL_TEXTURE_2D, number, std::ptr::null())
        };
        if image.is_null() {
            return Err("eglCreateImage of a texture failed".into());
        }
        Ok(image)
    }

    /// A sync file of what was drawn so far; `flush` flushes.
    ///
    /// # Safety
    ///
    /// A context of the display is current.
    pub unsafe fn fence(&self, display: Display, flush: impl FnOnce()) -> Result<OwnedFd, String> {
        let functions = self.fence.as_ref().map_err(Clone::clone)?;
        // SAFETY: no attributes make a new fence; it is destroyed once, and the descriptor is ours.
        unsafe {
            let sync = (functions.create)(display, NATIVE_FENCE, std::ptr::null());
            if sync.is_null() {
                return Err("eglCreateSync makes no native fence".into());
            }
            // There is no descriptor before.
            flush();
            let fd = (functions.dup)(display, sync);
            (functions.destroy)(display, sync);
            if fd < 0 {
                return Err("eglDupNativeFenceFDANDROID failed".into());
            }
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }

    /// An image's memory.
    ///
    /// # Safety
    ///
    /// The image is one of the display.
    pub unsafe fn export(
        &self,
        display: Display,
        image: Image,
    ) -> Result<(OwnedFd, Memory), String> {
        let functions = self.export.as_ref().map_err(Clone::clone)?;
        let (mut fourcc, mut planes, mut modifiers) = (0, 0, [0; 4]);
        let (mut fds, mut strides, mut offsets) = ([-1; 4], [0; 4], [0; 4]);
        // SAFETY: all that is written is ours; one plane is asked for and there is room for four.
        let exported = unsafe {
            if (functions.query)(
                display,
                image,
                &raw mut fourcc,
                &raw mut planes,
                modifiers.as_mut_ptr(),
            ) != 1
            {
                return Err("eglExportDMABUFImageQueryMESA failed".into());
            }
            if planes != 1 {
                return Err(format!("a texture of {planes} planes"));
            }
            (functions.export)(
                display,
                image,
                fds.as_mut_ptr(),
                strides.as_mut_ptr(),
                offsets.as_mut_ptr(),
            )
        };
        if exported != 1 || fds[0] < 0 {
            return Err("eglExportDMABUFImageMESA failed".into());
        }
        // SAFETY: EGL has just opened it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fds[0]) };
        let memory = Memory {
            fourcc: fourcc.cast_unsigned(),
            modifier: modifiers[0],
            stride: strides[0].cast_unsigned(),
            offset: offsets[0].cast_unsigned(),
        };
        Ok((fd, memory))
    }
}
