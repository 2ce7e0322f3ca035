// SPDX-License-Identifier: MIT OR Apache-2.0

//! Letting go of the encoder's stream lock where a subclass must wait (L24).

use gst::glib;
use gst_video::prelude::*;

/// The stream lock is open while this lives, and held again afterwards.
///
/// `GstVideoEncoder` calls its subclass with the lock held once. Waiting for a reply like that
/// would keep the thread that brings the reply from finishing a frame. Encoders of GStreamer that
/// answer from another thread do the same with `GST_VIDEO_ENCODER_STREAM_UNLOCK`.
pub struct StreamUnlocked<'a>(&'a gst_video::VideoEncoder);

impl<'a> StreamUnlocked<'a> {
    /// To be used only in a virtual method that the base class calls with the lock held
    /// (`handle_frame`, `set_format`, `finish`), on that thread, with no `VideoCodecFrame` alive.
    pub fn new(encoder: &'a gst_video::VideoEncoder) -> Self {
        // SAFETY: the encoder is alive for 'a, so its lock is initialised. The calling thread holds
        // it, by this function's contract, and unlocking a recursive mutex once is then defined.
        unsafe { glib::ffi::g_rec_mutex_unlock(lock(encoder)) };
        Self(encoder)
    }
}

impl Drop for StreamUnlocked<'_> {
    fn drop(&mut self) {
        // SAFETY: the encoder is alive, so its lock is initialised; taking it again restores what
        // the base class expects on return.
        unsafe { glib::ffi::g_rec_mutex_lock(lock(self.0)) };
    }
}

fn lock(encoder: &gst_video::VideoEncoder) -> *mut glib::ffi::GRecMutex {
    let encoder: *mut gst_video::ffi::GstVideoEncoder = encoder.as_ptr();
    // SAFETY: the pointer comes from a live object; only the field's address is taken.
    unsafe { &raw mut (*encoder).stream_lock }
}
