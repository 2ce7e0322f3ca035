// SPDX-License-Identifier: MIT OR Apache-2.0

//! The GStreamer plugin `pipewirezerocopy`.
//!
//! It has one element, [`pipewirezerocopysrc`]: a desktop's ScreenCast, or any other video node of
//! PipeWire, as a live source. How frames are had from PipeWire is in [`capture`], which knows no
//! GStreamer; how they become buffers with caps, timestamps and keepalives is in
//! [`pipewirezerocopysrc`].

use gst::glib;

pub mod capture;
pub mod pipewirezerocopysrc;

fn plugin_init(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    pipewirezerocopysrc::register(plugin)
}

gst::plugin_define!(
    pipewirezerocopy,
    env!("CARGO_PKG_DESCRIPTION"),
    plugin_init,
    concat!(env!("CARGO_PKG_VERSION"), "-", env!("COMMIT_ID")),
    "MIT/X11",
    env!("CARGO_PKG_NAME"),
    env!("CARGO_PKG_NAME"),
    "https://github.com/helixml/gst-plugins-zerocopy",
    env!("BUILD_REL_DATE")
);
