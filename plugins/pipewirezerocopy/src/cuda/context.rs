// SPDX-License-Identifier: MIT OR Apache-2.0

//! Contexts, streams and buffers of libgstcuda, as Rust has things: what one owns it drops, and
//! what belongs to a context keeps that context.

use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use gst::glib::translate::{FromGlibPtrFull, from_glib};
use gst::prelude::*;
use gst::{ffi, glib};

use super::Error;
use super::driver::{Address, RawStream};
use super::gstcuda::{self, CudaBufferPool, CudaMemory, GstCuda, MAP_CUDA, RawContext};
use super::share::CONTEXT_TYPE;

/// The caps feature of CUDA memory (gstcudamemory.h).
pub const MEMORY_FEATURE: &str = "memory:CUDAMemory";

/// A `GstCudaContext`: a CUDA context that elements share. Clones are the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    object: gst::Object,
}

impl Context {
    /// Makes a context on the device of this number.
    pub fn new(device: u32) -> Result<Self, Error> {
        super::available()?;
        let library = gstcuda::library()?;
        // SAFETY: libcuda is loaded.
        let raw = unsafe { (library.context_new)(device) };
        if raw.is_null() {
            return Err(Error::Unavailable(format!(
                "no context can be made on CUDA device {device} (GST_DEBUG=cudacontext:3 says why)"
            )));
        }
        // SAFETY: it is a GstObject, and the reference is ours.
        let object = unsafe { gst::Object::from_glib_full(raw) };
        Ok(Self { object })
    }

    /// The context that somebody shares, if that is what `shared` carries.
    pub fn from_shared(shared: &gst::ContextRef) -> Option<Self> {
        // Before anything is loaded: contexts of all kinds are handed around.
        if shared.context_type() != CONTEXT_TYPE {
            return None;
        }
        let library = gstcuda::library().ok()?;
        let object: gst::Object = shared.structure().get(CONTEXT_TYPE).ok()?;
        // SAFETY: registering a type has no preconditions.
        let class: glib::Type = unsafe { from_glib((library.context_get_type)()) };
        object.type_().is_a(class).then_some(Self { object })
    }

    /// What others are given to share it.
    pub fn to_shared(&self) -> Result<gst::Context, Error> {
        let library = gstcuda::library()?;
        // SAFETY: the object is a GstCudaContext; what comes is a new GstContext.
        Ok(unsafe { gst::Context::from_glib_full((library.context_to_gst)(self.raw())) })
    }

    /// The number of its device.
    pub fn device(&self) -> u32 {
        self.object.property("cuda-device-id")
    }

    /// Whether it is this object.
    pub(super) fn is(&self, object: &gst::Object) -> bool {
        self.object == *object
    }

    pub(super) fn downgrade(&self) -> glib::WeakRef<gst::Object> {
        self.object.downgrade()
    }

    /// Makes it the thread's current context until the guard is dropped.
    pub(super) fn enter(&self) -> Result<Entered<'_>, Error> {
        let library = gstcuda::library()?;
        // SAFETY: the object is a GstCudaContext.
        if unsafe { (library.context_push)(self.raw()) } == 0 {
            return Err(Error::Lost(format!(
                "the context on CUDA device {} cannot be made current",
                self.device()
            )));
        }
        Ok(Entered {
            library,
            _context: PhantomData,
        })
    }

    fn raw(&self) -> RawContext {
        self.object.as_ptr()
    }
}

/// A context is current on this thread.
pub(super) struct Entered<'a> {
    library: &'static GstCuda,
    /// Contexts are current on a thread, so this stays where it is.
    _context: PhantomData<(&'a Context, *const ())>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        // SAFETY: it pops what `enter` pushed on this thread; nobody wants to know which it was.
        unsafe { (self.library.context_pop)(ptr::null_mut()) };
    }
}

/// A `GstCudaStream`. It keeps its context: a stream that is forgotten keeps 28 MiB of GPU memory
/// (L17), so nothing here is.
pub struct Stream {
    raw: NonNull<ffi::GstMiniObject>,
    library: &'static GstCuda,
}

// SAFETY: a GstCudaStream is an atomically counted object, and CUDA's streams belong to no thread.
unsafe impl Send for Stream {}
// SAFETY: nothing in it changes.
unsafe impl Sync for Stream {}

impl Stream {
    /// Makes a stream of the context.
    pub fn new(context: &Context) -> Result<Self, Error> {
        let library = gstcuda::library()?;
        // SAFETY: the object is a GstCudaContext; the reference that comes is ours.
        let raw = unsafe { (library.stream_new)(context.raw()) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let device = context.device();
            Error::Exhausted(format!("no stream can be made on CUDA device {device}"))
        })?;
        Ok(Self { raw, library })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: it gives back the reference that is ours.
        unsafe { (self.library.stream_unref)(self.raw.as_ptr()) }
    }
}

/// A pool of CUDA memory, set up for one kind of caps.
#[derive(Clone, Debug)]
pub struct Pool {
    /// The pool, active or not, as GStreamer wants it.
    pub pool: gst::BufferPool,
    /// Bytes of its buffers, which is not what the caps say: rows are as far apart as the GPU likes.
    pub size: u32,
}

impl Pool {
    /// A new pool of the context. Its buffers are filled in `stream`.
    pub fn new(
        context: &Context,
        stream: &Stream,
        caps: &gst::Caps,
        size: u32,
    ) -> Result<Self, Error> {
        let library = gstcuda::library()?;
        // SAFETY: the object is a GstCudaContext; the pool that comes is ours and not floating.
        let pool: gst::BufferPool =
            unsafe { gst::BufferPool::from_glib_full((library.buffer_pool_new)(context.raw())) };
        Self::configure(pool, stream, caps, size, 0, 0)
    }

    /// A pool that downstream proposes, if its memory is of this context. That of another one would
    /// be copied through the CPU (L17).
    pub fn of_downstream(
        pool: gst::BufferPool,
        context: &Context,
        stream: &Stream,
        caps: &gst::Caps,
        (size, min, max): (u32, u32, u32),
    ) -> Option<Self> {
        let library = gstcuda::library().ok()?;
        // SAFETY: registering a type has no preconditions.
        let class: glib::Type = unsafe { from_glib((library.buffer_pool_get_type)()) };
        if !pool.type_().is_a(class) {
            return None;
        }
        // SAFETY: the pool is a GstCudaBufferPool, whose context is set when it is made and never
        // changes.
        let owner = unsafe { (*pool.as_ptr().cast::<CudaBufferPool>()).context };
        if owner != context.raw() {
            return None;
        }
        Self::configure(pool, stream, caps, size, min, max).ok()
    }

    /// Whether it was set up for these caps.
    pub fn is_for(&self, caps: &gst::Caps) -> bool {
        let params = self.pool.config().params();
        params.is_some_and(|(known, ..)| known.as_ref() == Some(caps))
    }

    fn configure(
        pool: gst::BufferPool,
        stream: &Stream,
        caps: &gst::Caps,
        size: u32,
        min: u32,
        max: u32,
    ) -> Result<Self, Error> {
        let mut config = pool.config();
        config.set_params(Some(caps), size, min, max);
        config.add_option(gst_video::BUFFER_POOL_OPTION_VIDEO_META);
        // SAFETY: the structure is ours alone; it takes a reference to the stream of its own.
        unsafe { (stream.library.config_set_stream)(config.as_mut_ptr(), stream.raw.as_ptr()) };
        // It allocates a first buffer to learn the layout.
        pool.set_config(config)
            .map_err(|_| Error::Exhausted(format!("no CUDA memory can be had for {caps}")))?;
        let size = pool.config().params().map_or(size, |(_, size, _, _)| size);
        Ok(Self { pool, size })
    }
}

/// A buffer of CUDA memory, mapped for a copy to be queued into it.
pub(super) struct Target {
    memory: NonNull<ffi::GstMemory>,
    map: ffi::GstMapInfo,
    /// For each plane: bytes from the beginning, and from one row to the next.
    planes: [(usize, usize); gst_video::VIDEO_MAX_PLANES],
    stream: RawStream,
}

impl Target {
    /// Maps a buffer that was made by a [`Pool`] of `context` for pictures of `info`.
    pub fn map(
        buffer: &mut gst::BufferRef,
        info: &gst_video::VideoInfo,
        context: &Context,
    ) -> Result<Self, Error> {
        let library = gstcuda::library()?;
        let foreign = |what: &str| Error::Refused(format!("a buffer of the pool {what}"));
        // The rows are as far apart as the GPU likes, which the meta says (L17).
        let meta = buffer.meta::<gst_video::VideoMeta>();
        let (offsets, strides) = meta
            .as_ref()
            .map_or((info.offset(), info.stride()), |meta| {
                (meta.offset(), meta.stride())
            });
        let mut planes = [(0, 0); gst_video::VIDEO_MAX_PLANES];
        for (plane, (&offset, &stride)) in planes.iter_mut().zip(offsets.iter().zip(strides)) {
            *plane = (offset, usize::try_from(stride).unwrap_or(0));
        }
        if buffer.n_memory() != 1 {
            return Err(foreign("is not one piece of CUDA memory"));
        }
        // SAFETY: the buffer is writable and has one memory, which is borrowed for a moment.
        let memory = unsafe { ffi::gst_buffer_peek_memory(buffer.as_mut_ptr(), 0) };
        // SAFETY: it is a memory; what is read of it, once it is known to be a GstCudaMemory, is set
        // when it is made and never changes.
        let stream = unsafe {
            if (library.is_cuda_memory)(memory) == 0 {
                return Err(foreign("is no CUDA memory"));
            }
            let memory = memory.cast::<CudaMemory>();
            if (*memory).context != context.raw() {
                return Err(foreign("is of another CUDA context"));
            }
            (library.stream_get_handle)((library.memory_get_stream)(memory))
        };
        let mut map = std::mem::MaybeUninit::uninit();
        // SAFETY: the memory is there and the buffer is ours to write to; a reference of our own
        // keeps it until the mapping ends. With MAP_CUDA nothing of it is read or written here.
        unsafe {
            if ffi::gst_memory_map(memory, map.as_mut_ptr(), ffi::GST_MAP_WRITE | MAP_CUDA) == 0 {
                return Err(foreign("cannot be mapped"));
            }
            ffi::gst_mini_object_ref(memory.cast());
            Ok(Self {
                memory: NonNull::new_unchecked(memory),
                map: map.assume_init(),
                planes,
                stream,
            })
        }
    }

    /// The stream in which whoever uses the memory later waits for it.
    pub fn stream(&self) -> RawStream {
        self.stream
    }

    /// Where rows of `width` bytes of a plane lie: the address of the first, and bytes from one to
    /// the next. None where `rows` of them do not fit.
    pub fn plane(&self, index: usize, width: usize, rows: usize) -> Option<(Address, usize)> {
        let &(offset, stride) = self.planes.get(index)?;
        let end = stride
            .checked_mul(rows.checked_sub(1)?)?
            .checked_add(width)?
            .checked_add(offset)?;
        (width <= stride && end <= self.map.size)
            .then_some((self.map.data as Address + offset as Address, stride))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // SAFETY: the mapping is the one that `map` made, and the reference too. Unmapping waits for
        // nothing: the memory notes that its stream has work to finish.
        unsafe {
            ffi::gst_memory_unmap(self.memory.as_ptr(), &raw mut self.map);
            ffi::gst_mini_object_unref(self.memory.as_ptr().cast());
        }
    }
}
