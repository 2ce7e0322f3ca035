// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which metadata of a frame goes on with its access unit: a virtual method that the bindings
//! lack.

use gst::glib;
use gst::glib::translate::IntoGlib;
use gst_video::prelude::*;
use gst_video::subclass::prelude::*;

use super::imp::VsockEnc;

/// The base class would hand `GstVideoCropMeta` on. The stream shows the crop already, and whoever
/// decodes it would crop once more.
pub fn leave_crops_behind(class: &mut glib::Class<gst_video::VideoEncoder>) {
    class.as_mut().transform_meta = Some(transform_meta);
}

/// Whether a frame's metadata is copied to its access unit.
unsafe extern "C" fn transform_meta(
    encoder: *mut gst_video::ffi::GstVideoEncoder,
    frame: *mut gst_video::ffi::GstVideoCodecFrame,
    meta: *mut gst::ffi::GstMeta,
) -> glib::ffi::gboolean {
    // SAFETY: the base class calls this with metadata of the frame's input buffer, which is alive,
    // and `info` is static.
    let api = unsafe { (*(*meta).info).api };
    if api == gst_video::VideoCropMeta::meta_api().into_glib() {
        return glib::ffi::GFALSE;
    }
    // SAFETY: type data and classes of a type that was registered stay for ever, and the parent
    // of VsockEnc's class is GstVideoEncoder's.
    let parent = unsafe {
        let class = VsockEnc::type_data().as_ref().parent_class();
        (*class.cast::<gst_video::ffi::GstVideoEncoderClass>()).transform_meta
    };
    parent.map_or(glib::ffi::GFALSE, |parent| {
        // SAFETY: with the arguments that the base class gave.
        unsafe { parent(encoder, frame, meta) }
    })
}
