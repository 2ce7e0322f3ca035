// SPDX-License-Identifier: MIT OR Apache-2.0

//! `GstDesktopDamage`, the custom meta that says what of a frame has changed.
//!
//! Its structure has the field `rects`, an array of arrays of x, y, width and height in pixels. A
//! buffer without the meta may have changed everywhere. A resent frame carries an empty array,
//! which is how it is told from a new one.

use std::sync::Once;

/// Name of the meta, the same in every plugin.
const NAME: &str = "GstDesktopDamage";

/// Marks `buffer` as showing nothing new.
pub(super) fn mark_unchanged(buffer: &mut gst::BufferRef) {
    register();
    // Adding fails only for a name that is not registered.
    if let Ok(mut meta) = gst::meta::CustomMeta::add(buffer, NAME) {
        meta.mut_structure()
            .set("rects", gst::Array::new(Vec::<gst::glib::SendValue>::new()));
    }
}

fn register() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // Another plugin may have been first.
        if !gst::meta::CustomMeta::is_registered(NAME) {
            gst::meta::CustomMeta::register_simple(NAME);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resent_frame_carries_an_empty_array() {
        gst::init().unwrap();
        let mut buffer = gst::Buffer::new();
        mark_unchanged(buffer.get_mut().unwrap());
        let meta = gst::meta::CustomMeta::from_buffer(&buffer, NAME).unwrap();
        let rects = meta.structure().get::<gst::Array>("rects").unwrap();
        assert!(rects.is_empty());
        // Elements that copy a buffer's metadata keep it.
        let copy = buffer.copy();
        assert!(gst::meta::CustomMeta::from_buffer(&copy, NAME).is_ok());
    }
}
