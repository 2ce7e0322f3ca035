// SPDX-License-Identifier: MIT OR Apache-2.0

//! Reads the textures of the GL context that is current, where there is one, and EGL images with a
//! context that the test lends: what a real driver shares with the GPU, this one copies.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::transmute_copy;

use crate::state::Rows;

const TEXTURE_2D: c_uint = 0x0DE1;
const TEXTURE_WIDTH: c_uint = 0x1000;
const TEXTURE_HEIGHT: c_uint = 0x1001;
const TEXTURE_INTERNAL_FORMAT: c_uint = 0x1003;
const TEXTURE_BINDING_2D: c_uint = 0x8069;
const R8: c_int = 0x8229;
const RG8: c_int = 0x822B;
const FRAMEBUFFER: c_uint = 0x8D40;
const FRAMEBUFFER_BINDING: c_uint = 0x8CA6;
const COLOR_ATTACHMENT0: c_uint = 0x8CE0;
const RGBA: c_uint = 0x1908;
const UNSIGNED_BYTE: c_uint = 0x1401;

/// A function of GL, from the libEGL that the process has loaded, if it has.
fn function<F: Copy>(name: &CStr) -> Option<F> {
    // SAFETY: the library is only looked at if it is there; its function has this type. Function
    // pointers are of one size, and each name below is used with its own type.
    unsafe {
        let library = libc::dlopen(c"libEGL.so.1".as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_NOW);
        let lookup = (!library.is_null())
            .then(|| libc::dlsym(library, c"eglGetProcAddress".as_ptr()))
            .filter(|lookup| !lookup.is_null())?;
        let lookup: unsafe extern "C" fn(*const c_char) -> *mut c_void = transmute_copy(&lookup);
        let found = lookup(name.as_ptr());
        (!found.is_null()).then(|| transmute_copy(&found))
    }
}

type Get = unsafe extern "C" fn(c_uint, *mut c_int);
type Bind = unsafe extern "C" fn(c_uint, c_uint);

/// Makes some GL context current on this thread, calls its first argument with the second, and makes
/// current again what was.
pub type WithGl = extern "C" fn(extern "C" fn(*mut c_void), *mut c_void);

/// Calls `work` with a texture that shows an EGL image.
pub fn with_image<T>(
    with_gl: WithGl,
    image: usize,
    work: impl FnOnce(c_uint) -> Option<T>,
) -> Option<T> {
    /// What is done once, and what came of it.
    type Task<'a> = (Option<Box<dyn FnOnce() + 'a>>, ());
    extern "C" fn call(task: *mut c_void) {
        // SAFETY: it is the task below, which lives through the call.
        let task = unsafe { &mut *task.cast::<Task<'_>>() };
        if let Some(work) = task.0.take() {
            work();
        }
    }
    let mut found = None;
    let mut task: Task<'_> = (Some(Box::new(|| found = show(image, work))), ());
    with_gl(call, (&raw mut task).cast());
    drop(task);
    found
}

fn show<T>(image: usize, work: impl FnOnce(c_uint) -> Option<T>) -> Option<T> {
    type Textures = unsafe extern "C" fn(c_int, *mut c_uint);
    type Target = unsafe extern "C" fn(c_uint, *mut c_void);
    let make: Textures = function(c"glGenTextures")?;
    let delete: Textures = function(c"glDeleteTextures")?;
    let bind: Bind = function(c"glBindTexture")?;
    let target: Target = function(c"glEGLImageTargetTexture2DOES")?;
    let mut texture = 0;
    // SAFETY: a context is current; the test says that the image is one of its display.
    unsafe {
        make(1, &raw mut texture);
        bind(TEXTURE_2D, texture);
        target(TEXTURE_2D, std::ptr::with_exposed_provenance_mut(image));
        let found = work(texture);
        delete(1, &raw mut texture);
        found
    }
}

/// How large a texture is; GL ES 3.1 can tell.
pub fn layout(texture: c_uint) -> Option<Rows> {
    type Level = unsafe extern "C" fn(c_uint, c_int, c_uint, *mut c_int);
    let integer: Get = function(c"glGetIntegerv")?;
    let bind: Bind = function(c"glBindTexture")?;
    let level: Level = function(c"glGetTexLevelParameteriv")?;
    let mut before = 0;
    let mut values = [0; 3];
    // SAFETY: without a current context these do nothing; with one, they are asked of a texture of
    // it, and what was bound is bound again.
    unsafe {
        integer(TEXTURE_BINDING_2D, &raw mut before);
        bind(TEXTURE_2D, texture);
        for (value, name) in
            values
                .iter_mut()
                .zip([TEXTURE_WIDTH, TEXTURE_HEIGHT, TEXTURE_INTERNAL_FORMAT])
        {
            level(TEXTURE_2D, 0, name, value);
        }
        bind(TEXTURE_2D, before.cast_unsigned());
    }
    let [width, height, format] = values;
    let bytes_per_pixel = match format {
        R8 => 1,
        RG8 => 2,
        _ => 4,
    };
    let pitch = usize::try_from(width).ok()? * bytes_per_pixel as usize;
    let length = pitch * usize::try_from(height).ok()?;
    (length > 0).then_some(Rows {
        start: 0,
        length,
        pitch,
        bytes_per_pixel,
    })
}

/// A texture's bytes.
pub fn read(texture: c_uint, rows: Rows) -> Option<Box<[u8]>> {
    type Make = unsafe extern "C" fn(c_int, *mut c_uint);
    type Delete = unsafe extern "C" fn(c_int, *const c_uint);
    type Attach = unsafe extern "C" fn(c_uint, c_uint, c_uint, c_uint, c_int);
    type Read = unsafe extern "C" fn(c_int, c_int, c_int, c_int, c_uint, c_uint, *mut c_void);
    type Error = unsafe extern "C" fn() -> c_uint;
    let integer: Get = function(c"glGetIntegerv")?;
    let bind: Bind = function(c"glBindFramebuffer")?;
    let make: Make = function(c"glGenFramebuffers")?;
    let delete: Delete = function(c"glDeleteFramebuffers")?;
    let attach: Attach = function(c"glFramebufferTexture2D")?;
    let read: Read = function(c"glReadPixels")?;
    let error: Error = function(c"glGetError")?;
    let bytes_per_pixel = rows.bytes_per_pixel as usize;
    let (width, height) = (rows.pitch / bytes_per_pixel, rows.length / rows.pitch);
    let mut pixels = vec![0_u8; width * height * 4];
    let (mut before, mut framebuffer) = (0, 0);
    // SAFETY: a framebuffer of the current context is made, used and deleted, and there is room for
    // all pixels, four bytes each.
    let failed = unsafe {
        integer(FRAMEBUFFER_BINDING, &raw mut before);
        make(1, &raw mut framebuffer);
        bind(FRAMEBUFFER, framebuffer);
        attach(FRAMEBUFFER, COLOR_ATTACHMENT0, TEXTURE_2D, texture, 0);
        let to = pixels.as_mut_ptr().cast();
        read(
            0,
            0,
            width as c_int,
            height as c_int,
            RGBA,
            UNSIGNED_BYTE,
            to,
        );
        let failed = error();
        bind(FRAMEBUFFER, before.cast_unsigned());
        delete(1, &raw const framebuffer);
        failed
    };
    let kept = pixels
        .chunks_exact(4)
        .flat_map(|pixel| pixel[..bytes_per_pixel].iter().copied());
    (failed == 0).then(|| kept.collect())
}
