// SPDX-License-Identifier: MIT OR Apache-2.0

//! A pool of buffers around memory that is there already, as sources of DMA-BUFs have one: each memory
//! comes back in the same buffer, and whoever wants one waits until it is free.

use gst::glib;
use gst::subclass::prelude::*;

glib::wrapper! {
    /// The pool.
    pub struct DmaBufPool(ObjectSubclass<imp::DmaBufPool>) @extends gst::BufferPool, gst::Object;
}

impl DmaBufPool {
    /// A pool of these memories, each with its stride in bytes, for packed pictures.
    pub fn with(memories: Vec<(gst::Memory, u32)>, info: &gst_video::VideoInfo) -> Self {
        let pool: Self = glib::Object::new();
        *pool.imp().memories.lock().expect("nobody panics with it") = memories;
        pool.imp().info.set(info.clone()).expect("it is set once");
        pool
    }
}

mod imp {
    use std::sync::{Mutex, OnceLock};

    use gst::glib;
    use gst::subclass::prelude::*;

    /// What the pool has.
    #[derive(Default)]
    pub struct DmaBufPool {
        /// Those that have no buffer yet, each with its stride in bytes.
        pub memories: Mutex<Vec<(gst::Memory, u32)>>,
        /// What the pictures are.
        pub info: OnceLock<gst_video::VideoInfo>,
    }

    #[glib::object_subclass]
    impl ObjectSubclass for DmaBufPool {
        const NAME: &'static str = "DrmCheckDmaBufPool";
        type Type = super::DmaBufPool;
        type ParentType = gst::BufferPool;
    }

    impl ObjectImpl for DmaBufPool {}
    impl GstObjectImpl for DmaBufPool {}

    impl BufferPoolImpl for DmaBufPool {
        fn alloc_buffer(
            &self,
            _: Option<&gst::BufferPoolAcquireParams>,
        ) -> Result<gst::Buffer, gst::FlowError> {
            let memory = self.memories.lock().expect("nobody panics with it").pop();
            let (memory, stride) = memory.ok_or(gst::FlowError::Error)?;
            let info = self.info.get().ok_or(gst::FlowError::Error)?;
            let mut buffer = gst::Buffer::new();
            let writable = buffer.get_mut().ok_or(gst::FlowError::Error)?;
            writable.append_memory(memory);
            gst_video::VideoMeta::add_full(
                writable,
                gst_video::VideoFrameFlags::empty(),
                info.format(),
                info.width(),
                info.height(),
                &[0],
                &[stride as i32],
            )
            .map_err(|_| gst::FlowError::Error)?;
            Ok(buffer)
        }
    }
}
