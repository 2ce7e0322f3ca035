#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs a pipeline that must fail, in the guest, and says how long after PLAYING was asked for it did.

    pipeline-error.py LIMIT DESCRIPTION...      "ERROR after 2.01 s: MESSAGE (DETAILS)", status 1

LIMIT in seconds, against hangs. Status 2 when there was no error by then.
"""

import sys
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

limit, description = float(sys.argv[1]), " ".join(sys.argv[2:])
Gst.init(None)
pipeline = Gst.parse_launch(description)
began = time.monotonic()
pipeline.set_state(Gst.State.PLAYING)
wanted = Gst.MessageType.ERROR | Gst.MessageType.EOS
message = pipeline.get_bus().timed_pop_filtered(int(limit * Gst.SECOND), wanted)
seconds = time.monotonic() - began
pipeline.set_state(Gst.State.NULL)
if message is None or message.type != Gst.MessageType.ERROR:
    print(f"no error after {seconds:.2f} s")
    sys.exit(2)
error, details = message.parse_error()
# On one line, for whoever looks for it.
print(f"ERROR after {seconds:.2f} s: {error.message} ({details})".replace("\n", " "))
sys.exit(1)
