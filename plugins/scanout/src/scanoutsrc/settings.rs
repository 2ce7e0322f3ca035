// SPDX-License-Identifier: MIT OR Apache-2.0

//! The element's properties, and what follows from them at the start.

use std::path::Path;

use gst::glib;
use gst::prelude::*;
use helix_protocol::message::EnableScanout;
use helix_protocol::wait::Deadline;
use zerocopy_plugin_common::ConnectionSettings;

use crate::lease::{Lease, LeaseError};
use crate::subscription::Target;

/// Ids fit the 16 bits that a message's header has for them.
const LAST_SCANOUT: i32 = u16::MAX as i32;

/// What the application has set.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub connection: ConnectionSettings,
    /// -1 = found elsewhere.
    pub scanout_id: i32,
    pub drm_socket: Option<String>,
    pub enable: bool,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Hz.
    pub refresh_rate: u32,
    /// bit/s; 0 = the host's.
    pub bitrate: u32,
    pub low_delay_vui: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connection: ConnectionSettings::default(),
            scanout_id: -1,
            drm_socket: None,
            enable: false,
            width: 1920,
            height: 1080,
            refresh_rate: 60,
            bitrate: 0,
            low_delay_vui: false,
        }
    }
}

impl Settings {
    /// The properties that are settings.
    pub fn properties() -> Vec<glib::ParamSpec> {
        let default = Self::default();
        let mut properties = ConnectionSettings::properties();
        properties.extend([
            glib::ParamSpecInt::builder("scanout-id")
                .nick("Scanout id")
                .blurb(
                    "Which scanout (-1 = environment HELIX_SCANOUT_ID, else the file \
                     helix-scanout-id in XDG_RUNTIME_DIR, else a lease from drm-socket)",
                )
                .minimum(-1)
                .maximum(LAST_SCANOUT)
                .default_value(default.scanout_id)
                .mutable_ready()
                .build(),
            glib::ParamSpecString::builder("drm-socket")
                .nick("Lease socket")
                .blurb(
                    "Unix socket that lends a scanout where no id is given (null = the first that \
                     exists of /run/helix-drm/drm.sock and /run/helix-drm.sock)",
                )
                .default_value(default.drm_socket.as_deref())
                .mutable_ready()
                .build(),
            glib::ParamSpecBoolean::builder("enable")
                .nick("Enable")
                .blurb("Switch the scanout on before subscribing, and off at the end")
                .default_value(default.enable)
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("width")
                .nick("Width")
                .blurb("Width in pixels that the scanout is switched on with (enable)")
                .minimum(1)
                .maximum(8192)
                .default_value(default.width)
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("height")
                .nick("Height")
                .blurb("Height in pixels that the scanout is switched on with (enable)")
                .minimum(1)
                .maximum(8192)
                .default_value(default.height)
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("refresh-rate")
                .nick("Refresh rate")
                .blurb("Refresh rate in Hz that the scanout is switched on with (enable)")
                .minimum(1)
                .maximum(1000)
                .default_value(default.refresh_rate)
                .mutable_ready()
                .build(),
            glib::ParamSpecInt::builder("bitrate")
                .nick("Bitrate")
                .blurb(
                    "Bitrate in bit/s (not kbit/s) to ask the host for (0 = leave it to the \
                     host); may be changed while playing",
                )
                .minimum(0)
                .default_value(default.bitrate as i32)
                .mutable_playing()
                .build(),
            glib::ParamSpecBoolean::builder("low-delay-vui")
                .nick("Low delay VUI")
                .blurb(
                    "Rewrite the stream's parameter sets so that decoders hold no picture \
                     back; not for streams with B pictures",
                )
                .default_value(default.low_delay_vui)
                .mutable_ready()
                .build(),
        ]);
        properties
    }

    /// Stores a property's new value.
    pub fn set(&mut self, value: &glib::Value, pspec: &glib::ParamSpec) {
        if self.connection.set(value, pspec) {
            return;
        }
        let checked = "GObject checked the type";
        match pspec.name() {
            "scanout-id" => self.scanout_id = value.get().expect(checked),
            "drm-socket" => {
                let path: Option<String> = value.get().expect(checked);
                self.drm_socket = path.filter(|path| !path.is_empty());
            }
            "enable" => self.enable = value.get().expect(checked),
            "width" => self.width = value.get().expect(checked),
            "height" => self.height = value.get().expect(checked),
            "refresh-rate" => self.refresh_rate = value.get().expect(checked),
            "bitrate" => self.bitrate = value.get::<i32>().expect(checked).unsigned_abs(),
            "low-delay-vui" => self.low_delay_vui = value.get().expect(checked),
            name => unreachable!("no writable property {name} was installed"),
        }
    }

    /// A property's value.
    pub fn get(&self, pspec: &glib::ParamSpec) -> glib::Value {
        if let Some(value) = self.connection.get(pspec) {
            return value;
        }
        match pspec.name() {
            "scanout-id" => self.scanout_id.to_value(),
            "drm-socket" => self.drm_socket.to_value(),
            "enable" => self.enable.to_value(),
            "width" => self.width.to_value(),
            "height" => self.height.to_value(),
            "refresh-rate" => self.refresh_rate.to_value(),
            "bitrate" => (self.bitrate as i32).to_value(),
            "low-delay-vui" => self.low_delay_vui.to_value(),
            name => unreachable!("no property {name} was installed"),
        }
    }

    /// What to subscribe to, until `give_up` at the latest.
    pub fn target(&self, scanout_id: u16, give_up: Deadline) -> Target {
        let scanout_id = scanout_id.into();
        Target {
            address: self.connection.address(),
            scanout_id,
            enable: self.enable.then_some(EnableScanout {
                scanout_id,
                width: self.width,
                height: self.height,
                refresh_rate: self.refresh_rate,
            }),
            timeout: self.connection.timeout(),
            give_up,
            auth_token: self.connection.auth_token(),
        }
    }

    /// Asks for a scanout to borrow.
    pub fn ask_for_lease(&self) -> Result<Lease, LeaseError> {
        let socket = self.drm_socket.as_deref().map(Path::new);
        Lease::ask(socket, self.width, self.height)
    }
}
