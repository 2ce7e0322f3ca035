// SPDX-License-Identifier: MIT OR Apache-2.0

//! The connection to a QEMU, and the thread that it lives in.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_core::Stream;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use zbus::Connection;
use zbus::connection::Builder;
use zbus::proxy::{CacheProperties, OwnerChangedStream};

use crate::address::Address;
use crate::console::Console;
use crate::error::Error;
use crate::proxies::VmProxy;
use crate::qmp;
use crate::screen::Screen;
use crate::sizes::{SetSize, Sizes};

/// Limit for each answer of QEMU's.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Limit for everything from the socket to the first listener.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Which consoles to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consoles {
    /// This one.
    One(u32),
    /// All that are no text terminals of QEMU's own.
    Graphic,
}

/// How much a log line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something does not work.
    Warning,
    /// Something that happens once.
    Info,
}

/// Takes log lines.
pub type Log = Arc<dyn Fn(Level, fmt::Arguments<'_>) + Send + Sync>;

/// What may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// [`Display::status`].
    Status,
    /// [`Screen::look`] of the console of this number.
    Screen(u32),
}

/// Is told, in the connection's thread, that there is something to look at. Must not block.
pub type Notify = Arc<dyn Fn(Event) + Send + Sync>;

/// What to show, and whom to tell.
#[derive(Clone)]
pub struct Config {
    /// Where QEMU is.
    pub address: Address,
    /// Which consoles.
    pub consoles: Consoles,
    /// Who shows them.
    pub notify: Notify,
    /// Where log lines go.
    pub log: Log,
}

/// How it stands with the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// QEMU is being called; this ends within 10 s.
    Connecting,
    /// The screens are there.
    Connected,
    /// The end, or there never was one.
    Failed(Error),
}

struct Shared {
    status: Mutex<Status>,
    screens: Mutex<BTreeMap<u32, Arc<Screen>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection to a QEMU. It ends, and its thread with it, when this is dropped.
pub struct Display {
    shared: Arc<Shared>,
    commands: Option<mpsc::UnboundedSender<SetSize>>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Begins to connect. [`Display::status`] tells how that goes.
    pub fn start(config: Config) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let shared = Arc::new(Shared {
            status: Mutex::new(Status::Connecting),
            screens: Mutex::default(),
        });
        let (commands, receiver) = mpsc::unbounded_channel();
        let worker = Worker {
            config,
            shared: shared.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("qemu-display".to_owned())
            .spawn(move || {
                runtime.block_on(worker.run(receiver));
                // A name service that is being asked is not waited for.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            shared,
            commands: Some(commands),
            thread: Some(thread),
        })
    }

    /// How it stands now.
    pub fn status(&self) -> Status {
        lock(&self.shared.status).clone()
    }

    /// The screen of a console, once there is a connection.
    pub fn screen(&self, console: u32) -> Option<Arc<Screen>> {
        lock(&self.shared.screens).get(&console).cloned()
    }

    /// All screens that were asked for, once there is a connection.
    pub fn screens(&self) -> Vec<Arc<Screen>> {
        lock(&self.shared.screens).values().cloned().collect()
    }

    /// Tells the guest that a console is shown in a window of this many pixels, 0x0 for none.
    /// `done` is called, in the connection's thread, when QEMU has taken note or has refused; the
    /// guest follows when it likes. It is dropped uncalled where the connection ends before. While QEMU has not answered for this console, only the last of
    /// the sizes that come is told it next, and its answer is that of all of them.
    pub fn set_size(
        &self,
        console: u32,
        size: (u32, u32),
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) {
        let command = SetSize {
            console,
            size,
            done: Box::new(done),
        };
        if let Some(commands) = &self.commands {
            // Where the connection has ended, nobody is there to call `done`.
            let _ = commands.send(command);
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        // The worker stops when nobody can command it any more, whatever it is waiting for.
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // It has no way to panic that could be answered here.
            let _ = thread.join();
        }
    }
}

/// Whose future the connection's thread runs.
struct Worker {
    config: Config,
    shared: Arc<Shared>,
}

/// What a console's task returns: the console, and why it has ended.
type Ended = (u32, Error);

impl Worker {
    async fn run(self, mut commands: mpsc::UnboundedReceiver<SetSize>) {
        let mut consoles = JoinSet::new();
        let (gone, _) = watch::channel(None);
        let connected = tokio::select! {
            connected = timeout(CONNECT_LIMIT, self.connect(&mut consoles, &gone)) => connected,
            () = commands_closed(&mut commands) => return,
        };
        let (control, owner) = match connected {
            Ok(Ok(connected)) => connected,
            Ok(Err(error)) => return self.set_status(Status::Failed(error)),
            Err(_) => {
                return self.set_status(Status::Failed(self.unreachable(&format!(
                    "it did not answer within {} s (is it stopped? A QMP socket serves one client \
                     at a time)",
                    CONNECT_LIMIT.as_secs()
                ))));
            }
        };
        self.set_status(Status::Connected);
        let mut sizes = Sizes::new(control.clone());
        let lost = lost(&control, owner);
        tokio::pin!(lost);
        let mut there = true;
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(wish) => sizes.ask(wish),
                    None => return,
                },
                reason = &mut lost, if there => {
                    there = false;
                    let gone_now = Error::Gone {
                        address: self.config.address.to_string(),
                        reason: reason.to_owned(),
                    };
                    if consoles.is_empty() {
                        self.set_status(Status::Failed(gone_now.clone()));
                    }
                    // Consoles that are listened to go on for as long as that lasts: QEMU has one
                    // client without a bus, and another one may have taken that place.
                    gone.send_replace(Some(gone_now));
                }
                Some(ended) = consoles.join_next() => {
                    let error = self.end(ended);
                    if consoles.is_empty() {
                        self.set_status(Status::Failed(error));
                    }
                }
            }
        }
    }

    /// A console's task has ended: so has its screen. Returns why.
    fn end(&self, ended: Result<Ended, JoinError>) -> Error {
        let screens = lock(&self.shared.screens).clone();
        match ended {
            Ok((console, error)) => {
                if let Some(screen) = screens.get(&console) {
                    screen.fail(error.clone());
                }
                error
            }
            // Whose task it was is not known.
            Err(panicked) => {
                let error = Error::System(format!("listening to QEMU failed: {panicked}"));
                for screen in screens.values() {
                    screen.fail(error.clone());
                }
                error
            }
        }
    }

    fn set_status(&self, status: Status) {
        *lock(&self.shared.status) = status;
        (self.config.notify)(Event::Status);
    }

    fn unreachable(&self, reason: &str) -> Error {
        Error::Unreachable {
            address: self.config.address.to_string(),
            reason: reason.to_owned(),
        }
    }

    /// Connects, and finds the wanted consoles. Each gets a task that listens to it when somebody
    /// wants to know what it shows.
    async fn connect(
        &self,
        consoles: &mut JoinSet<Ended>,
        gone: &watch::Sender<Option<Error>>,
    ) -> Result<(Connection, Option<OwnerChangedStream<'static>>), Error> {
        let control = self.control().await?;
        let unreachable = |error: zbus::Error| self.unreachable(&error.to_string());
        let vm = VmProxy::builder(&control)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(unreachable)?;
        // Before it is asked anything, so that its end cannot be missed.
        let owner = match self.config.address {
            Address::Qmp(_) => None,
            _ => Some(
                vm.inner()
                    .receive_owner_changed()
                    .await
                    .map_err(unreachable)?,
            ),
        };
        let ids = vm.console_ids().await.map_err(|error| {
            self.unreachable(&format!(
                "{error} (is there a QEMU that was started with -display dbus?)"
            ))
        })?;
        let name = vm.name().await.unwrap_or_default();
        self.log(
            Level::Info,
            format_args!("virtual machine '{name}', consoles {ids:?}"),
        );
        if let Consoles::One(console) = self.config.consoles
            && !ids.contains(&console)
        {
            return Err(Error::NoConsole {
                address: self.config.address.to_string(),
                console,
                existing: format!("{ids:?}"),
            });
        }
        for id in ids {
            let failed = |error: zbus::Error| self.unreachable(&format!("console {id}: {error}"));
            let console = Console::new(&control, id, self.config.address.to_string());
            let console = console.await.map_err(failed)?;
            let wanted = match self.config.consoles {
                Consoles::One(wanted) => wanted == id,
                Consoles::Graphic => console.is_graphic().await.map_err(failed)?,
            };
            if !wanted {
                continue;
            }
            let label = console.label().await.map_err(failed)?;
            self.log(Level::Info, format_args!("console {id}, '{label}'"));
            let notify = self.config.notify.clone();
            let screen = Screen::new(id, label, move || notify(Event::Screen(id)));
            let screen = Arc::new(screen);
            lock(&self.shared.screens).insert(id, screen.clone());
            let gone = gone.subscribe();
            consoles.spawn(async move { (id, console.watch(&screen, gone).await) });
        }
        Ok((control, owner))
    }

    /// The connection on which QEMU is asked things.
    async fn control(&self) -> Result<Connection, Error> {
        let builder = match &self.config.address {
            Address::SessionBus => Builder::session(),
            Address::Bus(address) => Builder::address(address.as_str()),
            Address::Qmp(path) => {
                let socket = qmp::open_display(path).await;
                Builder::unix_stream(socket.map_err(|reason| self.unreachable(&reason))?).p2p()
            }
        };
        let built = builder.method_timeout(ANSWER_LIMIT).build().await;
        built.map_err(|error| self.unreachable(&error.to_string()))
    }

    fn log(&self, level: Level, text: fmt::Arguments<'_>) {
        (self.config.log)(level, text);
    }
}

/// Returns when QEMU can be asked nothing any more, and how that was noticed. `owner` is who has its
/// name on a bus.
async fn lost(control: &Connection, owner: Option<OwnerChangedStream<'static>>) -> &'static str {
    let left = async {
        match owner {
            Some(mut owner) => {
                poll_fn(|context| Pin::new(&mut owner).poll_next(context)).await;
            }
            None => pending().await,
        }
    };
    tokio::select! {
        () = control.closed() => "it closed the connection",
        () = left => "it left the bus",
    }
}

/// Returns when nobody can send commands any more. What was sent before there is a connection
/// cannot be done.
async fn commands_closed(commands: &mut mpsc::UnboundedReceiver<SetSize>) {
    while let Some(command) = commands.recv().await {
        (command.done)(Err("there is no connection to QEMU yet".to_owned()));
    }
}
