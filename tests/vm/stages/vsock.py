# SPDX-License-Identifier: MIT OR Apache-2.0
"""AF_VSOCK for real: inside the guest, and from the guest to its host.

Each time the same four things: pictures encoded by helix-host and its screen watched, both decoded and
compared with what went in; helix-host killed and started again in mid-stream; nobody there at all.
The films are recorded in the guest and examined on the host, which is much faster at it.
"""

import re

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

import pattern  # noqa: E402
import verify  # noqa: E402
from programs import Fault  # noqa: E402

# Small enough for an encoder on an emulated processor.
WIDTH, HEIGHT, FPS = 320, 240, 30
SHAPE = f"{WIDTH}x{HEIGHT}"
FRAMES = 300
PUSHED_FRAMES = 90
# In mid-stream: so much of the film is there that some seconds of it are.
FIRST_BYTES = 100_000
# In dB, as in tests/demo.py: the frame before or after the right one has 26 dB.
MIN_PSNR = 30

# AF_VSOCK (vsock(7)): the machine itself, the machine that runs this one, and any number for us.
CID_LOCAL, CID_HOST, CID_GUEST = 1, 2, 42
PORT, CLOSED_PORT = 5000, 5999

START_LIMIT = 30
RECORD_LIMIT = 90
# The element's own limit, and what it may take all in all, in a guest where gst-launch needs seconds to start.
CONNECT_LIMIT = 4
REFUSED_LIMIT = 15

SCREEN = f"1={pattern.description(WIDTH, HEIGHT, FPS)}"


def run(stage):
    Gst.init(None)
    known = verify.Pattern(WIDTH, HEIGHT)
    with stage.guest("loopback", "6.12") as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", "modprobe vsock_loopback", 10)

        def host_in_guest(name):
            job = guest.start(name, f"exec helix-host --listen vsock:{PORT} --scanout '{SCREEN}'", 300)
            job.wait_for(f"listening on vsock:{PORT}", START_LIMIT)
            return job

        examine(stage, known, guest, CID_LOCAL, host_in_guest)

    device = stage.sockets / "device"
    carried = stage.sockets / "vsock"
    backend = stage.program(
        "vhost-device-vsock",
        ["vhost-device-vsock", "--vm", f"guest-cid={CID_GUEST},socket={device},uds-path={carried}"],
    )
    backend.wait_for_path(device, START_LIMIT)
    # 6.12 sends packets of 64 KiB, of which vhost-device-vsock 0.3 takes 32 KiB and then waits for ever.
    vhost = ["-chardev", f"socket,id=vsock,path={device}", "-device", "vhost-user-vsock-pci,chardev=vsock"]
    with stage.guest("to-host", "6.1", vhost) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules-6-1", "modprobe vmw_vsock_virtio_transport", 10)

        def host_outside(name):
            # What a guest sends to port P of CID 2 arrives at the unix socket PATH_P.
            unix = f"unix:{carried}_{PORT}"
            argv = [stage.built("helix-host"), "--listen", unix, "--scanout", SCREEN]
            program = stage.program(name, argv)
            program.wait_for(f"listening on {unix}", START_LIMIT)
            return program

        examine(stage, known, guest, CID_HOST, host_outside)


def examine(stage, known, guest, cid, start_host):
    """The four things, with a host that `start_host(NAME)` starts and the guest reaches at `cid`."""
    where = {CID_LOCAL: "loopback", CID_HOST: "to-host"}[cid]
    host = start_host(f"host-{where}")
    with stage.part(f"{where}: vsockenc, {FRAMES} frames of {SHAPE}"):
        source = pattern.description(WIDTH, HEIGHT, FPS, live=False)
        source = source.replace("videotestsrc", f"videotestsrc num-buffers={FRAMES}")
        film = record(stage, guest, f"encode-{where}", f"{source} ! vsockenc cid={cid} port={PORT}")
        film = compare(stage, known, film, FRAMES)
        stage.check(film.distinct == FRAMES, f"{film.distinct} different pictures of {FRAMES}")
        stage.check(film.went_back == 0, "in the order in which they were drawn")

    with stage.part(f"{where}: scanoutsrc, {PUSHED_FRAMES} frames"):
        source = f"scanoutsrc cid={cid} port={PORT} scanout-id=1 num-buffers={PUSHED_FRAMES}"
        film = record(stage, guest, f"scanout-{where}", source)
        film = compare(stage, known, film, PUSHED_FRAMES)
        stage.check(film.distinct == PUSHED_FRAMES, f"{film.distinct} different pictures")

    with stage.part(f"{where}: helix-host killed and started again in mid-stream"):
        restart(stage, known, guest, cid, where, host, start_host)

    with stage.part(f"{where}: a port that nobody listens on"):
        refuse(stage, guest, cid, where)


def restart(stage, known, guest, cid, where, host, start_host):
    """Kills the host while a live stream is on; the element must find the new one and go on."""
    name = f"restart-{where}"
    source = pattern.description(WIDTH, HEIGHT, FPS).replace("videotestsrc", "videotestsrc name=source")
    film, job = start_recording(stage, guest, name, f"{source} ! vsockenc cid={cid} port={PORT}")
    wait_for_size(film, FIRST_BYTES, job)
    host.kill()
    before = film.stat().st_size
    job.wait_for("state=(string)reconnecting", START_LIMIT)
    start_host(f"host-again-{where}")
    # As large again as before: pictures of the new host are in it.
    wait_for_size(film, before + FIRST_BYTES, job)
    job.signal("INT")
    stage.check(job.wait() == 0, f"the pipeline went on to its end ({states(job)})")
    stage.check(job.output().count("state=(string)connected") == 2, "it was connected twice")
    check_pictures(stage, examine_film(film, known))


def refuse(stage, guest, cid, where):
    """Nobody listens: an error that says so, in time."""
    job = guest.start(
        f"refused-{where}",
        f"gst-launch-1.0 videotestsrc num-buffers=1 ! vsockenc cid={cid} port={CLOSED_PORT}"
        f" timeout={CONNECT_LIMIT * 1000} reconnect-timeout=0 ! fakesink",
        REFUSED_LIMIT,
    )
    status = job.wait()
    error = re.search(r"ERROR: .*|.*vsock:\d+:\d+.*", job.output())
    stage.check(status not in (0, 124), f"it ended within {REFUSED_LIMIT} s, with {status}")
    named = f"vsock:{cid}:{CLOSED_PORT}" in job.output()
    stage.check(named, f"it says what it tried: {error[0] if error else 'nothing'}")


def start_recording(stage, guest, name, source):
    """Starts a job that records `source`. Returns the film's path and the job."""
    # -e and SIGINT end the film; -m says how it stands with the host.
    job = guest.start(
        name,
        f"exec gst-launch-1.0 -m -e {source} ! h264parse ! mp4mux ! filesink buffer-mode=unbuffered"
        f" location=/share/{stage.name}/{name}.mp4",
        RECORD_LIMIT,
    )
    return stage.folder / f"{name}.mp4", job


def record(stage, guest, name, source):
    """Records `source` to its end. Returns the film's path."""
    film, job = start_recording(stage, guest, name, source)
    status = job.wait()
    if status != 0:
        raise Fault(f"{name} ended with {status}")
    return film


def wait_for_size(path, size, job):
    """Returns when the film has `size` bytes."""
    job.wait_until(lambda: path.exists() and path.stat().st_size >= size, START_LIMIT, f"{size} bytes of film")


def compare(stage, known, path, frames):
    """Decodes a film and checks what all films must be."""
    film = examine_film(path, known)
    stage.check(film.frames == frames, f"{film.frames} of {frames} frames decoded")
    check_pictures(stage, film)
    return film


def examine_film(path, known):
    """Decodes a film."""
    try:
        return verify.examine(path, known)
    except verify.VerifyError as error:
        raise Fault(str(error)) from error


def check_pictures(stage, film):
    worst = min(film.psnr, default=0)
    stage.check(worst >= MIN_PSNR, f"PSNR of all {film.frames} pictures is {worst:.1f} dB or more")
    stage.check(film.monotonic, "timestamps go forward")


def states(job):
    """The states of the connection in the order in which the element told them."""
    return ", ".join(re.findall(r"state=\(string\)(\w+)", job.output()))
