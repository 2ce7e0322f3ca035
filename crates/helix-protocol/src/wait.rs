// SPDX-License-Identifier: MIT OR Apache-2.0

//! The one place where this project's threads block.
//!
//! A [`Waiter`] belongs to one thread. It waits for the socket registered with it, for somebody
//! else's [`Waker`], or for a [`Deadline`], whichever comes first. Every wait is therefore bounded
//! where its caller says so, and cancellable always: `unlock()`, a flush, a state change or a
//! thread that waits for signals (not a handler: it takes a lock) calls [`Waker::cancel`] and the wait returns at once, now and on each later
//! call, until [`Waker::reset`].
//!
//! Readiness is edge-triggered: try the operation first, and wait only after it said
//! [`io::ErrorKind::WouldBlock`]. That is one system call a wait, and none when data is there. With
//! nothing registered a wait is that of a condition variable, which costs less at both ends than an
//! eventfd and epoll; a waker makes a system call only where somebody waits.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

const WAKER: Token = Token(0);
const SOURCE: Token = Token(1);

/// The moment at which a wait gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// Waits for ever, or rather until woken or cancelled.
    pub const NEVER: Self = Self(None);

    /// `limit` from now. A limit too large for the clock is [`Deadline::NEVER`].
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now().checked_add(limit))
    }

    /// The given moment.
    pub fn at(moment: Instant) -> Self {
        Self(Some(moment))
    }

    /// The element convention for settings in milliseconds: 0 means no limit.
    pub fn after_millis(millis: u32) -> Self {
        match millis {
            0 => Self::NEVER,
            n => Self::after(Duration::from_millis(n.into())),
        }
    }

    /// The moment, unless this is [`Deadline::NEVER`].
    pub fn instant(self) -> Option<Instant> {
        self.0
    }

    /// Whether the moment has come.
    pub fn has_passed(self) -> bool {
        self.0.is_some_and(|moment| Instant::now() >= moment)
    }

    /// The earlier of the two.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        match (self.0, other.0) {
            (Some(a), Some(b)) => Self(Some(a.min(b))),
            (a, b) => Self(a.or(b)),
        }
    }

    /// Time left, rounded up to what the kernel's millisecond timeouts can say, so that a wait
    /// never ends early and spins.
    fn timeout(self) -> Option<Duration> {
        self.0.map(|moment| {
            let left = moment.saturating_duration_since(Instant::now());
            if left.subsec_nanos() % 1_000_000 == 0 {
                left
            } else {
                Duration::from_millis(
                    left.as_millis()
                        .try_into()
                        .unwrap_or(u64::MAX)
                        .saturating_add(1),
                )
            }
        })
    }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The registered descriptor may be readable or writable now, or has failed.
    Ready,
    /// [`Waker::wake`] was called since the last wait.
    Woken,
    /// The deadline has passed.
    TimedOut,
    /// [`Waker::cancel`] was called and not yet undone by [`Waker::reset`].
    Cancelled,
}

/// What the waiter is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Waiting {
    /// It does not wait, or has been told to look.
    #[default]
    No,
    /// It waits for `Shared::asleep`.
    Asleep,
    /// It waits for what is registered.
    Polling,
}

#[derive(Debug, Default)]
struct State {
    woken: bool,
    cancelled: bool,
    waiting: Waiting,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    asleep: Condvar,
    polling: mio::Waker,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change that the waiter must see, and lets it look.
    fn tell(&self, change: impl FnOnce(&mut State)) {
        let waiting = {
            let mut state = self.lock();
            change(&mut state);
            std::mem::take(&mut state.waiting)
        };
        match waiting {
            Waiting::No => {}
            Waiting::Asleep => self.asleep.notify_one(),
            // An eventfd or pipe that is full is already signalled, and mio handles that. What is
            // left is a descriptor closed behind our back; there is then nobody to wake.
            Waiting::Polling => _ = self.polling.wake(),
        }
    }
}

/// Ends the waits of one [`Waiter`] from any thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Shared>);

impl Waker {
    /// Ends the current wait, or the next one if none is going on, once.
    ///
    /// Several calls before that wait count as one and cost one system call at most, and none where nobody waits.
    pub fn wake(&self) {
        self.0.tell(|state| state.woken = true);
    }

    /// Ends the current wait and each later one with [`Wake::Cancelled`] until [`Waker::reset`].
    pub fn cancel(&self) {
        self.0.tell(|state| state.cancelled = true);
    }

    /// Lets waits begin again after [`Waker::cancel`].
    pub fn reset(&self) {
        self.0.lock().cancelled = false;
    }

    /// Whether waits are cancelled now.
    pub fn is_cancelled(&self) -> bool {
        self.0.lock().cancelled
    }
}

/// One thread's bounded, cancellable wait.
#[derive(Debug)]
pub struct Waiter {
    poll: Poll,
    events: Events,
    shared: Arc<Shared>,
    /// Descriptors registered, those included that were closed since.
    registered: Cell<usize>,
    /// Something registered has become ready since [`Waiter::take_ready`].
    ready: bool,
}

impl Waiter {
    /// A waiter with nothing registered: it waits for its waker and for deadlines.
    pub fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            asleep: Condvar::new(),
            polling: mio::Waker::new(poll.registry(), WAKER)?,
        });
        Ok(Self {
            poll,
            events: Events::with_capacity(4),
            shared,
            registered: Cell::new(0),
            ready: false,
        })
    }

    /// The handle that ends this waiter's waits.
    pub fn waker(&self) -> Waker {
        Waker(self.shared.clone())
    }

    /// Registers `fd` for reading and writing; later waits end with [`Wake::Ready`] when it
    /// becomes ready for either. Several may be registered: who waits then tries each.
    ///
    /// The registration ends by [`Waiter::deregister`], or by itself when the descriptor's last
    /// duplicate is closed.
    pub fn register(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.register_for(fd, Interest::READABLE | Interest::WRITABLE)
    }

    /// Registers `fd` for reading alone: a unix socket becomes writable anew whenever its peer has
    /// read something, and each time somebody would wake up for nothing. An eventfd is writable all
    /// the time.
    pub fn register_for_reading(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.register_for(fd, Interest::READABLE)
    }

    fn register_for(&self, fd: BorrowedFd<'_>, interest: Interest) -> io::Result<()> {
        let registry = self.poll.registry();
        registry.register(&mut SourceFd(&fd.as_raw_fd()), SOURCE, interest)?;
        self.registered.set(self.registered.get() + 1);
        Ok(())
    }

    /// Whether waits shall end as well when the registered `fd` becomes writable, or is.
    pub(crate) fn set_writing(&self, fd: BorrowedFd<'_>, writing: bool) -> io::Result<()> {
        let interest = if writing {
            Interest::READABLE | Interest::WRITABLE
        } else {
            Interest::READABLE
        };
        let registry = self.poll.registry();
        registry.reregister(&mut SourceFd(&fd.as_raw_fd()), SOURCE, interest)
    }

    /// Takes back what [`Waiter::register`] did.
    pub fn deregister(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let registry = self.poll.registry();
        registry.deregister(&mut SourceFd(&fd.as_raw_fd()))?;
        self.registered.set(self.registered.get() - 1);
        Ok(())
    }

    /// Whether [`Waker::wake`] was called since the last wait; it counts as reported then.
    pub(crate) fn take_wake(&self) -> bool {
        std::mem::take(&mut self.shared.lock().woken)
    }

    /// Whether something registered has become ready since this was last asked, whatever the waits
    /// in between have reported. What was not ready before is not ready now unless this says so.
    pub(crate) fn take_ready(&mut self) -> bool {
        std::mem::take(&mut self.ready)
    }

    /// Waits until the registered descriptor is ready, the waker is used, or `deadline` passes.
    ///
    /// Cancellation goes before a wake-up, a wake-up before readiness: readiness that is not
    /// reported now shows when its operation is tried.
    pub fn wait(&mut self, deadline: Deadline) -> io::Result<Wake> {
        if self.registered.get() == 0 {
            return Ok(self.sleep(deadline));
        }
        loop {
            let timeout = {
                let mut state = self.shared.lock();
                if state.cancelled {
                    return Ok(Wake::Cancelled);
                }
                // Even then the descriptors are looked at: who is woken all the time must not miss them.
                if state.woken {
                    Some(Duration::ZERO)
                } else {
                    state.waiting = Waiting::Polling;
                    deadline.timeout()
                }
            };
            match self.poll.poll(&mut self.events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(()) => {}
            }
            let ready = self.events.iter().any(|event| event.token() == SOURCE);
            self.ready |= ready;
            let mut state = self.shared.lock();
            state.waiting = Waiting::No;
            if state.cancelled {
                return Ok(Wake::Cancelled);
            }
            if std::mem::take(&mut state.woken) {
                return Ok(Wake::Woken);
            }
            drop(state);
            if ready {
                return Ok(Wake::Ready);
            }
            if deadline.has_passed() {
                return Ok(Wake::TimedOut);
            }
        }
    }

    /// Waits with nothing registered.
    fn sleep(&self, deadline: Deadline) -> Wake {
        let mut state = self.shared.lock();
        loop {
            if state.cancelled {
                return Wake::Cancelled;
            }
            if std::mem::take(&mut state.woken) {
                return Wake::Woken;
            }
            let left = deadline
                .0
                .map(|moment| moment.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Wake::TimedOut;
            }
            state.waiting = Waiting::Asleep;
            let asleep = &self.shared.asleep;
            state = match left {
                None => asleep.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let result = asleep.wait_timeout(state, left);
                    result.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.waiting = Waiting::No;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    /// Generous: catches a hang, measures nothing.
    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_deadline_ends_a_wait_and_not_early() {
        let mut waiter = Waiter::new().unwrap();
        let start = Instant::now();
        assert_eq!(
            waiter
                .wait(Deadline::after(Duration::from_millis(15)))
                .unwrap(),
            Wake::TimedOut
        );
        assert!(start.elapsed() >= Duration::from_millis(15));
        assert_eq!(
            waiter.wait(Deadline::after(Duration::ZERO)).unwrap(),
            Wake::TimedOut
        );
    }

    #[test]
    fn who_only_reads_is_not_woken_by_what_can_only_be_written() {
        let (reader, mut writer) = UnixStream::pair().unwrap();
        let mut waiter = Waiter::new().unwrap();
        waiter.register_for_reading(reader.as_fd()).unwrap();
        let now = Deadline::after(Duration::ZERO);
        assert_eq!(waiter.wait(now).unwrap(), Wake::TimedOut);
        writer.write_all(b"!").unwrap();
        assert_eq!(waiter.wait(Deadline::after(LONG)).unwrap(), Wake::Ready);
    }

    #[test]
    fn wakes_before_a_wait_count_once() {
        let mut waiter = Waiter::new().unwrap();
        let waker = waiter.waker();
        waker.wake();
        waker.wake();
        assert_eq!(waiter.wait(Deadline::after(LONG)).unwrap(), Wake::Woken);
        assert_eq!(
            waiter.wait(Deadline::after(Duration::ZERO)).unwrap(),
            Wake::TimedOut
        );
    }

    #[test]
    fn cancel_ends_a_wait_that_has_begun_and_stays() {
        let mut waiter = Waiter::new().unwrap();
        let waker = waiter.waker();
        let canceller = thread::spawn(move || waker.cancel());
        assert_eq!(waiter.wait(Deadline::after(LONG)).unwrap(), Wake::Cancelled);
        canceller.join().unwrap();
        assert_eq!(waiter.wait(Deadline::NEVER).unwrap(), Wake::Cancelled);
        waiter.waker().reset();
        assert_eq!(
            waiter.wait(Deadline::after(Duration::ZERO)).unwrap(),
            Wake::TimedOut
        );
    }

    #[test]
    fn a_registered_socket_ends_a_wait() {
        let (mut here, there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let mut waiter = Waiter::new().unwrap();
        waiter.register(there.as_fd()).unwrap();
        // The first edge says that it can be written.
        assert_eq!(waiter.wait(Deadline::after(LONG)).unwrap(), Wake::Ready);
        here.write_all(b"x").unwrap();
        assert_eq!(waiter.wait(Deadline::after(LONG)).unwrap(), Wake::Ready);
        waiter.deregister(there.as_fd()).unwrap();
        here.write_all(b"x").unwrap();
        assert_eq!(
            waiter.wait(Deadline::after(Duration::ZERO)).unwrap(),
            Wake::TimedOut
        );
    }

    #[test]
    fn what_a_peer_has_read_wakes_only_who_wants_to_write() {
        let (here, there) = UnixStream::pair().unwrap();
        for end in [&here, &there] {
            end.set_nonblocking(true).unwrap();
        }
        let mut waiter = Waiter::new().unwrap();
        waiter.register_for_reading(here.as_fd()).unwrap();
        let pass_much = || {
            while (&here).write(&[0; 4096]).is_ok() {}
            while (&there).read(&mut [0; 4096]).is_ok() {}
        };
        pass_much();
        let now = Deadline::after(Duration::ZERO);
        assert_eq!(waiter.wait(now).unwrap(), Wake::TimedOut);
        assert!(!waiter.take_ready());
        // Room that was there before it was asked for counts.
        waiter.set_writing(here.as_fd(), true).unwrap();
        assert_eq!(waiter.wait(Deadline::after(LONG)).unwrap(), Wake::Ready);
        assert!(waiter.take_ready());
        waiter.set_writing(here.as_fd(), false).unwrap();
        pass_much();
        assert_eq!(waiter.wait(now).unwrap(), Wake::TimedOut);
    }

    #[test]
    fn readiness_is_not_forgotten_behind_a_wake_up() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let mut waiter = Waiter::new().unwrap();
        waiter.register_for_reading(there.as_fd()).unwrap();
        here.write_all(b"x").unwrap();
        waiter.waker().wake();
        assert_eq!(waiter.wait(Deadline::after(LONG)).unwrap(), Wake::Woken);
        assert!(waiter.take_ready());
        assert!(!waiter.take_ready());
    }

    #[test]
    fn zero_milliseconds_is_no_limit() {
        assert_eq!(Deadline::after_millis(0), Deadline::NEVER);
        assert!(Deadline::after_millis(1).instant().is_some());
        assert_eq!(Deadline::NEVER.min(Deadline::NEVER), Deadline::NEVER);
        let soon = Deadline::after(Duration::from_secs(1));
        assert_eq!(Deadline::NEVER.min(soon), soon);
    }
}
