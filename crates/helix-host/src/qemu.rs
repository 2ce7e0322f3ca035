// SPDX-License-Identifier: MIT OR Apache-2.0

//! The consoles of a QEMU as scanouts: one connection for all of them, made again when it is lost.
//!
//! A thread of its own keeps the connection. Scanouts that run have a [`Watch`] each, which finds
//! the console's screen however often QEMU has been restarted.

mod address;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use helix_protocol::message::EnableScanout;
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};
use qemu_display::{Address, Config, Consoles, Display, Event, Level, Screen, Status};

pub use self::address::QemuAddress;
pub use self::watch::Watch;
use crate::monitor::figures::QemuFigures;
use crate::picture::MAX_SIDE;
use crate::scanout::SCANOUTS;

/// Between the end of a connection and the next attempt; doubles with each that fails.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// A connection that lasts this long was a good one: the next attempt comes soon.
const LASTING: Duration = Duration::from_secs(5);
/// Pictures a second, where no ENABLE_SCANOUT has said another rate.
const REFRESH_RATE: u32 = 60;
/// The highest rate that is taken from ENABLE_SCANOUT, per second.
const MAX_REFRESH_RATE: u32 = 240;
/// The size of no screen, for QEMU: it tells the guest that the output has none.
const OFF: (u32, u32) = (0, 0);

/// A QEMU. Ends its thread when dropped.
pub struct Qemu {
    link: Arc<Link>,
    waker: Waker,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the connection's thread shares with scanouts and clients.
pub struct Link {
    address: Address,
    /// Scanouts that are something else.
    taken: BTreeSet<u32>,
    state: Mutex<State>,
    tried: Condvar,
    waker: Waker,
}

#[derive(Default)]
struct State {
    /// While there is a connection.
    display: Option<Display>,
    /// Connections so far, to know a screen of a former one.
    generation: u64,
    /// The first attempt is over.
    tried: bool,
    /// Those of the last connection; none if there never was one.
    consoles: Option<BTreeSet<u32>>,
    /// The size that QEMU has confirmed last, by console, or that there is to be no screen. A QEMU that
    /// comes back is told again; that there is to be none, only until one has heard it.
    modes: BTreeMap<u32, Mode>,
    /// Requests so far, to know the later one of two.
    requests: u64,
    /// The threads of scanouts that run, by console.
    watchers: BTreeMap<u32, Waker>,
    /// Why nothing more is wanted of this connection.
    distrusted: Option<String>,
}

#[derive(Clone, Copy)]
struct Mode {
    size: (u32, u32),
    /// Pictures a second.
    refresh_rate: u32,
    /// Which request it was.
    request: u64,
}

/// Why a connection has ended.
enum End {
    /// The host ends.
    Stopped,
    Failed(String),
}

impl Qemu {
    /// Begins to connect. The consoles in `taken` are not shown.
    pub fn start(address: Address, taken: BTreeSet<u32>) -> io::Result<Self> {
        let waiter = Waiter::new()?;
        let waker = waiter.waker();
        let link = Arc::new(Link {
            address,
            taken,
            state: Mutex::default(),
            tried: Condvar::new(),
            waker: waker.clone(),
        });
        let thread = std::thread::Builder::new()
            .name("helix-qemu".to_owned())
            .spawn({
                let link = link.clone();
                move || supervise(&link, waiter)
            })?;
        Ok(Self {
            link,
            waker,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// For scanouts.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Waits for the end of the first attempt, which has a limit of its own, and returns the
    /// consoles that were found.
    pub fn first_consoles(&self) -> Option<BTreeSet<u32>> {
        let state = self.link.state();
        let tried = self.link.tried.wait_while(state, |state| !state.tried);
        tried
            .unwrap_or_else(PoisonError::into_inner)
            .consoles
            .clone()
    }

    /// Ends the connection.
    pub fn stop(&self) {
        self.waker.cancel();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // It blocks nowhere but in the wait that was cancelled, and in the end of the display,
        // which waits for nobody.
        if let Some(thread) = thread.take()
            && thread.join().is_err()
        {
            tracing::error!("QEMU's thread had panicked");
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Link {
    /// Whether there is such a console; while nothing is known of QEMU, there may be.
    pub fn may_have(&self, console: u32) -> bool {
        let state = self.state();
        state
            .consoles
            .as_ref()
            .is_none_or(|consoles| consoles.contains(&console))
    }

    /// How it stands with the connection.
    pub fn figures(&self) -> QemuFigures {
        let state = self.state();
        QemuFigures {
            connected: state.display.is_some(),
            reconnects: state.generation.saturating_sub(1),
        }
    }

    /// ENABLE_SCANOUT. `done` is called when QEMU has answered, when it is gone, or after the
    /// limit for its answers; by this thread or another, which it must not block.
    pub fn enable(
        self: &Arc<Self>,
        request: &EnableScanout,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) {
        let EnableScanout {
            scanout_id,
            width,
            height,
            refresh_rate,
        } = *request;
        let sides = 1..=MAX_SIDE;
        if !sides.contains(&width) || !sides.contains(&height) {
            done(Err(format!(
                "a size of {width}x{height}, must be 1x1 to {MAX_SIDE}x{MAX_SIDE}"
            )));
            return;
        }
        let rate = match refresh_rate {
            0 => REFRESH_RATE,
            rate => rate.min(MAX_REFRESH_RATE),
        };
        let answer = Answer::new(done);
        let mut state = self.state();
        let mode = state.request((width, height), rate);
        let link = self.clone();
        self.tell(&state, scanout_id, mode, move |result| {
            // Who is told that it failed, or is told nothing by QEMU, must not see it happen later.
            if result.is_ok() {
                link.state().remember(scanout_id, mode);
            }
            answer.give(result);
        });
    }

    /// DISABLE_SCANOUT. `done` is called as that of [`Link::enable`]. Nobody is told what became of
    /// it, so a QEMU that is away is told when it is back.
    pub fn disable(
        self: &Arc<Self>,
        console: u32,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) {
        let answer = Answer::new(done);
        let mut state = self.state();
        let mode = state.request(OFF, REFRESH_RATE);
        state.remember(console, mode);
        self.tell(&state, console, mode, move |result| answer.give(result));
    }

    /// Has QEMU told, under the lock under which `mode` was numbered: so QEMU hears the last one last.
    /// `done` is called without the lock, or dropped with it.
    fn tell(
        self: &Arc<Self>,
        state: &State,
        console: u32,
        mode: Mode,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) {
        let Some(display) = &state.display else {
            return;
        };
        let link = self.clone();
        display.set_size(console, mode.size, move |result| {
            // It knows. One that is started anew may have a screen there again.
            if mode.size == OFF && result.is_ok() {
                link.state().forget(console, mode);
            }
            done(result);
        });
    }

    /// Ends a connection that gives what cannot be; a new one is made.
    fn distrust(&self, generation: u64, reason: String) {
        let mut state = self.state();
        if state.generation == generation {
            state.distrusted.get_or_insert(reason);
            drop(state);
            self.waker.wake();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In the display's thread: must not wait for it to end.
    fn notice(&self, event: Event) {
        match event {
            Event::Status => self.waker.wake(),
            Event::Screen(console) => {
                if let Some(watcher) = self.state().watchers.get(&console) {
                    watcher.wake();
                }
            }
        }
    }

    fn first_attempt_is_over(&self) {
        self.state().tried = true;
        self.tried.notify_all();
    }
}

impl State {
    /// What somebody wants of a console, after all that was wanted before.
    fn request(&mut self, size: (u32, u32), refresh_rate: u32) -> Mode {
        self.requests += 1;
        Mode {
            size,
            refresh_rate,
            request: self.requests,
        }
    }

    /// A request counts from now on, unless a later one does.
    fn remember(&mut self, console: u32, mode: Mode) {
        let last = self.modes.entry(console).or_insert(mode);
        if last.request < mode.request {
            *last = mode;
        }
    }

    /// A request counts no more, unless a later one has taken its place.
    fn forget(&mut self, console: u32, mode: Mode) {
        if self.modes.get(&console).map(|last| last.request) == Some(mode.request) {
            self.modes.remove(&console);
        }
    }

    fn screen(&self, console: u32) -> Option<Arc<Screen>> {
        self.display.as_ref()?.screen(console)
    }
}

/// Whom to tell what became of a request.
type Done = Box<dyn FnOnce(Result<(), String>) + Send>;

/// An answer that is given, whatever becomes of the one who should.
struct Answer(Option<Done>);

impl Answer {
    fn new(done: impl FnOnce(Result<(), String>) + Send + 'static) -> Self {
        Self(Some(Box::new(done)))
    }

    fn give(mut self, result: Result<(), String>) {
        if let Some(done) = self.0.take() {
            done(result);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(Err("there is no connection to QEMU".to_owned()));
        }
    }
}

/// The connection's thread.
fn supervise(link: &Arc<Link>, mut waiter: Waiter) {
    let mut pause = FIRST_PAUSE;
    let mut told = None;
    loop {
        let started = Instant::now();
        let generation = link.state().generation;
        let reason = match connection(link, &mut waiter) {
            End::Stopped => {
                link.first_attempt_is_over();
                return;
            }
            End::Failed(reason) => reason,
        };
        link.first_attempt_is_over();
        if started.elapsed() >= LASTING {
            pause = FIRST_PAUSE;
        }
        if link.state().generation != generation {
            told = None;
        }
        // A QEMU that stays away is one line, not one for each attempt.
        if told.as_ref() == Some(&reason) {
            tracing::debug!(reason, "QEMU is not there");
        } else {
            tracing::warn!(reason, "QEMU is not there; trying again until it is");
            told = Some(reason);
        }
        let moment = Instant::now() + pause;
        pause = LONGEST_PAUSE.min(pause * 2);
        while Instant::now() < moment {
            if is_over(&mut waiter, Deadline::at(moment)) {
                return;
            }
        }
    }
}

/// Whether the host ends, after something has happened.
fn is_over(waiter: &mut Waiter, deadline: Deadline) -> bool {
    match waiter.wait(deadline) {
        Ok(wake) => wake == Wake::Cancelled,
        Err(error) => {
            tracing::error!(%error, "waiting for QEMU failed; its screens are given up");
            true
        }
    }
}

/// One connection from its beginning to its end.
fn connection(link: &Arc<Link>, waiter: &mut Waiter) -> End {
    let display = match connect(link, waiter) {
        Ok(display) => display,
        Err(end) => return end,
    };
    let consoles: BTreeSet<u32> = display.screens().iter().map(|s| s.console()).collect();
    if consoles.is_empty() {
        return End::Failed(format!(
            "the QEMU at {} has no graphics card, or none that it shows yet",
            link.address
        ));
    }
    if let Some(console) = consoles.range(SCANOUTS..).next() {
        tracing::warn!(
            console,
            "there are {SCANOUTS} scanouts at most; this console and those above are not shown"
        );
    }
    for console in consoles.intersection(&link.taken) {
        tracing::warn!(
            console,
            "this scanout is given by --scanout; the console is not shown"
        );
    }
    tracing::info!(address = %link.address, ?consoles, "connected to QEMU");
    {
        let mut state = link.state();
        state.display = Some(display);
        state.generation += 1;
        state.consoles = Some(consoles);
        state.distrusted = None;
        for (&console, &mode) in &state.modes {
            link.tell(&state, console, mode, move |result| {
                tracing::debug!(console, ?result, "the size of before");
            });
        }
        for watcher in state.watchers.values() {
            watcher.wake();
        }
    }
    link.first_attempt_is_over();
    let end = loop {
        let mut state = link.state();
        if let Some(reason) = state.distrusted.take() {
            break End::Failed(reason);
        }
        if let Some(Status::Failed(error)) = state.display.as_ref().map(Display::status) {
            break End::Failed(error.to_string());
        }
        drop(state);
        if is_over(waiter, Deadline::NEVER) {
            break End::Stopped;
        }
    };
    // Its thread takes the lock in `notice`, so it must not be waited for under it.
    let display = link.state().display.take();
    drop(display);
    end
}

/// Waits for a new connection, which has a limit of its own.
fn connect(link: &Arc<Link>, waiter: &mut Waiter) -> Result<Display, End> {
    let display = Display::start(Config {
        address: link.address.clone(),
        consoles: Consoles::Graphic,
        notify: Arc::new({
            let link = link.clone();
            move |event| link.notice(event)
        }),
        log: Arc::new(|level, text| match level {
            Level::Warning => tracing::warn!("{text}"),
            Level::Info => tracing::debug!("{text}"),
        }),
    })
    .map_err(|error| End::Failed(format!("no thread for QEMU: {error}")))?;
    loop {
        match display.status() {
            Status::Connecting => {}
            Status::Connected => return Ok(display),
            Status::Failed(error) => return Err(End::Failed(error.to_string())),
        }
        if is_over(waiter, Deadline::NEVER) {
            return Err(End::Stopped);
        }
    }
}
