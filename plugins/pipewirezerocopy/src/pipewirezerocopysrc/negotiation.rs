// SPDX-License-Identifier: MIT OR Apache-2.0

//! Agreeing with downstream and with the producer on what leaves, and in which memory.

use std::sync::Arc;

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;

use super::abilities::{Abilities, Use};
use super::caps::{self, OutputMemory};
use super::dmabuf::describe;
use super::gpu::{Asked, Downstream, Gpu};
use super::imp::{CAT, PipeWireZeroCopySrc, lock};
use super::offers;
use super::output::Takes;
use super::settings::{Settings, Wanted};
use super::streaming::Negotiated;
use crate::capture::timeline::SyncNode;
use crate::cuda;
use crate::egl::Display;

/// The caps of what can leave, with the settings for which that was found.
#[derive(Clone, Debug)]
pub(super) struct Possible {
    node: Option<String>,
    cuda_device: Option<u32>,
    /// The device of the context that the element was given.
    given: Option<u32>,
    wanted: Wanted,
    caps: gst::Caps,
}

impl Possible {
    fn is_for(&self, settings: &Settings, given: Option<u32>, wanted: Wanted) -> bool {
        self.node == settings.render_node
            && self.cuda_device == settings.cuda_device()
            && self.given == given
            && self.wanted == wanted
    }
}

impl PipeWireZeroCopySrc {
    /// What can leave on this machine, the display of the GPU that has to do with it, and the number of
    /// the CUDA device which that is, if it is one. An error where nothing of what is wanted can.
    pub(super) fn look_for_gpu(
        &self,
        settings: &Settings,
        downstream: Downstream,
    ) -> Result<(Abilities, Option<Display>, Option<u32>), gst::ErrorMessage> {
        let unusable = |text: String| gst::error_msg!(gst::ResourceError::Settings, ["{text}"]);
        let wanted = settings.wanted().map_err(unusable)?;
        let mut can = Abilities {
            system: wanted.system,
            dmabuf: wanted.dmabuf,
            cuda: wanted.cuda,
            ..Abilities::default()
        };
        // Of several GPUs CUDA's own is the right one where nothing else will do.
        let no_other = wanted.nothing_but_cuda();
        let without_cuda = |reason: &dyn std::fmt::Display| {
            gst::error_msg!(
                gst::ResourceError::NotFound,
                ["output-mode=cuda cannot be had here: {reason} (output-mode=auto does without)"]
            )
        };
        if no_other {
            // What is missing is said before what a GPU might lack.
            cuda::available().map_err(|error| without_cuda(&error))?;
        }
        let has_cuda = wanted.cuda && cuda::available().is_ok();
        let node = settings.render_node.as_deref();
        let named = settings.cuda_device();
        let asked = has_cuda.then(|| Asked::for_node(node, named, downstream.device));
        let asked = asked.flatten();
        let cuda_first = no_other || asked.is_some() || (has_cuda && downstream.only_cuda);
        let found = if cuda_first {
            let suiting = Gpu::find(node, |gpu| gpu.cuda_device(asked).map(drop));
            let or_none = |reason| match node {
                // A GPU without a DRM node, as in a container that was given no more than CUDA.
                None if has_cuda => Gpu::of_cuda_device(asked.map_or(0, |asked| asked.device))
                    .map_err(|without| format!("{reason}; {without}")),
                _ => Err(reason),
            };
            match suiting.or_else(or_none) {
                Err(reason) if !no_other => match Gpu::find(node, |_| Ok(())) {
                    Ok(_) if asked.is_some_and(|asked| asked.by_name) && node.is_some() => {
                        return Err(unusable(reason));
                    }
                    other => other,
                },
                found => found,
            }
        } else {
            Gpu::find(node, |_| Ok(()))
        };
        match found {
            Ok(gpu) => {
                let name = gpu.display.node().display();
                gst::info!(CAT, imp = self, "DMA-BUFs as {name} imports them");
                let device = wanted.cuda.then(|| gpu.cuda_device(asked));
                if let Some(Err(reason)) = &device {
                    gst::info!(CAT, imp = self, "no CUDA memory leaves here: {reason}");
                    can.cuda = false;
                }
                can.gpu = Some(gpu.importable);
                Ok((can, Some(gpu.display), device.and_then(Result::ok)))
            }
            Err(reason) if no_other => Err(without_cuda(&reason)),
            Err(reason) if !wanted.system => Err(gst::error_msg!(
                gst::ResourceError::NotFound,
                [
                    "DMA-BUFs need a GPU to say what can be imported, and there is none: {reason} \
                  (output-mode=system does without)"
                ]
            )),
            Err(reason) => {
                gst::info!(CAT, imp = self, "no DMA-BUFs leave here: {reason}");
                Ok((can, None, None))
            }
        }
    }

    /// Where timelines are waited for: on the GPU's own node.
    pub(super) fn timelines(&self, display: &Display) -> Option<Arc<SyncNode>> {
        SyncNode::open(display.node())
            .inspect_err(|reason| gst::info!(CAT, imp = self, "no explicit sync: {reason}"))
            .ok()
    }

    /// The caps of what can leave: nothing that the GPU's driver does not know. The machine is looked at once
    /// for the same settings, until the next start.
    pub(super) fn possible_caps(&self) -> gst::Caps {
        if let Some(streaming) = &*lock(&self.streaming) {
            return streaming.can.caps();
        }
        let settings = lock(&self.settings).clone();
        // What is wrong with the settings is an error at the start.
        let Ok(wanted) = settings.wanted() else {
            return caps::somewhere(Wanted::ALL);
        };
        // Nobody is asked for a context here: who asks for caps may not want to be asked.
        let has_cuda = wanted.cuda && cuda::available().is_ok();
        let given = has_cuda.then(|| cuda::given_to(self.obj().upcast_ref()));
        let given = given.flatten().map(|context| context.device());
        let known = lock(&self.possible).clone();
        if let Some(known) = known.filter(|known| known.is_for(&settings, given, wanted)) {
            return known.caps;
        }
        let look = |only_cuda| {
            let device = given;
            self.look_for_gpu(&settings, Downstream { device, only_cuda })
        };
        // So is what cannot be had at all: of a link that fails nobody learns why. Other memory is not
        // promised for it.
        let caps = look(false).map_or_else(
            |_| caps::somewhere(wanted),
            |(can, ..)| {
                let mut caps = gst::Caps::new_empty();
                // Another GPU is chosen at the start if downstream takes nothing else.
                if has_cuda
                    && !can.cuda
                    && let Ok((other, ..)) = look(true)
                {
                    caps.merge(other.cuda_caps());
                }
                caps.merge(can.caps());
                caps
            },
        );
        *lock(&self.possible) = Some(Possible {
            node: settings.render_node.clone(),
            cuda_device: settings.cuda_device(),
            given,
            wanted,
            caps: caps.clone(),
        });
        caps
    }

    /// Tells PipeWire what downstream takes and, once the producer has fixed a format, sets caps. The
    /// error says why that cannot be.
    pub(super) fn agree(&self) -> Result<(), String> {
        // Each round but the last does without one more kind of DMA-BUFs.
        loop {
            let pad = self.obj().src_pad().clone();
            // Not with a filter: elements answer in the filter's order, not in that of their own
            // preference.
            let taken = pad.peer_query_caps(None);
            let (can, wanted, allowed, offered_anew) = {
                let mut streaming = lock(&self.streaming);
                let Some(streaming) = &mut *streaming else {
                    return Err("it is not started".into());
                };
                let can = streaming.can.clone();
                let allowed = taken.intersect_with_mode(&can.caps(), gst::CapsIntersectMode::First);
                let offer = offers::offer(&allowed, &can);
                if offer.0.is_empty() {
                    return Err(format!(
                        "downstream takes {taken}, and what can leave here is {}",
                        can.caps()
                    ));
                }
                let anew = streaming.offer != offer;
                if anew {
                    streaming.capture.offer(offer.clone());
                    streaming.offer = offer;
                }
                let stale = streaming.stale.as_ref();
                if stale.is_some_and(|stale| caps::caps_for(stale, &allowed, &can).is_some()) {
                    // Downstream has changed its mind back.
                    streaming.stale = None;
                }
                (can, streaming.wanted, allowed, anew)
            };
            let Some(wanted) = wanted else {
                // Caps come with the first frame.
                return Ok(());
            };
            let Some(caps) = caps::caps_for(&wanted, &allowed, &can) else {
                if offered_anew {
                    gst::debug!(CAT, imp = self, "waiting for the producer to change format");
                    self.forget_format();
                    return Ok(());
                }
                return Err(format!(
                    "downstream does not take what the producer gives: {} of {}x{} pixels{} \
                     (videoconvert or videoscale help)",
                    wanted.format.name(),
                    wanted.width,
                    wanted.height,
                    match wanted.modifier {
                        Some(modifier) => format!(", {}", describe(wanted.format, modifier)),
                        None => " in system memory".into(),
                    }
                ));
            };
            gst::info!(CAT, imp = self, "caps {caps}");
            let (memory, info) =
                caps::video_info(&caps).ok_or_else(|| format!("{caps} are no video"))?;
            if memory == OutputMemory::Cuda
                && let Err(error) = self.prepare_cuda(&caps, &info)
            {
                self.do_without_cuda(&wanted, &error);
                continue;
            }
            let what = match memory {
                OutputMemory::System => None,
                OutputMemory::DmaBuf => Some(Use::PassOn),
                OutputMemory::Cuda => Some(Use::Cuda),
            };
            // Downstream is called: no lock is held.
            let taken = match what {
                // Nothing is left to fall back on.
                None => self.obj().set_caps(&caps).is_ok(),
                Some(_) => give(&pad, &caps),
            };
            if !taken {
                if let Some(what) = what.filter(|_| !self.is_flushing()) {
                    self.refuse(&wanted, what, &format!("downstream refused {caps}"));
                    continue;
                }
                return Err(format!("downstream refused {caps}"));
            }
            self.agreed(&Arc::new(Negotiated {
                source: wanted,
                info,
                memory,
            }));
            return Ok(());
        }
    }

    fn agreed(&self, negotiated: &Arc<Negotiated>) {
        let mut changed = false;
        let mut kept = None;
        if let Some(streaming) = &mut *lock(&self.streaming) {
            let before = streaming.negotiated.replace(negotiated.clone());
            streaming.stale = None;
            changed = before.is_none_or(|before| {
                before.source != negotiated.source
                    || before.info.format() != negotiated.info.format()
                    || before.memory != negotiated.memory
            });
            if changed {
                // It has the old format.
                streaming.last = None;
                let inbox = streaming.capture.inbox().clone();
                kept = streaming.latch.take().map(|frame| (frame, inbox));
            }
        }
        if let Some((frame, inbox)) = kept {
            // The producer has not changed what it gives, or the frame would have left: it leaves as is
            // agreed now.
            inbox.put_back(frame);
        }
        if changed {
            let message = gst::message::Latency::builder().src(&*self.obj()).build();
            // Fails only while the element is being disposed of.
            let _ = self.obj().post_message(message);
        }
    }

    /// Takes downstream's pool if it will do, else one of our own, both with as much freedom of
    /// layout as downstream allows. DMA-BUFs are the producer's.
    pub(super) fn decide(
        &self,
        query: &mut gst::query::Allocation,
    ) -> Result<(), gst::LoggableError> {
        let Some(caps) = query.get_owned().0 else {
            // Nothing is negotiated before the first frame, and nothing allocated.
            remove_pools(query);
            return Ok(());
        };
        let (memory, info) = caps::video_info(&caps)
            .ok_or_else(|| gst::loggable_error!(CAT, "{caps} are no video"))?;
        let takes = Takes {
            video_meta: query
                .find_allocation_meta::<gst_video::VideoMeta>()
                .is_some(),
            overlays: query
                .find_allocation_meta::<gst_video::VideoOverlayCompositionMeta>()
                .is_some(),
            crop: query
                .find_allocation_meta::<gst_video::VideoCropMeta>()
                .is_some(),
        };
        let agreed = lock(&self.streaming).as_mut().is_some_and(|streaming| {
            streaming.takes = takes;
            streaming.negotiated.is_some()
        });
        // While another format is waited for, the caps are those of the one before, for which nothing is
        // ready any more.
        if memory == OutputMemory::DmaBuf || !agreed {
            remove_pools(query);
            return Ok(());
        }
        if memory == OutputMemory::Cuda {
            return self.decide_cuda(query, &caps);
        }
        let size = u32::try_from(info.size())
            .map_err(|_| gst::loggable_error!(CAT, "frames over 4 GiB"))?;
        let configure = |pool: &gst::BufferPool, size: u32, min: u32, max: u32| {
            let mut config = pool.config();
            config.set_params(Some(&caps), size, min, max);
            if takes.video_meta {
                config.add_option(gst_video::BUFFER_POOL_OPTION_VIDEO_META);
            }
            pool.set_config(config).is_ok()
        };
        let proposed = query.allocation_pools().next();
        let chosen = proposed.and_then(|(pool, proposed_size, min, max)| {
            let size = size.max(proposed_size);
            // One is kept for keepalives, one is being filled, one is downstream.
            let enough = max == 0 || max >= min + 2;
            let pool = pool.filter(|pool| enough && configure(pool, size, min, max))?;
            has_memory(&pool).then_some((pool, size, min, max))
        });
        let (pool, size, min, max) = if let Some(chosen) = chosen {
            chosen
        } else {
            let pool = gst_video::VideoBufferPool::new().upcast();
            // None before one is needed: most frames leave in the producer's memory.
            if !configure(&pool, size, 0, 0) {
                return Err(gst::loggable_error!(CAT, "no buffer pool for {caps}"));
            }
            (pool, size, 0, 0)
        };
        if query.allocation_pools().next().is_some() {
            query.set_nth_allocation_pool(0, Some(&pool), size, min, max);
        } else {
            query.add_allocation_pool(Some(&pool), size, min, max);
        }
        Ok(())
    }
}

fn remove_pools(query: &mut gst::query::Allocation) {
    while query.allocation_pools().next().is_some() {
        query.remove_nth_allocation_pool(0);
    }
}

/// Whether a pool that downstream proposes has all the buffers that it must begin with. The base class would
/// take one that has not for the end of the stream, without a word.
pub(super) fn has_memory(pool: &gst::BufferPool) -> bool {
    let active = pool.set_active(true).is_ok();
    if !active {
        gst::info!(CAT, "downstream's {} cannot be made active", pool.name());
    }
    active
}

/// Sends caps, where downstream has not got them yet. False where it refuses them.
///
/// Asked first: the question passes a queue at once, the caps only when what is before them has left.
/// Sending alone does not tell either: it succeeds also where the peer refuses, because GStreamer keeps
/// the caps for later, and the next buffer fails.
fn give(pad: &gst::Pad, caps: &gst::Caps) -> bool {
    if !pad.peer_query_accept_caps(caps) {
        return false;
    }
    // One that was linked since the caps were sent has none, or those of its last link.
    let has = |peer: &gst::Pad| peer.current_caps().is_some_and(|had| had == *caps);
    let before = pad.peer();
    if pad.current_caps().is_some_and(|sent| sent == *caps) && before.as_ref().is_none_or(has) {
        return true;
    }
    let sent = pad.push_event(gst::event::Caps::new(caps));
    match before {
        // A peer that is gone has refused nothing, and the next one is asked for itself.
        Some(peer) if pad.peer().as_ref() == Some(&peer) => sent && has(&peer),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    fn dmabufs(width: u32) -> gst::Caps {
        gst::init().unwrap();
        let text = format!("video/x-raw(memory:DMABuf),format=BGRx,width={width},height=8");
        gst::Caps::from_str(&text).unwrap()
    }

    /// The pad of a source that has begun.
    fn source() -> gst::Pad {
        gst::init().unwrap();
        let pad = gst::Pad::new(gst::PadDirection::Src);
        pad.set_active(true).unwrap();
        pad
    }

    fn link(source: &gst::Pad, sink: &gst::Pad) {
        sink.set_active(true).unwrap();
        // Pads without a template name the caps that they have for all that they can.
        source.link_full(sink, gst::PadLinkCheck::empty()).unwrap();
        source.push_event(gst::event::StreamStart::new("test"));
    }

    /// Answers whether it accepts caps, and does or does not when they come.
    fn answering(says: bool, does: bool) -> gst::Pad {
        gst::Pad::builder(gst::PadDirection::Sink)
            .query_function(move |pad, parent, query| {
                if let gst::QueryViewMut::AcceptCaps(query) = query.view_mut() {
                    query.set_result(says);
                    return true;
                }
                gst::Pad::query_default(pad, parent, query)
            })
            .event_function(move |_, _, event| does || event.type_() != gst::EventType::Caps)
            .build()
    }

    fn sink() -> gst::Pad {
        answering(true, true)
    }

    #[test]
    fn caps_arrive() {
        let (source, sink) = (source(), sink());
        link(&source, &sink);
        assert!(give(&source, &dmabufs(1)));
        assert_eq!(sink.current_caps(), Some(dmabufs(1)));
    }

    #[test]
    fn a_peer_that_was_linked_since_has_refused_nothing() {
        let (source, first, second) = (source(), sink(), sink());
        link(&source, &first);
        assert!(give(&source, &dmabufs(1)));
        source.unlink(&first).unwrap();
        assert!(give(&source, &dmabufs(1)), "nobody has refused");
        link(&source, &second);
        assert!(give(&source, &dmabufs(1)));
        assert_eq!(second.current_caps(), Some(dmabufs(1)));
        // With other caps in between, the first one has old ones.
        assert!(give(&source, &dmabufs(2)));
        source.unlink(&second).unwrap();
        link(&source, &first);
        assert!(give(&source, &dmabufs(2)));
        assert_eq!(first.current_caps(), Some(dmabufs(2)));
    }

    #[test]
    fn a_refusal_is_seen_whether_it_is_announced_or_not() {
        for says in [false, true] {
            let (source, sink) = (source(), answering(says, false));
            link(&source, &sink);
            assert!(!give(&source, &dmabufs(1)), "says: {says}");
        }
    }

    #[test]
    fn a_refusal_behind_a_queue_is_seen() {
        let (source, takes, refuses) = (source(), sink(), answering(false, false));
        let queue = gst::ElementFactory::make("queue").build().unwrap();
        queue.set_state(gst::State::Playing).unwrap();
        let behind = queue.static_pad("src").unwrap();
        link(&behind, &takes);
        link(&source, &queue.static_pad("sink").unwrap());
        assert!(give(&source, &dmabufs(1)));
        behind.unlink(&takes).unwrap();
        link(&behind, &refuses);
        // The queue has them.
        assert!(!give(&source, &dmabufs(1)));
        queue.set_state(gst::State::Null).unwrap();
    }
}
