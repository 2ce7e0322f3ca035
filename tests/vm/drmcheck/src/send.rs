// SPDX-License-Identifier: MIT OR Apache-2.0

//! Known pictures, drawn into DMA-BUFs of one kind and given to `vsockenc`.

use std::path::PathBuf;

use gst::prelude::*;

use crate::Outcome;
use crate::memory::{self, Memory};
use crate::pool::DmaBufPool;

/// As many as a compositor would have: each one is used again and again.
const BUFFERS: u32 = 3;
/// What comes after the pictures may take this long, on an emulated processor.
const END_LIMIT: gst::ClockTime = gst::ClockTime::from_seconds(60);

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
    let mut next = frames.pull_sample();
    let first = next.as_ref().map_err(|_| "there are no pictures")?;
    let caps = first.caps().ok_or("a picture without caps")?;
    let info = gst_video::VideoInfo::from_caps(caps)?;

    // What bounds the source's queue is the pool: whoever waits there is told of an error.
    let film = pipeline(&format!(
        "appsrc name=begin format=time ! vsockenc name=encoder {} ! h264parse ! mp4mux \
         ! filesink location={}",
        options.encoder,
        options.film.display()
    ))?;
    let source = end::<gst_app::AppSrc>(&film, "begin")?;
    let mut caps = caps.to_owned();
    let dmabuf = gst::CapsFeatures::new([gst_allocators::CAPS_FEATURE_MEMORY_DMABUF]);
    caps.make_mut().set_features(0, Some(dmabuf));
    source.set_caps(Some(&caps));
    let pool = start_pool(options.memory, &info)?;
    stop_with_error(&film, &pool)?;
    if film.set_state(gst::State::Playing).is_err() {
        return watch(&film);
    }
    while let Ok(sample) = next {
        // Waits until the element and the host are done with one.
        let Ok(mut buffer) = pool.acquire_buffer(None) else {
            break; // the bus says why
        };
        let picture = sample.buffer().ok_or("a sample without a picture")?;
        draw(&mut buffer, picture, &info)?;
        if source.push_buffer(buffer).is_err() {
            break; // the bus says why
        }
        next = frames.pull_sample();
    }
    // Where the pipeline has failed, it takes no end either.
    let _ = source.end_of_stream();
    let ended = watch(&film);
    let stats: gst::Structure = end::<gst::Element>(&film, "encoder")?.property("stats");
    println!("stats {stats}");
    pool.set_active(false)?;
    drop(pool);
    memory::mark(options.memory)?;
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

/// Makes the DMA-BUFs and a pool that gives them out in turn.
fn start_pool(memory: Memory, info: &gst_video::VideoInfo) -> Outcome<DmaBufPool> {
    let memories = (0..BUFFERS)
        .map(|_| memory::make(memory, info.width(), info.height()))
        .collect::<Outcome<_>>()?;
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
