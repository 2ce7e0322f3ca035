// SPDX-License-Identifier: MIT OR Apache-2.0

//! Frames that leave in CUDA memory: on which device, in whose context, from which pool, and what is
//! done when it does not work.

use std::sync::Arc;

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;

use super::abilities::Use;
use super::dmabuf::with_dmabuf;
use super::gpu::Gpu;
use super::imp::{CAT, PipeWireZeroCopySrc, lock};
use super::streaming::Streaming;
use crate::capture::StreamFormat;
use crate::capture::dmabuf::Plane;
use crate::capture::frame::Frame;
use crate::cuda::{self, Error, Importer, Pool, Source, Stream, Way};

/// What copies frames, from the first time that CUDA memory is negotiated on.
pub(super) struct CudaOutput {
    /// Taken out while it works: nothing is locked then.
    importer: Option<Importer>,
    /// A pool of our own for the caps that were negotiated last.
    pool: Pool,
    stream: Arc<Stream>,
    context: cuda::Context,
}

/// An import that is kept with its buffer.
struct Imported {
    source: Source,
    /// What was imported. A producer should not move a picture in its buffer, but can.
    planes: Vec<Plane>,
}

impl PipeWireZeroCopySrc {
    /// Whether CUDA can copy what this GPU imports. The error says what is missing.
    pub(super) fn has_cuda(&self, gpu: &Gpu) -> Result<(), String> {
        cuda::available().map_err(|error| error.to_string())?;
        // Whoever names a device is taken at their word.
        if lock(&self.settings).cuda_device().is_some() {
            return Ok(());
        }
        device_of(gpu).map(drop).map_err(|error| error.to_string())
    }

    /// Finds or makes the context that is shared with downstream, and what copies into it. Calls
    /// downstream and the application.
    pub(super) fn prepare_cuda(
        &self,
        caps: &gst::Caps,
        info: &gst_video::VideoInfo,
    ) -> Result<(), Error> {
        let display = lock(&self.streaming)
            .as_ref()
            .and_then(|streaming| streaming.display.clone())
            .ok_or_else(|| Error::Unavailable("there is no GPU".into()))?;
        let obj = self.obj();
        let pad = obj.src_pad();
        let by_driver = display.cuda_device();
        let own = || {
            let by_node = || cuda::of_node(display.node()).unwrap_or(0);
            by_driver.unwrap_or_else(by_node)
        };
        let context = cuda::ensure(obj.upcast_ref(), pad.upcast_ref(), &self.cuda, own)?;
        let before = lock(&self.streaming)
            .as_mut()
            .and_then(|streaming| streaming.cuda.take())
            .filter(|cuda| cuda.context == context);
        let (importer, stream) = if let Some(CudaOutput {
            importer: Some(importer),
            stream,
            ..
        }) = before
        {
            (importer, stream)
        } else {
            gst::info!(CAT, imp = self, "CUDA device {}", context.device());
            let importer = Importer::new(display, &context, Way::Image)?;
            (importer, Arc::new(Stream::new(&context)?))
        };
        let size =
            u32::try_from(info.size()).map_err(|_| Error::Refused("frames over 4 GiB".into()))?;
        let pool = Pool::new(&context, &stream, caps, size)?;
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.cuda = Some(CudaOutput {
                importer: Some(importer),
                pool,
                stream,
                context,
            });
        }
        Ok(())
    }

    /// Takes downstream's pool if its context is ours, else our own.
    pub(super) fn decide_cuda(
        &self,
        query: &mut gst::query::Allocation,
        caps: &gst::Caps,
    ) -> Result<(), gst::LoggableError> {
        let prepared = match &*lock(&self.streaming) {
            Some(Streaming {
                cuda: Some(cuda), ..
            }) => Some((cuda.context.clone(), cuda.stream.clone(), cuda.pool.clone())),
            _ => None,
        };
        let (context, stream, own) =
            prepared.ok_or_else(|| gst::loggable_error!(CAT, "no CUDA context for {caps}"))?;
        let proposed = query.allocation_pools().next();
        let theirs = proposed.and_then(|(pool, size, min, max)| {
            // One is kept for keepalives, one is being filled, one is downstream.
            let enough = max == 0 || max >= min + 2;
            let size = size.max(own.size);
            let pool = pool.filter(|_| enough)?;
            let pool = Pool::of_downstream(pool, &context, &stream, caps, (size, min, max))?;
            Some((pool, min, max))
        });
        gst::debug!(
            CAT,
            imp = self,
            "{} pool of CUDA memory",
            if theirs.is_some() {
                "downstream's"
            } else {
                "our own"
            }
        );
        let (pool, min, max) = theirs.unwrap_or((own, 0, 0));
        if query.allocation_pools().next().is_some() {
            query.set_nth_allocation_pool(0, Some(&pool.pool), pool.size, min, max);
        } else {
            query.add_allocation_pool(Some(&pool.pool), pool.size, min, max);
        }
        Ok(())
    }

    /// Copies a frame into a buffer of the pool. When this returns, the producer may have its buffer
    /// back. False where it cannot be done with this frame; then it will not be tried again so.
    pub(super) fn copy_to_cuda(
        &self,
        frame: &Frame,
        buffer: &mut gst::Buffer,
        info: &gst_video::VideoInfo,
        format: &StreamFormat,
    ) -> Result<bool, gst::FlowError> {
        let importer = lock(&self.streaming)
            .as_mut()
            .and_then(|streaming| streaming.cuda.as_mut()?.importer.take());
        let Some(mut importer) = importer else {
            return Err(gst::FlowError::Flushing);
        };
        let copied = copy(&mut importer, frame, buffer, info, format);
        let way = importer.way();
        if let Some(Streaming {
            cuda: Some(cuda), ..
        }) = &mut *lock(&self.streaming)
        {
            cuda.importer = Some(importer);
        }
        match copied {
            Ok(()) => {
                lock(&self.figures).way = Some(way);
                Ok(true)
            }
            Err(error) => {
                self.give_up_cuda(format, &error);
                let can = lock(&self.streaming).as_ref().map(|s| s.can.caps());
                if can.is_some_and(|caps| caps.is_empty()) {
                    // Asked for by name, and nothing else may take its place.
                    return self.fail(gst::error_msg!(
                        gst::ResourceError::Failed,
                        ["frames cannot be copied into CUDA memory: {error}"]
                    ));
                }
                Ok(false)
            }
        }
    }

    /// Does without CUDA memory from now on: for this kind of DMA-BUFs, or for all where the GPU
    /// cannot go on.
    pub(super) fn give_up_cuda(&self, format: &StreamFormat, error: &Error) {
        if let Error::Refused(reason) = error {
            return self.refuse(format, Use::Cuda, reason);
        }
        let text = format!("no CUDA memory any more: {error}");
        gst::warning!(CAT, imp = self, "{text}");
        let cuda = lock(&self.streaming).as_mut().and_then(|streaming| {
            streaming.can.cuda = false;
            streaming.fallback = Some(text);
            streaming.cuda.take()
        });
        // Here, where nothing is locked.
        drop(cuda);
        self.obj().src_pad().mark_reconfigure();
    }
}

/// The CUDA device that draws what this GPU imports.
fn device_of(gpu: &Gpu) -> Result<u32, Error> {
    match gpu.display.cuda_device() {
        Some(device) => Ok(device),
        None => cuda::of_node(gpu.display.node()),
    }
}

fn copy(
    importer: &mut Importer,
    frame: &Frame,
    buffer: &mut gst::Buffer,
    info: &gst_video::VideoInfo,
    format: &StreamFormat,
) -> Result<(), Error> {
    let refused = |text: &str| Error::Refused(text.to_owned());
    let context = importer.context().clone();
    let picture = frame.dmabuf().ok_or_else(|| refused("no DMA-BUF"))?;
    let kept = &picture.buffer;
    let mut import = || {
        kept.keep(|| {
            let source = with_dmabuf(picture, format.format, |dmabuf| importer.prepare(dmabuf))?;
            Ok::<_, Error>(Imported {
                source,
                planes: picture.planes().to_vec(),
            })
        })
    };
    let mut known = import()?;
    if known.planes != picture.planes() || !known.source.is_of(&context) {
        kept.forget::<Imported>();
        known = import()?;
    }
    let buffer = buffer
        .get_mut()
        .ok_or_else(|| refused("the pool's buffer is in use"))?;
    importer.copy(&known.source, frame.layout.origin, buffer, info)
}
