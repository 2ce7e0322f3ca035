// SPDX-License-Identifier: MIT OR Apache-2.0

//! One console of QEMU's: asked, and listened to.

use std::future::{pending, poll_fn};
use std::io::{self, ErrorKind};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_core::Stream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use zbus::connection::Builder;
use zbus::fdo::{PropertiesChangedStream, PropertiesProxy};
use zbus::proxy::CacheProperties;
use zbus::{Connection, Fd, MessageStream};

use crate::error::Error;
use crate::listener::serve;
use crate::proxies::ConsoleProxy;
use crate::screen::Screen;

/// The name that QEMU takes on a bus, and that it goes by without one.
const SERVICE: &str = "org.qemu";

/// Messages of a listener that are read ahead. Each may be a picture.
const READ_AHEAD: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// QEMU's answer to a listener too many (`DBUS_DISPLAY_ERROR_INVALID` in its ui/dbus-error.c).
const TAKEN: &str = "org.qemu.Display1.Error.Invalid";

/// Answers of QEMU's to wait for after a listener was closed: one, and one that was asked for after
/// it had come.
const ANSWERS: u32 = 2;

/// How often, and for how long, to try when QEMU still has the listener before.
const AGAIN_PAUSE: Duration = Duration::from_millis(5);
const AGAIN_LIMIT: Duration = Duration::from_secs(5);

/// Limit for QEMU's part in making a listener, as for each of its answers.
const LISTEN_LIMIT: Duration = Duration::from_secs(5);

/// How long a whole picture may take after the console has got another size. Guests that draw one do so at
/// once; an emulated processor on a busy machine takes a breath in between.
const WHOLE_LIMIT: Duration = Duration::from_millis(500);

/// A console.
pub struct Console {
    proxy: ConsoleProxy<'static>,
    properties: PropertiesProxy<'static>,
    /// For errors.
    address: String,
}

impl Console {
    /// The console of this number, whether there is one or not.
    pub async fn new(control: &Connection, id: u32, address: String) -> zbus::Result<Self> {
        let path = format!("/org/qemu/Display1/Console_{id}");
        Ok(Self {
            proxy: ConsoleProxy::builder(control)
                .path(path.clone())
                .cache_properties(CacheProperties::No)
                .build()
                .await?,
            properties: PropertiesProxy::builder(control)
                .destination(SERVICE)
                .path(path)
                .cache_properties(CacheProperties::No)
                .build()
                .await?,
            address,
        })
    }

    /// Whether it belongs to a graphics card, and is not a terminal of QEMU's own.
    pub async fn is_graphic(&self) -> zbus::Result<bool> {
        Ok(self.proxy.kind().await? == "Graphic")
    }

    /// Its name for people.
    pub async fn label(&self) -> zbus::Result<String> {
        self.proxy.label().await
    }

    /// Tells the guest in which size it is shown.
    pub async fn set_size(&self, (width, height): (u32, u32)) -> zbus::Result<()> {
        // Millimetres and positions are unknown.
        self.proxy.set_ui_info(0, 0, 0, 0, width, height).await
    }

    /// What will have changed of it from now on.
    async fn changes(&self) -> zbus::Result<PropertiesChangedStream> {
        self.properties.receive_properties_changed().await
    }

    /// Has QEMU say what the console shows, beginning with a whole picture.
    async fn listen(&self) -> zbus::Result<MessageStream> {
        let (ours, theirs) = UnixStream::pair()?;
        // QEMU is the server of this handshake and does nothing else until it is over: it must
        // not wait for the answer to the call, nor the other way round.
        let handshake = Builder::unix_stream(ours)
            .p2p()
            .max_queued(READ_AHEAD)
            .build_message_stream();
        let register = self.proxy.register_listener(Fd::from(theirs.as_fd()));
        let (messages, ()) = tokio::try_join!(handshake, register)?;
        Ok(messages)
    }

    /// The same, where QEMU may still have the listener before: it then refuses another one.
    async fn listen_anew(&self) -> zbus::Result<MessageStream> {
        let end = Instant::now() + AGAIN_LIMIT;
        loop {
            let listening = timeout(LISTEN_LIMIT, self.listen()).await;
            let slow = || io::Error::new(ErrorKind::TimedOut, "it made no listener in time");
            match listening.unwrap_or_else(|_| Err(slow().into())) {
                Err(zbus::Error::MethodError(name, ..))
                    if name == TAKEN && Instant::now() < end =>
                {
                    sleep(AGAIN_PAUSE).await;
                }
                done => return done,
            }
        }
    }

    /// Has QEMU say nothing more, and waits until it knows.
    ///
    /// QEMU 7.2 has room for one listener of each client. Over a bus it refuses another one until it
    /// has noticed that the one before is closed. Without a bus the next one takes that one's place,
    /// and is closed in its stead when that is noticed. One thread of QEMU's reads all sockets, in
    /// the order in which something happens to them: who has been answered has been noticed before.
    async fn close(&self, messages: MessageStream) {
        // It may be closed already.
        let _ = Connection::from(&messages).close().await;
        drop(messages);
        for _ in 0..ANSWERS {
            // Any answer will do. Without one, listening again fails and says why.
            let _ = self.proxy.width().await;
        }
    }

    /// Puts into `screen` what QEMU says, whenever somebody wants to know, until the connection
    /// ends. Returns why it did. `gone` says so of the connection on which QEMU is asked.
    pub async fn watch(
        &self,
        screen: &Arc<Screen>,
        mut gone: watch::Receiver<Option<Error>>,
    ) -> Error {
        let mut wanted = screen.listeners();
        let ended = |error: zbus::Error| Error::Gone {
            address: self.address.clone(),
            reason: error.to_string(),
        };
        loop {
            tokio::select! {
                _ = wanted.wait_for(|listeners| *listeners > 0) => {}
                error = is_gone(&mut gone) => return error,
            }
            let watched = async {
                // Since before QEMU is listened to.
                let changes = self.changes().await?;
                let messages = self.listen_anew().await?;
                let newer = self.proxy.interfaces().await.is_ok();
                Ok((changes, messages, newer))
            };
            let (mut changes, mut messages, newer) = match watched.await {
                Ok(watched) => watched,
                Err(error) => return ended(error),
            };
            tokio::select! {
                error = serve(&mut messages, screen, &self.address) => return error,
                // What comes now changes a picture that is not here yet: begin again.
                () = self.other_size(&mut changes, screen) => screen.forget(),
                () = is_unwanted(&mut wanted, &mut gone, newer) => screen.ignore(),
            }
            self.close(messages).await;
        }
    }

    /// Returns when the console has got another size, and no whole picture of that has come.
    ///
    /// A QEMU without shared memory does not say that the picture has another size before it is
    /// changed as a whole, and a screen of text never is: QEMU 7.2 then goes on with parts of a
    /// picture that nobody has. The console's size tells, and listening anew brings all of it.
    ///
    /// That is not for guests that draw what they set a mode for: QEMU before 8.0 tells a cursor's shape once,
    /// and what comes while nobody listens is lost.
    async fn other_size(&self, changes: &mut PropertiesChangedStream, screen: &Screen) {
        while poll_fn(|context| Pin::new(&mut *changes).poll_next(context))
            .await
            .is_some()
        {
            while self.has_other_size(screen).await {
                let pictures = screen.pictures();
                sleep(WHOLE_LIMIT).await;
                if screen.pictures() == pictures && self.has_other_size(screen).await {
                    return;
                }
            }
        }
        // Nobody can be asked any more; the listener goes on, or knows what has happened.
        pending::<()>().await;
    }

    /// Whether the console has another size than its picture, or has one and no picture.
    async fn has_other_size(&self, screen: &Screen) -> bool {
        match (self.proxy.width().await, self.proxy.height().await) {
            (Ok(width), Ok(height)) => screen.size() != Some((width, height)),
            _ => false,
        }
    }
}

/// Returns when nobody listens and QEMU need not say anything more.
///
/// A `newer` one is let go on until the connection ends. It never forgets a listener that was closed: it
/// goes on making a message of each change, and the error that comes of sending it, for each that it ever had
/// (QEMU 10; `dbus_display_listener_new` in its ui/dbus-listener.c keeps a reference that nobody drops).
async fn is_unwanted(
    wanted: &mut watch::Receiver<usize>,
    gone: &mut watch::Receiver<Option<Error>>,
    newer: bool,
) {
    loop {
        // Nobody can want anything any more where this fails.
        let unwanted = wanted.wait_for(|listeners| *listeners == 0).await.is_err();
        if unwanted || !newer {
            return;
        }
        tokio::select! {
            _ = wanted.wait_for(|listeners| *listeners > 0) => {}
            _ = is_gone(gone) => return,
        }
    }
}

/// Returns why the connection has ended, when it has.
async fn is_gone(gone: &mut watch::Receiver<Option<Error>>) -> Error {
    match gone
        .wait_for(Option::is_some)
        .await
        .map(|error| error.clone())
    {
        Ok(Some(error)) => error,
        // Nobody watches the connection any more: this ends as well.
        _ => pending().await,
    }
}
