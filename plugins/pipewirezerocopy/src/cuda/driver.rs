// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is called of libcuda. Types and values are those of cuda.h, cudaEGL.h and cudaGL.h of CUDA
//! 12; the functions have been there, unchanged, since CUDA 9.
//!
//! The crate cudarc is not used for this: it has no EGL interoperation, and its loader panics where
//! the library or a function is missing.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::ptr;
use std::sync::LazyLock;

use super::Error;
use super::symbols::{load_for_ever, symbols};

/// The name that the driver installs; the one without a number belongs to the toolkit.
const LIBCUDA: &str = "libcuda.so.1";

/// `CUresult`.
pub type Code = c_int;
/// `CUdevice`: a number from 0.
pub type Device = c_int;
/// `CUdeviceptr`: an address in GPU memory.
pub type Address = c_ulonglong;
/// `CUarray`, opaque.
pub type Array = *mut c_void;
/// `CUgraphicsResource`, opaque.
pub type GraphicsResource = *mut c_void;
/// `CUstream`, opaque.
pub type RawStream = *mut c_void;
/// `CUevent`, opaque.
pub type Event = *mut c_void;

pub const SUCCESS: Code = 0;
const OUT_OF_MEMORY: Code = 2;
/// Codes after which the context, and with most of them the process's use of the device, is over:
/// deinitialised, device unavailable, invalid context, uncorrectable memory error, illegal address,
/// launch timeout, destroyed context, assert, hardware stack error, illegal instruction, misaligned
/// address, invalid address space, invalid program counter, launch failure.
const LOST: [Code; 14] = [
    4, 46, 201, 214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719,
];

/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`: who waits sleeps, and nobody asks when.
pub const EVENT_FLAGS: c_uint = 3;
/// `CU_GRAPHICS_REGISTER_FLAGS_READ_ONLY`
pub const READ_ONLY: c_uint = 1;

/// `CU_MEMORYTYPE_DEVICE`
pub const MEMORY_DEVICE: c_uint = 2;
/// `CU_MEMORYTYPE_ARRAY`
pub const MEMORY_ARRAY: c_uint = 3;

/// `CUDA_MEMCPY2D`: a rectangle, in bytes and rows.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Memcpy2d {
    pub src_x_in_bytes: usize,
    pub src_y: usize,
    pub src_memory_type: c_uint,
    pub src_host: *const c_void,
    pub src_device: Address,
    pub src_array: Array,
    pub src_pitch: usize,
    pub dst_x_in_bytes: usize,
    pub dst_y: usize,
    pub dst_memory_type: c_uint,
    pub dst_host: *mut c_void,
    pub dst_device: Address,
    pub dst_array: Array,
    pub dst_pitch: usize,
    pub width_in_bytes: usize,
    pub height: usize,
}

/// `CU_EGL_FRAME_TYPE_ARRAY`
pub const FRAME_ARRAY: c_uint = 0;
/// `CU_EGL_FRAME_TYPE_PITCH`
pub const FRAME_PITCH: c_uint = 1;

/// `CUeglFrame`: where the pixels of a registered EGLImage are.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EglFrame {
    /// For each plane a [`Array`] or, with [`FRAME_PITCH`], an address in GPU memory.
    pub planes: [*mut c_void; 3],
    pub width: c_uint,
    pub height: c_uint,
    pub depth: c_uint,
    /// Bytes from one row to the next, of [`FRAME_PITCH`].
    pub pitch: c_uint,
    pub plane_count: c_uint,
    pub num_channels: c_uint,
    pub frame_type: c_uint,
    pub egl_color_format: c_uint,
    /// `CUarray_format`: the type of a channel.
    pub array_format: c_uint,
}

/// `CU_AD_FORMAT_UNSIGNED_INT8`
pub const CHANNEL_U8: c_uint = 1;

symbols! {
    /// The functions of libcuda. Where two versions of one exist, the name is that of the newer.
    pub struct Driver {
        fn cuInit as init(c_uint) -> Code;
        fn cuGetErrorName as get_error_name(Code, *mut *const c_char) -> Code;
        fn cuDeviceGetCount as device_get_count(*mut c_int) -> Code;
        fn cuDeviceGetPCIBusId as device_get_pci_bus_id(*mut c_char, c_int, Device) -> Code;
        fn cuEventCreate as event_create(*mut Event, c_uint) -> Code;
        fn cuEventRecord as event_record(Event, RawStream) -> Code;
        fn cuEventSynchronize as event_synchronize(Event) -> Code;
        fn cuEventDestroy_v2 as event_destroy(Event) -> Code;
        fn cuMemcpy2DAsync_v2 as memcpy_2d_async(*const Memcpy2d, RawStream) -> Code;
        fn cuGraphicsEGLRegisterImage as egl_register_image(
            *mut GraphicsResource, *mut c_void, c_uint) -> Code;
        fn cuGraphicsResourceGetMappedEglFrame as get_mapped_egl_frame(
            *mut EglFrame, GraphicsResource, c_uint, c_uint) -> Code;
        fn cuGraphicsGLRegisterImage as gl_register_image(
            *mut GraphicsResource, c_uint, c_uint, c_uint) -> Code;
        fn cuGraphicsMapResources as map_resources(
            c_uint, *mut GraphicsResource, RawStream) -> Code;
        fn cuGraphicsUnmapResources as unmap_resources(
            c_uint, *mut GraphicsResource, RawStream) -> Code;
        fn cuGraphicsSubResourceGetMappedArray as get_mapped_array(
            *mut Array, GraphicsResource, c_uint, c_uint) -> Code;
        fn cuGraphicsUnregisterResource as unregister_resource(GraphicsResource) -> Code;
    }
}

impl Driver {
    /// An error for what a call answered, `what` being what was tried and on what.
    pub fn check(&self, code: Code, what: impl FnOnce() -> String) -> Result<(), Error> {
        if code == SUCCESS {
            return Ok(());
        }
        let text = format!("{}: {}", what(), self.name(code));
        Err(match code {
            OUT_OF_MEMORY => Error::Exhausted(text),
            code if LOST.contains(&code) => Error::Lost(text),
            _ => Error::Refused(text),
        })
    }

    fn name(&self, code: Code) -> String {
        let mut name = ptr::null();
        // SAFETY: the pointer that is written is ours.
        let known = unsafe { (self.get_error_name)(code, &raw mut name) };
        if known != SUCCESS || name.is_null() {
            return format!("CUDA error {code}");
        }
        // SAFETY: the driver's names are static strings.
        unsafe { CStr::from_ptr(name) }
            .to_string_lossy()
            .into_owned()
    }
}

/// libcuda, initialised and with at least one device, or why there is none.
pub fn driver() -> Result<&'static Driver, Error> {
    static DRIVER: LazyLock<Result<Driver, String>> = LazyLock::new(|| {
        let library = load_for_ever(LIBCUDA)?;
        let named = |text: String| format!("{LIBCUDA} {text}");
        // SAFETY: the types are those of cuda.h, and the library is never unloaded.
        let driver = unsafe { Driver::load(library) }.map_err(named)?;
        let answered = |call: &str, code| {
            driver
                .check(code, || call.to_owned())
                .map_err(|error| named(error.to_string()))
        };
        // SAFETY: no flags are defined, and there must be none.
        answered("cuInit", unsafe { (driver.init)(0) })?;
        let mut count = 0;
        // SAFETY: the number that is written is ours.
        answered("cuDeviceGetCount", unsafe {
            (driver.device_get_count)(&raw mut count)
        })?;
        if count < 1 {
            return Err(named("knows no device".into()));
        }
        Ok(driver)
    });
    DRIVER
        .as_ref()
        .map_err(|text| Error::Unavailable(text.clone()))
}

/// The PCI address of a device as libcuda has it, for example `0000:65:00.0`.
pub fn pci_address(device: Device) -> Result<String, Error> {
    let driver = driver()?;
    let mut text = [0; 32];
    // SAFETY: there is room for as many bytes as is said.
    let code =
        unsafe { (driver.device_get_pci_bus_id)(text.as_mut_ptr(), text.len() as c_int, device) };
    driver.check(code, || format!("cuDeviceGetPCIBusId of device {device}"))?;
    let bytes = text
        .iter()
        .take_while(|&&byte| byte != 0)
        .map(|&byte| byte.cast_unsigned());
    Ok(String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).to_lowercase())
}

/// How many devices there are.
pub fn device_count() -> Result<Device, Error> {
    let driver = driver()?;
    let mut count = 0;
    // SAFETY: the number that is written is ours.
    let code = unsafe { (driver.device_get_count)(&raw mut count) };
    driver.check(code, || "cuDeviceGetCount".into())?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_are_as_large_as_in_the_headers() {
        // 64 bit: cuda.h and cudaEGL.h.
        assert_eq!(size_of::<Memcpy2d>(), 128);
        assert_eq!(size_of::<EglFrame>(), 64);
    }
}
