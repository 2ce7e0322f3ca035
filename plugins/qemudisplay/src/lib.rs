// SPDX-License-Identifier: MIT OR Apache-2.0

//! A console of a running, stock QEMU as a live video source.
//!
//! The plugin registers `qemudisplaysrc`. docs/elements/qemudisplaysrc.md is its page. How
//! pictures are had from QEMU is in the crate `qemu-display`, which knows no GStreamer; how they
//! become buffers with caps and timestamps is in `qemudisplaysrc`.

mod qemudisplaysrc;

pub use qemudisplaysrc::QemuDisplaySrc;

#[expect(
    missing_docs,
    reason = "the macro's items are for GStreamer, not for readers"
)]
mod definition {
    use gst::glib;

    fn plugin_init(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
        crate::qemudisplaysrc::register(plugin)
    }

    gst::plugin_define!(
        qemudisplay,
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
