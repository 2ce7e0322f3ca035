// SPDX-License-Identifier: MIT OR Apache-2.0

//! Capturing from PipeWire, without GStreamer.
//!
//! [`Capture`] is a thread that runs a PipeWire loop and nothing else: it connects to the daemon,
//! finds the target node, negotiates a format and takes frames as they come. It never waits for
//! anybody but PipeWire. What it has goes into an [`Inbox`], from which one consumer on another
//! thread takes it; what the consumer wants of it goes the other way as commands.
//!
//! | module | job |
//! | --- | --- |
//! | [`format`](mod@format) | pixel formats and their names in PipeWire and DRM |
//! | [`geometry`] | where the pixels are in the producer's memory, checked |
//! | [`offer`] | what is offered to the producer |
//! | [`negotiate`] | reading what it fixes, and answering that |
//! | [`memory`] | a producer's memory, mapped or read |
//! | [`dmabuf`] | a producer's memory on a device |
//! | [`timeline`] | explicit synchronization |
//! | [`frame`] | the loan of a buffer, and passing it on |
//! | [`damage`] | what of a picture has changed |
//! | [`meta`] | what else comes with a buffer |
//! | [`clock`] | capture times |
//! | [`inbox`] | from the loop thread to the consumer |
//! | `stream` | one PipeWire stream and its callbacks |
//! | `waits` | how long a stream waits for what |
//! | `buffers` | the buffers of a stream |
//! | `raw` | PipeWire's own structures for them |
//! | `data_loop` | PipeWire's second loop, run by the same thread |
//! | `registry` | which nodes there are |
//! | `worker` | the loop thread itself |

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use zerocopy_plugin_common::wait::Waker;

mod buffers;
pub mod clock;
pub mod damage;
mod data_loop;
pub mod dmabuf;
pub mod format;
pub mod frame;
pub mod geometry;
pub mod inbox;
pub mod memory;
pub mod meta;
pub mod negotiate;
pub mod offer;
mod raw;
mod registry;
mod stream;
pub mod timeline;
mod waits;
mod worker;

pub use clock::Monotonic;
pub use format::PixelFormat;
pub use inbox::{Inbox, Interest, Look};
pub use negotiate::StreamFormat;
pub use offer::{Offer, OfferEntry, Span};

use timeline::SyncNode;
use worker::Command;

/// The PipeWire daemon to talk to.
#[derive(Debug)]
pub enum Remote {
    /// The one that the environment names, as for every PipeWire client.
    Default,
    /// The one at the other end of this socket, for instance from the portal.
    Socket(OwnedFd),
}

/// The node to capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// By its id in the registry.
    Id(u32),
    /// By its `node.name` or `object.serial`.
    Object(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "PipeWire node {id}"),
            Self::Object(name) => write!(f, "PipeWire node '{name}'"),
        }
    }
}

/// How loud a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something is wrong, though not fatal.
    Warning,
    /// A step that happens a few times in a capture's life.
    Info,
    /// For who looks for a fault.
    Debug,
    /// Once a frame.
    Trace,
}

/// Where messages go.
pub type Log = Arc<dyn Fn(Level, fmt::Arguments<'_>) + Send + Sync>;

/// What a capture needs to know.
pub struct Config {
    /// The daemon.
    pub remote: Remote,
    /// The node.
    pub target: Target,
    /// The name under which our stream shows up in PipeWire's tools.
    pub name: String,
    /// Where timelines are, for explicit synchronization with a producer of DMA-BUFs; none where
    /// there are none.
    pub sync: Option<Arc<SyncNode>>,
    /// Where messages go.
    pub log: Log,
}

/// Why capturing cannot go on. The text says what was tried, on what, and what to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection to the daemon could be made.
    Connect(String),
    /// The target is not something to capture.
    Target(String),
    /// The daemon has gone away, or has refused us.
    Daemon(String),
    /// The stream could not be negotiated.
    Stream(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Connect(text) | Self::Target(text) | Self::Daemon(text) | Self::Stream(text)) =
            self;
        f.write_str(text)
    }
}

/// How far a capture has come; what it lacks when no frame comes follows from this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Asking the daemon which nodes there are.
    #[default]
    Searching,
    /// The target does not exist.
    Absent,
    /// A stream is set up; the session manager is to link it to the target. Over the portal's socket
    /// links are not seen.
    Linking,
    /// Linked, no format fixed.
    Negotiating,
    /// A format is fixed and buffers are being agreed on, or the producer pauses.
    Paused,
    /// The stream runs.
    Streaming,
}

impl Stage {
    const ALL: [Self; 6] = [
        Self::Searching,
        Self::Absent,
        Self::Linking,
        Self::Negotiating,
        Self::Paused,
        Self::Streaming,
    ];

    /// What to look at when no frame comes at this stage.
    pub fn advice(self) -> &'static str {
        match self {
            Self::Searching => "the PipeWire daemon has not answered",
            Self::Absent => "the node does not exist",
            Self::Linking => {
                "the stream was not seen to be linked to the node: is a session manager such as \
                 WirePlumber running, may this client see the node, and does the producer share a \
                 format with what is downstream?"
            }
            Self::Negotiating => {
                "the stream is linked, but the producer fixes no format: does it share one with \
                 what is downstream?"
            }
            Self::Paused => {
                "a format is agreed on, but the producer does not stream: is the desktop locked, \
                 or its screen off?"
            }
            Self::Streaming => {
                "the stream runs, but the producer draws nothing: is the desktop locked, or its \
                 screen off?"
            }
        }
    }
}

/// What is counted, by both threads, for anyone to read.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames that came with content.
    pub received: AtomicU64,
    /// Frames of which nothing was used, because a newer one came or downstream wanted fewer.
    pub dropped: AtomicU64,
    /// Frames that the producer marked as corrupted, or that lie outside their memory.
    pub corrupted: AtomicU64,
    /// Buffers without pixels, which carry only metadata such as the cursor's position.
    pub empty: AtomicU64,
    /// PipeWire buffers that are out of the producer's reach now.
    pub held: AtomicU64,
    stage: AtomicU8,
}

impl Counters {
    /// How far the capture has come.
    pub fn stage(&self) -> Stage {
        let value = usize::from(self.stage.load(Ordering::Relaxed));
        Stage::ALL.get(value).copied().unwrap_or_default()
    }

    fn set_stage(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }
}

/// A running capture. Dropping it ends the thread, and waits for that: for the daemon's last answers,
/// which take no time, or half a second where it hangs.
pub struct Capture {
    inbox: Arc<Inbox>,
    commands: pipewire::channel::Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").finish_non_exhaustive()
    }
}

impl Capture {
    /// Starts a capture thread that wakes its consumer by `waker`. Frames come after an
    /// [`offer`](Self::offer).
    ///
    /// Fails only when no thread can be had; everything else shows in the inbox.
    pub fn start(config: Config, waker: Waker, counters: Arc<Counters>) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new(waker, counters.clone()));
        let (commands, receiver) = pipewire::channel::channel();
        let link = worker::Link {
            inbox: inbox.clone(),
            counters,
            returns: Arc::new(frame::Returns::new(commands.clone())),
            log: config.log.clone(),
            sync: config.sync.clone(),
            next_buffer: std::cell::Cell::new(1),
        };
        let thread = thread::Builder::new()
            .name("pw-capture".into())
            .spawn(move || worker::run(config, link, receiver))?;
        Ok(Self {
            inbox,
            commands,
            thread: Some(thread),
        })
    }

    /// Where frames and news come.
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.inbox.stage()
    }

    /// Says what is taken from now on. The producer may fix another format in answer.
    pub fn offer(&self, offer: Offer) {
        // Fails only when the thread has ended, which shows in the inbox.
        let _ = self.commands.send(Command::Offer(offer));
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Before the end: the producer keeps its buffers for the next consumer, and one that was not
        // given back stays missing.
        self.inbox.discard();
        let _ = self.commands.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; there is nothing to add to it here.
            let _ = thread.join();
        }
        self.inbox.discard();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    pub use super::frame::tests::{
        frame_in_two_memories, frames_in_dmabufs, frames_in_memory, tiled_and_cropped, undrawn,
    };

    use std::os::fd::AsFd;

    use super::frame::{Frame, tests::frame_of};
    use super::*;

    /// A capture without a thread: what comes is what the test puts there.
    pub fn idle(waker: Waker, counters: &Arc<Counters>) -> Capture {
        let (commands, _) = pipewire::channel::channel();
        Capture {
            inbox: Arc::new(Inbox::new(waker, counters.clone())),
            commands,
            thread: None,
        }
    }

    /// A frame of BGRx, one pixel high.
    pub fn frame(width: u32, counters: &Arc<Counters>) -> Box<Frame> {
        frame_of(&[0; 64], (width, 1), 0, 8, counters)
    }

    /// A frame of BGRx, 2x2 pixels in rows of `stride` bytes.
    pub fn frame_with_stride(stride: i32, counters: &Arc<Counters>) -> Box<Frame> {
        frame_of(&[0; 64], (2, 2), stride, 8, counters)
    }

    pub fn put_frame(capture: &Capture, frame: Box<Frame>) {
        capture.inbox.put_frame(frame);
        capture.inbox.tell();
    }

    /// A buffer, of which `made` was made, ends on the loop thread.
    pub fn lose_buffer(capture: &Capture, made: impl std::any::Any + Send + Sync) {
        let memory = dmabuf::tests::memory(&[0; 64]);
        let remains = capture.inbox.remains();
        let (buffer, _) = dmabuf::DmaBuffer::new(&[memory.as_fd()], remains).unwrap();
        buffer.keep(|| Ok::<_, ()>(made)).unwrap();
        thread::spawn(|| drop(buffer)).join().unwrap();
    }

    pub fn put_vanished(capture: &Capture, reason: &str) {
        capture.inbox.put_vanished(reason.into());
        capture.inbox.tell();
    }

    #[test]
    fn every_stage_is_told_apart() {
        let counters = Counters::default();
        for (index, stage) in Stage::ALL.into_iter().enumerate() {
            assert_eq!(stage as usize, index);
            counters.set_stage(stage);
            assert_eq!(counters.stage(), stage);
        }
    }
}
