// SPDX-License-Identifier: MIT OR Apache-2.0

//! DMA-BUF memory of GStreamer: which resource it is, remembered on the memory itself, and when
//! what is drawn into it is there.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use gst::glib;
use gst::glib::translate::IntoGlib;
use gst_allocators::DmaBufMemoryRef;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::virtgpu::{Resource, Resources};

/// What was found out about a memory.
#[derive(Clone)]
struct Memo {
    /// The device that was asked.
    device: u64,
    /// `None` where the memory is not of that device.
    found: Option<Arc<Resource>>,
}

static MEMO: LazyLock<glib::Quark> =
    LazyLock::new(|| glib::Quark::from_str("gst-plugins-zerocopy-virtgpu-resource"));

/// Held while a memo is read or replaced: several elements may see the same memory (a tee).
static MEMOS: Mutex<()> = Mutex::new(());

/// The DMA-BUF that `memory` is, or is a part of.
pub fn dmabuf(memory: &gst::MemoryRef) -> Option<&DmaBufMemoryRef> {
    root(memory).downcast_memory_ref::<gst_allocators::DmaBufMemory>()
}

/// The descriptor of a DMA-BUF, for as long as its memory is borrowed.
pub fn fd(memory: &DmaBufMemoryRef) -> BorrowedFd<'_> {
    // SAFETY: the memory owns the descriptor and is alive for as long as this is borrowed.
    unsafe { BorrowedFd::borrow_raw(memory.fd()) }
}

/// The resource behind a DMA-BUF. Asked once for each memory, parts and copies of the buffer
/// included, since they share it; a descriptor's number would be given to others (L15).
pub fn resource(memory: &DmaBufMemoryRef, device: &dyn Resources) -> Option<Arc<Resource>> {
    if let Some(memo) = recall(memory)
        && memo.device == device.device()
    {
        return memo.found;
    }
    let found = device.resource(fd(memory)).ok();
    let memo = Memo {
        device: device.device(),
        found: found.map(Arc::new),
    };
    remember(memory, memo.clone());
    memo.found
}

/// Whether all that writes to the DMA-BUF is done, as far as the kernel knows: its implicit
/// fences (linux/Documentation/driver-api/dma-buf.rst, "Implicit Fence Poll Support").
pub fn is_ready(dmabuf: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(dmabuf, PollFlags::POLLIN)];
    // Memory that cannot be asked has no fences to wait for.
    poll(&mut fds, PollTimeout::ZERO).map_or(true, |ready| ready > 0)
}

fn root(mut memory: &gst::MemoryRef) -> &gst::MemoryRef {
    while let Some(parent) = memory.parent() {
        memory = parent;
    }
    memory
}

fn mini_object(memory: &gst::MemoryRef) -> *mut gst::ffi::GstMiniObject {
    // A GstMemory begins with its GstMiniObject.
    memory.as_ptr().cast_mut().cast()
}

fn recall(memory: &gst::MemoryRef) -> Option<Memo> {
    let _reading = MEMOS.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the memory is alive; GStreamer guards its qdata with a lock of its own.
    let memo = unsafe {
        gst::ffi::gst_mini_object_get_qdata(mini_object(memory), MEMO.into_glib()).cast::<Memo>()
    };
    // SAFETY: under this quark lies null or what `remember` put there, a Memo that lives until
    // the memory ends or, under the lock held here, another one takes its place.
    unsafe { memo.as_ref() }.cloned()
}

fn remember(memory: &gst::MemoryRef, memo: Memo) {
    /// Ends a memo.
    unsafe extern "C" fn forget(memo: glib::ffi::gpointer) {
        // SAFETY: GStreamer calls this once for each memo, which was made by Box::into_raw.
        drop(unsafe { Box::from_raw(memo.cast::<Memo>()) });
    }
    let _replacing = MEMOS.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the memory is alive; qdata may be set on one that is shared, under GStreamer's own
    // lock. `forget` fits what is given, and no reference to an older memo outlives `recall`.
    unsafe {
        gst::ffi::gst_mini_object_set_qdata(
            mini_object(memory),
            MEMO.into_glib(),
            Box::into_raw(Box::new(memo)).cast(),
            Some(forget),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::fake::{self, Device};

    const SIZE: usize = 4096;

    fn known(device: &Device, id: u32) -> gst::Memory {
        let fd = fake::memfd(SIZE);
        device.add(&fd, id, SIZE);
        fake::dmabuf(fd, SIZE)
    }

    fn id(memory: &gst::MemoryRef, device: &Device) -> Option<u32> {
        let known = resource(dmabuf(memory).unwrap(), device)?;
        Some(known.id.get())
    }

    fn asked(device: &Device) -> u32 {
        device.asked.load(Ordering::Relaxed)
    }

    #[test]
    fn a_memory_is_asked_about_once_with_its_parts_and_copies() {
        let device = Device::new(1);
        let memory = known(&device, 7);
        let mut buffer = gst::Buffer::new();
        buffer.get_mut().unwrap().append_memory(memory.clone());
        let part = memory.share(1024..2048);
        let part_of_part = part.share(0..16);
        for memory in [
            &memory,
            &part,
            &part_of_part,
            &buffer.copy().memory(0).unwrap(),
        ] {
            assert_eq!(id(memory, &device), Some(7));
        }
        assert_eq!(asked(&device), 1);
    }

    #[test]
    fn a_refusal_is_remembered_too() {
        let device = Device::new(1);
        let memory = fake::dmabuf(fake::memfd(SIZE), SIZE);
        assert_eq!(id(&memory, &device), None);
        assert_eq!(id(&memory, &device), None);
        assert_eq!(asked(&device), 1);
    }

    #[test]
    fn what_is_remembered_ends_with_the_memory_and_not_with_a_number() {
        let device = Device::new(1);
        for number in 1..20 {
            // Most likely the descriptor number that the one before had.
            assert_eq!(id(&known(&device, number), &device), Some(number));
        }
    }

    #[test]
    fn each_device_has_ids_of_its_own() {
        let (one, other) = (Device::new(1), Device::new(2));
        let fd = fake::memfd(SIZE);
        one.add(&fd, 5, SIZE);
        other.add(&fd, 6, SIZE);
        let memory = fake::dmabuf(fd, SIZE);
        assert_eq!(id(&memory, &one), Some(5));
        assert_eq!(id(&memory, &other), Some(6));
    }

    #[test]
    fn a_memo_is_freed_with_its_memory() {
        let device = Device::new(1);
        let memory = known(&device, 7);
        let known = resource(dmabuf(&memory).unwrap(), &device).unwrap();
        assert_eq!(Arc::strong_count(&known), 2);
        drop(memory);
        assert_eq!(Arc::strong_count(&known), 1);
    }

    #[test]
    fn other_memory_is_no_dmabuf() {
        gst::init().unwrap();
        assert!(dmabuf(&gst::Memory::with_size(16)).is_none());
    }

    #[test]
    fn memory_is_ready_when_its_writers_are_done() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let memory = fake::dmabuf(reader, SIZE);
        let ready = || is_ready(fd(dmabuf(&memory).unwrap()));
        assert!(!ready());
        assert_eq!(nix::unistd::write(&writer, b"!"), Ok(1));
        assert!(ready());
    }
}
