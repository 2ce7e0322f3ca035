// SPDX-License-Identifier: MIT OR Apache-2.0

//! Known pictures, drawn into DMA-BUFs of one kind and given to `vsockenc`.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use gst::prelude::*;
use gst_allocators::prelude::*;

use crate::Outcome;
use crate::foreign::{self, Foreign};
use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::pool::DmaBufPool;
use crate::{buffers, virtgpu};

/// As many as a compositor would have: each one is used again and again.
const BUFFERS: u32 = 3;
/// Rows that the buffer has and the picture has not, as Mesa makes them.
const MORE_ROWS: u32 = 16;
/// Pixels; no picture has this size.
const MARKER_SIZE: (u32, u32) = (64, 16);
/// What comes after the pictures may take this long, on an emulated processor.
const END_LIMIT: gst::ClockTime = gst::ClockTime::from_seconds(60);

/// Where the memory comes from.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Memory {
    /// A dumb buffer of virtio-gpu's primary node.
    Dumb,
    /// VIRTGPU_RESOURCE_CREATE on virtio-gpu's render node; it has more rows than the picture.
    Created,
    /// A dumb buffer of vgem.
    Vgem,
    /// Pages of a memfd.
    Udmabuf,
    /// The system heap.
    Heap,
}

/// What to send, and where to.
#[derive(Debug, clap::Args)]
pub struct Options {
    memory: Memory,
    /// A gst-launch description that ends in BGRx.
    #[arg(long)]
    pictures: String,
    /// The encoder's properties, as gst-launch has them.
    #[arg(long)]
    encoder: String,
    /// An MP4 file for what came back.
    #[arg(long)]
    film: PathBuf,
}

/// A DMA-BUF and how a picture lies in it.
struct Made {
    dmabuf: OwnedFd,
    /// Bytes.
    stride: u32,
    /// Bytes.
    size: usize,
}

/// Sends the pictures and writes the film. Says "resource ID WIDTHxHEIGHT KIND" of each buffer that is
/// virtio-gpu's, "transfer WAY: REASON" when the element says so, "stats ..." at the end, and "marker ID"
/// of a resource that is made once the buffers are gone and before the element stops.
pub fn show(options: &Options) -> Outcome<()> {
    gst::init()?;
    let pictures = pipeline(&format!(
        "{} ! appsink name=end sync=false",
        options.pictures
    ))?;
    let frames = end::<gst_app::AppSink>(&pictures, "end")?;
    pictures.set_state(gst::State::Playing)?;

    let film = pipeline(&format!(
        "appsrc name=begin format=time max-buffers={BUFFERS} block=true ! vsockenc name=encoder {} \
         ! h264parse ! mp4mux ! filesink location={}",
        options.encoder,
        options.film.display()
    ))?;
    let source = end::<gst_app::AppSrc>(&film, "begin")?;
    let mut pool = None;
    if film.set_state(gst::State::Playing).is_err() {
        return watch(&film);
    }
    while let Ok(sample) = frames.pull_sample() {
        let (caps, picture) = (sample.caps(), sample.buffer());
        let (caps, picture) = caps.zip(picture).ok_or("a sample without a picture")?;
        let info = gst_video::VideoInfo::from_caps(caps)?;
        if pool.is_none() {
            let mut caps = caps.to_owned();
            let dmabuf = gst::CapsFeatures::new([gst_allocators::CAPS_FEATURE_MEMORY_DMABUF]);
            caps.make_mut().set_features(0, Some(dmabuf));
            source.set_caps(Some(&caps));
            let new = start_pool(options.memory, &info)?;
            stop_with_error(&film, &new)?;
            pool = Some(new);
        }
        let pool = pool.as_ref().ok_or("there is no pool")?;
        // Waits until the element and the host are done with one.
        let Ok(mut buffer) = pool.acquire_buffer(None) else {
            break; // the bus says why
        };
        draw(&mut buffer, picture, &info)?;
        if source.push_buffer(buffer).is_err() {
            break; // the bus says why
        }
    }
    // Where the pipeline has failed, it takes no end either.
    let _ = source.end_of_stream();
    let ended = watch(&film);
    let stats: gst::Structure = end::<gst::Element>(&film, "encoder")?.property("stats");
    println!("stats {stats}");
    if let Some(pool) = pool {
        pool.set_active(false)?;
        mark(options.memory)?;
    }
    film.set_state(gst::State::Null)?;
    pictures.set_state(gst::State::Null)?;
    ended
}

fn pipeline(description: &str) -> Outcome<gst::Pipeline> {
    let element = gst::parse::launch(description)?;
    Ok(element
        .downcast()
        .map_err(|_| format!("no pipeline: {description}"))?)
}

fn end<T: IsA<gst::Element>>(pipeline: &gst::Pipeline, name: &str) -> Outcome<T> {
    let element = pipeline.by_name(name).ok_or("no such element")?;
    Ok(element.downcast().map_err(|_| "of another type")?)
}

/// Makes a resource of virtio-gpu. The device's commands stay in order, so QEMU's trace shows what had
/// ended before this one.
fn mark(memory: Memory) -> Outcome<()> {
    let id = match memory {
        Memory::Dumb => {
            let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
            let (dmabuf, _) = buffers::dumb(&node, MARKER_SIZE.0, MARKER_SIZE.1)?;
            virtgpu::resource_of(&node, &dmabuf)?
        }
        Memory::Created => {
            let node = Node::open(VIRTIO_GPU, Kind::Render)?;
            buffers::created(&node, MARKER_SIZE.0, MARKER_SIZE.1)?.1
        }
        Memory::Vgem | Memory::Udmabuf | Memory::Heap => return Ok(()),
    };
    println!("marker {id}");
    Ok(())
}

/// Makes the DMA-BUFs and a pool that gives them out in turn.
fn start_pool(memory: Memory, info: &gst_video::VideoInfo) -> Outcome<DmaBufPool> {
    let allocator = gst_allocators::DmaBufAllocator::new();
    let mut memories = Vec::new();
    for _ in 0..BUFFERS {
        let made = make(memory, info.width(), info.height())?;
        // SAFETY: the allocator takes the descriptor over, and nobody else has it.
        let memory = unsafe { allocator.alloc_dmabuf(made.dmabuf, made.size) }?;
        memories.push((memory, made.stride));
    }
    let pool = DmaBufPool::with(memories, info);
    let mut config = pool.config();
    config.set_params(None, info.size() as u32, 0, BUFFERS);
    pool.set_config(config)?;
    pool.set_active(true)?;
    Ok(pool)
}

/// A pipeline that fails gives no buffer back: nobody is to wait for one then.
fn stop_with_error(pipeline: &gst::Pipeline, pool: &DmaBufPool) -> Outcome<()> {
    let bus = pipeline.bus().ok_or("a pipeline without a bus")?;
    let pool = pool.downgrade();
    bus.set_sync_handler(move |_, message| {
        if message.type_() == gst::MessageType::Error
            && let Some(pool) = pool.upgrade()
        {
            pool.set_flushing(true);
        }
        gst::BusSyncReply::Pass
    });
    Ok(())
}

fn make(memory: Memory, width: u32, height: u32) -> Outcome<Made> {
    let foreign = |kind| {
        let (dmabuf, stride) = foreign::make(kind, width, height)?;
        Ok(Made {
            dmabuf,
            stride,
            size: (stride * height) as usize,
        })
    };
    match memory {
        Memory::Vgem => foreign(Foreign::Vgem),
        Memory::Udmabuf => foreign(Foreign::Udmabuf),
        Memory::Heap => foreign(Foreign::Heap),
        Memory::Dumb => {
            let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
            let (dmabuf, stride) = buffers::dumb(&node, width, height)?;
            let id = virtgpu::resource_of(&node, &dmabuf)?;
            println!("resource {id} {width}x{height} dumb");
            Ok(Made {
                dmabuf,
                stride,
                size: (stride * height) as usize,
            })
        }
        Memory::Created => {
            let node = Node::open(VIRTIO_GPU, Kind::Render)?;
            let rows = height + MORE_ROWS;
            let (dmabuf, id) = buffers::created(&node, width, rows)?;
            println!("resource {id} {width}x{rows} created");
            Ok(Made {
                dmabuf,
                stride: 4 * width,
                size: (4 * width * rows) as usize,
            })
        }
    }
}

/// Copies a picture, and its time, into a buffer with other strides.
fn draw(
    buffer: &mut gst::Buffer,
    picture: &gst::BufferRef,
    info: &gst_video::VideoInfo,
) -> Outcome<()> {
    let writable = buffer
        .get_mut()
        .ok_or("the pool gave a buffer that others have")?;
    writable.set_pts(picture.pts());
    writable.set_duration(picture.duration());
    let from = gst_video::VideoFrameRef::from_buffer_ref_readable(picture, info)?;
    let mut to = gst_video::VideoFrameRef::from_buffer_ref_writable(writable, info)?;
    from.copy(&mut to)?;
    Ok(())
}

/// Returns at the end of the stream; an error on the bus is one here.
fn watch(pipeline: &gst::Pipeline) -> Outcome<()> {
    use gst::MessageView;
    let bus = pipeline.bus().ok_or("a pipeline without a bus")?;
    loop {
        let message = bus.timed_pop(END_LIMIT).ok_or("the stream does not end")?;
        match message.view() {
            MessageView::Eos(_) => return Ok(()),
            MessageView::Error(error) => {
                return Err(format!("{} ({:?})", error.error(), error.debug()).into());
            }
            MessageView::Element(element) => {
                let Some(structure) = element.structure() else {
                    continue;
                };
                if structure.name() == "helix-connection" {
                    let text = |name| structure.get::<String>(name).unwrap_or_default();
                    println!("transfer {}: {}", text("transfer"), text("reason"));
                }
            }
            _ => {}
        }
    }
}
