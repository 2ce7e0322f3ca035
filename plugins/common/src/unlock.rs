// SPDX-License-Identifier: MIT OR Apache-2.0

//! When the streaming thread of a live source must not wait any longer: for a flush, an end, a pause.
//!
//! A flush and an end make `create` return FLUSHING. A pause must not. GStreamer 1.24 and newer unlock a
//! source for a pause, too (`gst_base_src_set_playing`); where PLAYING is back before the thread is out
//! of `create`, the base class takes its FLUSHING for that of a flush and ends the task, which nothing
//! starts again: the stream stands still for ever. Older versions do not unlock: the thread takes a frame
//! in PAUSED, and that leaves when PLAYING is back, old by then and with a time that counts the pause.
//!
//! So here a pause ends the wait, with every version, and the thread stays in `create` until PLAYING is
//! back, which is what `gst_base_src_wait_playing` is for. Nothing is taken in PAUSED, and what was under way
//! leaves afterwards. (What leaves `create` in that very moment is thrown away by newer base classes.)

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use gst::prelude::*;
use gst_base::prelude::*;
use helix_protocol::wait::Waker;

/// What ends the waits of a source's streaming thread. None of its methods waits, but for
/// [`create`](Self::create) in PAUSED.
#[derive(Debug, Default)]
pub struct Unlock(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The streaming thread's, while the source is started.
    waker: Option<Waker>,
    /// From `unlock()` to `unlock_stop()`: who has called the first.
    flushing: Option<ThreadId>,
    /// The one that is in `create`, or was last.
    streaming: Option<ThreadId>,
    paused: bool,
    /// How often a pause has begun or ended.
    turns: u64,
    /// The thread on which the base class turns PLAYING into PAUSED now: what it unlocks there is not
    /// for a flush. A flush may begin on another thread meanwhile.
    pausing: Option<ThreadId>,
}

impl Unlock {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source has started: its streaming thread waits by this waker's waiter.
    pub fn started(&self, waker: Waker) {
        *self.lock() = State {
            waker: Some(waker),
            ..State::default()
        };
    }

    /// The source has stopped, and has no streaming thread any more.
    pub fn stopped(&self) {
        *self.lock() = State::default();
    }

    /// For `BaseSrcImpl::unlock`.
    pub fn unlock(&self) {
        let mut state = self.lock();
        if state.pausing == Some(thread::current().id()) {
            return;
        }
        state.flushing = Some(thread::current().id());
        state.update();
    }

    /// For `BaseSrcImpl::unlock_stop`. Newer base classes say it for a pause on the streaming thread, late, when
    /// another thread may have unlocked for something else, which that one ends.
    pub fn unlock_stop(&self) {
        let mut state = self.lock();
        let here = Some(thread::current().id());
        if state.streaming == here && state.flushing != here {
            return;
        }
        state.flushing = None;
        state.update();
    }

    /// For `ElementImpl::change_state`: `change` is the base class's part of the transition.
    pub fn change_state<T>(&self, transition: gst::StateChange, change: impl FnOnce() -> T) -> T {
        match transition {
            gst::StateChange::PlayingToPaused => {
                self.lock().pausing = Some(thread::current().id());
                let result = change();
                // Now, when the base class knows that it is paused: `create` asks it.
                let mut state = self.lock();
                state.pausing = None;
                state.pause(true);
                result
            }
            gst::StateChange::PausedToPlaying => {
                self.lock().pause(false);
                change()
            }
            _ => change(),
        }
    }

    /// For `create`: runs `next`, which returns `Flushing` where its waits are cancelled, and again after
    /// each pause.
    pub fn create<T>(
        &self,
        src: &impl IsA<gst_base::BaseSrc>,
        mut next: impl FnMut() -> Result<T, gst::FlowError>,
    ) -> Result<T, gst::FlowError> {
        let src = src.upcast_ref::<gst_base::BaseSrc>();
        loop {
            // Not only by `unlock`: at the very first `create` an `unlock_stop` may have undone it.
            if src.src_pad().pad_flags().contains(gst::PadFlags::FLUSHING) {
                return Err(gst::FlowError::Flushing);
            }
            let turns = {
                let mut state = self.lock();
                state.streaming = Some(thread::current().id());
                state.turns
            };
            let result = next();
            let (paused, had_pause) = {
                let state = self.lock();
                (state.paused, state.had_pause(turns))
            };
            match result {
                Err(gst::FlowError::Flushing) if had_pause => {
                    src.wait_playing()?;
                }
                // Newer base classes throw away what comes out in a pause.
                Ok(_) if paused => {
                    src.wait_playing()?;
                    return result;
                }
                _ => return result,
            }
        }
    }

    /// Ends the current wait, or the next one, once.
    pub fn wake(&self) {
        if let Some(waker) = &self.lock().waker {
            waker.wake();
        }
    }

    /// Whether waits are cancelled, or the source has stopped.
    pub fn is_cancelled(&self) -> bool {
        let state = self.lock();
        state.flushing.is_some() || state.paused || state.waker.is_none()
    }
}

impl State {
    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        self.turns += 1;
        self.update();
    }

    /// Whether waits that began after so many turns may have been cancelled for a pause, and for nothing else.
    /// Downstream may be what flushes.
    fn had_pause(&self, turns: u64) -> bool {
        self.flushing.is_none() && (self.paused || self.turns != turns)
    }

    /// Lets the thread wait, or not.
    fn update(&self) {
        match &self.waker {
            Some(waker) if self.flushing.is_some() || self.paused => waker.cancel(),
            Some(waker) => waker.reset(),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helix_protocol::wait::Waiter;

    fn started() -> (Unlock, Waker) {
        let waker = Waiter::new().unwrap().waker();
        let unlock = Unlock::default();
        unlock.started(waker.clone());
        (unlock, waker)
    }

    fn pause(unlock: &Unlock, meanwhile: impl FnOnce()) {
        unlock.change_state(gst::StateChange::PlayingToPaused, || {
            // As GStreamer 1.24 does.
            unlock.unlock();
            meanwhile();
        });
    }

    fn play(unlock: &Unlock) {
        unlock.change_state(gst::StateChange::PausedToPlaying, || {});
    }

    #[test]
    fn a_pause_ends_waits_until_playing() {
        let (unlock, waker) = started();
        pause(&unlock, || assert!(!waker.is_cancelled(), "too early"));
        assert!(waker.is_cancelled() && unlock.is_cancelled());
        play(&unlock);
        assert!(!waker.is_cancelled() && !unlock.is_cancelled());
    }

    #[test]
    fn a_flush_goes_on_through_a_pause_and_a_pause_through_a_flush() {
        let (unlock, waker) = started();
        unlock.unlock();
        pause(&unlock, || {});
        play(&unlock);
        assert!(waker.is_cancelled(), "it flushes");
        pause(&unlock, || {});
        unlock.unlock_stop();
        assert!(waker.is_cancelled(), "it is paused");
        play(&unlock);
        assert!(!waker.is_cancelled());
    }

    #[test]
    fn a_flush_that_begins_on_another_thread_during_a_pause_is_one() {
        let (unlock, waker) = started();
        pause(&unlock, || {
            thread::scope(|scope| scope.spawn(|| unlock.unlock()).join().unwrap());
            assert!(waker.is_cancelled());
        });
        play(&unlock);
        assert!(waker.is_cancelled());
    }

    #[test]
    fn the_streaming_threads_own_unlock_stop_ends_no_flush_of_others() {
        let (unlock, waker) = started();
        let on_another_thread = |work: fn(&Unlock)| {
            thread::scope(|scope| scope.spawn(|| work(&unlock)).join().unwrap());
        };
        unlock.lock().streaming = Some(thread::current().id());
        on_another_thread(Unlock::unlock);
        // Of a pause that is over, as GStreamer 1.24 does before it calls `create`.
        unlock.unlock_stop();
        assert!(waker.is_cancelled() && unlock.is_cancelled());
        on_another_thread(Unlock::unlock_stop);
        assert!(!waker.is_cancelled() && !unlock.is_cancelled());
    }

    #[test]
    fn a_pause_is_told_from_a_flush_also_when_it_is_over() {
        let (unlock, _) = started();
        let had_pause = |turns| unlock.lock().had_pause(turns);
        assert!(!had_pause(0), "it is downstream that flushes");
        pause(&unlock, || {});
        assert!(had_pause(0) && had_pause(1));
        play(&unlock);
        assert!(had_pause(0) && had_pause(1) && !had_pause(2));
        unlock.unlock();
        assert!(!had_pause(0));
    }

    #[test]
    fn a_source_starts_anew_with_nothing_cancelled() {
        let (unlock, _) = started();
        pause(&unlock, || {});
        unlock.unlock();
        unlock.stopped();
        assert!(unlock.is_cancelled());
        let waker = Waiter::new().unwrap().waker();
        unlock.started(waker.clone());
        assert!(!waker.is_cancelled() && !unlock.is_cancelled());
    }
}
