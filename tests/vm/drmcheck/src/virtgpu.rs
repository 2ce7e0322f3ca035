// SPDX-License-Identifier: MIT OR Apache-2.0

//! virtio-gpu's own ioctls (linux/include/uapi/drm/virtgpu_drm.h).
//!
//! Their numbers mean something else to other drivers, so they are for nodes whose driver was looked
//! at: see [`crate::node::Node::open`].

use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd};

use drm::buffer;
use drm::control::Device;
use nix::errno::Errno;

/// `VIRTIO_GPU_FORMAT_B8G8R8A8_UNORM` (virtio 1.2, 5.7.6.8); the bytes of DRM's ARGB8888.
pub const FORMAT_B8G8R8A8: u32 = 1;
/// `PIPE_TEXTURE_2D` of Mesa's Gallium, the only target that a device without 3D takes.
const TARGET_2D: u32 = 2;
/// `PIPE_BIND_RENDER_TARGET` of Mesa's Gallium.
const BIND_RENDER_TARGET: u32 = 2;

/// `struct drm_virtgpu_resource_create`.
#[repr(C)]
#[derive(Debug, Default)]
pub struct ResourceCreate {
    target: u32,
    format: u32,
    bind: u32,
    width: u32,
    height: u32,
    depth: u32,
    array_size: u32,
    last_level: u32,
    nr_samples: u32,
    flags: u32,
    bo_handle: u32,
    res_handle: u32,
    size: u32,
    stride: u32,
}

/// `struct drm_virtgpu_resource_info`.
#[repr(C)]
#[derive(Debug, Default)]
pub struct ResourceInfo {
    bo_handle: u32,
    res_handle: u32,
    size: u32,
    blob_mem: u32,
}

// DRM_COMMAND_BASE is 0x40; DRM_VIRTGPU_RESOURCE_CREATE is 4 and DRM_VIRTGPU_RESOURCE_INFO is 5.
nix::ioctl_readwrite!(resource_create_ioctl, b'd', 0x44, ResourceCreate);
nix::ioctl_readwrite!(resource_info_ioctl, b'd', 0x45, ResourceInfo);

/// Makes a resource of `width` x `height` pixels of four bytes. Returns its handle and its id.
pub fn create(node: impl AsFd, width: u32, height: u32) -> Result<(buffer::Handle, u32), Errno> {
    let mut create = ResourceCreate {
        target: TARGET_2D,
        format: FORMAT_B8G8R8A8,
        bind: BIND_RENDER_TARGET,
        width,
        height,
        depth: 1,
        array_size: 1,
        size: width * height * 4,
        stride: width * 4,
        ..ResourceCreate::default()
    };
    // SAFETY: the ioctl reads and writes one structure of this layout, which lives through the call.
    unsafe { resource_create_ioctl(node.as_fd().as_raw_fd(), &raw mut create) }?;
    let handle = NonZeroU32::new(create.bo_handle).ok_or(Errno::EINVAL)?;
    Ok((buffer::Handle::from(handle), create.res_handle))
}

/// The id by which the host knows the resource behind a handle.
pub fn resource_id(node: impl AsFd, handle: buffer::Handle) -> Result<u32, Errno> {
    let mut info = ResourceInfo {
        bo_handle: handle.into(),
        ..ResourceInfo::default()
    };
    // SAFETY: as above.
    unsafe { resource_info_ioctl(node.as_fd().as_raw_fd(), &raw mut info) }?;
    Ok(info.res_handle)
}

/// The same for a DMA-BUF: what `vsockenc` does with each one that it has not seen before.
pub fn resource_of(node: &impl Device, dmabuf: impl AsFd) -> std::io::Result<u32> {
    let handle = node.prime_fd_to_buffer(dmabuf.as_fd())?;
    let id = resource_id(node, handle);
    // Whatever came of it: handles are not counted per import, and a forgotten one holds memory.
    node.close_buffer(handle)?;
    Ok(id?)
}
