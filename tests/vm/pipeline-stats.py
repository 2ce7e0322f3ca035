#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs a pipeline to its end, in the guest, and says what its elements say.

    pipeline-stats.py LIMIT DESCRIPTION...

"message STRUCTURE" for each element message, "stats NAME STRUCTURE" at the end for each element that has
statistics. LIMIT in seconds, against hangs. Status 1 with "ERROR: ..." when it does not end well.
"""

import sys
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

WANTED = Gst.MessageType.ERROR | Gst.MessageType.EOS | Gst.MessageType.ELEMENT


def run(pipeline, limit):
    """Plays it. Returns None at the end of the stream, else why there was none."""
    deadline = time.monotonic() + limit
    pipeline.set_state(Gst.State.PLAYING)
    while (left := deadline - time.monotonic()) > 0:
        message = pipeline.get_bus().timed_pop_filtered(int(left * Gst.SECOND), WANTED)
        if message is None:
            break
        if message.type == Gst.MessageType.EOS:
            return None
        if message.type == Gst.MessageType.ERROR:
            error, details = message.parse_error()
            return f"{error.message} ({details})".replace("\n", " ")
        print(f"message {message.get_structure().to_string()}", flush=True)
    return f"no end of the stream within {limit} s"


def main():
    limit, description = float(sys.argv[1]), " ".join(sys.argv[2:])
    Gst.init(None)
    pipeline = Gst.parse_launch(description)
    error = run(pipeline, limit)
    for element in pipeline.children:
        if element.find_property("stats"):
            print(f"stats {element.name} {element.get_property('stats').to_string()}")
    pipeline.set_state(Gst.State.NULL)
    if error:
        sys.exit(f"ERROR: {error}")


if __name__ == "__main__":
    main()
