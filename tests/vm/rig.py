#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs stages in a guest, or gives a shell in one. Run by ci/vm; docs/testing.md explains it.

A stage is a module in tests/vm/stages with a function `run(stage)`. It starts guests and programs
through the `Stage` that it is given, and says what it found with `stage.check`.
"""

import argparse
import contextlib
import importlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = HERE.parent.parent
# Stages use what other tests have: the known picture, the comparison with it, the protocol in Python.
sys.path += [str(HERE), str(HERE.parent), str(HERE.parent / "peers")]

from guest import Guest, System  # noqa: E402
from programs import Fault, Program  # noqa: E402

# Lines of each log that a failed stage shows.
TAIL = 25


class Stage:
    """What a stage works with: a folder, guests, programs on the host, and its verdicts."""

    def __init__(self, name, system, began):
        self.name = name
        self.system = system
        self.began = began
        # On the share: the guest sees it as /share/NAME.
        self.folder = system.share / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.passed = 0
        self.faults = []
        self.programs = contextlib.ExitStack()
        self.sockets = system.sockets / name
        self.sockets.mkdir()

    def say(self, text):
        """A line for whoever watches."""
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)

    def check(self, good, what):
        """Notes one verdict, and goes on."""
        if good:
            self.passed += 1
            self.say(f"    ok      {what}")
        else:
            self.faults.append(what)
            self.say(f"    FAILED  {what}")

    @contextlib.contextmanager
    def part(self, what):
        """A part of the stage: one that cannot go on is a verdict, and the next part is run."""
        self.say(what)
        try:
            yield
        except Fault as fault:
            self.check(False, f"{what}: {fault}")

    def guest(self, name, kernel, devices=(), of_room=False):
        """A guest with Linux 6.1 or 6.12, to be used in `with`; with `of_room` in Debian 13's QEMU."""
        return Guest(self.system, self.name, name, kernel, self.folder, devices, of_room)

    def program(self, name, argv, **options):
        """Starts a program on the host. It ends with the stage, or when it is told to."""
        program = Program(name, argv, self.folder / f"{name}.log", **options)
        return self.programs.enter_context(program)

    def built(self, program):
        """The path of a program that cargo built."""
        return SOURCE / "target" / "debug" / program

    def finish(self):
        """Ends what was started and shows the logs of a stage that failed."""
        self.programs.close()
        if not self.faults:
            return
        logs = [*self.folder.rglob("*.log"), *self.folder.rglob("*.trace")]
        for log in sorted(logs):
            lines = log.read_text(errors="replace").splitlines()
            left_out = f", {len(lines) - TAIL} lines before these" if len(lines) > TAIL else ""
            print(f"\n--- {log.relative_to(SOURCE)}{left_out}")
            print("\n".join(lines[-TAIL:]))


def run_stage(name, system, began):
    """Runs one stage and prints its verdict. Returns whether it passed, and how long it took (s)."""
    start = time.monotonic()
    stage = Stage(name, system, began)
    try:
        stage.say(f"{name}: {summary(name)}")
        importlib.import_module(f"stages.{name}").run(stage)
        if not stage.passed and not stage.faults:
            stage.check(False, "it checked nothing")
    except Fault as fault:
        stage.check(False, str(fault))
    except Exception:  # the other stages are run all the same
        traceback.print_exc()
        stage.check(False, "the stage itself is broken, see above")
    finally:
        stage.finish()
    seconds = time.monotonic() - start
    if stage.faults:
        verdict = f"FAILED, {len(stage.faults)} of {stage.passed + len(stage.faults)} checks"
    else:
        verdict = f"passed, {stage.passed} checks"
    print(f"\n{name}: {verdict} in {seconds:.0f} s. Logs: {stage.folder.relative_to(SOURCE)}/\n")
    for fault in stage.faults:
        print(f"  - {fault}")
    return not stage.faults, seconds


def stage_names():
    """All stages, in the order of their names."""
    return sorted(path.stem for path in (HERE / "stages").glob("[a-z]*.py"))


def summary(name):
    """The first line of a stage's docstring."""
    return importlib.import_module(f"stages.{name}").__doc__.splitlines()[0]


@contextlib.contextmanager
def sockets_folder(lock):
    """A short path for sockets: that of one may have 107 bytes, and a source tree may lie deep.

    `lock` is the file that ci/vm has locked. It names the folder, so that one that was left by a rig that was
    killed goes with the next run.
    """
    if left := lock.read_text():
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="vm-") as folder:
        lock.write_text(folder)
        yield pathlib.Path(folder)
    lock.write_text("")


def shell(system, kernel):
    """Becomes QEMU, with the guest's shell on this terminal."""
    size = shutil.get_terminal_size()
    arguments = [*system.qemu(False)[0], *system.arguments(kernel, f"rig.shell rig.rows={size.lines} rig.columns={size.columns}")]
    arguments += ["-display", "none", "-serial", "mon:stdio", "-device", "virtio-gpu-pci,max_outputs=4"]
    os.execvp(arguments[0], [str(argument) for argument in arguments])


def main():
    parser = argparse.ArgumentParser(prog="ci/vm", description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="what to run; all without one")
    parser.add_argument("--list", action="store_true", help="say which stages there are")
    parser.add_argument("--shell", action="store_true", help="a shell in the guest, on this terminal")
    parser.add_argument("--kernel", choices=["6.1", "6.12"], default="6.12", help="for --shell")
    parser.add_argument("--room", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepared", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = stage_names()
    if options.list:
        for name in known:
            print(f"{name:8} {summary(name)}")
        return
    unknown = [name for name in options.stages if name not in known]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
    share = SOURCE / "target" / "vm"
    share.mkdir(parents=True, exist_ok=True)
    if options.shell:
        shell(System(options.room, SOURCE, share), options.kernel)
    names = options.stages or known
    if not names:
        sys.exit(f"ci/vm: no stages in {HERE / 'stages'}")
    # Ends what was started, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    with sockets_folder(share.with_suffix(".lock")) as sockets:
        system = System(options.room, SOURCE, share, sockets)
        results = {name: run_stage(name, system, began) for name in names}
    spent = {"room and build": options.prepared, **{name: seconds for name, (_, seconds) in results.items()}}
    print(", ".join(f"{what} {seconds:.0f} s" for what, seconds in spent.items()), end="")
    print(f"; {sum(spent.values()):.0f} s in all", flush=True)
    failed = [name for name, (passed, _) in results.items() if not passed]
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
