// SPDX-License-Identifier: MIT OR Apache-2.0

//! The cursor as an overlay, to be sent along.

use std::sync::Arc;

use gst_video::{
    VideoFormat, VideoFrameFlags, VideoMeta, VideoOverlayComposition, VideoOverlayFormatFlags,
    VideoOverlayRectangle,
};
use qemu_display::{Cursor, CursorShape};

/// Makes overlays of a cursor; its pixels are wrapped once for each shape.
#[derive(Debug, Default)]
pub(super) struct Overlays {
    shape: Option<(Arc<CursorShape>, gst::Buffer)>,
}

/// The pixels of a shape, kept alive by whoever has them.
struct Pixels(Arc<CursorShape>);

impl AsRef<[u8]> for Pixels {
    fn as_ref(&self) -> &[u8] {
        &self.0.bgra
    }
}

impl Overlays {
    /// The cursor as an overlay of a picture of `size` pixels, if it is to be seen there.
    pub fn of(&mut self, cursor: &Cursor, size: (u32, u32)) -> Option<VideoOverlayComposition> {
        cursor.covers(size)?;
        let shape = cursor.shape.as_ref()?;
        let known = self.shape.take();
        let known = known.filter(|(known, _)| Arc::ptr_eq(known, shape));
        let wrapped = if let Some(known) = known {
            known
        } else {
            (shape.clone(), wrap(shape)?)
        };
        let pixels = &self.shape.insert(wrapped).1;
        let flags = VideoOverlayFormatFlags::PREMULTIPLIED_ALPHA;
        let (width, height) = (shape.width, shape.height);
        let rectangle =
            VideoOverlayRectangle::new_raw(pixels, cursor.x, cursor.y, width, height, flags);
        VideoOverlayComposition::new([&rectangle]).ok()
    }
}

/// What GStreamer takes as an overlay: `GST_VIDEO_OVERLAY_COMPOSITION_FORMAT_RGB` of
/// video-overlay-composition.h, which is BGRA where words have their low byte first.
fn wrap(shape: &Arc<CursorShape>) -> Option<gst::Buffer> {
    let mut buffer = gst::Buffer::from_slice(Pixels(shape.clone()));
    let flags = VideoFrameFlags::empty();
    VideoMeta::add(
        buffer.get_mut()?,
        flags,
        VideoFormat::Bgra,
        shape.width,
        shape.height,
    )
    .ok()?;
    Some(buffer)
}
