// SPDX-License-Identifier: MIT OR Apache-2.0

//! The screens of a QEMU of ours, which draws and lies as told, as scanouts.

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::qemu::{enable, host};
use common::{Peer, Rgb, decode, is_start};
use helix_host::{QemuAddress, Server};
use helix_protocol::message::EnableScanout;
use helix_protocol::{Message, encode};
use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy_test_qemu::eventually;
use zerocopy_test_qemu::fake::{FakeQemu, Listener};

const SIZE: u32 = 64;
/// Requests that a client may have open, as HELLO_RESP says.
const OPEN: usize = 16;

/// A host that is connected.
fn connected(qemu: &FakeQemu) -> Server {
    host(QemuAddress(qemu_display::Address::Qmp(qemu.qmp())))
}

/// A client of console 0, and the listener that the host has for it.
fn watching(qemu: &FakeQemu, server: &Server) -> (Peer, Listener) {
    let mut peer = Peer::of(server);
    peer.subscribe(0);
    (peer, qemu.listener())
}

/// A picture of one colour: blue, green, red, nothing.
fn plain(bgr: [u8; 3]) -> Vec<u8> {
    [bgr[0], bgr[1], bgr[2], 0].repeat((SIZE * SIZE) as usize)
}

fn draw(listener: &Listener, bgr: [u8; 3]) {
    listener.scanout(SIZE, SIZE, &plain(bgr)).unwrap();
}

fn shows(unit: &[u8], [b, g, r]: [u8; 3]) -> bool {
    let expected = Rgb::new(SIZE as usize, SIZE as usize, |_, _| [r, g, b]);
    decode([unit])[0].psnr(&expected) > 30.0
}

const BLUE: [u8; 3] = [255, 0, 0];
const RED: [u8; 3] = [0, 0, 255];

#[test]
fn a_still_screen_gives_each_newcomer_its_picture() {
    let qemu = FakeQemu::start(&[0]);
    let server = connected(&qemu);
    let (_first, listener) = watching(&qemu, &server);
    draw(&listener, BLUE);
    for _ in 0..3 {
        let mut peer = Peer::of(&server);
        peer.subscribe(0);
        let frame = peer.next_frame();
        assert!(is_start(&frame.bytes));
        assert!(shows(&frame.bytes, BLUE));
    }
}

#[test]
fn qemu_says_what_it_shows_only_while_somebody_watches() {
    let qemu = FakeQemu::start(&[0, 1]);
    let server = connected(&qemu);
    let mut peer = Peer::of(&server);
    // An answer of QEMU's on the connection on which it would be asked for listeners.
    assert!(enable(&mut peer, 0, (SIZE, SIZE)).success);
    assert_eq!(qemu.registered(), 0);
    for (times, colour) in [(1, BLUE), (2, RED)] {
        let (mut peer, listener) = watching(&qemu, &server);
        draw(&listener, colour);
        assert!(shows(&peer.next_frame().bytes, colour));
        drop(peer);
        listener.wait_for_close();
        assert_eq!(qemu.registered(), times);
    }
    // QEMU goes and comes while nobody watches: that is noticed all the same.
    let _before = (qemu.size(), qemu.forget_clients());
    assert_eq!(qemu.size(), (0, SIZE, SIZE));
    let (mut peer, listener) = watching(&qemu, &server);
    draw(&listener, BLUE);
    assert!(shows(&peer.next_frame().bytes, BLUE));
}

#[test]
fn a_qemu_that_can_be_asked_nothing_is_called_again_when_nobody_watches() {
    let qemu = FakeQemu::start(&[0]);
    let server = connected(&qemu);
    let (mut watcher, listener) = watching(&qemu, &server);
    draw(&listener, BLUE);
    assert!(shows(&watcher.next_frame().bytes, BLUE));
    // Another client takes its place; the listener stays.
    qemu.forget_clients();
    let mut peer = Peer::of(&server);
    eventually("the loss to be noticed", || {
        (!enable(&mut peer, 0, (640, 480)).success).then_some(())
    });
    draw(&listener, RED);
    let mut newcomer = Peer::of(&server);
    newcomer.subscribe(0);
    assert!(shows(&newcomer.next_frame().bytes, RED));
    assert!(!enable(&mut peer, 0, (800, 600)).success);
    drop((watcher, newcomer));
    eventually("the next connection", || {
        enable(&mut peer, 0, (1024, 768)).success.then_some(())
    });
}

#[test]
fn one_encode_serves_all_who_watch() {
    let qemu = FakeQemu::start(&[0]);
    let server = connected(&qemu);
    let (first, listener) = watching(&qemu, &server);
    draw(&listener, BLUE);
    let mut peers = [first, Peer::of(&server)];
    peers[1].subscribe(0);
    for peer in &mut peers {
        peer.next_frame();
    }
    draw(&listener, RED);
    let red = |peer: &mut Peer| {
        loop {
            let frame = peer.next_frame();
            if !frame.response.is_keyframe {
                return frame;
            }
        }
    };
    let [first, second] = &mut peers;
    let (first, second) = (red(first), red(second));
    assert_eq!(first.response.pts, second.response.pts);
    assert!(first.bytes == second.bytes);
}

#[test]
fn sizes_reach_qemu_and_disabling_takes_the_screen_away() {
    let qemu = FakeQemu::start(&[0, 1]);
    let server = connected(&qemu);
    let mut peer = Peer::of(&server);
    let answer = enable(&mut peer, 1, (1280, 800));
    assert!(answer.success);
    assert_eq!(answer.connector, "Virtual-2");
    assert_eq!(qemu.size(), (1, 1280, 800));
    for size in [(0, 480), (640, 8193)] {
        assert!(!enable(&mut peer, 1, size).success);
    }
    // A QEMU that comes back is told again.
    qemu.forget_clients();
    assert_eq!(qemu.size(), (1, 1280, 800));
    peer.subscribe(1);
    // Which ends at once: the host may be about to make another connection when this comes.
    assert_eq!(qemu.listener().console, 1);
    peer.send(encode::disable_scanout(1, 1));
    peer.flush();
    while qemu.size() != (1, 0, 0) {}
}

#[test]
fn a_screen_disabled_while_qemu_is_away_is_so_when_it_is_back() {
    let qemu = FakeQemu::start(&[0, 1]);
    let server = connected(&qemu);
    let mut peer = Peer::of(&server);
    assert!(enable(&mut peer, 1, (1280, 800)).success);
    assert_eq!(qemu.size(), (1, 1280, 800));
    qemu.leave();
    eventually("the loss to be noticed", || {
        (!enable(&mut peer, 1, (640, 480)).success).then_some(())
    });
    peer.send(encode::disable_scanout(1, 1));
    peer.expect_pong();
    qemu.come_back();
    assert_eq!(qemu.size(), (1, 0, 0));
    // It has heard it. One that is started anew shows what it likes: here, the other console's size
    // is all that it is told.
    assert!(enable(&mut peer, 0, (1024, 768)).success);
    assert_eq!(qemu.size(), (0, 1024, 768));
    qemu.forget_clients();
    assert_eq!(qemu.size(), (0, 1024, 768));
    assert!(enable(&mut peer, 1, (800, 600)).success);
    assert_eq!(qemu.size(), (1, 800, 600));
}

/// ENABLE_SCANOUT of console 0, a square, whose answer nobody waits for.
fn wish(peer: &mut Peer, side: u32) {
    let request = EnableScanout {
        scanout_id: 0,
        width: side,
        height: side,
        refresh_rate: 0,
    };
    peer.send(encode::enable_scanout(0, &request));
    peer.flush();
}

/// That one was not enabled, says the next answer.
fn is_refused(peer: &mut Peer) {
    assert!(matches!(peer.next().message, Message::ScanoutResp(answer) if !answer.success));
}

#[test]
fn a_size_that_qemu_has_not_answered_is_not_told_it_when_it_is_called_again() {
    let qemu = FakeQemu::start(&[0, 1]);
    let server = connected(&qemu);
    let (_watching, listener) = watching(&qemu, &server);
    let mut peer = Peer::of(&server);
    qemu.fall_silent();
    wish(&mut peer, SIZE);
    assert_eq!(qemu.size(), (0, SIZE, SIZE));
    // Nonsense: the host ends this connection.
    assert!(listener.scanout(0, 0, &[]).is_err());
    is_refused(&mut peer);
    qemu.answer();
    // The first that it hears.
    eventually("a connection", || {
        enable(&mut peer, 1, (SIZE, SIZE)).success.then_some(())
    });
    assert_eq!(qemu.size(), (1, SIZE, SIZE));
}

#[test]
fn sizes_that_qemu_refuses_leave_the_one_before() {
    let qemu = FakeQemu::start(&[0]);
    let server = connected(&qemu);
    let mut peer = Peer::of(&server);
    assert!(enable(&mut peer, 0, (SIZE, SIZE)).success);
    assert_eq!(qemu.size(), (0, SIZE, SIZE));
    qemu.fall_silent();
    wish(&mut peer, 1);
    assert_eq!(qemu.size(), (0, 1, 1));
    wish(&mut peer, 2);
    // The host has both.
    peer.expect_pong();
    qemu.refuse_sizes();
    qemu.answer();
    for _ in 0..2 {
        is_refused(&mut peer);
    }
    assert_eq!(qemu.size(), (0, 2, 2));
    qemu.forget_clients();
    assert_eq!(qemu.size(), (0, SIZE, SIZE), "QEMU is told again");
}

#[test]
fn qemu_is_asked_one_thing_at_a_time_and_the_last_one_last() {
    let qemu = FakeQemu::start(&[0, 1]);
    let server = connected(&qemu);
    let mut peer = Peer::of(&server);
    qemu.fall_silent();
    wish(&mut peer, 1);
    assert_eq!(qemu.size(), (0, 1, 1));
    for side in 2..6 {
        peer.send(encode::disable_scanout(0, 0));
        wish(&mut peer, side);
    }
    // The host has them all.
    peer.expect_pong();
    assert_eq!(qemu.sizes(), [], "QEMU has not answered the first one");
    qemu.answer();
    assert_eq!(qemu.size(), (0, 5, 5));
    for _ in 1..6 {
        assert!(matches!(peer.next().message, Message::ScanoutResp(answer) if answer.success));
    }
    // Other consoles wait for nothing of this, and nothing more is left of it.
    assert!(enable(&mut peer, 1, (SIZE, SIZE)).success);
    assert_eq!(qemu.size(), (1, SIZE, SIZE));
    assert_eq!(qemu.sizes(), []);
}

#[test]
fn requests_that_qemu_does_not_answer_do_not_pile_up() {
    let qemu = FakeQemu::start(&[0, 1]);
    let server = connected(&qemu);
    qemu.fall_silent();
    // As many clients as there may be but one.
    let mut rude: Vec<_> = (0..63).map(|_| Peer::of(&server)).collect();
    for peer in &mut rude {
        for _ in 1..OPEN {
            peer.send(encode::disable_scanout(0, 0));
        }
        peer.expect_pong();
    }
    assert_eq!(qemu.size(), (0, 0, 0));
    assert_eq!(qemu.sizes(), [], "whoever asks, QEMU has one to answer");
    // More than each may have open.
    for peer in &mut rude {
        for _ in 0..2 * OPEN {
            peer.send(encode::disable_scanout(0, 0));
        }
        peer.send(encode::ping(7));
        peer.flush();
    }
    assert!(rude[0].is_quiet_for(Duration::from_millis(500)));
    // Another one is served meanwhile.
    let (mut peer, listener) = watching(&qemu, &server);
    draw(&listener, BLUE);
    assert!(shows(&peer.next_frame().bytes, BLUE));
    // And so are they in the end.
    qemu.answer();
    for peer in &mut rude {
        assert!(matches!(peer.next().message, Message::Pong));
    }
}

#[test]
fn a_cursor_that_qemu_sends_apart_is_in_the_picture() {
    let qemu = FakeQemu::start(&[0]);
    let server = connected(&qemu);
    let (mut peer, listener) = watching(&qemu, &server);
    let half = SIZE / 2;
    let cursor = [RED[0], RED[1], RED[2], 255].repeat((half * half) as usize);
    let side = half as i32;
    listener.cursor_define(side, side, &cursor).unwrap();
    listener.mouse_set(0, side, true).unwrap();
    draw(&listener, BLUE);
    let picture = &decode([peer.next_frame().bytes.as_slice()])[0];
    let expected = Rgb::new(SIZE as usize, SIZE as usize, |x, y| {
        let half = half as usize;
        let [b, g, r] = if x < half && y >= half { RED } else { BLUE };
        [r, g, b]
    });
    let psnr = picture.psnr(&expected);
    assert!(psnr > 25.0, "{psnr} dB");
}

#[test]
fn a_picture_that_qemu_tells_more_than_once_is_encoded_once() {
    let qemu = FakeQemu::start(&[0]);
    let server = connected(&qemu);
    let (mut peer, listener) = watching(&qemu, &server);
    let side = SIZE as i32;
    for shade in 0..10 {
        let mut picture = plain([shade, 0, 0]);
        // As guests that flip pages have it said: there is another one, and it has changed.
        listener.scanout(SIZE, SIZE, &picture).unwrap();
        listener.update((0, 0), (side, side), &picture).unwrap();
        peer.next_frame();
        // Longer than from one frame to the next.
        assert!(peer.is_quiet_for(Duration::from_millis(50)));
        listener.update((0, 0), (side, side), &picture).unwrap();
        assert!(peer.is_quiet_for(Duration::from_millis(50)));
        // One byte, the last but the one that means nothing, is another picture.
        let last = picture.len() - 2;
        picture[last] = 255;
        listener.update((0, 0), (side, side), &picture).unwrap();
        peer.next_frame();
        // Who asks gets it once more.
        peer.send(encode::keyframe_req(1));
        assert!(is_start(&peer.next_frame().bytes));
    }
}

/// Ends a thread of a test that fails, too.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_refresh_rate_limits_the_frames() {
    let qemu = FakeQemu::start(&[0]);
    let server = connected(&qemu);
    let mut peer = Peer::of(&server);
    let request = EnableScanout {
        scanout_id: 0,
        width: SIZE,
        height: SIZE,
        refresh_rate: 5,
    };
    peer.send(encode::enable_scanout(1, &request));
    assert!(matches!(peer.next().message, Message::ScanoutResp(answer) if answer.success));
    peer.subscribe(0);
    let listener = qemu.listener();
    let over = AtomicBool::new(false);
    let times: Vec<i64> = thread::scope(|scope| {
        scope.spawn(|| {
            for shade in (0..=255).cycle() {
                draw(&listener, [shade, 0, 0]);
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let _over = End(&over);
        (0..10).map(|_| peer.next_frame().response.pts).collect()
    });
    // Nine times 200 ms, less what coalescing and a late thread take off the first and the last.
    let span = times[9] - times[0];
    assert!(span > 1_000_000_000, "{span} ns");
}

#[test]
fn there_is_no_scanout_without_a_console() {
    let qemu = FakeQemu::start(&[0, 3]);
    let server = connected(&qemu);
    let mut peer = Peer::of(&server);
    for (id, there) in [(0, true), (1, false), (3, true), (15, false), (16, false)] {
        peer.send(encode::subscribe(id));
        match peer.next().message {
            Message::SubscribeResp { success, .. } => assert_eq!(success, there),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn sixteen_scanouts_serve_sixty_four_clients() {
    let qemu = FakeQemu::start(&std::array::from_fn::<u32, 16, _>(|id| id as u32));
    let server = connected(&qemu);
    let colour = |console: u32| [console as u8 * 16, 255 - console as u8 * 16, 128];
    let mut peers: Vec<_> = (0..64).map(|_| Peer::of(&server)).collect();
    for (index, peer) in (0..).zip(&mut peers) {
        peer.subscribe(index % 16);
    }
    let listeners: [Listener; 16] = std::array::from_fn(|_| qemu.listener());
    for listener in &listeners {
        draw(listener, colour(listener.console));
    }
    for (index, peer) in (0..).zip(&mut peers) {
        let frame = peer.next_frame();
        assert_eq!(u32::from(frame.session_id), index % 16);
        assert!(is_start(&frame.bytes));
        assert!(
            shows(&frame.bytes, colour(index % 16)),
            "scanout {}",
            index % 16
        );
    }
}

/// The connection is made anew, and the subscriber goes on.
fn is_connected_anew(lie: impl FnOnce(&Listener)) {
    let qemu = FakeQemu::start(&[0]);
    let server = connected(&qemu);
    let (mut peer, listener) = watching(&qemu, &server);
    draw(&listener, BLUE);
    peer.next_frame();
    lie(&listener);
    let listener = qemu.listener();
    draw(&listener, RED);
    loop {
        let frame = peer.next_frame();
        if frame.response.is_keyframe && shows(&frame.bytes, RED) {
            break;
        }
    }
}

#[test]
fn nonsense_costs_qemu_its_connection_and_nobody_else_theirs() {
    is_connected_anew(|listener| assert!(listener.scanout(0, 0, &[]).is_err()));
}

#[test]
fn memory_that_qemu_takes_away_is_no_crash() {
    is_connected_anew(|listener| {
        let bytes = u64::from(SIZE * SIZE * 4);
        let file = File::from(memfd_create("picture", MFdFlags::empty()).unwrap());
        file.set_len(bytes).unwrap();
        listener
            .scanout_map(file.as_fd(), 0, (SIZE, SIZE, SIZE * 4))
            .unwrap();
        file.set_len(1).unwrap();
        listener.update_map((0, 0), (1, 1)).unwrap();
    });
}
