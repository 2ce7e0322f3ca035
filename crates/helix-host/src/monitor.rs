// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the host says of itself: a line in the log now and then, and figures for Prometheus.
//!
//! One thread does both. It answers HTTP/1.0, which every client still speaks, and as little of it
//! as figures need: the path is not looked at, and each answer ends the connection.

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use helix_protocol::wait::{Deadline, Waiter, Wake};
use helix_protocol::{Listener, Stream};

use self::figures::Figures;

pub mod figures;

/// The status line comes so often at most.
const STATUS: Duration = Duration::from_mins(1);
/// From accepting a connection to its end, however slow the other side is.
const PATIENCE: Duration = Duration::from_secs(2);
/// Connections at once; one more takes the place of the oldest.
const CONNECTIONS: usize = 8;
/// Bytes of a request, its headers included.
const REQUEST: usize = 8192;

/// The thread's own.
pub struct Monitor<F> {
    listener: Option<Listener>,
    waiter: Waiter,
    figures: F,
    /// Between two lines in the log.
    status: Duration,
    visitors: Vec<Visitor>,
}

/// Somebody who asks for figures.
struct Visitor {
    stream: Stream,
    until: Instant,
    request: Vec<u8>,
    /// What is left to send, once the request is there.
    answer: Option<Vec<u8>>,
}

impl<F: Fn() -> Figures> Monitor<F> {
    /// `figures` says how things stand.
    pub fn new(listener: Option<Listener>, waiter: Waiter, figures: F) -> io::Result<Self> {
        if let Some(listener) = &listener {
            waiter.register(listener.as_fd())?;
        }
        Ok(Self {
            listener,
            waiter,
            figures,
            status: STATUS,
            visitors: Vec::new(),
        })
    }

    /// Runs until the waiter is cancelled.
    pub fn run(mut self) {
        let mut before = (self.figures)();
        let mut next = Instant::now() + self.status;
        loop {
            let now = Instant::now();
            if now >= next {
                next = now + self.status;
                let figures = (self.figures)();
                // An idle host need not say so all night.
                if figures != before {
                    figures.log();
                    before = figures;
                }
            }
            self.accept();
            let figures = &self.figures;
            self.visitors
                .retain_mut(|visitor| now < visitor.until && visitor.go_on(figures).is_some());
            let until = self.visitors.iter().map(|visitor| visitor.until).min();
            match self
                .waiter
                .wait(Deadline::at(until.map_or(next, |until| until.min(next))))
            {
                Ok(Wake::Cancelled) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "waiting failed; no more figures are given");
                    return;
                }
            }
        }
    }

    fn accept(&mut self) {
        // An error may pass; who asks for figures asks again.
        while let Some(Ok(Some(stream))) = self.listener.as_ref().map(Listener::accept) {
            if self.waiter.register(stream.as_fd()).is_err() {
                continue;
            }
            if self.visitors.len() >= CONNECTIONS {
                self.visitors.remove(0);
            }
            self.visitors.push(Visitor {
                stream,
                until: Instant::now() + PATIENCE,
                request: Vec::new(),
                answer: None,
            });
        }
    }
}

impl Visitor {
    /// Does what can be done without waiting. `None`: the connection is over.
    fn go_on(&mut self, figures: impl Fn() -> Figures) -> Option<()> {
        while self.answer.is_none() {
            let mut space = [0; 1024];
            match self.stream.recv(&mut space) {
                Ok(0) => return None,
                Ok(length) => self.request.extend_from_slice(&space[..length]),
                Err(error) => return waits(&error),
            }
            let ended = |end: &[u8]| self.request.windows(end.len()).any(|part| part == end);
            if ended(b"\r\n\r\n") || ended(b"\n\n") {
                self.answer = Some(answer(&self.request, &figures()).into_bytes());
                break;
            }
            if self.request.len() > REQUEST {
                return None;
            }
        }
        let answer = self.answer.as_mut()?;
        while !answer.is_empty() {
            match self.stream.send(&[IoSlice::new(answer)]) {
                Ok(length) => {
                    answer.drain(..length);
                }
                Err(error) => return waits(&error),
            }
        }
        None
    }
}

/// Whether there is only nothing to do at the moment.
fn waits(error: &io::Error) -> Option<()> {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted).then_some(())
}

fn answer(request: &[u8], figures: &Figures) -> String {
    let (status, body) = if request.starts_with(b"GET ") {
        ("200 OK", figures.text())
    } else {
        ("405 Method Not Allowed", "only GET\n".to_owned())
    };
    // The version is that of Prometheus' text format.
    format!(
        "HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::monitor::figures::{Encoded, QemuFigures};
    use crate::scanout;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged meanwhile.
    fn logged(meanwhile: impl FnOnce()) -> String {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, meanwhile);
        let bytes = log.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_status_line_is_about_all_scanouts_together() {
        let scanout = |factor| scanout::Figures {
            subscribers: factor,
            frames: 10 * factor,
            bytes: 0,
            dropped: 100 * factor,
            encode_errors: 1000 * factor,
        };
        let encoded = Encoded::default();
        encoded.add(5);
        encoded.add_error();
        let figures = Figures {
            clients: 7,
            scanouts: vec![(0, scanout(1)), (3, scanout(2))],
            qemu: Some(QemuFigures {
                connected: true,
                reconnects: 4,
            }),
            ..Figures::default()
        };
        let line = logged(|| figures.with_encoded(&encoded).log());
        let said = "status clients=7 encoded=1 subscribers=3 pushed=30 dropped=300 errors=3001 reconnects=4";
        assert!(line.trim_end().ends_with(said), "{line}");
    }

    #[test]
    fn the_status_line_comes_when_something_has_changed() {
        let waiter = Waiter::new().unwrap();
        let waker = waiter.waker();
        let calls = AtomicU64::new(0);
        // Once for what there is at the start, then for each time; the second of those has news.
        let figures = || {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            if call == 4 {
                waker.cancel();
            }
            Figures {
                clients: u64::from(call >= 2),
                ..Figures::default()
            }
        };
        let monitor = Monitor {
            status: Duration::from_millis(1),
            ..Monitor::new(None, waiter, &figures).unwrap()
        };
        let log = logged(|| monitor.run());
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("status clients=1 "), "{log}");
    }
}
