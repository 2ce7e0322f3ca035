// SPDX-License-Identifier: MIT OR Apache-2.0

use std::io::Write;
use std::sync::Arc;

use super::*;
use crate::capture::tests::{
    frames_in_dmabufs, frames_in_memory, idle, lose_buffer, put_frame, tiled_and_cropped, undrawn,
};
use crate::capture::{Counters, Look};

/// An element that has agreed on frames of 2x2 pixels, of a producer that a test plays.
struct Setup {
    element: super::super::PipeWireZeroCopySrc,
    counters: Arc<Counters>,
    waiter: Waiter,
}

impl Setup {
    fn new(memory: OutputMemory) -> Self {
        gst::init().unwrap();
        let element: super::super::PipeWireZeroCopySrc = gst::glib::Object::new();
        let counters = Arc::new(Counters::default());
        let waiter = Waiter::new().unwrap();
        let capture = idle(waiter.waker(), &counters);
        let waits = Waiter::new().unwrap();
        let mut streaming = Streaming::new(
            capture,
            waits,
            "nobody".into(),
            super::super::abilities::Abilities::default(),
            None,
            None,
        );
        let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::Bgrx, 2, 2);
        streaming.negotiated = Some(Arc::new(Negotiated {
            source: frames_in_dmabufs(1, 1, &counters)[0].format,
            info: info.build().unwrap(),
            memory,
        }));
        let imp = element.imp();
        *lock(&imp.figures) = super::super::figures::Figures::new(counters.clone());
        *lock(&imp.streaming) = Some(streaming);
        Self {
            element,
            counters,
            waiter,
        }
    }

    fn with<T>(&self, look: impl FnOnce(&mut Streaming) -> T) -> T {
        look(lock(&self.element.imp().streaming).as_mut().unwrap())
    }

    fn put(&self, frame: Box<Frame>) {
        self.with(|streaming| put_frame(&streaming.capture, frame));
    }

    fn take(&mut self) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let format = self.with(|streaming| streaming.negotiated.clone().unwrap().source);
        let settings = LiveSettings::default();
        let imp = self.element.imp();
        imp.take_frame(&format, &settings, &mut self.waiter)
    }

    /// Whether a frame is there to be taken.
    fn has_frame(&self) -> bool {
        let inbox = self.with(|streaming| streaming.capture.inbox().clone());
        matches!(inbox.look(crate::capture::Interest::All), Look::Frame(_))
    }

    fn has_last(&self) -> bool {
        self.with(|streaming| streaming.last.is_some())
    }

    fn count(&self, counter: impl Fn(&Counters) -> &std::sync::atomic::AtomicU64) -> u64 {
        counter(&self.counters).load(Ordering::Relaxed)
    }
}

#[test]
fn a_frame_whose_wait_is_cut_short_leaves_once_it_is_drawn() {
    let mut setup = Setup::new(OutputMemory::DmaBuf);
    let mut frames = frames_in_dmabufs(2, 8, &setup.counters);
    setup.put(frames.remove(0));
    assert!(setup.take().unwrap().is_some());
    let (frame, mut drawn) = undrawn(frames.remove(0));
    setup.put(frame);
    setup.waiter.waker().cancel();
    assert_eq!(setup.take(), Err(gst::FlowError::Flushing));
    assert!(setup.has_last(), "the one before can be resent until then");
    setup.waiter.waker().reset();
    drawn.write_all(b"!").unwrap();
    assert!(setup.take().unwrap().is_some());
    assert_eq!(setup.count(|counters| &counters.dropped), 0);
}

#[test]
fn the_last_picture_stays_until_its_successor_leaves() {
    let mut setup = Setup::new(OutputMemory::DmaBuf);
    let mut frames = frames_in_dmabufs(3, 8, &setup.counters);
    setup.put(frames.remove(0));
    assert!(setup.take().unwrap().is_some());
    let (frame, _never) = undrawn(frames.remove(0));
    setup.put(frame);
    assert_eq!(setup.take(), Ok(None));
    assert_eq!(setup.count(|counters| &counters.corrupted), 1);
    assert!(setup.has_last(), "it is still what the screen shows");
    setup.put(frames.remove(0));
    assert!(setup.take().unwrap().is_some());
    assert_eq!(setup.count(|counters| &counters.held), 1, "the newest one");
}

#[test]
fn a_frame_that_cannot_be_passed_on_is_there_for_another_way() {
    let mut setup = Setup::new(OutputMemory::DmaBuf);
    let frame = frames_in_dmabufs(1, 8, &setup.counters).remove(0);
    setup.put(tiled_and_cropped(frame));
    assert_eq!(setup.take(), Ok(None));
    assert!(setup.has_frame());
}

#[test]
fn a_frame_that_no_gpu_reads_is_there_for_another_way() {
    let mut setup = Setup::new(OutputMemory::System);
    let frame = frames_in_dmabufs(1, 8, &setup.counters).remove(0);
    let negotiated = setup.with(|streaming| streaming.negotiated.clone().unwrap());
    let left = setup.element.imp().finish(
        tiled_and_cropped(frame),
        Some(gst::Buffer::with_size(16).unwrap()),
        &negotiated,
        &LiveSettings::default(),
        &mut setup.waiter,
    );
    assert_eq!(left, Ok(None));
    assert!(setup.has_frame());
}

#[test]
fn what_was_made_of_a_buffer_that_is_gone_ends_before_the_next_picture() {
    let mut setup = Setup::new(OutputMemory::DmaBuf);
    let import = Arc::new(());
    setup.with(|streaming| lose_buffer(&streaming.capture, import.clone()));
    assert_eq!(Arc::strong_count(&import), 2, "not with it");
    setup.put(frames_in_dmabufs(1, 8, &setup.counters).remove(0));
    let imp = setup.element.imp();
    assert!(imp.next_buffer(&mut setup.waiter).is_ok());
    assert_eq!(Arc::strong_count(&import), 1);
}

#[test]
fn the_last_picture_makes_room_where_its_buffer_is_the_one_that_is_missing() {
    // Of five, one alone may be out.
    let mut setup = Setup::new(OutputMemory::System);
    setup.with(|streaming| streaming.takes.video_meta = true);
    for frame in frames_in_memory(2, 5, &setup.counters) {
        setup.put(frame);
        assert!(setup.take().unwrap().is_some(), "in place");
        assert!(setup.has_last());
    }
}

#[test]
fn timestamps_rise_until_the_running_time_starts_again() {
    let setup = Setup::new(OutputMemory::System);
    let clock = gst::SystemClock::obtain();
    setup.element.set_clock(Some(&clock)).unwrap();
    let stamped = |base_time: gst::ClockTime, captured: Monotonic| {
        setup.element.set_base_time(base_time);
        let mut buffer = gst::Buffer::new();
        setup.element.imp().stamp(&mut buffer, captured);
        buffer.pts().unwrap()
    };
    let early = Monotonic::now();
    let first = stamped(gst::ClockTime::ZERO, Monotonic::now());
    let second = stamped(gst::ClockTime::ZERO, early);
    assert!(second > first);
    let third = stamped(clock.time(), Monotonic::now());
    assert!(third < first, "{third} after a reset, {first} before");
}
