// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where nobody says when a frame is drawn, it is kept for one frame's time: until the next one comes,
//! or until that much time has passed on a screen that has gone still (lesson L14).

use std::time::{Duration, Instant};

/// Keeps one frame.
#[derive(Debug)]
pub(super) struct Latch<T> {
    /// The newest frame is to be kept, not given on at once.
    pub active: bool,
    kept: Option<(T, Instant)>,
}

impl<T> Default for Latch<T> {
    fn default() -> Self {
        Self {
            active: false,
            kept: None,
        }
    }
}

impl<T> Latch<T> {
    /// Keeps a frame that has come at `now`, and gives the one that was kept.
    pub fn exchange(&mut self, frame: T, now: Instant, time: Duration) -> Option<T> {
        let before = self.kept.replace((frame, now + time));
        before.map(|(frame, _)| frame)
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

    const TIME: Duration = Duration::from_millis(16);

    #[test]
    fn a_frame_leaves_when_the_next_one_comes() {
        let (mut latch, now) = (Latch::default(), Instant::now());
        assert_eq!(latch.exchange(1, now, TIME), None);
        assert_eq!(latch.exchange(2, now, TIME), Some(1));
        assert_eq!(latch.exchange(3, now, TIME), Some(2));
    }

    #[test]
    fn the_last_frame_leaves_when_the_screen_has_gone_still() {
        let (mut latch, now) = (Latch::default(), Instant::now());
        assert_eq!(latch.due(), None);
        latch.exchange(1, now, TIME);
        latch.exchange(2, now + TIME, TIME);
        assert_eq!(latch.due(), Some(now + 2 * TIME));
        assert_eq!(latch.take(), Some(2));
        assert_eq!((latch.due(), latch.take()), (None, None));
    }
}
