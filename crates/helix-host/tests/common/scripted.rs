// SPDX-License-Identifier: MIT OR Apache-2.0

//! An encoder that does what a test tells it, right or wrong. It cannot change its bitrate while
//! it plays.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, LazyLock, Mutex, Once, PoisonError};

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;

/// A picture that has reached an encoder.
pub struct Arrived<'a> {
    encoder: &'a ScriptedH264Enc,
    /// How many encoders of this script got a picture before this one.
    pub instance: u32,
    /// How many pictures this encoder got before.
    pub picture: u32,
}

impl Arrived<'_> {
    /// What the encoder is set to, in bit/s.
    pub fn bitrate(&self) -> u32 {
        self.encoder.property("bitrate")
    }

    /// Says that the encoder is broken, as GStreamer's elements do.
    pub fn fail(&self) {
        gst::element_error!(
            self.encoder,
            gst::StreamError::Encode,
            ["broken as a test wants it"]
        );
    }
}

/// Called in the encoder's thread, which hangs for as long as it does; whether the picture is
/// encoded.
type Script = Arc<dyn Fn(&Arrived<'_>) -> bool + Send + Sync>;

/// A script, and how many encoders have begun with it.
static SCRIPTS: LazyLock<Mutex<HashMap<u32, (Script, u32)>>> = LazyLock::new(Mutex::default);

/// An encoder with a script, as `--encoder` has it. The one that the host tries out at its start
/// is none of the script's.
pub fn encoder(script: impl Fn(&Arrived<'_>) -> bool + Send + Sync + 'static) -> String {
    element(move |arrived| {
        if arrived.instance == 0 {
            return true;
        }
        script(&Arrived {
            instance: arrived.instance - 1,
            ..*arrived
        })
    })
}

/// The same as gst-launch has it.
pub fn element(script: impl Fn(&Arrived<'_>) -> bool + Send + Sync + 'static) -> String {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        gst::init().unwrap();
        let class = ScriptedH264Enc::static_type();
        gst::Element::register(None, "scriptedh264enc", gst::Rank::NONE, class).unwrap();
    });
    let mut scripts = SCRIPTS.lock().unwrap();
    let key = scripts.len() as u32;
    scripts.insert(key, (Arc::new(script), 0));
    format!("scriptedh264enc script={key}")
}

/// Where an encoder hangs, until the test lets it go, at its end at the latest.
#[derive(Default)]
pub struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// One for the rest of the process.
    pub fn new() -> (&'static Self, Opens) {
        let gate = Box::leak(Box::<Self>::default());
        (gate, Opens(gate))
    }

    pub fn is_open(&self) -> bool {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hangs.
    pub fn pass(&self) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(open, |open| !*open));
    }
}

/// Opens the gate when it goes.
pub struct Opens(&'static Gate);

impl Drop for Opens {
    fn drop(&mut self) {
        *self.0.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.opened.notify_all();
    }
}

glib::wrapper! {
    pub struct ScriptedH264Enc(ObjectSubclass<imp::ScriptedH264Enc>)
        @extends gst::Bin, gst::Element, gst::Object;
}

mod imp {
    use super::*;

    #[derive(Default)]
    pub struct ScriptedH264Enc {
        script: Mutex<u32>,
        bitrate: Mutex<u32>,
        /// What the present stream is: which encoder of its script, and how many pictures.
        progress: Mutex<Option<(u32, u32)>>,
    }

    #[glib::object_subclass]
    impl ObjectSubclass for ScriptedH264Enc {
        const NAME: &'static str = "ScriptedH264Enc";
        type Type = super::ScriptedH264Enc;
        type ParentType = gst::Bin;
    }

    impl ObjectImpl for ScriptedH264Enc {
        fn properties() -> &'static [glib::ParamSpec] {
            static PROPERTIES: LazyLock<[glib::ParamSpec; 2]> = LazyLock::new(|| {
                [
                    glib::ParamSpecUInt::builder("script").build(),
                    glib::ParamSpecUInt::builder("bitrate")
                        .blurb("bit/s")
                        .mutable_ready()
                        .build(),
                ]
            });
            &*PROPERTIES
        }

        fn set_property(&self, _id: usize, value: &glib::Value, pspec: &glib::ParamSpec) {
            let number = value.get().unwrap();
            match pspec.name() {
                "script" => *self.script.lock().unwrap() = number,
                _ => *self.bitrate.lock().unwrap() = number,
            }
        }

        fn property(&self, _id: usize, pspec: &glib::ParamSpec) -> glib::Value {
            match pspec.name() {
                "script" => *self.script.lock().unwrap(),
                _ => *self.bitrate.lock().unwrap(),
            }
            .to_value()
        }

        fn constructed(&self) {
            self.parent_constructed();
            let x264enc = gst::ElementFactory::make("x264enc")
                .property_from_str("tune", "zerolatency")
                .property_from_str("speed-preset", "ultrafast")
                .property("key-int-max", 1_000_000_u32)
                .property("aud", false)
                .build()
                .unwrap();
            let bin = self.obj();
            bin.add(&x264enc).unwrap();
            for name in ["sink", "src"] {
                let template = bin.pad_template(name).unwrap();
                let target = x264enc.static_pad(name).unwrap();
                let pad = gst::GhostPad::from_template_with_target(&template, &target).unwrap();
                bin.add_pad(&pad).unwrap();
            }
            let pad = bin.static_pad("sink").unwrap();
            let encoder = bin.downgrade();
            pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
                let encoder = encoder.upgrade().unwrap();
                if encoder.imp().arrived() {
                    return gst::PadProbeReturn::Ok;
                }
                info.data = None;
                gst::PadProbeReturn::Handled
            });
        }
    }

    impl GstObjectImpl for ScriptedH264Enc {}

    impl ElementImpl for ScriptedH264Enc {
        fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
            static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
                gst::subclass::ElementMetadata::new(
                    "Script",
                    "Codec/Encoder/Video",
                    "A test's",
                    "-",
                )
            });
            Some(&METADATA)
        }

        fn pad_templates() -> &'static [gst::PadTemplate] {
            static TEMPLATES: LazyLock<[gst::PadTemplate; 2]> = LazyLock::new(|| {
                let template = |name, direction, caps: &str| {
                    let caps = caps.parse::<gst::Caps>().unwrap();
                    gst::PadTemplate::new(name, direction, gst::PadPresence::Always, &caps).unwrap()
                };
                [
                    template("sink", gst::PadDirection::Sink, "video/x-raw"),
                    template("src", gst::PadDirection::Src, "video/x-h264"),
                ]
            });
            &*TEMPLATES
        }
    }

    impl BinImpl for ScriptedH264Enc {}

    impl ScriptedH264Enc {
        /// Asks the script; whether this picture is encoded.
        fn arrived(&self) -> bool {
            let (script, first) = {
                let mut scripts = SCRIPTS.lock().unwrap();
                let key = *self.script.lock().unwrap();
                let (script, instances) = scripts.get_mut(&key).unwrap();
                let mut progress = self.progress.lock().unwrap();
                let begins = progress.is_none();
                let progress = progress.get_or_insert((*instances, 0));
                *instances += u32::from(begins);
                progress.1 += 1;
                (script.clone(), *progress)
            };
            script(&Arrived {
                encoder: &self.obj(),
                instance: first.0,
                picture: first.1 - 1,
            })
        }
    }
}
