# SPDX-License-Identifier: MIT OR Apache-2.0
"""DMA-BUFs imported with EGL and read back, on Mesa's software renderer.

The EGL module of pipewirezerocopysrc finds its display by the DRM node, asks for formats and modifiers,
imports memory of each kind and reads it back through OpenGL ES: that an import succeeds proves nothing.
The CUDA module draws with the same display, against a libcuda without a GPU (tests/cuda-fake). So does
gpucheck, the program of ci/gpu, as far as it goes here: through a PipeWire of its own; and once more as
`ci/gpu --pack` packs it, where nothing else is.

The guest has two GPUs, vgem and then virtio-gpu, and the second one is CUDA's.
"""

import re

LIMIT = 90
KINDS = ("dumb", "vgem", "udmabuf", "heap")
# No element is used; looking through all of them takes a minute here.
NO_PLUGINS = "GST_PLUGIN_PATH= GST_PLUGIN_SYSTEM_PATH= GST_REGISTRY=/tmp/registry"
# Of gpucheck: an emulated processor draws and compares some in a second.
FRAMES = 20
# And starts a pipeline in a second or two.
CYCLES = 20
SIZE = "160x90"
GPUCHECK = f"""\
mkdir /tmp/plugins
for name in app coreelements nvcodec; do ln -s /usr/lib/x86_64-linux-gnu/gstreamer-1.0/libgst$name.so /tmp/plugins/; done
export GST_PLUGIN_PATH= GST_PLUGIN_SYSTEM_PATH=/tmp/plugins GST_REGISTRY=/tmp/registry-gpucheck
# virtio-gpu is this PCI device, and so the only CUDA device.
pci=$(basename "$(readlink -f /sys/class/drm/card1/device)")
export ZEROCOPY_CUDA_FAKE_DEVICES=$pci LD_PRELOAD=/src/target/debug/libzerocopy_cuda_fake.so
exec gpucheck --render-node /dev/dri/card1 --size {SIZE} --frames {FRAMES} --cycles {CYCLES}
"""
# As ci/debian13 leaves it in the source tree: what ci/gpu --pack packs.
PACKED = "target/debian13/gpu"
# A machine with a driver and a shell, and no library but those of the shell.
BARE = f"""\
set -e
bare=/tmp/bare driver=/tmp/bare/usr/local/nvidia/lib64
mkdir -p $bare/bin $bare/dev $bare/gpu $bare/proc $bare/sys $bare/tmp $driver
ldd /bin/bash | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$bare${{library%/*}}"
    cp -L "$library" "$bare$library"
done
cp /bin/bash /bin/busybox $bare/bin/
for name in cat chmod dirname ln mktemp rm; do ln -s busybox $bare/bin/$name; done
cp /src/target/debug/libzerocopy_cuda_fake.so $driver/libcuda.so.1
mount --bind /src/{PACKED} $bare/gpu
for folder in dev proc sys; do mount --rbind /$folder $bare/$folder; done
exec env -i PATH=/bin /usr/sbin/chroot $bare /gpu/run --frames {FRAMES} --cycles {CYCLES}
"""
CUDA = ("XR24", "AB24", "NV12", "part", "drawn again", "nothing left")


def run(stage):
    with stage.guest("guest", "6.12", ["-device", "virtio-gpu-pci"]) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", "modprobe vgem && modprobe virtio-gpu", 20)
        with stage.part("imports, read back"):
            said = guest.run("egl", f"{NO_PLUGINS} drmcheck egl", LIMIT)
            check(stage, said)
        with stage.part("into CUDA memory, by drawing"):
            said = guest.run("cuda", f"{NO_PLUGINS} drmcheck cuda", LIMIT)
            check_cuda(stage, said)
        with stage.part("gpucheck, through PipeWire"):
            said = guest.run("gpucheck", GPUCHECK, 6 * LIMIT)
            check_gpucheck(stage, said)
        if not (stage.system.source / PACKED).exists():
            stage.say(f"not run: gpucheck as it is packed, which ci/debian13 leaves in {PACKED}")
            return
        with stage.part("gpucheck, packed"):
            said = guest.run("packed", BARE, 2 * LIMIT)
            check_packed(stage, said)


def check_gpucheck(stage, said):
    """Every picture must come, and none stale, with each setting; what needs a GPU must say that it did not run."""
    for part, way in (("egl-image", "gl-texture"), ("gl-texture", "gl-texture"), ("auto", "gl-texture")):
        part = f"{part}, through PipeWire"
        expect(stage, said, f"{part}: 10 pictures, every pixel of each is right")
        expect(stage, said, rf"{part}: 0 stale or torn of [1-9]\d* frames that came of {FRAMES} drawn")
        expect(stage, said, f"{part}: memory cuda, import {way}, sync latch, .*")
    expect(stage, said, rf"contexts and pools: {CYCLES // 10} times in .* threads")
    expect(stage, said, rf"auto, started and stopped: {CYCLES} times in .* threads")
    expect(stage, said, r"egl-image: the import: not run: .*")
    expect(stage, said, "gl-texture AB24: every pixel is right")
    expect(stage, said, "gl-texture: fences: every picture is whole; waited for by the GPU, .*")
    expect(stage, said, rf"gl-texture: 0 stale or torn of {FRAMES} frames of {SIZE}, drawn and copied side by side")
    expect(stage, said, rf"\| gl-texture \| {SIZE} \| a frame \| .* \| {FRAMES} \|")
    expect(stage, said, f"cudaupload {SIZE}: not measured: .*")
    expect(stage, said, r"gpucheck: passed \(.* 0 wrong.*")


def check_packed(stage, said):
    """Where nothing is but the driver, all must be found that needs no EGL of its."""
    for name in ("app", "coreelements", "nvcodec"):
        expect(stage, said, f"GStreamer's plugin {name}: /gpu/gstreamer-1.0/libgst{name}.so")
    expect(stage, said, "EGL devices: 0|EGL: .*")
    expect(stage, said, "PipeWire: runs")
    expect(stage, said, rf"contexts and pools: {CYCLES // 10} times in .* threads")
    expect(stage, said, r"all that needs EGL: not run: .*")
    expect(stage, said, r"gpucheck: passed \(1 parts right, 0 wrong, 1 not run\)")


def expect(stage, said, text):
    """A line of this form must be there, once."""
    found = re.findall(f"^(?:{text})$", said, re.MULTILINE)
    stage.check(len(found) == 1, found[0] if found else f"no line {text!r}")


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
