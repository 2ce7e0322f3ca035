// SPDX-License-Identifier: MIT OR Apache-2.0

//! A fault at every byte of an exchange, in both directions; and numbers that lie. What they cost in
//! memory is tested in tests/memory.rs.
//!
//! The exchange has all parts: greeting, settings, four frames, of which the host refuses one,
//! with request ids and without. Whatever happens, a session must come to an end that somebody
//! can understand: each frame encoded as it should be, or dropped, or the session failed with a
//! reason that names the host.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use helix_protocol::message::{Capabilities, ErrorCode, ErrorMessage, FrameRequest};
use helix_protocol::{Decoder, Limits, Message, encode};
use zerocopy_test_support::peer::{DELTA, KEYFRAME, Link, Peer, Then, hello};
use zerocopy_test_support::split::write_split;

use super::*;

const FRAMES: u32 = 4;
/// The one that the host refuses.
const REFUSED: u32 = 2;
/// Frames that have to come when all is well again.
const AFTERWARDS: u32 = 3;
/// Ends the access units of the second connection; the next one's is one more.
const FIRST_MARK: u8 = 100;
/// ms; for what can only be found out by waiting.
const SHORT: u32 = 60;
/// Sessions at once: most of them wait.
const PARALLEL: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The connection ends.
    Cut,
    /// Nothing goes on, and the connection stays.
    Stall,
    /// One byte is another: these bits of it are flipped.
    Corrupt(u8),
    /// No read has bytes from both sides of this place.
    Split,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    ids: bool,
    fault: Fault,
    /// Which byte of a direction.
    at: usize,
    /// The direction: the host's output or the client's.
    from_host: bool,
}

/// The host's end of the connection; every byte passes here.
struct Wire {
    stream: UnixStream,
    case: Case,
    /// What each access unit ends with.
    mark: Option<u8>,
    sent: usize,
    received: usize,
}

impl Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let at = self.case.at.checked_sub(self.sent);
        self.sent += bytes.len();
        let mut bytes = bytes.to_vec();
        if let Some(at) = at.filter(|at| self.case.from_host && *at < bytes.len()) {
            match self.case.fault {
                Fault::Corrupt(bits) => bytes[at] ^= bits,
                Fault::Split => {
                    return write_split(&self.stream, &[&bytes[..at], &bytes[at..]]);
                }
                Fault::Cut | Fault::Stall => {
                    self.stream.write_all(&bytes[..at])?;
                    return self.give_up();
                }
            }
        }
        self.stream.write_all(&bytes)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = match self.case.at.checked_sub(self.received) {
            Some(left) if !self.case.from_host => left.min(buffer.len()),
            _ => buffer.len(),
        };
        if limit == 0 {
            self.give_up()?;
        }
        let count = self.stream.read(&mut buffer[..limit])?;
        self.received += count;
        Ok(count)
    }

    fn give_up(&mut self) -> io::Result<()> {
        if self.case.fault == Fault::Stall {
            // Until the client has had enough. What it says is not looked at.
            io::copy(&mut self.stream, &mut io::sink())?;
        }
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

/// What the host answers.
fn answer(message: &Message, session_id: u16, ids: bool, mark: Option<u8>) -> Vec<u8> {
    match message {
        Message::Hello(_) if ids => {
            let capabilities = Capabilities::REQUEST_IDS.0 | Capabilities::CONFIG_RESP.0;
            let (head, tlvs) = encode::hello_resp(session_id, &hello(Capabilities(capabilities)));
            [&head[..], &tlvs].concat()
        }
        Message::Ping => encode::pong(session_id).to_vec(),
        Message::ConfigReq(config) if ids => encode::config_resp(session_id, config).to_vec(),
        Message::FrameRequest(request, _) if number(request) == REFUSED => {
            let (code, text) = (ErrorCode::ENCODE_FAILED, "no luck".to_owned());
            let tag = ids.then_some(request.tag);
            encode::error(session_id, &ErrorMessage { code, text, tag }).to_vec()
        }
        Message::FrameRequest(request, _) => {
            let mut data = data(request.force_keyframe).to_vec();
            data.extend(mark);
            let response = FrameResponse {
                pts: request.pts,
                is_keyframe: request.force_keyframe,
                tag: request.tag,
                ..FrameResponse::default()
            };
            let head = encode::frame_response(session_id, &response, data.len() as u32);
            [&head[..], &data].concat()
        }
        _ => Vec::new(),
    }
}

fn number(request: &FrameRequest) -> u32 {
    (request.pts / 1_000_000) as u32
}

fn data(is_keyframe: bool) -> &'static [u8] {
    if is_keyframe { KEYFRAME } else { DELTA }
}

/// Serves one client; how many bytes went each way.
fn serve(listener: &UnixListener, case: Case, mark: Option<u8>) -> (usize, usize) {
    let (stream, _) = listener.accept().unwrap();
    let mut wire = Wire {
        stream,
        case,
        mark,
        sent: 0,
        received: 0,
    };
    let mut decoder = Decoder::new(Limits::default());
    let mut exchange = || -> io::Result<()> {
        loop {
            let space = decoder.space();
            let count = wire.read(space)?;
            if count == 0 {
                return Ok(());
            }
            decoder.advance(count);
            while let Ok(Some(envelope)) = decoder.next() {
                let bytes = answer(&envelope.message, envelope.session_id, case.ids, wire.mark);
                wire.write(&bytes)?;
            }
        }
    };
    // Either the client has gone or the fault has happened.
    let _ = exchange();
    (wire.sent, wire.received)
}

/// A path that no other exchange has.
fn socket(folder: &Path) -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    folder.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string())
}

/// Runs one exchange and judges it.
fn exchange(folder: &Path, case: Case) -> (usize, usize) {
    let path = socket(folder);
    let listener = UnixListener::bind(&path).unwrap();
    let host = thread::spawn(move || serve(&listener, case, None));
    let timeout = match case.fault {
        Fault::Cut | Fault::Split => 20_000,
        Fault::Stall | Fault::Corrupt(_) => SHORT,
    };
    let mut run = Run::new(&[
        ("socket-path", &path.to_str().unwrap()),
        ("timeout", &timeout),
        ("reconnect-timeout", &0u32),
    ]);
    run.configure();
    let accepted = (0..FRAMES)
        .take_while(|number| run.submit(*number) == Submission::Accepted)
        .count();
    let mut outcomes = BTreeMap::new();
    let mut failure = None;
    while failure.is_none() && outcomes.len() < accepted {
        let (frame, encoded) = match run.next() {
            Told::Encoded { frame, data, .. } => (frame, Some(data)),
            Told::Dropped(frame) => (frame, None),
            Told::Failed(reason) => {
                failure = Some(reason);
                continue;
            }
            _ => continue,
        };
        assert!(outcomes.insert(frame, encoded).is_none(), "{case:?}: twice");
    }
    if accepted < FRAMES as usize && failure.is_none() {
        failure = Some(run.failure());
    }
    match &failure {
        Some(reason) => assert!(
            reason.contains(path.to_str().unwrap()) && reason.len() > path.as_os_str().len() + 20,
            "{case:?}: {reason}"
        ),
        None => assert_eq!(outcomes.len(), FRAMES as usize, "{case:?}"),
    }
    if !matches!(case.fault, Fault::Corrupt(_)) {
        for (frame, encoded) in &outcomes {
            if let Some(encoded) = encoded {
                assert_eq!(encoded, data(*frame == 0), "{case:?}");
                assert_ne!(*frame, REFUSED, "{case:?}");
            }
        }
    }
    if case.fault == Fault::Split {
        assert_eq!(failure, None, "{case:?}");
        let encoded: Vec<_> = outcomes.values().map(Option::is_some).collect();
        assert_eq!(encoded, [true, true, false, true], "{case:?}");
    }
    drop(run);
    let bytes = host.join().unwrap();
    std::fs::remove_file(path).unwrap();
    bytes
}

#[test]
fn a_fault_at_any_byte_ends_in_frames_or_in_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let mut cases = Vec::new();
    for ids in [false, true] {
        let whole = Case {
            ids,
            fault: Fault::Split,
            at: usize::MAX,
            from_host: true,
        };
        let (sent, received) = exchange(folder.path(), whole);
        assert!(sent > 400 && received > 400, "{sent} and {received} bytes");
        for at in 0..sent {
            for fault in [
                Fault::Cut,
                Fault::Stall,
                Fault::Corrupt(0xff),
                Fault::Corrupt(0x01),
                Fault::Split,
            ] {
                cases.push(Case { fault, at, ..whole });
            }
        }
        for at in 0..received {
            for fault in [Fault::Cut, Fault::Stall] {
                let from_host = false;
                cases.push(Case {
                    fault,
                    at,
                    from_host,
                    ..whole
                });
            }
        }
    }
    for_each(&cases, |case| {
        exchange(folder.path(), case);
    });
}

/// Runs so many at once.
fn for_each(cases: &[Case], run: impl Fn(Case) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    run(*case);
                }
            });
        }
    });
}

/// Serves one client with a fault and then all others without, whose access units end with the number of
/// the connection; until somebody comes when it is `done`.
fn serve_again(listener: &UnixListener, case: Case, done: &AtomicBool) {
    serve(listener, case, None);
    let at = usize::MAX;
    for mark in FIRST_MARK.. {
        serve(listener, Case { at, ..case }, Some(mark));
        if done.load(Ordering::Relaxed) {
            return;
        }
    }
}

/// Ends [`serve_again`] when it is dropped.
struct Ending<'a> {
    path: &'a Path,
    done: &'a AtomicBool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        // It may have ended by itself.
        drop(UnixStream::connect(self.path));
    }
}

/// Which connection after the first an access unit is from, and whether it is a keyframe.
fn marked(access_unit: &[u8]) -> Option<(u8, bool)> {
    let (mark, data) = access_unit.split_last()?;
    let is_known = *mark >= FIRST_MARK && [KEYFRAME, DELTA].contains(&data);
    is_known.then_some((*mark, data == KEYFRAME))
}

/// Runs one exchange with a host that is in order when it is called again; whether it was.
fn recover(folder: &Path, case: Case) -> bool {
    let path = socket(folder);
    let listener = UnixListener::bind(&path).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| serve_again(&listener, case, &done));
        let _ending = Ending {
            path: &path,
            done: &done,
        };
        let is_cut = case.fault == Fault::Cut;
        let mut run = Run::new(&[
            ("socket-path", &path.to_str().unwrap()),
            ("timeout", &if is_cut { 20_000 } else { SHORT }),
            ("reconnect-timeout", &20_000u32),
        ]);
        run.configure();
        let (mut number, mut encoded, mut connection) = (0, 0, 0);
        let mut greeted = false;
        while number < FRAMES || encoded < AFTERWARDS {
            match run.submit(number) {
                Submission::Accepted => number += 1,
                Submission::NoHost => {
                    thread::yield_now();
                    continue;
                }
                // It was lost before it was greeted, or says impossible things of itself.
                _ => break,
            }
            let told = run.wait_for(|told| match told {
                Told::Connected(_) => {
                    greeted = true;
                    None
                }
                Told::Encoded {
                    data, after_loss, ..
                } => Some(Some((data, after_loss))),
                Told::Dropped(_) | Told::Failed(_) => Some(None),
                _ => None,
            });
            let Some((access_unit, after_loss)) = told else {
                // Where what follows is known to be right, nothing else may be lost.
                let is_refused = number - 1 == REFUSED;
                assert!(is_refused || connection == 0 || !is_cut, "{case:?}");
                continue;
            };
            encoded += 1;
            if let Some((mark, is_keyframe)) = marked(&access_unit) {
                let is_first = std::mem::replace(&mut connection, mark) != mark;
                let expected = (is_first, is_first);
                assert_eq!((is_keyframe, after_loss), expected, "{case:?}, {mark}");
                encoded = if is_first { 1 } else { encoded };
            }
        }
        greeted |= run
            .told
            .try_iter()
            .any(|it| matches!(it, Told::Connected(_)));
        assert!(connection != 0 || !greeted || !is_cut, "{case:?}");
        connection != 0
    })
}

#[test]
fn a_host_that_is_called_again_after_a_fault_at_any_byte_goes_on_with_a_keyframe() {
    let folder = tempfile::tempdir().unwrap();
    let whole = |ids| Case {
        ids,
        fault: Fault::Split,
        at: usize::MAX,
        from_host: true,
    };
    let faults = [Fault::Cut, Fault::Corrupt(0xff), Fault::Corrupt(0x01)];
    let mut cases = Vec::new();
    for ids in [false, true] {
        let (sent, _) = exchange(folder.path(), whole(ids));
        let places = (0..sent).flat_map(|at| faults.map(|fault| (at, fault)));
        cases.extend(places.map(|(at, fault)| Case {
            fault,
            at,
            ..whole(ids)
        }));
    }
    let again = AtomicUsize::new(0);
    for_each(&cases, |case| {
        let was_called = recover(folder.path(), case);
        again.fetch_add(usize::from(was_called), Ordering::Relaxed);
    });
    // Not where it is not greeted yet, or no number that matters is another.
    let again = again.into_inner();
    assert!(again > cases.len() / 3, "{again} of {}", cases.len());
}

#[test]
fn a_number_that_lies_is_named() {
    // A FRAME_RESPONSE, and what stands where in it: payload_size, nal_count, the NAL unit's size.
    let response = |link: &mut Link, request: &FrameRequest| {
        let response = FrameResponse {
            pts: request.pts,
            is_keyframe: true,
            ..FrameResponse::default()
        };
        let mut bytes = encode::frame_response(1, &response, KEYFRAME.len() as u32).to_vec();
        bytes.extend_from_slice(KEYFRAME);
        link.raw(&bytes).unwrap();
        bytes
    };
    for (at, value, said) in [
        (8, u32::MAX, "payload_size"),
        (8, 25, "payload_size"),
        (32, 4097, "nal_count"),
        (32, u32::MAX, "nal_count"),
        (36, u32::MAX, "NAL size"),
    ] {
        let peer = Peer::new(move |link, envelope| {
            if let Message::FrameRequest(request, _) = &envelope.message {
                if request.pts == 0 {
                    response(link, request);
                } else {
                    let mut bytes = response(link, request);
                    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
                    link.raw(&bytes).unwrap();
                }
            }
            Then::GoOn
        });
        let mut run = Run::new(&[
            ("tcp-host", &"127.0.0.1"),
            ("tcp-port", &peer.port()),
            ("timeout", &20_000u32),
            ("reconnect-timeout", &0u32),
        ]);
        run.configure();
        run.submit(0);
        run.submit(1);
        let reason = run.failure();
        assert!(
            reason.contains("FRAME_RESPONSE") && reason.contains(said),
            "{value} at {at}: {reason}"
        );
    }
}

#[test]
fn an_access_unit_may_have_any_number_of_nal_units_up_to_the_limit() {
    /// NAL units of the access units, one after the other.
    const COUNTS: [usize; 5] = [1, 0, 4096, 1, 4097];
    let peer = Peer::new(|link, envelope| {
        if let Message::FrameRequest(request, _) = &envelope.message {
            let nals = vec![KEYFRAME; COUNTS[number(request) as usize]];
            let response = FrameResponse {
                pts: request.pts,
                is_keyframe: true,
                ..FrameResponse::default()
            };
            let (head, nals) = encode::frame_response_parts(1, &response, &nals);
            let bytes = [&head[..], &nals].concat();
            let mut sent = 0;
            while sent < bytes.len() {
                match link.raw(&bytes[sent..]) {
                    Ok(count) => sent += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
                    // The client has had enough.
                    Err(_) => return Then::Close,
                }
            }
        }
        Then::GoOn
    });
    let mut run = Run::new(&[
        ("tcp-host", &"127.0.0.1"),
        ("tcp-port", &peer.port()),
        ("reconnect-timeout", &0u32),
    ]);
    run.configure();
    for (frame, count) in (0..).zip(&COUNTS[..4]) {
        run.submit(frame);
        let (told, data) = run.wait_for(|told| match told {
            Told::Encoded { frame, data, .. } => Some((frame, data)),
            Told::Dropped(frame) => Some((frame, Vec::new())),
            Told::Failed(reason) => panic!("{reason}"),
            _ => None,
        });
        assert_eq!(told, frame);
        assert!(data == KEYFRAME.repeat(*count), "{count} NAL units");
    }
    run.submit(4);
    let reason = run.failure();
    assert!(reason.contains("nal_count is 4097"), "{reason}");
    assert!(reason.contains("4096"), "{reason}");
}
