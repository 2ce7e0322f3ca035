// SPDX-License-Identifier: MIT OR Apache-2.0

//! From downstream's caps to what is offered to PipeWire.

use super::abilities::Abilities;
use super::caps;
use super::gpu::from_drm_format;
use crate::capture::dmabuf::{IMPLICIT, LINEAR};
use crate::capture::{Offer, OfferEntry, PixelFormat, Span};

/// The most alternatives of downstream's caps that are offered, each as its own object. What is
/// behind them is there for completeness and never chosen.
const MAX_ENTRIES: usize = 16;

/// What to offer to PipeWire, so that what it fixes suits downstream's `allowed` caps.
///
/// Alternatives keep downstream's order. A format brings its sibling along, which differs in
/// alpha only and can go out under the asked-for name, but comes after what was asked for. Behind
/// all are DMA-BUFs that we would have to read, for producers that have nothing else.
pub(super) fn offer(allowed: &gst::CapsRef, can: &Abilities) -> Offer {
    let mut entries: Vec<OfferEntry> = Vec::new();
    for (structure, features) in allowed.iter_with_features() {
        let (width, height) = (span(structure, "width"), span(structure, "height"));
        if width.min > width.max || height.min > height.max {
            continue;
        }
        let wanted = if caps::is_dmabuf(features) {
            passed_on(structure, can)
        } else {
            vec![(with_siblings(formats(structure)), Vec::new())]
        };
        for (formats, modifiers) in wanted {
            let entry = OfferEntry {
                formats,
                modifiers,
                width,
                height,
            };
            if !entry.formats.is_empty() && !entries.contains(&entry) {
                entries.push(entry);
            }
        }
    }
    let mut entries = without_mere_preferences(&entries);
    entries.truncate(MAX_ENTRIES);
    let read: Vec<_> = entries
        .iter()
        .filter(|entry| entry.modifiers.is_empty())
        .flat_map(|entry| {
            let with_modifiers = entry.formats.iter().map(|format| {
                let modifiers = can.readable(*format);
                (vec![*format], modifiers)
            });
            together(with_modifiers)
                .into_iter()
                .map(|(formats, modifiers)| OfferEntry {
                    formats,
                    modifiers,
                    ..*entry
                })
        })
        .collect();
    for entry in read {
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    Offer(entries)
}

/// Formats, and the modifiers of each of them.
type Wanted = (Vec<PixelFormat>, Vec<u64>);

/// The DMA-BUFs that a structure of downstream's caps takes, as far as they can be had.
///
/// Padding that would have to leave as alpha stays here: only a copy can make it opaque.
fn passed_on(structure: &gst::StructureRef, can: &Abilities) -> Vec<Wanted> {
    let asked: Vec<(PixelFormat, Option<Vec<u64>>)> =
        if names(structure, "format").any(|name| name == caps::DMA_DRM) {
            let mut asked: Vec<(PixelFormat, Option<Vec<u64>>)> = Vec::new();
            let listed = names(structure, "drm-format");
            for (format, modifier) in listed.filter_map(|name| from_drm_format(&name)) {
                match asked.iter_mut().find(|(known, _)| *known == format) {
                    Some((_, modifiers)) => modifiers.get_or_insert_default().push(modifier),
                    None => asked.push((format, Some(vec![modifier]))),
                }
            }
            if asked.is_empty() && !structure.has_field("drm-format") {
                asked.extend(PixelFormat::ALL.map(|format| (format, None)));
            }
            asked
        } else {
            // Nothing in these caps tells a modifier.
            let plain = formats(structure).map(|format| (format, Some(vec![LINEAR, IMPLICIT])));
            plain.collect()
        };
    let had = |format: PixelFormat, modifiers: &Option<Vec<u64>>| -> Vec<u64> {
        let can = can.passable(format);
        match modifiers {
            Some(listed) => listed.iter().copied().filter(|m| can.contains(m)).collect(),
            // Those that have a name in caps.
            None => can.into_iter().filter(|m| *m != IMPLICIT).collect(),
        }
    };
    let siblings = asked.iter().filter_map(|(format, modifiers)| {
        let sibling = format
            .sibling()
            .filter(|sibling| sibling.alpha_byte().is_some())?;
        let listed = asked.iter().any(|(known, _)| *known == sibling);
        (!listed).then(|| (vec![sibling], had(sibling, modifiers)))
    });
    let asked_for = asked
        .iter()
        .map(|(format, modifiers)| (vec![*format], had(*format, modifiers)));
    together(asked_for.chain(siblings))
}

/// Neighbours that have the same modifiers as one; those that have none are left out.
fn together(wanted: impl Iterator<Item = Wanted>) -> Vec<Wanted> {
    let mut joined: Vec<Wanted> = Vec::new();
    for (formats, modifiers) in wanted.filter(|(_, modifiers)| !modifiers.is_empty()) {
        match joined.last_mut().filter(|(_, known)| *known == modifiers) {
            Some((known, _)) => known.extend(formats),
            None => joined.push((formats, modifiers)),
        }
    }
    joined
}

fn with_siblings(asked: impl Iterator<Item = PixelFormat>) -> Vec<PixelFormat> {
    let asked: Vec<_> = asked.collect();
    let mut formats = asked.clone();
    for sibling in asked.iter().filter_map(|format| format.sibling()) {
        if !formats.contains(&sibling) {
            formats.push(sibling);
        }
    }
    formats
}

/// The entries, each with the sizes of another one that takes its formats at those sizes and more.
///
/// A scaler says first what it need not scale, then that any size will do. The picture has the size
/// of the screen, so the first would be a wish without use; worse, mutter 48 grants it for a monitor
/// too and then crashes, because it writes the monitor's own size into the smaller buffers.
fn without_mere_preferences(entries: &[OfferEntry]) -> Vec<OfferEntry> {
    let holds = |outer: Span, inner: Span| outer.contains(inner.min) && outer.contains(inner.max);
    let mut kept: Vec<OfferEntry> = Vec::new();
    for entry in entries {
        let wider = entries.iter().find(|other| {
            (other.width, other.height) != (entry.width, entry.height)
                && holds(other.width, entry.width)
                && holds(other.height, entry.height)
                && entry
                    .formats
                    .iter()
                    .all(|format| other.formats.contains(format))
                && entry.modifiers.is_empty() == other.modifiers.is_empty()
                && entry.modifiers.iter().all(|m| other.modifiers.contains(m))
        });
        let sized = wider.unwrap_or(entry);
        let entry = OfferEntry {
            width: sized.width,
            height: sized.height,
            ..entry.clone()
        };
        if !kept.contains(&entry) {
            kept.push(entry);
        }
    }
    kept
}

fn formats(structure: &gst::StructureRef) -> impl Iterator<Item = PixelFormat> {
    names(structure, "format").filter_map(|name| PixelFormat::from_name(&name))
}

/// The strings of a field, be it one or a list.
fn names(structure: &gst::StructureRef, field: &str) -> impl Iterator<Item = String> {
    let one = structure.get::<String>(field).ok();
    let list = structure.get::<gst::List>(field).ok();
    let listed: Vec<_> = list
        .iter()
        .flat_map(|list| list.iter())
        .filter_map(|name| name.get::<String>().ok())
        .collect();
    one.into_iter().chain(listed)
}

/// The sizes that a caps field allows, as one range around them.
fn span(structure: &gst::StructureRef, field: &str) -> Span {
    let Ok(value) = structure.value(field) else {
        return Span::ANY;
    };
    let mut span: Option<Span> = None;
    let mut include = |min: i32, max: i32| {
        let clamp = |n: i32| n.clamp(1, Span::ANY.max as i32) as u32;
        let (min, max) = (clamp(min), clamp(max));
        span = Some(span.map_or(Span { min, max }, |span| Span {
            min: span.min.min(min),
            max: span.max.max(max),
        }));
    };
    let mut add = |value: &gst::glib::Value| {
        if let Ok(n) = value.get::<i32>() {
            include(n, n);
        } else if let Ok(range) = value.get::<gst::IntRange<i32>>() {
            include(range.min(), range.max());
        }
    };
    add(value);
    if let Ok(list) = value.get::<gst::ListRef>() {
        list.iter().for_each(|value| add(value));
    }
    span.unwrap_or(Span::ANY)
}

#[cfg(test)]
mod tests {
    use super::super::abilities::{Refusal, Use};
    use super::super::caps::tests::{able, allowed, with_gpu};
    use super::*;

    fn offer_to(text: &str, can: &Abilities) -> Vec<OfferEntry> {
        offer(&allowed(text, can), can).0
    }

    /// Formats and modifiers of an offer.
    fn summary(entries: &[OfferEntry]) -> Vec<(Vec<&'static str>, Vec<u64>)> {
        let names = |entry: &OfferEntry| entry.formats.iter().map(|format| format.name()).collect();
        let summary = entries
            .iter()
            .map(|entry| (names(entry), entry.modifiers.clone()));
        summary.collect()
    }

    #[test]
    fn formats_are_offered_in_downstreams_order_with_their_siblings_behind() {
        let offer = offer_to("video/x-raw,format={RGBA,NV12}", &able());
        assert_eq!(
            offer[0].formats,
            [PixelFormat::Rgba, PixelFormat::Nv12, PixelFormat::Rgbx]
        );
    }

    #[test]
    fn sizes_that_downstream_asks_for_are_the_only_ones_offered() {
        let offer = offer_to(
            "video/x-raw,format=BGRx,width=640,height=[2,480]; video/x-raw,format=RGB",
            &able(),
        );
        let span = |min, max| Span { min, max };
        assert_eq!(offer[0].width, span(640, 640));
        assert_eq!(offer[0].height, span(2, 480));
        assert_eq!((offer[1].width, offer[1].height), (Span::ANY, Span::ANY));
    }

    #[test]
    fn a_size_that_downstream_only_prefers_is_not_asked_for() {
        let offer = offer_to(
            "video/x-raw,format={RGBA,BGRx},width=320,height=240;
             video/x-raw,format={BGRx,RGBA},width=[1,32767],height=[1,32767]",
            &able(),
        );
        assert_eq!(offer[0].formats[0], PixelFormat::Rgba, "its formats are");
        assert!(
            offer
                .iter()
                .all(|entry| entry.width != Span { min: 320, max: 320 })
        );
    }

    #[test]
    fn nothing_is_offered_to_who_takes_nothing_of_it() {
        assert!(offer_to("video/x-raw,format=I420", &able()).is_empty());
        assert!(offer(&gst::Caps::new_empty(), &able()).0.is_empty());
    }

    #[test]
    fn dmabufs_are_offered_in_downstreams_order_and_those_to_be_read_come_last() {
        let can = with_gpu();
        let offer = offer_to(
            "video/x-raw(memory:DMABuf),format={BGRx,RGBA}; video/x-raw,format=BGRx",
            &can,
        );
        let all = vec![7, LINEAR, IMPLICIT];
        assert_eq!(
            summary(&offer),
            [
                // The GPU imports no RGBA; a producer's alpha does no harm to who wants none.
                (vec!["BGRx", "BGRA"], vec![LINEAR, IMPLICIT]),
                (vec!["BGRx", "BGRA"], vec![]),
                (vec!["BGRx", "BGRA"], all),
            ]
        );
        let offer = offer_to(
            "video/x-raw,format=RGBA; video/x-raw(memory:DMABuf),format=BGRA",
            &can,
        );
        assert_eq!(
            summary(&offer),
            [
                (vec!["RGBA", "RGBx"], vec![]),
                // Its padding would leave as alpha.
                (vec!["BGRA"], vec![LINEAR, IMPLICIT]),
                (vec!["RGBA", "RGBx"], vec![LINEAR]),
            ]
        );
    }

    #[test]
    fn modifiers_are_those_that_downstream_lists_and_the_gpu_imports() {
        let can = with_gpu();
        let caps = |drm: &str| {
            format!("video/x-raw(memory:DMABuf),format=DMA_DRM{drm},width=640,height=480")
        };
        // As DMA_DRM caps are from 1.24 on; the template of this build may lack them.
        let offer = |drm: &str| {
            let caps: gst::Caps = caps(drm).parse().unwrap();
            summary(&offer(&caps, &can).0)
        };
        gst::init().unwrap();
        assert_eq!(
            offer(",drm-format={XR24:0x0000000000000009,XR24:0x0000000000000007,AB24,XR24}"),
            [(vec!["BGRx", "BGRA"], vec![7, LINEAR])]
        );
        assert_eq!(
            offer(""),
            [(vec!["BGRx", "BGRA"], vec![7, LINEAR])],
            "all that have a name"
        );
        assert!(offer(",drm-format=P010").is_empty());
    }

    #[test]
    fn without_a_gpu_linear_dmabufs_are_read_where_there_is_nothing_else() {
        let offer = offer_to(
            "video/x-raw(memory:DMABuf),format=BGRx; video/x-raw,format={BGRx,NV12}",
            &able(),
        );
        assert_eq!(
            summary(&offer),
            [
                (vec!["BGRx", "NV12", "BGRA"], vec![]),
                (vec!["BGRx", "NV12", "BGRA"], vec![LINEAR]),
            ]
        );
    }

    #[test]
    fn what_was_refused_is_not_offered_again() {
        let mut can = with_gpu();
        let text = "video/x-raw(memory:DMABuf),format=BGRx; video/x-raw,format=BGRx";
        for modifier in [LINEAR, IMPLICIT] {
            for format in [PixelFormat::Bgrx, PixelFormat::Bgra] {
                can.refused.push(Refusal {
                    format,
                    modifier,
                    what: Use::PassOn,
                });
            }
        }
        can.refused.push(Refusal {
            format: PixelFormat::Bgrx,
            modifier: 7,
            what: Use::Read,
        });
        assert_eq!(
            summary(&offer_to(text, &can)),
            [
                (vec!["BGRx", "BGRA"], vec![]),
                (vec!["BGRx"], vec![LINEAR, IMPLICIT]),
                (vec!["BGRA"], vec![7, LINEAR, IMPLICIT]),
            ]
        );
    }
}
