// SPDX-License-Identifier: MIT OR Apache-2.0

//! virtio-gpu of a real QEMU, driven by the test in a guest's place.
//!
//! As little of the virtio specification (1.2; 4.1.4 PCI, 2.7 split queues, 5.7 GPU) as it takes to show
//! pictures: one command at a time, one scanout.

use std::path::Path;

use crate::eventually;
use crate::qtest::Qtest;

/// QEMU's devices, without a GPU of the host's and with one.
pub(crate) const DEVICES: [&str; 2] = ["virtio-gpu-pci", "virtio-gpu-gl-pci"];

/// Registers of PCI: the fifth base address, which has 64 bits, and the command register.
const BASE_4: u32 = 0x20;
const COMMAND: u32 = 0x04;
/// Where the device's registers are to be seen: an address that nobody else has.
const REGISTERS: u32 = 0xf100_0000;
/// Where QEMU puts its notifications there (`virtio_pci_realize` in its hw/virtio/virtio-pci.c); the
/// common configuration is at 0.
const NOTIFY: u32 = 0x3000;

/// Of the common configuration.
const FEATURE_SELECT: u32 = 0x08;
const FEATURE: u32 = 0x0c;
const STATUS: u32 = 0x14;
const QUEUE_SELECT: u32 = 0x16;
const QUEUE_SIZE: u32 = 0x18;
const QUEUE_ENABLE: u32 = 0x1c;
const QUEUE_DESCRIPTORS: u32 = 0x20;
const QUEUE_DRIVER: u32 = 0x28;
const QUEUE_DEVICE: u32 = 0x30;
/// A driver is there; it knows how to drive; features are agreed on; it drives.
const STATUSES: [u64; 4] = [1, 3, 11, 15];

/// Entries of the queue.
const ENTRIES: u16 = 4;
/// `VIRTQ_DESC_F_NEXT` and `VIRTQ_DESC_F_WRITE`.
const NEXT: u64 = 1;
const WRITE: u64 = 2;

/// In the machine's memory: the queue's three parts, a command, its answer, and pictures.
const DESCRIPTORS: u32 = 0x10_0000;
const DRIVER: u32 = 0x10_1000;
const DEVICE: u32 = 0x10_2000;
const REQUEST: u32 = 0x10_3000;
const ANSWER: u32 = 0x10_4000;
const PICTURE: u32 = 0x20_0000;

/// `VIRTIO_GPU_CMD_*`.
const CREATE_2D: u32 = 0x101;
const UNREF: u32 = 0x102;
const SET_SCANOUT: u32 = 0x103;
const FLUSH: u32 = 0x104;
const TRANSFER_2D: u32 = 0x105;
const ATTACH_BACKING: u32 = 0x106;
/// `VIRTIO_GPU_RESP_OK_NODATA`.
const OK: u16 = 0x1100;
/// `VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM`.
const BGRX: u32 = 2;

/// The device.
pub struct VirtioGpu {
    qtest: Qtest,
    /// Commands so far.
    count: u16,
    /// The resource that is shown, 0 for none; all before it are gone.
    resource: u32,
    /// Its size, in pixels.
    size: (u32, u32),
    /// The number of the newest one.
    newest: u32,
}

impl VirtioGpu {
    /// Takes over the device of a QEMU that has just started, over its qtest socket.
    ///
    /// # Panics
    ///
    /// If there is no such QEMU.
    pub(crate) fn take(socket: &Path) -> Self {
        let mut qtest = Qtest::connect(socket);
        qtest.configure(BASE_4, REGISTERS);
        qtest.configure(BASE_4 + 4, 0);
        // It may be talked to over memory, and may read and write that itself.
        qtest.configure(COMMAND, 6);
        let mut set = |width, register, value| qtest.write(width, REGISTERS + register, value);
        let [there, driver, agreed, driving] = STATUSES;
        for status in [0, there, driver] {
            set('b', STATUS, status);
        }
        // VIRTIO_GPU_F_VIRGL, which is bit 0, is for guests that draw in 3D; VIRTIO_F_VERSION_1 is bit 32.
        for (word, features) in [(0, 0), (1, 1)] {
            set('l', FEATURE_SELECT, word);
            set('l', FEATURE, features);
        }
        set('b', STATUS, agreed);
        set('w', QUEUE_SELECT, 0);
        set('w', QUEUE_SIZE, ENTRIES.into());
        for (register, part) in [
            (QUEUE_DESCRIPTORS, DESCRIPTORS),
            (QUEUE_DRIVER, DRIVER),
            (QUEUE_DEVICE, DEVICE),
        ] {
            set('l', register, part.into());
            set('l', register + 4, 0);
        }
        set('w', QUEUE_ENABLE, 1);
        set('b', STATUS, driving);
        Self {
            qtest,
            count: 0,
            resource: 0,
            size: (0, 0),
            newest: 0,
        }
    }

    /// Shows a picture in a resource of its own: red, green and blue of each pixel.
    ///
    /// # Panics
    ///
    /// If QEMU has ended, or does not do it.
    pub fn show(&mut self, size: (u32, u32), colour: impl Fn(u32, u32) -> [u8; 3]) {
        let (width, height) = size;
        let before = std::mem::replace(&mut self.resource, self.newest + 1);
        (self.newest, self.size) = (self.resource, size);
        self.command(CREATE_2D, &[self.resource, BGRX, width, height]);
        let backing = [self.resource, 1, PICTURE, 0, width * height * 4, 0];
        self.command(ATTACH_BACKING, &backing);
        self.transfer(colour);
        self.command(SET_SCANOUT, &[0, 0, width, height, 0, self.resource]);
        self.flush();
        if before != 0 {
            self.command(UNREF, &[before, 0]);
        }
    }

    /// Draws another picture into the resource that is shown.
    ///
    /// # Panics
    ///
    /// As [`VirtioGpu::show`].
    pub fn draw(&mut self, colour: impl Fn(u32, u32) -> [u8; 3]) {
        self.transfer(colour);
        self.flush();
    }

    /// Switches the scanout off.
    ///
    /// # Panics
    ///
    /// As [`VirtioGpu::show`].
    pub fn switch_off(&mut self) {
        self.command(SET_SCANOUT, &[0; 6]);
        let before = std::mem::take(&mut self.resource);
        self.command(UNREF, &[before, 0]);
    }

    fn transfer(&mut self, colour: impl Fn(u32, u32) -> [u8; 3]) {
        let (width, height) = self.size;
        self.qtest.write_picture(PICTURE, self.size, colour);
        let rest = [0, 0, width, height, 0, 0, self.resource, 0];
        self.command(TRANSFER_2D, &rest);
    }

    fn flush(&mut self) {
        let (width, height) = self.size;
        self.command(FLUSH, &[0, 0, width, height, self.resource, 0]);
    }

    /// Gives a command, and waits until it is done. QEMU does none while it holds the guest's GPU.
    fn command(&mut self, kind: u32, rest: &[u32]) {
        // The header: kind, flags, fence and context, of which none is wanted.
        let words = [kind, 0, 0, 0, 0, 0]
            .into_iter()
            .chain(rest.iter().copied());
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        self.qtest.write_bytes(REQUEST, &bytes);
        self.describe(0, REQUEST, bytes.len() as u64, NEXT, 1);
        self.describe(1, ANSWER, 24, WRITE, 0);
        let slot = DRIVER + 4 + 2 * u32::from(self.count % ENTRIES);
        self.qtest.write('w', slot, 0);
        self.count = self.count.wrapping_add(1);
        let count = self.count;
        self.qtest.write('w', DRIVER + 2, count.into());
        self.qtest.write('w', REGISTERS + NOTIFY, 0);
        eventually("an answer of virtio-gpu", || {
            (self.qtest.read_16(DEVICE + 2) == count).then_some(())
        });
        let answer = self.qtest.read_16(ANSWER);
        assert_eq!(answer, OK, "command {kind:#x} of {rest:?}: {answer:#x}");
    }

    /// Describes a part of a command.
    fn describe(&mut self, entry: u32, address: u32, length: u64, flags: u64, next: u64) {
        let at = DESCRIPTORS + 16 * entry;
        self.qtest.write('q', at, address.into());
        self.qtest.write('l', at + 8, length);
        self.qtest.write('w', at + 12, flags);
        self.qtest.write('w', at + 14, next);
    }
}
