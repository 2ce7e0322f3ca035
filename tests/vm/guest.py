# SPDX-License-Identifier: MIT OR Apache-2.0
"""A Debian in QEMU, and jobs that run in it. The other end is tests/vm/guest/init.

The guest sees three folders over 9p: the system of ci/room (read-only), the source tree with what
cargo built (/src, read-only) and target/vm (/share). A job is a shell script; its log lies on the share,
so it is there to be read while the job runs, and after everything.

Nothing here waits without a limit. Limits are in seconds, for a slow machine: a guest without KVM is some
twenty times slower than its host, and the host may have other things to do.
"""

import contextlib
import os
import pathlib
import re
import socket
import time
from dataclasses import dataclass

from programs import Fault, Program, contains, wait_until

QEMU = "qemu-system-x86_64"
MEMORY = "1024M"
BOOT_LIMIT = 180
# What the word of a job's end may take beyond the job's own limit, which the guest watches.
GRACE = 15


@dataclass
class System:
    """Where everything lies: what ci/room made, the source tree, the share, and the host's sockets."""

    room: pathlib.Path
    source: pathlib.Path
    share: pathlib.Path
    sockets: pathlib.Path | None = None  # none for a shell

    def qemu(self, of_room):
        """QEMU's command line so far, and its environment: this machine's, or with `of_room` Debian 13's."""
        if not of_room:
            return [QEMU], None
        # With the room's own loader, libraries, firmware and modules it runs on this machine as it does there.
        root = self.room / "root" / "usr"
        libraries = root / "lib" / "x86_64-linux-gnu"
        line = [root / "lib64" / "ld-linux-x86-64.so.2", "--library-path", libraries, root / "bin" / QEMU]
        for data in ("qemu", "seabios"):
            line += ["-L", root / "share" / data]
        return line, {**os.environ, "QEMU_MODULE_DIR": str(libraries / "qemu")}

    def arguments(self, kernel, command_line):
        """QEMU's, for everything but a stage's own devices and how to talk to the guest."""
        boot = self.room / "kernel" / kernel
        arguments = ["-nodefaults", "-no-reboot", "-vga", "none"]
        # /dev/kvm may be there and hang guests all the same; without it every machine is alike.
        arguments += ["-machine", "pc,memory-backend=memory", "-accel", "tcg,thread=multi"]
        arguments += ["-cpu", "max", "-smp", "2", "-m", MEMORY]
        # Shared, for devices whose back end is another process (vhost-user).
        arguments += ["-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"]
        arguments += ["-kernel", boot / "vmlinuz", "-initrd", boot / "initramfs"]
        # A busy host may give an emulated timer no tick while the kernel tries it, which would be a panic.
        options = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"
        # The second processor comes with tests/vm/guest/init: a booting kernel patches code that both would
        # run, and Linux 6.12 was seen to stop at its own int3 in there (QEMU 7.2, a busy host). With "lpj"
        # (loops per jiffy of 4 ms, at 2.5 GHz) the kernel need not measure it anew, which takes two seconds.
        options += " maxcpus=1 lpj=10000000"
        arguments += ["-append", f"{options} {command_line}"]
        for tag, path, access in (
            ("system", self.room / "root", ",readonly=on"),
            ("source", self.source, ",readonly=on"),
            ("share", self.share, ""),
        ):
            # A comma ends an option, two are one.
            path = str(path).replace(",", ",,")
            options = f"local,id={tag},path={path},security_model=none,multidevs=remap{access}"
            arguments += ["-fsdev", options, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        return arguments


class Job:
    """A script that runs, or ran, in the guest."""

    def __init__(self, guest, name, limit):
        self.guest = guest
        self.name = name
        self.limit = limit
        self.log = guest.jobs / f"{name}.log"
        self.began = False  # whether there is somebody to send a signal to
        self.status = None  # None while it runs
        self.killed = False

    def alive(self):
        """Whether the guest has not reported its end."""
        self.guest.listen(0)
        return self.status is None

    def output(self):
        """All that it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text, limit):
        """Returns when it has written `text`."""
        self.wait_until(lambda: contains(self.log, text), limit, f'it said "{text}"')

    def wait_until(self, condition, limit, what):
        """Returns when `condition()`, which `what` says in words ("it made a film")."""
        wait_until(condition, limit, self.alive, f"{self.name} (in the guest)", what)

    def wait(self):
        """Returns its exit status, once it has ended; `ending` says it in words."""
        deadline = time.monotonic() + self.limit + GRACE
        while self.status is None:
            if time.monotonic() > deadline:
                raise Fault(f"{self.name}: no word of its end from the guest after {self.limit} s")
            self.guest.listen(deadline - time.monotonic())
        return self.status

    def ending(self):
        """How it ended. timeout(1) gives 124, or 137 where it had to use SIGKILL."""
        if self.status == 124 or (self.status == 137 and not self.killed):
            return f"was still running after {self.limit} s"
        return f"ended with {self.status}"

    def signal(self, name):
        """Sends a signal ("TERM") to all its processes, as soon as there are any."""
        deadline = time.monotonic() + self.limit + GRACE
        while not self.began and self.status is None:
            if time.monotonic() > deadline:
                raise Fault(f"{self.name}: no word of its beginning from the guest, to send it SIG{name}")
            self.guest.listen(deadline - time.monotonic())
        if self.status is None:
            self.guest.tell(f"signal {self.name} {name}")

    def kill(self):
        """SIGKILL: it gets no chance to say goodbye. Returns when it is gone."""
        self.killed = True
        self.signal("KILL")
        self.wait()


class Guest:
    """A machine that runs. As a context manager it is switched off at the end."""

    def __init__(self, system, stage, name, kernel, folder, devices=(), of_room=False):
        self.name = name
        self.kernel = kernel
        self.jobs = folder / "jobs"
        self.jobs.mkdir(exist_ok=True)
        self.running = {}
        self.received = b""
        with contextlib.ExitStack() as ours:
            # QEMU inherits its end, so there is no name to choose and no moment to wait for.
            self.channel, theirs = socket.socketpair()
            ours.enter_context(theirs)
            line, environment = system.qemu(of_room)
            arguments = [*line, *system.arguments(kernel, f"rig.stage={stage}")]
            arguments += ["-serial", "stdio", "-chardev", f"socket,id=channel,fd={theirs.fileno()}"]
            arguments += ["-serial", "chardev:channel", *devices]
            if "-display" not in devices:
                arguments += ["-display", "none"]
            log = folder / f"{name}.console.log"
            self.qemu = Program(
                f"QEMU ({name})", arguments, log, pass_fds=[theirs.fileno()], env=environment
            )
        self.boot_seconds = None

    def __enter__(self):
        try:
            deadline = time.monotonic() + BOOT_LIMIT
            while self.boot_seconds is None:
                if time.monotonic() > deadline:
                    raise Fault(f"the guest {self.name} was not up within {BOOT_LIMIT} s")
                self.listen(deadline - time.monotonic())
        except BaseException:
            self.qemu.kill()
            raise
        return self

    def __exit__(self, *_):
        # As good as pulling the plug: the share is written through, and nothing else is kept.
        self.qemu.stop()
        self.channel.close()

    def start(self, name, script, limit):
        """Starts a shell script as the job `name`. The guest ends it after `limit` seconds."""
        if name in self.running or not re.fullmatch(r"[a-z0-9-]+", name):
            raise ValueError(f'"{name}" is taken, or no name for a job')
        (self.jobs / f"{name}.sh").write_text(script + "\n")
        job = self.running[name] = Job(self, name, limit)
        self.tell(f"run {name} {limit}")
        return job

    def run(self, name, script, limit):
        """Runs a shell script to its end; one that fails is a Fault. Returns what it wrote."""
        job = self.start(name, script, limit)
        if job.wait() != 0:
            raise Fault(f"{name} (in the guest) {job.ending()}")
        return job.output()

    def tell(self, line):
        """Sends the guest a line."""
        self.channel.settimeout(GRACE)
        try:
            self.channel.sendall(f"{line}\n".encode())
        except OSError as error:
            raise Fault(f'tell {self.name} "{line}" ({GRACE} s at most): {error}') from error

    def listen(self, limit):
        """Waits for the next words of the guest, at most `limit` seconds, and heeds all there are."""
        self.channel.settimeout(max(limit, 0.001))
        try:
            data = self.channel.recv(4096)
        except TimeoutError:
            return
        if not data:
            raise Fault(f"{self.qemu.name} has ended")
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            match line.decode(errors="replace").split():
                case ["ready", seconds]:
                    self.boot_seconds = float(seconds)
                case ["began", name] if name in self.running:
                    self.running[name].began = True
                case ["done", name, status] if name in self.running:
                    self.running[name].status = int(status)
