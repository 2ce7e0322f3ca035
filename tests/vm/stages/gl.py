# SPDX-License-Identifier: MIT OR Apache-2.0
"""qemudisplaysrc with DMA-BUFs, as a QEMU with gl=on shows them: passed on, turned, copied, let go.

There is no GPU for QEMU here, so `drmcheck screen` is that QEMU: it shows real DMA-BUFs of virtio-gpu,
vgem, udmabuf and the system heap over the same D-Bus interface, and compares what comes out of the
element with what lies in them. What was built with GStreamer 1.24's DMA_DRM caps (ci/debian13) is run as
well, if it is there.
"""

import re

# The first look through all plugins is in it, which takes ten seconds on an idle machine.
LIMIT = 300
KINDS = ("dumb", "vgem", "udmabuf", "heap")
WAYS = ("as it is", "upside down", "part", "copied", "let go", "tiled")
# As ci/debian13 leaves it in the source tree, seen from the guest.
NEWER = "target/debian13/release"


def run(stage):
    with stage.guest("guest", "6.12", ["-device", "virtio-gpu-pci"]) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", "modprobe --all virtio-gpu vgem", LIMIT)
        with stage.part("plain caps, as before GStreamer 1.24"):
            check(stage, guest, "plain", "drmcheck screen")
        if (stage.system.source / NEWER / "drmcheck").exists():
            with stage.part("DMA_DRM caps"):
                plugins = f"GST_PLUGIN_PATH=/src/{NEWER} GST_REGISTRY=/tmp/registry"
                check(stage, guest, "dma-drm", f"{plugins} /src/{NEWER}/drmcheck screen")
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
