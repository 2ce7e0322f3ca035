// SPDX-License-Identifier: MIT OR Apache-2.0

//! Buffers of virtio-gpu: made, exported, and found again as resources of the host.

use std::os::fd::OwnedFd;

use drm::buffer::{self, Buffer, DrmFourcc};
use drm::control::Device;

use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::{Outcome, dmabuf, virtgpu};

/// Pixels. Sizes that nothing else in the guest has, so that the host's trace of them is clear.
const DUMB_SIZES: [(u32, u32); 2] = [(636, 476), (1276, 716)];
const CREATED_SIZES: [(u32, u32); 2] = [(332, 236), (316, 228)];
/// `O_CLOEXEC | O_RDWR` (fcntl.h), which are `DRM_CLOEXEC | DRM_RDWR`.
const EXPORT_FLAGS: u32 = 0o2_000_000 | 0o2;

/// Makes each kind of buffer and says which resource it is.
pub fn show() -> Outcome<()> {
    let primary = Node::open(VIRTIO_GPU, Kind::Primary)?;
    let render = Node::open(VIRTIO_GPU, Kind::Render)?;
    // All stay until the end, so that no id can be given out twice.
    let mut held = Vec::new();
    let mut ids = Vec::new();

    for (width, height) in DUMB_SIZES {
        let (dmabuf, handle) = written(&primary, width, height)?;
        let id = look_up(&render, &dmabuf)?;
        let own = virtgpu::resource_id(&primary, handle)?;
        expect_same(own, id, "its own handle", "its DMA-BUF on the render node")?;
        println!("resource {id} {width}x{height} dumb");
        held.push(dmabuf);
        ids.push(id);
    }
    for (width, height) in CREATED_SIZES {
        let (dmabuf, own) = created(&render, width, height)?;
        let id = look_up(&primary, &dmabuf)?;
        expect_same(own, id, "its creation", "its DMA-BUF on the primary node")?;
        println!("resource {id} {width}x{height} created");
        held.push(dmabuf);
        ids.push(id);
    }
    ids.sort_unstable();
    ids.dedup();
    if ids.len() != held.len() {
        return Err(format!("{} buffers have only {} ids", held.len(), ids.len()).into());
    }
    Ok(())
}

/// A dumb buffer of four bytes a pixel as a DMA-BUF, and its stride in bytes.
pub fn dumb(node: &Node, width: u32, height: u32) -> Outcome<(OwnedFd, u32)> {
    let dumb = node
        .create_dumb_buffer((width, height), DrmFourcc::Xrgb8888, 32)
        .map_err(|error| format!("a dumb buffer of {width}x{height}: {error}"))?;
    let dmabuf = node.buffer_to_prime_fd(dumb.handle(), EXPORT_FLAGS)?;
    Ok((dmabuf, dumb.pitch()))
}

/// A resource of four bytes a pixel, without padding, as a DMA-BUF, and its id.
pub fn created(node: &Node, width: u32, height: u32) -> Outcome<(OwnedFd, u32)> {
    let (handle, id) = virtgpu::create(node, width, height)
        .map_err(|error| format!("VIRTGPU_RESOURCE_CREATE of {width}x{height}: {error}"))?;
    Ok((node.buffer_to_prime_fd(handle, EXPORT_FLAGS)?, id))
}

/// A dumb buffer, exported; what is written through its mapping must be in the DMA-BUF.
fn written(node: &Node, width: u32, height: u32) -> Outcome<(OwnedFd, buffer::Handle)> {
    let mut dumb = node
        .create_dumb_buffer((width, height), DrmFourcc::Xrgb8888, 32)
        .map_err(|error| format!("a dumb buffer of {width}x{height}: {error}"))?;
    let written: Vec<u8> = (0..dumb.pitch() * height)
        .map(|byte| (byte % 251) as u8)
        .collect();
    node.map_dumb_buffer(&mut dumb)?[..written.len()].copy_from_slice(&written);
    let dmabuf = node.buffer_to_prime_fd(dumb.handle(), EXPORT_FLAGS)?;
    if dmabuf::read(&dmabuf, written.len())? != written {
        return Err("a DMA-BUF has other bytes than the dumb buffer it was exported from".into());
    }
    Ok((dmabuf, dumb.handle()))
}

/// The id of a DMA-BUF's resource, which must be the same each time it is asked for.
fn look_up(node: &Node, dmabuf: &OwnedFd) -> Outcome<u32> {
    let id = virtgpu::resource_of(node, dmabuf)
        .map_err(|error| format!("the resource id of a DMA-BUF of virtio-gpu: {error}"))?;
    let again = virtgpu::resource_of(node, dmabuf)?;
    expect_same(id, again, "the first look", "the second")?;
    if id == 0 {
        return Err("a resource id of 0, which means none".into());
    }
    Ok(id)
}

fn expect_same(one: u32, other: u32, of_one: &str, of_other: &str) -> Outcome<()> {
    if one != other {
        return Err(format!("resource id {one} by {of_one}, {other} by {of_other}").into());
    }
    Ok(())
}
