// SPDX-License-Identifier: MIT OR Apache-2.0

//! DRM device nodes, found by the name of their driver.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use drm::Device as _;

use crate::Outcome;

/// Driver of virtio-gpu's nodes, as `DRM_IOCTL_VERSION` gives it.
pub const VIRTIO_GPU: &str = "virtio_gpu";
/// Driver of buffers that belong to no GPU.
pub const VGEM: &str = "vgem";

/// Which of a device's nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/dev/dri/cardN`: outputs, and all else.
    Primary,
    /// `/dev/dri/renderDN`: what an application without rights on outputs may use.
    Render,
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Primary => "card",
            Self::Render => "renderD",
        }
    }
}

/// An open node.
#[derive(Debug)]
pub struct Node {
    file: File,
    path: PathBuf,
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl drm::Device for Node {}
impl drm::control::Device for Node {}

impl Node {
    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the first node of this kind whose driver is `driver`. Numbers say nothing: which card
    /// is the first depends on which module was.
    pub fn open(driver: &str, kind: Kind) -> Outcome<Self> {
        let mut seen = Vec::new();
        for entry in fs::read_dir("/dev/dri").map_err(|error| format!("list /dev/dri: {error}"))? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if !name.starts_with(kind.prefix()) {
                continue;
            }
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(|error| format!("open {}: {error}", path.display()))?;
            let node = Self { file, path };
            let found = node.get_driver()?.name().to_string_lossy().into_owned();
            if found == driver {
                return Ok(node);
            }
            seen.push(format!("{name} of {found}"));
        }
        Err(format!(
            "no {}* of {driver} in /dev/dri (there: {seen:?})",
            kind.prefix()
        )
        .into())
    }
}
