// SPDX-License-Identifier: MIT OR Apache-2.0

//! A client of our own, pictures that are known, and a decoder that shows what came of them.
#![allow(dead_code, reason = "each test file uses its part of this")]

pub mod metrics;
pub mod program;
pub mod qemu;
pub mod resources;
pub mod scripted;

use std::time::Duration;

use gst::prelude::*;
use gst_video::VideoFrameExt;
use helix_host::{Config, STALL_LIMIT, Server};
use helix_protocol::connection::{ConnectionError, Event};
use helix_protocol::encode::{self, Head};
use helix_protocol::message::{
    CODEC_H264, Capabilities, Config as WireConfig, ErrorMessage, FrameRequest, FrameResponse,
    Hello, PixelFormat,
};
use helix_protocol::wait::{Deadline, Waiter};
use helix_protocol::{Address, Connection, Envelope, Limits, Message, Stream};

/// Catches a hang, measures nothing.
pub const LONG: Duration = Duration::from_secs(20);

/// A host on a free TCP port of the loopback, with x264enc.
pub fn config() -> Config {
    Config {
        listen: vec!["tcp:127.0.0.1:0".parse().unwrap()],
        encoder: "x264enc".to_owned(),
        scanouts: Vec::new(),
        qemu: None,
        metrics: None,
        token_file: None,
        allow_cids: Vec::new(),
        resolver: None,
        max_clients: 64,
        max_frame_bytes: 64 * 1024 * 1024,
        stall_limit: STALL_LIMIT,
    }
}

pub fn start(config: Config) -> Server {
    Server::start(config).unwrap()
}

pub fn with_encoder(encoder: &str) -> Server {
    start(Config {
        encoder: encoder.to_owned(),
        ..config()
    })
}

/// What a client that can do all says of itself.
pub fn hello() -> Hello {
    Hello {
        version: 1,
        max_in_flight: 2,
        capabilities: Capabilities(u64::MAX),
        codecs: CODEC_H264,
        max_message: 64 * 1024 * 1024,
        max_width: 8192,
        max_height: 8192,
        name: Some("a test".to_owned()),
        ..Hello::default()
    }
}

/// A client.
pub struct Peer {
    pub connection: Connection<Vec<u8>>,
    pub waiter: Waiter,
}

/// An encoded frame that came.
#[derive(Debug)]
pub struct Encoded {
    pub session_id: u16,
    pub response: FrameResponse,
    pub bytes: Vec<u8>,
}

impl Peer {
    pub fn of(server: &Server) -> Self {
        Self::connect(&server.addresses()[0])
    }

    pub fn connect(address: &Address) -> Self {
        let mut waiter = Waiter::new().unwrap();
        let stream = Stream::connect(address, &mut waiter, Deadline::after(LONG)).unwrap();
        let connection = Connection::new(stream, Limits::client(), &waiter).unwrap();
        Self { connection, waiter }
    }

    pub fn send(&mut self, head: Head) {
        self.connection.send(head);
    }

    /// Hands everything to the system.
    pub fn flush(&mut self) {
        while self.connection.queued() > 0 {
            let event = self
                .connection
                .next(&mut self.waiter, Deadline::after(LONG));
            assert!(matches!(event, Ok(Event::Drained)), "{event:?}");
        }
    }

    /// The next message, the system's permitting, or why there is none.
    pub fn try_next(&mut self) -> Result<Envelope, ConnectionError> {
        let deadline = Deadline::after(LONG);
        loop {
            match self.connection.next(&mut self.waiter, deadline)? {
                Event::Message(envelope) => return Ok(envelope),
                Event::Drained | Event::Woken => {}
                Event::TimedOut => panic!("nothing came"),
            }
        }
    }

    pub fn next(&mut self) -> Envelope {
        self.try_next().unwrap()
    }

    /// Whether nothing comes for so long.
    pub fn is_quiet_for(&mut self, time: Duration) -> bool {
        let deadline = Deadline::after(time);
        loop {
            match self.connection.next(&mut self.waiter, deadline).unwrap() {
                Event::Message(_) => return false,
                Event::Drained | Event::Woken => {}
                Event::TimedOut => return true,
            }
        }
    }

    pub fn next_frame(&mut self) -> Encoded {
        let Envelope {
            session_id,
            message,
        } = self.next();
        match message {
            Message::FrameResponse(response, bytes) => Encoded {
                session_id,
                response,
                bytes: bytes.to_vec(),
            },
            other => panic!("no frame but {other:?}"),
        }
    }

    pub fn next_error(&mut self) -> ErrorMessage {
        match self.next().message {
            Message::Error(error) => error,
            other => panic!("no error but {other:?}"),
        }
    }

    /// Expects that the host closes.
    pub fn expect_end(&mut self) {
        match self.try_next() {
            Err(ConnectionError::Closed | ConnectionError::Io(_)) => {}
            other => panic!("not closed but {other:?}"),
        }
    }

    /// PING, and PONG as the very next message.
    pub fn expect_pong(&mut self) {
        self.send(encode::ping(7));
        let envelope = self.next();
        assert!(matches!(envelope.message, Message::Pong), "{envelope:?}");
        assert_eq!(envelope.session_id, 7);
    }

    /// HELLO with PING behind it, and what the host says of itself.
    pub fn greet(&mut self, hello: &Hello) -> Hello {
        let (head, tlvs) = encode::hello(5, hello);
        self.connection.send_with(head, tlvs);
        self.send(encode::ping(6));
        let response = match self.next() {
            Envelope {
                session_id: 5,
                message: Message::HelloResp(response),
            } => response,
            other => panic!("no HELLO_RESP but {other:?}"),
        };
        let envelope = self.next();
        assert!(matches!(envelope.message, Message::Pong), "{envelope:?}");
        response
    }

    /// CONFIG_REQ, and the values in force.
    pub fn configure(&mut self, config: &WireConfig) -> WireConfig {
        self.send(encode::config_req(1, config));
        match self.next().message {
            Message::ConfigResp(config) => config,
            other => panic!("no CONFIG_RESP but {other:?}"),
        }
    }

    pub fn request(&mut self, request: &FrameRequest, pixels: Vec<u8>) {
        let head = encode::frame_request(1, request, pixels.len() as u32);
        self.connection.send_with(head, pixels);
    }

    /// Sends a picture and waits for what becomes of it.
    pub fn encode(&mut self, picture: &Rgb, format: PixelFormat, pts: i64, key: bool) -> Encoded {
        let (request, pixels) = picture.request(format, 0, pts, key);
        self.request(&request, pixels);
        self.next_frame()
    }

    pub fn subscribe(&mut self, scanout: u32) {
        self.send(encode::subscribe(scanout));
        let envelope = self.next();
        let Message::SubscribeResp {
            scanout_id,
            success,
        } = envelope.message
        else {
            panic!("no SUBSCRIBE_RESP but {envelope:?}");
        };
        assert_eq!((scanout_id, success), (scanout, true));
        assert_eq!(u32::from(envelope.session_id), scanout);
    }
}

/// A picture that is known: three bytes a pixel.
#[derive(Clone, PartialEq, Eq)]
pub struct Rgb {
    pub width: usize,
    pub height: usize,
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Rgb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rgb({}x{})", self.width, self.height)
    }
}

impl Rgb {
    pub fn new(width: usize, height: usize, pixel: impl Fn(usize, usize) -> [u8; 3]) -> Self {
        let bytes = (0..height)
            .flat_map(|y| (0..width).map(move |x| (x, y)))
            .flat_map(|(x, y)| pixel(x, y))
            .collect();
        Self {
            width,
            height,
            bytes,
        }
    }

    /// Red on the left, blue on the right, brighter downwards, and a bar that moves with `time`.
    /// Swapped colours and sheared rows are far from it.
    pub fn pattern(width: usize, height: usize, time: usize) -> Self {
        Self::new(width, height, |x, y| {
            let light = (40 + 160 * y / height) as u8;
            let bar = (x + width - (time * 4) % width) % width < width / 8;
            match (bar, 2 * x < width) {
                (true, _) => [light, light, light],
                (false, true) => [light, 20, 30],
                (false, false) => [20, 60, light],
            }
        })
    }

    /// What cannot be predicted costs bits.
    pub fn noise(width: usize, height: usize, seed: u32) -> Self {
        let mut state = seed.wrapping_mul(2_654_435_761).max(1);
        let mut bytes = vec![0; width * height * 3];
        for byte in &mut bytes {
            // xorshift32
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            *byte = (state >> 24) as u8;
        }
        Self {
            width,
            height,
            bytes,
        }
    }

    /// Noise that an encoder may also leave out.
    pub fn grain(width: usize, height: usize, seed: u32) -> Self {
        let mut picture = Self::noise(width, height, seed);
        for byte in &mut picture.bytes {
            *byte = 100 + *byte / 8;
        }
        picture
    }

    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        let at = (y * self.width + x) * 3;
        [self.bytes[at], self.bytes[at + 1], self.bytes[at + 2]]
    }

    /// The upper left part.
    pub fn cropped(&self, width: usize, height: usize) -> Self {
        Self::new(width, height, |x, y| self.pixel(x, y))
    }

    /// A FRAME_REQUEST for it and its pixels; `margin` bytes are added to each row.
    pub fn request(
        &self,
        format: PixelFormat,
        margin: usize,
        pts: i64,
        key: bool,
    ) -> (FrameRequest, Vec<u8>) {
        let (stride, pixels) = match format {
            PixelFormat::Bgra => self.packed(margin, |[r, g, b]| [b, g, r, 0]),
            PixelFormat::Rgba => self.packed(margin, |[r, g, b]| [r, g, b, 0]),
            PixelFormat::Nv12 => (self.width, self.nv12()),
        };
        let request = FrameRequest {
            width: self.width as u32,
            height: self.height as u32,
            format: format.fourcc(),
            stride: stride as u32,
            pts,
            duration: 16_666_667,
            force_keyframe: key,
            ..FrameRequest::default()
        };
        (request, pixels)
    }

    fn packed(&self, margin: usize, order: impl Fn([u8; 3]) -> [u8; 4]) -> (usize, Vec<u8>) {
        let mut pixels = Vec::new();
        for y in 0..self.height {
            pixels.extend((0..self.width).flat_map(|x| order(self.pixel(x, y))));
            // Something that shows if it is taken for pixels.
            pixels.extend(std::iter::repeat_n(0x99, margin));
        }
        (self.width * 4 + margin, pixels)
    }

    /// BT.601, limited range, as GStreamer takes an NV12 of this size to be.
    fn nv12(&self) -> Vec<u8> {
        let yuv = |[r, g, b]: [u8; 3]| {
            let [r, g, b] = [r, g, b].map(|c| f32::from(c) / 255.0);
            let y = 0.299 * r + 0.587 * g + 0.114 * b;
            [
                16.0 + 219.0 * y,
                128.0 + 224.0 * (b - y) / 1.772,
                128.0 + 224.0 * (r - y) / 1.402,
            ]
        };
        let at = |x, y| yuv(self.pixel(x, y));
        let mut bytes = Vec::new();
        for y in 0..self.height {
            bytes.extend((0..self.width).map(|x| at(x, y)[0].round() as u8));
        }
        for y in (0..self.height).step_by(2) {
            for x in (0..self.width).step_by(2) {
                let four = [at(x, y), at(x + 1, y), at(x, y + 1), at(x + 1, y + 1)];
                for part in [1, 2] {
                    let sum: f32 = four.iter().map(|yuv| yuv[part]).sum();
                    bytes.push((sum / 4.0).round() as u8);
                }
            }
        }
        bytes
    }

    /// Peak signal-to-noise ratio in dB; over 30 the eye finds little.
    pub fn psnr(&self, other: &Self) -> f64 {
        assert_eq!((self.width, self.height), (other.width, other.height));
        let sum: f64 = self
            .bytes
            .iter()
            .zip(&other.bytes)
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
            .sum();
        let error = sum / self.bytes.len() as f64;
        10.0 * (255.0_f64.powi(2) / error.max(1e-9)).log10()
    }
}

/// What a decoder that knows nothing of us makes of a stream.
pub fn decode<'a>(units: impl IntoIterator<Item = &'a [u8]>) -> Vec<Rgb> {
    gst::init().unwrap();
    let pipeline = gst::parse::launch(
        "appsrc name=src format=time caps=video/x-h264,stream-format=byte-stream,alignment=au ! \
         h264parse ! avdec_h264 max-threads=1 ! videoconvert ! video/x-raw,format=RGB ! \
         appsink name=sink sync=false max-buffers=0",
    )
    .unwrap()
    .downcast::<gst::Pipeline>()
    .unwrap();
    let source = pipeline
        .by_name("src")
        .and_downcast::<gst_app::AppSrc>()
        .unwrap();
    let sink = pipeline
        .by_name("sink")
        .and_downcast::<gst_app::AppSink>()
        .unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    for (index, unit) in (0..).zip(units) {
        let mut buffer = gst::Buffer::from_slice(unit.to_vec());
        buffer
            .make_mut()
            .set_pts(gst::ClockTime::from_mseconds(20 * index));
        source.push_buffer(buffer).unwrap();
    }
    source.end_of_stream().unwrap();
    let mut pictures = Vec::new();
    while let Ok(sample) = sink.pull_sample() {
        let info = gst_video::VideoInfo::from_caps(sample.caps().unwrap()).unwrap();
        let frame =
            gst_video::VideoFrameRef::from_buffer_ref_readable(sample.buffer().unwrap(), &info)
                .unwrap();
        let stride = frame.plane_stride()[0] as usize;
        let data = frame.plane_data(0).unwrap();
        pictures.push(Rgb::new(
            info.width() as usize,
            info.height() as usize,
            |x, y| {
                let at = y * stride + x * 3;
                [data[at], data[at + 1], data[at + 2]]
            },
        ));
    }
    let error = pipeline
        .bus()
        .and_then(|bus| bus.pop_filtered(&[gst::MessageType::Error]));
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(error.is_none(), "{error:?}");
    pictures
}

/// NAL unit types of an access unit.
pub fn nal_types(unit: &[u8]) -> Vec<u8> {
    helix_protocol::h264::nal_units(unit)
        .map(|nal| nal[0] & 0x1f)
        .collect()
}

/// Whether decoding can start at this access unit: SPS, PPS, IDR.
pub fn is_start(unit: &[u8]) -> bool {
    let types = nal_types(unit);
    [7, 8, 5].iter().all(|wanted| types.contains(wanted))
}
