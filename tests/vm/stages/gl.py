# SPDX-License-Identifier: MIT OR Apache-2.0
"""DMA-BUFs of a QEMU with gl=on, through qemudisplaysrc and helix-host: passed on, turned, copied, let go.

`drmcheck gl` has a stock QEMU, Debian 13's, inside the guest, where there is a DRM node for its renderer, and
compares what comes out with what the graphics card was told to draw. That renderer makes one kind of memory,
the right way up and whole, so `drmcheck screen` is another QEMU: it shows DMA-BUFs of virtio-gpu, vgem,
udmabuf and the system heap over the same D-Bus interface, upside down and in parts. What was built with
GStreamer 1.24's DMA_DRM caps (ci/debian13) is run as well, if it is there.
"""

import re

# The first look through all plugins is in it, which takes ten seconds on an idle machine.
LIMIT = 300
# Two QEMUs inside the guest: a minute and a half where little else runs.
STOCK_LIMIT = 900
KINDS = ("dumb", "vgem", "udmabuf", "heap")
WAYS = ("as it is", "upside down", "part", "copied", "let go", "tiled", "nobody knows how")
WAYS_OF_STOCK = {
    "2d": ("as it is", "copied", "cursor beside it", "cursor in it", "helix-host"),
    "3d": ("as it is", "copied", "off and on", "helix-host"),
}
# As ci/debian13 leaves it in the source tree, seen from the guest.
NEWER = "target/debian13/release"


def run(stage):
    with stage.guest("guest", "6.12", ["-device", "virtio-gpu-pci"]) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", "modprobe --all virtio-gpu vgem", LIMIT)
        with stage.part("plain caps, as before GStreamer 1.24"):
            check(stage, guest, "plain", "drmcheck screen")
            check_stock(stage, guest, "stock", "drmcheck gl")
        if (stage.system.source / NEWER / "drmcheck").exists():
            with stage.part("DMA_DRM caps"):
                plugins = f"GST_PLUGIN_PATH=/src/{NEWER} GST_REGISTRY=/tmp/registry"
                check(stage, guest, "dma-drm", f"{plugins} /src/{NEWER}/drmcheck screen")
                check_stock(stage, guest, "stock-dma-drm", f"{plugins} /src/{NEWER}/drmcheck gl")
        else:
            stage.say(f"not run: DMA_DRM caps, which ci/debian13 builds in {NEWER}")


def check(stage, guest, name, command):
    """Runs the program; each way must be right with each kind of memory."""
    said = guest.run(name, command, LIMIT)
    for kind in KINDS:
        for way in WAYS:
            line = re.search(f"^screen {kind} {way}: (.*)$", said, re.MULTILINE)
            text = line[0] if line else f"nothing about {kind}, {way}"
            stage.check(line is not None and line[1] == "right", f"{name}: {text}")


def check_stock(stage, guest, name, command):
    """The same with a stock QEMU, whose own words have a file of theirs."""
    said = guest.run(name, f"{command} 2>/share/{stage.name}/{name}.errors.log", STOCK_LIMIT)
    for card, ways in WAYS_OF_STOCK.items():
        for way in ways:
            line = re.search(f"^gl {card} {way}: (.*)$", said, re.MULTILINE)
            text = line[0] if line else f"nothing about {card}, {way}"
            stage.check(line is not None and line[1] == "right", f"{name}: {text}")
    for picture in re.findall("^gl picture .*$", said, re.MULTILINE):
        stage.say(f"    {picture}")
