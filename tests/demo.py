#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The whole chain for real, recorded, measured and compared with what went in. Run by ci/demo.

Starts a desktop (see desktop.py) and helix-host on a unix socket, on TCP, with a scanout and with the
screen of a virtual machine (see screen_vm.py), and records each path for ten seconds. Then it decodes
the films and fails when anything is short of the limits below. Nothing here can hang: every wait has a
limit and every part is a process.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import gi
import numpy

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

import pattern  # noqa: E402
import verify  # noqa: E402
from desktop import Child, Desktop, DesktopError  # noqa: E402
from screen_vm import ScreenVm  # noqa: E402

WIDTH, HEIGHT, FPS = 1280, 720, 30
# A frame count in ten seconds is a matter of what else the machine does: one more chance, said aloud.
ATTEMPTS = 2
SECONDS = 10
# In dB. Against the frame before or after the right one the picture has 26 dB, with red and blue
# exchanged 18 dB, moved down by eight lines 13 dB.
MIN_PSNR = 30
# Mean luma and its spread: video black is 16, one flat colour has no spread. An empty desktop may be
# of one colour, so spread is asked of the moving pictures only.
MIN_LUMA = 20
MIN_SPREAD = 5
FIRST_FRAME_TIMEOUT = 20
HOST_START_TIMEOUT = 20
HOST_STOP_TIMEOUT = 5
# What a recorder may take beyond its own limits before it counts as hanging (seconds).
GRACE = 30


class DemoError(Exception):
    """The demo cannot go on."""


@dataclass
class Stage:
    """One path to record: what it shows and what is asked of it."""

    name: str
    title: str
    pipeline: str
    min_frames: int
    # Gives a context manager: what moves while it is recorded, if that is not there all the time.
    mover: Callable = contextlib.nullcontext
    moving: bool = True


@dataclass
class Row:
    """A line of the table, and what was short."""

    stage: Stage
    frames: int = 0
    seconds: float = 0.0
    latency: tuple = ()
    cpu: tuple = ()
    film: verify.Film | None = None
    faults: tuple = ()


class Host:
    """A running helix-host. Scanout 1 shows the known picture, scanout 0 the screen of a virtual machine
    at the QMP socket `qmp`, while there is one."""

    def __init__(self, program, folder, log):
        self.socket = f"{folder}/helix.sock"
        self.qmp = f"{folder}/qmp"
        self.port = free_port()
        self.log = log
        source = pattern.description(WIDTH, HEIGHT, FPS)
        argv = [program, "--listen", f"unix:{self.socket}", "--listen", f"tcp:127.0.0.1:{self.port}"]
        argv += ["--encoder", "auto", "--scanout", f"1={source}", "--qemu", f"qmp:{self.qmp}"]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def wait_ready(self):
        """Returns when both sockets accept. A connection is the only sign that any host gives."""
        deadline = time.monotonic() + HOST_START_TIMEOUT
        for family, address in (
            (socket.AF_UNIX, self.socket),
            (socket.AF_INET, ("127.0.0.1", self.port)),
        ):
            while True:
                with socket.socket(family) as probe:
                    if probe.connect_ex(address) == 0:
                        break
                if self.process.poll() is not None:
                    raise DemoError(f"helix-host ended with {self.process.returncode}{self.tail()}")
                if time.monotonic() > deadline:
                    raise DemoError(f"helix-host does not listen on {address}{self.tail()}")
                time.sleep(0.05)

    def cpu_ms(self):
        """CPU time so far, all threads, in ms (proc(5): utime and stime are fields 14 and 15)."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return ticks * 1000 / os.sysconf("SC_CLK_TCK")

    def tail(self):
        """The end of the log, for error texts."""
        return tail(self.log)

    def stop(self):
        """SIGTERM; says what was wrong with the way it ended, if anything."""
        if self.process.poll() is not None:
            return f"helix-host had ended with {self.process.returncode}{self.tail()}"
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(HOST_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"helix-host did not end within {HOST_STOP_TIMEOUT} s of SIGTERM{self.tail()}"
        return f"helix-host ended with {status} on SIGTERM{self.tail()}" if status else None


def tail(path, lines=12):
    """The last lines of a log, indented, with a line break before them."""
    text = pathlib.Path(path).read_text(errors="replace").splitlines()[-lines:]
    return "".join(f"\n    {pathlib.Path(path).name}: {line}" for line in text)


def free_port():
    """A TCP port on loopback that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def moving_client(desktop):
    """A client of the desktop that shows the known picture."""
    client = desktop.start_client("pattern", FPS)
    try:
        yield
    finally:
        desktop.stop_client(client)


@contextlib.contextmanager
def virtual_machine(host, output):
    """A virtual machine that shows the known picture, and somebody who watches it already.

    QEMU draws only while somebody watches: the very first picture is the one from before that.
    """
    viewer = f"gst-launch-1.0 -v scanoutsrc scanout-id=0 socket-path={host.socket} ! fakesink"
    with ScreenVm(WIDTH, HEIGHT, FPS, host.qmp, output):
        # That of another attempt.
        (output / "screen-viewer.log").unlink(missing_ok=True)
        viewer = Child("screen-viewer", viewer.split(), os.environ, output)
        try:
            deadline = time.monotonic() + FIRST_FRAME_TIMEOUT
            while f"width=(int){WIDTH}" not in viewer.log.read_text(errors="replace"):
                if viewer.process.poll() is not None or time.monotonic() > deadline:
                    raise DemoError(f"no picture of the virtual machine\n{viewer.tail()}")
                time.sleep(0.05)
            yield
        finally:
            viewer.stop()


def stages(desktop, host, output):
    """The paths, in the order in which they are recorded."""
    node = desktop.screencast().node
    client = functools.partial(moving_client, desktop)
    machine = functools.partial(virtual_machine, host, output)
    desktop = f"pipewirezerocopysrc pipewire-node-id={node} keepalive-time=100"
    return [
        Stage(
            "desktop-tcp",
            "moving desktop over TCP",
            f"{desktop} ! vsockenc name=out tcp-host=127.0.0.1 tcp-port={host.port}",
            200,
            client,
        ),
        Stage(
            "desktop-unix",
            "moving desktop over a unix socket",
            f"{desktop} ! vsockenc name=out socket-path={host.socket}",
            200,
            client,
        ),
        Stage(
            "scanout",
            "scanout pushed by the host",
            f"scanoutsrc name=out scanout-id=1 socket-path={host.socket}",
            290,
        ),
        Stage(
            "vm-screen",
            "screen of a virtual machine",
            f"scanoutsrc name=out scanout-id=0 socket-path={host.socket}",
            200,
            machine,
        ),
        Stage(
            "desktop-still",
            "still desktop, keepalive 100 ms",
            f"{desktop} ! vsockenc name=out socket-path={host.socket}",
            90,
            moving=False,
        ),
    ]


def record(stage, host, environment, output):
    """Record one stage in a process of its own. Returns its Row; never hangs, never raises."""
    stem = output / stage.name
    job = {
        "pipeline": stage.pipeline,
        "seconds": SECONDS,
        "stem": str(stem),
        "first_frame_timeout": FIRST_FRAME_TIMEOUT,
    }
    log_path = stem.with_suffix(".log")
    host_before = host.cpu_ms()
    with open(log_path, "wb") as log:
        recorder = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).with_name("record.py"))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        try:
            limit = SECONDS + FIRST_FRAME_TIMEOUT + GRACE
            reply, _ = recorder.communicate(json.dumps(job).encode(), limit)
        except subprocess.TimeoutExpired:
            recorder.kill()
            recorder.communicate()
            return Row(stage, faults=(f"hung for {limit} s and was killed{tail(log_path)}",))
    try:
        result = json.loads(reply)
    except ValueError:
        return Row(stage, faults=(f"recorder ended with {recorder.returncode}{tail(log_path)}",))
    frames = result["frames"]
    row = Row(stage, frames=len(frames))
    if "error" in result:
        row.faults = (f"{result['error']}{tail(log_path)}",)
        return row
    times = numpy.array(frames, dtype=numpy.int64)
    row.seconds = float(times[-1, 0] - times[0, 0]) / 1e9
    row.latency = tuple(numpy.percentile(times[:, 1] / 1e6, (50, 99)))
    row.cpu = (result["cpu_ms"] / len(frames), (host.cpu_ms() - host_before) / len(frames))
    back = int((numpy.diff(times[:, 0]) <= 0).sum())
    if back:
        row.faults += (f"{back} timestamps do not go forward",)
    if row.latency[0] < 0:
        row.faults += (f"latency of {row.latency[0]:.1f} ms: its timestamps are not capture times",)
    return row


def check(row, known, output):
    """Decode what a stage recorded and add what is short to its row."""
    stage, stem = row.stage, output / row.stage.name
    faults = []
    try:
        row.film = film = verify.examine(
            stem.with_suffix(".mp4"),
            known if stage.moving else None,
            stem.with_suffix(".png"),
            row.frames,
        )
    except verify.VerifyError as error:
        row.faults += (str(error),)
        return
    if film.frames != row.frames:
        faults.append(f"{row.frames} access units went in, {film.frames} pictures were decoded")
    if film.frames < stage.min_frames:
        faults.append(f"{film.frames} frames, at least {stage.min_frames} are needed")
    if not film.monotonic:
        faults.append("timestamps in the film go back")
    if film.darkest < MIN_LUMA:
        faults.append(f"a picture is black (mean luma {film.darkest:.0f})")
    if stage.moving:
        if film.flattest < MIN_SPREAD:
            faults.append(f"a picture is of one colour (spread of luma {film.flattest:.1f})")
        if film.psnr and min(film.psnr) < MIN_PSNR:
            short = sum(psnr < MIN_PSNR for psnr in film.psnr)
            faults.append(
                f"PSNR of {short} frames is under {MIN_PSNR} dB (worst {min(film.psnr):.1f} dB)"
            )
        if film.distinct < stage.min_frames:
            faults.append(
                f"{film.distinct} different pictures, at least {stage.min_frames} are needed"
            )
        if film.went_back:
            faults.append(f"an older picture followed a newer one {film.went_back} times")
    row.faults += tuple(faults)


def print_table(rows):
    """Path, frames, rate, latency, CPU time and PSNR of each stage."""
    head = ("path", "frames", "fps", "latency p50", "p99", "CPU/frame", "in host", "PSNR mean", "min")
    units = ("", "", "1/s", "ms", "ms", "ms", "ms", "dB", "dB")
    lines = [head, units]
    for row in rows:
        cells = [row.stage.title, str(row.frames)]
        rate = (row.frames - 1) / row.seconds if row.seconds else 0
        cells.append(f"{rate:.1f}")
        cells += [f"{value:.1f}" for value in row.latency] or ["-", "-"]
        cells += [f"{value:.2f}" for value in row.cpu] or ["-", "-"]
        psnr = row.film.psnr if row.film else []
        cells += [f"{numpy.mean(psnr):.1f}", f"{min(psnr):.1f}"] if psnr else ["-", "-"]
        lines.append(tuple(cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    print()
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        print("  ".join([line[0].ljust(widths[0])] + cells[1:]))


def run(program, output):
    """Record and check everything. Returns the rows and faults that belong to no row."""
    faults = []
    rows = []
    began = time.monotonic()

    def say(text):
        print(f"[{time.monotonic() - began:5.1f} s] {text}", flush=True)

    say("starting PipeWire, WirePlumber and mutter")
    with Desktop(WIDTH, HEIGHT, output / "desktop-logs") as desktop:
        say("starting helix-host")
        host = Host(program, desktop.runtime_dir, output / "helix-host.log")
        try:
            host.wait_ready()
            environment = desktop.environment() | {"GST_DEBUG_NO_COLOR": "1"}
            environment.setdefault("GST_DEBUG", "2")
            known = verify.Pattern(WIDTH, HEIGHT)
            for stage in stages(desktop, host, output):
                for attempt in range(1, ATTEMPTS + 1):
                    say(f"recording {SECONDS} s: {stage.title}")
                    say(f"    {stage.pipeline}")
                    with stage.mover():
                        row = record(stage, host, environment, output)
                    if not row.faults:
                        say("    decoding and comparing")
                        check(row, known, output)
                    for fault in row.faults:
                        say(f"    FAILED: {fault}")
                    if not row.faults or host.process.poll() is not None or attempt == ATTEMPTS:
                        break
                    say("    once more, in case this machine was busy with something else")
                rows.append(row)
                if host.process.poll() is not None:
                    break
        finally:
            fault = host.stop()
            if fault:
                faults.append(fault)
    return rows, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--helix-host", required=True, help="the program")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the films")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for old in options.output.glob("*.*"):
        old.unlink()
    Gst.init(None)
    rows, faults = [], []
    try:
        rows, faults = run(options.helix_host, options.output)
    except (DesktopError, DemoError, verify.VerifyError) as error:
        faults = [str(error)]
    print_table(rows)
    faults += [f"{row.stage.title}: {fault}" for row in rows for fault in row.faults]
    print(f"\nFilms, contact sheets and logs: {options.output}/")
    if faults:
        print("\nFAILED:")
        for fault in faults:
            print(f"  - {fault}")
        sys.exit(1)
    print("Everything reached its limit.")


if __name__ == "__main__":
    main()
