// SPDX-License-Identifier: MIT OR Apache-2.0

//! From the frame that is there to the buffer that leaves, and the same once more.
//!
//! What a frame costs is mostly cold code and cold memory (docs/performance.md). So what not every frame needs
//! is kept out of what every frame runs through, by `#[cold]` and `#[inline(never)]`.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_base::prelude::*;
use zerocopy_plugin_common::mark_damage;
use zerocopy_plugin_common::wait::Waiter;

use super::abilities::Use;
use super::caps::OutputMemory;
use super::cuda::{Copied, forget_import};
use super::dmabuf::{lend, pass_on};
use super::figures::WaitedBy;
use super::imp::{CAT, PipeWireZeroCopySrc, lock};
use super::output::{can_leave_in_place, copy_frame, draw, in_place, orientation};
use super::settings::LiveSettings;
use super::streaming::{Negotiated, Streaming};
use crate::capture::damage::Damage;
use crate::capture::dmabuf::Fence;
use crate::capture::frame::{Frame, Sync};
use crate::capture::meta::Transform;
use crate::capture::{Inbox, Monotonic, StreamFormat};
use crate::cuda::Error;

/// How far the last timestamp may lie ahead of the running time: a nanosecond for each buffer since the
/// clock has ticked.
const AHEAD: gst::ClockTime = gst::ClockTime::from_mseconds(1);

impl PipeWireZeroCopySrc {
    /// Gives a frame that nobody wants back to the producer.
    #[cold]
    pub(super) fn discard(&self, format: &StreamFormat) {
        let inbox = match &*lock(&self.streaming) {
            Some(streaming) => streaming.capture.inbox().clone(),
            None => return,
        };
        if inbox.take(format, |_| true).is_some() {
            inbox.miss();
            let figures = lock(&self.figures);
            figures.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The frame that is there as a buffer: in place where that can be, else copied, and PipeWire's
    /// buffer given back. None if a frame of another format has taken its place, or cannot leave.
    pub(super) fn take_frame(
        &self,
        format: &StreamFormat,
        settings: &LiveSettings,
        waiter: &mut Waiter,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let (inbox, negotiated, takes, latches) = {
            let mut streaming = lock(&self.streaming);
            let Some(streaming) = &mut *streaming else {
                return Err(gst::FlowError::Flushing);
            };
            let Some(negotiated) = streaming.negotiated.clone() else {
                return Ok(None);
            };
            (
                streaming.capture.inbox().clone(),
                negotiated,
                streaming.takes,
                streaming.latch.is_in_use(),
            )
        };
        let Negotiated { info, memory, .. } = &*negotiated;
        let memory = *memory;
        let mut single = false;
        let mut short = false;
        let mut take_in_place = |short: &mut bool| {
            inbox.take(format, |frame| {
                single = frame.is_in_single_buffer();
                let in_place = match memory {
                    OutputMemory::System => can_leave_in_place(frame, info, takes),
                    OutputMemory::DmaBuf => !single,
                    OutputMemory::Cuda => false,
                };
                let spared = in_place && frame.reserve();
                *short = in_place && !spared;
                spared
            })
        };
        let mut spared = take_in_place(&mut short);
        if short {
            // The one before may have the buffer that is missing. Else it stays until this one leaves.
            self.let_go_last();
            spared = take_in_place(&mut short);
        }
        let (frame, pooled) = match (spared, memory) {
            (Some(frame), _) => (frame, None),
            (None, OutputMemory::DmaBuf) if single => {
                let reason = "the producer has one buffer alone, and draws nothing while it is out";
                self.refuse(format, Use::PassOn, reason);
                return Ok(None);
            }
            (None, OutputMemory::DmaBuf) => {
                // Nothing else would do for downstream. The newest frame stays in the inbox.
                if let Some(streaming) = &mut *lock(&self.streaming) {
                    streaming.waits_for_buffer = true;
                }
                return Ok(None);
            }
            (None, OutputMemory::System | OutputMemory::Cuda) => {
                // The pool may make us wait: no frame is held meanwhile (L4).
                let Some(buffer) = self.pooled_buffer_of(&negotiated)? else {
                    return Ok(None);
                };
                match inbox.take(format, |_| true) {
                    Some(frame) => (frame, Some(buffer)),
                    None => return Ok(None),
                }
            }
        };
        if !latches {
            return self.finish(frame, pooled, &negotiated, settings, waiter);
        }
        self.look_at_sync(&frame, memory);
        let interval = Duration::from(Self::interval(Some(&negotiated)));
        let (leaves, of_no_use) = match &mut *lock(&self.streaming) {
            Some(streaming) => streaming.latch.exchange(frame, Instant::now(), interval),
            None => return Err(gst::FlowError::Flushing),
        };
        // One that is kept leaves with the next one, or when none comes.
        let Some(mut frame) = leaves else {
            return Ok(None);
        };
        if let Some(older) = of_no_use {
            frame.damage.add(older.damage);
            let figures = lock(&self.figures);
            figures.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.finish(frame, pooled, &negotiated, settings, waiter)
    }

    /// The frame that was kept, when no other has come in its time.
    #[inline(never)]
    pub(super) fn flush_latch(
        &self,
        settings: &LiveSettings,
        waiter: &mut Waiter,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let negotiated = match &*lock(&self.streaming) {
            Some(streaming) => streaming.negotiated.clone(),
            None => return Err(gst::FlowError::Flushing),
        };
        let pooled = match &negotiated {
            Some(negotiated) => self.pooled_buffer_of(negotiated)?,
            None => None,
        };
        let (inbox, kept) = match &mut *lock(&self.streaming) {
            Some(streaming) => (streaming.capture.inbox().clone(), streaming.latch.take()),
            None => return Err(gst::FlowError::Flushing),
        };
        match (kept, negotiated, pooled) {
            (Some(frame), Some(negotiated), Some(pooled)) => {
                self.finish(frame, Some(pooled), &negotiated, settings, waiter)
            }
            (Some(frame), ..) => {
                inbox.put_back(frame);
                Ok(None)
            }
            (None, ..) => Ok(None),
        }
    }

    /// Gives the memory of the last picture back. There is none to be resent until the next one leaves.
    #[cold]
    fn let_go_last(&self) {
        let last = lock(&self.streaming)
            .as_mut()
            .and_then(|streaming| streaming.last.take());
        // Here, where nothing is locked.
        drop(last);
    }

    /// Lets another attempt find the newest picture, which did not leave as was agreed or was not waited
    /// for to the end: this one, or the one that is kept after it.
    #[cold]
    fn hand_back(&self, inbox: &Inbox, frame: Box<Frame>) {
        let kept = lock(&self.streaming)
            .as_mut()
            .and_then(|streaming| streaming.latch.take());
        if let Some(kept) = kept {
            inbox.put_back(kept);
        }
        inbox.put_back(frame);
    }

    /// Looks whether frames must be kept because nothing says when they are drawn. Tells when that
    /// changes: it is a frame's time of latency.
    #[inline(never)]
    fn look_at_sync(&self, frame: &Frame, memory: OutputMemory) {
        let sync = match frame.dmabuf() {
            _ if frame.has_acquire_point() => Sync::Explicit,
            Some(_) => Sync::Implicit,
            None => Sync::None,
        };
        let mut changed = false;
        if let Some(streaming) = &mut *lock(&self.streaming) {
            let latching = streaming.latch.is_needed(sync, memory);
            changed = streaming.latch.active != latching;
            streaming.latch.active = latching;
        }
        if changed {
            let message = gst::message::Latency::builder().src(&*self.obj()).build();
            // Fails only while the element is being disposed of.
            let _ = self.obj().post_message(message);
        }
    }

    /// A frame as a buffer, and all that is to be remembered of it.
    fn finish(
        &self,
        mut frame: Box<Frame>,
        pooled: Option<gst::Buffer>,
        negotiated: &Negotiated,
        settings: &LiveSettings,
        waiter: &mut Waiter,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let (inbox, takes, turned, latching, without_fences, without_cuda) =
            match &*lock(&self.streaming) {
                Some(streaming) => (
                    streaming.capture.inbox().clone(),
                    streaming.takes,
                    streaming.transform,
                    streaming.latch.active,
                    streaming.latch.without_fences,
                    streaming.has_given_up_cuda(),
                ),
                None => return Err(gst::FlowError::Flushing),
            };
        if without_cuda {
            forget_import(&frame);
        }
        let Negotiated {
            source: format,
            info,
            memory,
        } = negotiated;
        let memory = *memory;
        let for_gpu = memory == OutputMemory::Cuda;
        let (sync, fence) = match frame.fence(for_gpu) {
            Ok((Sync::Implicit, fence)) if without_fences => (Sync::None, fence),
            Ok(known) => known,
            Err(error) => {
                gst::warning!(CAT, imp = self, "a frame is taken as it is: {error}");
                (Sync::None, Fence::default())
            }
        };
        // Where the GPU copies it, it may be the GPU that waits.
        let mut by = WaitedBy::Nobody;
        if !for_gpu && fence.pending().is_some() {
            by = WaitedBy::Thread;
            match self.wait_for(&fence, waiter) {
                Ok(true) => {}
                Ok(false) => return Ok(self.corrupted(&inbox)),
                Err(stopped) => {
                    self.hand_back(&inbox, frame);
                    return Err(stopped);
                }
            }
        }
        let (captured, transform) = (frame.captured, frame.transform);
        let damage = std::mem::replace(&mut frame.damage, Damage::Everything);
        let copied = pooled.is_some() && memory == OutputMemory::System;
        let picture = match (pooled, memory) {
            (None, OutputMemory::DmaBuf) => match pass_on(&frame, info, takes) {
                Ok(mut picture) => {
                    lend(&mut picture, frame.into_lease());
                    Some(picture)
                }
                Err(reason) => {
                    self.refuse(format, Use::PassOn, &reason);
                    self.hand_back(&inbox, frame);
                    return Ok(None);
                }
            },
            (None, OutputMemory::System | OutputMemory::Cuda) => in_place(frame, info),
            (Some(mut buffer), _) => {
                let copied = if for_gpu {
                    self.copy_to_cuda(&frame, fence, &mut buffer, negotiated, waiter)
                } else {
                    self.copy(&frame, &mut buffer, info, format, by)
                };
                match copied {
                    Ok(Copied::Done(who)) => by = who,
                    Ok(Copied::Corrupted) => return Ok(self.corrupted(&inbox)),
                    Ok(Copied::Not) => {
                        self.hand_back(&inbox, frame);
                        return Ok(None);
                    }
                    Err(stopped) => {
                        self.hand_back(&inbox, frame);
                        return Err(stopped);
                    }
                }
                Some(buffer)
            }
        };
        let Some(picture) = picture else {
            return self.does_not_fit(info);
        };
        if transform != turned {
            self.turn(transform);
        }
        let (buffer, drawn_on) = self.leave(picture, damage, captured, settings)?;
        let now = Instant::now();
        {
            let mut figures = lock(&self.figures);
            figures.add_transfer(copied);
            if drawn_on {
                figures.add_transfer(true);
            }
            figures.memory = Some(memory);
            figures.sync = sync;
            figures.waited = by;
            figures.latched = latching;
            figures.add_frame(info.size(), Monotonic::now().since(captured));
        }
        let mut announce = None;
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.frame_seen = true;
            streaming.waiting_since = None;
            streaming.schedule.frame_left(now, settings.min_interval());
            if streaming.announced.is_some() && streaming.vanished {
                announce = Some(("returned", None));
            } else if streaming.announced != Some(memory) {
                announce = Some(("streaming", streaming.fallback.clone()));
            }
            streaming.announced = Some(memory);
            streaming.vanished = false;
        }
        if let Some((state, reason)) = announce {
            if state == "returned" {
                lock(&self.figures).reconnects += 1;
            }
            self.announce(state, reason.as_deref());
        }
        gst::trace!(CAT, imp = self, "frame {:?}", buffer.pts());
        Ok(Some(buffer))
    }

    /// Nothing leaves: what draws the frame has not ended in time, or its memory is gone.
    #[cold]
    fn corrupted(&self, inbox: &Inbox) -> Option<gst::Buffer> {
        inbox.miss();
        let figures = lock(&self.figures);
        figures.counters.corrupted.fetch_add(1, Ordering::Relaxed);
        None
    }

    /// Copies a frame, for which `waited` have waited, into a buffer. Where it cannot be read, no such frame
    /// will be again.
    #[inline(never)]
    fn copy(
        &self,
        frame: &Frame,
        buffer: &mut gst::Buffer,
        info: &gst_video::VideoInfo,
        format: &StreamFormat,
        waited: WaitedBy,
    ) -> Result<Copied, gst::FlowError> {
        match copy_frame(frame, buffer, info) {
            Ok(true) => return Ok(Copied::Done(waited)),
            Ok(false) => {}
            Err(_) => return self.does_not_fit(info),
        }
        if frame.dmabuf().is_none() {
            gst::debug!(CAT, imp = self, "the producer has shrunk a frame's memory");
            return Ok(Copied::Corrupted);
        }
        match self.read_by_gpu(frame, buffer, info) {
            Ok(()) => Ok(Copied::Done(waited)),
            Err(reason) => {
                self.refuse(format, Use::Read, &reason);
                Ok(Copied::Not)
            }
        }
    }

    #[cold]
    fn does_not_fit<T>(&self, info: &gst_video::VideoInfo) -> Result<T, gst::FlowError> {
        self.fail(gst::error_msg!(
            gst::StreamError::Failed,
            [
                "a frame of {}x{} does not fit a buffer",
                info.width(),
                info.height()
            ]
        ))
    }

    /// The last frame once more, with the pointer where it is now: the same memory, a new timestamp.
    #[inline(never)]
    pub(super) fn resend(
        &self,
        settings: &LiveSettings,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let (last, moved) = {
            let mut streaming = lock(&self.streaming);
            let Some(streaming) = streaming.as_mut() else {
                return Err(gst::FlowError::Flushing);
            };
            let Some(last) = streaming.last.clone() else {
                return Ok(None);
            };
            let moved = streaming.pointer_has_moved();
            let (now, interval) = (Instant::now(), settings.min_interval());
            if moved {
                streaming.schedule.frame_left(now, interval);
            } else {
                let period = settings.keepalive().unwrap_or_default();
                streaming.schedule.keepalive_left(now, period, interval);
            }
            (last, moved)
        };
        let unchanged = Damage::Rects(Vec::new());
        let (buffer, drawn_on) = self.leave(last, unchanged, Monotonic::now(), settings)?;
        let mut figures = lock(&self.figures);
        if drawn_on {
            figures.add_transfer(true);
        }
        if moved {
            figures.add_pointer(buffer.size());
        } else {
            figures.add_keepalive(buffer.size());
        }
        drop(figures);
        gst::trace!(CAT, imp = self, "resent {:?}", buffer.pts());
        Ok(Some(buffer))
    }

    /// A picture as it leaves: with the pointer, a timestamp, and what has changed; and whether it had
    /// to be copied for the pointer. It is kept where it may have to be resent.
    fn leave(
        &self,
        mut picture: gst::Buffer,
        mut damage: Damage,
        captured: Monotonic,
        settings: &LiveSettings,
    ) -> Result<(gst::Buffer, bool), gst::FlowError> {
        let (overlay, negotiated, takes, before) = {
            let mut streaming = lock(&self.streaming);
            let Some(Streaming {
                capture,
                pointer,
                negotiated: Some(negotiated),
                takes,
                last,
                ..
            }) = streaming.as_mut()
            else {
                return Err(gst::FlowError::Flushing);
            };
            if let Some(cursor) = capture.inbox().take_cursor() {
                pointer.update(cursor);
            }
            let info = &negotiated.info;
            damage.add(Damage::Rects(pointer.leaves(info.width(), info.height())));
            let is_last = |last: &gst::Buffer| last.as_ptr() == picture.as_ptr();
            let keep = settings.keepalive_time > 0
                || settings.resend_last
                || pointer.is_known()
                || last.as_ref().is_some_and(is_last);
            let before = std::mem::replace(last, keep.then(|| picture.clone()));
            let overlay = pointer.overlay().cloned();
            (overlay, negotiated.clone(), *takes, before)
        };
        // Here, where nothing is locked: it has a successor that leaves.
        drop(before);
        let info = &negotiated.info;
        // Nobody draws into a producer's DMA-BUFs, and not with the processor on a GPU.
        let draws = !takes.overlays && negotiated.memory == OutputMemory::System;
        let drawn_on = draws && overlay.is_some();
        let mut buffer;
        if let Some(overlay) = overlay.as_ref().filter(|_| draws) {
            buffer = self.pooled_buffer()?;
            if let Err(error) = draw(&picture, overlay, &mut buffer, info) {
                return self.fail(gst::error_msg!(
                    gst::StreamError::Failed,
                    ["drawing the pointer into the picture failed: {error}"]
                ));
            }
        } else {
            if picture.get_mut().is_some() {
                buffer = picture;
            } else {
                // It is kept, as it is.
                buffer = picture.copy();
                if let Some(buffer) = buffer.get_mut() {
                    // So that a pool does not reuse the memory while downstream has this buffer.
                    gst::ParentBufferMeta::add(buffer, &picture);
                }
            }
            let overlay = overlay.as_ref().filter(|_| takes.overlays);
            if let (Some(overlay), Some(buffer)) = (overlay, buffer.get_mut()) {
                gst_video::VideoOverlayCompositionMeta::add(buffer, overlay);
            }
        }
        // A frame that may have changed everywhere says nothing.
        if let (Damage::Rects(rects), Some(buffer)) = (&damage, buffer.get_mut()) {
            let rects = rects.iter().map(|rect| {
                let start = [rect.x, rect.y].map(|n| n.max(0).unsigned_abs());
                [start[0], start[1], rect.width, rect.height]
            });
            mark_damage(buffer, rects);
        }
        self.stamp(&mut buffer, captured);
        Ok((buffer, drawn_on))
    }

    /// A buffer of the pool that was negotiated with downstream; waits for one.
    #[inline(never)]
    fn pooled_buffer(&self) -> Result<gst::Buffer, gst::FlowError> {
        let pool = self.obj().buffer_pool();
        pool.ok_or(gst::FlowError::NotNegotiated)?
            .acquire_buffer(None)
    }

    /// The same for a new frame. The last picture makes room where there is no other buffer. None where the
    /// GPU has no memory left, and other memory is to be agreed on.
    #[inline(never)]
    fn pooled_buffer_of(
        &self,
        negotiated: &Negotiated,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let pool = self.obj().buffer_pool();
        let pool = pool.ok_or(gst::FlowError::NotNegotiated)?;
        let at_once =
            gst::BufferPoolAcquireParams::with_flags(gst::BufferPoolAcquireFlags::DONTWAIT);
        match pool.acquire_buffer(Some(&at_once)) {
            Ok(buffer) => return Ok(Some(buffer)),
            Err(gst::FlowError::Flushing) => return Err(gst::FlowError::Flushing),
            Err(_) => self.let_go_last(),
        }
        match pool.acquire_buffer(None) {
            Err(gst::FlowError::Error) if negotiated.memory == OutputMemory::Cuda => {
                let info = &negotiated.info;
                let error = Error::Exhausted(format!(
                    "no CUDA memory can be had for one more picture of {}x{}",
                    info.width(),
                    info.height()
                ));
                self.give_up_cuda(&negotiated.source, &error)?;
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    /// Says downstream how the frames from now on are turned.
    #[cold]
    fn turn(&self, transform: Transform) {
        if let Some(streaming) = &mut *lock(&self.streaming) {
            streaming.transform = transform;
        }
        let mut tags = gst::TagList::new();
        if let Some(tags) = tags.get_mut() {
            let orientation = orientation(transform);
            tags.set_scope(gst::TagScope::Stream);
            tags.add::<gst::tags::ImageOrientation>(&orientation, gst::TagMergeMode::Replace);
        }
        gst::info!(CAT, imp = self, "tags {tags}");
        // The base class sends it before the next buffer, and after the segment.
        self.parent_send_event(gst::event::Tag::new(tags));
    }

    /// Sets the running time at which the buffer was captured, later than that of the one before.
    fn stamp(&self, buffer: &mut gst::Buffer, captured: Monotonic) {
        let obj = self.obj();
        let now = obj
            .clock()
            .zip(obj.base_time())
            .map(|(clock, base)| clock.time().saturating_sub(base));
        let age = gst::ClockTime::try_from(Monotonic::now().since(captured));
        let mut pts = now.map(|now| now.saturating_sub(age.unwrap_or_default()));
        if let Some(streaming) = &mut *lock(&self.streaming) {
            // One that lies ahead is from before a flush that has let the running time start again.
            let before = streaming
                .last_pts
                .filter(|last| now.is_none_or(|now| last.saturating_sub(now) < AHEAD));
            // A capture time before a keepalive's is moved behind it.
            let least = before.map(|last| last + gst::ClockTime::from_nseconds(1));
            pts = pts.max(least);
            streaming.last_pts = pts;
        }
        if let Some(buffer) = buffer.get_mut() {
            buffer.set_pts(pts);
            buffer.set_dts(gst::ClockTime::NONE);
        }
    }
}

#[cfg(test)]
mod tests;
