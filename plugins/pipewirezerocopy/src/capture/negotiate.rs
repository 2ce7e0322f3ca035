// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is said to the producer about formats, and what its answers mean.
//!
//! PipeWire negotiates with "pods": we send `EnumFormat` objects that say what we take, the
//! producer fixes one and sends it back as `Format`, and each `Format` is answered with `Buffers`
//! and `Meta` objects that say what memory and metadata we want. mutter may send `Format` twice;
//! each is answered anew, and nothing else is echoed (lesson L5).
//!
//! DMA-BUFs are offered as formats with a list of modifiers, memory that the CPU reads as formats
//! without. Only who allocates knows which modifier is best: PipeWire hands the ones that both
//! sides share to the producer, and a second `Format` has the one it chose (PipeWire's page "DMA-BUF
//! Sharing").

use std::io::Cursor;

use libspa::param::format::{FormatProperties, MediaSubtype, MediaType};
use libspa::param::video::VideoInfoRaw;
use libspa::param::{ParamType, format_utils};
use libspa::pod::deserialize::PodDeserializer;
use libspa::pod::serialize::PodSerializer;
use libspa::pod::{ChoiceValue, Object, Pod, Property, PropertyFlags, Value};
use libspa::utils::{Choice, ChoiceEnum, ChoiceFlags, Fraction, Id, SpaTypes};

use super::damage::MAX_RECTS;
use super::dmabuf::MAX_PLANES;
use super::format::PixelFormat;
use super::meta::MAX_CURSOR;
use super::offer::FRAMERATES;
use super::timeline::{
    FEATURE_RELEASE, SPA_META_SYNC_TIMELINE, SPA_PARAM_BUFFERS_META_TYPE, SPA_PARAM_META_FEATURES,
    SyncTimelineMeta,
};

/// Buffers asked for, as (default, least, greatest). One may wait to be taken while another is
/// copied, so fewer than three would leave the producer none to draw into (lesson L4); frames are
/// passed on without a copy only from larger pools (see [`Pool`](super::frame::Pool)).
const BUFFERS: (i32, i32, i32) = (8, 3, 16);
/// The same for producers that have fewer.
const FEW_BUFFERS: (i32, i32, i32) = (2, 1, 2);

/// `SPA_POD_PROP_FLAG_DROP` (spa/pod/pod.h, PipeWire 1.6): a property that counts only where both sides
/// have it. Older versions keep it, and do not know what it means.
const DROP: PropertyFlags = PropertyFlags::from_bits_retain(1 << 5);

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
    /// Modifier of DMA-BUFs, [`IMPLICIT`](super::dmabuf::IMPLICIT) included; none for memory that the CPU reads.
    pub modifier: Option<u64>,
}

/// What a `Format` object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fixed {
    /// All there is to know.
    Format(StreamFormat),
    /// All but the modifier, for which the producer may choose one of these. The format has the
    /// preferred one.
    Choice(StreamFormat, Vec<u64>),
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
    /// Fails, and says why, on anything but raw video in a carried format.
    pub fn parse(pod: &Pod) -> Result<Fixed, String> {
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
        // The greatest that is offered comes back from a producer that says none (spa_pod_filter).
        let max = Some(info.max_framerate()).filter(|max| *max != FRAMERATES.2);
        let modifiers = modifiers(pod)?;
        let fixed = Self {
            format,
            width: info.size().width,
            height: info.size().height,
            framerate: rate(info.framerate()),
            max_framerate: max.filter(|max| max.num > 0 && max.denom > 0).map(rate),
            color: Color {
                range: info.color_range(),
                matrix: info.color_matrix(),
                transfer: info.transfer_function(),
                primaries: info.color_primaries(),
            },
            modifier: modifiers.first().copied(),
        };
        Ok(match modifiers.len() {
            0 | 1 => Fixed::Format(fixed),
            _ => Fixed::Choice(fixed, modifiers),
        })
    }
}

/// The modifiers in a `Format` object, the preferred one first, each once.
fn modifiers(pod: &Pod) -> Result<Vec<u64>, String> {
    let key = Id(FormatProperties::VideoModifier.as_raw());
    let Some(property) = pod
        .as_object()
        .ok()
        .and_then(|object| object.find_prop(key))
    else {
        return Ok(Vec::new());
    };
    let value = PodDeserializer::deserialize_any_from(property.value().as_bytes())
        .map_err(|_| "a format with an unreadable modifier")?
        .1;
    let list = match value {
        Value::Long(one) | Value::Choice(ChoiceValue::Long(Choice(_, ChoiceEnum::None(one)))) => {
            vec![one]
        }
        Value::Choice(ChoiceValue::Long(Choice(
            _,
            ChoiceEnum::Enum {
                default,
                alternatives,
            },
        ))) => [default].into_iter().chain(alternatives).collect(),
        other => return Err(format!("a format with {other:?} for a modifier")),
    };
    let mut modifiers = Vec::new();
    for modifier in list.into_iter().map(i64::cast_unsigned) {
        if !modifiers.contains(&modifier) {
            modifiers.push(modifier);
        }
    }
    Ok(modifiers)
}

/// A serialized pod, aligned for PipeWire to read.
pub struct PodBytes(Vec<u8>);

impl PodBytes {
    /// The pod.
    pub fn pod(&self) -> &Pod {
        Pod::from_bytes(&self.0).expect("the serializer writes whole pods")
    }

    pub(super) fn new(object: Object) -> Self {
        let (cursor, _) = PodSerializer::serialize(Cursor::new(Vec::new()), &Value::Object(object))
            .expect("writing to memory does not fail");
        Self(cursor.into_inner())
    }
}

/// The answers to a `Format`: which buffers, and which metadata, we want for it.
///
/// Memory for the CPU is asked for as file descriptors or as what the daemon shares with both sides.
/// Either can be mapped by us, and so kept readable for as long as a frame lives.
///
/// With `timelines`, DMA-BUFs that come with explicit synchronization are preferred. Without DMA-BUFs
/// that breaks streams (lesson L14).
pub fn format_answers(format: &StreamFormat, timelines: bool) -> Vec<PodBytes> {
    let timelines = timelines && format.modifier.is_some();
    let memory = if format.modifier.is_some() {
        1 << libspa::sys::SPA_DATA_DmaBuf
    } else {
        (1 << libspa::sys::SPA_DATA_MemFd) | (1 << libspa::sys::SPA_DATA_MemPtr)
    };
    let buffers = |(default, min, max), more: Vec<Property>| Object {
        type_: SpaTypes::ObjectParamBuffers.as_raw(),
        id: ParamType::Buffers.as_raw(),
        properties: [
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
        ]
        .into_iter()
        .chain(more)
        .collect(),
    };
    // Two blocks more than planes, whose number the producer knows, and only with that metadata.
    let planes_and_timelines = |planes: usize| (planes + 2) as i32;
    let with_timelines = || {
        let least = planes_and_timelines(1);
        let blocks = ChoiceEnum::Range {
            default: least,
            min: least,
            max: planes_and_timelines(MAX_PLANES),
        };
        let blocks = Choice(ChoiceFlags::empty(), blocks);
        vec![
            Property::new(
                libspa::sys::SPA_PARAM_BUFFERS_blocks,
                Value::Choice(ChoiceValue::Int(blocks)),
            ),
            Property {
                key: SPA_PARAM_BUFFERS_META_TYPE,
                flags: PropertyFlags::MANDATORY,
                value: Value::Int(1 << SPA_META_SYNC_TIMELINE),
            },
        ]
    };
    let size = |bytes: usize| Value::Int(bytes as i32);
    let region = size_of::<libspa::sys::spa_meta_region>();
    let mut answers = Vec::new();
    if timelines {
        answers.push(PodBytes::new(buffers(BUFFERS, with_timelines())));
    }
    // The first that goes with what the producer says counts.
    for count in [BUFFERS, FEW_BUFFERS] {
        answers.push(PodBytes::new(buffers(count, Vec::new())));
    }
    if timelines {
        let bytes = size(size_of::<SyncTimelineMeta>());
        let features = Property {
            key: SPA_PARAM_META_FEATURES,
            flags: DROP,
            value: Value::Int(FEATURE_RELEASE),
        };
        answers.push(meta_with(SPA_META_SYNC_TIMELINE, bytes, [features]));
    }
    answers.extend([
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
    ]);
    answers
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
    meta_with(kind, size, [])
}

fn meta_with(kind: u32, size: Value, more: impl IntoIterator<Item = Property>) -> PodBytes {
    let properties = [
        Property::new(libspa::sys::SPA_PARAM_META_type, Value::Id(Id(kind))),
        Property::new(libspa::sys::SPA_PARAM_META_size, size),
    ];
    PodBytes::new(Object {
        type_: SpaTypes::ObjectParamMeta.as_raw(),
        id: ParamType::Meta.as_raw(),
        properties: properties.into_iter().chain(more).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::dmabuf::{IMPLICIT, LINEAR};
    use crate::capture::offer::tests::{format, object, value};
    use libspa::sys as spa;
    use libspa::utils::Rectangle;

    #[test]
    fn the_kind_of_memory_goes_with_the_modifier() {
        for (modifier, kinds) in [
            (None, [spa::SPA_DATA_MemFd, spa::SPA_DATA_MemPtr].as_slice()),
            (Some(LINEAR), &[spa::SPA_DATA_DmaBuf]),
            (Some(IMPLICIT), &[spa::SPA_DATA_DmaBuf]),
        ] {
            let answers = format_answers(&format(modifier), false);
            let wanted: i32 = kinds.iter().map(|kind| 1 << kind).sum();
            let Value::Choice(ChoiceValue::Int(Choice(_, ChoiceEnum::Flags { default, .. }))) =
                *value(&object(&answers[0]), spa::SPA_PARAM_BUFFERS_dataType)
            else {
                panic!("kinds of memory are no flags");
            };
            assert_eq!(default, wanted);
        }
    }

    #[test]
    fn a_format_is_answered_with_buffers_and_meta_only() {
        let plain = [(None, false), (None, true), (Some(LINEAR), false)];
        for (modifier, timelines) in plain {
            let answers = format_answers(&format(modifier), timelines);
            let ids: Vec<_> = answers.iter().map(|pod| object(pod).id).collect();
            let (buffers, metas) = ids.split_at(2);
            let all = |id: &u32| *id == ParamType::Buffers.as_raw();
            assert!(buffers.iter().all(all));
            assert!(metas.iter().all(|id| *id == ParamType::Meta.as_raw()));
            let sync = |pod: &PodBytes| {
                let kind = value(&object(pod), spa::SPA_PARAM_META_type).clone();
                kind == Value::Id(Id(SPA_META_SYNC_TIMELINE))
            };
            assert!(!answers[2..].iter().any(sync));
        }
    }

    #[test]
    fn producers_of_few_buffers_are_taken_behind_those_of_enough() {
        let answers = format_answers(&format(None), false);
        let counts: Vec<_> = answers[..2]
            .iter()
            .map(
                |pod| match *value(&object(pod), spa::SPA_PARAM_BUFFERS_buffers) {
                    Value::Choice(ChoiceValue::Int(Choice(
                        _,
                        ChoiceEnum::Range { default, min, max },
                    ))) => (default, min, max),
                    _ => panic!("the number of buffers is no range"),
                },
            )
            .collect();
        assert_eq!(counts, [(8, 3, 16), (2, 1, 2)]);
    }

    #[test]
    fn timelines_are_preferred_and_nothing_depends_on_them() {
        let answers = format_answers(&format(Some(LINEAR)), true);
        let first = object(&answers[0]);
        let required = first.properties.iter();
        let required: Vec<_> = required
            .filter(|p| p.flags == PropertyFlags::MANDATORY)
            .collect();
        assert_eq!(required.len(), 1);
        assert_eq!(required[0].key, SPA_PARAM_BUFFERS_META_TYPE);
        assert_eq!(required[0].value, Value::Int(1 << 9));
        let Value::Choice(ChoiceValue::Int(Choice(_, ChoiceEnum::Range { min, max, .. }))) =
            *value(&first, spa::SPA_PARAM_BUFFERS_blocks)
        else {
            panic!("blocks are no range");
        };
        assert_eq!((min, max), (3, 6));
        let second = object(&answers[1]);
        assert_eq!(second.id, ParamType::Buffers.as_raw());
        let flags = |p: &Property| p.flags == PropertyFlags::empty();
        assert!(second.properties.iter().all(flags));
        let meta = object(&answers[3]);
        let size = value(&meta, spa::SPA_PARAM_META_size);
        assert_eq!(*size, Value::Int(24));
        let features = meta.properties.iter();
        let features = features.filter(|p| p.key == SPA_PARAM_META_FEATURES);
        let features: Vec<_> = features.map(|p| (p.flags, p.value.clone())).collect();
        assert_eq!(features, [(DROP, Value::Int(FEATURE_RELEASE))]);
    }

    /// A `Format` as PipeWire sends it.
    fn fixed(format: u32, subtype: MediaSubtype, modifier: Option<Value>) -> PodBytes {
        let fraction = |num, denom| Value::Fraction(Fraction { num, denom });
        let size = Value::Rectangle(Rectangle {
            width: 1280,
            height: 720,
        });
        let values = [
            (
                FormatProperties::MediaType,
                Value::Id(Id(MediaType::Video.as_raw())),
            ),
            (
                FormatProperties::MediaSubtype,
                Value::Id(Id(subtype.as_raw())),
            ),
            (FormatProperties::VideoFormat, Value::Id(Id(format))),
            (FormatProperties::VideoSize, size),
            (FormatProperties::VideoFramerate, fraction(0, 1)),
            (FormatProperties::VideoMaxFramerate, fraction(60, 1)),
        ];
        let modifier = modifier.map(|value| (FormatProperties::VideoModifier, value));
        let property = |(key, value): (FormatProperties, _)| Property::new(key.as_raw(), value);
        PodBytes::new(Object {
            type_: SpaTypes::ObjectParamFormat.as_raw(),
            id: ParamType::Format.as_raw(),
            properties: values.into_iter().chain(modifier).map(property).collect(),
        })
    }

    fn choice(choice: ChoiceEnum<i64>) -> Value {
        let choice = Choice(ChoiceFlags::empty(), choice);
        Value::Choice(ChoiceValue::Long(choice))
    }

    #[test]
    fn a_fixed_format_is_understood() {
        let parse = |format, subtype| StreamFormat::parse(fixed(format, subtype, None).pod());
        let bgrx = PixelFormat::Bgrx.spa().as_raw();
        assert_eq!(
            parse(bgrx, MediaSubtype::Raw),
            Ok(Fixed::Format(format(None)))
        );
        let yuy2 = libspa::param::video::VideoFormat::YUY2.as_raw();
        assert!(parse(yuy2, MediaSubtype::Raw).is_err());
        assert!(parse(bgrx, MediaSubtype::H264).is_err());
    }

    fn parse(modifier: Value) -> Result<Fixed, String> {
        let bgrx = PixelFormat::Bgrx.spa().as_raw();
        StreamFormat::parse(fixed(bgrx, MediaSubtype::Raw, Some(modifier)).pod())
    }

    #[test]
    fn a_modifier_is_fixed_however_it_is_written() {
        let alone = |one: i64| ChoiceEnum::Enum {
            default: one,
            alternatives: vec![one],
        };
        for modifier in [LINEAR, IMPLICIT, 0x0300_0000_0060_6014] {
            let one = modifier.cast_signed();
            for value in [
                Value::Long(one),
                choice(ChoiceEnum::None(one)),
                choice(alone(one)),
            ] {
                let expected = Fixed::Format(format(Some(modifier)));
                assert_eq!(parse(value), Ok(expected));
            }
        }
        assert!(parse(Value::Int(0)).is_err());
    }

    #[test]
    fn a_modifier_that_is_left_open_is_the_producers_to_choose() {
        let open = choice(ChoiceEnum::Enum {
            default: 7,
            alternatives: vec![7, 0, 5, 0],
        });
        let expected = Fixed::Choice(format(Some(7)), vec![7, 0, 5]);
        assert_eq!(parse(open), Ok(expected));
    }
}
