// SPDX-License-Identifier: MIT OR Apache-2.0

//! Explicit synchronization: timelines of DRM, on which the producer says when a frame is drawn, and we
//! say when we have done with it.
//!
//! A driver without implicit fences, NVIDIA's, has no other way to keep the two apart (lesson L14).
//! PipeWire carries a buffer's two timelines as blocks behind its DMA-BUFs, and the points on them as
//! metadata (`SPA_META_SyncTimeline`, PipeWire 1.2 and newer).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use drm::control::{Device as _, syncobj};
use drm::{Device as _, DriverCapability};

// PipeWire 0.3.65, the oldest that we build with, lacks these.
/// `SPA_DATA_SyncObj` (spa/buffer/buffer.h)
pub const SPA_DATA_SYNC_OBJ: u32 = 5;
/// `SPA_META_SyncTimeline` (spa/buffer/meta.h)
pub const SPA_META_SYNC_TIMELINE: u32 = 9;
/// `SPA_PARAM_BUFFERS_metaType` (spa/param/buffers.h)
pub const SPA_PARAM_BUFFERS_META_TYPE: u32 = 7;
/// `SPA_PARAM_META_features` (spa/param/buffers.h, PipeWire 1.6)
pub const SPA_PARAM_META_FEATURES: u32 = 3;
/// `SPA_META_FEATURE_SYNC_TIMELINE_RELEASE` (spa/buffer/meta.h, PipeWire 1.6): we know the flag below.
pub const FEATURE_RELEASE: i32 = 1;
/// `SPA_META_SYNC_TIMELINE_UNSCHEDULED_RELEASE` (spa/buffer/meta.h, PipeWire 1.6): the producer sets it,
/// and who promises to signal the release point takes it away. A buffer that comes back with it was seen
/// by nobody, and may be drawn into at once.
pub const UNSCHEDULED_RELEASE: u32 = 1;
/// The version of PipeWire that knows timelines, in its library and in its daemon.
const KNOWN_SINCE: (u32, u32) = (1, 2);

/// `struct spa_meta_sync_timeline` (spa/buffer/meta.h)
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SyncTimelineMeta {
    /// [`UNSCHEDULED_RELEASE`]
    pub flags: u32,
    /// Means nothing.
    pub padding: u32,
    /// The pixels may be looked at when the acquire timeline has reached this.
    pub acquire_point: u64,
    /// The producer may draw again when the release timeline has reached this.
    pub release_point: u64,
}

/// Whether a PipeWire of that version, as it writes it itself, knows explicit synchronization.
pub fn is_known_to(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    let mut number = || numbers.next().flatten();
    number()
        .zip(number())
        .is_some_and(|version| version >= KNOWN_SINCE)
}

/// A DRM node that knows timelines, of a kernel that tells by a descriptor when one has come to a
/// point.
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
    /// Opens a node. The error says what it lacks.
    pub fn open(path: &Path) -> Result<Arc<Self>, String> {
        let about = |what: String| format!("{}: {what}", path.display());
        let file = File::options().read(true).write(true).open(path);
        let node = Arc::new(Self(file.map_err(|error| about(error.to_string()))?));
        let capability = node.get_driver_capability(DriverCapability::TimelineSyncObj);
        if !matches!(capability, Ok(1)) {
            return Err(about("its driver has no timelines".into()));
        }
        // Waiting in any other way could not be interrupted.
        let tried = node.create_syncobj(false).and_then(|handle| {
            let node = node.clone();
            Timeline { node, handle }.reached(1)
        });
        tried.map_err(|error| about(format!("timelines cannot be polled: {error}")))?;
        Ok(node)
    }
}

/// A timeline: points that only rise.
#[derive(Debug)]
pub struct Timeline {
    node: Arc<SyncNode>,
    handle: syncobj::Handle,
}

impl Timeline {
    /// The timeline behind a descriptor of the producer's.
    pub fn import(node: &Arc<SyncNode>, fd: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            node: node.clone(),
            handle: node.fd_to_syncobj(fd, false)?,
        })
    }

    /// A descriptor that becomes readable when the timeline has reached `point`, also where nobody
    /// has promised that point yet (Linux 6.6 and newer).
    pub fn reached(&self, point: u64) -> io::Result<OwnedFd> {
        // SAFETY: No memory is involved; the result is checked.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: The kernel has just opened it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        self.node
            .syncobj_eventfd(self.handle, point, fd.as_fd(), false)?;
        Ok(fd)
    }

    /// A sync file that is signalled when the timeline has reached `point`. An error where nobody has
    /// promised that point yet.
    pub fn promised(&self, point: u64) -> io::Result<OwnedFd> {
        // Only what has no points can be exported as such.
        let copy = self.node.create_syncobj(false)?;
        let file = self
            .node
            .syncobj_timeline_transfer(self.handle, copy, point, 0)
            .and_then(|()| self.node.syncobj_to_fd(copy, true));
        // Fails only for a handle that is none.
        let _ = self.node.destroy_syncobj(copy);
        file
    }

    /// Says that the timeline has reached `point`.
    pub fn signal(&self, point: u64) -> io::Result<()> {
        self.node.syncobj_timeline_signal(&[self.handle], &[point])
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        // Fails only for a handle that is none.
        let _ = self.node.destroy_syncobj(self.handle);
    }
}

/// A point of a timeline.
#[derive(Clone, Debug)]
pub struct Point {
    /// Of one buffer.
    pub timeline: Arc<Timeline>,
    /// Where on it.
    pub value: u64,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One on a node that has none: whatever is tried with it fails.
    pub fn no_timeline() -> Arc<Timeline> {
        let node = Arc::new(SyncNode(File::open("/dev/null").unwrap()));
        let handle = std::num::NonZeroU32::MIN.into();
        Arc::new(Timeline { node, handle })
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        for known in ["1.2.0", "1.2", "1.4.2", "1.10.0", "2.0.0"] {
            assert!(is_known_to(known), "{known}");
        }
        for unknown in ["0.3.65", "1.0.9", "1.1.82", "1", "", "one.two"] {
            assert!(!is_known_to(unknown), "{unknown}");
        }
    }

    #[test]
    fn a_node_without_timelines_says_so() {
        let error = SyncNode::open(Path::new("/dev/null")).unwrap_err();
        assert_eq!(error, "/dev/null: its driver has no timelines");
        assert!(SyncNode::open(Path::new("/dev/dri/renderD4711")).is_err());
    }
}
