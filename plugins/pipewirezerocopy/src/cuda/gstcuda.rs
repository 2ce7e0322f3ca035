// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is called of libgstcuda (gst-plugins-bad), checked against its headers of 1.24.0, 1.26.2 and
//! 1.28. There is no crate for it, and its ABI is not promised to stay; `context` is all that
//! uses this file.
//!
//! It is loaded from the default search path, so that it is the same copy that nvcodec's elements
//! have: two copies would be two sets of types (L17).

use std::ffi::c_void;
use std::sync::LazyLock;

use gst::glib;
use gst::{ffi, glib::ffi::gboolean};

use super::Error;
use super::driver::RawStream;
use super::symbols::{load_for_ever, symbols};

const LIBGSTCUDA: &str = "libgstcuda-1.0.so.0";
/// Streams and pool settings came with it.
const GSTREAMER: (u32, u32) = (1, 24);

/// `GstCudaContext`, a GstObject.
pub type RawContext = *mut ffi::GstObject;
/// `GstCudaStream`, a GstMiniObject.
pub type RawGstStream = *mut ffi::GstMiniObject;

/// `GstCudaBufferPool`, as far as it is public.
#[repr(C)]
pub struct CudaBufferPool {
    parent: ffi::GstBufferPool,
    pub context: RawContext,
}

/// `GstCudaMemory`, as far as it is looked at.
#[repr(C)]
pub struct CudaMemory {
    memory: ffi::GstMemory,
    pub context: RawContext,
}

/// `GST_MAP_CUDA`: the data of a mapping is an address in GPU memory.
pub const MAP_CUDA: ffi::GstMapFlags = ffi::GST_MAP_FLAG_LAST << 1;

symbols! {
    /// The functions of libgstcuda.
    pub struct GstCuda {
        /// False where libcuda cannot be loaded, or lacks something.
        fn gst_cuda_load_library as load_library() -> gboolean;
        fn gst_cuda_memory_init_once as memory_init_once();
        fn gst_cuda_context_get_type as context_get_type() -> glib::ffi::GType;
        /// Null on failure; full reference, not floating.
        fn gst_cuda_context_new as context_new(u32) -> RawContext;
        fn gst_cuda_context_push as context_push(RawContext) -> gboolean;
        fn gst_cuda_context_pop as context_pop(*mut *mut c_void) -> gboolean;
        fn gst_context_new_cuda_context as context_to_gst(RawContext) -> *mut ffi::GstContext;
        /// Null on failure; refers to the context.
        fn gst_cuda_stream_new as stream_new(RawContext) -> RawGstStream;
        fn gst_cuda_stream_get_handle as stream_get_handle(RawGstStream) -> RawStream;
        fn gst_cuda_stream_unref as stream_unref(RawGstStream);
        fn gst_cuda_buffer_pool_get_type as buffer_pool_get_type() -> glib::ffi::GType;
        /// Full reference, not floating.
        fn gst_cuda_buffer_pool_new as buffer_pool_new(RawContext) -> *mut ffi::GstBufferPool;
        fn gst_buffer_pool_config_set_cuda_stream as config_set_stream(
            *mut ffi::GstStructure, RawGstStream);
        fn gst_is_cuda_memory as is_cuda_memory(*mut ffi::GstMemory) -> gboolean;
        /// Borrowed; null is the default stream.
        fn gst_cuda_memory_get_stream as memory_get_stream(*mut CudaMemory) -> RawGstStream;
    }
}

/// Whether this GStreamer is new enough.
pub fn check_version() -> Result<(), Error> {
    let (major, minor, micro, _) = gst::version();
    if (major, minor) < GSTREAMER {
        return Err(Error::Unavailable(format!(
            "this is GStreamer {major}.{minor}.{micro}, and CUDA memory needs {}.{}",
            GSTREAMER.0, GSTREAMER.1
        )));
    }
    Ok(())
}

/// libgstcuda, ready for use, or why there is none.
pub fn library() -> Result<&'static GstCuda, Error> {
    static LIBRARY: LazyLock<Result<GstCuda, String>> = LazyLock::new(|| {
        check_version().map_err(|error| error.to_string())?;
        let library = load_for_ever(LIBGSTCUDA)?;
        // SAFETY: the types are those of its headers, and the library is never unloaded.
        let functions =
            unsafe { GstCuda::load(library) }.map_err(|text| format!("{LIBGSTCUDA} {text}"))?;
        // SAFETY: it may be called at any time from any thread.
        if unsafe { (functions.load_library)() } == 0 {
            return Err(format!(
                "{LIBGSTCUDA} cannot load libcuda (GST_DEBUG=cudaloader:3 says why)"
            ));
        }
        // SAFETY: libcuda is loaded, which is all it needs.
        unsafe { (functions.memory_init_once)() };
        Ok(functions)
    });
    LIBRARY
        .as_ref()
        .map_err(|text| Error::Unavailable(text.clone()))
}
