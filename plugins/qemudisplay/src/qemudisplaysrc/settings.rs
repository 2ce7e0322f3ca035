// SPDX-License-Identifier: MIT OR Apache-2.0

//! The properties.

use std::path::PathBuf;
use std::time::Duration;

use gst::glib;
use gst::prelude::*;
use qemu_display::{Address, MAX_SIZE};

use super::CursorMode;

/// What the application has set.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    address: Option<String>,
    qmp_socket: Option<String>,
    pub console: u32,
    width: u32,
    height: u32,
    pub live: LiveSettings,
}

/// Those that may change at any time.
#[derive(Clone, Copy, Debug)]
pub(super) struct LiveSettings {
    max_framerate: gst::Fraction,
    pub cursor: CursorMode,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            address: None,
            qmp_socket: None,
            console: 0,
            width: 0,
            height: 0,
            live: LiveSettings {
                max_framerate: gst::Fraction::new(60, 1),
                cursor: CursorMode::default(),
            },
        }
    }
}

impl LiveSettings {
    /// Above this rate changes become one frame; none without a limit.
    pub fn max_framerate(&self) -> Option<gst::Fraction> {
        Some(self.max_framerate).filter(|rate| rate.numer() > 0)
    }
}

/// The time from one frame to the next.
pub(super) fn interval(rate: gst::Fraction) -> Duration {
    let nanos = u128::from(rate.denom().unsigned_abs()) * 1_000_000_000;
    let nanos = nanos / u128::from(rate.numer().unsigned_abs().max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

impl Settings {
    pub fn properties() -> Vec<glib::ParamSpec> {
        let default = Self::default();
        let size = |name: &str, nick: &str, blurb: &str| {
            glib::ParamSpecUInt::builder(name)
                .nick(nick)
                .blurb(blurb)
                .maximum(MAX_SIZE)
                .default_value(0)
                .mutable_playing()
                .build()
        };
        vec![
            glib::ParamSpecString::builder("address")
                .nick("Address")
                .blurb(
                    "D-Bus address that QEMU was given with -display dbus,addr= (null = the \
                     session bus)",
                )
                .mutable_ready()
                .build(),
            glib::ParamSpecString::builder("qmp-socket")
                .nick("QMP socket")
                .blurb(
                    "Instead of address: QMP unix socket of a QEMU that was started with \
                     -display dbus,p2p=on",
                )
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("console")
                .nick("Console")
                .blurb("Number of the console")
                .default_value(default.console)
                .mutable_ready()
                .build(),
            size(
                "width",
                "Width",
                "Ask the guest for this width in pixels, together with height (0 = leave it)",
            ),
            size(
                "height",
                "Height",
                "Ask the guest for this height in pixels, together with width (0 = leave it)",
            ),
            gst::ParamSpecFraction::builder("max-framerate")
                .nick("Maximum framerate")
                .blurb("Changes that come faster become one frame (0/1 = no limit)")
                .minimum(gst::Fraction::new(0, 1))
                .maximum(gst::Fraction::new(i32::MAX, 1))
                .default_value(default.live.max_framerate)
                .mutable_playing()
                .build(),
            glib::ParamSpecEnum::builder_with_default("cursor", default.live.cursor)
                .nick("Cursor")
                .blurb("What becomes of a cursor that QEMU sends apart from the picture")
                .mutable_playing()
                .build(),
        ]
    }

    /// Sets a property. GObject has checked name, type and range.
    pub fn set(&mut self, value: &glib::Value, pspec: &glib::ParamSpec) {
        let checked = "GObject checked the type";
        match pspec.name() {
            "address" => self.address = value.get().expect(checked),
            "qmp-socket" => self.qmp_socket = value.get().expect(checked),
            "console" => self.console = value.get().expect(checked),
            "width" => self.width = value.get().expect(checked),
            "height" => self.height = value.get().expect(checked),
            "max-framerate" => self.live.max_framerate = value.get().expect(checked),
            "cursor" => self.live.cursor = value.get().expect(checked),
            name => unreachable!("no writable property {name} was installed"),
        }
    }

    pub fn get(&self, pspec: &glib::ParamSpec) -> glib::Value {
        match pspec.name() {
            "address" => self.address.to_value(),
            "qmp-socket" => self.qmp_socket.to_value(),
            "console" => self.console.to_value(),
            "width" => self.width.to_value(),
            "height" => self.height.to_value(),
            "max-framerate" => self.live.max_framerate.to_value(),
            "cursor" => self.live.cursor.to_value(),
            name => unreachable!("no property {name} was installed"),
        }
    }

    /// Where QEMU is, or what is wrong with the settings.
    pub fn address(&self) -> Result<Address, String> {
        match (&self.address, &self.qmp_socket) {
            (Some(_), Some(_)) => Err(
                "address and qmp-socket are both set: is QEMU's display on a bus, or is it p2p?"
                    .to_owned(),
            ),
            (None, Some(path)) => Ok(Address::Qmp(PathBuf::from(path))),
            (Some(address), None) => Ok(Address::Bus(address.clone())),
            (None, None) => Ok(Address::SessionBus),
        }
    }

    /// The size to ask the guest for, if any. Both or none must be set.
    pub fn size(&self) -> Result<Option<(u32, u32)>, String> {
        match (self.width, self.height) {
            (0, 0) => Ok(None),
            (0, _) | (_, 0) => Err(format!(
                "a size of {}x{} cannot be asked for: set both width and height, or none",
                self.width, self.height
            )),
            size => Ok(Some(size)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_rate() {
        for (rate, nanos) in [
            ((60, 1), 16_666_666),
            ((30_000, 1001), 33_366_666),
            ((1, 10), 10_000_000_000),
        ] {
            let rate = gst::Fraction::new(rate.0, rate.1);
            assert_eq!(interval(rate), Duration::from_nanos(nanos));
        }
    }

    #[test]
    fn half_a_size_and_two_addresses_are_refused() {
        let mut settings = Settings {
            width: 1920,
            ..Settings::default()
        };
        assert!(settings.size().is_err());
        settings.height = 1080;
        assert_eq!(settings.size(), Ok(Some((1920, 1080))));
        assert_eq!(settings.address(), Ok(Address::SessionBus));
        settings.qmp_socket = Some("/run/qmp".to_owned());
        assert_eq!(settings.address(), Ok(Address::Qmp("/run/qmp".into())));
        settings.address = Some("unix:path=/run/bus".to_owned());
        assert!(settings.address().is_err());
    }
}
