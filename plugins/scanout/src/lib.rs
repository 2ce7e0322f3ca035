// SPDX-License-Identifier: MIT OR Apache-2.0

//! The screen of a VM as a video source: a client of the stream that the VM's host pushes.
//!
//! The plugin registers `scanoutsrc`. docs/elements/scanoutsrc.md is its page.

mod lease;
mod scanoutsrc;
mod subscription;
mod timeline;

pub use scanoutsrc::ScanoutSrc;

#[expect(
    missing_docs,
    reason = "the macro's items are for GStreamer, not for readers"
)]
mod definition {
    use gst::glib;

    fn plugin_init(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
        crate::scanoutsrc::register(plugin)
    }

    gst::plugin_define!(
        scanout,
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
