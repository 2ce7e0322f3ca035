// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory of a producer's buffers, and how the processor draws known pictures into it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use zerocopy_test_producer::{
    self as producer, Agreed, Block, Modifier, Pixels, Signal, Timelines,
};

use super::sync::Fence;
use crate::foreign::{self, Foreign};
use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::{Outcome, buffers, dmabuf, virtgpu};

/// What is in the memory around a picture.
const PADDING: u8 = 0xee;

/// Where memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Dumb buffers of virtio-gpu.
    Dumb,
    /// Another driver's; module vgem.
    Vgem,
    Udmabuf,
    Heap,
}

/// How pictures lie in DMA-BUFs.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    pub memory: Memory,
    /// Pixels (of four bytes) at the end of each row.
    pub more_columns: u32,
    /// Rows that the memory has and the picture has not, before it and after it.
    pub more_rows: (u32, u32),
    /// Each plane in a DMA-BUF of its own, rather than all in one.
    pub apart: bool,
    /// Say no sizes: they mean nothing for DMA-BUFs (L8).
    pub no_sizes: bool,
    /// With explicit sync, say of what is drawn late by which fence it will be.
    pub promised: bool,
    /// Buffers of a stream.
    pub buffers: i32,
}

impl Style {
    /// Without padding, and with buffers enough for a consumer that passes some of them on.
    pub fn plain(memory: Memory) -> Self {
        Self {
            memory,
            more_columns: 0,
            more_rows: (0, 0),
            apart: false,
            no_sizes: false,
            promised: false,
            buffers: 6,
        }
    }
}

/// One plane.
#[derive(Debug)]
struct Plane {
    /// Which of the canvas's files.
    file: usize,
    /// Bytes before its first pixel.
    offset: usize,
    /// Bytes from row to row.
    stride: usize,
    /// Bytes of each row that are pixels, and how many rows.
    extent: (usize, usize),
}

/// Memory for one picture.
#[derive(Debug)]
pub struct Canvas {
    pixels: Pixels,
    is_dmabuf: bool,
    /// Descriptors with their sizes in bytes.
    files: Vec<(OwnedFd, usize)>,
    planes: Vec<Plane>,
    /// The host's number for it, where virtio-gpu made it.
    resource: Option<u32>,
    /// Fences can be put on it.
    fences: bool,
}

impl Canvas {
    /// DMA-BUFs for pictures of that size.
    pub fn dmabuf(pixels: Pixels, size: (u32, u32), style: Style) -> Outcome<Self> {
        let extents = pixels.planes(size);
        // All memory is made in pixels of four bytes; every plane has the widest one's stride.
        let width = extents.iter().map(|(row, _)| row / 4).max().unwrap_or(0) as u32;
        let width = width + style.more_columns;
        let (before, after) = style.more_rows;
        let padding = (before + after) as usize;
        let groups: Vec<_> = if style.apart {
            extents.iter().map(std::slice::from_ref).collect()
        } else {
            vec![&extents[..]]
        };
        let mut canvas = Self {
            pixels,
            is_dmabuf: true,
            files: Vec::new(),
            planes: Vec::new(),
            resource: None,
            fences: style.memory == Memory::Vgem,
        };
        for group in groups {
            let rows = group.iter().map(|(_, rows)| rows).sum::<usize>() + padding;
            let (fd, stride) = allocate(style.memory, width, rows as u32)?;
            let stride = stride as usize;
            let mut offset = before as usize * stride;
            for &extent in group {
                canvas.planes.push(Plane {
                    file: canvas.files.len(),
                    offset,
                    stride,
                    extent,
                });
                offset += extent.1 * stride;
            }
            if style.memory == Memory::Dumb {
                let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
                canvas.resource = Some(virtgpu::resource_of(&node, &fd)?);
            }
            canvas.files.push((fd, rows * stride));
        }
        Ok(canvas)
    }

    /// Shared memory for pictures of that size.
    pub fn shared(pixels: Pixels, size: (u32, u32)) -> Outcome<Self> {
        let mut planes = Vec::new();
        let mut offset = 0;
        for extent in pixels.planes(size) {
            planes.push(Plane {
                file: 0,
                offset,
                stride: extent.0,
                extent,
            });
            offset += extent.0 * extent.1;
        }
        Ok(Self {
            pixels,
            is_dmabuf: false,
            files: vec![(foreign::sealed_memfd(offset)?, offset)],
            planes,
            resource: None,
            fences: false,
        })
    }
}

impl producer::Canvas for Canvas {
    fn blocks(&self) -> Vec<Block<'_>> {
        let planes = self.planes.iter().map(|plane| {
            let (fd, size) = &self.files[plane.file];
            Block {
                fd: fd.as_fd(),
                size: *size,
                offset: plane.offset,
                stride: plane.stride,
                length: plane.stride * plane.extent.1,
            }
        });
        planes.collect()
    }

    /// With padding around it.
    fn draw(&self, number: u8, by_device: bool) -> Outcome<()> {
        for (index, (fd, size)) in self.files.iter().enumerate() {
            let mut bytes = vec![PADDING; *size];
            for (plane, place) in self.planes.iter().enumerate() {
                if place.file != index {
                    continue;
                }
                let (columns, rows) = place.extent;
                for row in 0..rows {
                    let start = place.offset + row * place.stride;
                    for (column, byte) in bytes[start..start + columns].iter_mut().enumerate() {
                        *byte = self.pixels.byte(number, plane, row, column);
                    }
                }
            }
            match (self.is_dmabuf, by_device) {
                (true, true) => dmabuf::fill(fd, &bytes)?,
                (true, false) => dmabuf::write(fd, &bytes)?,
                (false, _) => File::from(fd.try_clone()?).write_all_at(&bytes, 0)?,
            }
        }
        Ok(())
    }

    fn resource(&self) -> Option<u32> {
        self.resource
    }

    fn fence(&self) -> Outcome<Option<Signal>> {
        if !self.fences {
            return Ok(None);
        }
        let (fd, _) = self.files.first().ok_or("no plane")?;
        let fence = Fence::attach(fd)?;
        Ok(Some(Box::new(|| fence.signal())))
    }
}

impl producer::Workshop for Style {
    fn make(&mut self, agreed: &Agreed) -> Outcome<Box<dyn producer::Canvas>> {
        Ok(Box::new(match agreed.modifier {
            Modifier::None => Canvas::shared(agreed.pixels, agreed.size)?,
            _ => Canvas::dmabuf(agreed.pixels, agreed.size, *self)?,
        }))
    }

    fn buffers(&self) -> i32 {
        self.buffers
    }

    fn says_no_sizes(&self) -> bool {
        self.no_sizes
    }

    fn promise(&mut self, timelines: &Timelines, point: u64) -> Outcome<Option<Signal>> {
        if !self.promised {
            return Ok(None);
        }
        let (fence, file) = Fence::as_file()?;
        timelines.promise(point, &file)?;
        Ok(Some(Box::new(|| fence.signal())))
    }
}

fn allocate(memory: Memory, width: u32, height: u32) -> Outcome<(OwnedFd, u32)> {
    match memory {
        Memory::Dumb => buffers::dumb(&Node::open(VIRTIO_GPU, Kind::Primary)?, width, height),
        Memory::Vgem => foreign::make(Foreign::Vgem, width, height),
        Memory::Udmabuf => foreign::make(Foreign::Udmabuf, width, height),
        Memory::Heap => foreign::make(Foreign::Heap, width, height),
    }
}
