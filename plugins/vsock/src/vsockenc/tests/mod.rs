// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures as resource ids, with descriptors and a device that are not real.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::channel;

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;
use gst_check::Harness;
use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage, FrameRequest, RequestTag};
use helix_protocol::wait::Waiter;
use helix_protocol::{Envelope, Message, Payload, encode};
use zerocopy_test_support::peer::{Greets, KEYFRAME, LONG, Link, Peer, Seen, Then, hello};

use super::imp::lock;
use super::{Transfer, VsockEnc};
use crate::fake::{self, Device};

mod fallback;
mod writers;

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
        Self::with_timeout(peer, transfer, 20_000)
    }

    /// `timeout` in ms.
    fn with_timeout(peer: &Peer, transfer: Transfer, timeout: u32) -> Self {
        let mut encoder = Self::without_caps(peer, transfer, timeout);
        encoder.harness.set_src_caps_str(
            "video/x-raw(memory:DMABuf),format=BGRx,width=64,height=48,framerate=60/1",
        );
        encoder
    }

    fn without_caps(peer: &Peer, transfer: Transfer, timeout: u32) -> Self {
        gst::init().unwrap();
        let element: VsockEnc = glib::Object::builder()
            .property("tcp-host", "127.0.0.1")
            .property("tcp-port", peer.port())
            .property("transfer", transfer)
            .property("timeout", timeout)
            .build();
        let device = Arc::new(Device::new(1));
        *lock(&element.imp().fake_resources) = Some(device.clone());
        let bus = gst::Bus::new();
        element.set_bus(Some(&bus));
        let harness = Harness::with_element(&element, Some("sink"), Some("src"));
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
    assert_eq!(encoder.ways(), ["resource-id"]);
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
fn memory_that_can_neither_be_named_nor_read_is_an_error() {
    let peer = Peer::answering();
    let mut encoder = Encoder::new(&peer, Transfer::Auto);
    let (pipe, _other_end) = unmappable();
    encoder.push(&Encoder::dmabuf(pipe)).unwrap();
    let error = encoder.error();
    let address = format!("127.0.0.1:{}", peer.port());
    for said in [
        "its memory cannot be mapped for reading",
        &address,
        "capsfilter video/x-raw",
    ] {
        assert!(error.contains(said), "{error}");
    }
}

/// A waiter with a descriptor that is no epoll any more.
fn broken_waiter() -> Waiter {
    let waiter = Waiter::new().unwrap();
    // It is the only one to watch this.
    let (watched, _other_end) = nix::unistd::pipe().unwrap();
    waiter.register(watched.as_fd()).unwrap();
    let is_ours = |fd: &std::fs::DirEntry| {
        let info = std::fs::read_to_string(fd.path()).unwrap_or_default();
        info.lines().any(|line| {
            let mut words = line.split_whitespace();
            words.next() == Some("tfd:") && words.next() == Some(&watched.as_raw_fd().to_string())
        })
    };
    let epoll = std::fs::read_dir("/proc/self/fdinfo")
        .unwrap()
        .map(Result::unwrap)
        .find(is_ours)
        .expect("a waiter is an epoll");
    let epoll: i32 = epoll.file_name().to_str().unwrap().parse().unwrap();
    let other = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: both are open, and `waiter` owns the second one as before.
    assert_eq!(unsafe { libc::dup2(other.as_raw_fd(), epoll) }, epoll);
    waiter
}

#[test]
fn a_wait_that_fails_is_an_error_on_the_bus() {
    let peer = Peer::new(|_, _| Then::GoOn);
    let mut encoder = Encoder::with_timeout(&peer, Transfer::Pixels, 0);
    let buffer = Encoder::dmabuf(fake::memfd(SIZE));
    // As many as may be open.
    for _ in 0..2 {
        encoder.push(&buffer).unwrap();
    }
    lock(&encoder.element.imp().streaming)
        .as_mut()
        .unwrap()
        .waiter = Some(broken_waiter());
    assert_eq!(encoder.push(&buffer), Err(gst::FlowError::Error));
    let error = encoder.error();
    assert!(error.contains("wait for the host: "), "{error}");
}

#[test]
fn caps_that_come_while_the_element_stops_are_no_error() {
    let peer = Peer::greeting(Greets::Script, |_, _| Then::GoOn);
    let mut encoder = Encoder::without_caps(&peer, Transfer::Auto, 0);
    // As stopping does, and then, a moment later, ends the flow.
    lock(&encoder.element.imp().waker)
        .as_ref()
        .unwrap()
        .cancel();
    let caps = "video/x-raw,format=BGRx,width=64,height=48,framerate=60/1";
    encoder
        .harness
        .push_event(gst::event::StreamStart::new("stream"));
    let caps = gst::event::Caps::new(&gst::Caps::from_str(caps).unwrap());
    assert!(encoder.harness.push_event(caps));
    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
    assert!(
        encoder
            .harness
            .push_event(gst::event::Segment::new(&segment))
    );
    let buffer = gst::Buffer::from_slice([0; SIZE]);
    assert_eq!(encoder.push(&buffer), Err(gst::FlowError::Flushing));
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
