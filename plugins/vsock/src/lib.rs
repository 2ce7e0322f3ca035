// SPDX-License-Identifier: MIT OR Apache-2.0

//! Video encoding on another machine that has the encoder: the host of this VM or container.
//!
//! The plugin registers `vsockenc`. docs/elements/vsockenc.md is its page.

mod dmabuf;
#[cfg(test)]
mod fake;
mod picture;
mod pixels;
mod session;
mod virtgpu;
mod vsockenc;

pub use vsockenc::VsockEnc;

#[expect(
    missing_docs,
    reason = "the macro's items are for GStreamer, not for readers"
)]
mod definition {
    use gst::glib;

    fn plugin_init(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
        crate::vsockenc::register(plugin)
    }

    gst::plugin_define!(
        vsock,
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
