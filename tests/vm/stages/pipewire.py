# SPDX-License-Identifier: MIT OR Apache-2.0
"""DMA-BUFs from PipeWire through pipewirezerocopysrc: weston's, and those of a producer of our own.

weston 14 composes with its GL renderer (llvmpipe here) into dumb buffers of virtio-gpu, which are wider and
higher than its screen, and shows a client's known moving picture. Their resource ids are those in QEMU's
trace, and where pixels are wanted, they are right. What weston does not do is for `drmcheck capture`:
other memory and formats, changes in mid-stream, fences and explicit sync.
"""

import re
import shlex

import gi
import numpy

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import Gst, GstApp  # noqa: E402, F401

import desktop  # noqa: E402
import pattern  # noqa: E402
from stages.drm import TRACED  # noqa: E402
from stages.gl import NEWER  # noqa: E402
from stages.resource import HOST, start_resolver, stop  # noqa: E402

# Of weston's screen. Mesa's software renderer makes buffers in steps of 64 pixels.
WIDTH, HEIGHT = 328, 232
BUFFER_WIDTH, BUFFER_HEIGHT = 384, 256
# As many as an emulated processor can draw in a second.
FPS = 5
FRAMES = 8
# In seconds, for a machine that has other things to do.
START_LIMIT = 180
LIMIT = 120
WHOLE = 1200

WESTON_CONFIG = f"""\
[core]
shell=kiosk-shell.so
idle-time=0
[output]
name=pipewire
mode={WIDTH}x{HEIGHT}@30
"""
# What no scene of drmcheck needs: vgem, which weston would take for its GPU.
SESSION = """\
set -e
modprobe virtio-gpu
pipewire &
until [ -S $XDG_RUNTIME_DIR/pipewire-0 ]; do sleep 0.1; done
stdbuf -oL pw-mon --no-colors >/tmp/pw-mon &
monitor=$!
wireplumber &
# It is ready when it has published this.
until grep -q 'metadata.name = "default"' /tmp/pw-mon; do sleep 0.1; done
kill $monitor
echo "the session is up"
wait
"""
# Only a primary node makes dumb buffers, and Mesa looks for a render node: weston sees the one as the other.
WESTON = """\
mount --bind /dev/dri/card0 /dev/dri/renderD128
exec weston --backend=pipewire --renderer=gl --socket=wayland --config=/share/pipewire/weston.ini
"""
SOURCE = (
    "pipewirezerocopysrc name=source target-object=weston.pipewire keepalive-time=0 first-frame-timeout=0"
    f" num-buffers={FRAMES}"
)
# DMA-BUFs are taken, but none that weston can make.
REFUSED = "video/x-raw(memory:DMABuf),format=DMA_DRM,drm-format=XR24:0x0100000000000001;video/x-raw"
SCENES = {
    "dumb", "vgem", "udmabuf", "heap", "rgba", "offset", "nv12", "nv12-apart", "system", "read", "read-by-gpu",
    "second-modifier", "no-modifier", "refused-modifier", "refused-strict", "refused-caps", "modifier-dropped",
    "cuda", "cuda-rgba", "cuda-nv12", "cuda-device", "cuda-shared", "cuda-latch", "cuda-fence", "cuda-stopped",
    "cuda-lost", "cuda-refused", "cuda-exhausted", "cuda-strict", "cuda-only", "cuda-still", "cuda-kept",
    "cuda-agreed-again", "cuda-unwanted", "cuda-cycles",
    "resized", "reformatted", "format-twice", "few-buffers", "held", "hoarded",
    "no-sync", "implicit", "explicit", "explicit-dropped", "explicit-stopped",
    "explicit-paused", "explicit-never",
}
# Those in which caps matter, for what was built with GStreamer 1.24's DMA_DRM caps (see gl.py).
NEWER_SCENES = {
    "dumb", "rgba", "nv12", "second-modifier", "refused-modifier", "refused-caps", "reformatted",
    "modifier-dropped",
}


def run(stage):
    Gst.init(None)
    trace = stage.folder / "qemu.trace"
    gpu = ["-device", "virtio-gpu-pci", "-trace", "virtio_gpu_cmd_res_create_2d", "-D", trace]
    with stage.guest("guest", "6.12", gpu) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        start_session(stage, guest)
        with stage.part("weston's DMA-BUFs"):
            show_weston(stage, guest, trace)
        with stage.part("a producer of our own"):
            play_scenes(stage, guest)


def start_session(stage, guest):
    """PipeWire, and WirePlumber without what looks for hardware."""
    for name, text in desktop.WIREPLUMBER_CONFIG.items():
        path = stage.folder / "config" / "wireplumber" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = f"export XDG_CONFIG_HOME=/share/{stage.name}/config\n{SESSION}"
    guest.start("session", script, WHOLE).wait_for("the session is up", START_LIMIT)


def show_weston(stage, guest, trace):
    """weston with a client, and all that is done with its pictures."""
    (stage.folder / "weston.ini").write_text(WESTON_CONFIG)
    weston = guest.start("weston", f"exec unshare --mount bash -c {shlex.quote(WESTON)}", WHOLE)
    weston.wait_for("enabled with head", START_LIMIT)
    client = f"exec /usr/bin/python3 /src/tests/pattern_client.py {WIDTH} {HEIGHT} {FPS}"
    client = guest.start("client", f"export WAYLAND_DISPLAY=wayland\n{client}", WHOLE)
    client.wait_for("shown", START_LIMIT)

    resolver = start_resolver(guest)
    with stage.part("resource ids"):
        send_ids(stage, guest, resolver, trace)
    with stage.part("and without being asked for"):
        before = len(resolved(resolver))
        memory = launch(guest, "ids-auto", f"! vsockenc socket-path={HOST} ! fakesink")
        text = f"auto ! vsockenc: memory {memory}, {len(resolved(resolver)) - before} resources"
        stage.check(text == f"auto ! vsockenc: memory dmabuf, {FRAMES} resources", text)
    stop(resolver)
    picture = draw()
    for mode, caps, memory, stride, rows in (
        ("dmabuf", "video/x-raw(memory:DMABuf)", "dmabuf", 4 * BUFFER_WIDTH, BUFFER_HEIGHT),
        ("system", "video/x-raw", "system", 4 * WIDTH, HEIGHT),
        ("auto", REFUSED, "system", 4 * WIDTH, HEIGHT),
    ):
        with stage.part(f"output-mode={mode}, for who takes {caps}"):
            look(stage, guest, picture, mode, caps, memory, (stride, rows))
    for job in (client, weston):
        stop(job)


def send_ids(stage, guest, resolver, trace):
    """Each picture must arrive as the id of its buffer, which QEMU knows, and no pixel with it."""
    pipeline = (
        f"{SOURCE} output-mode=dmabuf"
        f" ! vsockenc name=encoder socket-path={HOST} transfer=resource-id ! fakesink"
    )
    script = shlex.join(["/src/tests/vm/pipeline-stats.py", str(LIMIT), pipeline])
    said = guest.run("ids", f"exec {script}", LIMIT + START_LIMIT)
    lines = dict(re.findall(r"^stats (\w+) (.*)$", said, re.MULTILINE))
    source, encoder = (
        dict(re.findall(r"([\w-]+)=\(\w+\)([\w-]+)", lines[name])) for name in ("source", "encoder")
    )
    traced = {
        int(number, 16)
        for number, width, height in TRACED.findall(trace.read_text())
        if (int(width), int(height)) == (BUFFER_WIDTH, BUFFER_HEIGHT)
    }
    seen = resolved(resolver)
    ids = {int(number) for number, _ in seen}
    text = f"{len(seen)} requests, of resources {sorted(ids)}; QEMU's trace has {sorted(traced)}"
    stage.check(len(seen) == FRAMES and len(ids) > 1 and ids <= traced, text)
    layouts = {layout for _, layout in seen}
    text = f"each in a buffer of {BUFFER_WIDTH}x{BUFFER_HEIGHT}: {', '.join(layouts)}"
    stage.check(layouts == {f"{WIDTH}x{HEIGHT} AR24 stride {4 * BUFFER_WIDTH}"}, text)
    counted = [encoder.get(name) for name in ("transfer", "resource-frames", "pixel-bytes")]
    stage.check(counted == ["resource-id", str(FRAMES), "0"], f"vsockenc: {', '.join(map(str, counted))}")
    counted = [source.get(name) for name in ("memory", "transfer", "copies")]
    stage.check(counted == ["dmabuf", "shared", "0"], f"pipewirezerocopysrc: {', '.join(map(str, counted))}")


def resolved(resolver):
    """The requests that resolving-host has seen so far: an id, and the picture in it."""
    return re.findall(r"^resource (\d+) (.*)$", resolver.output(), re.MULTILINE)


def launch(guest, name, rest, then=""):
    """Plays weston's screen to its FRAMESth picture. Returns what memory the source says that it gives."""
    pipeline = shlex.join(shlex.split(f"gst-launch-1.0 -m {SOURCE} {rest}"))
    said = guest.run(name, f"set -e\n{pipeline}\n{then}", LIMIT + START_LIMIT)
    memory = re.search(r"pipewire-capture, state=\(string\)streaming, memory=\(string\)(\w+)", said)
    return memory and memory[1]


def look(stage, guest, picture, mode, caps, memory, layout):
    """Each picture must be the client's, pixel by pixel, in memory of that stride and that many rows."""
    name = f"pixels-{mode}"
    raw = stage.folder / f"{name}.raw"
    # Not to the share: 9p cannot write from virtio-gpu's memory (EFAULT).
    sink = f"output-mode={mode} ! capsfilter caps={shlex.quote(caps)} ! filesink location=/tmp/{raw.name}"
    said = launch(guest, name, sink, f"mv /tmp/{raw.name} /share/{stage.name}/")
    stage.check(said == memory, f"memory: {said}")
    stride, rows = layout
    data = numpy.fromfile(raw, numpy.uint8)
    stage.check(len(data) == FRAMES * stride * rows, f"{len(data)} bytes, {FRAMES} buffers of {stride}x{rows}")
    if len(data) != FRAMES * stride * rows:
        return
    frames = data.reshape(FRAMES, rows, stride // 4, 4)[:, :HEIGHT, :WIDTH, :3]
    # The number of the picture that each shows, if any.
    shifts = range(WIDTH // pattern.SPEED)
    numbers = [
        next((n for n in shifts if (frame == numpy.roll(picture, -n * pattern.SPEED, axis=1)).all()), None)
        for frame in frames
    ]
    good = None not in numbers and len(set(numbers)) > 1
    stage.check(good, f"pictures of the client, in all pixels: {numbers}")


def draw():
    """The client's first picture: blue, green and red of each pixel."""
    description = pattern.description(WIDTH, HEIGHT, FPS, live=False)
    description = description.replace("videotestsrc", "videotestsrc num-buffers=1", 1)
    pipeline = Gst.parse_launch(f"{description} ! appsink name=sink sync=false")
    pipeline.set_state(Gst.State.PLAYING)
    sample = pipeline.get_by_name("sink").try_pull_sample(LIMIT * Gst.SECOND)
    pipeline.set_state(Gst.State.NULL)
    buffer = sample.get_buffer()
    data = numpy.frombuffer(buffer.extract_dup(0, buffer.get_size()), numpy.uint8)
    return data.reshape(HEIGHT, WIDTH, 4)[:, :, :3]


def play_scenes(stage, guest):
    """Each scene of drmcheck says of itself what is right."""
    guest.run("vgem", "modprobe vgem", START_LIMIT)
    with stage.part("plain caps, as before GStreamer 1.24"):
        check_scenes(stage, guest, "plain", "drmcheck capture", SCENES)
    if (stage.system.source / NEWER / "drmcheck").exists():
        with stage.part("DMA_DRM caps"):
            command = f"GST_PLUGIN_PATH=/src/{NEWER} GST_REGISTRY=/tmp/registry /src/{NEWER}/drmcheck capture"
            command += f" {' '.join(sorted(NEWER_SCENES))}"
            check_scenes(stage, guest, "dma-drm", command, NEWER_SCENES)
    else:
        stage.say(f"not run: DMA_DRM caps, which ci/debian13 builds in {NEWER}")


def check_scenes(stage, guest, name, command, scenes):
    """Runs the program, which must have played these and no others."""
    said = guest.run(f"scenes-{name}", command, 4 * LIMIT)
    results = dict(re.findall(r"^capture ([\w-]+): (.*)$", said, re.MULTILINE))
    stage.check(set(results) == scenes, f"{name}: {len(results)} scenes")
    for scene, result in results.items():
        stage.check(result == "right", f"{name}: {scene}: {result}")
