# SPDX-License-Identifier: MIT OR Apache-2.0
"""What zero copy stands on: virtio-gpu's buffers as the host's resources, refusals, outputs.

tests/vm/drmcheck looks from inside the guest; here its word is compared with QEMU's trace, and the
host connects outputs through QEMU's D-Bus display. No GPU is needed: the device is 2D.
"""

import re

from display import Display

OUTPUTS = 4
# Of output 1 and 2, in pixels: sizes that nobody has by default. Widths in steps of 8, as EDID has them.
SIZES = {1: (1304, 744), 2: (1048, 664)}
TRACED = re.compile(r"virtio_gpu_cmd_res_create_2d res 0x([0-9a-f]+), fmt 0x\w+, w (\d+), h (\d+)")
LIMIT = 60
# What virtio-gpu's import says: not its own DMA-BUF (virtgpu_gem_prime_import_sg_table()), no DMA-BUF at all.
REFUSALS = {"vgem": "ENODEV", "udmabuf": "ENODEV", "heap": "ENODEV", "memfd": "EINVAL"}


def run(stage):
    display = Display(stage)
    for kernel in ("6.12", "6.1"):
        name = f"linux-{kernel.replace('.', '-')}"
        trace = stage.folder / f"{name}.trace"
        gpu = ["-device", f"virtio-gpu-pci,max_outputs={OUTPUTS}", *display.arguments]
        gpu += ["-trace", "virtio_gpu_cmd_res_create_2d", "-D", trace]
        with stage.guest(name, kernel, gpu) as guest:
            stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
            guest.run(f"modules-{name}", "modprobe --all virtio-gpu vgem", LIMIT)
            with stage.part(f"{kernel}: buffers and their resource ids"):
                said = guest.run(f"buffers-{name}", "drmcheck buffers", LIMIT)
                compare_with_trace(stage, said, trace)
            with stage.part(f"{kernel}: memory that is not virtio-gpu's"):
                said = guest.run(f"refusals-{name}", "drmcheck refusals", LIMIT)
                check_refusals(stage, kernel, said)
            with stage.part(f"{kernel}: outputs that the host connects"):
                display.wait()
                connect_outputs(stage, guest, name, display)


def compare_with_trace(stage, said, trace):
    """Each resource that drmcheck names must be one that QEMU made, of that size, with that id."""
    made = {
        (int(width), int(height)): int(number, 16)
        for number, width, height in TRACED.findall(trace.read_text())
    }
    resources = re.findall(r"^resource (\d+) (\d+)x(\d+) (\w+)$", said, re.MULTILINE)
    for how in ("dumb", "created"):
        stage.check(any(line[3] == how for line in resources), f"there are buffers that were {how}")
    for number, width, height, how in resources:
        traced = made.get((int(width), int(height)))
        text = f"{how} {width}x{height}: resource {number} in the guest, {traced} in QEMU's trace"
        stage.check(traced == int(number), text)


def check_refusals(stage, kernel, said):
    """All kinds of foreign memory must be refused; which of them a kernel has is known."""
    # Debian 12's kernel is built without CONFIG_UDMABUF and CONFIG_DMABUF_HEAPS.
    absent = {"6.1": {"udmabuf", "heap"}, "6.12": set()}[kernel]
    for kind, errno in REFUSALS.items():
        line = re.search(f"^(refused|absent) {kind}: (.*)$", said, re.MULTILINE)
        if kind in absent:
            good = line is not None and line[1] == "absent"
        else:
            good = line is not None and line.groups() == ("refused", errno)
        stage.check(good, line[0] if line else f"nothing about {kind}")


def connect_outputs(stage, guest, name, display):
    """The host enables outputs 1 and 2; the guest must see them connected with those sizes."""
    for console, (width, height) in SIZES.items():
        connector = f"Virtual-{console + 1}"
        display.set_size(console, width, height)
        job = guest.start(f"output-{console}-{name}", f"drmcheck output {connector} {width} {height}", LIMIT)
        good = job.wait() == 0
        seen = re.search(f"^output {connector} .*$", job.output(), re.MULTILINE)
        stage.check(good, f"console {console} at {width}x{height}: {seen[0] if seen else 'no word of it'}")
