// SPDX-License-Identifier: MIT OR Apache-2.0

//! A desktop's ScreenCast, or any other video node of PipeWire, as a live video source.
//!
//! The plugin registers `pipewirezerocopysrc`. docs/elements/pipewirezerocopysrc.md is its page.
//! How frames are had from PipeWire is in [`capture`], how DMA-BUFs are imported by a GPU in [`egl`];
//! neither knows GStreamer. How frames become
//! buffers with caps, timestamps and keepalives is in `pipewirezerocopysrc`.

pub mod capture;
pub mod cuda;
pub mod egl;
mod pipewirezerocopysrc;

pub use pipewirezerocopysrc::PipeWireZeroCopySrc;

#[expect(
    missing_docs,
    reason = "the macro's items are for GStreamer, not for readers"
)]
mod definition {
    use gst::glib;

    fn plugin_init(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
        crate::pipewirezerocopysrc::register(plugin)
    }

    gst::plugin_define!(
        pipewirezerocopy,
        env!("CARGO_PKG_DESCRIPTION"),
        plugin_init,
        concat!(env!("CARGO_PKG_VERSION"), "-", env!("COMMIT_ID")),
        "MIT/X11",
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_REPOSITORY"),
        env!("BUILD_REL_DATE")
    );
}

pub use definition::plugin_register_static;
