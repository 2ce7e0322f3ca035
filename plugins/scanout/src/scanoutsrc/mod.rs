// SPDX-License-Identifier: MIT OR Apache-2.0

use gst::glib;
use gst::prelude::*;

mod figures;
mod imp;
mod low_delay;
mod output;
mod scanout_id;
mod settings;
mod streaming;

glib::wrapper! {
    /// The element `scanoutsrc`: the H.264 stream of a VM's screen, pushed by the VM's host.
    pub struct ScanoutSrc(ObjectSubclass<imp::ScanoutSrc>)
        @extends gst_base::PushSrc, gst_base::BaseSrc, gst::Element, gst::Object;
}

pub(crate) fn register(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    gst::Element::register(
        Some(plugin),
        "scanoutsrc",
        gst::Rank::NONE,
        ScanoutSrc::static_type(),
    )
}
