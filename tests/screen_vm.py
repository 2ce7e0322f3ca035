# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtual machine that shows the known moving picture (see pattern.py), and nothing else.

A stock QEMU whose D-Bus display is offered over QMP. The guest is a boot sector, screen_vm.s, assembled
here; what it shows is pixel by pixel what pattern.py describes.
"""

import os
import pathlib
import select
import subprocess

import gi
import numpy

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import Gst, GstApp  # noqa: E402, F401

import pattern  # noqa: E402
from desktop import Child, DesktopError  # noqa: E402

SOURCE = pathlib.Path(__file__).with_name("screen_vm.s")
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
# What the boot sector moves at once, in bytes: a bank of the graphics card's memory.
BANK = 64 * 1024
BOOT_SECTOR = 512
# In seconds, for a machine that is busy with something else; one or two are usual.
START_TIMEOUT = 60


class ScreenVm:
    """As a context manager: entered, the picture is on the screen and moves.

    `qmp` is the path of the socket that it offers, beside which its disk lies; `log_dir` is for QEMU's words.
    """

    def __init__(self, width, height, fps, qmp, log_dir):
        folder = pathlib.Path(qmp).parent
        disk = folder / "screen-vm.img"
        disk.write_bytes(boot_sector(width, height, fps, folder) + picture(width, height))
        # No KVM: it can exist and hang, and a boot sector needs none.
        argv = [QEMU, "-name", "screen", "-accel", "tcg", "-m", "16", "-nodefaults", "-no-user-config"]
        argv += ["-vga", "std", "-drive", f"file={disk},format=raw,if=ide,snapshot=on"]
        argv += ["-debugcon", "stdio", "-display", "dbus,p2p=on"]
        argv += ["-qmp", f"unix:{qmp},server=on,wait=off"]
        self.argv, self.log_dir = argv, log_dir

    def __enter__(self):
        qemu = Child("screen-vm", self.argv, os.environ, self.log_dir, stdout=subprocess.PIPE)
        # It says one line, or ends.
        readable, _, _ = select.select([qemu.process.stdout], [], [], START_TIMEOUT)
        if not readable or qemu.process.stdout.readline() != b"shown\n":
            qemu.stop()
            raise DesktopError(
                f"QEMU has ended, or shows no picture within {START_TIMEOUT} s\n{qemu.tail()}"
            )
        self.qemu = qemu
        return self

    def __exit__(self, *_):
        self.qemu.stop()


def boot_sector(width, height, fps, folder):
    """screen_vm.s as a machine runs it."""
    symbols = {"WIDTH": width, "HEIGHT": height, "RATE": fps, "SPEED": pattern.SPEED}
    defined = [word for name, value in symbols.items() for word in ("--defsym", f"{name}={value}")]
    made, linked = folder / "screen-vm.o", folder / "screen-vm.bin"
    for argv in (
        ["as", "--32", *defined, "-o", made, SOURCE],
        # Where a BIOS puts a boot sector.
        ["ld", "-m", "elf_i386", "-Ttext=0x7c00", "--oformat=binary", "-o", linked, made],
    ):
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise DesktopError(f"{argv[0]} {SOURCE.name}: {done.stderr.strip()}")
    sector = linked.read_bytes()
    made.unlink()
    linked.unlink()
    if len(sector) != BOOT_SECTOR:
        raise DesktopError(f"{SOURCE.name} has become {len(sector)} bytes, not {BOOT_SECTOR}")
    return sector


def picture(width, height):
    """The first picture of the pattern with each row twice, up to whole banks."""
    source = pattern.description(width, height, 30, live=False)
    source = source.replace("videotestsrc", "videotestsrc num-buffers=1", 1)
    pipeline = Gst.parse_launch(f"{source} ! appsink name=sink sync=false")
    pipeline.set_state(Gst.State.PLAYING)
    try:
        sample = pipeline.get_by_name("sink").try_pull_sample(START_TIMEOUT * Gst.SECOND)
    finally:
        pipeline.set_state(Gst.State.NULL)
    if sample is None:
        raise DesktopError("videotestsrc did not draw the known picture")
    buffer = sample.get_buffer()
    rows = numpy.frombuffer(buffer.extract_dup(0, buffer.get_size()), numpy.uint8)
    rows = rows.reshape(height, 4 * width)
    pixels = numpy.hstack((rows, rows)).tobytes()
    return pixels.ljust(-(-len(pixels) // BANK) * BANK, b"\0")
