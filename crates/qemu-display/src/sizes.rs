// SPDX-License-Identifier: MIT OR Apache-2.0

//! The sizes that QEMU is asked to tell guests, in their order.
//!
//! A console is asked one thing at a time. Of what comes meanwhile only the last is asked next, and
//! its answer is everybody's: QEMU hears the last request last, and never has more than one of a
//! console to answer, whoever asks and however often.

use std::collections::BTreeMap;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use zbus::Connection;

use crate::console::Console;

/// A wish for a size.
pub struct SetSize {
    /// Whose.
    pub console: u32,
    /// Width and height in pixels, 0x0 for no screen.
    pub size: (u32, u32),
    /// Is told what became of it.
    pub done: Box<dyn FnOnce(Result<(), String>) + Send>,
}

/// A queue for each console that was ever asked.
pub struct Sizes {
    control: Connection,
    queues: BTreeMap<u32, UnboundedSender<SetSize>>,
}

impl Sizes {
    /// Nothing was asked yet. `control` is the connection on which QEMU is.
    pub fn new(control: Connection) -> Self {
        Self {
            control,
            queues: BTreeMap::new(),
        }
    }

    /// Has QEMU asked, soon.
    pub fn ask(&mut self, wish: SetSize) {
        let queue = self.queues.entry(wish.console).or_insert_with(|| {
            let (sender, receiver) = unbounded_channel();
            // Ends with the runtime, that is with the connection.
            tokio::spawn(ask_in_turn(self.control.clone(), wish.console, receiver));
            sender
        });
        // Its task ends with this queue.
        let _ = queue.send(wish);
    }
}

async fn ask_in_turn(control: Connection, console: u32, mut wishes: UnboundedReceiver<SetSize>) {
    while let Some(first) = wishes.recv().await {
        let (mut size, mut told) = (first.size, vec![first.done]);
        while let Ok(later) = wishes.try_recv() {
            size = later.size;
            told.push(later.done);
        }
        let answer = ask(&control, console, size).await;
        let answer = answer.map_err(|error| error.to_string());
        for done in told {
            done(answer.clone());
        }
    }
}

async fn ask(control: &Connection, console: u32, size: (u32, u32)) -> zbus::Result<()> {
    let console = Console::new(control, console, String::new()).await?;
    console.set_size(size).await
}
