// SPDX-License-Identifier: MIT OR Apache-2.0

//! From downstream's caps to what is offered to PipeWire, and from what the producer fixed to caps.

use gst::glib::translate::FromGlib;
use gst::prelude::*;
use gst_video::{
    VideoCapsBuilder, VideoColorMatrix, VideoColorPrimaries, VideoColorRange, VideoColorimetry,
    VideoFormat, VideoInfo, VideoTransferFunction,
};

use crate::capture::negotiate::Color;
use crate::capture::{Offer, OfferEntry, PixelFormat, Span, StreamFormat};

/// The most alternatives of downstream's caps that are offered, each as its own object. What is
/// behind them is there for completeness and never chosen.
const MAX_ENTRIES: usize = 16;

/// The same format in GStreamer, which names it alike.
pub(super) fn video_format(format: PixelFormat) -> VideoFormat {
    VideoFormat::from_string(format.name())
}

/// Everything that the element can put out.
pub(super) fn template() -> gst::Caps {
    VideoCapsBuilder::new()
        .format_list(PixelFormat::ALL.map(video_format))
        .build()
}

/// What to offer to PipeWire, so that what it fixes suits downstream's `allowed` caps.
///
/// Alternatives keep downstream's order. A format brings its sibling along, which differs in
/// alpha only and can go out under the asked-for name, but comes after what was asked for.
pub(super) fn offer(allowed: &gst::CapsRef) -> Offer {
    let mut entries: Vec<OfferEntry> = Vec::new();
    for structure in allowed.iter() {
        let asked: Vec<_> = formats(structure).collect();
        let mut formats = asked.clone();
        for sibling in asked.iter().filter_map(|format| format.sibling()) {
            if !formats.contains(&sibling) {
                formats.push(sibling);
            }
        }
        let entry = OfferEntry {
            formats,
            width: span(structure, "width"),
            height: span(structure, "height"),
        };
        let sized = entry.width.min <= entry.width.max && entry.height.min <= entry.height.max;
        if !entry.formats.is_empty() && sized && !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    let mut entries = without_mere_preferences(&entries);
    entries.truncate(MAX_ENTRIES);
    Offer(entries)
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
        });
        let sized = wider.unwrap_or(entry);
        let entry = OfferEntry {
            formats: entry.formats.clone(),
            width: sized.width,
            height: sized.height,
        };
        if !kept.contains(&entry) {
            kept.push(entry);
        }
    }
    kept
}

fn formats(structure: &gst::StructureRef) -> impl Iterator<Item = PixelFormat> {
    let one = structure.get::<&str>("format").ok();
    let list = structure.get::<gst::List>("format").ok();
    let listed: Vec<_> = list
        .iter()
        .flat_map(|list| list.iter())
        .filter_map(|name| name.get::<&str>().ok().and_then(PixelFormat::from_name))
        .collect();
    one.and_then(PixelFormat::from_name)
        .into_iter()
        .chain(listed)
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

/// Caps for frames of `format` as far as `allowed` lets them be, or none.
///
/// Any framerate that downstream fixes is taken: capture follows the screen's changes whatever
/// the caps say. Where downstream leaves it open, it is the producer's.
pub(super) fn caps_for(format: &StreamFormat, allowed: &gst::Caps) -> Option<gst::Caps> {
    let names = [Some(format.format), format.format.sibling()];
    let rate = fraction(format.framerate);
    for name in names.into_iter().flatten() {
        let mut wanted = gst::Caps::builder("video/x-raw")
            .field("format", name.name())
            .field("width", format.width as i32)
            .field("height", format.height as i32)
            .field("pixel-aspect-ratio", gst::Fraction::new(1, 1))
            .field("interlace-mode", "progressive")
            .field(
                "framerate",
                gst::FractionRange::new(gst::Fraction::new(0, 1), gst::Fraction::new(i32::MAX, 1)),
            );
        if let Some(max) = format.max_framerate.filter(|_| rate.numer() == 0) {
            wanted = wanted.field("max-framerate", fraction(max));
        }
        if let Some(colorimetry) = colorimetry(format, name) {
            wanted = wanted.field("colorimetry", colorimetry.to_string());
        }
        let mut wanted = wanted.build();
        let mut caps = wanted.intersect_with_mode(allowed, gst::CapsIntersectMode::First);
        // What is information, or a guess, downstream need not agree with.
        let guessed = format.color == Color::default();
        for field in ["max-framerate", "colorimetry"] {
            if caps.is_empty() && (guessed || field != "colorimetry") {
                wanted.get_mut()?.structure_mut(0)?.remove_field(field);
                caps = wanted.intersect_with_mode(allowed, gst::CapsIntersectMode::First);
            }
        }
        if caps.is_empty() {
            continue;
        }
        caps.truncate();
        let structure = caps.get_mut()?.structure_mut(0)?;
        // Where 0/1 is not among what downstream takes: the nearest to what can come.
        let nearest = if rate.numer() == 0 && !allows_variable(structure) {
            format.max_framerate.map_or(rate, fraction)
        } else {
            rate
        };
        structure.fixate_field_nearest_fraction("framerate", nearest);
        if structure
            .get::<gst::Fraction>("framerate")
            .is_ok_and(|rate| rate.numer() > 0)
        {
            structure.remove_field("max-framerate");
        }
        caps.fixate();
        return Some(caps);
    }
    None
}

/// What the producer says of its colours, and GStreamer's own guess where it says nothing.
fn colorimetry(format: &StreamFormat, name: PixelFormat) -> Option<VideoColorimetry> {
    let info = VideoInfo::builder(video_format(name), format.width, format.height).build();
    let guess = info.ok()?.colorimetry();
    let Color {
        range,
        matrix,
        transfer,
        primaries,
    } = format.color;
    // SAFETY: Converting a number only wraps it: one that GStreamer does not know becomes an
    // unknown value of the enumeration. The numbers are the same in both worlds.
    let (range, matrix, transfer, primaries) = unsafe {
        (
            VideoColorRange::from_glib(range as i32),
            VideoColorMatrix::from_glib(matrix as i32),
            VideoTransferFunction::from_glib(transfer as i32),
            VideoColorPrimaries::from_glib(primaries as i32),
        )
    };
    // RGB has no other matrix, and GStreamer knows no other range of it.
    let rgb = guess.matrix() == VideoColorMatrix::Rgb;
    let unknown_range = matches!(
        range,
        VideoColorRange::Unknown | VideoColorRange::__Unknown(_)
    );
    let unknown_matrix = matches!(
        matrix,
        VideoColorMatrix::Unknown | VideoColorMatrix::Rgb | VideoColorMatrix::__Unknown(_)
    );
    let unknown_transfer = matches!(
        transfer,
        VideoTransferFunction::Unknown | VideoTransferFunction::__Unknown(_)
    );
    let unknown_primaries = matches!(
        primaries,
        VideoColorPrimaries::Unknown | VideoColorPrimaries::__Unknown(_)
    );
    let choose = |unknown| rgb || unknown;
    Some(VideoColorimetry::new(
        if choose(unknown_range) {
            guess.range()
        } else {
            range
        },
        if choose(unknown_matrix) {
            guess.matrix()
        } else {
            matrix
        },
        if unknown_transfer {
            guess.transfer()
        } else {
            transfer
        },
        if unknown_primaries {
            guess.primaries()
        } else {
            primaries
        },
    ))
}

fn allows_variable(structure: &gst::StructureRef) -> bool {
    structure.value("framerate").is_ok_and(|allowed| {
        allowed
            .intersect(&gst::Fraction::new(0, 1).to_value())
            .is_some()
    })
}

fn fraction((num, den): (u32, u32)) -> gst::Fraction {
    let limit = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    gst::Fraction::new(limit(num), limit(den.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::str::FromStr;

    fn caps(text: &str) -> gst::Caps {
        gst::init().unwrap();
        gst::Caps::from_str(text).unwrap()
    }

    /// `text` as far as the element's template goes, as a peer query gives it.
    fn allowed(text: &str) -> gst::Caps {
        caps(text).intersect_with_mode(&template(), gst::CapsIntersectMode::First)
    }

    fn mutter() -> StreamFormat {
        StreamFormat {
            format: PixelFormat::Bgrx,
            width: 1280,
            height: 720,
            framerate: (0, 1),
            max_framerate: Some((60, 1)),
            color: Color::default(),
        }
    }

    fn colorimetry_of(caps: &gst::Caps) -> String {
        caps.structure(0).unwrap().get("colorimetry").unwrap()
    }

    fn framerate(caps: &gst::Caps) -> gst::Fraction {
        caps.structure(0).unwrap().get("framerate").unwrap()
    }

    #[test]
    fn gstreamer_knows_every_format_by_its_name() {
        for format in PixelFormat::ALL {
            assert_ne!(video_format(format), VideoFormat::Unknown);
        }
    }

    #[test]
    fn formats_are_offered_in_downstreams_order_with_their_siblings_behind() {
        let offer = offer(&allowed("video/x-raw,format={RGBA,NV12}"));
        assert_eq!(
            offer.0[0].formats,
            [PixelFormat::Rgba, PixelFormat::Nv12, PixelFormat::Rgbx]
        );
    }

    #[test]
    fn sizes_that_downstream_asks_for_are_the_only_ones_offered() {
        let offer = offer(&allowed(
            "video/x-raw,format=BGRx,width=640,height=[2,480]; video/x-raw,format=RGB",
        ));
        let span = |min, max| Span { min, max };
        assert_eq!(offer.0[0].width, span(640, 640));
        assert_eq!(offer.0[0].height, span(2, 480));
        assert_eq!(
            (offer.0[1].width, offer.0[1].height),
            (Span::ANY, Span::ANY)
        );
    }

    #[test]
    fn a_size_that_downstream_only_prefers_is_not_asked_for() {
        let offer = offer(&allowed(
            "video/x-raw,format={RGBA,BGRx},width=320,height=240;
             video/x-raw,format={BGRx,RGBA},width=[1,32767],height=[1,32767]",
        ));
        assert_eq!(offer.0[0].formats[0], PixelFormat::Rgba, "its formats are");
        assert!(
            offer
                .0
                .iter()
                .all(|entry| entry.width != Span { min: 320, max: 320 })
        );
    }

    #[test]
    fn nothing_is_offered_to_who_takes_nothing_of_it() {
        assert!(offer(&allowed("video/x-raw,format=I420")).0.is_empty());
        assert!(offer(&gst::Caps::new_empty()).0.is_empty());
    }

    #[test]
    fn any_framerate_that_downstream_fixes_is_put_on_the_caps() {
        let got = caps_for(&mutter(), &allowed("video/x-raw,framerate=25/1")).unwrap();
        assert_eq!(framerate(&got), gst::Fraction::new(25, 1));
        assert!(!got.structure(0).unwrap().has_field("max-framerate"));
    }

    #[test]
    fn an_open_framerate_stays_the_producers() {
        let got = caps_for(&mutter(), &allowed("video/x-raw")).unwrap();
        assert_eq!(framerate(&got), gst::Fraction::new(0, 1));
        let max: gst::Fraction = got.structure(0).unwrap().get("max-framerate").unwrap();
        assert_eq!(max, gst::Fraction::new(60, 1));
        let got = caps_for(&mutter(), &allowed("video/x-raw,framerate=[1/1,30/1]")).unwrap();
        assert_eq!(framerate(&got), gst::Fraction::new(30, 1));
    }

    #[test]
    fn a_maximum_that_downstream_does_not_share_is_left_out() {
        let got = caps_for(&mutter(), &allowed("video/x-raw,max-framerate=30/1")).unwrap();
        assert_eq!(framerate(&got), gst::Fraction::new(0, 1));
    }

    #[test]
    fn siblings_stand_for_each_other_but_other_formats_do_not() {
        let got = caps_for(&mutter(), &allowed("video/x-raw,format=BGRA")).unwrap();
        assert_eq!(got.structure(0).unwrap().get::<&str>("format"), Ok("BGRA"));
        let both = allowed("video/x-raw,format={BGRA,BGRx}");
        let got = caps_for(&mutter(), &both).unwrap();
        assert_eq!(got.structure(0).unwrap().get::<&str>("format"), Ok("BGRx"));
        assert!(caps_for(&mutter(), &allowed("video/x-raw,format=RGBA")).is_none());
        assert!(caps_for(&mutter(), &allowed("video/x-raw,width=640")).is_none());
    }

    #[test]
    fn colours_are_said_as_the_producer_says_them_or_guessed() {
        let any = allowed("video/x-raw");
        let got = caps_for(&mutter(), &any).unwrap();
        assert_eq!(colorimetry_of(&got), "sRGB");
        let nv12 = StreamFormat {
            format: PixelFormat::Nv12,
            ..mutter()
        };
        assert_eq!(colorimetry_of(&caps_for(&nv12, &any).unwrap()), "bt709");
        let full = StreamFormat {
            // SPA_VIDEO_COLOR_RANGE_0_255, _MATRIX_BT601, SPA_VIDEO_TRANSFER_BT709, an unknown one
            color: Color {
                range: 1,
                matrix: 4,
                transfer: 5,
                primaries: 999,
            },
            ..nv12
        };
        assert_eq!(colorimetry_of(&caps_for(&full, &any).unwrap()), "1:4:5:1");
        let odd = StreamFormat {
            color: full.color,
            ..mutter()
        };
        assert_eq!(colorimetry_of(&caps_for(&odd, &any).unwrap()), "1:1:5:1");
    }

    #[test]
    fn a_guess_of_colours_gives_way_and_what_the_producer_says_does_not() {
        let other = allowed("video/x-raw,colorimetry=bt601");
        assert_eq!(
            colorimetry_of(&caps_for(&mutter(), &other).unwrap()),
            "bt601"
        );
        let sure = StreamFormat {
            color: Color {
                transfer: 7,
                ..Color::default()
            },
            ..mutter()
        };
        assert!(caps_for(&sure, &other).is_none());
    }
}
