// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is said to the producer about formats, and what its answers mean.
//!
//! PipeWire negotiates with "pods": we send `EnumFormat` objects that say what we take, the
//! producer fixes one and sends it back as `Format`, and each `Format` is answered with `Buffers`
//! and `Meta` objects that say what memory and metadata we want. mutter may send `Format` twice;
//! each is answered anew, and nothing else is echoed (lesson L5).

use std::fmt;
use std::io::Cursor;

use libspa::param::format::{FormatProperties, MediaSubtype, MediaType};
use libspa::param::video::VideoInfoRaw;
use libspa::param::{ParamType, format_utils};
use libspa::pod::serialize::PodSerializer;
use libspa::pod::{ChoiceValue, Object, Pod, Property, Value};
use libspa::utils::{Choice, ChoiceEnum, ChoiceFlags, Fraction, Id, Rectangle, SpaTypes};

use super::damage::MAX_RECTS;
use super::format::PixelFormat;
use super::geometry::MAX_DIMENSION;
use super::meta::MAX_CURSOR;

/// The framerates offered, as (default, least, greatest).
///
/// Always a range that begins at 0/1, which is what damage-driven compositors have, and never one
/// fixed rate: mutter's limiter compares 16 ms frames with 16.666 ms and drops to 30-40 fps when
/// it is told a plain 60, and a least rate of 1 has once become the rate (lesson L6).
const FRAMERATES: (Fraction, Fraction, Fraction) = (
    Fraction {
        num: 1000,
        denom: 1,
    },
    Fraction { num: 0, denom: 1 },
    Fraction {
        num: 1000,
        denom: 1,
    },
);

/// The size asked for where the producer leaves it to us (mutter's virtual monitors do).
const DEFAULT_SIZE: (u32, u32) = (1920, 1080);

/// Buffers asked for, as (default, least, greatest). One may wait to be taken while another is
/// copied, so fewer than three would leave the producer none to draw into (lesson L4); frames are
/// passed on without a copy only from pools of five and more (see [`Pool`](super::frame::Pool)).
const BUFFERS: (i32, i32, i32) = (8, 3, 16);

/// An inclusive range of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Least.
    pub min: u32,
    /// Greatest.
    pub max: u32,
}

impl Span {
    /// Every size that can be.
    pub const ANY: Self = Self {
        min: 1,
        max: MAX_DIMENSION,
    };

    /// Whether it contains `value`.
    pub fn contains(self, value: u32) -> bool {
        (self.min..=self.max).contains(&value)
    }
}

/// Formats that go with one range of sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferEntry {
    /// Formats, the preferred one first.
    pub formats: Vec<PixelFormat>,
    /// Widths.
    pub width: Span,
    /// Heights.
    pub height: Span,
}

/// What we take, the preferred first. Never empty where it is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer(pub Vec<OfferEntry>);

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, entry) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            let names: Vec<_> = entry.formats.iter().map(|format| format.name()).collect();
            write!(f, "{{{}}}", names.join(", "))?;
            if entry.width != Span::ANY || entry.height != Span::ANY {
                write!(
                    f,
                    " of {}-{} x {}-{} pixels",
                    entry.width.min, entry.width.max, entry.height.min, entry.height.max
                )?;
            }
        }
        Ok(())
    }
}

impl Offer {
    /// The offer as `EnumFormat` objects.
    pub fn pods(&self) -> Vec<PodBytes> {
        self.0.iter().map(enum_format).collect()
    }
}

/// A format that the producer has fixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamFormat {
    /// Pixels.
    pub format: PixelFormat,
    /// Width of the buffers in pixels. A crop may make frames smaller.
    pub width: u32,
    /// Height of the buffers in pixels.
    pub height: u32,
    /// Frames in a second as numerator and denominator; 0/1 = whenever something changes.
    pub framerate: (u32, u32),
    /// The most frames in a second, where the producer says.
    pub max_framerate: Option<(u32, u32)>,
    /// How its numbers make colours, as far as the producer says.
    pub color: Color,
}

/// Colorimetry in the numbers of `spa/param/video/color.h`, which are GStreamer's as well; 0 =
/// unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the header.
pub struct Color {
    pub range: u32,
    pub matrix: u32,
    pub transfer: u32,
    pub primaries: u32,
}

impl StreamFormat {
    /// Reads a `Format` object.
    ///
    /// Fails, and says why, on anything but raw video in a carried format without a modifier.
    pub fn parse(pod: &Pod) -> Result<Self, String> {
        let (media, subtype) = format_utils::parse_format(pod)
            .map_err(|error| format!("an unreadable format: {error}"))?;
        if (media, subtype) != (MediaType::Video, MediaSubtype::Raw) {
            return Err("a format that is not raw video".into());
        }
        let mut info = VideoInfoRaw::new();
        info.parse(pod)
            .map_err(|error| format!("an unreadable video format: {error}"))?;
        let format = PixelFormat::from_spa(info.format())
            .ok_or_else(|| format!("{:?}, which was not offered", info.format()))?;
        let rate = |fraction: Fraction| (fraction.num, fraction.denom.max(1));
        let max = info.max_framerate();
        Ok(Self {
            format,
            width: info.size().width,
            height: info.size().height,
            framerate: rate(info.framerate()),
            max_framerate: (max.num > 0 && max.denom > 0).then(|| rate(max)),
            color: Color {
                range: info.color_range(),
                matrix: info.color_matrix(),
                transfer: info.transfer_function(),
                primaries: info.color_primaries(),
            },
        })
    }
}

/// A serialized pod, aligned for PipeWire to read.
pub struct PodBytes(Vec<u8>);

impl PodBytes {
    /// The pod.
    pub fn pod(&self) -> &Pod {
        Pod::from_bytes(&self.0).expect("the serializer writes whole pods")
    }

    fn new(object: Object) -> Self {
        let (cursor, _) = PodSerializer::serialize(Cursor::new(Vec::new()), &Value::Object(object))
            .expect("writing to memory does not fail");
        Self(cursor.into_inner())
    }
}

fn enum_format(entry: &OfferEntry) -> PodBytes {
    let id = |format: PixelFormat| Id(format.spa().as_raw());
    let preferred = entry.formats.first().copied().unwrap_or(PixelFormat::Bgrx);
    let size = |width, height| Rectangle { width, height };
    let framerates = || {
        let (default, min, max) = FRAMERATES;
        Value::Choice(ChoiceValue::Fraction(Choice(
            ChoiceFlags::empty(),
            ChoiceEnum::Range { default, min, max },
        )))
    };
    let property = |key: FormatProperties, value| Property::new(key.as_raw(), value);
    PodBytes::new(Object {
        type_: SpaTypes::ObjectParamFormat.as_raw(),
        id: ParamType::EnumFormat.as_raw(),
        properties: vec![
            property(
                FormatProperties::MediaType,
                Value::Id(Id(MediaType::Video.as_raw())),
            ),
            property(
                FormatProperties::MediaSubtype,
                Value::Id(Id(MediaSubtype::Raw.as_raw())),
            ),
            property(
                FormatProperties::VideoFormat,
                Value::Choice(ChoiceValue::Id(Choice(
                    ChoiceFlags::empty(),
                    ChoiceEnum::Enum {
                        default: id(preferred),
                        alternatives: entry.formats.iter().copied().map(id).collect(),
                    },
                ))),
            ),
            property(
                FormatProperties::VideoSize,
                Value::Choice(ChoiceValue::Rectangle(Choice(
                    ChoiceFlags::empty(),
                    ChoiceEnum::Range {
                        default: size(
                            DEFAULT_SIZE.0.clamp(entry.width.min, entry.width.max),
                            DEFAULT_SIZE.1.clamp(entry.height.min, entry.height.max),
                        ),
                        min: size(entry.width.min, entry.height.min),
                        max: size(entry.width.max, entry.height.max),
                    },
                ))),
            ),
            property(FormatProperties::VideoFramerate, framerates()),
            property(FormatProperties::VideoMaxFramerate, framerates()),
        ],
    })
}

/// The answers to a `Format`: which buffers, and which metadata, we want for it.
///
/// Memory is asked for as file descriptors or as what the daemon shares with both sides. Either
/// can be mapped by us, and so kept readable for as long as a frame lives.
pub fn format_answers() -> Vec<PodBytes> {
    let (default, min, max) = BUFFERS;
    let memory = (1 << libspa::sys::SPA_DATA_MemFd) | (1 << libspa::sys::SPA_DATA_MemPtr);
    let buffers = Object {
        type_: SpaTypes::ObjectParamBuffers.as_raw(),
        id: ParamType::Buffers.as_raw(),
        properties: vec![
            Property::new(
                libspa::sys::SPA_PARAM_BUFFERS_buffers,
                Value::Choice(ChoiceValue::Int(Choice(
                    ChoiceFlags::empty(),
                    ChoiceEnum::Range { default, min, max },
                ))),
            ),
            Property::new(
                libspa::sys::SPA_PARAM_BUFFERS_dataType,
                Value::Choice(ChoiceValue::Int(Choice(
                    ChoiceFlags::empty(),
                    ChoiceEnum::Flags {
                        default: memory,
                        flags: vec![memory],
                    },
                ))),
            ),
        ],
    };
    let size = |bytes: usize| Value::Int(bytes as i32);
    let region = size_of::<libspa::sys::spa_meta_region>();
    vec![
        PodBytes::new(buffers),
        meta(
            libspa::sys::SPA_META_Header,
            size(size_of::<libspa::sys::spa_meta_header>()),
        ),
        meta(libspa::sys::SPA_META_VideoCrop, size(region)),
        meta(
            libspa::sys::SPA_META_VideoDamage,
            sizes(region, region * MAX_RECTS, region * MAX_RECTS),
        ),
        meta(
            libspa::sys::SPA_META_VideoTransform,
            size(size_of::<libspa::sys::spa_meta_videotransform>()),
        ),
        meta(
            libspa::sys::SPA_META_Cursor,
            sizes(cursor_size(1), cursor_size(64), cursor_size(MAX_CURSOR)),
        ),
    ]
}

/// Bytes of metadata for a pointer of that width and height.
const fn cursor_size(side: u32) -> usize {
    size_of::<libspa::sys::spa_meta_cursor>()
        + size_of::<libspa::sys::spa_meta_bitmap>()
        + (side * side * 4) as usize
}

/// A choice of sizes in bytes.
fn sizes(min: usize, default: usize, max: usize) -> Value {
    Value::Choice(ChoiceValue::Int(Choice(
        ChoiceFlags::empty(),
        ChoiceEnum::Range {
            default: default as i32,
            min: min as i32,
            max: max as i32,
        },
    )))
}

fn meta(kind: u32, size: Value) -> PodBytes {
    PodBytes::new(Object {
        type_: SpaTypes::ObjectParamMeta.as_raw(),
        id: ParamType::Meta.as_raw(),
        properties: vec![
            Property::new(libspa::sys::SPA_PARAM_META_type, Value::Id(Id(kind))),
            Property::new(libspa::sys::SPA_PARAM_META_size, size),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use libspa::pod::deserialize::PodDeserializer;

    fn object(pod: &PodBytes) -> Object {
        match PodDeserializer::deserialize_any_from(&pod.0).unwrap().1 {
            Value::Object(object) => object,
            other => panic!("{other:?} is no object"),
        }
    }

    fn value(object: &Object, key: u32) -> &Value {
        &object
            .properties
            .iter()
            .find(|property| property.key == key)
            .unwrap()
            .value
    }

    fn any(formats: &[PixelFormat]) -> Offer {
        Offer(vec![OfferEntry {
            formats: formats.to_vec(),
            width: Span::ANY,
            height: Span::ANY,
        }])
    }

    #[test]
    fn framerates_are_offered_as_ranges_from_zero() {
        let pods = any(&PixelFormat::ALL).pods();
        let object = object(&pods[0]);
        for key in [
            FormatProperties::VideoFramerate,
            FormatProperties::VideoMaxFramerate,
        ] {
            let Value::Choice(ChoiceValue::Fraction(Choice(
                _,
                ChoiceEnum::Range { default, min, max },
            ))) = value(&object, key.as_raw())
            else {
                panic!("{key:?} is no range");
            };
            assert_eq!((min.num, min.denom), (0, 1));
            assert_eq!((max.num, max.denom), (1000, 1));
            assert_eq!(default, max);
        }
    }

    #[test]
    fn the_preferred_format_is_the_default() {
        let pods = any(&[PixelFormat::Rgba, PixelFormat::Rgbx]).pods();
        let object = object(&pods[0]);
        let Value::Choice(ChoiceValue::Id(Choice(
            _,
            ChoiceEnum::Enum {
                default,
                alternatives,
            },
        ))) = value(&object, FormatProperties::VideoFormat.as_raw())
        else {
            panic!("formats are no choice");
        };
        assert_eq!(default.0, PixelFormat::Rgba.spa().as_raw());
        assert_eq!(alternatives.len(), 2);
    }

    #[test]
    fn a_size_that_downstream_fixes_is_the_only_one_offered() {
        let fixed = |n| Span { min: n, max: n };
        let offer = Offer(vec![OfferEntry {
            formats: vec![PixelFormat::Bgrx],
            width: fixed(640),
            height: fixed(480),
        }]);
        let object = object(&offer.pods()[0]);
        let Value::Choice(ChoiceValue::Rectangle(Choice(
            _,
            ChoiceEnum::Range { default, min, max },
        ))) = value(&object, FormatProperties::VideoSize.as_raw())
        else {
            panic!("sizes are no range");
        };
        assert_eq!(
            [default, min, max].map(|size| (size.width, size.height)),
            [(640, 480); 3]
        );
    }

    #[test]
    fn a_format_is_answered_with_buffers_and_meta_only() {
        let ids: Vec<_> = format_answers().iter().map(|pod| object(pod).id).collect();
        let (buffers, metas) = ids.split_first().unwrap();
        assert_eq!(*buffers, ParamType::Buffers.as_raw());
        assert!(metas.iter().all(|id| *id == ParamType::Meta.as_raw()));
    }

    #[test]
    fn a_fixed_format_is_understood() {
        let fraction = |num, denom| Value::Fraction(Fraction { num, denom });
        let fixed = |format, subtype: MediaSubtype| {
            let property = |key: FormatProperties, value| Property::new(key.as_raw(), value);
            PodBytes::new(Object {
                type_: SpaTypes::ObjectParamFormat.as_raw(),
                id: ParamType::Format.as_raw(),
                properties: vec![
                    property(
                        FormatProperties::MediaType,
                        Value::Id(Id(MediaType::Video.as_raw())),
                    ),
                    property(
                        FormatProperties::MediaSubtype,
                        Value::Id(Id(subtype.as_raw())),
                    ),
                    property(FormatProperties::VideoFormat, Value::Id(Id(format))),
                    property(
                        FormatProperties::VideoSize,
                        Value::Rectangle(Rectangle {
                            width: 1280,
                            height: 720,
                        }),
                    ),
                    property(FormatProperties::VideoFramerate, fraction(0, 1)),
                    property(FormatProperties::VideoMaxFramerate, fraction(60, 1)),
                ],
            })
        };
        let bgrx = PixelFormat::Bgrx.spa().as_raw();
        let parsed = StreamFormat::parse(fixed(bgrx, MediaSubtype::Raw).pod()).unwrap();
        assert_eq!(
            parsed,
            StreamFormat {
                format: PixelFormat::Bgrx,
                width: 1280,
                height: 720,
                framerate: (0, 1),
                max_framerate: Some((60, 1)),
                color: Color::default(),
            }
        );
        let yuy2 = libspa::param::video::VideoFormat::YUY2.as_raw();
        assert!(StreamFormat::parse(fixed(yuy2, MediaSubtype::Raw).pod()).is_err());
        assert!(StreamFormat::parse(fixed(bgrx, MediaSubtype::H264).pod()).is_err());
    }
}
