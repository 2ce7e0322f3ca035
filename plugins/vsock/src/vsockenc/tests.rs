// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures as resource ids, with descriptors and a device that are not real.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_check::Harness;
use helix_protocol::message::{ErrorCode, ErrorMessage, FrameRequest};
use helix_protocol::{Message, Payload, encode};
use zerocopy_test_support::peer::{KEYFRAME, Link, Peer, Seen, Then};

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
    let text = "never heard of it".to_owned();
    let tag = None;
    link.send(encode::error(1, &ErrorMessage { code, text, tag }));
}

#[test]
fn a_resource_goes_as_its_id_and_is_never_mapped() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::ResourceId);
    // A descriptor that cannot be mapped at all.
    let (pipe, _other_end) = nix::unistd::pipe().unwrap();
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
    encoder.harness.push_event(gst::event::FlushStart::new());
    encoder.harness.push_event(gst::event::FlushStop::new(true));
    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
    encoder
        .harness
        .push_event(gst::event::Segment::new(&segment));
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

#[test]
fn dmabufs_are_preferred_where_they_may_have_ids() {
    let peer = Peer::answering();
    for (transfer, first) in [(Transfer::Auto, true), (Transfer::Pixels, false)] {
        let encoder = Encoder::new(&peer, transfer);
        let caps = encoder.element.static_pad("sink").unwrap().query_caps(None);
        assert_eq!(
            super::formats::is_dmabuf(&caps),
            first,
            "{transfer:?}: {caps}"
        );
    }
}
