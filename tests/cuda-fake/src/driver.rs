// SPDX-License-Identifier: MIT OR Apache-2.0

//! libcuda's functions, and those by which a test steers them. Numbers are those of cuda.h.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::ptr;

use crate::control::Alive;
use crate::gl;
use crate::state::{
    CURRENT, Code, INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, Memcpy2d, NOT_SUPPORTED,
    Resource, Rows, SUCCESS, has_context, state,
};

/// Rows are this far apart at least, so that nobody takes the width for the pitch.
const PITCH: usize = 512;

/// Bytes of memory that the GPU says it has.
const ROOM: usize = 16 << 30;

/// `CUeglFrame`
#[repr(C)]
struct EglFrame {
    planes: [usize; 3],
    width: c_uint,
    height: c_uint,
    depth: c_uint,
    pitch: c_uint,
    plane_count: c_uint,
    channels: c_uint,
    frame_type: c_uint,
    colour: c_uint,
    array_format: c_uint,
}

/// Writes a result where the caller wants it.
fn put<T>(to: *mut T, value: T) {
    // SAFETY: as for the real library, the caller gives a place of the right type.
    unsafe { to.write(value) }
}

fn get<T: Copy>(from: *const T) -> T {
    // SAFETY: as for the real library, the caller gives a place of the right type.
    unsafe { from.read() }
}

/// Takes memory; aligned as a GPU's is.
fn allocate(address: *mut usize, bytes: usize) -> Result<(), Code> {
    has_context()?;
    // SAFETY: any size will do; it is freed in `free`.
    let memory = unsafe { libc::aligned_alloc(PITCH, bytes.next_multiple_of(PITCH)) } as usize;
    if memory == 0 {
        return Err(2);
    }
    state().memories.insert(memory, bytes);
    put(address, memory);
    Ok(())
}

fn free(address: usize) -> Result<(), Code> {
    has_context()?;
    state().memories.remove(&address).ok_or(INVALID_VALUE)?;
    // SAFETY: it was allocated in `allocate`, and is freed once.
    unsafe { libc::free(ptr::with_exposed_provenance_mut(address)) };
    Ok(())
}

/// Functions that note their call, fail if they were told to, and do their work.
macro_rules! calls {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        #[allow(non_snake_case)]
        extern "C" fn $name($($argument: $type),*) -> Code {
            let work = || -> Result<(), Code> {
                state().note(stringify!($name))?;
                $body
            };
            work().err().unwrap_or(SUCCESS)
        }
    )*};
}

/// Functions that are there for libgstcuda's loader, and can do nothing.
macro_rules! unsupported {
    ($($name:ident)*) => {calls! {$(fn $name() { Err(NOT_SUPPORTED) })*}};
}

calls! {
    fn cuInit(flags: c_uint) {
        if flags == 0 { Ok(()) } else { Err(INVALID_VALUE) }
    }
    fn cuDriverGetVersion(version: *mut c_int) {
        put(version, 12_040);
        Ok(())
    }
    fn cuGetErrorName(code: c_int, name: *mut *const c_char) {
        let text = match code {
            2 => c"CUDA_ERROR_OUT_OF_MEMORY",
            719 => c"CUDA_ERROR_LAUNCH_FAILED",
            _ => return Err(INVALID_VALUE),
        };
        put(name, text.as_ptr());
        Ok(())
    }
    fn cuGetErrorString(_code: c_int, text: *mut *const c_char) {
        put(text, c"as the test wants it".as_ptr());
        Ok(())
    }
    fn cuDeviceGetCount(count: *mut c_int) {
        put(count, state().devices.len() as c_int);
        Ok(())
    }
    fn cuDeviceGet(device: *mut c_int, number: c_int) {
        state().has_device(number)?;
        put(device, number);
        Ok(())
    }
    fn cuDeviceGetName(name: *mut c_char, room: c_int, _device: c_int) {
        if room < 5 {
            return Err(INVALID_VALUE);
        }
        put(name.cast(), *b"fake\0");
        Ok(())
    }
    fn cuDeviceGetPCIBusId(text: *mut c_char, room: c_int, device: c_int) {
        if room < 13 {
            return Err(INVALID_VALUE);
        }
        let state = state();
        state.has_device(device)?;
        for (index, byte) in state.devices[device as usize].bytes().chain([0]).take(13).enumerate() {
            put(text.wrapping_add(index).cast(), byte);
        }
        Ok(())
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) {
        // Texture alignment, and the version that can encode; nothing else is there.
        put(value, match attribute { 14 => PITCH as c_int, 75 => 8, _ => 0 });
        Ok(())
    }
    fn cuDeviceCanAccessPeer(can: *mut c_int, _device: c_int, _peer: c_int) {
        put(can, 0);
        Ok(())
    }

    fn cuCtxCreate_v2(context: *mut usize, _flags: c_uint, device: c_int) {
        let mut state = state();
        state.has_device(device)?;
        let new = state.handle();
        state.contexts.insert(new, device);
        CURRENT.with_borrow_mut(|stack| stack.push(new));
        put(context, new);
        Ok(())
    }
    fn cuCtxDestroy_v2(context: usize) {
        state().contexts.remove(&context).map(drop).ok_or(INVALID_CONTEXT)
    }
    fn cuCtxPushCurrent_v2(context: usize) {
        if !state().contexts.contains_key(&context) {
            return Err(INVALID_CONTEXT);
        }
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    }
    fn cuCtxPopCurrent_v2(context: *mut usize) {
        let popped = CURRENT.with_borrow_mut(Vec::pop).ok_or(INVALID_CONTEXT)?;
        if !context.is_null() {
            put(context, popped);
        }
        Ok(())
    }

    fn cuStreamCreate(stream: *mut usize, _flags: c_uint) {
        has_context()?;
        let mut state = state();
        let new = state.handle();
        state.streams.insert(new);
        put(stream, new);
        Ok(())
    }
    fn cuStreamDestroy_v2(stream: usize) {
        has_context()?;
        let mut state = state();
        state.finish(stream)?;
        if state.streams.remove(&stream) { Ok(()) } else { Err(INVALID_HANDLE) }
    }
    fn cuStreamSynchronize(stream: usize) {
        has_context()?;
        state().finish(stream)
    }
    fn cuEventCreate(event: *mut usize, _flags: c_uint) {
        has_context()?;
        let mut state = state();
        let new = state.handle();
        state.events.insert(new, 0);
        put(event, new);
        Ok(())
    }
    fn cuEventRecord(event: usize, stream: usize) {
        has_context()?;
        *state().events.get_mut(&event).ok_or(INVALID_HANDLE)? = stream;
        Ok(())
    }
    fn cuEventSynchronize(event: usize) {
        let mut state = state();
        let stream = *state.events.get(&event).ok_or(INVALID_HANDLE)?;
        state.finish(stream)
    }
    fn cuEventDestroy_v2(event: usize) {
        has_context()?;
        state().events.remove(&event).map(drop).ok_or(INVALID_HANDLE)
    }

    fn cuMemAlloc_v2(address: *mut usize, bytes: usize) {
        allocate(address, bytes)
    }
    fn cuMemAllocPitch_v2(address: *mut usize, pitch: *mut usize, width: usize, rows: usize, _element: c_uint) {
        let apart = width.next_multiple_of(PITCH);
        put(pitch, apart);
        allocate(address, apart * rows)
    }
    fn cuMemAllocHost_v2(address: *mut usize, bytes: usize) {
        allocate(address, bytes)
    }
    fn cuMemFree_v2(address: usize) {
        free(address)
    }
    fn cuMemFreeHost(address: usize) {
        free(address)
    }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        has_context()?;
        let state = state();
        // As much as a forgotten context of the real one keeps.
        let used = state.contexts.len() * (28 << 20) + state.memories.values().sum::<usize>();
        put(total, ROOM);
        put(free, ROOM.saturating_sub(used));
        Ok(())
    }
    fn cuMemcpy2D_v2(copy: *const Memcpy2d) {
        has_context()?;
        state().copy(&get(copy))
    }
    fn cuMemcpy2DAsync_v2(copy: *const Memcpy2d, stream: usize) {
        has_context()?;
        let copy = get(copy);
        state().queued.push((stream, copy));
        Ok(())
    }

    fn cuGraphicsEGLRegisterImage(resource: *mut usize, image: usize, _flags: c_uint) {
        has_context()?;
        let mut state = state();
        let known = state.images.get(&image).map(|rows| Resource::Image(*rows));
        // An image that nobody has described, and that nobody can look at, the driver does not take.
        let shown = || {
            let rows = gl::with_image(state.with_gl?, image, gl::layout)?;
            Some(Resource::Shown(image, rows, Box::default()))
        };
        let registered = known.or_else(shown).ok_or(INVALID_VALUE)?;
        let new = state.handle();
        state.resources.insert(new, registered);
        put(resource, new);
        Ok(())
    }
    fn cuGraphicsResourceGetMappedEglFrame(frame: *mut EglFrame, resource: usize, index: c_uint, level: c_uint) {
        has_context()?;
        let state = state();
        // In rows, or in an array, whose number is that of the resource.
        let (rows, start, kind, pitch) = match state.resources.get(&resource) {
            Some(Resource::Image(rows)) => (rows, rows.start, 1, rows.pitch),
            Some(Resource::Shown(_, rows, _)) => (rows, resource, 0, 0),
            _ => return Err(INVALID_HANDLE),
        };
        if (index, level) != (0, 0) {
            return Err(INVALID_VALUE);
        }
        put(frame, EglFrame {
            planes: [start, 0, 0],
            width: (rows.pitch / rows.bytes_per_pixel as usize) as c_uint,
            height: (rows.length / rows.pitch) as c_uint,
            depth: 0,
            pitch: pitch as c_uint,
            plane_count: 1,
            channels: rows.bytes_per_pixel,
            frame_type: kind,
            colour: 0,
            array_format: 1,
        });
        Ok(())
    }
    fn cuGraphicsGLRegisterImage(resource: *mut usize, texture: c_uint, _target: c_uint, _flags: c_uint) {
        has_context()?;
        let rows = gl::layout(texture).ok_or(NOT_SUPPORTED)?;
        let mut state = state();
        let new = state.handle();
        state.resources.insert(new, Resource::Texture(texture, None, rows));
        put(resource, new);
        Ok(())
    }
    fn cuGraphicsMapResources(count: c_uint, resources: *const usize, _stream: usize) {
        has_context()?;
        let resource = get(resources);
        let mut state = state();
        match state.resources.get_mut(&resource) {
            Some(Resource::Texture(texture, pixels, rows)) if count == 1 && pixels.is_none() => {
                let read = gl::read(*texture, *rows).ok_or(NOT_SUPPORTED)?;
                let array = Rows { start: read.as_ptr() as usize, length: read.len(), ..*rows };
                *pixels = Some(read);
                state.arrays.insert(resource, array);
                Ok(())
            }
            _ => Err(INVALID_HANDLE),
        }
    }
    fn cuGraphicsUnmapResources(_count: c_uint, resources: *const usize, stream: usize) {
        has_context()?;
        let resource = get(resources);
        let mut state = state();
        // The texture may be drawn to again, so what reads it comes first.
        state.finish(stream)?;
        state.arrays.remove(&resource);
        match state.resources.get_mut(&resource) {
            Some(Resource::Texture(_, pixels, _)) => pixels.take().map(drop).ok_or(INVALID_HANDLE),
            _ => Err(INVALID_HANDLE),
        }
    }
    fn cuGraphicsSubResourceGetMappedArray(array: *mut usize, resource: usize, _index: c_uint, _level: c_uint) {
        if !state().arrays.contains_key(&resource) {
            return Err(INVALID_HANDLE);
        }
        put(array, resource);
        Ok(())
    }
    fn cuGraphicsUnregisterResource(resource: usize) {
        has_context()?;
        let mut state = state();
        state.arrays.remove(&resource);
        state.resources.remove(&resource).map(drop).ok_or(INVALID_HANDLE)
    }
}

unsupported! {
    cuCtxSynchronize cuCtxEnablePeerAccess cuCtxDisablePeerAccess cuCtxGetLimit cuCtxSetLimit
    cuGraphicsResourceSetMapFlags_v2 cuGraphicsResourceGetMappedPointer_v2 cuGraphicsGLRegisterBuffer
    cuGLGetDevices_v2 cuMemcpyDtoD_v2 cuMemcpyDtoDAsync_v2 cuMemcpyDtoH_v2 cuMemcpyDtoHAsync_v2
    cuMemcpyHtoD_v2 cuMemcpyHtoDAsync_v2 cuMemsetD2D8_v2 cuMemsetD2D8Async cuMemsetD2D16_v2
    cuMemsetD2D16Async cuMemsetD2D32_v2 cuMemsetD2D32Async cuModuleLoadData cuModuleUnload
    cuModuleGetFunction cuTexObjectCreate cuTexObjectDestroy cuLaunchKernel cuIpcGetEventHandle
    cuIpcOpenEventHandle cuIpcGetMemHandle cuIpcOpenMemHandle cuIpcCloseMemHandle
}

#[unsafe(no_mangle)]
extern "C" fn fake_set_image(
    image: usize,
    start: *const u8,
    length: usize,
    pitch: usize,
    bytes_per_pixel: u32,
) {
    let rows = Rows {
        start: start as usize,
        length,
        pitch,
        bytes_per_pixel,
    };
    state().images.insert(image, rows);
}

#[unsafe(no_mangle)]
extern "C" fn fake_lend_gl(with_gl: Option<gl::WithGl>, blue_first: bool) {
    let mut state = state();
    state.with_gl = with_gl;
    state.blue_first = blue_first;
}

#[unsafe(no_mangle)]
extern "C" fn fake_fail(call: *const c_char, after: u32, code: c_int) {
    // SAFETY: the test gives a C string.
    let call = unsafe { CStr::from_ptr(call) }
        .to_string_lossy()
        .into_owned();
    state().failures.insert(call, (after, code));
}

#[unsafe(no_mangle)]
extern "C" fn fake_set_devices(addresses: *const c_char) {
    // SAFETY: the test gives a C string.
    let addresses = unsafe { CStr::from_ptr(addresses) }.to_string_lossy();
    state().devices = addresses.split(',').map(str::to_owned).collect();
}

#[unsafe(no_mangle)]
extern "C" fn fake_contexts_on(device: c_int) -> usize {
    state()
        .contexts
        .values()
        .filter(|on| **on == device)
        .count()
}

#[unsafe(no_mangle)]
extern "C" fn fake_alive(to: *mut Alive) {
    let state = state();
    put(
        to,
        Alive {
            contexts: state.contexts.len(),
            streams: state.streams.len(),
            events: state.events.len(),
            memories: state.memories.len(),
            resources: state.resources.len(),
        },
    );
}

#[unsafe(no_mangle)]
extern "C" fn fake_take_calls(to: *mut u8, room: usize) -> usize {
    let text = std::mem::take(&mut state().calls).join(" ");
    let length = text.len().min(room);
    // SAFETY: the test gives that much room.
    unsafe { ptr::copy_nonoverlapping(text.as_ptr(), to, length) };
    length
}
