// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which encoder, and how it is set: low latency, no reordering, keyframes when asked.

use gst::glib;
use gst::prelude::*;

/// bit/s where nobody said anything else; the default of vsockenc too.
pub const DEFAULT_BITRATE: u32 = 4_000_000;

/// bit/s; less than this no encoder keeps to, and some refuse.
const LEAST_BITRATE: u32 = 16_000;

/// Encoders that change their bitrate while they play although the property does not say so
/// (gst-plugins-bad, sys/applemedia/vtenc.c).
const LIVE: [&str; 2] = ["vtenc_h264", "vtenc_h264_hw"];

/// What can be wrong with an encoder's description.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncoderError {
    /// No such element in GStreamer's registry.
    #[error(
        "there is no element '{0}' (gst-inspect-1.0 {0} shows whether its plugin is installed)"
    )]
    Unknown(String),
    /// The element is something else.
    #[error("'{0}' encodes no H.264: it has no source pad for video/x-h264")]
    NoEncoder(String),
    /// gst-launch's parser refused it.
    #[error("'{text}' is no encoder with settings: {reason}")]
    Syntax {
        /// What was given.
        text: String,
        /// What the parser said.
        reason: String,
    },
    /// The element exists and does not work, for want of hardware perhaps.
    #[error("'{name}' does not work here: {reason}")]
    Broken {
        /// The element.
        name: String,
        /// What it said.
        reason: String,
    },
    /// None of those that `auto` knows is there and works.
    #[error(
        "no H.264 encoder works here; tried {0}. Install one (Debian: gstreamer1.0-plugins-ugly \
         has x264enc) or name one with --encoder"
    )]
    NoneWorks(String),
}

/// In what an encoder counts its `bitrate` (L28).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Bits,
    Kilobits,
}

/// How an encoder is told to be quick.
struct Known {
    factory: &'static str,
    unit: Unit,
    /// The property with the distance of keyframes, and its value for "only when asked".
    gop: (&'static str, &'static str),
    /// Set in this order where the element has the property and the value is valid for it:
    /// elements changed names and values over GStreamer's versions, so the best comes last.
    properties: &'static [(&'static str, &'static str)],
}

/// In the order in which `auto` tries them.
const KNOWN: &[Known] = &[
    Known {
        factory: "nvh264enc",
        unit: Unit::Kilobits,
        gop: ("gop-size", "-1"),
        properties: &[
            ("preset", "low-latency-hq"),
            ("preset", "p4"),
            ("tune", "ultra-low-latency"),
            ("zerolatency", "true"),
            ("zero-reorder-delay", "true"),
            ("bframes", "0"),
            ("b-frames", "0"),
            ("rc-mode", "cbr"),
            ("aud", "false"),
            ("repeat-sequence-header", "true"),
        ],
    },
    Known {
        factory: "vah264enc",
        unit: Unit::Kilobits,
        gop: ("key-int-max", "1024"),
        properties: &[
            ("rate-control", "cbr"),
            ("b-frames", "0"),
            ("ref-frames", "1"),
            ("target-usage", "6"),
            ("aud", "false"),
        ],
    },
    Known {
        factory: "vtenc_h264_hw",
        unit: Unit::Kilobits,
        gop: ("max-keyframe-interval", "2147483647"),
        properties: &[
            ("realtime", "true"),
            ("allow-frame-reordering", "false"),
            ("rate-control", "cbr"),
        ],
    },
    Known {
        factory: "x264enc",
        unit: Unit::Kilobits,
        gop: ("key-int-max", "1000000"),
        properties: &[
            ("tune", "zerolatency"),
            ("speed-preset", "superfast"),
            ("bframes", "0"),
            ("aud", "false"),
        ],
    },
    Known {
        factory: "openh264enc",
        unit: Unit::Bits,
        gop: ("gop-size", "1000000"),
        properties: &[
            ("rate-control", "bitrate"),
            // Not "screen": with it openh264 misses its bitrate by a factor of four.
            ("usage-type", "camera"),
            ("complexity", "low"),
            ("scene-change-detection", "false"),
            ("enable-frame-skip", "false"),
        ],
    },
];

/// When an encoder makes keyframes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keyframes {
    /// The first frame, then when asked.
    OnDemand,
    /// At least each so many frames.
    Every(u32),
}

/// What a client or a scanout wants from its encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// bit/s; `None` leaves it as the host's user set it, or at [`DEFAULT_BITRATE`].
    pub bitrate: Option<u32>,
    /// H.264 `profile_idc`. 66 becomes constrained baseline, all others main: what deployed
    /// clients can decode.
    pub profile: u8,
    /// See [`Keyframes`].
    pub keyframes: Keyframes,
}

/// An encoder that exists here, and its settings.
#[derive(Clone, Debug)]
pub struct EncoderSpec {
    factory: gst::ElementFactory,
    /// As given, where somebody gave it; for gst-launch's parser.
    description: Option<String>,
    /// Properties in it, which win over the table.
    given: Vec<String>,
}

impl EncoderSpec {
    /// Those that `auto` may take, best first. Whether they work, [`crate::probe`] finds out.
    pub fn candidates() -> Vec<Self> {
        KNOWN
            .iter()
            .filter_map(|known| gst::ElementFactory::find(known.factory))
            .map(|factory| Self {
                factory,
                description: None,
                given: Vec::new(),
            })
            .collect()
    }

    /// The names that `auto` knows, for messages.
    pub fn known_names() -> String {
        let names: Vec<_> = KNOWN.iter().map(|known| known.factory).collect();
        names.join(", ")
    }

    /// An element and its properties, written as for gst-launch: `x264enc speed-preset=medium`.
    pub fn parse(text: &str) -> Result<Self, EncoderError> {
        let mut words = text.split_whitespace();
        let name = words.next().unwrap_or_default();
        let factory = gst::ElementFactory::find(name)
            .ok_or_else(|| EncoderError::Unknown(name.to_owned()))?;
        let h264 = gst::Caps::new_empty_simple("video/x-h264");
        if !factory.can_src_any_caps(&h264) || factory.can_sink_any_caps(&h264) {
            return Err(EncoderError::NoEncoder(name.to_owned()));
        }
        let spec = Self {
            factory,
            description: Some(text.to_owned()),
            given: words
                .filter_map(|word| word.split_once('='))
                .map(|(property, _)| property.to_owned())
                .collect(),
        };
        spec.make().map(|_| spec)
    }

    /// The element's name.
    pub fn name(&self) -> glib::GString {
        self.factory.name()
    }

    /// The least width and height that the element's pad takes, in pixels.
    pub fn minimum_size(&self) -> (u32, u32) {
        let mut least = (i32::MAX, i32::MAX);
        for template in self.factory.static_pad_templates() {
            if template.direction() != gst::PadDirection::Sink {
                continue;
            }
            for structure in template.caps().iter() {
                let from = |field| match structure.value(field) {
                    Ok(value) => value
                        .get::<gst::IntRange<i32>>()
                        .map(|range| range.min())
                        .or_else(|_| value.get::<i32>())
                        .unwrap_or(1),
                    Err(_) => 1,
                };
                least = (least.0.min(from("width")), least.1.min(from("height")));
            }
        }
        // openh264enc says 1 and means a macroblock.
        let side = |least: i32| u32::try_from(least).unwrap_or(0).clamp(16, 1024);
        match least {
            (i32::MAX, _) => (16, 16),
            (width, height) => (side(width), side(height)),
        }
    }

    /// Whether the element's pad takes any size: some name a step.
    pub fn takes_odd_sizes(&self) -> bool {
        let odd = gst::Caps::builder("video/x-raw")
            .field("width", 1023)
            .field("height", 1023)
            .build();
        self.factory.can_sink_any_caps(&odd)
    }

    /// The caps that make the element keep to a profile, as near to `profile_idc` as it can.
    pub fn profile_caps(&self, profile_idc: u8) -> gst::Caps {
        let wanted: &[&str] = match profile_idc {
            66 => &["constrained-baseline", "baseline", "main"],
            _ => &["main", "constrained-baseline", "baseline"],
        };
        for profile in wanted {
            let caps = gst::Caps::builder("video/x-h264")
                .field("profile", *profile)
                .build();
            if self.factory.can_src_any_caps(&caps) {
                return caps;
            }
        }
        gst::Caps::new_empty_simple("video/x-h264")
    }

    /// A new, configured element.
    pub fn build(&self, tuning: &Tuning) -> Result<gst::Element, EncoderError> {
        let element = self.make()?;
        if let Some(known) = self.known() {
            for (property, value) in known.properties {
                self.set(&element, property, value);
            }
            match tuning.keyframes {
                Keyframes::OnDemand => self.set(&element, known.gop.0, known.gop.1),
                Keyframes::Every(frames) => self.set(&element, known.gop.0, &frames.to_string()),
            }
        }
        if let Some(bitrate) = tuning.bitrate {
            self.set_bitrate(&element, bitrate);
        } else if !self.given.iter().any(|given| given == "bitrate") {
            self.set_bitrate(&element, DEFAULT_BITRATE);
        }
        Ok(element)
    }

    /// Sets the bitrate, in bit/s, of an element made by [`EncoderSpec::build`]; also while it
    /// plays, where it [takes one][EncoderSpec::takes_bitrate_while_playing] then.
    pub fn set_bitrate(&self, element: &gst::Element, bits: u32) {
        let Some(property) = element.find_property("bitrate") else {
            tracing::warn!(encoder = %self.name(), "the encoder has no bitrate to set");
            return;
        };
        let bits = bits.max(LEAST_BITRATE);
        let number = match self.unit_of(&property) {
            Unit::Bits => bits,
            Unit::Kilobits => bits / 1000,
        };
        let most = property
            .downcast_ref::<glib::ParamSpecUInt>()
            .map_or(u32::MAX, glib::ParamSpecUInt::maximum);
        let number = number.min(most);
        if set_if_valid(element, "bitrate", &number.to_string()) {
            tracing::debug!(encoder = %self.name(), bits, "bitrate set");
        } else {
            tracing::warn!(encoder = %self.name(), bits, "the encoder refuses this bitrate");
        }
    }

    /// Whether an element that plays heeds another bitrate. Setting a property that is not made for it has no
    /// effect, or none that its author thought of.
    pub fn takes_bitrate_while_playing(&self, element: &gst::Element) -> bool {
        LIVE.contains(&self.name().as_str())
            || element.find_property("bitrate").is_none_or(|property| {
                let flags = property.flags();
                flags.contains(gst::PARAM_FLAG_MUTABLE_PLAYING)
            })
    }

    /// The bitrate that an element made by [`EncoderSpec::build`] is set to, in bit/s; 0 where it
    /// has none.
    pub fn bitrate_of(&self, element: &gst::Element) -> u32 {
        let Some(property) = element.find_property("bitrate") else {
            return 0;
        };
        let value = element.property_value("bitrate");
        let number = value
            .get::<u32>()
            .or_else(|_| value.get::<i32>().map(i32::unsigned_abs))
            .unwrap_or(0);
        match self.unit_of(&property) {
            Unit::Bits => number,
            Unit::Kilobits => number.saturating_mul(1000),
        }
    }

    /// The bitrate that an element would be set to.
    pub fn bitrate_with(&self, tuning: &Tuning) -> u32 {
        self.build(tuning)
            .map_or(0, |element| self.bitrate_of(&element))
    }

    /// The `profile_idc` that comes of asking for one; 0 where the encoder does not say.
    pub fn profile_idc(&self, wanted: u8) -> u8 {
        let caps = self.profile_caps(wanted);
        let profile = caps
            .structure(0)
            .and_then(|structure| structure.get::<&str>("profile").ok());
        match profile {
            Some("main") => 77,
            Some(_) => 66,
            None => 0,
        }
    }

    fn unit_of(&self, property: &glib::ParamSpec) -> Unit {
        self.known().map_or_else(
            || match property.blurb() {
                Some(blurb) if !blurb.to_ascii_lowercase().contains('k') => Unit::Bits,
                _ => Unit::Kilobits,
            },
            |known| known.unit,
        )
    }

    fn known(&self) -> Option<&'static Known> {
        KNOWN
            .iter()
            .find(|known| known.factory == self.factory.name())
    }

    fn set(&self, element: &gst::Element, property: &str, value: &str) {
        if !self.given.iter().any(|given| given == property)
            && !set_if_valid(element, property, value)
        {
            tracing::trace!(encoder = %self.name(), property, value, "not for this version");
        }
    }

    fn make(&self) -> Result<gst::Element, EncoderError> {
        let Some(text) = &self.description else {
            return self
                .factory
                .create()
                .build()
                .map_err(|_| EncoderError::Unknown(self.name().to_string()));
        };
        let syntax = |reason: &str| EncoderError::Syntax {
            text: text.clone(),
            reason: reason.to_owned(),
        };
        let element = gst::parse::launch_full(text, None, gst::ParseFlags::FATAL_ERRORS)
            .map_err(|error| syntax(error.message()))?;
        if element.factory().as_ref() != Some(&self.factory) {
            return Err(syntax("it must be one element and its properties"));
        }
        Ok(element)
    }
}

/// Sets a property from text, if the element has it and takes the value.
fn set_if_valid(element: &gst::Element, property: &str, text: &str) -> bool {
    let Some(spec) = element.find_property(property) else {
        return false;
    };
    let Ok(value) = glib::Value::deserialize(text, spec.value_type()) else {
        return false;
    };
    // Setting a number that is out of range would panic.
    let in_range = if let Some(spec) = spec.downcast_ref::<glib::ParamSpecInt>() {
        value
            .get()
            .is_ok_and(|number: i32| (spec.minimum()..=spec.maximum()).contains(&number))
    } else if let Some(spec) = spec.downcast_ref::<glib::ParamSpecUInt>() {
        value
            .get()
            .is_ok_and(|number: u32| (spec.minimum()..=spec.maximum()).contains(&number))
    } else {
        true
    };
    if in_range {
        element.set_property_from_value(property, &value);
    }
    in_range
}
