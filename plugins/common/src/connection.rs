// SPDX-License-Identifier: MIT OR Apache-2.0

//! The properties that say where the host is, the same on every element that talks to one, and
//! the element message that says how it goes.

use std::time::Duration;

use gst::glib;
use gst::prelude::*;
use helix_protocol::Address;
use helix_protocol::address::{DEFAULT_TCP_PORT, DEFAULT_VSOCK_PORT, VSOCK_CID_HOST};
use helix_protocol::message::{AuthToken, ErrorCode, ErrorMessage};
use helix_protocol::wait::Deadline;

/// Where the host is and how long to wait for it.
#[derive(Clone, Debug)]
pub struct ConnectionSettings {
    socket_path: Option<String>,
    tcp_host: Option<String>,
    tcp_port: u32,
    cid: u32,
    port: u32,
    timeout: u32,
    reconnect_timeout: u32,
    auth_token: Option<AuthToken>,
}

impl Default for ConnectionSettings {
    fn default() -> Self {
        Self {
            socket_path: None,
            tcp_host: None,
            tcp_port: DEFAULT_TCP_PORT.into(),
            cid: VSOCK_CID_HOST,
            port: DEFAULT_VSOCK_PORT,
            timeout: 5000,
            reconnect_timeout: 10_000,
            auth_token: None,
        }
    }
}

impl ConnectionSettings {
    /// The properties, to be put beside an element's own.
    pub fn properties() -> Vec<glib::ParamSpec> {
        let default = Self::default();
        vec![
            glib::ParamSpecString::builder("socket-path")
                .nick("Socket path")
                .blurb("Path of the host's unix socket; goes before tcp-host and vsock")
                .mutable_ready()
                .build(),
            glib::ParamSpecString::builder("tcp-host")
                .nick("TCP host")
                .blurb("Host name, IPv4 or IPv6 address of the host; goes before vsock")
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("tcp-port")
                .nick("TCP port")
                .blurb("TCP port of the host, used with tcp-host")
                .minimum(1)
                .maximum(65535)
                .default_value(default.tcp_port)
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("cid")
                .nick("vsock CID")
                .blurb("AF_VSOCK context id of the host (2 = the machine that runs this VM)")
                .default_value(default.cid)
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("port")
                .nick("vsock port")
                .blurb("AF_VSOCK port of the host")
                .default_value(default.port)
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("timeout")
                .nick("Timeout")
                .blurb("Limit in ms for connecting and for each reply of the host (0 = no limit)")
                .default_value(default.timeout)
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("reconnect-timeout")
                .nick("Reconnect timeout")
                .blurb(
                    "How long in ms to go on trying after the host was lost \
                     (0 = an error at once)",
                )
                .default_value(default.reconnect_timeout)
                .mutable_ready()
                .build(),
            // Write-only: nothing that shows properties, dumps of pipelines included, shows it.
            glib::ParamSpecString::builder("auth-token")
                .nick("Auth token")
                .blurb("Token that lets this client in where the host asks for one; cannot be read")
                .write_only()
                .mutable_ready()
                .build(),
        ]
    }

    /// Sets the property if it is one of these; whether it was.
    pub fn set(&mut self, value: &glib::Value, pspec: &glib::ParamSpec) -> bool {
        /// The value of a property whose type GObject has checked.
        fn get<'a, T: glib::value::FromValue<'a>>(value: &'a glib::Value) -> T
        where
            T::Checker: glib::value::ValueTypeChecker<Error: std::fmt::Debug>,
        {
            value.get().expect("GObject checked the type")
        }
        match pspec.name() {
            "socket-path" => self.socket_path = get::<Option<String>>(value).filter(not_empty),
            "tcp-host" => self.tcp_host = get::<Option<String>>(value).filter(not_empty),
            "tcp-port" => self.tcp_port = get(value),
            "cid" => self.cid = get(value),
            "port" => self.port = get(value),
            "timeout" => self.timeout = get(value),
            "reconnect-timeout" => self.reconnect_timeout = get(value),
            "auth-token" => {
                let token = get::<Option<String>>(value).filter(not_empty);
                self.auth_token = token.map(|token| AuthToken(token.into_bytes()));
            }
            _ => return false,
        }
        true
    }

    /// The property's value if it is one of these.
    pub fn get(&self, pspec: &glib::ParamSpec) -> Option<glib::Value> {
        Some(match pspec.name() {
            "socket-path" => self.socket_path.to_value(),
            "tcp-host" => self.tcp_host.to_value(),
            "tcp-port" => self.tcp_port.to_value(),
            "cid" => self.cid.to_value(),
            "port" => self.port.to_value(),
            "timeout" => self.timeout.to_value(),
            "reconnect-timeout" => self.reconnect_timeout.to_value(),
            _ => return None,
        })
    }

    /// What lets this client in.
    pub fn auth_token(&self) -> Option<AuthToken> {
        self.auth_token.clone()
    }

    /// Fails, with a reason for a person, where no host could make use of these.
    pub fn check(&self) -> Result<(), String> {
        let size = self.auth_token.as_ref().map_or(0, |token| token.0.len());
        if size > AuthToken::MAX_SIZE {
            return Err(format!(
                "auth-token has {size} bytes, and no host takes over {}: give the same token to \
                 both",
                AuthToken::MAX_SIZE
            ));
        }
        Ok(())
    }

    /// What to tell a person of a host that refuses this client.
    pub fn refusal(&self, error: &ErrorMessage) -> String {
        let address = self.address();
        let (code, text) = (error.code, &error.text);
        let advice = match (error.code, &self.auth_token) {
            (ErrorCode::INTERNAL, _) => "",
            // Hosts refuse for other reasons too, and their text says which.
            _ if !text.contains("token") => "",
            (_, None) => " (does it want a token? Set auth-token)",
            (_, Some(_)) => " (is auth-token the one that the host was given?)",
        };
        format!("{address} refuses this client: {code}: {text}{advice}")
    }

    /// The host: the unix socket, else TCP, else AF_VSOCK.
    pub fn address(&self) -> Address {
        match (&self.socket_path, &self.tcp_host) {
            (Some(path), _) => Address::Unix(path.into()),
            (None, Some(host)) => {
                let host = host.trim_start_matches('[').trim_end_matches(']');
                // The property's range keeps it within 16 bits.
                Address::Tcp {
                    host: host.to_owned(),
                    port: self.tcp_port as u16,
                }
            }
            (None, None) => Address::Vsock {
                cid: self.cid,
                port: self.port,
            },
        }
    }

    /// Until when an answer to what is asked now must be there.
    pub fn reply_deadline(&self) -> Deadline {
        Deadline::after_millis(self.timeout)
    }

    /// The limit for connecting and for each reply; `None` = none.
    pub fn timeout(&self) -> Option<Duration> {
        (self.timeout > 0).then(|| Duration::from_millis(self.timeout.into()))
    }

    /// How long a lost host is called.
    pub fn reconnect_timeout(&self) -> Duration {
        Duration::from_millis(self.reconnect_timeout.into())
    }
}

#[expect(clippy::ptr_arg, reason = "the form Option::filter wants")]
fn not_empty(text: &String) -> bool {
    !text.is_empty()
}

/// What an application may want to know of an element's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// The host answered.
    Connected,
    /// The host was lost and is being called.
    Reconnecting,
    /// The host was not found again in time; an error follows.
    Lost,
}

/// The element message `helix-connection`: `state` (connected, reconnecting, lost), `address`,
/// `peer`, `transfer` (how pixels travel, empty where none do) and `reason`, all strings.
pub fn connection_message(
    src: &impl IsA<gst::Object>,
    state: ConnectionState,
    address: &Address,
    peer: &str,
    transfer: &str,
    reason: &str,
) -> gst::Message {
    let state = match state {
        ConnectionState::Connected => "connected",
        ConnectionState::Reconnecting => "reconnecting",
        ConnectionState::Lost => "lost",
    };
    let structure = gst::Structure::builder("helix-connection")
        .field("state", state)
        .field("address", address.to_string())
        .field("peer", peer)
        .field("transfer", transfer)
        .field("reason", reason)
        .build();
    gst::message::Element::builder(structure).src(src).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(settings: &mut ConnectionSettings, name: &str, value: impl Into<glib::Value>) {
        let properties = ConnectionSettings::properties();
        let pspec = properties
            .iter()
            .find(|pspec| pspec.name() == name)
            .unwrap();
        assert!(settings.set(&value.into(), pspec));
    }

    #[test]
    fn the_unix_socket_goes_before_tcp_and_tcp_before_vsock() {
        let mut settings = ConnectionSettings::default();
        assert_eq!(settings.address().to_string(), "vsock:2:5000");
        set(&mut settings, "tcp-host", "::1");
        assert_eq!(settings.address().to_string(), "tcp:[::1]:15937");
        set(&mut settings, "tcp-host", "[::1]");
        assert_eq!(settings.address().to_string(), "tcp:[::1]:15937");
        set(&mut settings, "socket-path", "/run/x.sock");
        assert_eq!(settings.address().to_string(), "unix:/run/x.sock");
        set(&mut settings, "socket-path", "");
        assert_eq!(settings.address().to_string(), "tcp:[::1]:15937");
    }

    #[test]
    fn every_property_but_the_token_can_be_read_and_has_its_default() {
        let settings = ConnectionSettings::default();
        for pspec in ConnectionSettings::properties() {
            assert!(pspec.blurb().is_some_and(|blurb| blurb.len() > 20));
            if pspec.name() == "auth-token" {
                assert!(!pspec.flags().contains(glib::ParamFlags::READABLE));
                continue;
            }
            let value = settings.get(&pspec).unwrap();
            assert_eq!(format!("{value:?}"), format!("{:?}", pspec.default_value()));
        }
    }

    #[test]
    fn a_refusal_speaks_of_the_token_only_where_the_host_does() {
        let mut settings = ConnectionSettings::default();
        let refusal = |settings: &ConnectionSettings, code, text: &str| {
            let text = text.to_owned();
            let tag = None;
            settings.refusal(&ErrorMessage { code, text, tag })
        };
        let (code, token) = (ErrorCode::INVALID_MESSAGE, "the auth token is missing");
        let cid = "this machine's CID may not connect (--allow-cid)";
        assert!(refusal(&settings, code, token).contains("Set auth-token"));
        assert!(refusal(&settings, code, cid).ends_with(cid));
        set(&mut settings, "auth-token", "s3cret");
        assert!(refusal(&settings, code, token).contains("is auth-token the one"));
        assert!(refusal(&settings, code, cid).ends_with(cid));
    }

    #[test]
    fn a_token_that_no_host_would_take_is_refused_with_the_limit() {
        let mut settings = ConnectionSettings::default();
        assert_eq!(settings.check(), Ok(()));
        set(&mut settings, "auth-token", "x".repeat(1024));
        assert_eq!(settings.check(), Ok(()));
        set(&mut settings, "auth-token", "x".repeat(1025));
        let reason = settings.check().unwrap_err();
        assert!(
            reason.contains("1025 bytes") && reason.contains("1024"),
            "{reason}"
        );
    }

    #[test]
    fn the_token_does_not_show() {
        let mut settings = ConnectionSettings::default();
        set(&mut settings, "auth-token", "s3cret");
        assert_eq!(settings.auth_token().unwrap().0, b"s3cret");
        assert!(!format!("{settings:?}").contains("s3cret"));
        set(&mut settings, "auth-token", "");
        assert!(settings.auth_token().is_none());
    }
}
