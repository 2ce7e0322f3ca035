// SPDX-License-Identifier: MIT OR Apache-2.0

//! DMA-BUFs of virtio-gpu as the resources by which the host knows them. No GStreamer in here.
//!
//! A GEM handle is not a resource id: the kernel turns a DMA-BUF into a handle, and tells the
//! handle's id (L21). The ioctl that does so is virtio-gpu's own, and its number means something
//! else to other drivers, so a node's driver is looked at before anything is asked of it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use drm::Device as _;
use drm::control::Device as _;

/// Where the kernel's DRM nodes are.
const NODES: &str = "/dev/dri";
/// Driver of virtio-gpu's nodes, as `DRM_IOCTL_VERSION` gives it.
const DRIVER: &str = "virtio_gpu";
/// `renderDN`: what an application without rights on outputs may use.
const RENDER: &str = "renderD";
/// `cardN`: outputs, and all else.
const PRIMARY: &str = "card";

/// `struct drm_virtgpu_resource_info` (linux/include/uapi/drm/virtgpu_drm.h).
#[repr(C)]
#[derive(Debug, Default)]
pub struct ResourceInfo {
    bo_handle: u32,
    res_handle: u32,
    size: u32,
    blob_mem: u32,
}

// DRM_COMMAND_BASE is 0x40, DRM_VIRTGPU_RESOURCE_INFO is 5.
nix::ioctl_readwrite!(resource_info_ioctl, b'd', 0x45, ResourceInfo);

/// What the host knows a DMA-BUF by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its number; there is no resource 0.
    pub id: NonZeroU32,
    /// Bytes.
    pub size: usize,
}

/// Who tells resources. One implementation asks the kernel; tests have others.
pub trait Resources: Send + Sync {
    /// The resource behind a DMA-BUF. Fails where it belongs to another device.
    fn resource(&self, dmabuf: BorrowedFd<'_>) -> io::Result<Resource>;

    /// A number that no other device has: ids mean something on one device only.
    fn device(&self) -> u64;
}

/// An open node of virtio-gpu.
#[derive(Debug)]
pub struct Node {
    file: File,
    device: u64,
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl drm::Device for Node {}
impl drm::control::Device for Node {}

impl Node {
    /// Opens `named`, or else virtio-gpu's first node: a render node, or a primary one where
    /// only that is there. Returns it with its path.
    pub fn find(named: Option<&Path>) -> Result<(Self, PathBuf), String> {
        match named {
            Some(path) => match Self::open(path) {
                Ok(node) => Ok((node, path.to_owned())),
                Err(error) => Err(format!("render-node {}: {error}", path.display())),
            },
            None => Self::find_in(Path::new(NODES)),
        }
    }

    fn find_in(folder: &Path) -> Result<(Self, PathBuf), String> {
        let entries =
            fs::read_dir(folder).map_err(|error| format!("list {}: {error}", folder.display()))?;
        let mut nodes: Vec<_> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let name = path.file_name()?.to_str()?;
                // Numbers say nothing: which card is the first depends on which module was.
                let number = |prefix| name.strip_prefix(prefix)?.parse::<u32>().ok();
                let place = number(RENDER)
                    .map(|number| (0, number))
                    .or_else(|| number(PRIMARY).map(|number| (1, number)))?;
                Some((place, path))
            })
            .collect();
        nodes.sort();
        let mut seen = Vec::new();
        for (_, path) in nodes {
            match Self::open(&path) {
                Ok(node) => return Ok((node, path)),
                Err(error) => seen.push(format!("{}: {error}", path.display())),
            }
        }
        Err(format!(
            "no node of {DRIVER} in {} ({})",
            folder.display(),
            if seen.is_empty() {
                "there are no nodes".to_owned()
            } else {
                seen.join("; ")
            }
        ))
    }

    fn open(path: &Path) -> Result<Self, String> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|error| error.to_string())?;
        let device = file.metadata().map_err(|error| error.to_string())?.rdev();
        let node = Self { file, device };
        // Whoever opens a primary node first becomes master of its outputs, which a compositor
        // that starts later needs to be. Fails on a render node, which has no master.
        let _ = node.release_master_lock();
        let driver = node
            .get_driver()
            .map_err(|error| format!("DRM_IOCTL_VERSION: {error}"))?;
        let driver = driver.name().to_string_lossy();
        if driver != DRIVER {
            return Err(format!("its driver is {driver}, not {DRIVER}"));
        }
        Ok(node)
    }

    fn look_up(&self, dmabuf: BorrowedFd<'_>) -> io::Result<Resource> {
        let handle = self.prime_fd_to_buffer(dmabuf)?;
        let mut info = ResourceInfo {
            bo_handle: handle.into(),
            ..ResourceInfo::default()
        };
        // SAFETY: the ioctl reads and writes one structure of this layout, which lives through
        // the call; the node's driver is the one whose ioctl it is (`Node::open`).
        let done = unsafe { resource_info_ioctl(self.file.as_raw_fd(), &raw mut info) };
        // Whatever came of it: a forgotten handle holds memory.
        self.close_buffer(handle)?;
        done?;
        let id = NonZeroU32::new(info.res_handle).ok_or(io::ErrorKind::NotFound)?;
        Ok(Resource {
            id,
            size: info.size as usize,
        })
    }
}

impl Resources for Node {
    fn resource(&self, dmabuf: BorrowedFd<'_>) -> io::Result<Resource> {
        let resource = self.look_up(dmabuf)?;
        // Linux 6.14 and newer import other devices' memory, as a resource that ends with its
        // handle; the next import is another one. An id that stays is that of the memory itself.
        if self.look_up(dmabuf)? != resource {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(resource)
    }

    fn device(&self) -> u64 {
        self.device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of its own, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn with(name: &str, files: &[&str]) -> Self {
            let path = std::env::temp_dir().join(format!("virtgpu-{}-{name}", std::process::id()));
            fs::create_dir(&path).unwrap();
            for file in files {
                fs::write(path.join(file), b"").unwrap();
            }
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn without_a_folder_of_nodes_it_says_so() {
        let error = Node::find_in(Path::new("/nowhere/dri")).unwrap_err();
        assert!(error.starts_with("list /nowhere/dri: "), "{error}");
    }

    #[test]
    fn an_empty_folder_has_no_node() {
        let folder = Folder::with("empty", &["by-path"]);
        let error = Node::find_in(&folder.0).unwrap_err();
        assert!(error.contains("there are no nodes"), "{error}");
    }

    #[test]
    fn render_nodes_are_tried_before_primary_ones_and_by_number() {
        let files = ["card0", "renderD129", "renderD128", "card10", "controlD64"];
        let folder = Folder::with("order", &files);
        let error = Node::find_in(&folder.0).unwrap_err();
        let places: Vec<_> = ["renderD128", "renderD129", "card0", "card10"]
            .iter()
            .map(|name| error.find(name).expect(name))
            .collect();
        assert!(places.is_sorted(), "{error}");
        assert!(!error.contains("controlD64"), "{error}");
        assert!(error.contains("DRM_IOCTL_VERSION"), "{error}");
    }

    #[test]
    fn a_named_node_is_the_only_one_that_is_tried() {
        let error = Node::find(Some(Path::new("/nowhere/renderD128"))).unwrap_err();
        assert!(
            error.starts_with("render-node /nowhere/renderD128: "),
            "{error}"
        );
    }
}
