// SPDX-License-Identifier: MIT OR Apache-2.0

//! A display, and a place to wait for what it says.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use qemu_display::{Address, Config, Consoles, Display, Event, Look, Picture, Screen, Status};
use zerocopy_test_qemu::LIMIT;

/// A display whose events can be waited for.
pub struct Watched {
    pub display: Display,
    events: Receiver<Event>,
}

impl Watched {
    /// Begins to connect.
    pub fn start(address: Address, consoles: Consoles) -> Self {
        let (sender, events) = channel();
        let config = Config {
            address,
            consoles,
            notify: Arc::new(move |event| {
                // A test that is over listens no more.
                let _ = sender.send(event);
            }),
            log: Arc::new(|level, text| println!("{level:?}: {text}")),
        };
        Self {
            display: Display::start(config).unwrap(),
            events,
        }
    }

    /// Waits until `ready` gives something, looking after each event.
    pub fn until<T>(&self, mut ready: impl FnMut(&Display) -> Option<T>) -> T {
        loop {
            if let Some(value) = ready(&self.display) {
                return value;
            }
            self.events.recv_timeout(LIMIT).expect("an event in time");
        }
    }

    /// Waits for the end of connecting, however it ends.
    pub fn connected(&self) -> Status {
        self.until(|display| Some(display.status()).filter(|now| *now != Status::Connecting))
    }

    /// Connects, and gives the screen of a console.
    pub fn screen(&self, console: u32) -> Arc<Screen> {
        assert_eq!(self.connected(), Status::Connected);
        self.display.screen(console).expect("it was asked for")
    }

    /// Waits for a new picture of `screen`, and takes it.
    pub fn picture(&self, screen: &Screen) -> Picture {
        self.until(|_| match screen.look() {
            Look::News => screen.take().unwrap(),
            Look::Failed(error) => panic!("{error}"),
            _ => None,
        })
    }

    /// Waits for the end of `screen`.
    pub fn failure(&self, screen: &Screen) -> qemu_display::Error {
        self.until(|_| match screen.look() {
            Look::Failed(error) => Some(error),
            _ => None,
        })
    }
}
