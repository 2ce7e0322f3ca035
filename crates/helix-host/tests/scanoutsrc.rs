// SPDX-License-Identifier: MIT OR Apache-2.0

//! The whole way of a virtual machine's screen: a stock QEMU, helix-host, scanoutsrc, a decoder.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::sync::mpsc::{TryRecvError, channel};
use std::thread;
use std::time::Duration;

use common::program::Running;
use common::{config, start};
use gst::prelude::*;
use helix_host::{Config, ScanoutSpec, Server};
use helix_protocol::h264::nal_units;
use helix_protocol::{Address, encode};
use zerocopy_test_qemu::ppm::Rgb;
use zerocopy_test_qemu::real::{Bus, Qemu};
use zerocopy_test_qemu::{LIMIT, eventually};

fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstscanout::plugin_register_static().unwrap();
    });
}

/// A host at `listen` of the QEMU at `address`, as the command line says both.
fn host(listen: &str, address: &str) -> Server {
    start(Config {
        listen: vec![listen.parse().unwrap()],
        qemu: Some(address.parse().unwrap()),
        metrics: Some("tcp:127.0.0.1:0".parse().unwrap()),
        ..config()
    })
}

fn over_qmp(qemu: &Qemu) -> String {
    format!("qmp:{}", qemu.qmp().display())
}

/// scanoutsrc and a decoder. Ends when dropped, by a panic too.
struct Client {
    pipeline: gst::Pipeline,
    sink: gst_app::AppSink,
}

impl Client {
    /// Watches scanout 0 of the host at this address, with more properties.
    fn start(address: &Address, properties: &str) -> Self {
        init();
        let place = match address {
            Address::Tcp { port, .. } => format!("tcp-host=127.0.0.1 tcp-port={port}"),
            Address::Unix(path) => format!("socket-path={}", path.display()),
            Address::Vsock { .. } => unreachable!("no test listens there"),
        };
        // A blinking text cursor is a frame now and then: a decoder must not hold one back (L27).
        let pipeline = gst::parse::launch(&format!(
            "scanoutsrc name=src {place} scanout-id=0 {properties} ! h264parse ! avdec_h264 \
             max-threads=1 ! videoconvert ! video/x-raw,format=RGB ! appsink name=sink sync=false"
        ))
        .unwrap()
        .downcast::<gst::Pipeline>()
        .unwrap();
        let sink = pipeline.by_name("sink").and_downcast::<gst_app::AppSink>();
        pipeline.set_state(gst::State::Playing).unwrap();
        Self {
            sink: sink.unwrap(),
            pipeline,
        }
    }

    fn next(&self) -> Rgb {
        let limit = gst::ClockTime::try_from(LIMIT).unwrap();
        let sample = self.sink.try_pull_sample(limit).unwrap_or_else(|| {
            let bus = self.pipeline.bus().unwrap();
            panic!(
                "no picture: {:?}",
                bus.pop_filtered(&[gst::MessageType::Error])
            )
        });
        let caps = sample.caps().unwrap().structure(0).unwrap();
        let side = |name| caps.get::<i32>(name).unwrap() as usize;
        let (width, height) = (side("width"), side("height"));
        let map = sample.buffer().unwrap().map_readable().unwrap();
        let stride = map.len() / height;
        let rows = map.chunks(stride);
        Rgb {
            width,
            height,
            bytes: rows.flat_map(|row| &row[..width * 3]).copied().collect(),
        }
    }

    /// Waits until the decoder shows what QEMU does.
    fn shows_the_same(&self, qemu: &Qemu) {
        loop {
            let picture = self.next();
            let shown = qemu.screendump();
            if shown.colours() > 1 && difference(&picture, &shown) < 3.0 {
                return;
            }
        }
    }

    /// Waits until it has found a host so many times again, or more often, and forgets what it got before.
    fn is_back(&self, times: u64) {
        eventually("the client to be back", || {
            (self.stat("reconnects") >= times).then_some(())
        });
        self.forget();
    }

    /// What it has got so far is of no interest.
    fn forget(&self) {
        while self.sink.try_pull_sample(gst::ClockTime::ZERO).is_some() {}
    }

    fn stat(&self, name: &str) -> u64 {
        let source = self.pipeline.by_name("src").unwrap();
        let stats = source.property::<gst::Structure>("stats");
        stats.get(name).unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// The mean difference of two pictures' bytes; over 255 if they have other sizes.
fn difference(a: &Rgb, b: &Rgb) -> f64 {
    if (a.width, a.height) != (b.width, b.height) {
        return f64::INFINITY;
    }
    let pairs = a.bytes.iter().zip(&b.bytes);
    let sum: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 / a.bytes.len() as f64
}

#[test]
fn a_screen_of_qemu_comes_out_of_a_decoder_as_qemu_shows_it() {
    // It has a VGA's text screen for its firmware, and takes sizes as graphics cards of guests do.
    let qemu = Qemu::start("dbus,p2p=on", &["-device", "virtio-vga"]);
    let server = host("tcp:127.0.0.1:0", &over_qmp(&qemu));
    let properties = "enable=true width=1280 height=800";
    Client::start(&server.addresses()[0], properties).shows_the_same(&qemu);
}

#[test]
fn qemu_host_and_client_are_restarted_in_each_order() {
    restarted_in_each_order(Bus::qemu_with_vga, "reconnect-timeout=60000");
}

#[test]
fn who_switches_the_screen_on_survives_restarts_in_each_order_too() {
    let properties = "enable=true width=1280 height=800 reconnect-timeout=60000";
    restarted_in_each_order(|bus| bus.qemu(&["-device", "virtio-vga"]), properties);
}

fn restarted_in_each_order(start_qemu: impl Fn(&Bus) -> Qemu, properties: &str) {
    let folder = tempfile::tempdir().unwrap();
    let listen = format!("unix:{}", folder.path().join("helix").display());
    let bus = Bus::start();
    let address = format!("dbus:{}", bus.address());
    let mut qemu = start_qemu(&bus);
    let mut server = host(&listen, &address);
    let start = || Client::start(&listen.parse().unwrap(), properties);
    let mut client = start();
    client.shows_the_same(&qemu);
    // Each goes and comes, first alone and then with another one gone when it comes.
    qemu.kill();
    client.forget();
    qemu = start_qemu(&bus);
    client.shows_the_same(&qemu);
    assert_eq!(client.stat("reconnects"), 0, "the host has stayed");

    server.stop();
    server = host(&listen, &address);
    client.is_back(1);
    client.shows_the_same(&qemu);
    assert_eq!(client.stat("reconnects"), 1);

    drop(client);
    client = start();
    client.shows_the_same(&qemu);

    qemu.kill();
    server.stop();
    qemu = start_qemu(&bus);
    server = host(&listen, &address);
    client.is_back(1);
    client.shows_the_same(&qemu);

    server.stop();
    qemu.kill();
    server = host(&listen, &address);
    qemu = start_qemu(&bus);
    client.is_back(2);
    client.shows_the_same(&qemu);

    drop(client);
    qemu.kill();
    client = start();
    qemu = start_qemu(&bus);
    client.shows_the_same(&qemu);

    drop(client);
    server.stop();
    server = host(&listen, &address);
    client = start();
    client.shows_the_same(&qemu);
    drop((client, server));
}

#[test]
fn a_host_that_is_killed_harms_neither_qemu_nor_its_client() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("helix");
    let listen = format!("unix:{}", socket.display());
    let bus = Bus::start();
    let on_bus = format!("dbus:{}", bus.address());
    let mut qemu = bus.qemu_with_vga();
    let run = || {
        let mut host = Running::start(&["--listen", &listen, "--qemu", &on_bus]);
        host.address();
        host
    };
    let kill = |mut host: Running| {
        // SIGKILL: it says goodbye to nobody, and leaves its socket.
        host.child.kill().unwrap();
        host.child.wait().unwrap();
        assert!(socket.exists());
    };
    let mut host = run();
    let client = Client::start(&listen.parse().unwrap(), "reconnect-timeout=60000");
    client.shows_the_same(&qemu);

    kill(host);
    assert!(qemu.screendump().colours() > 1, "QEMU goes on");
    host = run();
    client.is_back(1);
    client.shows_the_same(&qemu);

    kill(host);
    qemu.kill();
    qemu = bus.qemu_with_vga();
    host = run();
    client.is_back(2);
    client.shows_the_same(&qemu);

    qemu.kill();
    kill(host);
    let _host = run();
    qemu = bus.qemu_with_vga();
    client.is_back(3);
    client.shows_the_same(&qemu);
}

/// The parameter sets of an access unit (NAL unit types 7 and 8).
fn parameter_sets(unit: &[u8]) -> Vec<Vec<u8>> {
    nal_units(unit)
        .filter(|unit| [7, 8].contains(&(unit[0] & 0x1f)))
        .map(<[u8]>::to_vec)
        .collect()
}

#[test]
fn a_bitrate_set_while_playing_changes_the_stream_and_does_not_restart_it() {
    // openh264 begins anew by itself, with parameter sets of another level.
    for (encoder, goes_on) in [("x264enc", true), ("openh264enc", false)] {
        let server = start(Config {
            encoder: encoder.to_owned(),
            // Much detail, and no cuts, at which an encoder would begin anew.
            scanouts: vec![ScanoutSpec {
                id: 0,
                description: "videotestsrc is-live=true pattern=zone-plate kx2=8 ky2=8 kt=1 ! \
                              video/x-raw,width=320,height=240,framerate=60/1"
                    .to_owned(),
            }],
            ..config()
        });
        init();
        let Address::Tcp { port, .. } = server.addresses()[0] else {
            unreachable!("it listens over TCP")
        };
        let pipeline = gst::parse::launch(&format!(
            "scanoutsrc name=src tcp-host=127.0.0.1 tcp-port={port} scanout-id=0 bitrate=400000 ! \
             appsink name=sink sync=false"
        ));
        let pipeline = pipeline.unwrap().downcast::<gst::Pipeline>().unwrap();
        let sink = pipeline.by_name("sink").and_downcast::<gst_app::AppSink>();
        let (source, sink) = (pipeline.by_name("src").unwrap(), sink.unwrap());
        pipeline.set_state(gst::State::Playing).unwrap();
        let limit = gst::ClockTime::try_from(LIMIT).unwrap();
        let mut begun: Option<(gst::Caps, Vec<Vec<u8>>)> = None;
        let mut since_keyframe = 0;
        // Bytes of 60 frames, after 60 in which the encoder gets there.
        let mut bytes = |bits: i32| {
            source.set_property("bitrate", bits);
            let mut sum = 0;
            for index in 0..120 {
                let sample = sink.try_pull_sample(limit).expect("a frame");
                let buffer = sample.buffer().unwrap();
                let unit = buffer.map_readable().unwrap();
                let sets = parameter_sets(&unit);
                let caps = sample.caps_owned().unwrap();
                if let Some((first_caps, first_sets)) = &begun {
                    assert!(!buffer.flags().contains(gst::BufferFlags::DISCONT));
                    since_keyframe += 1;
                    let delta = buffer.flags().contains(gst::BufferFlags::DELTA_UNIT);
                    if !delta && goes_on {
                        // Those that come all the time.
                        assert_eq!(since_keyframe, 60);
                        assert_eq!((&caps, &sets), (first_caps, first_sets));
                        since_keyframe = 0;
                    }
                } else {
                    begun = Some((caps, sets));
                }
                if index >= 60 {
                    sum += unit.len();
                }
            }
            sum
        };
        let sums = [400_000, 1_600_000, 400_000].map(&mut bytes);
        assert!(sums[1] > 2 * sums[0], "{encoder}: {sums:?}");
        assert!(sums[1] > 2 * sums[2], "{encoder}: {sums:?}");
        let stats = source.property::<gst::Structure>("stats");
        assert_eq!(stats.get::<u64>("reconnects"), Ok(0));
        pipeline.set_state(gst::State::Null).unwrap();
    }
}

#[test]
fn one_that_never_reads_costs_sixty_three_others_nothing() {
    let qemu = Qemu::with_vga("dbus,p2p=on");
    let folder = tempfile::tempdir().unwrap();
    let listen = format!("unix:{}", folder.path().join("helix").display());
    let server = host(&listen, &over_qmp(&qemu));
    // It subscribes, asks for one keyframe after the other, and takes none.
    let mut rude = UnixStream::connect(folder.path().join("helix")).unwrap();
    rude.write_all(&encode::subscribe(0)).unwrap();
    rude.set_nonblocking(true).unwrap();
    let (over, is_over) = channel::<()>();
    let asks = thread::spawn(move || {
        while is_over.try_recv() == Err(TryRecvError::Empty) {
            // Until the host, which can send no more, reads no more either.
            let _ = rude.write(&encode::keyframe_req(0));
            thread::sleep(Duration::from_millis(20));
        }
        rude
    });
    let address = &server.addresses()[0];
    let clients: Vec<_> = (0..62).map(|_| Source::start(address)).collect();
    let seen = Client::start(address, "");
    seen.shows_the_same(&qemu);
    for client in &clients {
        // The text cursor blinks: frames come on.
        let before = client.frames();
        eventually("more frames", || {
            (client.frames() > before + 2).then_some(())
        });
        assert_eq!(client.errors(), 0);
    }
    // What the rude one does not take is not kept for it. The others have begun, and miss nothing.
    let before = dropped(&server);
    eventually("frames that are dropped", || {
        (dropped(&server) > before).then_some(())
    });
    // There is no place for another one, and there is when one has gone.
    let late = Client::start(address, "reconnect-timeout=60000");
    let limit = gst::ClockTime::try_from(LIMIT).unwrap();
    let bus = late.pipeline.bus().unwrap();
    let told = bus.timed_pop_filtered(limit, &[gst::MessageType::Element]);
    let state = told.unwrap().structure().unwrap().get::<String>("state");
    assert_eq!(state.as_deref(), Ok("reconnecting"));
    drop(clients);
    late.shows_the_same(&qemu);
    assert_eq!((seen.stat("reconnects"), seen.stat("errors")), (0, 0));
    drop(over);
    drop(asks.join().unwrap());
}

/// Frames that those who watch scanout 0 have missed.
fn dropped(server: &Server) -> u64 {
    let Some(Address::Tcp { host, port }) = server.metrics() else {
        panic!("no TCP address");
    };
    let mut stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let name = "helix_scanout_dropped_frames_total{scanout=\"0\"} ";
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.expect(name).parse().unwrap()
}

/// scanoutsrc without a decoder.
struct Source(gst::Pipeline);

impl Source {
    fn start(address: &Address) -> Self {
        init();
        let Address::Unix(path) = address else {
            panic!("{address} is no unix socket");
        };
        let line = format!(
            "scanoutsrc name=src socket-path={} scanout-id=0 ! fakesink sync=false",
            path.display()
        );
        let pipeline = gst::parse::launch(&line).unwrap();
        let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
        pipeline.set_state(gst::State::Playing).unwrap();
        Self(pipeline)
    }

    fn stat(&self, name: &str) -> u64 {
        let source = self.0.by_name("src").unwrap();
        let stats = source.property::<gst::Structure>("stats");
        stats.get(name).unwrap()
    }

    fn frames(&self) -> u64 {
        self.stat("frames")
    }

    fn errors(&self) -> u64 {
        self.stat("errors") + self.stat("reconnects")
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = self.0.set_state(gst::State::Null);
    }
}
