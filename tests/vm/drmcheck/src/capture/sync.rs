// SPDX-License-Identifier: MIT OR Apache-2.0

//! Fences of vgem, which stand in for a GPU that is still drawing.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use drm::control::Device as _;

use crate::Outcome;
use crate::foreign::{self, Foreign};
use crate::node::{Kind, Node, VGEM};

/// `struct drm_vgem_fence_attach` (drm/vgem_drm.h).
#[repr(C)]
#[derive(Debug)]
pub struct FenceAttach {
    handle: u32,
    flags: u32,
    out_fence: u32,
    pad: u32,
}

/// `struct drm_vgem_fence_signal` (drm/vgem_drm.h).
#[repr(C)]
#[derive(Debug)]
pub struct FenceSignal {
    fence: u32,
    flags: u32,
}

/// `struct dma_buf_export_sync_file` (linux/dma-buf.h).
#[repr(C)]
#[derive(Debug)]
pub struct ExportSyncFile {
    flags: u32,
    fd: i32,
}

/// `DMA_BUF_SYNC_READ`: what readers have to wait for.
const SYNC_READ: u32 = 1;

nix::ioctl_readwrite!(export_sync_file_ioctl, b'b', 2, ExportSyncFile);

/// `VGEM_FENCE_WRITE`: readers have to wait, too.
const FENCE_WRITE: u32 = 1;

// DRM_COMMAND_BASE is 0x40; DRM_VGEM_FENCE_ATTACH is 1 and DRM_VGEM_FENCE_SIGNAL is 2.
nix::ioctl_readwrite!(fence_attach_ioctl, b'd', 0x41, FenceAttach);
nix::ioctl_write_ptr!(fence_signal_ioctl, b'd', 0x42, FenceSignal);

/// A fence on a DMA-BUF of vgem: it is being drawn into. Ends by itself after 10 s (VGEM_FENCE_TIMEOUT).
#[derive(Debug)]
pub struct Fence {
    node: Node,
    number: u32,
}

impl Fence {
    /// Attaches one.
    pub fn attach(dmabuf: impl AsFd) -> Outcome<Self> {
        let node = Node::open(VGEM, Kind::Primary)?;
        let handle = node.prime_fd_to_buffer(dmabuf.as_fd())?;
        let mut attach = FenceAttach {
            handle: handle.into(),
            flags: FENCE_WRITE,
            out_fence: 0,
            pad: 0,
        };
        // SAFETY: the ioctl reads and writes one structure of this layout, which lives through the call.
        unsafe { fence_attach_ioctl(node.as_fd().as_raw_fd(), &raw mut attach) }
            .map_err(|error| format!("attach a fence to memory of vgem: {error}"))?;
        Ok(Self {
            node,
            number: attach.out_fence,
        })
    }

    /// One that is on no memory that anybody looks at, and the sync file that stands for it.
    pub fn as_file() -> Outcome<(Self, OwnedFd)> {
        let (dmabuf, _) = foreign::make(Foreign::Vgem, 64, 64)?;
        let fence = Self::attach(&dmabuf)?;
        let mut export = ExportSyncFile {
            flags: SYNC_READ,
            fd: -1,
        };
        // SAFETY: the ioctl reads and writes one structure of this layout, which lives through the call.
        unsafe { export_sync_file_ioctl(dmabuf.as_raw_fd(), &raw mut export) }
            .map_err(|error| format!("export a fence of vgem: {error}"))?;
        // SAFETY: the kernel has just opened it for us.
        Ok((fence, unsafe { OwnedFd::from_raw_fd(export.fd) }))
    }

    /// It is drawn.
    pub fn signal(self) -> Outcome<()> {
        let signal = FenceSignal {
            fence: self.number,
            flags: 0,
        };
        // SAFETY: the ioctl reads one structure of this layout, which lives through the call.
        unsafe { fence_signal_ioctl(self.node.as_fd().as_raw_fd(), &raw const signal) }?;
        Ok(())
    }
}
