// SPDX-License-Identifier: MIT OR Apache-2.0

//! Letting go of frames that will have no output, before there are caps.
//!
//! The base class takes it as an error on the bus that a frame is finished without caps, and has
//! `gst_video_encoder_release_frame()` from 1.26 on only. But one whose caps cannot be negotiated
//! it lets go, without a word to downstream. So there is an output state that never can be, until
//! the stream's own replaces it.

use gst::glib;
use gst::glib::translate::{ToGlibPtr, from_glib_borrow, from_glib_full};
use gst_video::prelude::*;
use gst_video::subclass::prelude::*;

use super::imp::VsockEnc;

/// Lets the base class negotiate the stream's own caps only.
pub fn refuse_other_caps(class: &mut glib::Class<gst_video::VideoEncoder>) {
    class.as_mut().negotiate = Some(negotiate);
}

/// Lets go of a frame without events (before 1.26 they would be lost).
pub fn without_caps(encoder: &gst_video::VideoEncoder, frame: gst_video::VideoCodecFrame) {
    if encoder.output_state().is_none() {
        let caps = gst::Caps::new_empty_simple("video/x-h264");
        if encoder.set_output_state(caps, None).is_err() {
            return;
        }
    }
    // Says that it is not negotiated.
    let _ = encoder.finish_frame(frame);
}

/// Whether events are to leave before this frame.
pub fn has_events(frame: &gst_video::VideoCodecFrame) -> bool {
    let frame: *mut gst_video::ffi::GstVideoCodecFrame = frame.to_glib_none().0;
    // SAFETY: the frame is alive, and it holds the stream lock, under which alone the base class
    // changes this field.
    unsafe { !(*frame).events.is_null() }
}

/// Takes the input buffer out of a frame.
pub fn input(frame: &mut gst_video::VideoCodecFrame) {
    let frame: *mut gst_video::ffi::GstVideoCodecFrame = frame.to_glib_none().0;
    // SAFETY: the frame is alive, and the guard holds the stream lock, under which alone the base
    // class looks at this field. A frame may have no input buffer; the reference moves out of it.
    let buffer: Option<gst::Buffer> = unsafe {
        let buffer = std::mem::replace(&mut (*frame).input_buffer, std::ptr::null_mut());
        from_glib_full(buffer)
    };
    drop(buffer);
}

/// Fails for the state of [`without_caps`], the only one without a size. In C, as the bindings'
/// `negotiate()` would log that as an error, for each frame.
unsafe extern "C" fn negotiate(
    encoder: *mut gst_video::ffi::GstVideoEncoder,
) -> glib::ffi::gboolean {
    let has_size = {
        // SAFETY: the base class calls this with an encoder that is alive.
        let encoder: glib::translate::Borrowed<gst_video::VideoEncoder> =
            unsafe { from_glib_borrow(encoder) };
        let state = encoder.output_state();
        state.is_some_and(|state| state.info().width() > 0)
    };
    if !has_size {
        return glib::ffi::GFALSE;
    }
    // SAFETY: type data and classes of a type that was registered stay for ever, and the parent
    // of VsockEnc's class is GstVideoEncoder's.
    let parent = unsafe {
        let class = VsockEnc::type_data().as_ref().parent_class();
        (*class.cast::<gst_video::ffi::GstVideoEncoderClass>()).negotiate
    };
    parent.map_or(glib::ffi::GTRUE, |parent| {
        // SAFETY: with the argument that the base class gave.
        unsafe { parent(encoder) }
    })
}
