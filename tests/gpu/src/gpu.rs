// SPDX-License-Identifier: MIT OR Apache-2.0

//! The GPU as libcuda itself sees it: what it is, and how much of its memory is in use.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use libloading::Library;

use crate::Outcome;

type Context = *mut c_void;

/// A context of our own, in which nothing is done but asking.
pub struct Gpu {
    context: Context,
    push: unsafe extern "C" fn(Context) -> c_int,
    pop: unsafe extern "C" fn(*mut Context) -> c_int,
    destroy: unsafe extern "C" fn(Context) -> c_int,
    memory: unsafe extern "C" fn(*mut usize, *mut usize) -> c_int,
    /// For people.
    pub about: String,
    /// What all of it points into.
    _library: Library,
}

fn check(call: &str, code: c_int) -> Outcome<()> {
    match code {
        0 => Ok(()),
        code => Err(format!("{call}: CUDA error {code}").into()),
    }
}

impl Gpu {
    /// Asks about the device of this number. libcuda must be initialised.
    pub fn new(number: u32) -> Outcome<Self> {
        // SAFETY: it is loaded already, by the plugin; the types are those of cuda.h, and what is written is
        // ours and large enough.
        unsafe {
            let library = Library::new("libcuda.so.1")?;
            let device_get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int =
                *library.get(b"cuDeviceGet\0")?;
            let name_of: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int =
                *library.get(b"cuDeviceGetName\0")?;
            let version_of: unsafe extern "C" fn(*mut c_int) -> c_int =
                *library.get(b"cuDriverGetVersion\0")?;
            let create: unsafe extern "C" fn(*mut Context, c_uint, c_int) -> c_int =
                *library.get(b"cuCtxCreate_v2\0")?;
            let pop: unsafe extern "C" fn(*mut Context) -> c_int =
                *library.get(b"cuCtxPopCurrent_v2\0")?;
            let (mut device, mut version, mut name) = (0, 0, [0; 128]);
            check("cuDriverGetVersion", version_of(&raw mut version))?;
            check(
                "cuDeviceGet",
                device_get(&raw mut device, c_int::try_from(number)?),
            )?;
            let room = name.len() as c_int - 1;
            check("cuDeviceGetName", name_of(name.as_mut_ptr(), room, device))?;
            let name = CStr::from_ptr(name.as_ptr()).to_string_lossy();
            let about = format!(
                "CUDA device {number}: {name}, CUDA {}.{}",
                version / 1000,
                version % 1000 / 10
            );
            let mut context = ptr::null_mut();
            check("cuCtxCreate", create(&raw mut context, 0, device))?;
            // It was made current.
            check("cuCtxPopCurrent", pop(ptr::null_mut()))?;
            Ok(Self {
                context,
                push: *library.get(b"cuCtxPushCurrent_v2\0")?,
                pop,
                destroy: *library.get(b"cuCtxDestroy_v2\0")?,
                memory: *library.get(b"cuMemGetInfo_v2\0")?,
                about,
                _library: library,
            })
        }
    }

    /// Bytes in use, by whomever.
    pub fn used(&self) -> Outcome<usize> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is there until the drop, and the numbers that are written are ours.
        let code = unsafe {
            check("cuCtxPushCurrent", (self.push)(self.context))?;
            let code = (self.memory)(&raw mut free, &raw mut total);
            check("cuCtxPopCurrent", (self.pop)(ptr::null_mut()))?;
            code
        };
        check("cuMemGetInfo", code)?;
        Ok(total.saturating_sub(free))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: it was made here, is current nowhere, and the library is there.
        unsafe { (self.destroy)(self.context) };
    }
}
