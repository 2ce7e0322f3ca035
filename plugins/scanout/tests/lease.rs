// SPDX-License-Identifier: MIT OR Apache-2.0

//! scanoutsrc and the socket that lends scanouts.

mod common;

use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use common::init;
use gst::prelude::*;
use helix_protocol::{Message, encode};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tempfile::TempDir;
use zerocopy_test_support::peer::{KEYFRAME, LONG, Peer, Seen, Then};

/// What the manager's side saw.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    /// Command, width, height.
    Request(u8, u32, u32),
    Closed,
}

/// A reply: status, scanout id, name. `None` = silence.
type Reply = Option<(u8, u32, &'static str)>;

/// A manager that gives each request the next of its replies, and a descriptor to each lease.
struct Manager {
    dir: TempDir,
    events: Receiver<Event>,
    /// The other ends of the descriptors that were lent.
    lent: Receiver<UnixStream>,
    /// Its ends of the connections, to close them from outside.
    connections: Receiver<UnixStream>,
}

impl Manager {
    fn new(replies: impl IntoIterator<Item = Reply> + Send + 'static) -> Self {
        Self::closing_after(replies, usize::MAX)
    }

    /// One that closes the first connection after so many replies.
    fn closing_after(
        replies: impl IntoIterator<Item = Reply> + Send + 'static,
        mut answers: usize,
    ) -> Self {
        init();
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("drm.sock")).unwrap();
        let (tell, events) = channel();
        let (give, lent) = channel();
        let (show, connections) = channel();
        let mut replies = replies.into_iter().collect::<Vec<_>>().into_iter();
        // Ends with the process: nobody needs to wake it.
        thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                let _ = show.send(connection.try_clone().unwrap());
                let mut request = [0; 9];
                while answers > 0 && connection.read_exact(&mut request).is_ok() {
                    let number =
                        |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
                    let event = Event::Request(request[0], number(1), number(5));
                    if let Some(Some(reply)) = replies.next() {
                        let (here, there) = UnixStream::pair().unwrap();
                        answer(&connection, reply, &there);
                        let _ = give.send(here);
                        answers -= 1;
                    }
                    let _ = tell.send(event);
                }
                // The test may still have it.
                let _ = connection.shutdown(Shutdown::Both);
                answers = usize::MAX;
                let _ = tell.send(Event::Closed);
            }
        });
        Self {
            dir,
            events,
            lent,
            connections,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("drm.sock")
    }

    fn next(&self) -> Event {
        self.events.recv_timeout(LONG).expect("a request")
    }

    fn is_silent(&self) -> bool {
        self.events.recv_timeout(Duration::ZERO) == Err(RecvTimeoutError::Timeout)
    }
}

fn answer(connection: &UnixStream, (status, id, name): (u8, u32, &str), lent: &UnixStream) {
    let mut reply = [0; 69];
    reply[0] = status;
    reply[1..5].copy_from_slice(&id.to_le_bytes());
    reply[5..5 + name.len()].copy_from_slice(name.as_bytes());
    let fds = [lent.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if status == 0 { &rights[..] } else { &[] };
    // In two parts, as a stream socket may.
    let parts = reply.split_at(7);
    let slices = [IoSlice::new(parts.0)];
    sendmsg::<()>(
        connection.as_raw_fd(),
        &slices,
        rights,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    let slices = [IoSlice::new(parts.1)];
    sendmsg::<()>(
        connection.as_raw_fd(),
        &slices,
        &[],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
}

fn source(properties: &str) -> (gst::Pipeline, gst::Bus) {
    init();
    let description = format!("scanoutsrc tcp-host=127.0.0.1 {properties} ! fakesink sync=false");
    let pipeline = gst::parse::launch(&description).unwrap();
    let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
    let bus = pipeline.bus().unwrap();
    (pipeline, bus)
}

fn error_of(properties: &str) -> String {
    let (pipeline, bus) = source(properties);
    // Of the state change, or of the streaming thread: the bus has it in either case.
    let _ = pipeline.set_state(gst::State::Playing);
    let limit = gst::ClockTime::try_from(LONG).unwrap();
    let message = bus.timed_pop_filtered(limit, &[gst::MessageType::Error]);
    let message = message.expect("an error");
    let gst::MessageView::Error(error) = message.view() else {
        unreachable!()
    };
    let text = error.error().to_string();
    pipeline.set_state(gst::State::Null).unwrap();
    bus.set_flushing(true);
    text
}

fn subscribed(peer: &Peer) -> u32 {
    peer.wait_for(|seen| match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::Subscribe { scanout_id } => Some(scanout_id),
            _ => None,
        },
        _ => None,
    })
}

/// A host with a screen for everybody.
fn host() -> Peer {
    Peer::new(|link, envelope| {
        if let Message::Subscribe { scanout_id } = envelope.message {
            link.send(encode::subscribe_resp(scanout_id, true));
            link.respond(envelope.session_id, 0, true, KEYFRAME);
        }
        link.pong(envelope);
        Then::GoOn
    })
}

#[test]
fn a_scanout_is_lent_from_ready_to_null() {
    let manager = Manager::new([Some((0, 7, "Virtual-8")), Some((0, 7, ""))]);
    let peer = host();
    let (pipeline, bus) = source(&format!(
        "tcp-port={} drm-socket={} width=1280 height=720",
        peer.port(),
        manager.path().display()
    ));
    assert!(manager.is_silent());
    pipeline.set_state(gst::State::Ready).unwrap();
    assert_eq!(manager.next(), Event::Request(1, 1280, 720));
    for _ in 0..2 {
        pipeline.set_state(gst::State::Playing).unwrap();
        assert_eq!(subscribed(&peer), 7);
        pipeline.set_state(gst::State::Ready).unwrap();
    }
    assert!(manager.is_silent());
    let mut lent = manager.lent.recv_timeout(LONG).unwrap();
    lent.set_nonblocking(true).unwrap();
    let still_open = lent.read(&mut [0]).unwrap_err();
    assert_eq!(still_open.kind(), std::io::ErrorKind::WouldBlock);
    pipeline.set_state(gst::State::Null).unwrap();
    assert_eq!(manager.next(), Event::Request(2, 7, 0));
    assert_eq!(manager.next(), Event::Closed);
    // The descriptor is closed with it.
    assert_eq!(lent.read(&mut [0]).unwrap(), 0);
    bus.set_flushing(true);
}

#[test]
fn nothing_is_lent_to_who_knows_which() {
    let manager = Manager::new([]);
    let (pipeline, bus) = source(&format!(
        "scanout-id=1 drm-socket={}",
        manager.path().display()
    ));
    pipeline.set_state(gst::State::Ready).unwrap();
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(manager.is_silent());
    bus.set_flushing(true);
}

#[test]
fn a_lease_that_has_ended_is_taken_anew_at_the_next_start() {
    let replies = [
        Some((0, 3, "Virtual-4")),
        Some((0, 5, "Virtual-6")),
        Some((0, 5, "")),
    ];
    let manager = Manager::closing_after(replies, 1);
    let peer = host();
    let (pipeline, bus) = source(&format!(
        "tcp-port={} drm-socket={}",
        peer.port(),
        manager.path().display()
    ));
    pipeline.set_state(gst::State::Ready).unwrap();
    assert_eq!(manager.next(), Event::Request(1, 1920, 1080));
    assert_eq!(manager.next(), Event::Closed);
    pipeline.set_state(gst::State::Playing).unwrap();
    assert_eq!(manager.next(), Event::Request(1, 1920, 1080));
    assert_eq!(subscribed(&peer), 5);
    pipeline.set_state(gst::State::Null).unwrap();
    assert_eq!(manager.next(), Event::Request(2, 5, 0));
    bus.set_flushing(true);
}

#[test]
fn a_lease_that_ends_while_playing_is_taken_anew_when_the_host_is_called_again() {
    let replies = [
        Some((0, 3, "Virtual-4")),
        Some((1, 0, "not yet")),
        Some((0, 5, "Virtual-6")),
        Some((0, 5, "")),
    ];
    let mut manager = Manager::new(replies);
    let connections = std::mem::replace(&mut manager.connections, channel().1);
    // The whole machine ends: first the manager, then the host.
    let peer = Peer::new(move |link, envelope| {
        link.pong(envelope);
        let Message::Subscribe { scanout_id } = envelope.message else {
            return Then::GoOn;
        };
        link.send(encode::subscribe_resp(scanout_id, true));
        link.respond(envelope.session_id, 0, true, KEYFRAME);
        if scanout_id == 5 {
            return Then::GoOn;
        }
        if let Ok(lease) = connections.try_recv() {
            lease.shutdown(Shutdown::Both).unwrap();
        }
        Then::CloseAfterSending
    });
    let (pipeline, bus) = source(&format!(
        "tcp-port={} drm-socket={} reconnect-timeout=20000",
        peer.port(),
        manager.path().display()
    ));
    pipeline.set_state(gst::State::Playing).unwrap();
    assert_eq!(subscribed(&peer), 3);
    assert_eq!(subscribed(&peer), 5);
    pipeline.set_state(gst::State::Null).unwrap();
    let asks = Event::Request(1, 1920, 1080);
    for event in [&asks, &Event::Closed, &asks, &Event::Closed, &asks] {
        assert_eq!(manager.next(), *event);
    }
    assert_eq!(manager.next(), Event::Request(2, 5, 0));
    bus.set_flushing(true);
}

#[test]
fn a_manager_without_a_scanout_is_quoted() {
    let manager = Manager::new([Some((1, 0, "no free connector"))]);
    let error = error_of(&format!("drm-socket={}", manager.path().display()));
    for part in [
        "no free connector",
        "1920x1080",
        "drm.sock",
        "HELIX_SCANOUT_ID",
    ] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert_eq!(manager.next(), Event::Request(1, 1920, 1080));
    assert_eq!(manager.next(), Event::Closed);
}

#[test]
fn an_id_that_no_message_can_carry_is_an_error() {
    let manager = Manager::new([Some((0, 65_536, ""))]);
    let error = error_of(&format!("drm-socket={}", manager.path().display()));
    assert!(error.contains("scanout 65536"), "{error}");
}

#[test]
fn a_manager_that_does_not_answer_is_an_error_within_the_timeout() {
    let manager = Manager::new([None]);
    let socket = manager.path();
    let error = error_of(&format!("drm-socket={} timeout=100", socket.display()));
    assert!(
        error.contains("is that helix-drm-manager's socket"),
        "{error}"
    );
}

#[test]
fn a_manager_that_takes_its_time_holds_up_no_state_change() {
    let manager = Manager::new([None]);
    let (pipeline, bus) = source(&format!(
        "timeout=0 drm-socket={}",
        manager.path().display()
    ));
    // In a thread, so that a wait without an end would be a failure.
    let (tell, told) = channel();
    thread::spawn({
        let bus = bus.clone();
        move || {
            pipeline.set_state(gst::State::Playing).unwrap();
            // The streaming thread begins, and has nothing to do but wait.
            let limit = gst::ClockTime::try_from(LONG).unwrap();
            bus.iter_timed_filtered(limit, &[gst::MessageType::StreamStatus])
                .find(|message| match message.view() {
                    gst::MessageView::StreamStatus(status) => {
                        status.get().0 == gst::StreamStatusType::Enter
                    }
                    _ => false,
                })
                .expect("a streaming thread");
            pipeline.set_state(gst::State::Null).unwrap();
            let _ = tell.send(());
        }
    });
    assert_eq!(manager.next(), Event::Request(1, 1920, 1080));
    told.recv_timeout(LONG).expect("the state changes end");
    assert_eq!(manager.next(), Event::Closed);
    bus.set_flushing(true);
}

#[test]
fn a_socket_that_is_not_there_or_cannot_be_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("drm.sock");
    let error = error_of(&format!("drm-socket={}", socket.display()));
    assert!(error.contains(socket.to_str().unwrap()), "{error}");
    assert!(error.contains("is helix-drm-manager listening"), "{error}");
    // Longer than a socket address holds: never cut.
    let long = dir.path().join("x".repeat(120));
    let error = error_of(&format!("drm-socket={}", long.display()));
    assert!(error.contains("set drm-socket to a shorter one"), "{error}");
}
