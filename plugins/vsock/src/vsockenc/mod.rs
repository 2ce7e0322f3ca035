// SPDX-License-Identifier: MIT OR Apache-2.0

use gst::glib;
use gst::prelude::*;

mod formats;
mod imp;
mod input;
mod latency;
mod metas;
mod output;
mod release;
mod settings;
mod stream_lock;
#[cfg(test)]
mod tests;

glib::wrapper! {
    /// The element `vsockenc`: an H.264 encoder whose work is done by a host.
    pub struct VsockEnc(ObjectSubclass<imp::VsockEnc>)
        @extends gst_video::VideoEncoder, gst::Element, gst::Object;
}

/// How pixels travel to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVsockEncTransfer")]
#[repr(i32)]
pub enum Transfer {
    /// The cheapest that both ends can do.
    #[default]
    #[enum_value(name = "The cheapest way that both ends can do", nick = "auto")]
    Auto,
    /// The number of a virtio-gpu resource that the host owns.
    #[enum_value(name = "virtio-gpu resource ids", nick = "resource-id")]
    ResourceId,
    /// A file descriptor over a unix socket.
    #[enum_value(name = "File descriptors (not in this version)", nick = "fd")]
    Fd,
    /// The pixels themselves.
    #[enum_value(name = "The pixels themselves", nick = "pixels")]
    Pixels,
}

pub(crate) fn register(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    gst::Element::register(
        Some(plugin),
        "vsockenc",
        gst::Rank::NONE,
        VsockEnc::static_type(),
    )
}
