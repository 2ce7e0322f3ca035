// SPDX-License-Identifier: MIT OR Apache-2.0

//! OpenGL ES on a display, current only while it is used.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::ptr;

use khronos_egl as egl;

use super::display::Display;
use super::{Error, library};

/// GL_OES_EGL_image. `GLeglImageOES` is a `void *`.
type ImageTargetTexture = unsafe extern "system" fn(u32, *mut c_void);

// From eglext.h.
const SYNC_NATIVE_FENCE_ANDROID: egl::Enum = 0x3144;
const SYNC_NATIVE_FENCE_FD_ANDROID: egl::Int = 0x3145;

type RawSync = *mut c_void;

/// EGL_KHR_fence_sync and EGL_KHR_wait_sync, for EGL_ANDROID_native_fence_sync.
#[derive(Clone, Copy)]
struct Fences {
    create: unsafe extern "system" fn(egl::EGLDisplay, egl::Enum, *const egl::Int) -> RawSync,
    wait: unsafe extern "system" fn(egl::EGLDisplay, RawSync, egl::Int) -> egl::Int,
    destroy: unsafe extern "system" fn(egl::EGLDisplay, RawSync) -> egl::Boolean,
}

impl Fences {
    /// None where the display cannot wait for sync files.
    fn of(display: &Display) -> Option<Self> {
        let extensions = ["EGL_ANDROID_native_fence_sync", "EGL_KHR_wait_sync"];
        if !extensions.iter().all(|name| display.has_extension(name)) {
            return None;
        }
        let egl = display.inner().egl;
        // SAFETY: the types are those of EGL_KHR_fence_sync and EGL_KHR_wait_sync.
        unsafe {
            Some(Self {
                create: library::extension(egl, "eglCreateSyncKHR").ok()?,
                wait: library::extension(egl, "eglWaitSyncKHR").ok()?,
                destroy: library::extension(egl, "eglDestroySyncKHR").ok()?,
            })
        }
    }
}

/// An OpenGL ES context with no surface. It may be used on any thread, on one at a time.
pub struct Gl {
    display: Display,
    context: egl::Context,
    functions: glow::Context,
    image_target_texture: ImageTargetTexture,
    fences: Option<Fences>,
}

// SAFETY: a GL context may go from thread to thread as long as it is current on one at most; it is
// current only within `Current`, which borrows this and stays on its thread.
unsafe impl Send for Gl {}

impl Gl {
    /// Makes a context of OpenGL ES `version` or newer.
    pub fn new(display: &Display, version: u8) -> Result<Self, Error> {
        let inner = display.inner();
        let (egl, raw) = (inner.egl, inner.raw);
        let unavailable =
            |text: String| Error::Unavailable(format!("{}: {text}", display.node().display()));
        for extension in ["EGL_KHR_surfaceless_context", "EGL_KHR_no_config_context"] {
            if !display.has_extension(extension) {
                return Err(unavailable(format!("its driver has no {extension}")));
            }
        }
        // SAFETY: the type is that of GL_OES_EGL_image.
        let image_target_texture =
            unsafe { library::extension(egl, "glEGLImageTargetTexture2DOES") }?;
        let api = Api::bind(display)?;
        // SAFETY: EGL_NO_CONFIG_KHR is null, and the display takes it.
        let no_config = unsafe { egl::Config::from_ptr(ptr::null_mut()) };
        let attributes = [egl::CONTEXT_CLIENT_VERSION, version.into(), egl::NONE];
        let context = egl
            .create_context(raw, no_config, None, &attributes)
            .map_err(|error| unavailable(format!("eglCreateContext: {error}")))?;
        drop(api);
        let before = match Before::replace(display, context) {
            Ok(before) => before,
            Err(error) => {
                let _ = egl.destroy_context(raw, context);
                return Err(error);
            }
        };
        // SAFETY: the context is current, and the functions are the driver's own.
        let functions = unsafe {
            glow::Context::from_loader_function(|name| {
                egl.get_proc_address(name)
                    .map_or(ptr::null(), |function| function as *const c_void)
            })
        };
        drop(before);
        Ok(Self {
            display: display.clone(),
            context,
            functions,
            image_target_texture,
            fences: Fences::of(display),
        })
    }

    /// Whether the GPU can wait for sync files.
    pub fn takes_fences(&self) -> bool {
        self.fences.is_some()
    }

    /// Makes it current on this thread, until what is returned is dropped; then the thread has what
    /// it had before.
    pub fn enter(&self) -> Result<Current<'_>, Error> {
        Ok(Current {
            gl: self,
            _before: Before::replace(&self.display, self.context)?,
        })
    }
}

impl Drop for Gl {
    fn drop(&mut self) {
        let inner = self.display.inner();
        // Fails only for what is no context of this display.
        let _ = inner.egl.destroy_context(inner.raw, self.context);
    }
}

/// A context that is current; the functions of OpenGL ES.
pub struct Current<'a> {
    gl: &'a Gl,
    _before: Before,
}

impl Deref for Current<'_> {
    type Target = glow::Context;

    fn deref(&self) -> &glow::Context {
        &self.gl.functions
    }
}

impl Current<'_> {
    /// Lets the texture that is bound to `GL_TEXTURE_2D` show an EGLImage.
    ///
    /// # Safety
    ///
    /// `image` must be an EGLImage of this display, and live as long as the texture shows it.
    pub unsafe fn show_image(&self, image: *mut c_void) {
        // SAFETY: the context is current; the caller vouches for the image.
        unsafe { (self.gl.image_target_texture)(glow::TEXTURE_2D, image) }
    }

    /// Lets the GPU begin what is drawn from here on only when a sync file is signalled. Nobody waits
    /// here, unless the GPU is the processor.
    pub fn wait_for(&self, fence: BorrowedFd<'_>) -> Result<(), Error> {
        let node = self.gl.display.node().display();
        let unavailable = |text: String| Error::Unavailable(format!("{node}: {text}"));
        let fences = self
            .gl
            .fences
            .ok_or_else(|| unavailable("its driver has no EGL_ANDROID_native_fence_sync".into()))?;
        let fd = fence
            .try_clone_to_owned()
            .map_err(|error| unavailable(format!("no descriptor: {error}")))?;
        let attributes = [SYNC_NATIVE_FENCE_FD_ANDROID, fd.as_raw_fd(), egl::NONE];
        let display = self.gl.display.inner().raw.as_ptr();
        // SAFETY: the list ends with EGL_NONE; the display is initialised.
        let sync =
            unsafe { (fences.create)(display, SYNC_NATIVE_FENCE_ANDROID, attributes.as_ptr()) };
        if sync.is_null() {
            return Err(unavailable("eglCreateSync takes a fence for none".into()));
        }
        // It belongs to the sync object from here on.
        let _ = fd.into_raw_fd();
        // SAFETY: the context is current, no flags are defined, and the object was made just now; what
        // waits for it keeps it.
        let (waits, _) = unsafe {
            (
                (fences.wait)(display, sync, 0),
                (fences.destroy)(display, sync),
            )
        };
        if waits != egl::TRUE as egl::Int {
            return Err(unavailable("eglWaitSync failed".into()));
        }
        Ok(())
    }
}

/// OpenGL ES is the kind of context that calls on this thread are about, until this is dropped. Which kind
/// that is, each thread has a setting for.
struct Api {
    display: Display,
    before: egl::Enum,
}

impl Api {
    fn bind(display: &Display) -> Result<Self, Error> {
        let egl = display.inner().egl;
        let before = egl.query_api();
        egl.bind_api(egl::OPENGL_ES_API).map_err(|error| {
            let node = display.node().display();
            Error::Unavailable(format!("{node}: eglBindAPI: {error}"))
        })?;
        Ok(Self {
            display: display.clone(),
            before,
        })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        // It was bound before.
        let _ = self.display.inner().egl.bind_api(self.before);
    }
}

/// What was current on this thread, and will be again: the thread may be the application's.
struct Before {
    display: Display,
    others: Option<Others>,
    /// Until that was restored.
    _api: Api,
    /// What is current is so on a thread.
    _one_thread: PhantomData<*const ()>,
}

struct Others {
    display: egl::Display,
    draw: Option<egl::Surface>,
    read: Option<egl::Surface>,
    context: egl::Context,
}

impl Before {
    fn replace(display: &Display, context: egl::Context) -> Result<Self, Error> {
        let api = Api::bind(display)?;
        let inner = display.inner();
        let egl = inner.egl;
        let others = egl.get_current_context().zip(egl.get_current_display());
        let others = others.map(|(context, display)| Others {
            display,
            draw: egl.get_current_surface(egl::DRAW),
            read: egl.get_current_surface(egl::READ),
            context,
        });
        egl.make_current(inner.raw, None, None, Some(context))
            .map_err(|error| {
                let node = display.node().display();
                Error::Unavailable(format!("{node}: eglMakeCurrent: {error}"))
            })?;
        Ok(Self {
            display: display.clone(),
            others,
            _api: api,
            _one_thread: PhantomData,
        })
    }
}

impl Drop for Before {
    fn drop(&mut self) {
        let inner = self.display.inner();
        // It was possible before; where it no longer is, nothing can be done about it.
        let _ = match &self.others {
            None => inner.egl.make_current(inner.raw, None, None, None),
            Some(others) => {
                let Others {
                    display,
                    draw,
                    read,
                    context,
                } = *others;
                inner.egl.make_current(display, draw, read, Some(context))
            }
        };
    }
}
