// SPDX-License-Identifier: MIT OR Apache-2.0

//! Encoders that are not as they should be: x264enc in a bin that hangs, or takes no bitrate while it plays.

mod common;

use std::sync::Once;
use std::sync::atomic::Ordering;

use common::{Peer, is_start, start};
use gst::prelude::*;
use helix_host::{Config, ScanoutSpec, Server};
use helix_protocol::encode;
use helix_protocol::message::{Config as Settings, PixelFormat};
use zerocopy_test_qemu::eventually;

use self::imp::{HANGING, MADE, OPENED, STOPPING};

mod imp {
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    use std::sync::{Condvar, LazyLock, Mutex};

    use gst::glib;
    use gst::prelude::*;
    use gst::subclass::prelude::*;

    /// Encoders made so far.
    pub static MADE: AtomicU64 = AtomicU64::new(0);
    /// Those of them that hang: the first so many.
    pub static HANGING: (Mutex<u64>, Condvar) = (Mutex::new(0), Condvar::new());
    /// Those that hang and were told to stop.
    pub static STOPPING: AtomicU64 = AtomicU64::new(0);
    /// The bitrate that the last one that has started did so with, in bit/s.
    pub static OPENED: AtomicU32 = AtomicU32::new(0);

    #[derive(Default)]
    pub struct OddEncoder {
        number: Mutex<u64>,
        bitrate: AtomicU32,
    }

    #[glib::object_subclass]
    impl ObjectSubclass for OddEncoder {
        const NAME: &'static str = "GstOddH264Encoder";
        type Type = super::OddEncoder;
        type ParentType = gst::Bin;
    }

    impl ObjectImpl for OddEncoder {
        fn properties() -> &'static [glib::ParamSpec] {
            static PROPERTIES: LazyLock<Vec<glib::ParamSpec>> = LazyLock::new(|| {
                // Not GST_PARAM_MUTABLE_PLAYING.
                let bitrate = glib::ParamSpecUInt::builder("bitrate").blurb("In bit/s");
                vec![bitrate.build()]
            });
            &PROPERTIES
        }

        fn set_property(&self, _id: usize, value: &glib::Value, _pspec: &glib::ParamSpec) {
            self.bitrate.store(value.get().unwrap(), Ordering::Relaxed);
        }

        fn property(&self, _id: usize, _pspec: &glib::ParamSpec) -> glib::Value {
            self.bitrate.load(Ordering::Relaxed).to_value()
        }

        fn constructed(&self) {
            self.parent_constructed();
            let number = MADE.fetch_add(1, Ordering::Relaxed);
            *self.number.lock().unwrap() = number;
            let encoder = gst::ElementFactory::make("x264enc").build().unwrap();
            encoder.set_property_from_str("tune", "zerolatency");
            let obj = self.obj();
            obj.add(&encoder).unwrap();
            for name in ["sink", "src"] {
                let target = encoder.static_pad(name).unwrap();
                let pad = gst::GhostPad::builder_with_target(&target).unwrap();
                obj.add_pad(&pad.name(name).build()).unwrap();
            }
            let pad = encoder.static_pad("sink").unwrap();
            pad.add_probe(gst::PadProbeType::BUFFER, move |_, _| {
                let hanging = HANGING.0.lock().unwrap();
                let hangs = |hanging: &mut u64| number < *hanging;
                drop(HANGING.1.wait_while(hanging, hangs).unwrap());
                gst::PadProbeReturn::Ok
            });
        }
    }

    impl GstObjectImpl for OddEncoder {}

    impl ElementImpl for OddEncoder {
        fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
            static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
                let class = "Codec/Encoder/Video";
                gst::subclass::ElementMetadata::new("An odd encoder", class, "x264enc", "a test")
            });
            Some(&METADATA)
        }

        fn pad_templates() -> &'static [gst::PadTemplate] {
            static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(|| {
                let template = |name, direction, caps: &str| {
                    let caps = caps.parse().unwrap();
                    let always = gst::PadPresence::Always;
                    gst::PadTemplate::new(name, direction, always, &caps).unwrap()
                };
                let raw = "video/x-raw,format={NV12,I420}";
                vec![
                    template("sink", gst::PadDirection::Sink, raw),
                    template("src", gst::PadDirection::Src, "video/x-h264"),
                ]
            });
            &TEMPLATES
        }

        fn change_state(
            &self,
            transition: gst::StateChange,
        ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
            match transition {
                gst::StateChange::ReadyToPaused => {
                    let bits = self.bitrate.load(Ordering::Relaxed);
                    let encoder = self.obj().children().remove(0);
                    encoder.set_property("bitrate", bits / 1000);
                    OPENED.store(bits, Ordering::Relaxed);
                }
                gst::StateChange::PausedToReady
                    if *self.number.lock().unwrap() < *HANGING.0.lock().unwrap() =>
                {
                    STOPPING.fetch_add(1, Ordering::Relaxed);
                }
                _ => {}
            }
            self.parent_change_state(transition)
        }
    }

    impl BinImpl for OddEncoder {}
}

gst::glib::wrapper! {
    pub struct OddEncoder(ObjectSubclass<imp::OddEncoder>)
        @extends gst::Bin, gst::Element, gst::Object,
        @implements gst::ChildProxy;
}

/// A host with such an encoder, and a moving screen.
fn host() -> Server {
    host_with(common::config())
}

fn host_with(config: Config) -> Server {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        let kind = OddEncoder::static_type();
        gst::Element::register(None, "oddh264enc", gst::Rank::NONE, kind).unwrap();
    });
    start(Config {
        encoder: "oddh264enc".to_owned(),
        scanouts: vec![ScanoutSpec {
            id: 0,
            description: "videotestsrc is-live=true pattern=ball ! \
                          video/x-raw,width=320,height=240,framerate=60/1"
                .to_owned(),
        }],
        ..config
    })
}

fn bitrate(bits: u32) -> encode::Head {
    let settings = Settings {
        bitrate: bits,
        ..Settings::default()
    };
    encode::config_req(1, &settings)
}

/// One test: what they do to encoders is for all there are.
#[test]
fn odd_encoders_are_coped_with() {
    a_bitrate_that_it_does_not_take_while_playing_makes_a_new_one();
    one_that_hangs_when_the_last_subscriber_goes_does_not_take_the_scanout_along();
    who_waits_for_one_with_all_open_that_may_be_still_gets_pongs();
}

fn a_bitrate_that_it_does_not_take_while_playing_makes_a_new_one() {
    let server = host();
    let mut peer = Peer::of(&server);
    peer.subscribe(0);
    assert!(is_start(&peer.next_frame().bytes));
    assert!(!is_start(&peer.next_frame().bytes));
    peer.send(bitrate(1_234_000));
    // x264enc would make a keyframe after 250 frames.
    assert!((0..200).any(|_| is_start(&peer.next_frame().bytes)));
    assert_eq!(OPENED.load(Ordering::Relaxed), 1_234_000);
    // What a client has encoded itself.
    let mut peer = Peer::of(&server);
    let picture = common::Rgb::pattern(64, 64, 0);
    let mut encode = |bits, key| {
        peer.send(bitrate(bits));
        let frame = peer.encode(&picture, PixelFormat::Bgra, 0, false);
        assert_eq!(is_start(&frame.bytes), key);
        assert_eq!(OPENED.load(Ordering::Relaxed), bits);
    };
    encode(2_000_000, true);
    encode(2_000_000, false);
    encode(3_000_000, true);
}

fn one_that_hangs_when_the_last_subscriber_goes_does_not_take_the_scanout_along() {
    let server = host();
    let mut peer = Peer::of(&server);
    peer.subscribe(0);
    peer.next_frame();
    *HANGING.0.lock().unwrap() = u64::MAX;
    drop(peer);
    eventually("the encoder to be stopped", || {
        (STOPPING.load(Ordering::Relaxed) > 0).then_some(())
    });
    // It still hangs, the next one does not.
    *HANGING.0.lock().unwrap() = MADE.load(Ordering::Relaxed);
    let mut peer = Peer::of(&server);
    peer.subscribe(0);
    assert!(is_start(&peer.next_frame().bytes));
    *HANGING.0.lock().unwrap() = 0;
    HANGING.1.notify_all();
}

fn who_waits_for_one_with_all_open_that_may_be_still_gets_pongs() {
    // All by number; and by bytes, of one picture and of some.
    for (most, side, max_frame_bytes) in [
        (16, 16, 1 << 20),
        (1, 64, 64 * 64 * 4),
        (3, 64, 3 * 64 * 64 * 4 - 1),
    ] {
        let server = host_with(Config {
            max_frame_bytes,
            ..common::config()
        });
        let mut peer = Peer::of(&server);
        peer.greet(&common::hello());
        let picture = common::Rgb::pattern(side, side, 0);
        let request = |peer: &mut Peer, pts| {
            let (request, pixels) = picture.request(PixelFormat::Bgra, 0, pts, false);
            peer.request(&request, pixels);
        };
        *HANGING.0.lock().unwrap() = u64::MAX;
        for pts in 0..most {
            request(&mut peer, pts);
        }
        for _ in 0..3 {
            peer.expect_pong();
        }
        // One too many is not lost.
        request(&mut peer, most);
        *HANGING.0.lock().unwrap() = 0;
        HANGING.1.notify_all();
        for pts in 0..=most {
            assert_eq!(peer.next_frame().response.pts, pts);
        }
    }
}
