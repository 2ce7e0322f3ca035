#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""A Wayland client that shows the known moving picture (see pattern.py), fullscreen or in a window.

Usage: pattern_client.py WIDTH HEIGHT FPS [window]. Prints "shown" once the picture is on the screen,
then plays until SIGTERM.
"""

import signal
import sys

import gi

gi.require_version("Gst", "1.0")
from gi.repository import GLib, Gst  # noqa: E402

import pattern  # noqa: E402

# waylandsink counts a picture as rendered when it gave it to the compositor; the next one passes
# only after the compositor's frame callback. mutter lets a new window grow and fade in for a quarter
# of a second, so a second's worth of pictures must have passed before the screen shows them plainly.
SECONDS_BEFORE_SHOWN = 1


def main():
    width, height, fps = (int(argument) for argument in sys.argv[1:4])
    fullscreen = str("window" not in sys.argv[4:]).lower()
    Gst.init(None)
    # sync=true paces the picture; max-lateness=-1 and qos=false keep a busy machine from skipping
    # pictures here, so that what is missing later went missing in the pipeline under test.
    pipeline = Gst.parse_launch(
        f"{pattern.description(width, height, fps)}"
        f" ! waylandsink name=sink fullscreen={fullscreen} max-lateness=-1 qos=false"
    )
    sink = pipeline.get_by_name("sink")
    loop = GLib.MainLoop()
    result = []

    def stop(message=None):
        if message:
            result.append(message)
        loop.quit()

    def on_message(_bus, message):
        if message.type == Gst.MessageType.ERROR:
            error, detail = message.parse_error()
            stop(f"{error.message} ({detail})")
        elif message.type == Gst.MessageType.EOS:
            stop("the picture ended")

    def on_first_pictures():
        stats = sink.get_property("stats")
        if stats.get_uint64("rendered")[1] < fps * SECONDS_BEFORE_SHOWN:
            return GLib.SOURCE_CONTINUE
        print("shown", flush=True)
        return GLib.SOURCE_REMOVE

    bus = pipeline.get_bus()
    bus.add_signal_watch()
    bus.connect("message", on_message)
    for number in (signal.SIGTERM, signal.SIGINT):
        GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, number, stop)
    GLib.timeout_add(20, on_first_pictures)
    pipeline.set_state(Gst.State.PLAYING)
    loop.run()
    pipeline.set_state(Gst.State.NULL)
    if result:
        sys.exit(f"pattern client: {result[0]}")


if __name__ == "__main__":
    main()
