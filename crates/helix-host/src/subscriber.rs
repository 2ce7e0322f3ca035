// SPDX-License-Identifier: MIT OR Apache-2.0

//! What waits for one subscriber of a scanout: a few whole frames, never more, and never a frame
//! whose reference got lost.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use helix_protocol::connection::Body;
use helix_protocol::wait::Waker;

use crate::access_unit::AccessUnit;

/// Frames that wait at most; half a second at 60 Hz. Whoever is further behind is better off with
/// a new keyframe.
const FRAMES: usize = 30;
/// Bytes that wait at most, unless a single frame is larger.
const BYTES: usize = 8 * 1024 * 1024;

/// A keyframe that was asked for and has not come after this long is asked for again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// A frame of a push stream.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The picture.
    pub unit: AccessUnit,
    /// When it was captured: this machine's CLOCK_MONOTONIC, in nanoseconds.
    pub pts: i64,
}

/// The queue between a scanout and one client's thread.
#[derive(Debug)]
pub struct Subscriber {
    queue: Mutex<Queue>,
    waker: Waker,
}

#[derive(Debug)]
struct Queue {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Deltas are of no use until a keyframe comes.
    lost: bool,
    /// When a keyframe was asked for; `None` if it was not.
    asked: Option<Instant>,
    /// Frames not queued since the last one that was.
    dropped: u64,
    ended: Option<String>,
}

/// What a client's thread finds.
pub enum Next {
    /// Send this.
    Frame(Frame),
    /// Nothing is there.
    Empty,
    /// Nothing is there, and only a keyframe will bring something: ask for one.
    NeedsKeyframe,
    /// Nothing will come any more, for this reason.
    Ended(String),
}

impl Subscriber {
    /// A newcomer; it waits for a keyframe, which its scanout knows. `waker` wakes its thread.
    pub fn new(waker: Waker) -> Self {
        Self {
            queue: Mutex::new(Queue {
                frames: VecDeque::new(),
                bytes: 0,
                lost: true,
                asked: Some(Instant::now()),
                dropped: 0,
                ended: None,
            }),
            waker,
        }
    }

    /// Offers a frame; returns how many this subscriber has missed by it.
    pub fn push(&self, frame: &Frame) -> u64 {
        let mut queue = self.queue();
        let size = frame.unit.size();
        let full = queue.frames.len() >= FRAMES || queue.bytes + size > BYTES;
        let mut missed = 0;
        if frame.unit.is_keyframe() {
            if full {
                // Decoding can start here as well, so what waits may go.
                missed = queue.frames.len() as u64;
                queue.dropped += missed;
                queue.frames.clear();
                queue.bytes = 0;
            }
            queue.lost = false;
            queue.asked = None;
        } else if full && !queue.frames.is_empty() {
            queue.lost = true;
        }
        if queue.lost {
            queue.dropped += 1;
            return missed + 1;
        }
        if queue.dropped > 0 {
            tracing::debug!(dropped = queue.dropped, "a subscriber starts at a keyframe");
            queue.dropped = 0;
        }
        queue.bytes += size;
        queue.frames.push_back(frame.clone());
        drop(queue);
        self.waker.wake();
        missed
    }

    /// Says that a frame was lost on the way here, and that a keyframe is already asked for.
    pub fn interrupt(&self) {
        let mut queue = self.queue();
        queue.lost = true;
        queue.asked = Some(Instant::now());
        drop(queue);
        // It has a deadline now.
        self.waker.wake();
    }

    /// Ends the subscription after what is queued.
    pub fn end(&self, reason: &str) {
        self.queue().ended = Some(reason.to_owned());
        self.waker.wake();
    }

    /// What to do next; for the client's thread.
    pub fn next(&self) -> Next {
        let mut queue = self.queue();
        if let Some(frame) = queue.frames.pop_front() {
            queue.bytes -= frame.unit.size();
            return Next::Frame(frame);
        }
        if let Some(reason) = queue.ended.take() {
            return Next::Ended(reason);
        }
        if queue.lost && queue.asked.is_none_or(|asked| asked.elapsed() >= ASK_AGAIN) {
            queue.asked = Some(Instant::now());
            return Next::NeedsKeyframe;
        }
        Next::Empty
    }

    /// When to call [`Subscriber::next`] even if nobody woke the thread: a request for a keyframe
    /// may have got lost, and what is dropped meanwhile wakes nobody.
    pub fn deadline(&self) -> Option<Instant> {
        let queue = self.queue();
        (queue.lost && queue.frames.is_empty()).then(|| {
            queue
                .asked
                .map_or_else(Instant::now, |asked| asked + ASK_AGAIN)
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use helix_protocol::wait::Waiter;

    use super::*;

    /// An access unit of so many bytes.
    fn frame(keyframe: bool, size: usize) -> Frame {
        let mut bytes = vec![0xff; size];
        bytes[..4].copy_from_slice(&[0, 0, 1, if keyframe { 0x65 } else { 0x41 }]);
        let unit = AccessUnit::new(gst::Buffer::from_mut_slice(bytes)).unwrap();
        assert_eq!((unit.is_keyframe(), unit.size()), (keyframe, size));
        Frame { unit, pts: 0 }
    }

    fn subscriber() -> Subscriber {
        gst::init().unwrap();
        Subscriber::new(Waiter::new().unwrap().waker())
    }

    /// The kinds of what waits: whether each is a keyframe.
    fn waiting(subscriber: &Subscriber) -> Vec<bool> {
        std::iter::from_fn(|| match subscriber.next() {
            Next::Frame(frame) => Some(frame.unit.is_keyframe()),
            _ => None,
        })
        .collect()
    }

    #[test]
    fn a_few_frames_wait_and_then_all_until_a_keyframe_are_missed() {
        let subscriber = subscriber();
        let (key, delta) = (frame(true, 10), frame(false, 10));
        // A newcomer begins at a keyframe.
        assert_eq!(subscriber.push(&delta), 1);
        assert_eq!(subscriber.push(&key), 0);
        for _ in 1..FRAMES {
            assert_eq!(subscriber.push(&delta), 0);
        }
        assert_eq!(subscriber.push(&delta), 1);
        // There is room, and the reference is missing.
        assert!(matches!(subscriber.next(), Next::Frame(_)));
        assert_eq!(subscriber.push(&delta), 1);
        let mut expected = vec![false; FRAMES - 1];
        assert_eq!(waiting(&subscriber), expected);
        assert_eq!(subscriber.push(&delta), 1);
        assert_eq!(subscriber.push(&key), 0);
        // A keyframe takes the place of all that waits.
        for _ in 1..FRAMES {
            assert_eq!(subscriber.push(&delta), 0);
        }
        assert_eq!(subscriber.push(&key), FRAMES as u64);
        assert_eq!(subscriber.push(&delta), 0);
        expected = vec![true, false];
        assert_eq!(waiting(&subscriber), expected);
    }

    #[test]
    fn no_more_bytes_wait_than_may_unless_it_is_one_frame() {
        let subscriber = subscriber();
        let (key, half) = (frame(true, 10), frame(false, BYTES / 2));
        assert_eq!(subscriber.push(&key), 0);
        assert_eq!(subscriber.push(&half), 0);
        // Ten bytes too many.
        assert_eq!(subscriber.push(&half), 1);
        assert_eq!(waiting(&subscriber), [true, false]);
        assert_eq!(subscriber.push(&key), 0);
        assert_eq!(waiting(&subscriber), [true]);
        // What was taken counts no more.
        for _ in 0..2 {
            assert_eq!(subscriber.push(&half), 0);
        }
        assert_eq!(subscriber.push(&frame(false, 4)), 1);
        assert_eq!(subscriber.push(&key), 2);
        assert_eq!(waiting(&subscriber), [true]);
        // The decoder cannot do without it, and nothing else waits.
        assert_eq!(subscriber.push(&frame(false, BYTES + 1)), 0);
        assert_eq!(waiting(&subscriber), [false]);
    }
}
