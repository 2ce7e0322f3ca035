// SPDX-License-Identifier: MIT OR Apache-2.0

use gst::glib;
use gst::prelude::*;

mod buffers;
mod caps;
mod cursor;
mod figures;
mod imp;
mod pace;
mod settings;
mod streaming;

glib::wrapper! {
    /// The element `qemudisplaysrc`: a console of a running QEMU as a live video stream.
    pub struct QemuDisplaySrc(ObjectSubclass<imp::QemuDisplaySrc>)
        @extends gst_base::PushSrc, gst_base::BaseSrc, gst::Element, gst::Object;
}

/// What becomes of a cursor that QEMU sends apart from the picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstQemuDisplaySrcCursor")]
#[repr(i32)]
pub enum CursorMode {
    /// It is left out.
    #[enum_value(name = "Leave it out", nick = "none")]
    None,
    /// It is drawn into the picture.
    #[default]
    #[enum_value(name = "Draw it into the picture", nick = "blend")]
    Blend,
    /// It goes beside the picture.
    #[enum_value(
        name = "Send it beside the picture where downstream takes that, else draw it",
        nick = "overlay"
    )]
    Overlay,
}

pub(crate) fn register(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    gst::Element::register(
        Some(plugin),
        "qemudisplaysrc",
        gst::Rank::NONE,
        QemuDisplaySrc::static_type(),
    )
}
