// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a producer of DMA-BUFs and PipeWire say to each other about formats and buffers (PipeWire's
//! own account of it is doc/dox/internals/dma-buf.dox).

use std::io::Cursor;

use libspa::param::ParamType;
use libspa::param::format::{FormatProperties, MediaSubtype, MediaType};
use libspa::param::video::VideoInfoRaw;
use libspa::pod::deserialize::PodDeserializer;
use libspa::pod::serialize::PodSerializer;
use libspa::pod::{ChoiceValue, Object, Pod, Property, PropertyFlags, Value};
use libspa::sys as spa_sys;
use libspa::utils::{Choice, ChoiceEnum, ChoiceFlags, Fraction, Id, Rectangle, SpaTypes};

use crate::Outcome;
use crate::pixels::Pixels;

// From the headers of PipeWire 1.2 and newer; those of Debian 12 lack them.
/// `SPA_META_SyncTimeline` (spa/buffer/meta.h).
pub const META_SYNC_TIMELINE: u32 = 9;
/// `SPA_DATA_SyncObj` (spa/buffer/buffer.h).
pub const DATA_SYNC_OBJ: u32 = 5;
/// `SPA_PARAM_BUFFERS_metaType` (spa/param/buffers.h).
const BUFFERS_META_TYPE: u32 = 7;
/// `SPA_POD_PROP_FLAG_DONT_FIXATE` (spa/pod/pod.h): the producer chooses, not PipeWire.
const DONT_FIXATE: PropertyFlags = PropertyFlags::from_bits_retain(1 << 4);

/// `SPA_META_SYNC_TIMELINE_UNSCHEDULED_RELEASE` (spa/buffer/meta.h, PipeWire 1.6): nobody has promised yet
/// to signal the release point.
pub const UNSCHEDULED_RELEASE: u32 = 1;

/// `struct spa_meta_sync_timeline` (spa/buffer/meta.h).
#[repr(C)]
#[derive(Debug)]
pub struct SyncTimeline {
    pub flags: u32,
    pub padding: u32,
    pub acquire_point: u64,
    pub release_point: u64,
}

/// What a producer can make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// How they lie in memory.
    pub pixels: Pixels,
    /// Width and height.
    pub size: (u32, u32),
    /// Of DMA-BUFs, the preferred one first. None: no DMA-BUFs.
    pub modifiers: Vec<u64>,
    /// Whether shared memory is offered as well, after the DMA-BUFs.
    pub shared: bool,
    /// The most frames in a second, where that is said.
    pub most: Option<u32>,
}

impl Offer {
    /// `EnumFormat` objects; one that asks for `fixed` alone comes first.
    pub fn pods(&self, fixed: Option<u64>) -> Vec<Vec<u8>> {
        let mut pods = Vec::new();
        if let Some(modifier) = fixed {
            pods.push(self.pod(Some((&[modifier], PropertyFlags::MANDATORY))));
        }
        if !self.modifiers.is_empty() {
            let flags = PropertyFlags::MANDATORY | DONT_FIXATE;
            pods.push(self.pod(Some((&self.modifiers, flags))));
        }
        if self.shared {
            pods.push(self.pod(None));
        }
        pods
    }

    fn pod(&self, modifiers: Option<(&[u64], PropertyFlags)>) -> Vec<u8> {
        let property = |key: FormatProperties, value| Property::new(key.as_raw(), value);
        let (width, height) = self.size;
        let rate = |num| Value::Fraction(Fraction { num, denom: 1 });
        let mut properties = vec![
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
                Value::Id(Id(self.pixels.spa().as_raw())),
            ),
        ];
        if let Some((modifiers, flags)) = modifiers {
            let numbers: Vec<i64> = modifiers.iter().map(|number| *number as i64).collect();
            properties.push(Property {
                key: FormatProperties::VideoModifier.as_raw(),
                flags,
                value: Value::Choice(ChoiceValue::Long(Choice(
                    ChoiceFlags::empty(),
                    ChoiceEnum::Enum {
                        default: numbers[0],
                        alternatives: numbers,
                    },
                ))),
            });
        }
        properties.extend([
            property(
                FormatProperties::VideoSize,
                Value::Rectangle(Rectangle { width, height }),
            ),
            property(FormatProperties::VideoFramerate, rate(0)),
        ]);
        properties.extend(
            self.most
                .map(|most| property(FormatProperties::VideoMaxFramerate, rate(most))),
        );
        bytes(
            SpaTypes::ObjectParamFormat,
            ParamType::EnumFormat,
            properties,
        )
    }
}

/// What a `Format` says about modifiers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Modifier {
    /// Nothing: shared memory.
    None,
    /// Both sides can do these, and the producer is to choose.
    Choose(Vec<u64>),
    /// It was chosen.
    Fixed(u64),
}

/// A `Format` object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// How pixels lie in memory.
    pub pixels: Pixels,
    /// Width and height.
    pub size: (u32, u32),
    /// What the memory is.
    pub modifier: Modifier,
}

impl Agreed {
    /// Fails where it is not one of ours.
    pub fn read(pod: &Pod) -> Outcome<Self> {
        let value = PodDeserializer::deserialize_any_from(pod.as_bytes());
        let Ok((_, Value::Object(object))) = value else {
            return Err(format!("a format that is {value:?}").into());
        };
        let mut info = VideoInfoRaw::new();
        info.parse(pod)?;
        let pixels = Pixels::from_spa(info.format())
            .ok_or_else(|| format!("{:?}, which was not offered", info.format()))?;
        let key = FormatProperties::VideoModifier.as_raw();
        let modifier = match object.properties.iter().find(|found| found.key == key) {
            None => Modifier::None,
            Some(property) => Modifier::read(property)
                .ok_or_else(|| format!("an unreadable modifier: {property:?}"))?,
        };
        Ok(Self {
            pixels,
            size: (info.size().width, info.size().height),
            modifier,
        })
    }
}

impl Modifier {
    fn read(property: &Property) -> Option<Self> {
        let (first, all) = match &property.value {
            Value::Long(number) => (*number, vec![*number]),
            Value::Choice(ChoiceValue::Long(Choice(_, choice))) => match choice {
                ChoiceEnum::None(number) => (*number, vec![*number]),
                ChoiceEnum::Enum {
                    default,
                    alternatives,
                } => (*default, alternatives.clone()),
                _ => return None,
            },
            _ => return None,
        };
        Some(if property.flags.contains(DONT_FIXATE) {
            Self::Choose(all.into_iter().map(|number| number as u64).collect())
        } else {
            Self::Fixed(first as u64)
        })
    }
}

/// The producer's answer to a `Format`: `count` buffers of so many planes, of one kind of memory
/// (`SPA_DATA_*`); with `sync`, preferably with two timelines behind them.
pub fn answers(count: i32, planes: usize, memory: u32, sync: bool) -> Vec<Vec<u8>> {
    let int = |key, value| Property::new(key, Value::Int(value));
    let buffers = |blocks: usize| {
        vec![
            int(spa_sys::SPA_PARAM_BUFFERS_buffers, count),
            int(spa_sys::SPA_PARAM_BUFFERS_blocks, blocks as i32),
            int(spa_sys::SPA_PARAM_BUFFERS_dataType, 1 << memory),
        ]
    };
    let object = |properties| bytes(SpaTypes::ObjectParamBuffers, ParamType::Buffers, properties);
    let meta = |kind, size: usize| {
        bytes(
            SpaTypes::ObjectParamMeta,
            ParamType::Meta,
            vec![
                Property::new(spa_sys::SPA_PARAM_META_type, Value::Id(Id(kind))),
                int(spa_sys::SPA_PARAM_META_size, size as i32),
            ],
        )
    };
    let mut pods = Vec::new();
    if sync {
        let mut properties = buffers(planes + 2);
        properties.push(Property {
            key: BUFFERS_META_TYPE,
            flags: PropertyFlags::MANDATORY,
            value: Value::Int(1 << META_SYNC_TIMELINE),
        });
        pods.push(object(properties));
        pods.push(meta(META_SYNC_TIMELINE, size_of::<SyncTimeline>()));
    }
    pods.push(object(buffers(planes)));
    pods.push(meta(
        spa_sys::SPA_META_Header,
        size_of::<spa_sys::spa_meta_header>(),
    ));
    pods
}

fn bytes(type_: SpaTypes, id: ParamType, properties: Vec<Property>) -> Vec<u8> {
    let object = Value::Object(Object {
        type_: type_.as_raw(),
        id: id.as_raw(),
        properties,
    });
    let (cursor, _) = PodSerializer::serialize(Cursor::new(Vec::new()), &object)
        .expect("writing to memory does not fail");
    cursor.into_inner()
}
