// SPDX-License-Identifier: MIT OR Apache-2.0

//! The properties of vsockenc.

use std::path::PathBuf;

use gst::glib;
use gst::prelude::*;
use zerocopy_plugin_common::ConnectionSettings;

use super::Transfer;
use super::imp::MOST_IN_FLIGHT;

/// What the properties say.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub connection: ConnectionSettings,
    /// bit/s.
    pub bitrate: u32,
    /// Frames; 0 = only when asked for.
    pub keyframe_interval: u32,
    /// Frames.
    pub max_in_flight: u32,
    pub transfer: Transfer,
    /// DRM node to ask for resource ids; `None` = the one found by its driver.
    pub render_node: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connection: ConnectionSettings::default(),
            bitrate: 4_000_000,
            keyframe_interval: 60,
            max_in_flight: 2,
            transfer: Transfer::Auto,
            render_node: None,
        }
    }
}

impl Settings {
    /// The properties, `stats` included.
    pub fn properties() -> Vec<glib::ParamSpec> {
        let default = Settings::default();
        let mut properties = ConnectionSettings::properties();
        properties.extend([
            glib::ParamSpecInt::builder("bitrate")
                .nick("Bitrate")
                .blurb("Bitrate in bit/s (not kbit/s); may be changed while playing")
                .minimum(1)
                .default_value(default.bitrate as i32)
                .mutable_playing()
                .build(),
            glib::ParamSpecInt::builder("keyframe-interval")
                .nick("Keyframe interval")
                .blurb("Frames from one keyframe to the next (0 = only when asked for)")
                .minimum(0)
                .default_value(default.keyframe_interval as i32)
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("max-in-flight")
                .nick("Frames in flight")
                .blurb("Frames that are sent to the host before one of them must be answered")
                .minimum(1)
                .maximum(MOST_IN_FLIGHT.into())
                .default_value(default.max_in_flight)
                .mutable_playing()
                .build(),
            glib::ParamSpecEnum::builder_with_default("transfer", default.transfer)
                .nick("Transfer")
                .blurb("How pixels travel to the host; any but auto is strict")
                .mutable_ready()
                .build(),
            glib::ParamSpecString::builder("render-node")
                .nick("Render node")
                .blurb(
                    "DRM node that knows resource ids; null = the one whose driver is virtio_gpu",
                )
                .mutable_ready()
                .build(),
            glib::ParamSpecBoxed::builder::<gst::Structure>("stats")
                .nick("Statistics")
                .blurb("What happened since the element was started; see the element's page")
                .read_only()
                .build(),
        ]);
        properties
    }

    /// Sets a property.
    pub fn set(&mut self, value: &glib::Value, pspec: &glib::ParamSpec) {
        if self.connection.set(value, pspec) {
            return;
        }
        let checked = "GObject checked the type";
        match pspec.name() {
            "bitrate" => self.bitrate = value.get::<i32>().expect(checked).unsigned_abs(),
            "keyframe-interval" => {
                self.keyframe_interval = value.get::<i32>().expect(checked).unsigned_abs();
            }
            "max-in-flight" => self.max_in_flight = value.get().expect(checked),
            "transfer" => self.transfer = value.get().expect(checked),
            "render-node" => {
                let path: Option<PathBuf> = value.get().expect(checked);
                self.render_node = path.filter(|path| !path.as_os_str().is_empty());
            }
            name => unreachable!("no writable property {name} was installed"),
        }
    }

    /// The value of a property that is a setting.
    pub fn get(&self, pspec: &glib::ParamSpec) -> glib::Value {
        if let Some(value) = self.connection.get(pspec) {
            return value;
        }
        match pspec.name() {
            "bitrate" => (self.bitrate as i32).to_value(),
            "keyframe-interval" => (self.keyframe_interval as i32).to_value(),
            "max-in-flight" => self.max_in_flight.to_value(),
            "transfer" => self.transfer.to_value(),
            "render-node" => self.render_node.to_value(),
            name => unreachable!("no setting {name} was installed"),
        }
    }
}
