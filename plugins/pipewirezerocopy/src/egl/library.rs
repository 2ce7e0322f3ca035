// SPDX-License-Identifier: MIT OR Apache-2.0

//! libEGL and libgbm, loaded when first needed and never unloaded: drivers leave threads and
//! thread-local data behind that would point into nothing.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::LazyLock;

use khronos_egl as egl;

use super::Error;

/// libEGL, at least 1.5.
pub type Egl = egl::DynamicInstance<egl::EGL1_5>;

/// The name that is part of the ABI; the one without a number comes with the headers only.
const LIBEGL: &str = "libEGL.so.1";
const LIBGBM: &str = "libgbm.so.1";

/// libEGL, or why there is none.
pub fn egl() -> Result<&'static Egl, Error> {
    static LIBRARY: LazyLock<Result<Egl, String>> = LazyLock::new(|| {
        // SAFETY: the library of this name is EGL by the platform's convention; its initialisers
        // need nothing of us.
        let library = unsafe { egl::DynamicInstance::load_from_filename(LIBEGL) }
            .map_err(|error| format!("{LIBEGL} cannot be loaded: {error}"))?;
        let found = library.version();
        library
            .try_cast_into::<egl::Dynamic<libloading::Library, egl::EGL1_5>>()
            .map_err(|_| format!("{LIBEGL} speaks EGL {found:?}, and 1.5 is needed"))
    });
    LIBRARY
        .as_ref()
        .map_err(|text| Error::Unavailable(text.clone()))
}

/// Looks an extension's function up.
///
/// # Safety
///
/// `F` must be the function's type as its specification has it: a function pointer of the
/// `system` calling convention.
pub unsafe fn extension<F: Copy>(egl: &Egl, name: &str) -> Result<F, Error> {
    const { assert!(size_of::<F>() == size_of::<extern "system" fn()>()) };
    let pointer = egl
        .get_proc_address(name)
        .ok_or_else(|| Error::Unavailable(format!("{LIBEGL} has no {name}")))?;
    // SAFETY: both are function pointers of one size; the caller vouches for the type.
    Ok(unsafe { std::mem::transmute_copy(&pointer) })
}

/// A `gbm_device`, by which Mesa opens a DRM node that is no render node of a GPU.
pub struct Gbm {
    device: *mut c_void,
    destroy: unsafe extern "C" fn(*mut c_void),
}

impl Gbm {
    /// Opens a device. The descriptor must stay open as long as the device lives.
    pub fn open(node: BorrowedFd<'_>) -> Result<Self, Error> {
        static LIBRARY: LazyLock<Result<libloading::Library, String>> = LazyLock::new(|| {
            // SAFETY: the library of this name is Mesa's GBM; its initialisers need nothing of us.
            unsafe { libloading::Library::new(LIBGBM) }
                .map_err(|error| format!("{LIBGBM} cannot be loaded: {error}"))
        });
        let library = LIBRARY
            .as_ref()
            .map_err(|text| Error::Unavailable(text.clone()))?;
        let missing = |error| Error::Unavailable(format!("{LIBGBM}: {error}"));
        // SAFETY: these are their types in gbm.h, and the library stays loaded for ever.
        let (create, destroy) = unsafe {
            (
                *library
                    .get::<unsafe extern "C" fn(c_int) -> *mut c_void>(b"gbm_create_device\0")
                    .map_err(missing)?,
                *library
                    .get::<unsafe extern "C" fn(*mut c_void)>(b"gbm_device_destroy\0")
                    .map_err(missing)?,
            )
        };
        // SAFETY: the descriptor is open, and the caller keeps it open.
        let device = unsafe { create(node.as_raw_fd()) };
        if device.is_null() {
            return Err(Error::Unavailable(
                "gbm_create_device takes it for no device of a driver it knows".into(),
            ));
        }
        Ok(Self { device, destroy })
    }

    /// What EGL_KHR_platform_gbm takes as native display.
    pub fn native(&self) -> *mut c_void {
        self.device
    }
}

impl Drop for Gbm {
    fn drop(&mut self) {
        // SAFETY: it was made by gbm_create_device and is destroyed once.
        unsafe { (self.destroy)(self.device) }
    }
}

/// A string that EGL owns for ever.
///
/// # Safety
///
/// `text` is null or a C string that is never freed.
pub unsafe fn text(text: *const c_char) -> Option<&'static CStr> {
    // SAFETY: the caller vouches for it.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) })
}
