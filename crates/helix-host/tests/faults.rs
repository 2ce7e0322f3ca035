// SPDX-License-Identifier: MIT OR Apache-2.0

//! A fault at every byte that a client sends, in two exchanges which have all parts: one of a guest
//! that has a picture encoded, and one of a viewer of a scanout. Whatever happens, the client gets
//! its answers or an ERROR, the next one is served, and no memory is taken for what was only
//! announced: the tests of this file are a program of their own, whose allocator counts.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use common::{LONG, Peer, Rgb, config, decode, hello, start};
use helix_host::{Config, ScanoutSpec, Server};
use helix_protocol::message::{Config as Settings, EnableScanout, ErrorMessage, PixelFormat};
use helix_protocol::{Decoder, Limits, Message, encode};
use zerocopy_test_support::allocations::{Counting, largest_request};
use zerocopy_test_support::split::write_split;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes; the largest message of these tests has a hundredth of it, the host itself asks for 64 KiB
/// at a time.
const MUCH: usize = 512 * 1024;

/// Clients at once.
const PARALLEL: usize = 8;

/// What the host says, as far as these tests tell it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    Config,
    Enabled,
    Error,
    Frame,
    Hello,
    Pong,
    Subscribed,
}

/// A message of the client's, and what the host says to it.
struct Step {
    bytes: Vec<u8>,
    answer: Option<Said>,
}

fn step(bytes: &[u8], answer: Option<Said>) -> Step {
    Step {
        bytes: bytes.to_vec(),
        answer,
    }
}

/// HELLO, with the PING behind it.
fn greeting() -> Vec<Step> {
    let (head, tlvs) = encode::hello(1, &hello());
    vec![
        step(&[&head[..], &tlvs].concat(), Some(Said::Hello)),
        step(&encode::ping(2), Some(Said::Pong)),
    ]
}

/// What a guest says then.
fn encoding() -> Vec<Step> {
    let settings = Settings {
        width: 2,
        height: 2,
        bitrate: 4_000_000,
        framerate_num: 60,
        framerate_den: 1,
        profile: 77,
        level: 30,
        realtime: true,
    };
    let (request, pixels) = Rgb::pattern(2, 2, 0).request(PixelFormat::Bgra, 0, 7, true);
    let head = encode::frame_request(1, &request, pixels.len() as u32);
    vec![
        step(&encode::config_req(1, &settings), Some(Said::Config)),
        step(&[&head[..], &pixels].concat(), Some(Said::Frame)),
        step(&encode::keyframe_req(1), None),
        step(&encode::ping(3), Some(Said::Pong)),
    ]
}

/// What a viewer says, without a greeting.
fn watching() -> Vec<Step> {
    let enable = EnableScanout {
        scanout_id: 0,
        width: 64,
        height: 64,
        refresh_rate: 60,
    };
    let settings = Settings {
        bitrate: 1_000_000,
        ..Settings::default()
    };
    vec![
        step(&encode::enable_scanout(1, &enable), Some(Said::Enabled)),
        step(&encode::subscribe(0), Some(Said::Subscribed)),
        step(&encode::keyframe_req(1), None),
        step(&encode::config_req(1, &settings), None),
        step(&encode::ping(4), Some(Said::Pong)),
        step(&encode::disable_scanout(1, 0), None),
    ]
}

/// Both exchanges, whole.
fn exchanges() -> [Vec<Step>; 2] {
    let mut guest = greeting();
    guest.extend(encoding());
    [guest, watching()]
}

fn bytes(steps: &[Step]) -> Vec<u8> {
    steps.iter().flat_map(|step| step.bytes.clone()).collect()
}

/// What the host says to the first `length` bytes of these steps, sorted; and whether they end
/// between two messages.
fn answers(steps: &[Step], length: usize) -> (Vec<Said>, bool) {
    let (mut said, mut end) = (Vec::new(), 0);
    for step in steps {
        if end + step.bytes.len() > length {
            break;
        }
        end += step.bytes.len();
        said.extend(step.answer);
    }
    said.sort();
    (said, end == length)
}

/// A host with one scanout that somebody watches all the time, and where it listens.
struct Host {
    server: Server,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Host {
    fn start(stall_limit: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let server = start(Config {
            listen: vec![format!("unix:{}", path.display()).parse().unwrap()],
            stall_limit,
            scanouts: vec![ScanoutSpec {
                id: 0,
                description: "videotestsrc is-live=true ! \
                              video/x-raw,width=64,height=64,framerate=30/1"
                    .to_owned(),
            }],
            max_clients: 256,
            ..config()
        });
        Self {
            server,
            path,
            _folder: folder,
        }
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Client {
            stream,
            decoder: Decoder::new(Limits::client()),
        }
    }

    /// That a client who comes now is served as if nothing had happened.
    fn is_well(&self) {
        let mut peer = Peer::of(&self.server);
        peer.greet(&hello());
        let picture = Rgb::pattern(64, 64, 0);
        let frame = peer.encode(&picture, PixelFormat::Bgra, 5, true);
        let shown = decode([&frame.bytes[..]]);
        assert!(shown[0].psnr(&picture) > 30.0, "the picture is another");
        let mut viewer = Peer::of(&self.server);
        viewer.subscribe(0);
        viewer.next_frame();
    }
}

/// A client who does not keep to the rules.
struct Client {
    stream: UnixStream,
    decoder: Decoder,
}

impl Client {
    fn send(&mut self, bytes: &[u8]) {
        // The host may have closed already; then it has said why.
        let _ = self.stream.write_all(bytes);
    }

    /// Sends nothing more.
    fn end(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The next thing that the host says. Everything that it says is a message, and whole.
    fn next(&mut self) -> Option<(Said, Option<ErrorMessage>)> {
        loop {
            if let Some(envelope) = self.decoder.next().unwrap() {
                let said = match envelope.message {
                    Message::HelloResp(_) => Said::Hello,
                    Message::Pong => Said::Pong,
                    Message::ConfigResp(_) => Said::Config,
                    Message::FrameResponse(..) => Said::Frame,
                    Message::ScanoutResp(_) => Said::Enabled,
                    Message::SubscribeResp { .. } => Said::Subscribed,
                    Message::Error(error) => return Some((Said::Error, Some(error))),
                    other => panic!("{other:?}"),
                };
                return Some((said, None));
            }
            let count = match self.stream.read(self.decoder.space()) {
                Ok(count) => count,
                // It closed while something was on its way to it.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
                Err(error) => panic!("{error}"),
            };
            if count == 0 {
                self.decoder.finish().unwrap();
                return None;
            }
            self.decoder.advance(count);
        }
    }

    /// Waits for as many answers as there are in `expected`, frames of a scanout aside, and compares.
    fn expect(&mut self, expected: &[Said], what: &dyn std::fmt::Debug) {
        let pushed = !expected.contains(&Said::Frame);
        let mut said = Vec::new();
        while said.len() < expected.len() {
            match self.next() {
                Some((Said::Frame, _)) if pushed => {}
                Some((next, _)) => said.push(next),
                None => break,
            }
        }
        said.sort();
        assert_eq!(said, expected, "{what:?}");
    }

    /// All that the host says until it closes, frames of a scanout aside, sorted; and its last
    /// ERROR.
    fn rest(&mut self, pushed: bool) -> (Vec<Said>, Option<String>) {
        let (mut rest, mut reason) = (Vec::new(), None);
        while let Some((said, error)) = self.next() {
            if !(pushed && said == Said::Frame) {
                rest.push(said);
            }
            reason = error.map(|error| error.text).or(reason);
        }
        rest.sort();
        (rest, reason)
    }
}

/// Calls `work` with each number below `count`, on several threads.
fn each(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    work(number);
                }
            });
        }
    });
}

fn took_little_memory() {
    let largest = largest_request();
    assert!(largest < MUCH, "{largest} bytes at once");
}

#[test]
fn a_client_that_ends_at_any_byte_gets_its_answers_and_the_reason() {
    let host = Host::start(LONG);
    for steps in &exchanges() {
        let whole = bytes(steps);
        let pushed = answers(steps, whole.len()).0.contains(&Said::Subscribed);
        each(whole.len(), |cut| {
            let mut client = host.client();
            client.send(&whole[..cut]);
            client.end();
            let (mut expected, between) = answers(steps, cut);
            if !between {
                expected.push(Said::Error);
                expected.sort();
            }
            let (said, reason) = client.rest(pushed);
            assert_eq!(said, expected, "after {cut} bytes: {reason:?}");
            let ended_inside = reason.is_some_and(|text| text.contains("ended inside"));
            assert_eq!(ended_inside, !between, "after {cut} bytes");
        });
    }
    host.is_well();
    took_little_memory();
}

#[test]
fn a_client_that_stalls_inside_a_message_is_told_and_one_between_two_is_left_alone() {
    /// At once; each has some descriptors at the host.
    const STALLED: usize = 100;
    let host = Host::start(Duration::from_secs(1));
    for steps in &exchanges() {
        let whole = bytes(steps);
        let pushed = answers(steps, whole.len()).0.contains(&Said::Subscribed);
        let places: Vec<_> = (1..whole.len()).collect();
        for places in places.chunks(STALLED) {
            let clients: Vec<_> = places
                .iter()
                .map(|at| {
                    let mut client = host.client();
                    client.send(&whole[..*at]);
                    (*at, client)
                })
                .collect();
            for (at, mut client) in clients {
                let (mut expected, between) = answers(steps, at);
                if between {
                    client.send(&whole[at..]);
                    client.end();
                    expected = answers(steps, whole.len()).0;
                } else {
                    expected.push(Said::Error);
                    expected.sort();
                }
                let (said, reason) = client.rest(pushed);
                assert_eq!(said, expected, "at byte {at}: {reason:?}");
                let told = reason.is_some_and(|text| text.contains("rest of a message"));
                assert_eq!(told, !between, "at byte {at}");
            }
        }
    }
    host.is_well();
    took_little_memory();
}

#[test]
fn messages_are_understood_wherever_they_are_split() {
    let host = Host::start(LONG);
    // HELLO comes once.
    let steps = greeting();
    let whole = bytes(&steps);
    let expected = answers(&steps, whole.len()).0;
    each(whole.len(), |at| {
        let mut client = host.client();
        write_split(&client.stream, &[&whole[..at], &whole[at..]]).unwrap();
        client.expect(&expected, &at);
    });
    // The rest as often as one likes, which spares the host an encoder for each place.
    for (greeting, steps) in [(greeting(), encoding()), (Vec::new(), watching())] {
        let mut client = host.client();
        client.send(&bytes(&greeting));
        client.expect(&answers(&greeting, usize::MAX).0, &"greeting");
        let whole = bytes(&steps);
        let expected = answers(&steps, whole.len()).0;
        for at in 0..whole.len() {
            write_split(&client.stream, &[&whole[..at], &whole[at..]]).unwrap();
            client.expect(&expected, &at);
        }
        let single: Vec<_> = whole.chunks(1).collect();
        write_split(&client.stream, &single).unwrap();
        client.expect(&expected, &"every byte alone");
    }
    took_little_memory();
}

#[test]
fn a_corrupt_byte_costs_its_message_or_its_connection_and_nobody_else() {
    let host = Host::start(LONG);
    for steps in &exchanges() {
        let whole = bytes(steps);
        let expected = answers(steps, whole.len()).0;
        let pushed = expected.contains(&Said::Subscribed);
        let pongs = |said: &[Said]| said.iter().filter(|said| **said == Said::Pong).count();
        each(2 * whole.len(), |number| {
            let (at, bits) = (number / 2, [0x01, 0xff][number % 2]);
            let what = format!("byte {at} ^ {bits:#x}");
            let mut corrupt = whole.clone();
            corrupt[at] ^= bits;
            let mut client = host.client();
            client.send(&corrupt);
            client.end();
            let (said, reason) = client.rest(pushed);
            match reason {
                Some(text) => assert!(text.len() > 20, "{what}: {text}"),
                // A message that became another one may have no answer; those behind it have.
                None => assert!(pongs(&said) + 1 >= pongs(&expected), "{what}: {said:?}"),
            }
            // And the next one gets what it asks for.
            let mut next = host.client();
            next.send(&bytes(&greeting()));
            next.expect(&[Said::Hello, Said::Pong], &what);
        });
    }
    host.is_well();
    took_little_memory();
}
