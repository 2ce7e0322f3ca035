// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where nobody says when a frame is drawn, it is kept for one frame's time: until the next one comes,
//! or until that much time has passed on a screen that has gone still (lesson L14).

use std::time::{Duration, Instant};

use super::caps::OutputMemory;
use crate::capture::frame::Sync;

/// Keeps one frame.
#[derive(Debug)]
pub(super) struct Latch<T> {
    /// The driver puts no fences into DMA-BUFs.
    pub without_fences: bool,
    /// The newest frame is to be kept, not given on at once.
    pub active: bool,
    kept: Option<(T, Instant)>,
}

impl<T> Latch<T> {
    /// Keeps nothing yet.
    pub fn new(without_fences: bool) -> Self {
        Self {
            without_fences,
            active: false,
            kept: None,
        }
    }

    /// Whether a frame must be kept. Not one that leaves as it is: of a small pool one alone may be out
    /// of the producer's reach, and the one that is kept would be it.
    pub fn is_needed(&self, sync: Sync, memory: OutputMemory) -> bool {
        self.without_fences && sync == Sync::Implicit && memory != OutputMemory::DmaBuf
    }

    /// Whether a frame may have to be kept, or one is. Elsewhere nothing need be asked for each frame.
    pub fn is_in_use(&self) -> bool {
        self.without_fences || self.active || self.kept.is_some()
    }

    /// A frame has come at `now`, which is kept while the latch is active. Gives the one that is to
    /// leave, and one that is of no use any more.
    pub fn exchange(&mut self, frame: T, now: Instant, time: Duration) -> (Option<T>, Option<T>) {
        if self.active {
            let before = self.kept.replace((frame, now + time));
            (before.map(|(frame, _)| frame), None)
        } else {
            // It is newer than what was kept before, and needs no time.
            (Some(frame), self.take())
        }
    }

    /// When the frame that is kept must leave, if none comes before.
    pub fn due(&self) -> Option<Instant> {
        self.kept.as_ref().map(|(_, due)| *due)
    }

    /// Gives the frame that is kept.
    pub fn take(&mut self) -> Option<T> {
        self.kept.take().map(|(frame, _)| frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_without_a_fence_is_kept() {
        let (latch, fences) = (Latch::<()>::new(true), Latch::<()>::new(false));
        for memory in [OutputMemory::Cuda, OutputMemory::System] {
            assert!(latch.is_needed(Sync::Implicit, memory));
            assert!(!latch.is_needed(Sync::Explicit, memory));
            assert!(!latch.is_needed(Sync::None, memory));
            assert!(!fences.is_needed(Sync::Implicit, memory));
        }
        assert!(!latch.is_needed(Sync::Implicit, OutputMemory::DmaBuf));
    }

    fn active() -> Latch<u32> {
        Latch {
            active: true,
            ..Latch::new(true)
        }
    }

    const TIME: Duration = Duration::from_millis(16);

    #[test]
    fn a_frame_leaves_when_the_next_one_comes() {
        let (mut latch, now) = (active(), Instant::now());
        assert_eq!(latch.exchange(1, now, TIME), (None, None));
        assert_eq!(latch.exchange(2, now, TIME), (Some(1), None));
        assert_eq!(latch.exchange(3, now, TIME), (Some(2), None));
    }

    #[test]
    fn an_older_frame_does_not_leave_after_one_that_is_not_kept() {
        let (mut latch, now) = (active(), Instant::now());
        latch.exchange(1, now, TIME);
        latch.active = false;
        assert_eq!(latch.exchange(2, now, TIME), (Some(2), Some(1)));
        assert_eq!(latch.due(), None);
    }

    #[test]
    fn the_last_frame_leaves_when_the_screen_has_gone_still() {
        let (mut latch, now) = (active(), Instant::now());
        assert_eq!(latch.due(), None);
        latch.exchange(1, now, TIME);
        latch.exchange(2, now + TIME, TIME);
        assert_eq!(latch.due(), Some(now + 2 * TIME));
        assert_eq!(latch.take(), Some(2));
        assert_eq!((latch.due(), latch.take()), (None, None));
    }
}
