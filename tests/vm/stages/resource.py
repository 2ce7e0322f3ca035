# SPDX-License-Identifier: MIT OR Apache-2.0
"""DMA-BUFs through vsockenc: as the ids of virtio-gpu's resources, and as pixels where they are none.

`drmcheck send` draws the known picture into three buffers of one kind, used in turn. The ids that reach
the host must be those in QEMU's trace. A stock QEMU lets nobody resolve its ids, so hosts stand in that
do as if: tests/peers/host.py notes or refuses them, helix-host's example resolving-host makes a picture
of nothing but the id. Where pixels go, the film that comes back is compared with the picture.
"""

import json
import re
import shlex

import gi
import numpy

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

import pattern  # noqa: E402
import verify  # noqa: E402
from programs import Fault, contains, wait_until  # noqa: E402
from stages.drm import TRACED  # noqa: E402

WIDTH, HEIGHT, FPS = 320, 240, 30
FRAMES = 20
BUFFERS = 3
CYCLES = 200
# As drmcheck's: no other resource has this width.
CYCLE_WIDTH = 48
# In dB, as in tests/demo.py.
MIN_PSNR = 30
# Of 255; coded colours are rounded twice.
MAX_COLOUR_ERROR = 6
HOST = "/run/user/host.sock"
LIMIT = 60
# Ten seconds on an idle machine.
CYCLES_LIMIT = 240
# Of virtio-gpu, which comes second; the first ones are vgem's.
NODE_OF = {"created": "renderD129", "dumb": "card1"}
VGEM_NODE = "renderD128"
UNREF = "virtio_gpu_cmd_res_unref"


def run(stage):
    Gst.init(None)
    known = verify.Pattern(WIDTH, HEIGHT)
    trace = stage.folder / "qemu.trace"
    gpu = ["-device", "virtio-gpu-pci", "-trace", "virtio_gpu_cmd_res_create_2d", "-trace", UNREF, "-D", trace]
    with stage.guest("guest", "6.12", gpu) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        # vgem first: whoever takes the first node, whatever its driver, has the wrong one.
        modules = f"modprobe vgem && modprobe virtio-gpu && readlink -e /sys/class/drm/{VGEM_NODE}/device"
        said = guest.run("modules", modules, 10)
        stage.check(said.rstrip().endswith("/vgem"), f"{VGEM_NODE} is vgem's")
        host = start_host(guest, "notes", "--resources wrong")
        for memory in ("dumb", "created"):
            with stage.part(f"{memory} buffers, as resource ids"):
                send_ids(stage, guest, host, trace, memory, f"ids-{memory}", "")
        for memory, node in NODE_OF.items():
            with stage.part(f"only {node} is there"):
                send_ids(stage, guest, host, trace, memory, f"only-{node.lower()}", only(node))
        with stage.part("only a node of another driver is there"):
            send_to_wrong_node(stage, guest)
        stop(host)
        with stage.part(f"{CYCLES} starts and stops"):
            # Every second request of a client gets no reply: it is open when the element stops.
            host = start_host(guest, "answers-one", "--resources wrong --drop-reply 2")
            start_and_stop(stage, guest, trace)
            stop(host)
        # It takes ids from here on, so pixels go for no other reason than that there is none.
        resolver = start_resolver(guest)
        with stage.part("resolved by a helix-host"):
            send_to_resolver(stage, guest, resolver)
        with stage.part("no node at all"):
            send_without_node(stage, guest, known)
        with stage.part("memory that is not virtio-gpu's, to a helix-host that resolves ids"):
            for memory in ("vgem", "udmabuf", "heap"):
                send_pixels(stage, guest, known, memory, f"pixels-{memory}", "")
        stop(resolver)
        with stage.part("a host that announces ids and refuses them"):
            host = start_host(guest, "refuses", "--hello --capabilities 9 --resources error")
            send_refused(stage, guest, known)
            send_refused_strictly(stage, guest)
            stop(host)


def start_host(guest, name, options):
    """tests/peers/host.py in the guest, which says what it sees in JSON lines."""
    script = f"rm -f {HOST}; exec /usr/bin/python3 /src/tests/peers/host.py --listen unix:{HOST} {options}"
    job = guest.start(name, script, 300)
    job.wait_for('"listening"', LIMIT)
    return job


def start_resolver(guest):
    """helix-host's example, which announces that it resolves ids, and makes a picture of nothing but one."""
    # It ends with its standard input.
    script = f"rm -f {HOST}; sleep 600 | /src/target/debug/examples/resolving-host unix:{HOST}"
    job = guest.start("resolver", script, 600)
    job.wait_for("listening on", LIMIT)
    return job


def stop(host):
    """Ends a host. It removes its socket at the end, which must not be the next one's."""
    host.signal("TERM")
    host.wait()


def only(node):
    """A shell command's beginning: /dev/dri has that node and no other for what follows."""
    return (
        f"set -e; numbers=$(stat -c '0x%t 0x%T' /dev/dri/{node}); mount -t tmpfs nodes /dev/dri;"
        f" mknod /dev/dri/{node} c $numbers; "
    )


def start_sending(stage, guest, memory, name, transfer, nodes=""):
    """Starts `drmcheck send` in a mount namespace of its own, where `nodes` has prepared /dev/dri."""
    pictures = pattern.description(WIDTH, HEIGHT, FPS, live=False)
    pictures = pictures.replace("videotestsrc", f"videotestsrc num-buffers={FRAMES}")
    encoder = f"socket-path={HOST} transfer={transfer}"
    command = shlex.join(
        ["drmcheck", "send", memory, "--pictures", pictures, "--encoder", encoder]
        + ["--film", f"/share/{stage.name}/{name}.mp4"]
    )
    return guest.start(name, f"exec unshare --mount bash -c {shlex.quote(f'{nodes}exec {command}')}", LIMIT)


def send(stage, guest, memory, name, transfer, nodes=""):
    """Runs `drmcheck send` to its end. Returns what it said and its statistics."""
    job = start_sending(stage, guest, memory, name, transfer, nodes)
    status = job.wait()
    if status != 0:
        raise Fault(f"{name} ended with {status}")
    return job.output(), statistics(job.output())


def statistics(said):
    """The element's statistics as text by name."""
    line = re.search(r"^stats .*$", said, re.MULTILINE)
    return dict(re.findall(r"([\w-]+)=\(\w+\)([\w-]+)", line[0])) if line else {}


def requests(job):
    """The FRAME_REQUESTs that host.py has noted so far."""
    events = [json.loads(line) for line in job.output().splitlines() if line.startswith("{")]
    return [event for event in events if event.get("message") == "FRAME_REQUEST"]


def send_ids(stage, guest, host, trace, memory, name, nodes):
    """Each picture must arrive as the id of its buffer, which QEMU knows, and no pixel with it."""
    before = len(requests(host))
    said, stats = send(stage, guest, memory, name, "resource-id", nodes)
    made = {int(number) for number in re.findall(r"^resource (\d+) ", said, re.MULTILINE)}
    traced = {
        int(number, 16)
        for number, width, height in TRACED.findall(trace.read_text())
        if int(width) == WIDTH and int(height) >= HEIGHT
    }
    seen = requests(host)[before:]
    ids = [request["resource_id"] for request in seen]
    stage.check(len(made) == BUFFERS and made <= traced, f"{memory}: resources {sorted(made)} are in QEMU's trace")
    stage.check(len(ids) == FRAMES and set(ids) == made, f"{len(ids)} requests, of resources {sorted(set(ids))}")
    stage.check(not any("pixels" in request for request in seen), "no request has pixels")
    sizes = {(request["width"], request["height"], request["stride"]) for request in seen}
    stage.check(sizes == {(WIDTH, HEIGHT, 4 * WIDTH)}, f"each of {WIDTH}x{HEIGHT}, whatever its buffer has")
    counted = (stats.get("resource-frames"), stats.get("pixel-bytes"), stats.get("transfer"))
    stage.check(counted == (str(FRAMES), "0", "resource-id"), f"statistics: {', '.join(map(str, counted))}")
    stage.check("transfer resource-id: " in said, "a message says so")
    check_ends(stage, trace, made, int(re.search(r"^marker (\d+)$", said, re.MULTILINE)[1]))


def check_ends(stage, trace, made, marker):
    """Resources must end with their buffers, before `marker` is made and the element stops: it holds none."""
    begin = f"virtio_gpu_cmd_res_create_2d res 0x{marker:x},"
    wait_until(lambda: contains(trace, begin), LIMIT, lambda: True, "QEMU", f"made resource {marker}")
    before = trace.read_text().split(begin)[0]
    ended = {int(number, 16) for number in re.findall(rf"{UNREF} res 0x([0-9a-f]+)", before)}
    stage.check(made <= ended, f"resources {sorted(made & ended)} ended with their buffers")


def start_and_stop(stage, guest, trace):
    """Each cycle has a buffer of its own: nothing of it may stay, in the process or at the host."""
    begin = trace.stat().st_size
    encoder = shlex.quote(f"socket-path={HOST} transfer=resource-id timeout=0")
    said = guest.run("cycles", f"drmcheck cycles created --count {CYCLES} --encoder {encoder}", CYCLES_LIMIT)
    stage.check(said.rstrip().endswith("flat"), "descriptors, threads and memory are flat")
    marker = int(re.search(r"^marker (\d+)$", said, re.MULTILINE)[1])
    made, left = 0, set()
    for created, width, unref in re.findall(
        rf"res_create_2d res 0x([0-9a-f]+),.* w (\d+),|{UNREF} res 0x([0-9a-f]+)", trace.read_text()[begin:]
    ):
        if created and int(created, 16) == marker:
            break
        if created and int(width) == CYCLE_WIDTH:
            made += 1
            left.add(created)
        left.discard(unref)
    stage.check(made > CYCLES and not left, f"of {made} resources {len(left)} are left at the end")


def send_to_resolver(stage, guest, resolver):
    """With `auto`, a host that announces that it resolves ids gets them, and its pictures come back."""
    said, stats = send(stage, guest, "created", "resolved", "auto")
    made = {int(number) for number in re.findall(r"^resource (\d+) ", said, re.MULTILINE)}
    ids = [int(number) for number in re.findall(r"^resource (\d+) ", resolver.output(), re.MULTILINE)]
    stage.check(len(ids) == FRAMES and set(ids) == made, f"{len(ids)} resolved, of resources {sorted(set(ids))}")
    film = verify.decoded(stage.folder / "resolved.mp4", "video/x-raw,format=BGRx")
    # Blue, green and red of the whole picture, as resolving-host paints an id.
    colours = [numpy.frombuffer(data, numpy.uint8).reshape(-1, 4)[:, :3].mean(axis=0) for _, data, *_ in film]
    painted = [[64 + 16 * (number >> shift & 7) for shift in (6, 3, 0)] for number in ids]
    stage.check(len(colours) == FRAMES, f"{len(colours)} of {FRAMES} frames decoded")
    worst = max(abs(numpy.subtract(seen, wanted)).max() for seen, wanted in zip(colours, painted))
    stage.check(worst <= MAX_COLOUR_ERROR, f"each the picture of its resource, at most {worst:.1f} of 255 off")
    counted = (stats.get("resource-frames"), stats.get("pixel-bytes"))
    stage.check(counted == (str(FRAMES), "0"), f"statistics: {', '.join(map(str, counted))}")


def send_refused(stage, guest, known):
    """Each picture that was refused as a resource must come as pixels, and none be lost."""
    said, stats = send(stage, guest, "dumb", "refused", "auto")
    check_film(stage, known, "refused")
    counted = (stats.get("transfer"), stats.get("dropped"))
    stage.check(counted == ("pixels", "0"), f"statistics: transfer {counted[0]}, dropped {counted[1]}")
    reason = re.search(r"^transfer pixels: (.+)$", said, re.MULTILINE)
    stage.check(reason is not None, reason[1] if reason else "no message says why")


def send_refused_strictly(stage, guest):
    """Where pixels are not allowed, a host that refuses is an error, which ends what was begun."""
    job = start_sending(stage, guest, "dumb", "refused-strict", "resource-id")
    stage.check(job.wait() == 1, "transfer=resource-id ends with an error")
    error = re.search(r"transfer=resource-id: the host refuses resource[^\"]*", job.output())
    stage.check(error is not None, error[0] if error else "it does not say that the host refuses")


def check_film(stage, known, name):
    """A film must show the known picture, all of it and in order."""
    film = verify.examine(stage.folder / f"{name}.mp4", known)
    worst = min(film.psnr, default=0)
    stage.check(film.frames == FRAMES, f"{name}: {film.frames} of {FRAMES} frames decoded")
    stage.check(film.distinct == FRAMES and film.went_back == 0, f"{film.distinct} different pictures, in order")
    stage.check(worst >= MIN_PSNR, f"PSNR {worst:.1f} dB or more")


def send_pixels(stage, guest, known, memory, name, nodes):
    """Pictures in memory that has no id must come back as they were."""
    _, stats = send(stage, guest, memory, name, "auto", nodes)
    check_film(stage, known, name)
    counted = (stats.get("resource-frames"), stats.get("pixel-bytes"), stats.get("transfer"))
    expected = ("0", str(FRAMES * WIDTH * HEIGHT * 4), "pixels")
    stage.check(counted == expected, f"statistics: {', '.join(map(str, counted))}")


def send_without_node(stage, guest, known):
    """Nobody to ask for ids: pixels, or an error where they were not allowed."""
    nobody = "set -e; mount -t tmpfs nodes /dev/dri; "
    send_pixels(stage, guest, known, "udmabuf", "no-node", nobody)
    job = start_sending(stage, guest, "udmabuf", "no-node-strict", "resource-id", nobody)
    stage.check(job.wait() == 1, "transfer=resource-id ends with an error")
    error = re.search(r"transfer=resource-id: [^\"]*", job.output())
    stage.check(error is not None and "/dev/dri" in error[0], error[0] if error else "it says nothing")


def send_to_wrong_node(stage, guest):
    """A node is asked for ids only if it is virtio-gpu's: the ioctl's number means something else to others."""
    job = start_sending(stage, guest, "udmabuf", "wrong-node", "resource-id", only(VGEM_NODE))
    stage.check(job.wait() == 1, "transfer=resource-id ends with an error")
    error = re.search(r"transfer=resource-id: [^\"]*", job.output())
    said = error[0] if error else "it says nothing"
    stage.check("its driver is vgem, not virtio_gpu" in said, said)
