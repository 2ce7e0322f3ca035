#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""A real desktop without a screen: D-Bus, PipeWire, WirePlumber and a compositor, private to one test.

Everything lives in a runtime folder of its own and listens only on unix sockets in it, so several
desktops run side by side and none touches the user's session. Nothing is mocked: mutter composes
with llvmpipe and its ScreenCast API hands out real PipeWire nodes. weston, from version 13 on, composes
with pixman and is itself a node, "weston.pipewire", once it is the compositor.

As a module: `with Desktop(1280, 720) as desktop: node = desktop.screencast().node`.

As a program it is driven by JSON lines, which is how the Rust tests use it. The first line that it
prints says that all is up (or why not); then it answers each line it reads with one line:

    {"event": "ready", "runtime_dir": "/tmp/...", "env": {...}, "pids": {"pipewire": 1, ...}}
    {"cmd": "screencast", "mode": "monitor", "cursor-mode": "hidden", "pointer": false}
        -> {"node": 31, "session": "/org/gnome/Mutter/ScreenCast/Session/u1"}
    {"cmd": "close-session", "session": "..."}            -> {"ok": true}
    {"cmd": "move-pointer", "session": "...", "x": 1, "y": 2}  -> {"ok": true}, for one with a pointer
    {"cmd": "client", "kind": "pattern", "fps": 30}       -> {"pid": 4711, "kind": "pattern"}
    {"cmd": "client", "window": [640, 360]}              -> {"pid": 4711, "kind": "pattern"}
    {"cmd": "client", "screen": [640, 360]}              -> {"pid": 4711, "kind": "pattern"}
    {"cmd": "client", "kind": "simple-shm"}               -> {"pid": 4712, "kind": "simple-shm"}
    {"cmd": "stop-client", "pid": 4711}                   -> {"ok": true}
    {"cmd": "kill", "what": "compositor"}                 -> {"ok": true, "pid": 4709}
    {"cmd": "restart-pipewire"}                           -> {"ok": true}
    {"cmd": "freeze-pipewire"}                            -> {"ok": true}, until "thaw-pipewire"
    anything that fails                                   -> {"error": "..."}

The end of standard input, SIGTERM and SIGINT all tear everything down.
"""

import argparse
import ctypes
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from gi.repository import Gio, GLib

SCREENCAST = "org.gnome.Mutter.ScreenCast"
SCREENCAST_PATH = "/org/gnome/Mutter/ScreenCast"
REMOTE_DESKTOP = "org.gnome.Mutter.RemoteDesktop"
REMOTE_DESKTOP_PATH = "/org/gnome/Mutter/RemoteDesktop"
COMPOSITORS = ("mutter", "weston")
# org.gnome.Mutter.ScreenCast.xml, option "cursor-mode" of the Record methods.
CURSOR_MODES = {"hidden": 0, "embedded": 1, "metadata": 2}
KILLABLE = ("compositor", "pipewire", "wireplumber")
WAYLAND_DISPLAY = "wayland-desktop"
PATTERN_CLIENT = pathlib.Path(__file__).with_name("pattern_client.py")

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Limits in seconds. Each is many times what a loaded machine with two cores needs.
START_TIMEOUT = 30
CLIENT_TIMEOUT = 30
STOP_TIMEOUT = 5

# WirePlumber manages links here, not the machine's sound cards and cameras, and there is no
# portal on this bus to ask. 0.4 is configured in Lua, 0.5 in its own JSON dialect.
WIREPLUMBER_CONFIG = {
    "main.lua.d/60-desktop.lua": """\
alsa_monitor.enabled = false
v4l2_monitor.enabled = false
libcamera_monitor.enabled = false
default_access.properties["enable-flatpak-portal"] = false
""",
    "bluetooth.lua.d/90-enable-all.lua": "-- no Bluetooth here\n",
    "wireplumber.conf.d/90-desktop.conf": """\
wireplumber.profiles = {
  main = {
    hardware.audio = disabled
    hardware.bluetooth = disabled
    hardware.video-capture = disabled
    support.portal-permissionstore = disabled
    support.reserve-device = disabled
    support.logind = disabled
  }
}
""",
}


class DesktopError(Exception):
    """Says what was tried, what came of it and what the logs say."""


@dataclass
class Screencast:
    """One running ScreenCast session: its D-Bus path and the PipeWire node it feeds.

    One with a pointer is part of a session that may also move that: then `remote` is its path.
    """

    session: str
    node: int
    stream: str
    remote: str | None = None


class Child:
    """One process that this desktop started, with its log."""

    def __init__(self, name, argv, env, log_dir, stdout=None):
        self.name = name
        self.log = log_dir / f"{name}.log"
        with open(self.log, "ab") as log:
            try:
                self.process = subprocess.Popen(
                    argv,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout or log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                raise DesktopError(f"start {name} ({argv[0]}): {error}; is it installed?") from error
        self.pid = self.process.pid

    def tail(self, lines=15):
        """The end of the log, for error texts."""
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(f"    {self.name}: {line}" for line in text) or f"    {self.name}: (silent)"

    def stop(self):
        """Ask, wait a little, insist. Returns only when the process is gone."""
        self.process.terminate()
        # One that is frozen does not hear that.
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def _die_with_parent():
    """In the child: be killed when the parent dies, even by SIGKILL."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Desktop:
    """D-Bus, PipeWire, WirePlumber and a compositor with one monitor of `width` x `height`.

    A mutter without `monitor` has those only that its ScreenCast sessions make, virtual ones.

    Logs go to `log_dir`, or else lie in the runtime folder and vanish with it. Not thread-safe: use
    one from one thread, whose default GLib main context it iterates while it waits.
    """

    def __init__(
        self, width=1280, height=720, log_dir=None, compositor="mutter", *, monitor=True
    ):
        self.width = width
        self.height = height
        self.compositor = compositor
        self.monitor = monitor
        self.children = []
        self.casts = {}
        self.clients = {}
        self.bus = None
        self._started = False
        # A short path: socket addresses hold 107 bytes, and mutter and PipeWire add their names.
        self.runtime_dir = pathlib.Path(tempfile.mkdtemp(prefix="desktop-", dir="/tmp"))
        self.log_dir = pathlib.Path(log_dir) if log_dir else self.runtime_dir / "log"
        self.log_dir.mkdir(parents=True, exist_ok=True)
        # What a client of this desktop needs.
        self.client_env = {
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
            "WAYLAND_DISPLAY": WAYLAND_DISPLAY,
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={self.runtime_dir}/bus",
        }

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def environment(self):
        """A whole environment for a process on this desktop."""
        home = self.runtime_dir / "home"
        env = dict(os.environ)
        for name in ("DISPLAY", "PIPEWIRE_REMOTE", "PIPEWIRE_RUNTIME_DIR", "PULSE_SERVER"):
            env.pop(name, None)
        env.update(self.client_env)
        env.update(
            HOME=str(home),
            XDG_CONFIG_HOME=str(home / "config"),
            XDG_STATE_HOME=str(home / "state"),
            XDG_CACHE_HOME=str(home / "cache"),
            # The machine's own services (logind, colord, rtkit) stay out of this.
            DBUS_SYSTEM_BUS_ADDRESS=f"unix:path={self.runtime_dir}/no-system-bus",
            GSETTINGS_BACKEND="memory",
            LIBGL_ALWAYS_SOFTWARE="1",
        )
        return env

    def pids(self):
        """Process ids by name: dbus, pipewire, wireplumber, compositor."""
        return {child.name: child.pid for child in self.children}

    def start(self):
        """Bring everything up, each part when the one it needs is ready."""
        config = self.runtime_dir / "home" / "config" / "wireplumber"
        for name, text in WIREPLUMBER_CONFIG.items():
            path = config / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monitor = Gio.File.new_for_path(str(self.runtime_dir)).monitor_directory(0, None)
        # The waits below look at the folder again whenever something changes in it.
        monitor.connect("changed", lambda *_: None)

        address = self.client_env["DBUS_SESSION_BUS_ADDRESS"]
        dbus = self._spawn("dbus", ["dbus-daemon", "--session", "--nofork", f"--address={address}"])
        self._await_socket("bus", dbus)
        flags = (
            Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT
            | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
        )
        self.bus = Gio.DBusConnection.new_for_address_sync(address, flags, None, None)
        self.bus.set_exit_on_close(False)

        self._await_socket("pipewire-0", self._spawn("pipewire", ["pipewire"]))
        self._start_wireplumber()

        if self.compositor == "mutter":
            self._start_mutter()
        else:
            self._start_weston()
        monitor.cancel()
        self._started = True

    def _start_mutter(self):
        # mutter takes one after the other.
        missing = {SCREENCAST, REMOTE_DESKTOP}
        for name in (SCREENCAST, REMOTE_DESKTOP):
            Gio.bus_watch_name_on_connection(
                self.bus, name, 0, lambda _bus, name, _owner: missing.discard(name), None
            )
        monitor = [f"--virtual-monitor={self.width}x{self.height}"] if self.monitor else []
        compositor = self._spawn(
            "compositor",
            ["mutter", "--headless", "--wayland", "--no-x11"]
            + [f"--wayland-display={WAYLAND_DISPLAY}"]
            + monitor,
        )
        self._await_socket(WAYLAND_DISPLAY, compositor)
        names = f"D-Bus names {SCREENCAST} and {REMOTE_DESKTOP}"
        self._await(names, lambda: not missing, START_TIMEOUT, compositor)

    def _start_weston(self):
        options = subprocess.run(["weston", "--help"], capture_output=True, text=True, check=False)
        if "Options for pipewire" not in options.stdout:
            raise DesktopError("weston has no PipeWire backend here")
        compositor = self._spawn(
            "compositor",
            ["weston", "--backend=pipewire", "--renderer=pixman", "--shell=kiosk", "--no-config"]
            + [f"--socket={WAYLAND_DISPLAY}", f"--width={self.width}", f"--height={self.height}"],
        )
        self._await_socket(WAYLAND_DISPLAY, compositor)

    def screencast(self, mode="monitor", cursor_mode="hidden", pointer=False):
        """Start a ScreenCast session of the monitor, or of a virtual one; see CURSOR_MODES.

        With `pointer` there is one, which move_pointer() moves.
        """
        options = {"cursor-mode": GLib.Variant("u", _choice(CURSOR_MODES, "cursor-mode", cursor_mode))}
        remote = None
        session_options = {}
        if pointer:
            remote = self._call(REMOTE_DESKTOP_PATH, "", "CreateSession", None, service=REMOTE_DESKTOP)
            session_id = self._property(remote, f"{REMOTE_DESKTOP}.Session", "SessionId")
            session_options["remote-desktop-session-id"] = GLib.Variant("s", session_id)
        session = self._call(SCREENCAST_PATH, "", "CreateSession", "(a{sv})", session_options)
        if mode == "monitor":
            stream = self._call(session, ".Session", "RecordMonitor", "(sa{sv})", "", options)
        elif mode == "virtual":
            stream = self._call(session, ".Session", "RecordVirtual", "(a{sv})", options)
        else:
            raise DesktopError(f'screencast mode "{mode}": only monitor and virtual are known')
        nodes = []
        subscription = self.bus.signal_subscribe(
            SCREENCAST,
            f"{SCREENCAST}.Stream",
            "PipeWireStreamAdded",
            stream,
            None,
            Gio.DBusSignalFlags.NONE,
            lambda *signal_arguments: nodes.append(signal_arguments[5][0]),
        )
        if remote:
            self._call(remote, ".Session", "Start", None, service=REMOTE_DESKTOP)
        else:
            self._call(session, ".Session", "Start", None)
        self._await("the ScreenCast's PipeWire node", lambda: nodes, START_TIMEOUT, self._compositor())
        self.bus.signal_unsubscribe(subscription)
        self.casts[session] = Screencast(session, nodes[0], stream, remote)
        return self.casts[session]

    def close_session(self, session):
        """Stop one ScreenCast session; its PipeWire node goes away."""
        cast = self.casts.pop(session, None)
        if cast and cast.remote:
            self._call(cast.remote, ".Session", "Stop", None, service=REMOTE_DESKTOP)
        else:
            self._call(session, ".Session", "Stop", None)

    def move_pointer(self, session, x, y):
        """Move the pointer of a session that has one to pixel `x`, `y` of its picture."""
        cast = self.casts.get(session)
        if cast is None or cast.remote is None:
            raise DesktopError(f"move-pointer: {session} is no session with a pointer")
        arguments = (cast.stream, float(x), float(y))
        method = "NotifyPointerMotionAbsolute"
        self._call(cast.remote, ".Session", method, "(sdd)", *arguments, service=REMOTE_DESKTOP)

    def start_client(self, kind="pattern", fps=30, window=None, screen=None):
        """Start a client that moves and wait until it is on screen. Returns its process id.

        The pattern fills the screen, which is `screen` pixels (width, height) where it is not the
        desktop's own monitor, or a `window` of so many pixels.

        Without a GPU mutter frees a client's old pictures only when a ScreenCast reads the screen.
        A moving client that nobody captures costs about 100 MB of memory a second at 720p30.
        """
        if kind == "pattern":
            argv = ["/usr/bin/python3", str(PATTERN_CLIENT)]
            width, height = window or screen or (self.width, self.height)
            argv += [str(width), str(height), str(fps)] + ["window"] * bool(window)
            client = self._spawn("pattern", argv, kept=False, stdout=subprocess.PIPE)
        elif kind == "simple-shm":
            client = self._spawn("simple-shm", ["weston-simple-shm"], kept=False)
        else:
            raise DesktopError(f'client "{kind}": only pattern and simple-shm are known')
        self.clients[client.pid] = client
        if kind == "pattern":
            with _Lines(client.process.stdout) as lines:
                shown = lambda: "shown" in lines.seen  # noqa: E731
                self._await("the pattern on screen", shown, CLIENT_TIMEOUT, client)
        return client.pid

    def stop_client(self, pid):
        """End a client that start_client started."""
        client = self.clients.pop(pid, None)
        if client is None:
            raise DesktopError(f"stop-client: {pid} is no client of this desktop")
        client.stop()

    def kill(self, what):
        """SIGKILL for one of KILLABLE; returns the process id when it is gone."""
        for child in self.children:
            if child.name == what and what in KILLABLE:
                child.process.kill()
                child.process.wait()
                return child.pid
        raise DesktopError(f'kill "{what}": only {", ".join(KILLABLE)} are known')

    def restart_pipewire(self):
        """SIGKILL for PipeWire, and WirePlumber with it, which ends then; both come up again."""
        for child in [c for c in self.children if c.name in ("pipewire", "wireplumber")]:
            child.process.kill()
            child.process.wait()
            self.children.remove(child)
        self._await_socket("pipewire-0", self._spawn("pipewire", ["pipewire"]))
        self._start_wireplumber()

    def freeze_pipewire(self, frozen):
        """SIGSTOP for PipeWire, or SIGCONT."""
        for child in [c for c in self.children if c.name == "pipewire"]:
            child.process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def close(self):
        """End every process and remove the runtime folder. Safe to call twice."""
        if self.bus is not None and not self.bus.is_closed():
            self.bus.close_sync(None)
        for client in self.clients.values():
            client.stop()
        self.clients.clear()
        while self.children:
            self.children.pop().stop()
        shutil.rmtree(self.runtime_dir, ignore_errors=True)

    def _spawn(self, name, argv, kept=True, stdout=None):
        child = Child(name, argv, self.environment(), self.log_dir, stdout)
        if kept:
            self.children.append(child)
        return child

    def _compositor(self):
        return next(child for child in self.children if child.name == "compositor")

    def _start_wireplumber(self):
        """WirePlumber is ready when it has published its "default" metadata; pw-mon tells when."""
        argv = ["stdbuf", "-oL", "pw-mon", "--no-colors"]
        watcher = self._spawn("pw-mon", argv, kept=False, stdout=subprocess.PIPE)
        try:
            with _Lines(watcher.process.stdout) as lines:
                child = self._spawn("wireplumber", ["wireplumber"])
                self._await(
                    "WirePlumber's metadata",
                    lambda: any('metadata.name = "default"' in line for line in lines.seen),
                    START_TIMEOUT,
                    child,
                )
        finally:
            watcher.stop()

    def _property(self, path, interface, name):
        parameters = GLib.Variant("(ss)", (interface, name))
        properties = "org.freedesktop.DBus.Properties"
        flags = Gio.DBusCallFlags.NO_AUTO_START
        arguments = (REMOTE_DESKTOP, path, properties, "Get", parameters, None, flags)
        try:
            return self.bus.call_sync(*arguments, START_TIMEOUT * 1000, None).unpack()[0]
        except GLib.Error as error:
            raise DesktopError(f"{interface}.{name}: {error.message}") from error

    def _call(self, path, interface, method, signature, *arguments, service=SCREENCAST):
        parameters = GLib.Variant(signature, arguments) if signature else None
        try:
            reply = self.bus.call_sync(
                service,
                path,
                service + interface,
                method,
                parameters,
                None,
                Gio.DBusCallFlags.NO_AUTO_START,
                START_TIMEOUT * 1000,
                None,
            ).unpack()
        except GLib.Error as error:
            raise DesktopError(f"{service}{interface}.{method}: {error.message}") from error
        return reply[0] if reply else None

    def _await_socket(self, name, child):
        """Returns when `child` accepts on the socket `name`. The file alone is there too early."""

        def accepts():
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(self.runtime_dir / name)) == 0

        self._await(f"{name} of {child.name}", accepts, START_TIMEOUT, child)

    def _await(self, what, condition, seconds, child):
        """Run the main context until `condition` holds. Fails after `seconds` or when `child` ends."""
        context = GLib.MainContext.default()
        deadline = time.monotonic() + seconds
        # Events wake the context; the tick notices what sends none: a socket that now accepts, a dead
        # child, the deadline.
        tick = GLib.timeout_add(20, lambda: GLib.SOURCE_CONTINUE)
        try:
            while not condition():
                if child.process.poll() is not None:
                    status = child.process.returncode
                    raise DesktopError(f"{what}: {child.name} ended with {status}\n{child.tail()}")
                if time.monotonic() > deadline:
                    raise DesktopError(f"{what}: not there after {seconds} s\n{child.tail()}")
                context.iteration(True)
        finally:
            GLib.source_remove(tick)


class _Lines:
    """Collects the lines of a pipe while the main context runs, until its `with` block ends."""

    def __init__(self, pipe):
        self.seen = []
        self._rest = b""
        os.set_blocking(pipe.fileno(), False)
        conditions = GLib.IO_IN | GLib.IO_HUP
        self._watch = GLib.io_add_watch(
            pipe.fileno(), GLib.PRIORITY_DEFAULT, conditions, self._read
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # A watch that outlives its pipe would read from whoever gets the file descriptor next.
        if self._watch:
            GLib.source_remove(self._watch)

    def _read(self, fd, _condition):
        data = os.read(fd, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.seen += [line.decode(errors="replace") for line in lines]
        if data:
            return GLib.SOURCE_CONTINUE
        self._watch = None
        return GLib.SOURCE_REMOVE


def _choice(choices, what, value):
    if value not in choices:
        raise DesktopError(f'{what} "{value}": known are {", ".join(choices)}')
    return choices[value]


def _command(desktop, request):
    """Carry out one line of the program's protocol and return the answer."""
    match request.get("cmd"):
        case "screencast":
            cast = desktop.screencast(
                request.get("mode", "monitor"),
                request.get("cursor-mode", "hidden"),
                request.get("pointer", False),
            )
            return {"node": cast.node, "session": cast.session}
        case "close-session":
            desktop.close_session(request["session"])
            return {"ok": True}
        case "move-pointer":
            desktop.move_pointer(request["session"], request["x"], request["y"])
            return {"ok": True}
        case "client":
            kind = request.get("kind", "pattern")
            sizes = request.get("window"), request.get("screen")
            return {"pid": desktop.start_client(kind, request.get("fps", 30), *sizes), "kind": kind}
        case "stop-client":
            desktop.stop_client(request["pid"])
            return {"ok": True}
        case "kill":
            return {"ok": True, "pid": desktop.kill(request["what"])}
        case "restart-pipewire":
            desktop.restart_pipewire()
            return {"ok": True}
        case "freeze-pipewire" | "thaw-pipewire" as cmd:
            desktop.freeze_pipewire(cmd == "freeze-pipewire")
            return {"ok": True}
        case other:
            raise DesktopError(f'unknown cmd "{other}"')


def _say(message):
    print(json.dumps(message), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1280x720", help="of the monitor, in pixels")
    parser.add_argument("--compositor", choices=COMPOSITORS, default="mutter")
    parser.add_argument("--no-monitor", action="store_true", help="but for sessions' virtual ones")
    parser.add_argument("--log-dir", help="where the logs stay; without it they are removed")
    options = parser.parse_args()
    width, height = (int(side) for side in options.size.split("x"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    monitor = not options.no_monitor
    try:
        with Desktop(
            width, height, options.log_dir, options.compositor, monitor=monitor
        ) as desktop:
            _say(
                {
                    "event": "ready",
                    "runtime_dir": str(desktop.runtime_dir),
                    "env": desktop.client_env,
                    "pids": desktop.pids(),
                }
            )
            for line in sys.stdin:
                try:
                    _say(_command(desktop, json.loads(line)))
                except KeyError as missing:
                    _say({"error": f"field {missing} is missing"})
                except (DesktopError, ValueError) as error:
                    _say({"error": str(error)})
    except DesktopError as error:
        _say({"error": f"start the desktop: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
