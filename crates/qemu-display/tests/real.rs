// SPDX-License-Identifier: MIT OR Apache-2.0

//! Against a stock QEMU, whose firmware draws a screen of text.

mod common;

use std::time::Instant;

use common::Watched;
use qemu_display::{Address, Consoles, Error, Look, Picture, PixelFormat, Pixels, Status};
use zerocopy_test_qemu::card::Cursor;
use zerocopy_test_qemu::ppm::Rgb;
use zerocopy_test_qemu::real::{Bus, Qemu, is_newer};
use zerocopy_test_qemu::{LIMIT, eventually};

fn colours_of(picture: &Picture) -> Rgb {
    let (layout, bytes) = match &picture.pixels {
        Pixels::Bytes { layout, canvas } => (*layout, (**canvas).as_ref().to_vec()),
        Pixels::Shared {
            layout,
            file,
            offset,
            ..
        } => {
            let mut bytes = vec![0; layout.bytes()];
            file.read(*offset, &mut bytes).unwrap();
            (*layout, bytes)
        }
        Pixels::DmaBuf { .. } => panic!("there is no GPU here"),
    };
    assert_eq!(layout.format, PixelFormat::Bgrx);
    let (width, height) = (layout.width as usize, layout.height as usize);
    Rgb::from_bgrx(width, height, layout.stride as usize, &bytes)
}

/// Waits until a picture is what QEMU itself says that it shows. The text cursor blinks, so there
/// is always another picture.
fn shows_the_same(watched: &Watched, qemu: &Qemu, console: u32) {
    let screen = watched.screen(console);
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < LIMIT, "it never does");
        let picture = colours_of(&watched.picture(&screen));
        if picture.colours() > 1 && picture == qemu.screendump() {
            break;
        }
    }
}

#[test]
fn a_picture_over_a_bus_is_what_qemu_shows() {
    let bus = Bus::start();
    let qemu = bus.qemu_with_vga();
    let address = Address::Bus(bus.address().to_owned());
    let watched = Watched::start(address, Consoles::One(0));
    shows_the_same(&watched, &qemu, 0);
}

#[test]
fn a_picture_over_qmp_is_what_qemu_shows() {
    let qemu = Qemu::with_vga("dbus,p2p=on");
    let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::Graphic);
    shows_the_same(&watched, &qemu, 0);
}

#[test]
fn a_killed_qemu_is_noticed_and_a_new_one_found() {
    let bus = Bus::start();
    let mut qemu = bus.qemu_with_vga();
    let address = Address::Bus(bus.address().to_owned());
    let watched = Watched::start(address.clone(), Consoles::One(0));
    let screen = watched.screen(0);
    watched.picture(&screen);
    qemu.kill();
    assert!(matches!(watched.failure(&screen), Error::Gone { .. }));
    let qemu = bus.qemu_with_vga();
    let watched = Watched::start(address, Consoles::One(0));
    shows_the_same(&watched, &qemu, 0);
}

#[test]
fn a_qemu_that_nobody_listens_to_says_nothing_and_its_end_is_noticed() {
    let bus = Bus::start();
    let mut qemu = bus.qemu_with_vga();
    let address = Address::Bus(bus.address().to_owned());
    let watched = Watched::start(address, Consoles::One(0));
    assert_eq!(watched.connected(), Status::Connected);
    let screen = watched.display.screen(0).unwrap();
    let said = |name: &str| qemu.trace().matches(name).count();
    // Blinks of the text cursor are drawn all the time; to whom, QEMU's trace says.
    // Where its firmware sets another mode, a new listener takes the place of the one before.
    let mut registered = 0;
    for _ in 0..2 {
        let updates = said("dbus_update ");
        qemu.screendump();
        assert_eq!(said("dbus_registered_listener "), registered);
        assert_eq!(said("dbus_update "), updates);
        let listening = screen.listen();
        watched.picture(&screen);
        watched.picture(&screen);
        // QEMU writes its trace when it has sent the first picture.
        eventually("QEMU's word of the listener", || {
            (said("dbus_registered_listener ") > registered).then_some(())
        });
        drop(listening);
        if is_newer() {
            // It would never forget the listener, and keeps it.
            break;
        }
        registered = eventually("the end of the last listener", || {
            let registered = said("dbus_registered_listener ");
            (said("dbus_listener_vanished ") == registered && screen.look() == Look::Empty)
                .then_some(registered)
        });
    }
    qemu.kill();
    assert!(matches!(watched.failure(&screen), Error::Gone { .. }));
}

#[test]
fn every_output_of_a_graphics_card_has_a_screen_and_takes_a_size() {
    let qemu = Qemu::start("dbus,p2p=on", &["-device", "virtio-gpu-pci,max_outputs=2"]);
    let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::Graphic);
    assert_eq!(watched.connected(), Status::Connected);
    let consoles: Vec<_> = watched
        .display
        .screens()
        .iter()
        .map(|s| s.console())
        .collect();
    assert_eq!(consoles, [0, 1]);
    for console in consoles {
        watched.set_size(console, (1304, 744)).unwrap();
        // Nobody drives the card: QEMU shows that the output is not active.
        watched.picture(&watched.screen(console));
    }
}

/// What a guest does that sets a mode and goes on to a cursor: QEMU 7.2 tells its shape once.
#[test]
fn a_cursor_that_comes_with_another_size_is_not_lost() {
    let (qemu, mut card) = Qemu::with_card("dbus,p2p=on");
    let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::One(0));
    let screen = watched.screen(0);
    watched.picture(&screen);
    card.show_cursor(Some((8, 8)));
    let widths = [640, 800].into_iter().cycle();
    for (blue, width) in (100..160).zip(widths) {
        card.set_mode(width, 480);
        // Then, as early as can be seen from here.
        let before = screen.size().filter(|size| *size != (width, 480));
        let start = Instant::now();
        while screen.size() == before {
            assert!(start.elapsed() < LIMIT, "it never comes");
            std::thread::yield_now();
        }
        card.define_cursor(&Cursor {
            size: (16, 8),
            left: [0, 0, blue],
            right: [0; 3],
        });
        watched.until(|_| {
            let picture = screen.take().unwrap()?;
            let layout = picture.pixels.layout().unwrap();
            let shape = picture.cursor.shape?;
            ((layout.width, shape.bgra[0]) == (width, blue)).then_some(())
        });
    }
}

#[test]
fn what_there_is_not_is_said() {
    let bus = Bus::start();
    let address = Address::Bus(bus.address().to_owned());
    let said = |address: Address, console| {
        let watched = Watched::start(address, Consoles::One(console));
        match watched.connected() {
            Status::Failed(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let text = said(address.clone(), 0);
    assert!(text.contains("-display dbus"), "{text}");
    let _qemu = bus.qemu_with_vga();
    let text = said(address, 7);
    assert!(text.contains("no console 7, only [0"), "{text}");
    let text = said(Address::Qmp("/nowhere/qmp".into()), 0);
    assert!(text.contains("-qmp unix:"), "{text}");
    let other = Qemu::with_vga("none");
    let text = said(Address::Qmp(other.qmp()), 0);
    assert!(text.contains("p2p=on"), "{text}");
}
