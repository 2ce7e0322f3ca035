// SPDX-License-Identifier: MIT OR Apache-2.0

//! The checks: what arrives, whether it is the newest, how long it takes, and what stays behind.

use gst::prelude::*;
use gst_video::prelude::*;
use gstpipewirezerocopy::cuda::{Importer, Pool, Source, Stream};
use gstpipewirezerocopy::egl::Gl;

use crate::Outcome;
use crate::exported::Exported;
use crate::figures::Times;

/// Buffers for pictures of one kind.
pub struct Buffers {
    pool: gst::BufferPool,
    pub info: gst_video::VideoInfo,
    _stream: Stream,
}

impl Buffers {
    fn new(importer: &Importer, picture: &Exported<'_>) -> Outcome<Self> {
        let (width, height) = picture.size();
        let info = gst_video::VideoInfo::builder(picture.format()?, width, height).build()?;
        let mut caps = info.to_caps()?;
        caps.make_mut()
            .set_features(0, Some(gst::CapsFeatures::new(["memory:CUDAMemory"])));
        let stream = Stream::new(importer.context())?;
        let pool = Pool::new(importer.context(), &stream, &caps, info.size() as u32)?.pool;
        pool.set_active(true)?;
        Ok(Self {
            pool,
            info,
            _stream: stream,
        })
    }

    fn copy(&self, importer: &mut Importer, source: &Source) -> Outcome<gst::Buffer> {
        let mut buffer = self.pool.acquire_buffer(None)?;
        let writable = buffer.get_mut().ok_or("a buffer of the pool is in use")?;
        importer.copy(source, (0, 0), writable, &self.info)?;
        Ok(buffer)
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        let _ = self.pool.set_active(false);
    }
}

/// Every pixel of a picture whose width the GPU's rows do not end with, as the CPU reads it back.
pub fn content(importer: &mut Importer, picture: &Exported<'_>) -> Outcome<bool> {
    let (width, height) = picture.size();
    let pixel = |x: u32, y: u32| [x as u8, y as u8, (x / 256 + 8 * (y / 256)) as u8, 255];
    let pixels: Vec<u8> = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| pixel(x, y)))
        .collect();
    picture.fill(&pixels)?;
    let buffers = Buffers::new(importer, picture)?;
    let source = picture.with_dmabuf(|dmabuf| importer.prepare(dmabuf))?;
    let copy = buffers.copy(importer, &source)?;
    let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&copy, &buffers.info)?;
    let pitch = usize::try_from(frame.plane_stride()[0])?;
    let found = frame.plane_data(0)?;
    let blue_first = picture.blue_first();
    let wrong = (0..height)
        .flat_map(|y| (0..width).map(move |x| (x, y)))
        .find(|&(x, y)| {
            let mut expected = pixel(x, y);
            if blue_first {
                expected.swap(0, 2);
            }
            found[y as usize * pitch + x as usize * 4..][..4] != expected
        });
    match wrong {
        None => println!(
            "{}: every pixel is right (pitch {pitch})",
            importer.way().name()
        ),
        Some((x, y)) => println!(
            "{}: WRONG at {x}, {y}: {:?} instead of {:?}",
            importer.way().name(),
            &found[y as usize * pitch + x as usize * 4..][..4],
            pixel(x, y)
        ),
    }
    Ok(wrong.is_none())
}

/// Draws a new colour and copies at once, over and over, with one import: an old colour, or one
/// that is not the same everywhere, is a stale or torn frame (L14, L15).
pub fn fresh(gl: &Gl, importer: &mut Importer, frames: usize) -> Outcome<bool> {
    let pictures = [
        Exported::new(gl, (640, 480))?,
        Exported::new(gl, (640, 480))?,
    ];
    let buffers = Buffers::new(importer, &pictures[0])?;
    let sources = pictures
        .iter()
        .map(|picture| picture.with_dmabuf(|dmabuf| importer.prepare(dmabuf)))
        .collect::<Result<Vec<_>, _>>()?;
    let mut stale = 0;
    for number in 0..frames {
        let which = number % 2;
        let mut colour = [number as u8, (number / 256) as u8, (number * 7) as u8, 255];
        pictures[which].clear(colour)?;
        let copy = buffers.copy(importer, &sources[which])?;
        if pictures[which].blue_first() {
            colour.swap(0, 2);
        }
        let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&copy, &buffers.info)?;
        let pitch = usize::try_from(frame.plane_stride()[0])?;
        let found = frame.plane_data(0)?;
        let good = [(0, 0), (320, 240), (639, 479)]
            .iter()
            .all(|(x, y)| found[y * pitch + x * 4..][..4] == colour);
        stale += usize::from(!good);
    }
    let way = importer.way().name();
    println!("{way}: {stale} stale or torn of {frames} frames");
    Ok(stale == 0)
}

/// Times of importing a new buffer and of copying one that is imported.
pub fn time(
    gl: &Gl,
    importer: &mut Importer,
    name: &str,
    size: (u32, u32),
    frames: usize,
) -> Outcome<()> {
    let way = importer.way().name();
    let picture = Exported::new(gl, size)?;
    picture.clear([1, 2, 3, 255])?;
    let buffers = Buffers::new(importer, &picture)?;
    let import = Times::take(frames, || {
        picture
            .with_dmabuf(|dmabuf| importer.prepare(dmabuf))
            .map(drop)
    })?;
    println!("{way} {name} import: {}", import.line());
    let source = picture.with_dmabuf(|dmabuf| importer.prepare(dmabuf))?;
    let copy = Times::take(frames, || buffers.copy(importer, &source).map(drop))?;
    println!("{way} {name} copy: {}", copy.line());
    Ok(())
}

/// Imports many times and looks at the descriptors that stay behind.
pub fn registrations(gl: &Gl, importer: &mut Importer) -> Outcome<bool> {
    let picture = Exported::new(gl, (640, 480))?;
    let open = || std::fs::read_dir("/proc/self/fd").map(Iterator::count);
    let mut cycle = || {
        picture
            .with_dmabuf(|dmabuf| importer.prepare(dmabuf))
            .map(drop)
    };
    cycle()?;
    let before = open()?;
    for _ in 0..500 {
        cycle()?;
    }
    let after = open()?;
    let way = importer.way().name();
    println!("{way}: {before} descriptors before 500 imports, {after} after");
    Ok(before == after)
}
