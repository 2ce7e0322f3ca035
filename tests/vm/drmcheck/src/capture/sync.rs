// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who may read a buffer, and when: timelines of DRM (explicit sync), and fences of vgem, which stand in
//! for a GPU that is still drawing (implicit sync).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use drm::control::{Device as _, syncobj};
use drm::{Device as _, DriverCapability};
use nix::errno::Errno;

use crate::Outcome;
use crate::node::{Kind, Node, VGEM, VIRTIO_GPU};

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

/// The two timelines of a buffer.
#[derive(Debug)]
pub struct Timelines {
    node: Arc<Node>,
    acquire: syncobj::Handle,
    release: syncobj::Handle,
}

impl Timelines {
    /// The node to make them on, if this kernel can.
    pub fn node() -> Outcome<Arc<Node>> {
        let node = Node::open(VIRTIO_GPU, Kind::Render)?;
        match node.get_driver_capability(DriverCapability::TimelineSyncObj) {
            Ok(1) => Ok(Arc::new(node)),
            other => Err(format!(
                "{}: DRM_CAP_SYNCOBJ_TIMELINE {other:?}",
                node.path().display()
            )
            .into()),
        }
    }

    /// Two of them, at point 0.
    pub fn new(node: &Arc<Node>) -> Outcome<Self> {
        Ok(Self {
            node: node.clone(),
            acquire: node.create_syncobj(false)?,
            release: node.create_syncobj(false)?,
        })
    }

    /// For the consumer: acquire and release.
    pub fn descriptors(&self) -> Outcome<[OwnedFd; 2]> {
        let export = |handle| self.node.syncobj_to_fd(handle, false);
        Ok([export(self.acquire)?, export(self.release)?])
    }

    /// It is drawn, as far as `point`.
    pub fn signal(&self, point: u64) -> Outcome<()> {
        self.node
            .syncobj_timeline_signal(&[self.acquire], &[point])?;
        Ok(())
    }

    /// When the consumer has done with it.
    pub fn release(&self, point: u64) -> Release {
        Release {
            node: self.node.clone(),
            handle: self.release,
            point,
        }
    }
}

/// A point of a release timeline. It can be asked from any thread, as long as the buffer lives.
#[derive(Clone, Debug)]
pub struct Release {
    node: Arc<Node>,
    handle: syncobj::Handle,
    point: u64,
}

impl Release {
    /// Whether the consumer has signalled it, or does within `limit`.
    pub fn within(&self, limit: Duration) -> Outcome<bool> {
        let end = (monotonic() + limit).as_nanos() as i64;
        // A point that nobody has promised yet is waited for as well.
        let waited =
            self.node
                .syncobj_timeline_wait(&[self.handle], &[self.point], end, true, true, false);
        match waited {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(Errno::ETIME as i32) => Ok(false),
            Err(error) => Err(format!("wait for a release point: {error}").into()),
        }
    }
}

/// CLOCK_MONOTONIC now, in which the kernel has its timeouts.
fn monotonic() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` has room for the result; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
