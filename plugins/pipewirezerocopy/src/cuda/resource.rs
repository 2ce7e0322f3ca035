// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the driver has registered: EGL images and GL textures that CUDA reads.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;

use super::driver::{
    Address, Array, CHANNEL_U8, Code, Driver, EglFrame, Event, FRAME_ARRAY, FRAME_PITCH,
    GraphicsResource, MEMORY_ARRAY, MEMORY_DEVICE, Memcpy2d, READ_ONLY, RawStream, driver,
};
use super::{Context, Error, driver as raw};

/// Pixels of one plane, where CUDA reads them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pixels {
    /// In a layout of the GPU's own.
    Array(Array),
    /// The address of the first row, and bytes from one to the next.
    Rows(Address, usize),
}

/// A rectangle of a plane: what is copied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rectangle {
    /// Bytes from the beginning of a row.
    pub x: usize,
    /// Rows from the first.
    pub y: usize,
    /// Bytes of each row.
    pub width: usize,
    /// How many rows.
    pub rows: usize,
}

/// Registers something with the context; it is unregistered when this is dropped.
struct Registered {
    raw: GraphicsResource,
    driver: &'static Driver,
    context: Context,
}

// SAFETY: the driver's handles belong to a context and not to a thread.
unsafe impl Send for Registered {}

impl Registered {
    fn new(
        context: &Context,
        what: impl Fn() -> String,
        register: impl FnOnce(&Driver, *mut GraphicsResource) -> Code,
    ) -> Result<Self, Error> {
        let driver = driver()?;
        let mut raw = ptr::null_mut();
        let _current = context.enter()?;
        driver.check(register(driver, &raw mut raw), what)?;
        Ok(Self {
            raw,
            driver,
            context: context.clone(),
        })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // With a context that is gone, what belonged to it is gone too.
        if let Ok(_current) = self.context.enter() {
            // SAFETY: it was registered in this context and is unregistered once.
            unsafe { (self.driver.unregister_resource)(self.raw) };
        }
    }
}

/// An EGLImage of one plane that is registered with CUDA.
///
/// Registering takes long now and then (L15), so one lasts as long as the image. It shows what is in
/// the memory at the time of each copy; it need not be mapped for that (cudaEGL.h).
pub struct EglResource {
    _registered: Registered,
    pixels: Pixels,
}

// SAFETY: as for `Registered`; the rest is addresses in GPU memory.
unsafe impl Send for EglResource {}
// SAFETY: nothing in it changes.
unsafe impl Sync for EglResource {}

impl EglResource {
    /// Registers an image of `width` by `height` pixels of `bytes_per_pixel` bytes.
    ///
    /// # Safety
    ///
    /// `image` must be an EGLImage that lives longer than this.
    pub unsafe fn new(
        context: &Context,
        image: *mut c_void,
        (width, height): (u32, u32),
        bytes_per_pixel: u32,
    ) -> Result<Self, Error> {
        let what = |call: &str| format!("{call} of a {width}x{height} image");
        let registered = Registered::new(
            context,
            || what("cuGraphicsEGLRegisterImage"),
            |driver, raw| {
                // SAFETY: the context is current, and the caller vouches for the image.
                unsafe { (driver.egl_register_image)(raw, image, READ_ONLY) }
            },
        )?;
        let driver = registered.driver;
        let mut frame = MaybeUninit::<EglFrame>::zeroed();
        let code = {
            let _current = context.enter()?;
            // SAFETY: the resource is registered in the context that is current.
            unsafe { (driver.get_mapped_egl_frame)(frame.as_mut_ptr(), registered.raw, 0, 0) }
        };
        driver.check(code, || what("cuGraphicsResourceGetMappedEglFrame"))?;
        // SAFETY: zeros are a valid frame, and the driver has written a better one.
        let frame = unsafe { frame.assume_init() };
        let as_expected = frame.plane_count == 1
            && frame.width >= width
            && frame.height >= height
            && frame.array_format == CHANNEL_U8
            && frame.num_channels == bytes_per_pixel;
        let pixels = match frame.frame_type {
            FRAME_ARRAY => Pixels::Array(frame.planes[0]),
            FRAME_PITCH => Pixels::Rows(frame.planes[0] as Address, frame.pitch as usize),
            _ => return Err(Error::Refused(what("an unknown kind of frame"))),
        };
        if !as_expected {
            let what = what("a frame that is not what was imported");
            return Err(Error::Refused(format!("{what}: {frame:?}")));
        }
        Ok(Self {
            _registered: registered,
            pixels,
        })
    }

    pub(super) fn pixels(&self) -> Pixels {
        self.pixels
    }
}

/// A GL texture that is registered with CUDA. The GL context that it belongs to must be current
/// wherever this is used or dropped.
pub(super) struct GlResource {
    registered: Registered,
}

impl GlResource {
    /// Registers a two-dimensional texture.
    pub fn new(context: &Context, texture: u32) -> Result<Self, Error> {
        /// `GL_TEXTURE_2D`
        const TEXTURE_2D: u32 = 0x0DE1;
        let registered = Registered::new(
            context,
            || format!("cuGraphicsGLRegisterImage of texture {texture}"),
            |driver, resource| {
                // SAFETY: both contexts are current. A number that is no texture is an error.
                unsafe { (driver.gl_register_image)(resource, texture, TEXTURE_2D, READ_ONLY) }
            },
        )?;
        Ok(Self { registered })
    }

    /// Calls `copy`, which may queue copies in `stream`, with the texture's pixels.
    ///
    /// What was drawn before is there; what is drawn later comes after the copies.
    pub fn mapped(
        &mut self,
        stream: RawStream,
        copy: impl FnOnce(Pixels) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Registered {
            raw,
            driver,
            context,
        } = &mut self.registered;
        let _current = context.enter()?;
        // SAFETY: one resource of the context that is current, and a stream of it.
        let code = unsafe { (driver.map_resources)(1, raw, stream) };
        driver.check(code, || "cuGraphicsMapResources".into())?;
        let mut array = ptr::null_mut();
        // SAFETY: the resource is mapped, and has one level.
        let code = unsafe { (driver.get_mapped_array)(&raw mut array, *raw, 0, 0) };
        let result = driver
            .check(code, || "cuGraphicsSubResourceGetMappedArray".into())
            .and_then(|()| copy(Pixels::Array(array)));
        // SAFETY: it was mapped in this stream.
        let code = unsafe { (driver.unmap_resources)(1, raw, stream) };
        result.and(driver.check(code, || "cuGraphicsUnmapResources".into()))
    }
}

/// Queues the copy of a rectangle to rows at `to`, `pitch` bytes apart. The context is current.
pub(super) fn queue_copy(
    from: Pixels,
    part: Rectangle,
    (to, pitch): (Address, usize),
    stream: RawStream,
) -> Result<(), Error> {
    let (src_memory_type, src_array, src_device, src_pitch) = match from {
        Pixels::Array(array) => (MEMORY_ARRAY, array, 0, 0),
        Pixels::Rows(address, pitch) => (MEMORY_DEVICE, ptr::null_mut(), address, pitch),
    };
    let copy = Memcpy2d {
        src_x_in_bytes: part.x,
        src_y: part.y,
        src_memory_type,
        src_host: ptr::null(),
        src_device,
        src_array,
        src_pitch,
        dst_x_in_bytes: 0,
        dst_y: 0,
        dst_memory_type: MEMORY_DEVICE,
        dst_host: ptr::null_mut(),
        dst_device: to,
        dst_array: ptr::null_mut(),
        dst_pitch: pitch,
        width_in_bytes: part.width,
        height: part.rows,
    };
    let driver = driver()?;
    // SAFETY: the driver knows how large its arrays are; the caller has seen that the rows fit the
    // target, which stays until the copy is done (`Done::wait`).
    let code = unsafe { (driver.memcpy_2d_async)(&raw const copy, stream) };
    driver.check(code, || {
        format!("cuMemcpy2DAsync of {}x{} bytes", part.width, part.rows)
    })
}

/// An event by which a copy's end is awaited.
pub(super) struct Done {
    raw: Event,
    driver: &'static Driver,
    context: Context,
}

// SAFETY: the driver's handles belong to a context and not to a thread.
unsafe impl Send for Done {}

impl Done {
    pub fn new(context: &Context) -> Result<Self, Error> {
        let driver = driver()?;
        let mut event = ptr::null_mut();
        let _current = context.enter()?;
        // SAFETY: the pointer that is written is ours.
        let code = unsafe { (driver.event_create)(&raw mut event, raw::EVENT_FLAGS) };
        driver.check(code, || "cuEventCreate".into())?;
        Ok(Self {
            raw: event,
            driver,
            context: context.clone(),
        })
    }

    /// Waits until all is done that has been queued in `stream` so far. The context is current.
    ///
    /// Not cancellable: a copy takes a fraction of a millisecond, and a GPU that hangs is an error
    /// of the driver's after some seconds.
    pub fn wait(&self, stream: RawStream) -> Result<(), Error> {
        // SAFETY: event and stream are of the context that is current.
        let code = unsafe { (self.driver.event_record)(self.raw, stream) };
        self.driver.check(code, || "cuEventRecord".into())?;
        // SAFETY: the event was recorded.
        let code = unsafe { (self.driver.event_synchronize)(self.raw) };
        self.driver.check(code, || "cuEventSynchronize".into())
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: it was made in this context and is destroyed once.
            unsafe { (self.driver.event_destroy)(self.raw) };
        }
    }
}
