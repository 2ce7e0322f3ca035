// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory of a producer's buffers, and the known pictures that are drawn into it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use libspa::param::video::VideoFormat;

use crate::foreign::{self, Foreign};
use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::{Outcome, buffers, dmabuf, virtgpu};

/// What is in the memory around a picture.
const PADDING: u8 = 0xee;

/// How pixels lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pixels {
    Bgrx,
    Rgba,
    /// Two planes.
    Nv12,
}

impl Pixels {
    const ALL: [Self; 3] = [Self::Bgrx, Self::Rgba, Self::Nv12];

    /// PipeWire's name.
    pub fn spa(self) -> VideoFormat {
        match self {
            Self::Bgrx => VideoFormat::BGRx,
            Self::Rgba => VideoFormat::RGBA,
            Self::Nv12 => VideoFormat::NV12,
        }
    }

    pub fn from_spa(format: VideoFormat) -> Option<Self> {
        Self::ALL.into_iter().find(|pixels| pixels.spa() == format)
    }

    /// GStreamer's name and DRM's fourcc (drm_fourcc.h).
    pub fn names(self) -> [&'static str; 2] {
        match self {
            Self::Bgrx => ["BGRx", "XR24"],
            Self::Rgba => ["RGBA", "AB24"],
            Self::Nv12 => ["NV12", "NV12"],
        }
    }

    /// Bytes in a row, and rows, of each plane.
    pub fn planes(self, (width, height): (u32, u32)) -> Vec<(usize, usize)> {
        let (width, height) = (width as usize, height as usize);
        match self {
            Self::Bgrx | Self::Rgba => vec![(4 * width, height)],
            Self::Nv12 => vec![(width, height), (width, height / 2)],
        }
    }

    /// The byte of picture `number` at this place of a plane: no two rows, columns, planes or pictures are
    /// alike, as long as they are few.
    pub fn byte(self, number: u8, plane: usize, row: usize, column: usize) -> u8 {
        match (self, column % 4) {
            (Self::Nv12, _) => (number ^ (column as u8).wrapping_mul(3))
                .wrapping_add(row as u8)
                .wrapping_add(90 * plane as u8),
            (_, 0) => (column / 4) as u8,
            (_, 1) => row as u8,
            (_, 2) => number,
            _ => 0xff,
        }
    }
}

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
    pub resource: Option<u32>,
}

/// What PipeWire is told of a plane.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    pub fd: BorrowedFd<'a>,
    /// Bytes that the memory has.
    pub size: usize,
    pub offset: usize,
    pub stride: usize,
    /// Bytes of the plane.
    pub length: usize,
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
        })
    }

    /// The planes.
    pub fn blocks(&self) -> impl Iterator<Item = Block<'_>> {
        self.planes.iter().map(|plane| {
            let (fd, size) = &self.files[plane.file];
            Block {
                fd: fd.as_fd(),
                size: *size,
                offset: plane.offset,
                stride: plane.stride,
                length: plane.stride * plane.extent.1,
            }
        })
    }

    /// Draws picture `number`, and padding around it: once nobody else uses the memory, or, `by_device`,
    /// whoever does.
    pub fn draw(&self, number: u8, by_device: bool) -> Outcome<()> {
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
}

fn allocate(memory: Memory, width: u32, height: u32) -> Outcome<(OwnedFd, u32)> {
    match memory {
        Memory::Dumb => buffers::dumb(&Node::open(VIRTIO_GPU, Kind::Primary)?, width, height),
        Memory::Vgem => foreign::make(Foreign::Vgem, width, height),
        Memory::Udmabuf => foreign::make(Foreign::Udmabuf, width, height),
        Memory::Heap => foreign::make(Foreign::Heap, width, height),
    }
}
