// SPDX-License-Identifier: MIT OR Apache-2.0

//! Odd sizes, which no encoder of 4:2:0 takes, become even between conversion and encoder.
//!
//! There it costs one column and one row instead of a copy of the picture: GStreamer rounds the
//! strides of 4:2:0 up to 4 bytes, the rows of luma up to 2, and chroma is complete anyway. So the
//! next even size has the same layout in the same memory, and only the edge of luma has to be
//! repeated into the room that is there.

use std::sync::{Mutex, PoisonError};

use gst::prelude::*;
use gst::{PadProbeData, PadProbeReturn, PadProbeType};
use gst_video::{VideoInfo, VideoMeta};

use crate::picture::Picture;

/// Makes pictures of 4:2:0 that leave through `pad` even, and their caps. `failed` is called with
/// the reason where that is not possible; the flow then ends with an error.
pub fn complete(pad: &gst::Pad, failed: impl Fn(String) + Send + Sync + 'static) {
    // The layout of the pictures that come, while it is odd.
    let odd = Mutex::new(None::<VideoInfo>);
    let types =
        PadProbeType::BUFFER | PadProbeType::EVENT_DOWNSTREAM | PadProbeType::QUERY_DOWNSTREAM;
    pad.add_probe(types, move |_, probe| {
        let mut odd = odd.lock().unwrap_or_else(PoisonError::into_inner);
        probe.data = match probe.data.take() {
            Some(PadProbeData::Event(event)) => Some(PadProbeData::Event(match event.view() {
                gst::EventView::Caps(caps) => {
                    let even;
                    (*odd, even) = layout(caps.caps());
                    gst::event::Caps::new(&even)
                }
                _ => event,
            })),
            Some(PadProbeData::Query(query)) => {
                let answered = odd.as_ref().is_some_and(|info| offer_pool(query, info));
                probe.data = Some(PadProbeData::Query(query));
                return if answered {
                    PadProbeReturn::Handled
                } else {
                    PadProbeReturn::Ok
                };
            }
            Some(PadProbeData::Buffer(buffer)) => match &*odd {
                None => Some(PadProbeData::Buffer(buffer)),
                Some(info) => match completed(buffer, info) {
                    Ok(buffer) => Some(PadProbeData::Buffer(buffer)),
                    Err(reason) => {
                        failed(reason);
                        probe.flow_res = Err(gst::FlowError::Error);
                        return PadProbeReturn::Handled;
                    }
                },
            },
            other => other,
        };
        PadProbeReturn::Ok
    });
}

/// Answers an ALLOCATION query in the encoder's place: its own pool would be for the odd size, with
/// who knows what room.
fn offer_pool(query: &mut gst::QueryRef, info: &VideoInfo) -> bool {
    let gst::QueryViewMut::Allocation(query) = query.view_mut() else {
        return false;
    };
    // A plain one: a pool for video would put a GstVideoMeta with the odd size on its buffers.
    let pool = gst::BufferPool::new();
    query.add_allocation_pool(Some(&pool), info.size() as u32, 0, 0);
    true
}

/// What pictures with these caps are, if a side is odd, and the caps of the even ones.
fn layout(caps: &gst::CapsRef) -> (Option<VideoInfo>, gst::Caps) {
    let mut even = caps.to_owned();
    let info = VideoInfo::from_caps(caps)
        .ok()
        .filter(|info| (info.width() | info.height()) % 2 == 1);
    if let Some(info) = &info {
        let even = even.make_mut();
        even.set("width", info.width().next_multiple_of(2) as i32);
        even.set("height", info.height().next_multiple_of(2) as i32);
    }
    (info, even)
}

/// The picture with even sides: in its own memory where that has GStreamer's own layout, as from
/// [`offer_pool`], else as a copy.
fn completed(mut buffer: gst::Buffer, info: &VideoInfo) -> Result<gst::Buffer, String> {
    let (width, height) = (info.width(), info.height());
    let (wide, high) = (width.next_multiple_of(2), height.next_multiple_of(2));
    let stride = info.stride()[0] as usize;
    let end = stride * high as usize;
    let has_room = info.n_planes() > 1
        && stride >= wide as usize
        && end <= info.offset()[1]
        && buffer.size() >= info.size()
        // It would say the odd size, and one that comes from a pool cannot be taken off.
        && buffer.meta::<VideoMeta>().is_none();
    if !has_room {
        let picture = Picture {
            buffer,
            info: info.clone(),
        };
        return Ok(picture.at_least((wide, high))?.buffer);
    }
    let mut bytes = buffer
        .make_mut()
        .map_writable()
        .map_err(|_| "a picture's memory cannot be written".to_owned())?;
    let luma = &mut bytes[..end];
    if wide > width {
        let last = width as usize - 1;
        for row in luma.chunks_exact_mut(stride) {
            row[last + 1] = row[last];
        }
    }
    if high > height {
        luma.copy_within(end - 2 * stride..end - stride, end - stride);
    }
    drop(bytes);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Runs one white picture through a conversion; its address before and behind what is tested,
    /// its caps there, and its bytes.
    fn run(size: &str, format: &str) -> (usize, usize, gst::Caps, Vec<u8>) {
        gst::init().unwrap();
        let pipeline = gst::parse::launch(&format!(
            "videotestsrc num-buffers=1 pattern=white ! video/x-raw,format=BGRx,{size} ! \
             videoconvert ! capsfilter name=raw caps=video/x-raw,format={format} ! fakesink"
        ))
        .unwrap()
        .downcast::<gst::Pipeline>()
        .unwrap();
        let pad = pipeline.by_name("raw").unwrap().static_pad("src").unwrap();
        let (sender, pictures) = mpsc::channel();
        let watch = |pad: &gst::Pad| {
            let sender = sender.clone();
            pad.add_probe(PadProbeType::BUFFER, move |_, probe| {
                let bytes = probe.buffer().unwrap().map_readable().unwrap();
                sender
                    .send((bytes.as_ptr() as usize, bytes.to_vec()))
                    .unwrap();
                PadProbeReturn::Ok
            });
        };
        watch(&pad);
        complete(&pad, |reason| panic!("{reason}"));
        watch(&pad);
        pipeline.set_state(gst::State::Playing).unwrap();
        let timeout = gst::ClockTime::from_seconds(20);
        let end = [gst::MessageType::Eos, gst::MessageType::Error];
        let message = pipeline.bus().unwrap().timed_pop_filtered(timeout, &end);
        assert_eq!(message.unwrap().type_(), gst::MessageType::Eos);
        let caps = pad.peer().unwrap().current_caps().unwrap();
        pipeline.set_state(gst::State::Null).unwrap();
        let (before, _) = pictures.recv().unwrap();
        let (behind, bytes) = pictures.recv().unwrap();
        (before, behind, caps, bytes)
    }

    #[test]
    fn a_converted_picture_is_completed_in_place() {
        for (size, whole) in [
            ("width=33,height=17", (34, 18)),
            ("width=33,height=18", (34, 18)),
            ("width=34,height=17", (34, 18)),
            ("width=1,height=1", (2, 2)),
        ] {
            for format in ["NV12", "I420"] {
                let (before, behind, caps, bytes) = run(size, format);
                assert_eq!(before, behind, "{format} {size} was copied");
                let info = VideoInfo::from_caps(&caps).unwrap();
                assert_eq!((info.width(), info.height()), whole);
                assert!(bytes.len() >= info.size());
                for row in 0..whole.1 as usize {
                    let start = row * info.stride()[0] as usize;
                    let row = &bytes[start..start + whole.0 as usize];
                    assert!(
                        row.iter().all(|&luma| luma == 235),
                        "{format} {size} {row:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn even_pictures_are_left_alone() {
        let (before, behind, caps, _) = run("width=34,height=18", "NV12");
        assert_eq!(before, behind);
        assert_eq!(VideoInfo::from_caps(&caps).unwrap().width(), 34);
    }

    #[test]
    fn a_layout_without_room_is_copied() {
        gst::init().unwrap();
        let info = VideoInfo::builder(gst_video::VideoFormat::Nv12, 3, 3)
            .build()
            .unwrap();
        // Tight: rows of 3 bytes of luma, and of 4 bytes of chroma.
        let mut buffer = gst::Buffer::from_slice([7; 3 * 3 + 2 * 4]);
        let flags = gst_video::VideoFrameFlags::empty();
        let picture = buffer.make_mut();
        picture.set_pts(gst::ClockTime::SECOND);
        VideoMeta::add_full(picture, flags, info.format(), 3, 3, &[0, 9], &[3, 4]).unwrap();
        let buffer = completed(buffer, &info).unwrap();
        assert_eq!(buffer.pts(), Some(gst::ClockTime::SECOND));
        let bytes = buffer.map_readable().unwrap();
        assert_eq!(&bytes[..16], [7; 16]);
    }
}
