// SPDX-License-Identifier: MIT OR Apache-2.0

//! Connecting again and again leaves nothing behind. Alone in its process, which it counts in.

mod common;

use common::Watched;
use qemu_display::{Address, Consoles};
use zerocopy_test_qemu::eventually;
use zerocopy_test_qemu::real::Qemu;
use zerocopy_test_support::process::{open_fds, threads};

#[test]
fn cycles_leave_no_descriptors_and_no_threads() {
    let qemu = Qemu::with_vga("dbus,p2p=on");
    let cycle = || {
        let watched = Watched::start(Address::Qmp(qemu.qmp()), Consoles::Graphic);
        watched.picture(&watched.screen(0));
    };
    cycle();
    let before = (open_fds(), threads());
    for _ in 0..10 {
        cycle();
    }
    // A thread that was joined is to be seen for a moment longer.
    eventually("as few descriptors and threads as before", || {
        (open_fds() <= before.0 && threads() <= before.1).then_some(())
    });
}
