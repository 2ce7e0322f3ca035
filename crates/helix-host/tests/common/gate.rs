// SPDX-License-Identifier: MIT OR Apache-2.0

//! An encoder that takes its time: x264enc behind a gate that a test shuts and opens.

use std::sync::{Condvar, LazyLock, Mutex, PoisonError};

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;

/// The element's name, for `Config::encoder`.
pub const GATED: &str = "gatedenc";

/// Of all these encoders of the process; open at first.
static GATE: Gate = Gate {
    shut: Mutex::new(false),
    changed: Condvar::new(),
};

struct Gate {
    shut: Mutex<bool>,
    changed: Condvar,
}

/// Shuts the gate: pictures go in, and none comes out. Opens it when dropped.
pub struct Shut(());

impl Shut {
    pub fn now() -> Self {
        set(true);
        Self(())
    }
}

impl Drop for Shut {
    fn drop(&mut self) {
        set(false);
    }
}

fn set(shut: bool) {
    *GATE.shut.lock().unwrap_or_else(PoisonError::into_inner) = shut;
    GATE.changed.notify_all();
}

fn pass() {
    let shut = GATE.shut.lock().unwrap_or_else(PoisonError::into_inner);
    let _open = GATE
        .changed
        .wait_while(shut, |shut| *shut)
        .unwrap_or_else(PoisonError::into_inner);
}

/// Makes the element known to this process.
pub fn register() {
    gst::init().unwrap();
    gst::Element::register(None, GATED, gst::Rank::NONE, Gated::static_type()).unwrap();
}

glib::wrapper! {
    pub struct Gated(ObjectSubclass<imp::Gated>) @extends gst::Bin, gst::Element, gst::Object;
}

mod imp {
    use super::*;

    #[derive(Default)]
    pub struct Gated;

    #[glib::object_subclass]
    impl ObjectSubclass for Gated {
        const NAME: &'static str = "HelixTestGated";
        type Type = super::Gated;
        type ParentType = gst::Bin;
    }

    impl ObjectImpl for Gated {
        fn constructed(&self) {
            self.parent_constructed();
            let encoder = gst::ElementFactory::make("x264enc")
                .property_from_str("tune", "zerolatency")
                .property_from_str("speed-preset", "ultrafast")
                .build()
                .unwrap();
            self.obj().add(&encoder).unwrap();
            for name in ["sink", "src"] {
                let pad = encoder.static_pad(name).unwrap();
                if name == "sink" {
                    pad.add_probe(gst::PadProbeType::BUFFER, |_, _| {
                        pass();
                        gst::PadProbeReturn::Ok
                    });
                }
                let template = self.obj().pad_template(name).unwrap();
                let ghost = gst::GhostPad::from_template_with_target(&template, &pad).unwrap();
                self.obj().add_pad(&ghost).unwrap();
            }
        }
    }

    impl GstObjectImpl for Gated {}

    impl ElementImpl for Gated {
        fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
            static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
                gst::subclass::ElementMetadata::new(
                    "Gated encoder",
                    "Codec/Encoder/Video",
                    "For tests",
                    "The gst-plugins-zerocopy authors",
                )
            });
            Some(&METADATA)
        }

        fn pad_templates() -> &'static [gst::PadTemplate] {
            static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(|| {
                let x264enc = gst::ElementFactory::find("x264enc").unwrap();
                let mut templates = Vec::new();
                for template in x264enc.static_pad_templates() {
                    let (name, direction) = (template.name_template(), template.direction());
                    let always = gst::PadPresence::Always;
                    let template = gst::PadTemplate::new(name, direction, always, &template.caps());
                    templates.push(template.unwrap());
                }
                templates
            });
            &TEMPLATES
        }
    }

    impl BinImpl for Gated {}
}
