# SPDX-License-Identifier: MIT OR Apache-2.0
"""Programs on the host that a stage needs beside the guest: helix-host, a device's back end, D-Bus."""

import ctypes
import pathlib
import signal
import subprocess
import time

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# How often a log that nobody announces changes of is looked at, in seconds.
LOOK_EVERY = 0.05
# From SIGTERM to SIGKILL, in seconds.
STOP_LIMIT = 5


class Fault(Exception):
    """What went wrong, for a person: what was tried, on what, and what came of it."""


def wait_until(condition, limit, alive, who, what):
    """Returns when `condition()`; it is a Fault of `who` when it is not in time, or not `alive()`."""
    deadline = time.monotonic() + limit
    while True:
        # In this order: what was done just before the end counts.
        running = alive()
        if condition():
            return
        if not running:
            raise Fault(f"{who} ended before {what}")
        if time.monotonic() > deadline:
            raise Fault(f"{who}: not within {limit} s: {what}")
        time.sleep(LOOK_EVERY)


def contains(path, text):
    """Whether `text` is in the file, if there is one."""
    return path.exists() and text in path.read_text(errors="replace")


def _die_with_parent():
    """In the child: be killed when the rig dies, even by SIGKILL."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Program:
    """A process of the host, with its log. As a context manager it is stopped at the end."""

    def __init__(self, name, argv, log, **options):
        self.name = name
        self.log = pathlib.Path(log)
        with open(self.log, "wb") as file:
            try:
                self.process = subprocess.Popen(
                    [str(part) for part in argv],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    preexec_fn=_die_with_parent,
                    **options,
                )
            except OSError as error:
                raise Fault(f"start {name}: {error}; ci/install --test installs it") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def alive(self):
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def wait_for(self, text, limit):
        """Returns when `text` is in its log."""
        wait_until(lambda: contains(self.log, text), limit, self.alive, self.name, f'it said "{text}"')

    def wait_for_path(self, path, limit):
        """Returns when it has made the file or socket `path`."""
        wait_until(path.exists, limit, self.alive, self.name, f"it made {path}")

    def kill(self):
        """SIGKILL: it gets no chance to say goodbye. Returns when it is gone."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        """SIGTERM, and SIGKILL if that does not help. Returns when it is gone."""
        self.process.terminate()
        try:
            self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
