# SPDX-License-Identifier: MIT OR Apache-2.0
"""A guest's outputs through helix-host --qemu and scanoutsrc: switched on by clients, and seen by them.

The guest knows nothing of this: it has a kernel with a text console, and `drmcheck output` looks at its
connectors. Everything else runs on the host, as it would beside any QEMU: helix-host is started before
QEMU, and one scanoutsrc for each output asks for a size (ENABLE_SCANOUT) and decodes what it gets.
"""

import os

from display import Display

# Of console 0 and 1, in pixels: sizes that nobody has by default. Widths in steps of 8, as EDID has them.
SIZES = {0: (1304, 744), 1: (1048, 664)}
LIMIT = 60


def run(stage):
    display = Display(stage)
    socket = stage.sockets / "helix"
    address = display.arguments[1].removeprefix("dbus,addr=")
    argv = [stage.built("helix-host"), "--listen", f"unix:{socket}", "--qemu", f"dbus:{address}"]
    host = stage.program("helix-host", argv)
    host.wait_for("listening on", LIMIT)
    gpu = ["-device", "virtio-gpu-pci,max_outputs=2", *display.arguments]
    with stage.guest("guest", "6.12", gpu) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", "modprobe virtio-gpu", LIMIT)
        host.wait_for("connected to QEMU", LIMIT)
        for console, (width, height) in SIZES.items():
            with stage.part(f"scanout {console}"):
                watch(stage, guest, socket, console, width, height)


def watch(stage, guest, socket, console, width, height):
    """A client enables the scanout at this size: the guest's output is connected, and frames come."""
    connector = f"Virtual-{console + 1}"
    # The guest's text console has a cursor that blinks, on every output that is connected.
    source = f"scanoutsrc socket-path={socket} scanout-id={console} enable=true width={width} height={height}"
    argv = ["gst-launch-1.0", "-v", *source.split(), *"! h264parse ! avdec_h264 ! fakesink".split()]
    environment = {
        **os.environ,
        "GST_PLUGIN_PATH": str(stage.built("gstreamer-1.0")),
        "GST_REGISTRY": str(stage.folder / "registry.bin"),
    }
    client = stage.program(f"client-{console}", argv, env=environment)
    job = guest.start(f"output-{console}", f"drmcheck output {connector} {width} {height}", LIMIT)
    stage.check(job.wait() == 0, f"{connector} is connected at {width}x{height} in the guest")
    # Only decoded pictures have such caps. The kernel's console keeps the mode that the first output had
    # when its driver was loaded, and begins on the second in the size that it is given.
    size = f", format=(string)I420, width=(int){width}, height=(int){height}" if console else ""
    client.wait_for(f"fakesink0.GstPad:sink: caps = video/x-raw{size}", LIMIT)
    stage.check(True, f"a decoder has a picture of scanout {console}")
    client.stop()
