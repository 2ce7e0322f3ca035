// SPDX-License-Identifier: MIT OR Apache-2.0

//! What pipewirezerocopysrc's CUDA module makes of DMA-BUFs where an EGL display draws them: all of
//! its way but the GPU, which tests/cuda-fake stands in for.

use std::os::fd::{AsFd, OwnedFd};

use gst::prelude::*;
use gst_video::prelude::*;
use gstpipewirezerocopy::cuda::{Context, Importer, Pool, Source, Stream, Way};
use gstpipewirezerocopy::egl::{Display, DmaBuf, Plane};
use zerocopy_cuda_fake::{Alive, Fake};

use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::{Outcome, buffers, dmabuf};

/// Pixels of the memory: a buffer that is larger than the pictures in it.
const MEMORY: (u32, u32) = (256, 96);
/// Pixels of a picture.
const SIZE: (u32, u32) = (200, 64);
/// Where a part begins.
const PART: (u32, u32) = (20, 10);

/// Copies pictures of each kind and compares them.
pub fn show() -> Outcome<()> {
    gst::init()?;
    let fake = Fake::load();
    let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
    let display = Display::open(node.path())?;
    println!("cuda device of the display: {:?}", display.cuda_device());
    let memory = buffers::dumb(&node, MEMORY.0, MEMORY.1)?;

    let mut pictures = Pictures::new(&display, &memory)?;
    let xr24 = gst_video::VideoFormat::Bgrx;
    pictures.show("XR24", *b"XR24", xr24, SIZE, (0, 0))?;
    pictures.show("AB24", *b"AB24", gst_video::VideoFormat::Rgba, SIZE, (0, 0))?;
    pictures.show("NV12", *b"NV12", gst_video::VideoFormat::Nv12, SIZE, (0, 0))?;
    pictures.show("part", *b"XR24", xr24, (101, 33), PART)?;
    pictures.seed = 77;
    pictures.show("drawn again", *b"XR24", xr24, SIZE, (0, 0))?;
    drop(pictures);
    let left = fake.alive();
    if left == Alive::default() {
        println!("cuda nothing left: right");
    } else {
        println!("cuda nothing left: WRONG: {left:?}");
    }
    Ok(())
}

struct Pictures<'a> {
    importer: Importer,
    context: Context,
    /// One import for all pictures of four bytes a pixel: it must show what is drawn later.
    kept: Option<(u32, Source)>,
    memory: &'a (OwnedFd, u32),
    /// What the bytes depend on, besides their place.
    seed: usize,
}

impl<'a> Pictures<'a> {
    fn new(display: &Display, memory: &'a (OwnedFd, u32)) -> Outcome<Self> {
        let context = Context::new(0)?;
        Ok(Self {
            importer: Importer::new(display.clone(), &context, Way::Image)?,
            context,
            kept: None,
            memory,
            seed: 0,
        })
    }

    /// Bytes that tell their place; no alpha below 255 where there would be one: what a format calls
    /// padding is drawn as opaque.
    fn byte(&self, at: usize, opaque: bool) -> u8 {
        if opaque && at % 4 == 3 {
            return u8::MAX;
        }
        (at * 7 + at / 256 + self.seed) as u8
    }

    fn show(
        &mut self,
        what: &str,
        name: [u8; 4],
        format: gst_video::VideoFormat,
        size: (u32, u32),
        at: (u32, u32),
    ) -> Outcome<()> {
        let (fd, stride) = self.memory;
        let fourcc = u32::from_le_bytes(name);
        let planar = name == *b"NV12";
        let length = *stride as usize * MEMORY.1 as usize;
        let drawn: Vec<u8> = (0..length).map(|at| self.byte(at, !planar)).collect();
        dmabuf::write(fd, &drawn)?;

        let chroma = *stride * SIZE.1;
        let plane = |offset| Plane {
            fd: fd.as_fd(),
            offset,
            stride: *stride,
        };
        let planes = [plane(0), plane(chroma)];
        let buffer = DmaBuf {
            fourcc,
            modifier: Some(0),
            width: if planar { SIZE.0 } else { MEMORY.0 },
            height: if planar { SIZE.1 } else { MEMORY.1 },
            planes: &planes[..=usize::from(planar)],
        };
        let source = match self.kept.take() {
            Some((of, source)) if of == fourcc => source,
            _ => self.importer.prepare(&buffer)?,
        };

        let info = gst_video::VideoInfo::builder(format, size.0, size.1).build()?;
        let mut caps = info.to_caps()?;
        caps.make_mut()
            .set_features(0, Some(gst::CapsFeatures::new(["memory:CUDAMemory"])));
        let stream = Stream::new(&self.context)?;
        let pool = Pool::new(&self.context, &stream, &caps, info.size() as u32)?.pool;
        pool.set_active(true)?;
        let mut copy = pool.acquire_buffer(None)?;
        let writable = copy.get_mut().ok_or("a buffer of the pool is in use")?;
        self.importer.copy(&source, at, writable, &info)?;

        let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&copy, &info)?;
        let mut wrong = None;
        for plane in 0..info.n_planes() {
            let (start, bytes, scale) = match (planar, plane) {
                (false, _) => (0, 4 * size.0 as usize, 1),
                (true, 0) => (0, size.0 as usize, 1),
                (true, _) => (chroma as usize, size.0.next_multiple_of(2) as usize, 2),
            };
            let rows = size.1.div_ceil(scale) as usize;
            let pitch = usize::try_from(frame.plane_stride()[plane as usize])?;
            let found = frame.plane_data(plane)?;
            for row in 0..rows {
                let from = start + (row + at.1 as usize) * *stride as usize + at.0 as usize * 4;
                let (expected, got) = (&drawn[from..][..bytes], &found[row * pitch..][..bytes]);
                if expected != got {
                    wrong.get_or_insert(format!(
                        "WRONG: plane {plane}, row {row}: {:?}... instead of {:?}...",
                        &got[..8],
                        &expected[..8]
                    ));
                }
            }
        }
        println!("cuda {what}: {}", wrong.as_deref().unwrap_or("right"));
        drop(frame);
        drop(copy);
        pool.set_active(false)?;
        self.kept = Some((fourcc, source));
        Ok(())
    }
}
