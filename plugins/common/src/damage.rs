// SPDX-License-Identifier: MIT OR Apache-2.0

//! `GstDesktopDamage`, the custom meta that says what of a frame has changed.
//!
//! Its structure has the field `rects`, an array of arrays of x, y, width and height in pixels. A
//! buffer without the meta may have changed everywhere. A resent frame carries an empty array,
//! which is how it is told from a new one.

use std::sync::Once;

/// Name of the meta, the same in every plugin.
pub const DAMAGE_META: &str = "GstDesktopDamage";

/// Marks `buffer` as changed in these rectangles (x, y, width, height) and nowhere else.
pub fn mark_damage(buffer: &mut gst::BufferRef, rects: impl IntoIterator<Item = [u32; 4]>) {
    register();
    let rects = rects.into_iter().map(|rect| {
        let numbers = rect.map(|number| i32::try_from(number).unwrap_or(i32::MAX));
        gst::Array::new(numbers)
    });
    // Adding fails only for a name that is not registered.
    if let Ok(mut meta) = gst::meta::CustomMeta::add(buffer, DAMAGE_META) {
        meta.mut_structure().set("rects", gst::Array::new(rects));
    }
}

fn register() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // A plugin of an older version may have been first.
        if !gst::meta::CustomMeta::is_registered(DAMAGE_META) {
            gst::meta::CustomMeta::register_simple(DAMAGE_META);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rects(buffer: &gst::BufferRef) -> Vec<Vec<i32>> {
        let meta = gst::meta::CustomMeta::from_buffer(buffer, DAMAGE_META).unwrap();
        let rects = meta.structure().get::<gst::Array>("rects").unwrap();
        let numbers = |rect: &gst::glib::SendValue| {
            let rect = rect.get::<gst::Array>().unwrap();
            rect.iter().map(|number| number.get().unwrap()).collect()
        };
        rects.iter().map(numbers).collect()
    }

    #[test]
    fn what_has_changed_goes_with_a_buffer_and_its_copies() {
        gst::init().unwrap();
        let mut buffer = gst::Buffer::new();
        mark_damage(buffer.get_mut().unwrap(), [[1, 2, 3, 4], [5, 6, 7, 8]]);
        let expected = vec![vec![1, 2, 3, 4], vec![5, 6, 7, 8]];
        assert_eq!(rects(&buffer), expected);
        assert_eq!(rects(&buffer.copy()), expected);
    }

    #[test]
    fn a_resent_frame_carries_an_empty_array() {
        gst::init().unwrap();
        let mut buffer = gst::Buffer::new();
        mark_damage(buffer.get_mut().unwrap(), []);
        assert_eq!(rects(&buffer), Vec::<Vec<i32>>::new());
    }
}
