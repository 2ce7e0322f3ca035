// SPDX-License-Identifier: MIT OR Apache-2.0

//! A session without an element: what it tells its client when hosts behave in this way and that.

use std::sync::mpsc::{Receiver, Sender, channel};

use gst::glib;
use helix_protocol::Agreement;
use helix_protocol::message::Config;
use helix_protocol::wait::Waiter;
use zerocopy_plugin_common::ConnectionSettings;
use zerocopy_test_support::peer::LONG;

use super::*;

mod faults;
mod greeting;
mod replies;

/// What the session told.
#[derive(Debug)]
enum Told {
    Connected(Agreement),
    Configured {
        given: u32,
        in_force: u32,
    },
    Encoded {
        frame: u32,
        data: Vec<u8>,
        after_loss: bool,
        took: Duration,
    },
    Dropped(u32),
    Refused,
    Reconnecting,
    Failed(String),
}

struct Recorder(Sender<Told>);

impl Recorder {
    fn tell(&self, told: Told) {
        // A test that has heard enough no longer listens.
        let _ = self.0.send(told);
    }
}

impl Client for Recorder {
    fn connected(&self, _: &str, host: &Agreement, _: Option<Way>) {
        self.tell(Told::Connected(host.clone()));
    }

    fn configured(&self, given: &Config, in_force: &Config) {
        let (given, in_force) = (given.bitrate, in_force.bitrate);
        self.tell(Told::Configured { given, in_force });
    }

    fn encoded(&self, frame: u32, access_unit: AccessUnit) {
        self.tell(Told::Encoded {
            frame,
            data: access_unit.data.to_vec(),
            after_loss: access_unit.after_loss,
            took: access_unit.took,
        });
    }

    fn dropped(&self, frame: u32, _: &str) {
        self.tell(Told::Dropped(frame));
    }

    fn transfer(&self, _: Way, _: &str) {}

    fn refused(&self, _: &str) {
        self.tell(Told::Refused);
    }

    fn reconnecting(&self, _: &str) {
        self.tell(Told::Reconnecting);
    }

    fn failed(&self, reason: &str) {
        self.tell(Told::Failed(reason.to_owned()));
    }
}

/// A session and who listens to it.
struct Run {
    session: Session,
    waiter: Waiter,
    told: Receiver<Told>,
    counts: Arc<Mutex<Counts>>,
}

/// Settings in the form in which an application gives them.
fn connection(properties: &[(&str, &dyn glib::value::ToValue)]) -> ConnectionSettings {
    let pspecs = ConnectionSettings::properties();
    let mut settings = ConnectionSettings::default();
    for (name, value) in properties {
        let pspec = pspecs.iter().find(|pspec| pspec.name() == *name);
        assert!(settings.set(&value.to_value(), pspec.expect("a property")));
    }
    settings
}

impl Run {
    fn new(properties: &[(&str, &dyn glib::value::ToValue)]) -> Self {
        Self::with(properties, SIGN_OF_LIFE)
    }

    fn with(properties: &[(&str, &dyn glib::value::ToValue)], sign_of_life: Duration) -> Self {
        gst::init().unwrap();
        let waiter = Waiter::new().unwrap();
        let (tell, told) = channel();
        let counts = Arc::default();
        let settings = SessionSettings {
            connection: connection(properties),
            keyframe_interval: 0,
            transfer: Transfer::Auto,
            max_in_flight: 16,
            sign_of_life,
            counts: Arc::clone(&counts),
        };
        let session = Session::start(settings, waiter.waker(), Recorder(tell)).unwrap();
        Self {
            session,
            waiter,
            told,
            counts,
        }
    }

    fn configure(&self) {
        self.session.configure(format());
    }

    /// Submits frame `number`, with a PTS of as many milliseconds.
    fn submit(&mut self, number: u32) -> Submission {
        let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::Bgrx, 2, 2)
            .build()
            .unwrap();
        let buffer = gst::Buffer::from_slice([number as u8; 16]);
        let request = Request {
            frame: number,
            pts: i64::from(number) * 1_000_000,
            duration: 1_000_000,
            force_keyframe: false,
            picture: Picture::new(buffer, &info).unwrap(),
            resource: None,
        };
        self.session.submit(&mut self.waiter, 16, request)
    }

    fn next(&self) -> Told {
        self.told.recv_timeout(LONG).expect("the session is silent")
    }

    /// Waits for something that `pick` picks from what the session tells.
    fn wait_for<T>(&self, mut pick: impl FnMut(Told) -> Option<T>) -> T {
        loop {
            if let Some(found) = pick(self.next()) {
                return found;
            }
        }
    }

    /// The next frame that is encoded or dropped, and whether it was encoded.
    fn outcome(&self) -> (u32, bool) {
        self.wait_for(|told| match told {
            Told::Encoded { frame, .. } => Some((frame, true)),
            Told::Dropped(frame) => Some((frame, false)),
            Told::Failed(reason) => panic!("{reason}"),
            _ => None,
        })
    }

    fn failure(&self) -> String {
        self.wait_for(|told| match told {
            Told::Failed(reason) => Some(reason),
            _ => None,
        })
    }
}

/// 2x2 pixels, 4 Mbit/s.
fn format() -> Format {
    let config = Config {
        width: 2,
        height: 2,
        bitrate: 4_000_000,
        framerate_num: 60,
        framerate_den: 1,
        profile: 77,
        level: 30,
        realtime: true,
    };
    Format { config, pixels: 16 }
}
