// SPDX-License-Identifier: MIT OR Apache-2.0

//! The import by itself: what arrives, whether it is the newest, how long it takes, and what stays behind.

use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::Instant;

use gst::prelude::*;
use gstpipewirezerocopy::cuda::{self, Pool, Stream};
use gstpipewirezerocopy::egl::Display;
use zerocopy_test_producer::Pixels;

use crate::Outcome;
use crate::exported::Exported;
use crate::feed::{Feed, Image};
use crate::figures::{Row, Times};
use crate::pictures;

type Importer = cuda::Importer<Feed>;
type Source = cuda::Source<Image>;

/// Pixels of a picture in a race, at most.
const SIZE: (u32, u32) = (640, 480);
/// Buffers in a race: one is drawn, one is copied, one is on its way.
const BUFFERS: usize = 3;
/// Rounds of work for each pixel, so that drawing takes about as long as copying, and longer.
const WORK: [u32; 3] = [0, 100, 1000];

/// Buffers for pictures of one kind.
struct Buffers {
    pool: gst::BufferPool,
    info: gst_video::VideoInfo,
    _stream: Stream,
}

impl Buffers {
    fn new(importer: &Importer, size: (u32, u32)) -> Outcome<Self> {
        // Four bytes, whatever their names: they are copied as they lie.
        let format = gst_video::VideoFormat::Rgba;
        let info = gst_video::VideoInfo::builder(format, size.0, size.1).build()?;
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

/// Every pixel of a picture whose width the GPU's rows do not end with, as the CPU reads it back: in the
/// format that the driver exports, and with its colours the other way round, which changes no byte.
pub fn content(importer: &mut Importer, picture: &Exported) -> Outcome<bool> {
    picture.draw(7, 0)?;
    picture.finish()?;
    let buffers = Buffers::new(importer, picture.size())?;
    let way = importer.way().name();
    let mut right = true;
    for fourcc in picture.fourccs() {
        let name = String::from_utf8_lossy(&fourcc.to_le_bytes()).into_owned();
        let source = picture.with_dmabuf_as(fourcc, |dmabuf| importer.prepare(dmabuf));
        let source = match source {
            Ok(source) => source,
            Err(error) => {
                println!("{way} {name}: not checked: {error}");
                continue;
            }
        };
        let copy = buffers.copy(importer, &source)?;
        let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&copy, &buffers.info)?;
        match pictures::compare(&frame, Pixels::Rgba) {
            Ok(7) => println!("{way} {name}: every pixel is right"),
            Ok(number) => {
                println!("{way} {name}: WRONG: the picture {number} instead of 7");
                right = false;
            }
            Err(wrong) => {
                println!("{way} {name}: WRONG: {wrong}");
                right = false;
            }
        }
    }
    Ok(right)
}

/// One thread draws pictures into the buffers of a small pool, another one copies each as soon as it is
/// drawn, while the next is being drawn, with one import for each buffer: an old picture, or one that is
/// not the same everywhere, is a stale or torn frame (L14, L15).
pub fn race(
    display: &Display,
    importer: &mut Importer,
    size: (u32, u32),
    frames: usize,
) -> Outcome<bool> {
    let size = (size.0.min(SIZE.0), size.1.min(SIZE.1));
    let (drawn, to_copy) = mpsc::channel();
    let (copied, free) = mpsc::channel();
    let pictures = (0..BUFFERS).map(|_| Exported::new(display, size));
    let pictures = pictures.collect::<Outcome<Vec<_>>>()?;
    let buffers = Buffers::new(importer, size)?;
    let imports = pictures
        .iter()
        .map(|picture| picture.with_dmabuf(|dmabuf| importer.prepare(dmabuf)));
    let sources = imports.collect::<Result<Vec<_>, _>>()?;
    (0..BUFFERS).try_for_each(|index| copied.send(index))?;
    let way = importer.way().name();
    let wrong = std::thread::scope(|scope| -> Outcome<usize> {
        let producer = scope.spawn(move || -> Result<(), String> {
            for number in 0..frames {
                let Ok(index) = free.recv() else {
                    break;
                };
                let picture: &Exported = &pictures[index];
                picture
                    .draw(number as u8, WORK[number % WORK.len()])
                    .and_then(|()| picture.finish())
                    .map_err(|error| error.to_string())?;
                if drawn.send((index, number as u8)).is_err() {
                    break;
                }
            }
            Ok(())
        });
        // It ends the producer, too, where this ends early.
        let copied = copied;
        let mut wrong = 0;
        for (index, number) in to_copy {
            let copy = buffers.copy(importer, &sources[index])?;
            // The producer may have it back; what was copied must be right all the same.
            let _ = copied.send(index);
            let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&copy, &buffers.info)?;
            let found = pictures::compare(&frame, Pixels::Rgba);
            if found != Ok(number) {
                if wrong == 0 {
                    println!("{way}: WRONG: {found:?} instead of picture {number}");
                }
                wrong += 1;
            }
        }
        drop(copied);
        producer.join().map_err(|_| "the producer panicked")??;
        Ok(wrong)
    })?;
    let (width, height) = size;
    println!(
        "{way}: {wrong} stale or torn of {frames} frames of {width}x{height}, drawn and copied side by side"
    );
    Ok(wrong == 0)
}

/// Pictures that are still being drawn when their copy begins, each with a fence: the GPU is told to wait for it
/// where it can be, and what arrives is whole.
pub fn fenced(display: &Display, importer: &mut Importer, size: (u32, u32)) -> Outcome<bool> {
    let way = importer.way().name();
    let picture = Exported::new(display, size)?;
    let buffers = Buffers::new(importer, size)?;
    let source = picture.with_dmabuf(|dmabuf| importer.prepare(dmabuf))?;
    let (mut begun_after, mut done_after) = (Vec::new(), Vec::new());
    let mut by = "the GPU";
    for number in 1..=10 {
        picture.draw(number, WORK[2])?;
        let fence = match picture.fence() {
            Ok(fence) => fence,
            Err(error) => {
                println!("{way}: fences: not checked: {error}");
                return Ok(true);
            }
        };
        let mut copy = buffers.pool.acquire_buffer(None)?;
        let writable = copy.get_mut().ok_or("a buffer of the pool is in use")?;
        let start = Instant::now();
        let begun = importer.begin(&source, (0, 0), size, &[fence.as_fd()])?;
        begun_after.push(start.elapsed());
        if !begun.waits() {
            by = "the thread";
            picture.finish()?;
        }
        begun.copy(writable, &buffers.info)?;
        done_after.push(start.elapsed());
        let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(&copy, &buffers.info)?;
        let found = pictures::compare(&frame, Pixels::Rgba);
        if found != Ok(number) {
            println!("{way}: fences: WRONG: {found:?} instead of picture {number}");
            return Ok(false);
        }
    }
    begun_after.sort_unstable();
    done_after.sort_unstable();
    println!(
        "{way}: fences: every picture is whole; waited for by {by}, which is told within {:?} of {:?} that a copy takes",
        begun_after[5], done_after[5]
    );
    Ok(true)
}

/// Times of importing a new buffer, of copying one that is imported, and of both.
pub fn time(
    display: &Display,
    importer: &mut Importer,
    size: (u32, u32),
    frames: usize,
) -> Outcome<Vec<Row>> {
    let way = importer.way().name();
    let picture = Exported::new(display, size)?;
    picture.draw(1, 0)?;
    picture.finish()?;
    let buffers = Buffers::new(importer, size)?;
    let row = |what, times| Row {
        way,
        size,
        what,
        times,
    };
    let prepare = |importer: &mut Importer| picture.with_dmabuf(|dmabuf| importer.prepare(dmabuf));
    let import = Times::take(frames, || prepare(importer).map(drop))?;
    let source = prepare(importer)?;
    let copy = Times::take(frames, || buffers.copy(importer, &source).map(drop))?;
    let total = Times::take(frames, || -> Outcome<()> {
        let source = prepare(importer)?;
        buffers.copy(importer, &source).map(drop)
    })?;
    Ok(vec![
        row("import of a new buffer", import),
        row(crate::figures::COPY, copy),
        row("import and copy", total),
    ])
}

/// Imports many times and looks at the descriptors that stay behind.
pub fn registrations(importer: &mut Importer, picture: &Exported) -> Outcome<bool> {
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
