# SPDX-License-Identifier: MIT OR Apache-2.0
"""The whole product: a desktop in the guest, seen as decoded pictures on its host.

weston composes on the guest's virtio-gpu, and a client on it shows the known moving picture. helix-host
takes the screen from a stock QEMU and encodes it. Two clients subscribe: one switches the screen on and
holds it, the other records what it gets for SECONDS, and decodes it meanwhile. Nothing in the guest knows of
any of this.
"""

import json
import os
import pathlib
import subprocess
import sys

import gi
import numpy

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

import record  # noqa: E402
import verify  # noqa: E402
from display import Display  # noqa: E402
from programs import Fault  # noqa: E402

# Of the guest's screen: as much as a compositor on an emulated processor draws at that rate.
WIDTH, HEIGHT, FPS = 640, 480, 15
SECONDS = 20
# Of FPS. An emulated processor has other things to do at times.
MIN_SHARE = 0.3
# Frames for each picture that is another one. weston and the kernel have QEMU tell each three times.
MAX_REPEATS = 1.1
# In dB, as in tests/demo.py: the frame before or after the right one has 26 dB.
MIN_PSNR = 30

START_LIMIT = 90
# For a job of the guest that goes on until the end.
FOR_EVER = 600

# No seat daemon, no udev and no keyboard: root opens the devices itself.
WESTON = (
    "LIBSEAT_BACKEND=noop exec weston --backend=drm --renderer=pixman --shell=kiosk"
    " --socket=wayland-1 --continue-without-input --idle-time=0"
)
CLIENT = f"WAYLAND_DISPLAY=wayland-1 exec /usr/bin/python3 -u /src/tests/pattern_client.py {WIDTH} {HEIGHT} {FPS}"


def run(stage):
    Gst.init(None)
    known = verify.Pattern(WIDTH, HEIGHT)
    display = Display(stage)
    socket = stage.sockets / "helix"
    address = display.arguments[1].removeprefix("dbus,addr=")
    argv = [stage.built("helix-host"), "--listen", f"unix:{socket}", "--qemu", f"dbus:{address}"]
    host = stage.program("helix-host", argv)
    host.wait_for("listening on", START_LIMIT)
    gpu = ["-device", "virtio-gpu-pci", *display.arguments]
    with stage.guest("guest", "6.12", gpu) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", "modprobe virtio-gpu", START_LIMIT)
        host.wait_for("connected to QEMU", START_LIMIT)
        environment = {
            **os.environ,
            "GST_PLUGIN_PATH": str(stage.built("gstreamer-1.0")),
            "GST_REGISTRY": str(stage.folder / "registry.bin"),
        }
        source = f"scanoutsrc socket-path={socket} scanout-id=0"
        size = f"width={WIDTH} height={HEIGHT}"
        argv = ["gst-launch-1.0", *f"{source} enable=true {size} ! fakesink".split()]
        holder = stage.program("holder", argv, env=environment)
        # weston looks for outputs when it starts.
        guest.run("output", f"drmcheck output Virtual-1 {WIDTH} {HEIGHT}", START_LIMIT)
        guest.start("weston", WESTON, FOR_EVER).wait_for("Output 'Virtual-1' enabled", START_LIMIT)
        guest.start("client", CLIENT, FOR_EVER).wait_for("shown", START_LIMIT)
        stage.say(f"weston shows the moving picture; recording {SECONDS} s")
        decode = "tee name=screen ! queue ! h264parse ! avdec_h264 ! identity name=decoded ! fakesink sync=false"
        result = play(stage, f"{source} name=out ! {decode} screen. ! queue", environment)
        stage.check(holder.alive(), "who switched the screen on still watches")
    check(stage, result, known)


def play(stage, pipeline, environment):
    """Records the pipeline; returns what tests/record.py says."""
    job = {
        "pipeline": pipeline,
        "seconds": SECONDS,
        "stem": str(stage.folder / "screen"),
        "first_frame_timeout": START_LIMIT,
    }
    limit = SECONDS + START_LIMIT + record.EOS_TIMEOUT + START_LIMIT
    with open(stage.folder / "record.log", "wb") as log:
        try:
            done = subprocess.run(
                [sys.executable, pathlib.Path(record.__file__)],
                input=json.dumps(job).encode(),
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as error:
            raise Fault(f"the recorder was still running after {limit} s") from error
    try:
        result = json.loads(done.stdout)
    except ValueError as error:
        raise Fault(f"the recorder ended with {done.returncode} and said nothing") from error
    if "error" in result:
        raise Fault(f"recording: {result['error']}")
    return result


def check(stage, result, known):
    """What came: how many pictures, how soon, and which."""
    frames, decoded = result["frames"], result["decoded"]
    try:
        film = verify.examine(
            stage.folder / "screen.mp4", known, stage.folder / "screen.png", len(frames)
        )
    except verify.VerifyError as error:
        raise Fault(str(error)) from error
    seconds = (frames[-1][0] - frames[0][0]) / 1e9
    rates = [count / seconds for count in (len(frames), film.distinct)]
    stage.say(f"    {rates[0]:.1f} frames a second, {rates[1]:.1f} of them with something new")
    for what, times in ("received", frames), ("decoded", decoded):
        p50, p99 = numpy.percentile([latency / 1e6 for _, latency in times], (50, 99))
        stage.say(f"    from QEMU's message to {what}: {p50:.1f} ms p50, {p99:.1f} ms p99")
    stage.check(len(decoded) == len(frames), f"{len(decoded)} of {len(frames)} frames were decoded live")
    stage.check(film.frames == len(frames), f"{film.frames} of {len(frames)} pictures are in the film")
    least = int(MIN_SHARE * FPS * SECONDS)
    stage.check(film.distinct >= least, f"{film.distinct} different pictures, at least {least}")
    repeats = len(frames) / max(film.distinct, 1)
    stage.check(repeats <= MAX_REPEATS, f"{repeats:.2f} frames for each of them, {MAX_REPEATS} at most")
    worst = min(film.psnr, default=0)
    stage.check(worst >= MIN_PSNR, f"PSNR of all pictures is {worst:.1f} dB or more")
    stage.check(film.went_back == 0, "in the order in which they were drawn")
    stage.check(film.monotonic, "timestamps go forward")
