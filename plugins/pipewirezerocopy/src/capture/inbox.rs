// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the loop thread leaves for the streaming thread: at most one frame, and the news.
//!
//! A newer frame replaces an older one that nobody took, so memory stays bounded and the picture
//! current however slow downstream is; the older one's buffer goes back to the producer at once
//! (L4). The consumer says what it waits for, and is woken for that only: when the loop thread has
//! nothing else to do ([`Inbox::tell`]), because whom it wakes may take the processor from it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy_plugin_common::wait::Waker;

use super::damage::Damage;
use super::dmabuf::Remains;
use super::frame::Frame;
use super::meta::Cursor;
use super::negotiate::StreamFormat;
use super::{Counters, Failure, Stage};

/// What there is to do for the consumer. More urgent things are reported first.
#[derive(Debug)]
pub enum Look {
    /// A frame of this format is there; [`Inbox::take`] takes it.
    Frame(StreamFormat),
    /// The producer has vanished, for this reason. Said once; a later frame means that it is back.
    Vanished(String),
    /// The target does not exist (yet), for this reason. Said once.
    Absent(String),
    /// Capturing has failed for good. Said each time.
    Failed(Failure),
    /// The pointer has changed; [`Inbox::take_cursor`] tells how. The waker is used as for nothing.
    Cursor,
    /// Nothing. The waker is used when that changes.
    Nothing,
}

/// What wakes the consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Anything.
    All,
    /// News, but no frame: it holds one back for a while, or would only drop it.
    News,
    /// Anything but a frame that cannot be passed on: it has to, and waits for a buffer to come back.
    Buffer,
}

#[derive(Debug, Default)]
struct Contents {
    frame: Option<Box<Frame>>,
    cursor: Option<Cursor>,
    /// A frame was dropped whose damage the next one lacks.
    missed: bool,
    vanished: Option<String>,
    /// The frame came after the news in `vanished`, from a producer that has returned.
    frame_is_newer: bool,
    absent: Option<String>,
    failed: Option<Failure>,
    connected: bool,
    waiting: Option<Interest>,
}

/// The handover. One consumer, any number of clones of the [`Arc`] around it.
#[derive(Debug)]
pub struct Inbox {
    contents: Mutex<Contents>,
    remains: Arc<Remains>,
    /// The consumer is to be woken.
    due: AtomicBool,
    waker: Waker,
    counters: Arc<Counters>,
}

impl Inbox {
    /// An empty inbox that wakes its consumer by `waker`.
    pub fn new(waker: Waker, counters: Arc<Counters>) -> Self {
        Self {
            contents: Mutex::default(),
            remains: Arc::default(),
            due: AtomicBool::new(false),
            waker,
            counters,
        }
    }

    /// What was made of buffers that are gone: to be dropped from time to time, on the thread that made it.
    pub fn remains(&self) -> &Arc<Remains> {
        &self.remains
    }

    /// How far the capture has come.
    pub(super) fn stage(&self) -> Stage {
        self.counters.stage()
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // Nothing below can panic half-way through a change.
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to do next. Where that is nothing, or a frame while only news are wanted, the waker
    /// is used once something that `interest` covers comes.
    pub fn look(&self, interest: Interest) -> Look {
        let mut contents = self.lock();
        contents.waiting = None;
        let stuck = interest == Interest::Buffer && contents.frame.as_deref().is_some_and(is_stuck);
        if (contents.frame.is_none() || contents.frame_is_newer || stuck)
            && let Some(reason) = contents.vanished.take()
        {
            let newer = std::mem::take(&mut contents.frame_is_newer);
            // The buffer that a stuck frame of before the news waits for may never come.
            let stale = contents.frame.take_if(|_| !newer);
            contents.missed |= stale.is_some();
            // Before the frame is dropped: that sends a command.
            drop(contents);
            if stale.is_some() {
                self.counters.dropped.fetch_add(1, Ordering::Relaxed);
            }
            return Look::Vanished(reason);
        }
        if let Some(frame) = contents.frame.as_ref().filter(|_| !stuck) {
            let format = frame.format;
            contents.waiting = Some(interest).filter(|interest| *interest == Interest::News);
            return Look::Frame(format);
        }
        if let Some(failure) = &contents.failed {
            return Look::Failed(failure.clone());
        }
        if let Some(reason) = contents.absent.take() {
            return Look::Absent(reason);
        }
        contents.waiting = Some(interest);
        if contents.cursor.is_some() {
            return Look::Cursor;
        }
        Look::Nothing
    }

    /// The frame that is there, if it still has that format and is `wanted`. It may not: the loop
    /// thread replaces frames at any time.
    pub fn take(
        &self,
        expected: &StreamFormat,
        wanted: impl FnOnce(&mut Frame) -> bool,
    ) -> Option<Box<Frame>> {
        let mut contents = self.lock();
        let frame = contents.frame.as_mut()?;
        if frame.format != *expected || !wanted(frame) {
            return None;
        }
        if std::mem::take(&mut contents.missed)
            && let Some(frame) = &mut contents.frame
        {
            frame.damage = Damage::Everything;
        }
        contents.frame.take()
    }

    /// Gives a frame back which could not leave as was agreed, and may in another way: on a still screen no
    /// other comes. A newer one goes before it.
    pub fn put_back(&self, frame: Box<Frame>) {
        let dropped = {
            let mut contents = self.lock();
            contents.missed = true;
            match contents.frame {
                Some(_) => Some(frame),
                None => contents.frame.replace(frame),
            }
        };
        if dropped.is_some() {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The news of the pointer, which stays.
    pub fn cursor(&self) -> Option<Cursor> {
        self.lock().cursor.clone()
    }

    /// The pointer as it is now, if there is news of it.
    pub fn take_cursor(&self) -> Option<Cursor> {
        self.lock().cursor.take()
    }

    /// Drops the frame that is there.
    pub fn discard(&self) {
        // Outside the lock: dropping a frame sends a command.
        let frame = self.lock().frame.take();
        if frame.is_some() {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.miss();
    }

    /// Notes that a frame which was taken does not leave: the next one's damage does not cover it.
    pub fn miss(&self) {
        self.lock().missed = true;
    }

    /// Whether the connection to the daemon stands, or why not; none while that is open. The
    /// waker is used when it is decided.
    pub fn connection(&self) -> Option<Result<(), Failure>> {
        let mut contents = self.lock();
        if let Some(failure) = &contents.failed {
            return Some(Err(failure.clone()));
        }
        if contents.connected {
            return Some(Ok(()));
        }
        contents.waiting = Some(Interest::News);
        None
    }

    /// Wakes the consumer where that has come what it waits for. To be called before the loop thread
    /// waits.
    pub(super) fn tell(&self) {
        // Both are the loop thread's alone.
        if self.due.load(Ordering::Relaxed) {
            self.due.store(false, Ordering::Relaxed);
            self.waker.wake();
        }
    }

    pub(super) fn put_frame(&self, mut frame: Box<Frame>) {
        let (replaced, wake) = {
            let mut contents = self.lock();
            contents.frame_is_newer = contents.vanished.is_some();
            contents.absent = None;
            let wake = contents.waiting.take_if(|interest| match interest {
                Interest::All => true,
                Interest::News => false,
                Interest::Buffer => !is_stuck(&frame),
            });
            let replaced = if let Some(older) = &mut contents.frame {
                let damage = std::mem::replace(&mut older.damage, Damage::Everything);
                let same = older.format == frame.format;
                frame
                    .damage
                    .add(if same { damage } else { Damage::Everything });
                Some(std::mem::replace(older, frame))
            } else {
                contents.frame = Some(frame);
                None
            };
            (replaced, wake.is_some())
        };
        if replaced.is_some() {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
        if wake {
            self.due.store(true, Ordering::Relaxed);
        }
    }

    /// The pointer has changed. A frame that comes with it follows.
    pub(super) fn put_cursor(&self, cursor: Cursor, frame_follows: bool) {
        let wake = {
            let mut contents = self.lock();
            contents.cursor = Some(cursor);
            let all = |interest: &mut Interest| *interest != Interest::News;
            !frame_follows && contents.waiting.take_if(all).is_some()
        };
        if wake {
            self.due.store(true, Ordering::Relaxed);
        }
    }

    /// A buffer is back with the producer.
    pub(super) fn put_returned(&self) {
        let wake = {
            let mut contents = self.lock();
            let stuck = contents.frame.as_deref().is_some_and(is_stuck);
            let buffer = |interest: &mut Interest| *interest == Interest::Buffer && !stuck;
            contents.waiting.take_if(buffer).is_some()
        };
        if wake {
            self.due.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn put_connected(&self) {
        self.put_news(|contents| contents.connected = true);
    }

    pub(super) fn put_vanished(&self, reason: String) {
        self.put_news(|contents| {
            contents.vanished = Some(reason);
            contents.cursor = None;
            contents.frame_is_newer = false;
        });
    }

    pub(super) fn put_absent(&self, reason: String) {
        self.put_news(|contents| contents.absent = Some(reason));
    }

    pub(super) fn put_failed(&self, failure: Failure) {
        self.put_news(|contents| {
            contents.failed.get_or_insert(failure);
        });
    }

    fn put_news(&self, change: impl FnOnce(&mut Contents)) {
        let waiting = {
            let mut contents = self.lock();
            change(&mut contents);
            contents.waiting.take()
        };
        if waiting.is_some() {
            self.due.store(true, Ordering::Relaxed);
        }
    }
}

/// Whether a frame has to wait: it can only be passed on, and downstream has all that can be spared.
fn is_stuck(frame: &Frame) -> bool {
    frame.dmabuf().is_some() && !frame.can_be_reserved()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::frame::tests::{frame_of, frames_in_dmabufs};
    use crate::capture::geometry::Region;
    use std::time::Duration;
    use zerocopy_plugin_common::wait::{Deadline, Waiter, Wake};

    struct Setup {
        waiter: Waiter,
        counters: Arc<Counters>,
        inbox: Inbox,
    }

    fn setup() -> Setup {
        let waiter = Waiter::new().unwrap();
        let counters = Arc::new(Counters::default());
        let inbox = Inbox::new(waiter.waker(), counters.clone());
        Setup {
            waiter,
            counters,
            inbox,
        }
    }

    fn frame(width: u32, counters: &Arc<Counters>) -> Box<Frame> {
        frame_of(&[0; 64], (width, 1), 0, 8, counters)
    }

    fn woken(inbox: &Inbox, waiter: &mut Waiter) -> bool {
        inbox.tell();
        waiter.wait(Deadline::after(Duration::ZERO)).unwrap() == Wake::Woken
    }

    #[test]
    fn a_newer_frame_replaces_one_that_nobody_took() {
        let Setup {
            counters, inbox, ..
        } = setup();
        for width in 1..=5 {
            inbox.put_frame(frame(width, &counters));
        }
        assert_eq!(counters.dropped.load(Ordering::Relaxed), 4);
        assert_eq!(
            counters.held.load(Ordering::Relaxed),
            1,
            "the rest went back"
        );
        let Look::Frame(format) = inbox.look(Interest::All) else {
            panic!("a frame is there");
        };
        assert_eq!(format.width, 5);
        assert!(inbox.take(&format, |_| true).is_some());
        assert!(matches!(inbox.look(Interest::All), Look::Nothing));
    }

    #[test]
    fn the_waker_is_used_only_for_who_waits_for_that() {
        let Setup {
            mut waiter,
            counters,
            inbox,
        } = setup();
        inbox.put_frame(frame(1, &counters));
        assert!(!woken(&inbox, &mut waiter), "nobody waits");
        inbox.look(Interest::All);
        inbox.discard();
        inbox.put_frame(frame(1, &counters));
        assert!(
            !woken(&inbox, &mut waiter),
            "a look that found something is no wait"
        );
        inbox.discard();
        assert!(matches!(inbox.look(Interest::All), Look::Nothing));
        inbox.put_frame(frame(1, &counters));
        assert!(woken(&inbox, &mut waiter));
        assert!(matches!(inbox.look(Interest::News), Look::Frame(_)));
        inbox.put_frame(frame(2, &counters));
        assert!(!woken(&inbox, &mut waiter), "frames are not waited for");
        inbox.put_vanished("gone".into());
        assert!(woken(&inbox, &mut waiter), "news are");
    }

    #[test]
    fn a_frame_that_can_only_be_passed_on_waits_for_a_buffer() {
        let Setup {
            mut waiter,
            counters,
            inbox,
        } = setup();
        // Two may be downstream.
        let mut frames = frames_in_dmabufs(5, 4, &counters);
        let format = frames[0].format;
        let mut show = || inbox.put_frame(frames.remove(0));
        let mut downstream = Vec::new();
        for _ in 0..2 {
            show();
            assert!(matches!(inbox.look(Interest::Buffer), Look::Frame(_)));
            downstream.extend(inbox.take(&format, Frame::reserve));
        }
        assert_eq!(downstream.len(), 2);
        show();
        assert!(inbox.take(&format, Frame::reserve).is_none());
        assert!(matches!(inbox.look(Interest::Buffer), Look::Nothing));
        show();
        inbox.put_returned();
        assert!(
            !woken(&inbox, &mut waiter),
            "none has come back of those downstream"
        );
        downstream.pop();
        inbox.put_returned();
        assert!(woken(&inbox, &mut waiter));
        assert!(matches!(inbox.look(Interest::Buffer), Look::Frame(_)));
        assert!(inbox.take(&format, Frame::reserve).is_some());
        // What is not in DMA-BUFs can be copied.
        assert!(matches!(inbox.look(Interest::Buffer), Look::Nothing));
        inbox.put_frame(frame(1, &counters));
        assert!(woken(&inbox, &mut waiter));
    }

    #[test]
    fn a_frame_of_another_size_is_not_taken() {
        let Setup {
            counters, inbox, ..
        } = setup();
        inbox.put_frame(frame(1, &counters));
        let Look::Frame(format) = inbox.look(Interest::All) else {
            panic!("a frame is there");
        };
        inbox.put_frame(frame(2, &counters));
        assert!(inbox.take(&format, |_| true).is_none());
        assert!(matches!(inbox.look(Interest::All), Look::Frame(_)));
    }

    #[test]
    fn the_last_picture_comes_before_the_news_of_its_producers_end() {
        let Setup {
            counters, inbox, ..
        } = setup();
        inbox.put_frame(frame(1, &counters));
        inbox.put_vanished("gone".into());
        assert!(matches!(inbox.look(Interest::All), Look::Frame(_)));
        inbox.discard();
        assert!(matches!(inbox.look(Interest::All), Look::Vanished(_)));
        assert!(
            matches!(inbox.look(Interest::All), Look::Nothing),
            "said once"
        );
    }

    #[test]
    fn a_frame_that_waits_for_a_buffer_does_not_hold_back_the_news_of_its_producers_end() {
        let Setup {
            mut waiter,
            counters,
            inbox,
        } = setup();
        let mut frames = frames_in_dmabufs(3, 1, &counters);
        let format = frames[0].format;
        inbox.put_frame(frames.remove(0));
        let _downstream = inbox.take(&format, Frame::reserve).unwrap();
        inbox.put_frame(frames.remove(0));
        assert!(matches!(inbox.look(Interest::Buffer), Look::Nothing));
        inbox.put_vanished("gone".into());
        assert!(woken(&inbox, &mut waiter));
        assert!(matches!(inbox.look(Interest::Buffer), Look::Vanished(_)));
        assert_eq!(
            counters.dropped.load(Ordering::Relaxed),
            1,
            "it is of no use"
        );
        assert!(matches!(inbox.look(Interest::All), Look::Nothing));
        // One that comes from a producer that has returned stays.
        inbox.put_vanished("gone again".into());
        inbox.put_frame(frames.remove(0));
        assert!(matches!(inbox.look(Interest::Buffer), Look::Vanished(_)));
        assert!(matches!(inbox.look(Interest::All), Look::Frame(_)));
    }

    #[test]
    fn a_returned_producers_frame_comes_after_the_news_of_its_end() {
        let Setup {
            counters, inbox, ..
        } = setup();
        inbox.put_vanished("gone".into());
        inbox.put_frame(frame(1, &counters));
        assert!(matches!(inbox.look(Interest::All), Look::Vanished(_)));
        assert!(matches!(inbox.look(Interest::All), Look::Frame(_)));
    }

    #[test]
    fn a_frame_that_is_given_back_comes_again_unless_there_is_a_newer_one() {
        let Setup {
            counters, inbox, ..
        } = setup();
        let format = frame(1, &counters).format;
        inbox.put_frame(frame(1, &counters));
        let taken = inbox.take(&format, |_| true).unwrap();
        inbox.put_back(taken);
        let again = inbox.take(&format, |_| true).unwrap();
        assert_eq!(again.damage, Damage::Everything);
        let mut newer = frame(1, &counters);
        newer.damage = Damage::Rects(Vec::new());
        let came = newer.captured;
        inbox.put_frame(newer);
        inbox.put_back(again);
        let taken = inbox.take(&format, |_| true).unwrap();
        assert_eq!(taken.captured, came);
        assert_eq!(taken.damage, Damage::Everything);
        assert_eq!(counters.dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_first_failure_stays() {
        let Setup { inbox, .. } = setup();
        inbox.put_failed(Failure::Stream("first".into()));
        inbox.put_failed(Failure::Stream("second".into()));
        for _ in 0..2 {
            let Look::Failed(Failure::Stream(reason)) = inbox.look(Interest::All) else {
                panic!("it failed");
            };
            assert_eq!(reason, "first");
        }
    }

    #[test]
    fn damage_of_frames_that_never_leave_is_not_lost() {
        let Setup {
            counters, inbox, ..
        } = setup();
        let damaged = |x: i32| {
            let mut frame = frame(4, &counters);
            frame.damage = Damage::Rects(vec![Region {
                x,
                y: 0,
                width: 1,
                height: 1,
            }]);
            frame
        };
        let rects = |frame: &Frame| match &frame.damage {
            Damage::Everything => None,
            Damage::Rects(rects) => Some(rects.iter().map(|rect| rect.x).collect::<Vec<_>>()),
        };
        let format = frame(4, &counters).format;
        inbox.put_frame(damaged(1));
        inbox.put_frame(damaged(2));
        let taken = inbox.take(&format, |_| true).unwrap();
        assert_eq!(rects(&taken), Some(vec![2, 1]));
        inbox.put_frame(damaged(1));
        inbox.discard();
        inbox.put_frame(damaged(2));
        let taken = inbox.take(&format, |_| true).unwrap();
        assert_eq!(rects(&taken), None);
        inbox.put_frame(damaged(3));
        let taken = inbox.take(&format, |_| true).unwrap();
        assert_eq!(rects(&taken), Some(vec![3]));
    }
}
