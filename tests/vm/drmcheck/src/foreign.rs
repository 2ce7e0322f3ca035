// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory that is not virtio-gpu's: it must say no to all of it, and so tell `vsockenc` to send pixels.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use drm::buffer::{Buffer, DrmFourcc};
use drm::control::Device;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::Outcome;
use crate::node::{Kind, Node, VGEM, VIRTIO_GPU};

/// Pixels of four bytes; whole pages, as udmabuf wants them.
const SIZE: (u32, u32) = (640, 480);
/// Bytes (x86; udmabuf wants whole pages).
const PAGE: usize = 4096;
/// `O_CLOEXEC | O_RDWR` (fcntl.h).
const CLOEXEC_RDWR: u32 = 0o2_000_000 | 0o2;

/// `struct udmabuf_create` (linux/udmabuf.h).
#[repr(C)]
#[derive(Debug)]
pub struct UdmabufCreate {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

/// `struct dma_heap_allocation_data` (linux/dma-heap.h).
#[repr(C)]
#[derive(Debug)]
pub struct HeapAllocation {
    len: u64,
    fd: u32,
    fd_flags: u32,
    heap_flags: u64,
}

nix::ioctl_write_ptr!(udmabuf_create_ioctl, b'u', 0x42, UdmabufCreate);
nix::ioctl_readwrite!(heap_alloc_ioctl, b'H', 0, HeapAllocation);

/// Why there is no such buffer to offer.
enum Missing {
    /// This kernel has no such thing.
    Absent(String),
    /// It has, and something went wrong.
    Broken(String),
}

/// A descriptor to offer and its stride in bytes, or why there is none.
type Made = Result<(OwnedFd, u32), Missing>;

/// Where memory comes from that is not virtio-gpu's.
#[derive(Clone, Copy, Debug)]
pub enum Foreign {
    /// Another driver's dumb buffer. The module vgem is there only when somebody loads it.
    Vgem,
    /// Pages of a memfd as a DMA-BUF.
    Udmabuf,
    /// Memory of the system heap.
    Heap,
    /// Plain shared memory, no DMA-BUF at all: what a confused peer might pass.
    Memfd,
}

/// Offers each kind to virtio-gpu.
pub fn show() -> Outcome<()> {
    let render = Node::open(VIRTIO_GPU, Kind::Render)?;
    for (name, kind) in [
        ("vgem", Foreign::Vgem),
        ("udmabuf", Foreign::Udmabuf),
        ("heap", Foreign::Heap),
        ("memfd", Foreign::Memfd),
    ] {
        match try_to_make(kind, SIZE.0, SIZE.1) {
            // The import itself must be refused: an error of a later call would mean that it was not.
            Ok((buffer, _)) => match render.prime_fd_to_buffer(buffer.as_fd()) {
                Err(error) => println!("refused {name}: {:?}", errno(&error)),
                Ok(_) => return Err(format!("virtio-gpu imported {name} as its own").into()),
            },
            Err(Missing::Absent(why)) => println!("absent {name}: {why}"),
            Err(Missing::Broken(why)) => return Err(format!("make a buffer, {name}: {why}").into()),
        }
    }
    Ok(())
}

/// Memory for a picture of four bytes a pixel, and its stride in bytes.
pub fn make(kind: Foreign, width: u32, height: u32) -> Outcome<(OwnedFd, u32)> {
    try_to_make(kind, width, height).map_err(|missing| match missing {
        Missing::Absent(why) | Missing::Broken(why) => format!("{kind:?} memory: {why}").into(),
    })
}

/// Shared memory that cannot shrink, as compositors have it.
pub fn sealed_memfd(size: usize) -> Outcome<OwnedFd> {
    let memory = from_memfd(size).map_err(|missing| match missing {
        Missing::Absent(why) | Missing::Broken(why) => format!("a memfd: {why}"),
    })?;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    Ok(memory)
}

fn try_to_make(kind: Foreign, width: u32, height: u32) -> Made {
    let stride = 4 * width;
    let size = (stride * height) as usize;
    let size = size.next_multiple_of(PAGE);
    let memory = match kind {
        Foreign::Vgem => return from_vgem(width, height),
        Foreign::Udmabuf => from_udmabuf(size),
        Foreign::Heap => from_heap(size),
        Foreign::Memfd => from_memfd(size),
    };
    Ok((memory?, stride))
}

fn from_vgem(width: u32, height: u32) -> Made {
    let node =
        Node::open(VGEM, Kind::Primary).map_err(|error| Missing::Absent(error.to_string()))?;
    let dumb = node
        .create_dumb_buffer((width, height), DrmFourcc::Xrgb8888, 32)
        .map_err(broken)?;
    let dmabuf = node.buffer_to_prime_fd(dumb.handle(), CLOEXEC_RDWR);
    Ok((dmabuf.map_err(broken)?, dumb.pitch()))
}

fn from_udmabuf(size: usize) -> Result<OwnedFd, Missing> {
    let device = open_if_there("/dev/udmabuf")?;
    let memory = from_memfd(size)?;
    // Without this seal pages could go away under whoever uses the DMA-BUF; udmabuf refuses it.
    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).map_err(broken)?;
    let create = UdmabufCreate {
        memfd: memory.as_raw_fd() as u32,
        flags: 1, // UDMABUF_FLAGS_CLOEXEC
        offset: 0,
        size: size as u64,
    };
    // SAFETY: the ioctl reads one structure of this layout, which lives through the call.
    let fd =
        unsafe { udmabuf_create_ioctl(device.as_raw_fd(), &raw const create) }.map_err(broken)?;
    // SAFETY: the ioctl returned a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn from_heap(size: usize) -> Result<OwnedFd, Missing> {
    let heap = open_if_there("/dev/dma_heap/system")?;
    let mut allocation = HeapAllocation {
        len: size as u64,
        fd: 0,
        fd_flags: CLOEXEC_RDWR,
        heap_flags: 0,
    };
    // SAFETY: the ioctl reads and writes one structure of this layout, which lives through the call.
    unsafe { heap_alloc_ioctl(heap.as_raw_fd(), &raw mut allocation) }.map_err(broken)?;
    // SAFETY: the ioctl put a new descriptor there, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(allocation.fd as i32) })
}

fn from_memfd(size: usize) -> Result<OwnedFd, Missing> {
    const NAME: &CStr = c"drmcheck";
    let memory =
        memfd_create(NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).map_err(broken)?;
    nix::unistd::ftruncate(memory.as_fd(), size as i64).map_err(broken)?;
    Ok(memory)
}

fn open_if_there(path: &str) -> Result<File, Missing> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Missing::Absent(format!("no {path}")))
        }
        Err(error) => Err(Missing::Broken(format!("open {path}: {error}"))),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

fn broken(error: impl Into<io::Error>) -> Missing {
    Missing::Broken(error.into().to_string())
}
