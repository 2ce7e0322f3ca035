// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is offered to the producer: formats, sizes and modifiers, as `EnumFormat` objects.

use std::fmt;

use libspa::param::ParamType;
use libspa::param::format::{FormatProperties, MediaSubtype, MediaType};
use libspa::pod::{ChoiceValue, Object, Property, PropertyFlags, Value};
use libspa::utils::{Choice, ChoiceEnum, ChoiceFlags, Fraction, Id, Rectangle, SpaTypes};

use super::format::PixelFormat;
use super::geometry::MAX_DIMENSION;
use super::negotiate::{PodBytes, StreamFormat};

/// The framerates offered, as (default, least, greatest).
///
/// Always a range that begins at 0/1, which is what damage-driven compositors have, and never one
/// fixed rate: mutter's limiter compares 16 ms frames with 16.666 ms and drops to 30-40 fps when
/// it is told a plain 60, and a least rate of 1 has once become the rate (lesson L6).
pub(super) const FRAMERATES: (Fraction, Fraction, Fraction) = (
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

/// `SPA_POD_PROP_FLAG_DONT_FIXATE` (spa/pod/pod.h).
const DONT_FIXATE: PropertyFlags =
    PropertyFlags::from_bits_retain(libspa::sys::SPA_POD_PROP_FLAG_DONT_FIXATE);

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
    /// DRM format modifiers of DMA-BUFs, the preferred one first; empty for memory that the CPU
    /// reads.
    pub modifiers: Vec<u64>,
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
            if !entry.modifiers.is_empty() {
                f.write_str(" in DMA-BUFs")?;
            }
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
        // The producer chooses among modifiers, and has to know of them: without the first flag one
        // that does not would give memory of another kind.
        let modifiers = PropertyFlags::MANDATORY | DONT_FIXATE;
        self.0
            .iter()
            .map(|entry| enum_format(entry, modifiers, [framerates(), framerates()]))
            .collect()
    }
}

impl StreamFormat {
    /// This format and no other, as `EnumFormat` object: fixes a modifier that was left open.
    pub fn pod(&self) -> PodBytes {
        let exactly = |n| Span { min: n, max: n };
        let rate = |(num, denom)| Value::Fraction(Fraction { num, denom });
        let max_rate = self.max_framerate.map_or_else(framerates, rate);
        enum_format(
            &OfferEntry {
                formats: vec![self.format],
                modifiers: self.modifier.into_iter().collect(),
                width: exactly(self.width),
                height: exactly(self.height),
            },
            PropertyFlags::MANDATORY,
            [rate(self.framerate), max_rate],
        )
    }
}

fn framerates() -> Value {
    let (default, min, max) = FRAMERATES;
    Value::Choice(ChoiceValue::Fraction(Choice(
        ChoiceFlags::empty(),
        ChoiceEnum::Range { default, min, max },
    )))
}

fn enum_format(
    entry: &OfferEntry,
    modifier_flags: PropertyFlags,
    [rate, max_rate]: [Value; 2],
) -> PodBytes {
    let id = |format: PixelFormat| Id(format.spa().as_raw());
    let preferred = entry.formats.first().copied().unwrap_or(PixelFormat::Bgrx);
    let size = |width, height| Rectangle { width, height };
    let property = |key: FormatProperties, value| Property::new(key.as_raw(), value);
    let modifier = |modifiers: &[u64]| {
        let mut alternatives: Vec<_> = modifiers.iter().map(|n| n.cast_signed()).collect();
        let default = *alternatives.first()?;
        let value = if alternatives.len() == 1 && !modifier_flags.contains(DONT_FIXATE) {
            alternatives.clear();
            Value::Long(default)
        } else {
            Value::Choice(ChoiceValue::Long(Choice(
                ChoiceFlags::empty(),
                ChoiceEnum::Enum {
                    default,
                    alternatives,
                },
            )))
        };
        Some(Property {
            key: FormatProperties::VideoModifier.as_raw(),
            flags: modifier_flags,
            value,
        })
    };
    PodBytes::new(Object {
        type_: SpaTypes::ObjectParamFormat.as_raw(),
        id: ParamType::EnumFormat.as_raw(),
        properties: [
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
            property(FormatProperties::VideoFramerate, rate),
            property(FormatProperties::VideoMaxFramerate, max_rate),
        ]
        .into_iter()
        .chain(modifier(&entry.modifiers))
        .collect(),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::capture::dmabuf::{IMPLICIT, LINEAR};
    use crate::capture::negotiate::Color;
    use libspa::pod::deserialize::PodDeserializer;

    pub fn object(pod: &PodBytes) -> Object {
        match PodDeserializer::deserialize_any_from(pod.pod().as_bytes())
            .unwrap()
            .1
        {
            Value::Object(object) => object,
            other => panic!("{other:?} is no object"),
        }
    }

    pub fn value(object: &Object, key: u32) -> &Value {
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
            modifiers: Vec::new(),
            width: Span::ANY,
            height: Span::ANY,
        }])
    }

    /// A format of a compositor, with that modifier.
    pub fn format(modifier: Option<u64>) -> StreamFormat {
        StreamFormat {
            format: PixelFormat::Bgrx,
            width: 1280,
            height: 720,
            framerate: (0, 1),
            max_framerate: Some((60, 1)),
            color: Color::default(),
            modifier,
        }
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
            modifiers: Vec::new(),
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
    fn modifiers_are_offered_for_the_producer_to_choose_from() {
        let mut offer = any(&[PixelFormat::Bgrx]);
        offer.0[0].modifiers = vec![0x0100_0000_0000_0002, LINEAR, IMPLICIT];
        offer.0.extend(any(&[PixelFormat::Bgrx]).0);
        let pods = offer.pods();
        let object = object(&pods[0]);
        let key = FormatProperties::VideoModifier.as_raw();
        let property = object.properties.iter().find(|p| p.key == key).unwrap();
        assert_eq!(property.flags, PropertyFlags::MANDATORY | DONT_FIXATE);
        let Value::Choice(ChoiceValue::Long(Choice(
            _,
            ChoiceEnum::Enum {
                default,
                alternatives,
            },
        ))) = &property.value
        else {
            panic!("modifiers are no choice");
        };
        assert_eq!(*default, 0x0100_0000_0000_0002);
        assert_eq!(*alternatives, [0x0100_0000_0000_0002, 0, IMPLICIT as i64]);
        let second = self::object(&pods[1]);
        assert!(
            second.properties.iter().all(|p| p.key != key),
            "and a way without"
        );
    }

    #[test]
    fn one_modifier_is_fixed_by_an_offer_that_leaves_nothing_open() {
        let object = object(&format(Some(7)).pod());
        assert_eq!(object.id, ParamType::EnumFormat.as_raw());
        let key = FormatProperties::VideoModifier.as_raw();
        let property = object.properties.iter().find(|p| p.key == key).unwrap();
        assert_eq!(property.flags, PropertyFlags::MANDATORY);
        assert_eq!(property.value, Value::Long(7));
        let rate = |num| Value::Fraction(Fraction { num, denom: 1 });
        let said = |key: FormatProperties| value(&object, key.as_raw());
        assert_eq!(*said(FormatProperties::VideoFramerate), rate(0));
        assert_eq!(*said(FormatProperties::VideoMaxFramerate), rate(60));
    }
}
