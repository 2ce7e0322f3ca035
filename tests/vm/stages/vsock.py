# SPDX-License-Identifier: MIT OR Apache-2.0
"""AF_VSOCK for real: inside the guest, and from the guest to its host.

Each time the same four things: pictures encoded by helix-host and its screen watched, both decoded and
compared with what went in; helix-host killed and started again in mid-stream; nobody there at all.
And inside the guest, where a CID is a real one: who --allow-cid lets in.
The films are recorded in the guest and examined on the host, which is much faster at it.
"""

import itertools
import os
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
# In mid-stream: so many frames of a host are there.
ENOUGH = 30
# What gst-launch prints when the element is connected, and of each frame that passes identity.
CONNECTED = "state=(string)connected"
FRAME = "last-message = chain "
# In dB, as in tests/demo.py: the frame before or after the right one has 26 dB.
MIN_PSNR = 30

# AF_VSOCK (vsock(7)): the machine itself, the machine that runs this one, and any number for us.
CID_LOCAL, CID_HOST, CID_GUEST = 1, 2, 42
PORT, CLOSED_PORT = 5000, 5999
# Of a client that is not there, and the ports of hosts that let in one or the other.
CID_STRANGER = 7
ALLOWING = {CID_LOCAL: 5001, CID_STRANGER: 5002}

START_LIMIT = 90
RECORD_LIMIT = 180
# The elements' own limit, in seconds: more and less than the 2 s after which the guest's kernel gives up
# a connection that the host does not answer (VSOCK_DEFAULT_CONNECT_TIMEOUT in linux/net/vmw_vsock).
LONG_LIMIT, SHORT_LIMIT = 4, 1
# What an emulated processor may need on top of it, and all in all with the program's start.
SLACK = 3
REFUSED_LIMIT = 60

SCREEN = f"1={pattern.description(WIDTH, HEIGHT, FPS)}"


def run(stage):
    Gst.init(None)
    known = verify.Pattern(WIDTH, HEIGHT)
    with stage.guest("loopback", "6.12") as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", "modprobe vsock_loopback", 10)

        def host_in_guest(name, port=PORT, options=f"--scanout '{SCREEN}'"):
            job = guest.start(name, f"exec helix-host --listen vsock:{port} {options}", 300)
            job.wait_for(f"listening on vsock:{port}", START_LIMIT)
            return job

        examine(stage, known, guest, CID_LOCAL, host_in_guest)
        with stage.part("loopback: --allow-cid"):
            allow(stage, guest, host_in_guest)

    device = stage.sockets / "device"
    carried = stage.sockets / "vsock"
    backend = stage.program(
        "vhost-device-vsock",
        ["vhost-device-vsock", "--vm", f"guest-cid={CID_GUEST},socket={device},uds-path={carried}"],
    )
    backend.wait_for_path(device, START_LIMIT)
    # 6.12 sends packets of 64 KiB, of which vhost-device-vsock 0.3 takes 32 KiB and loses the rest:
    # VSOCK_KERNEL=6.12 ci/vm vsock shows it.
    kernel = os.environ.get("VSOCK_KERNEL", "6.1")
    vhost = ["-chardev", f"socket,id=vsock,path={device}", "-device", "vhost-user-vsock-pci,chardev=vsock"]
    with stage.guest("to-host", kernel, vhost) as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules-to-host", "modprobe vmw_vsock_virtio_transport", 10)

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
        check_order(stage, film, FRAMES)

    with stage.part(f"{where}: scanoutsrc, {PUSHED_FRAMES} frames"):
        source = f"scanoutsrc cid={cid} port={PORT} scanout-id=1 num-buffers={PUSHED_FRAMES}"
        film = record(stage, guest, f"scanout-{where}", source)
        film = compare(stage, known, film, PUSHED_FRAMES)
        check_order(stage, film, PUSHED_FRAMES)

    with stage.part(f"{where}: helix-host killed and started again in mid-stream"):
        restart(stage, known, guest, cid, where, host, start_host)

    with stage.part(f"{where}: a port that nobody listens on"):
        refuse(stage, guest, cid, where)


# What an element says about a port that nobody listens on: the kernel's own word, and the element's.
REFUSED = {CID_LOCAL: "Connection reset by peer", CID_HOST: "Connection timed out"}
TOO_LATE = "no answer in time"


def restart(stage, known, guest, cid, where, host, start_host):
    """Kills the host while a live stream is on; the element must find the new one and go on."""
    name = f"restart-{where}"
    source = pattern.description(WIDTH, HEIGHT, FPS).replace("videotestsrc", "videotestsrc name=source")
    # -v prints what identity says of each frame between what the element says of its connection.
    source = f"-v {source} ! vsockenc cid={cid} port={PORT} ! identity silent=false"
    film, job = start_recording(stage, guest, name, source)
    job.wait_until(lambda: frames_of_each_host(job)[0] >= ENOUGH, START_LIMIT, f"{ENOUGH} frames")
    host.kill()
    job.wait_for("state=(string)reconnecting", START_LIMIT)
    start_host(f"host-again-{where}")
    job.wait_until(
        lambda: frames_of_each_host(job)[-1] >= ENOUGH and connections(job) == 2,
        START_LIMIT,
        f"{ENOUGH} frames of the new host",
    )
    job.signal("INT")
    stage.check(job.wait() == 0, f"the pipeline went on to its end ({states(job)})")
    stage.check(connections(job) == 2, "it was connected twice")
    before, *_, after = frames_of_each_host(job)
    stage.check(
        before >= ENOUGH and after >= ENOUGH,
        f"{before} frames before the host was killed, {after} from the next one",
    )
    times = timestamps(job)
    back = sum(later < earlier for earlier, later in itertools.pairwise(times))
    stage.check(
        len(times) >= 2 * ENOUGH and back == 0, f"{back} of {len(times)} timestamps were before the last one's"
    )
    pictures = examine_film(film, known)
    stage.check(pictures.frames == before + after, f"{pictures.frames} of {before + after} frames decoded")
    check_pictures(stage, pictures)


def connections(job):
    """How often the element has been connected."""
    return job.output().count(CONNECTED)


def frames_of_each_host(job):
    """How many frames have come before the connection was first lost, and since it was there again."""
    before, *after = job.output().split(CONNECTED, 2)[1:] or [""]
    return [part.count(FRAME) for part in (before, *after)]


def timestamps(job):
    """Those of all frames (ns), in their order."""
    found = re.findall(FRAME + r".*? pts: (\d+):(\d+):(\d+)\.(\d{9})", job.output())
    return [
        ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 10**9 + int(rest)
        for hours, minutes, seconds, rest in found
    ]


def refuse(stage, guest, cid, where):
    """Nobody listens: an error that says so, within the element's limit."""
    picture = f"videotestsrc num-buffers=1 ! vsockenc reconnect-timeout=0 cid={cid}"
    screen = f"scanoutsrc scanout-id=1 reconnect-timeout=0 cid={cid}"
    runs = [("encode", picture, LONG_LIMIT, REFUSED[cid]), ("scanout", screen, LONG_LIMIT, REFUSED[cid])]
    if cid == CID_HOST:
        runs.append(("encode-soon", picture, SHORT_LIMIT, TOO_LATE))
    # All at once: what takes its time is the start of each program.
    jobs = [
        start_failing(
            guest, f"refused-{kind}-{where}", f"{element} port={CLOSED_PORT} timeout={limit * 1000} ! fakesink"
        )
        for kind, element, limit, _ in runs
    ]
    for job, (kind, _, limit, reason) in zip(jobs, runs):
        expect_error(stage, job, kind, limit, [f"vsock:{cid}:{CLOSED_PORT}", reason, "helix-host"])


def start_failing(guest, name, pipeline):
    """Starts a pipeline that must fail."""
    return guest.start(
        name, f"exec /src/tests/vm/pipeline-error.py {REFUSED_LIMIT - 5} '{pipeline}'", REFUSED_LIMIT
    )


def expect_error(stage, job, kind, limit, named):
    """It must fail within `limit` seconds, with an error that names all of `named`."""
    status = job.wait()
    stage.check(status == 1, f"{kind}: it {job.ending()}, for an error")
    error = re.search(r"^ERROR after ([\d.]+) s: .*$", job.output(), re.MULTILINE)
    if error is None:
        stage.check(False, f"{kind}: no word of an error")
        return
    stage.check(float(error[1]) < limit + SLACK, f"{kind}: {error[1]} s with a limit of {limit} s")
    stage.check(all(part in error[0] for part in named), f"{kind}: {error[0]}")


def allow(stage, guest, start_host):
    """Who calls over the loopback has CID 1, and comes in only where that one is named."""
    hosts = {
        cid: start_host(f"host-allows-{cid}", port, f"--allow-cid {cid}") for cid, port in ALLOWING.items()
    }
    # It would call a host again for longer than the error may take.
    picture = (
        f"videotestsrc num-buffers=1 ! video/x-raw,width={WIDTH},height={HEIGHT}"
        f" ! vsockenc reconnect-timeout={REFUSED_LIMIT * 1000} cid={CID_LOCAL}"
    )
    served = guest.start(
        "allowed", f"exec gst-launch-1.0 {picture} port={ALLOWING[CID_LOCAL]} ! fakesink", REFUSED_LIMIT
    )
    refused = start_failing(guest, "not-allowed", f"{picture} port={ALLOWING[CID_STRANGER]} ! fakesink")
    stage.check(served.wait() == 0, f"--allow-cid {CID_LOCAL}: a picture was encoded")
    expect_error(
        stage,
        refused,
        f"--allow-cid {CID_STRANGER}",
        LONG_LIMIT,
        [f"vsock:{CID_LOCAL}:{ALLOWING[CID_STRANGER]}", "CID may not connect (--allow-cid)"],
    )
    stage.check("not among the CIDs" in hosts[CID_STRANGER].output(), "the host's log has it too")
    for host in hosts.values():
        host.kill()


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
    if job.wait() != 0:
        raise Fault(f"{name} (in the guest) {job.ending()}")
    stage.check(connections(job) == 1, f"it was connected once ({states(job)})")
    return film


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


def check_order(stage, film, frames):
    """No picture twice and none too late. The pattern repeats after WIDTH / SPEED pictures."""
    stage.check(film.distinct == frames, f"{film.distinct} of {frames} differ from the one before")
    stage.check(film.went_back == 0, "in the order in which they were drawn")


def states(job):
    """The states of the connection in the order in which the element told them."""
    return ", ".join(re.findall(r"state=\(string\)(\w+)", job.output()))
