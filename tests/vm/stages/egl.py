# SPDX-License-Identifier: MIT OR Apache-2.0
"""DMA-BUFs imported with EGL and read back, on Mesa's software renderer.

The EGL module of pipewirezerocopysrc finds its display by the DRM node, asks for formats and modifiers,
imports memory of each kind and reads it back through OpenGL ES: that an import succeeds proves nothing.
The CUDA module draws with the same display, against a libcuda without a GPU (tests/cuda-fake). So does
gpucheck, the program of ci/gpu, as far as it goes here: through a PipeWire of its own.
"""

import re

LIMIT = 90
KINDS = ("dumb", "vgem", "udmabuf", "heap")
# No element is used; looking through all of them takes a minute here.
NO_PLUGINS = "GST_PLUGIN_PATH= GST_PLUGIN_SYSTEM_PATH= GST_REGISTRY=/tmp/registry"
# Of gpucheck: an emulated processor draws and compares some in a second.
FRAMES = 20
GPUCHECK = f"""\
mkdir /tmp/plugins
for name in app coreelements nvcodec; do ln -s /usr/lib/x86_64-linux-gnu/gstreamer-1.0/libgst$name.so /tmp/plugins/; done
export GST_PLUGIN_PATH= GST_PLUGIN_SYSTEM_PATH=/tmp/plugins GST_REGISTRY=/tmp/registry-gpucheck
# virtio-gpu is this PCI device, and so the only CUDA device.
pci=$(basename "$(readlink -f /sys/class/drm/card0/device)")
export ZEROCOPY_CUDA_FAKE_DEVICES=$pci LD_PRELOAD=/src/target/debug/libzerocopy_cuda_fake.so
exec gpucheck --render-node /dev/dri/card0 --frames {FRAMES}
"""
CUDA = ("XR24", "AB24", "NV12", "part", "drawn again", "nothing left")


def run(stage):
    with stage.guest("guest", "6.12", ["-device", "virtio-gpu-pci"]) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", "modprobe --all virtio-gpu vgem", 20)
        with stage.part("imports, read back"):
            said = guest.run("egl", f"{NO_PLUGINS} drmcheck egl", LIMIT)
            check(stage, said)
        with stage.part("into CUDA memory, by drawing"):
            said = guest.run("cuda", f"{NO_PLUGINS} drmcheck cuda", LIMIT)
            check_cuda(stage, said)
        with stage.part("gpucheck, through PipeWire"):
            said = guest.run("gpucheck", GPUCHECK, 3 * LIMIT)
            check_gpucheck(stage, said)


def check_gpucheck(stage, said):
    """Every picture must come, and none stale, with either setting; what needs a GPU must say that it did not run."""
    for text, times in (
        (r"through PipeWire: 10 pictures, every pixel of each is right", 2),
        (rf"through PipeWire: 0 stale or torn of [1-9]\d* frames that came of {FRAMES} drawn", 2),
        (r"through PipeWire: memory cuda, import gl-texture, sync latch, .*", 2),
        (r"egl-image: the import: not run: .*", 1),
        (r"cudaupload 4K: not measured: .*", 1),
        (r"gpucheck: passed \(.* 0 wrong.*", 1),
    ):
        found = re.findall(f"^{text}$", said, re.MULTILINE)
        stage.check(len(found) == times, f"{len(found)} of {times}: {found[0] if found else text}")


def check_cuda(stage, said):
    """What is drawn on the real EGL display must arrive, whole, in part, and drawn again."""
    for what in CUDA:
        line = re.search(f"^cuda {what}: (.*)$", said, re.MULTILINE)
        stage.check(line is not None and line[1] == "right", line[0] if line else f"nothing about {what}")


def check(stage, said):
    """What is imported must be right; what cannot be must be refused, with a reason."""
    display = re.search(r"^egl display .*$", said, re.MULTILINE)
    stage.check(display is not None, display[0] if display else "no display")
    formats = re.search(r"^egl formats: (\d+); modifiers of XR24: \[(.*)\]$", said, re.MULTILINE)
    stage.check(formats is not None and "0" in formats[2].split(", "), f"{formats and formats[0]}: LINEAR is one")
    # There is a GPU that imports, and no libcuda.
    caps = re.search(r"^egl caps: .*$", said, re.MULTILINE)
    text = caps[0] if caps else "nothing about caps"
    stage.check(text == "egl caps: DMA-BUFs true, CUDA memory false", text)
    for kind in KINDS:
        for how in ("linear", "without modifier", "part", "drawn again", "foreign tiling"):
            # A renderer that draws on the processor takes the memory of its own node only.
            own = kind == "dumb" and how != "foreign tiling"
            expected = "right" if own else "refused: a "
            line = re.search(f"^egl {kind} {how}: (.*)$", said, re.MULTILINE)
            good = line is not None and line[1].startswith(expected)
            stage.check(good, line[0] if line else f"nothing about {kind}, {how}")
