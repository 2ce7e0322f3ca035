// SPDX-License-Identifier: MIT OR Apache-2.0

//! `GstDesktopDamage`, the custom meta that says what of a frame has changed.
//!
//! Its structure has the field `rects`, an array of arrays of x, y, width and height in pixels. A
//! buffer without the meta may have changed everywhere. A resent frame carries an empty array,
//! which is how it is told from a new one.

use std::sync::Once;

use crate::capture::damage::Damage;

/// Name of the meta, the same in every plugin.
const NAME: &str = "GstDesktopDamage";

/// Says on `buffer` what of it has changed.
pub(super) fn mark(buffer: &mut gst::BufferRef, damage: &Damage) {
    let Damage::Rects(rects) = damage else {
        return;
    };
    register();
    // Adding fails only for a name that is not registered.
    if let Ok(mut meta) = gst::meta::CustomMeta::add(buffer, NAME) {
        let rects = rects.iter().map(|rect| {
            let size = [rect.width, rect.height].map(|n| i32::try_from(n).unwrap_or(i32::MAX));
            gst::Array::new([rect.x, rect.y, size[0], size[1]])
        });
        meta.mut_structure().set("rects", gst::Array::new(rects));
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
    use crate::capture::geometry::Region;

    fn rects(damage: &Damage) -> Option<Vec<Vec<i32>>> {
        gst::init().unwrap();
        let mut buffer = gst::Buffer::new();
        mark(buffer.get_mut().unwrap(), damage);
        // Elements that copy a buffer's metadata keep it.
        let copy = buffer.copy();
        let meta = gst::meta::CustomMeta::from_buffer(&copy, NAME).ok()?;
        let rects = meta.structure().get::<gst::Array>("rects").unwrap();
        let numbers = |array: &gst::glib::SendValue| {
            let array = array.get::<gst::Array>().unwrap();
            array.iter().map(|n| n.get::<i32>().unwrap()).collect()
        };
        Some(rects.iter().map(numbers).collect())
    }

    #[test]
    fn a_resent_frame_carries_an_empty_array() {
        assert_eq!(rects(&Damage::Rects(Vec::new())), Some(Vec::new()));
    }

    #[test]
    fn rectangles_are_arrays_of_four_numbers() {
        let rect = Region {
            x: 1,
            y: 2,
            width: 3,
            height: 4,
        };
        let damage = Damage::Rects(vec![rect; 2]);
        assert_eq!(rects(&damage), Some(vec![vec![1, 2, 3, 4]; 2]));
    }

    #[test]
    fn a_frame_that_may_have_changed_everywhere_says_nothing() {
        assert_eq!(rects(&Damage::Everything), None);
    }
}
