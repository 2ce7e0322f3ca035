// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures as resource ids, with descriptors and a device that are not real.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_check::Harness;
use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage, FrameRequest, RequestTag};
use helix_protocol::{Envelope, Message, Payload, encode};
use zerocopy_test_support::peer::{Greets, KEYFRAME, Link, Peer, Seen, Then, hello};

use super::{Transfer, VsockEnc};
use crate::fake::{self, Device};

const SIZE: usize = 64 * 48 * 4;
const FRAME: gst::ClockTime = gst::ClockTime::from_nseconds(16_666_667);

struct Encoder {
    element: VsockEnc,
    harness: Harness,
    bus: gst::Bus,
    device: Arc<Device>,
    frames: u64,
}

impl Drop for Encoder {
    fn drop(&mut self) {
        // Messages that nobody has read hold the element, which holds the bus.
        self.bus.set_flushing(true);
    }
}

impl Encoder {
    fn new(peer: &Peer, transfer: Transfer) -> Self {
        gst::init().unwrap();
        let element: VsockEnc = glib::Object::builder()
            .property("tcp-host", "127.0.0.1")
            .property("tcp-port", peer.port())
            .property("transfer", transfer)
            .build();
        let device = Arc::new(Device::new(1));
        *super::imp::lock(&element.imp().fake_resources) = Some(device.clone());
        let bus = gst::Bus::new();
        element.set_bus(Some(&bus));
        let mut harness = Harness::with_element(&element, Some("sink"), Some("src"));
        harness.set_src_caps_str(
            "video/x-raw(memory:DMABuf),format=BGRx,width=64,height=48,framerate=60/1",
        );
        Self {
            element,
            harness,
            bus,
            device,
            frames: 0,
        }
    }

    /// A buffer around a descriptor that is taken for a DMA-BUF.
    fn dmabuf(fd: OwnedFd) -> gst::Buffer {
        let mut buffer = gst::Buffer::new();
        let memory = fake::dmabuf(fd, SIZE);
        buffer.get_mut().unwrap().append_memory(memory);
        buffer
    }

    /// One that the device knows by this id.
    fn known(&self, id: u32) -> gst::Buffer {
        let fd = fake::memfd(SIZE);
        self.device.add(&fd, id, SIZE);
        Self::dmabuf(fd)
    }

    /// Pushes a buffer with the next frame's time; it may be held by others, as in a pool.
    fn push(&mut self, buffer: &gst::Buffer) -> Result<gst::FlowSuccess, gst::FlowError> {
        let mut buffer = buffer.copy();
        buffer.make_mut().set_pts(FRAME * self.frames);
        self.frames += 1;
        self.harness.push(buffer)
    }

    fn flush(&mut self) {
        let segment = gst::FormattedSegment::<gst::ClockTime>::new();
        for event in [
            gst::event::FlushStart::new(),
            gst::event::FlushStop::new(true),
            gst::event::Segment::new(&segment),
        ] {
            assert!(self.harness.push_event(event));
        }
    }

    /// The PTS of the next access unit, in frames.
    fn pull(&mut self) -> u64 {
        let pts = self.harness.pull().expect("an encoded frame").pts();
        pts.unwrap().nseconds() / FRAME.nseconds()
    }

    fn stat<T: for<'a> glib::value::FromValue<'a> + 'static>(&self, name: &str) -> T {
        let stats: gst::Structure = self.element.property("stats");
        stats.value(name).unwrap().get().unwrap()
    }

    /// The error on the bus.
    fn error(&self) -> String {
        let message = self
            .bus
            .timed_pop_filtered(gst::ClockTime::from_seconds(20), &[gst::MessageType::Error])
            .expect("an error on the bus");
        let gst::MessageView::Error(error) = message.view() else {
            unreachable!()
        };
        format!("{} {:?}", error.error(), error.debug())
    }

    /// `transfer` of each message about the connection so far.
    fn ways(&self) -> Vec<String> {
        std::iter::from_fn(|| self.bus.pop_filtered(&[gst::MessageType::Element]))
            .filter_map(|message| message.structure()?.get::<String>("transfer").ok())
            .collect()
    }
}

/// A host that says that it resolves resource ids.
fn resolving_host(script: impl FnMut(&mut Link, &Envelope) -> Then + Send + 'static) -> Peer {
    Peer::greeting(Greets::With(hello(Capabilities::RESOURCE_IDS)), script)
}

/// The same, and that it takes request ids.
fn naming_host(script: impl FnMut(&mut Link, &Envelope) -> Then + Send + 'static) -> Peer {
    let capabilities = Capabilities::RESOURCE_IDS.or(Capabilities::REQUEST_IDS);
    Peer::greeting(Greets::With(hello(capabilities)), script)
}

fn request(seen: Seen) -> Option<(FrameRequest, Option<Payload>)> {
    match seen {
        Seen::Message(envelope) => match envelope.message {
            Message::FrameRequest(request, pixels) => Some((request, pixels)),
            _ => None,
        },
        _ => None,
    }
}

fn refuse(link: &mut Link, code: ErrorCode) {
    refuse_named(link, code, None);
}

fn refuse_named(link: &mut Link, code: ErrorCode, tag: Option<RequestTag>) {
    let text = "never heard of it".to_owned();
    link.send(encode::error(1, &ErrorMessage { code, text, tag }));
}

/// A descriptor that cannot be mapped, and whose writers are done; it stays so with the other one.
fn unmappable() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    assert_eq!(nix::unistd::write(&writer, b"!"), Ok(1));
    (reader, writer)
}

#[test]
fn a_resource_goes_as_its_id_and_is_never_mapped() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    let (pipe, _other_end) = unmappable();
    encoder.device.add(&pipe, 77, SIZE);
    let buffer = Encoder::dmabuf(pipe);
    for number in 0..3 {
        encoder.push(&buffer).unwrap();
        assert_eq!(encoder.pull(), number);
        let (request, pixels) = peer.wait_for(request);
        assert_eq!(request.resource_id, 77);
        assert!(pixels.is_none());
        assert_eq!(
            (
                request.width,
                request.height,
                request.stride,
                request.format
            ),
            (64, 48, 256, 0x3432_5241)
        );
    }
    assert_eq!(encoder.stat::<u64>("resource-frames"), 3);
    assert_eq!(encoder.stat::<u64>("pixel-bytes"), 0);
    assert_eq!(encoder.stat::<String>("transfer"), "resource-id");
    assert_eq!(encoder.ways(), ["pixels", "resource-id"]);
}

#[test]
fn a_resource_stays_until_its_reply_even_after_a_flush() {
    let (open, opened) = channel();
    let mut first: Option<FrameRequest> = None;
    let peer = Peer::new(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            match first.take() {
                None if request.resource_id == 5 => {
                    first = Some(*request);
                    open.send(()).unwrap();
                }
                first => {
                    for request in first.iter().chain([request]) {
                        link.respond(1, request.pts, true, KEYFRAME);
                    }
                }
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    let watched = encoder.known(5);
    // Nobody but the buffer that is pushed refers to it.
    let memory = watched.memory(0).unwrap();
    encoder.push(&watched).unwrap();
    drop(watched);
    opened.recv().unwrap();
    encoder.flush();
    assert!(is_shared(&memory), "the host may still look at it");
    let other = encoder.known(6);
    encoder.push(&other).unwrap();
    assert_eq!(encoder.pull(), 1, "the first one was flushed");
    assert!(!is_shared(&memory));
}

/// Whether others have this memory too.
fn is_shared(memory: &gst::Memory) -> bool {
    // SAFETY: the memory is alive, and the count is read atomically.
    unsafe { (*memory.as_ptr()).mini_object.refcount > 1 }
}

#[test]
fn a_picture_that_has_no_id_is_an_error_where_one_is_asked_for() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    let foreign = Encoder::dmabuf(fake::memfd(SIZE));
    assert_eq!(encoder.push(&foreign), Err(gst::FlowError::Error));
    let error = encoder.error();
    assert!(
        error.contains("not a resource of this virtio-gpu device"),
        "{error}"
    );
    assert!(error.contains("transfer=auto would send pixels"), "{error}");
}

#[test]
fn a_host_that_refuses_the_only_way_is_an_error() {
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(..) = &envelope.message {
            refuse(link, ErrorCode::RESOURCE_NOT_FOUND);
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    let buffer = encoder.known(31);
    encoder.push(&buffer).unwrap();
    let error = encoder.error();
    assert!(error.contains("the host refuses resource 31"), "{error}");
    assert!(error.contains("never heard of it"), "{error}");
}

#[test]
fn a_legacy_host_gets_ids_only_when_they_are_asked_for() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let buffer = encoder.known(8);
    encoder.push(&buffer).unwrap();
    encoder.pull();
    let (request, pixels) = peer.wait_for(request);
    assert_eq!(request.resource_id, 0);
    assert_eq!(pixels.expect("pixels").len(), SIZE);
    assert_eq!(encoder.stat::<String>("transfer"), "pixels");
}

#[test]
fn pixels_are_all_that_transfer_pixels_sends() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::Pixels);
    let buffer = encoder.known(8);
    encoder.push(&buffer).unwrap();
    encoder.pull();
    assert_eq!(peer.wait_for(request).0.resource_id, 0);
    assert_eq!(
        encoder
            .device
            .asked
            .load(std::sync::atomic::Ordering::Relaxed),
        0
    );
}

/// Whether the element would rather have DMA-BUFs than other memory.
fn prefers_dmabufs(encoder: &Encoder) -> bool {
    let caps = encoder.element.static_pad("sink").unwrap().query_caps(None);
    super::formats::is_dmabuf(&caps)
}

#[test]
fn dmabufs_are_preferred_where_their_ids_are_of_use() {
    let legacy = Peer::answering();
    assert!(prefers_dmabufs(&Encoder::new(
        &legacy,
        Transfer::ResourceId
    )));
    assert!(!prefers_dmabufs(&Encoder::new(&legacy, Transfer::Auto)));
    assert!(!prefers_dmabufs(&Encoder::new(&legacy, Transfer::Pixels)));

    let resolving = resolving_host(|_, _| Then::GoOn);
    let mut encoder = Encoder::new(&resolving, Transfer::Auto);
    // It is known when upstream is told to ask.
    while encoder.harness.pull_upstream_event().unwrap().type_() != gst::EventType::Reconfigure {}
    assert!(prefers_dmabufs(&encoder));
}

#[test]
fn a_host_that_refuses_ids_gets_each_picture_as_pixels() {
    for code in [
        ErrorCode::RESOURCE_NOT_FOUND,
        ErrorCode::NO_NATIVE_TEXTURE,
        ErrorCode::NO_NATIVE_SURFACE,
    ] {
        let peer = resolving_host(move |link, envelope| {
            match &envelope.message {
                Message::FrameRequest(_, None) => refuse(link, code),
                Message::FrameRequest(request, Some(_)) => link.answer(request),
                _ => {}
            }
            link.pong(envelope);
            Then::GoOn
        });
        let mut encoder = Encoder::new(&peer, Transfer::Auto);
        let buffers = [encoder.known(1), encoder.known(2), encoder.known(3)];
        for number in 0..8 {
            encoder.push(&buffers[number % 3]).unwrap();
        }
        let numbers: Vec<_> = (0..8).map(|_| encoder.pull()).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(encoder.stat::<u64>("dropped"), 0);
        assert_eq!(encoder.stat::<String>("transfer"), "pixels");
        assert_eq!(encoder.ways(), ["pixels", "resource-id", "pixels"]);
        assert!(
            encoder
                .bus
                .pop_filtered(&[gst::MessageType::Warning])
                .is_none()
        );
    }
}

/// Two resources, of which the host can use one.
const GOOD: u32 = 1;
const BAD: u32 = 2;

#[test]
fn what_was_sent_behind_a_refused_picture_comes_after_it() {
    let mut refused = false;
    behind_a_refused_picture(&resolving_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            // Refuses the bad one when the next has come too.
            if std::mem::take(&mut refused) {
                refuse(link, ErrorCode::NO_NATIVE_SURFACE);
            }
            if request.resource_id == BAD {
                refused = true;
            } else {
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    }));
}

#[test]
fn what_was_answered_before_the_refusal_comes_after_it_too() {
    let mut refused = None;
    behind_a_refused_picture(&naming_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.resource_id == BAD {
                refused = Some(request.tag);
            } else {
                link.answer(request);
                if let Some(tag) = refused.take() {
                    refuse_named(link, ErrorCode::NO_NATIVE_SURFACE, Some(tag));
                }
            }
        }
        link.pong(envelope);
        Then::GoOn
    }));
}

fn behind_a_refused_picture(peer: &Peer) {
    let mut encoder = Encoder::new(peer, Transfer::Auto);
    let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
    encoder.push(&good).unwrap();
    assert_eq!(encoder.pull(), 0);
    for buffer in [&bad, &good, &bad, &good] {
        encoder.push(buffer).unwrap();
    }
    let numbers: Vec<_> = (0..4).map(|_| encoder.pull()).collect();
    assert_eq!(numbers, [1, 2, 3, 4]);
    assert_eq!(encoder.stat::<u64>("dropped"), 0);
    let sent: Vec<_> = (0..7)
        .map(|_| {
            let (request, _) = peer.wait_for(request);
            (request.pts as u64 / FRAME.nseconds(), request.resource_id)
        })
        .collect();
    let again = [(1, 0), (2, GOOD)];
    assert_eq!(
        sent[..5],
        [&[(0, GOOD), (1, BAD), (2, GOOD)][..], &again].concat()
    );
    // The bad one is known for it now; the good one is not.
    assert_eq!(sent[5..], [(3, 0), (4, GOOD)]);
}

#[test]
fn a_host_that_keeps_resources_without_an_answer_is_called_anew() {
    // Answers good ones only.
    let mut unanswered = 0;
    let peer = naming_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.resource_id == GOOD {
                link.answer(request);
            } else {
                unanswered += 1;
                assert!(unanswered < 8, "it goes on for ever");
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    encoder.element.set_property("max-in-flight", 1u32);
    encoder.element.set_property("timeout", 200u32);
    let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
    while encoder.stat::<u64>("reconnects") == 0 {
        encoder.push(&good).unwrap();
        encoder.push(&bad).unwrap();
    }
    let unanswered = std::iter::from_fn(|| Some(peer.next()))
        .take_while(|seen| !matches!(seen, Seen::Closed))
        .filter_map(request)
        .filter(|(request, _)| request.resource_id == BAD);
    assert_eq!(unanswered.count(), 4);
}

#[test]
fn a_refused_picture_that_was_flushed_is_not_sent_again() {
    let mut bad = None;
    let peer = naming_host(move |link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            if request.resource_id == BAD {
                bad = Some(request.tag);
            } else {
                // By now the other one is flushed.
                if let Some(tag) = bad.take() {
                    refuse_named(link, ErrorCode::NO_NATIVE_SURFACE, Some(tag));
                }
                link.answer(request);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
    encoder.push(&good).unwrap();
    assert_eq!(encoder.pull(), 0);
    encoder.push(&bad).unwrap();
    let mut sent: Vec<_> = (0..2)
        .map(|_| peer.wait_for(request).0.resource_id)
        .collect();
    encoder.flush();
    encoder.push(&good).unwrap();
    assert_eq!(encoder.pull(), 2);
    encoder.push(&good).unwrap();
    assert_eq!(encoder.pull(), 3);
    sent.extend((0..2).map(|_| peer.wait_for(request).0.resource_id));
    assert_eq!(sent, [GOOD, BAD, GOOD, GOOD]);
}

#[test]
fn a_stream_goes_on_from_a_keyframe_where_answers_are_not_used() {
    let mut refused = false;
    let peer = resolving_host(move |link, envelope| {
        match &envelope.message {
            Message::FrameRequest(request, _) if request.resource_id == BAD => refused = true,
            Message::FrameRequest(request, _) => {
                if std::mem::take(&mut refused) {
                    refuse(link, ErrorCode::NO_NATIVE_SURFACE);
                }
                link.answer(request);
            }
            _ => {}
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let (good, bad) = (encoder.known(GOOD), encoder.known(BAD));
    for buffer in [&good, &bad, &good] {
        encoder.push(buffer).unwrap();
    }
    for number in 0..3 {
        assert_eq!(encoder.pull(), number);
    }
    let forced: Vec<_> = (0..5)
        .map(|_| peer.wait_for(request).0.force_keyframe)
        .collect();
    assert_eq!(forced, [true, false, false, true, false]);
}

#[test]
fn a_refused_picture_arrives_with_its_pixels() {
    let peer = resolving_host(|link, envelope| {
        match &envelope.message {
            Message::FrameRequest(_, None) => refuse(link, ErrorCode::RESOURCE_NOT_FOUND),
            Message::FrameRequest(request, Some(_)) => link.answer(request),
            _ => {}
        }
        Then::GoOn
    });
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let fd = fake::memfd(SIZE);
    let picture: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    assert_eq!(nix::unistd::write(&fd, &picture), Ok(SIZE));
    encoder.device.add(&fd, 4, SIZE);
    let buffer = Encoder::dmabuf(fd);
    encoder.push(&buffer).unwrap();
    encoder.pull();
    assert_eq!(peer.wait_for(request).0.resource_id, 4);
    let (request, pixels) = peer.wait_for(request);
    assert_eq!(request.resource_id, 0);
    assert!(request.force_keyframe, "it still is the first one");
    assert_eq!(*pixels.unwrap(), *picture);
}

#[test]
fn memory_that_can_neither_be_named_nor_read_is_an_error() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let (pipe, _other_end) = unmappable();
    encoder.push(&Encoder::dmabuf(pipe)).unwrap();
    let error = encoder.error();
    assert!(
        error.contains("its memory cannot be mapped for reading"),
        "{error}"
    );
}

#[test]
fn a_picture_is_sent_when_what_draws_it_is_done() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    let (reader, writer) = nix::unistd::pipe().unwrap();
    encoder.device.add(&reader, 3, SIZE);
    let buffer = Encoder::dmabuf(reader);
    let done = std::thread::spawn(move || {
        assert_eq!(nix::unistd::write(&writer, b"!"), Ok(1));
        writer
    });
    encoder.push(&buffer).unwrap();
    assert_eq!(encoder.pull(), 0);
    done.join().unwrap();
}

#[cfg(feature = "v1_24")]
#[test]
fn dma_drm_caps_say_what_the_pixels_are() {
    for (drm_format, fourcc) in [("XR24", 0x3432_5241), ("AB24", 0x3432_4241)] {
        let peer = Peer::answering();
        let mut encoder = Encoder::new(&peer, Transfer::Auto);
        encoder.harness.set_src_caps_str(&format!(
            "video/x-raw(memory:DMABuf),format=DMA_DRM,drm-format={drm_format},width=64,height=48,\
             framerate=60/1"
        ));
        let buffer = Encoder::dmabuf(fake::memfd(SIZE));
        encoder.push(&buffer).unwrap();
        encoder.pull();
        let (request, pixels) = peer.wait_for(request);
        assert_eq!((request.format, request.stride), (fourcc, 256));
        assert_eq!(pixels.expect("pixels").len(), SIZE);
    }
}
