// SPDX-License-Identifier: MIT OR Apache-2.0

//! Against a QEMU of ours, which lies as told.

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use common::Watched;
use nix::sys::memfd::{MFdFlags, memfd_create};
use qemu_display::{Address, Consoles, Error, Look, Pixels, Screen, Status};
use zerocopy_test_qemu::fake::{FakeQemu, Listener, X8R8G8B8};

const LISTENER: &str = "org.qemu.Display1.Listener";

/// A display that listens to the only console, and the listener.
fn watched(qemu: &FakeQemu) -> (Watched, Arc<Screen>, Listener) {
    let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::One(0));
    let screen = watched.screen(0);
    (watched, screen, qemu.listener())
}

fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("picture", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

#[test]
fn qemu_is_told_what_the_listener_can_do() {
    let qemu = FakeQemu::start(&[0]);
    let (_watched, _screen, listener) = watched(&qemu);
    assert_eq!(
        listener.interfaces(),
        [
            "org.qemu.Display1.Listener.Unix.Map",
            "org.qemu.Display1.Listener.Unix.ScanoutDMABUF2"
        ]
    );
}

#[test]
fn a_scanout_stays_where_it_was_read_to() {
    let qemu = FakeQemu::start(&[0]);
    let (watched, screen, listener) = watched(&qemu);
    let data: Vec<u8> = (0..64).collect();
    listener.scanout(4, 4, &data).unwrap();
    let picture = watched.picture(&screen);
    let Pixels::Bytes { canvas, .. } = picture.pixels else {
        panic!("bytes were sent");
    };
    assert_eq!((*canvas).as_ref(), data);
    assert_eq!(screen.figures().copies, 0);
}

#[test]
fn nonsense_ends_the_connection_and_says_why() {
    type Lie = fn(&Listener) -> Result<(), zbus::Error>;
    let lies: [(&str, Lie); 8] = [
        ("pixels", |l| l.scanout(0, 0, &[])),
        ("pixels", |l| l.scanout(100_000, 1, &[0; 64])),
        ("64 bytes", |l| l.scanout(5, 4, &[0; 64])),
        ("stride", |l| {
            l.call(
                LISTENER,
                "Scanout",
                &(4u32, 4u32, 3u32, X8R8G8B8, &[0u8; 64][..]),
            )
        }),
        ("format", |l| {
            l.call(
                LISTENER,
                "Scanout",
                &(4u32, 4u32, 16u32, 1u32, &[0u8; 64][..]),
            )
        }),
        ("cursor", |l| l.cursor_define(i32::MAX, i32::MAX, &[0; 4])),
        ("map of", |l| {
            l.scanout_map(memfd(4095).as_fd(), 0, (32, 32, 128))
        }),
        ("strange arguments", |l| {
            l.call(LISTENER, "MouseSet", &"here")
        }),
    ];
    let qemu = FakeQemu::start(&[0]);
    for (said, lie) in lies {
        let (watched, screen, listener) = watched(&qemu);
        assert!(lie(&listener).is_err(), "{said}: answered");
        match watched.failure(&screen) {
            Error::Nonsense(text) => assert!(text.contains(said), "{said}: {text}"),
            other => panic!("{said}: {other:?}"),
        }
        listener.wait_for_close();
    }
}

#[test]
fn unknown_calls_are_refused_and_nothing_else_happens() {
    let qemu = FakeQemu::start(&[0]);
    let (watched, screen, listener) = watched(&qemu);
    assert!(listener.call(LISTENER, "Dance", &()).is_err());
    listener.scanout(4, 4, &[0; 64]).unwrap();
    watched.picture(&screen);
}

#[test]
fn a_picture_in_a_file_is_that_file() {
    let qemu = FakeQemu::start(&[0]);
    let (watched, screen, listener) = watched(&qemu);
    let file = memfd(4096);
    listener
        .scanout_map(file.as_fd(), 96, (10, 10, 40))
        .unwrap();
    let picture = watched.picture(&screen);
    match picture.pixels {
        Pixels::Shared { offset, busy, .. } => assert_eq!((offset, busy), (96, false)),
        other => panic!("{other:?}"),
    }
    listener.update_map((1, 2), (3, 4)).unwrap();
    assert_eq!(screen.look(), Look::News);
}

#[test]
fn every_console_is_its_own_screen() {
    let qemu = FakeQemu::start(&[0, 3]);
    let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::Graphic);
    let screens = [0, 3].map(|console| watched.screen(console));
    let listeners = [qemu.listener(), qemu.listener()];
    for listener in &listeners {
        listener.scanout(listener.console + 1, 1, &[0; 16]).unwrap();
    }
    for screen in screens {
        let console = screen.console();
        let size = watched.picture(&screen).pixels.size();
        assert_eq!(size, (console + 1, 1));
        assert_eq!(screen.label(), format!("fake {console}"));
    }
    // One that ends leaves the other alone.
    let [first, _second] = listeners;
    let (gone, there) = (first.console, 3 - first.console);
    first.close();
    watched.failure(&watched.display.screen(gone).unwrap());
    assert_eq!(watched.display.screen(there).unwrap().look(), Look::Still);
    assert_eq!(watched.display.status(), Status::Connected);
}

#[test]
fn qemu_has_a_listener_only_while_somebody_listens() {
    let qemu = FakeQemu::start(&[0]);
    let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::Graphic);
    assert_eq!(watched.connected(), Status::Connected);
    let screen = watched.display.screen(0).unwrap();
    for value in [1_u8, 2] {
        // An answer on the connection on which it would be asked for a listener, and was not.
        watched.set_size(0, (640, 480)).unwrap();
        assert_eq!(qemu.registered(), usize::from(value - 1));
        let first = screen.listen();
        let second = screen.listen();
        let listener = qemu.listener();
        listener.scanout(4, 4, &[value; 64]).unwrap();
        let Pixels::Bytes { canvas, .. } = watched.picture(&screen).pixels else {
            panic!("bytes were sent");
        };
        assert_eq!((*canvas).as_ref(), [value; 64]);
        drop(first);
        assert!(
            listener.update((0, 0), (1, 1), &[9; 4]).is_ok(),
            "one is left"
        );
        drop(second);
        listener.wait_for_close();
        assert_eq!(screen.look(), Look::Empty);
    }
}

#[test]
fn a_whole_picture_of_another_size_comes_from_the_same_listener() {
    let qemu = FakeQemu::start(&[0]);
    let (watched, screen, listener) = watched(&qemu);
    for side in [8, 16, 8, 16, 8, 16] {
        qemu.resize(0, (side, side));
        let bytes = vec![0; (side * side * 4) as usize];
        listener.scanout(side, side, &bytes).unwrap();
        let picture = watched.picture(&screen);
        assert_eq!(picture.pixels.size(), (side, side));
        // What QEMU tells once is not said to nobody.
        let cursor = [side as u8; 4];
        listener.cursor_define(1, 1, &cursor).unwrap();
    }
    assert_eq!(qemu.registered(), 1);
}

#[test]
fn parts_of_a_picture_that_nobody_has_are_asked_for_anew() {
    let qemu = FakeQemu::start(&[0]);
    let (watched, screen, listener) = watched(&qemu);
    listener.scanout(8, 8, &[1; 8 * 8 * 4]).unwrap();
    watched.picture(&screen);
    qemu.resize(0, (16, 16));
    listener.update((8, 8), (1, 1), &[2; 4]).unwrap();
    let listener = qemu.listener();
    listener.scanout(16, 16, &[3; 16 * 16 * 4]).unwrap();
    assert_eq!(watched.picture(&screen).pixels.size(), (16, 16));
}

#[test]
fn a_qemu_that_goes_is_noticed_while_nobody_listens() {
    let qemu = FakeQemu::start(&[0]);
    let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::Graphic);
    assert_eq!(watched.connected(), Status::Connected);
    qemu.forget_clients();
    let screen = watched.display.screen(0).unwrap();
    assert!(matches!(watched.failure(&screen), Error::Gone { .. }));
    watched.until(|display| matches!(display.status(), Status::Failed(_)).then_some(()));
}

#[test]
fn a_listener_outlives_the_connection_that_it_was_made_on() {
    // Another client has taken its place.
    let qemu = FakeQemu::start(&[0]);
    let (watched, screen, listener) = watched(&qemu);
    qemu.forget_clients();
    let refused = watched.until_refused(0);
    assert!(!refused.is_empty());
    listener.scanout(4, 4, &[0; 64]).unwrap();
    watched.picture(&screen);
}

#[test]
fn a_qemu_that_registers_a_listener_and_says_nothing_is_an_error() {
    let qemu = FakeQemu::start(&[0]);
    let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::Graphic);
    qemu.say_nothing();
    let screen = watched.screen(0);
    let error = watched.failure(&screen);
    assert!(error.to_string().contains("in time"), "{error}");
    assert_eq!(qemu.registered(), 1);
}

#[test]
fn a_size_reaches_qemu() {
    let qemu = FakeQemu::start(&[0]);
    let (watched, _screen, _listener) = watched(&qemu);
    watched
        .display
        .set_size(0, (1920, 1080), |answer| answer.unwrap());
    assert_eq!(qemu.size(), (0, 1920, 1080));
}

#[test]
fn a_silent_qmp_server_is_no_hang() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let _server = UnixListener::bind(&path).unwrap();
    // Ends at once although the other side never says anything.
    let display = Watched::start(Address::Qmp(path), Consoles::One(0));
    assert_eq!(display.display.status(), Status::Connecting);
    drop(display);
}
