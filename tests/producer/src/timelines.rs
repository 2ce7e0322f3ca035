// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who may read a buffer, and who may draw into it again: timelines of DRM (explicit sync).

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use drm::control::{Device as _, syncobj};
use drm::{Device as _, DriverCapability};
use nix::errno::Errno;

use crate::Outcome;

/// `struct drm_syncobj_handle` (drm/drm.h), as it was at first.
#[repr(C)]
#[derive(Debug)]
pub struct SyncobjHandle {
    handle: u32,
    flags: u32,
    fd: i32,
    pad: u32,
}

/// `DRM_SYNCOBJ_FD_TO_HANDLE_FLAGS_IMPORT_SYNC_FILE`: into the syncobj of that handle.
const IMPORT_SYNC_FILE: u32 = 1;

// DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE; the crate drm names no handle, and the kernel wants one.
nix::ioctl_readwrite!(import_sync_file_ioctl, b'd', 0xc2, SyncobjHandle);

/// A DRM node that has timelines.
#[derive(Debug)]
pub struct SyncNode(File);

impl AsFd for SyncNode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for SyncNode {}
impl drm::control::Device for SyncNode {}

impl SyncNode {
    /// The node behind a descriptor, if its driver can.
    pub fn new(node: impl AsFd) -> Outcome<Arc<Self>> {
        let node = Self(File::from(node.as_fd().try_clone_to_owned()?));
        match node.get_driver_capability(DriverCapability::TimelineSyncObj) {
            Ok(1) => Ok(Arc::new(node)),
            other => Err(format!("DRM_CAP_SYNCOBJ_TIMELINE {other:?}").into()),
        }
    }
}

/// The two timelines of a buffer.
#[derive(Debug)]
pub struct Timelines {
    node: Arc<SyncNode>,
    acquire: syncobj::Handle,
    release: syncobj::Handle,
}

impl Timelines {
    /// Two of them, at point 0.
    pub fn new(node: &Arc<SyncNode>) -> Outcome<Self> {
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

    /// It will be drawn, as far as `point`: when a sync file is signalled. This is how a GPU's driver
    /// says it, before the GPU has begun.
    pub fn promise(&self, point: u64, file: impl AsFd) -> Outcome<()> {
        let one = self.node.create_syncobj(false)?;
        let mut import = SyncobjHandle {
            handle: one.into(),
            flags: IMPORT_SYNC_FILE,
            fd: file.as_fd().as_raw_fd(),
            pad: 0,
        };
        // SAFETY: the ioctl reads and writes one structure of this layout, which lives through the call.
        unsafe { import_sync_file_ioctl(self.node.as_fd().as_raw_fd(), &raw mut import) }
            .map_err(|error| format!("import a sync file: {error}"))?;
        self.node
            .syncobj_timeline_transfer(one, self.acquire, 0, point)?;
        Ok(self.node.destroy_syncobj(one)?)
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
    node: Arc<SyncNode>,
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
