# SPDX-License-Identifier: MIT OR Apache-2.0
"""A private D-Bus, and the display that QEMU offers there (its docs/interop/dbus-display)."""

import threading

from gi.repository import Gio, GLib

from programs import Fault

NAME = "org.qemu"
CONSOLE = "org.qemu.Display1.Console"
START_LIMIT = 20
CALL_LIMIT_MS = 5000


class Display:
    """A bus of a stage's own. QEMU's display appears on it when `arguments` are QEMU's."""

    def __init__(self, stage):
        socket = stage.sockets / "bus"
        address = f"unix:path={socket}"
        argv = ["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address={address}"]
        daemon = stage.program("dbus-daemon", argv)
        daemon.wait_for_path(socket, START_LIMIT)
        flags = (
            Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT
            | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
        )
        # The connection and its handshake know no limit of their own.
        too_late = Gio.Cancellable()
        timer = threading.Timer(START_LIMIT, too_late.cancel)
        timer.start()
        try:
            self.bus = Gio.DBusConnection.new_for_address_sync(address, flags, None, too_late)
        except GLib.Error as error:
            raise Fault(f"connect to {address} ({START_LIMIT} s at most): {error.message}") from error
        finally:
            timer.cancel()
        self.bus.set_exit_on_close(False)
        self.arguments = ["-display", f"dbus,addr={address}"]

    def wait(self):
        """Returns when QEMU's display is on the bus."""
        seen = []
        watch = Gio.bus_watch_name_on_connection(
            self.bus, NAME, Gio.BusNameWatcherFlags.NONE, lambda *_: seen.append(True), None
        )
        # Wakes the loop below; that is all it is for.
        timer = GLib.timeout_add_seconds(START_LIMIT, lambda: seen.append(False))
        while not seen:
            GLib.MainContext.default().iteration(True)
        GLib.source_remove(timer)
        Gio.bus_unwatch_name(watch)
        if not seen[0]:
            raise Fault(f"QEMU did not take the name {NAME} on the bus within {START_LIMIT} s")

    def set_size(self, console, width, height):
        """Says that a window of this size (pixels) shows the console: the guest's output is connected."""
        arguments = GLib.Variant("(qqiiuu)", (0, 0, 0, 0, width, height))
        path = f"/org/qemu/Display1/Console_{console}"
        try:
            self.bus.call_sync(
                NAME, path, CONSOLE, "SetUIInfo", arguments, None, 0, CALL_LIMIT_MS, None
            )
        except GLib.Error as error:
            raise Fault(f"SetUIInfo({width}x{height}) on {path}: {error.message}") from error
