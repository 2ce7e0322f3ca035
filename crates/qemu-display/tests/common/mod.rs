// SPDX-License-Identifier: MIT OR Apache-2.0

//! A display, and a place to wait for what it says.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use qemu_display::{
    Address, Config, Consoles, Display, Event, Listening, Look, Picture, Screen, Status,
};
use zerocopy_test_qemu::LIMIT;

/// A display whose events can be waited for.
pub struct Watched {
    pub display: Display,
    events: Receiver<Event>,
    listening: RefCell<Vec<Listening>>,
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
            listening: RefCell::default(),
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

    /// Connects, and gives the screen of a console, which is listened to from now on.
    pub fn screen(&self, console: u32) -> Arc<Screen> {
        assert_eq!(self.connected(), Status::Connected);
        let screen = self.display.screen(console).expect("it was asked for");
        self.listening.borrow_mut().push(screen.listen());
        screen
    }

    /// Waits for a new picture of `screen`, and takes it.
    pub fn picture(&self, screen: &Screen) -> Picture {
        self.until(|_| match screen.look() {
            Look::News => screen.take().unwrap(),
            Look::Failed(error) => panic!("{error}"),
            _ => None,
        })
    }

    /// Asks for a size, and waits for QEMU's answer.
    pub fn set_size(&self, console: u32, size: (u32, u32)) -> Result<(), String> {
        let (sender, answers) = channel();
        let done = move |answer| sender.send(answer).unwrap();
        self.display.set_size(console, size, done);
        answers.recv_timeout(LIMIT).expect("an answer in time")
    }

    /// Asks for sizes until that is refused, which it is when nobody answers any more.
    pub fn until_refused(&self, console: u32) -> String {
        loop {
            if let Err(reason) = self.set_size(console, (640, 480)) {
                return reason;
            }
        }
    }

    /// Waits for the end of `screen`.
    pub fn failure(&self, screen: &Screen) -> qemu_display::Error {
        self.until(|_| match screen.look() {
            Look::Failed(error) => Some(error),
            _ => None,
        })
    }
}
