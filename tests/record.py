#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Records one pipeline for a fixed time and says when each picture came out of it.

A process of its own, so that its CPU time is the pipeline's and a pipeline that hangs can be killed.
Reads one JSON object from standard input:

    {"pipeline": "... name=out", "seconds": 10, "stem": "target/demo/x", "first_frame_timeout": 20}

`pipeline` gives H.264 from the element named `out`. It lands in STEM.h264 and STEM.mp4. Where there is an
element named `decoded` too, its pictures are looked at as well. Writes one JSON object to standard output:

    {"frames": [[pts, latency], ...], "decoded": [[pts, latency], ...], "cpu_ms": 123.4}
    {"error": "what went wrong", ...}

Times are in ns of running time.
"""

import json
import os
import resource
import sys
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

# The caps of the reference timestamp that scanoutsrc puts on its buffers: the host's
# CLOCK_MONOTONIC, in ns, when the picture was captured. Here host and client share that clock.
HOST_CLOCK = "timestamp/x-helix-host"
# How long the end of the stream may take to travel through the pipeline, in seconds.
EOS_TIMEOUT = 10

TAIL = (
    " ! h264parse config-interval=-1 ! video/x-h264,stream-format=byte-stream,alignment=au"
    " ! tee name=split"
    " split. ! queue ! filesink location={stem}.h264"
    " split. ! queue ! h264parse ! mp4mux ! filesink location={stem}.mp4"
)


class Recording:
    """The pipeline, and what its probe saw."""

    def __init__(self, job):
        self.job = job
        self.frames, self.decoded = [], []
        self.pipeline = Gst.parse_launch(job["pipeline"] + TAIL.format(stem=job["stem"]))
        self.host_clock = Gst.Caps.from_string(HOST_CLOCK)
        for name, seen in ("out", self.frames), ("decoded", self.decoded):
            if element := self.pipeline.get_by_name(name):
                pad = element.get_static_pad("src")
                pad.add_probe(Gst.PadProbeType.BUFFER, self._on_buffer, seen)

    def run(self):
        """Play for the job's seconds, counted from the first picture. Returns the result."""
        bus = self.pipeline.get_bus()
        cpu_before = cpu_ms()
        self.pipeline.set_state(Gst.State.PLAYING)
        limit = self.job["first_frame_timeout"]
        deadline = time.monotonic() + limit
        while not self.frames:
            self._check(bus.timed_pop_filtered(20 * Gst.MSECOND, Gst.MessageType.ERROR))
            if time.monotonic() > deadline:
                raise TimeoutError(f"no picture within {limit} s")
        end = int(self.job["seconds"] * Gst.SECOND)
        self._check(bus.timed_pop_filtered(end, Gst.MessageType.ERROR | Gst.MessageType.EOS))
        self.pipeline.send_event(Gst.Event.new_eos())
        ended = bus.timed_pop_filtered(
            EOS_TIMEOUT * Gst.SECOND, Gst.MessageType.ERROR | Gst.MessageType.EOS
        )
        if ended is None:
            raise TimeoutError(f"the end of the stream did not arrive within {EOS_TIMEOUT} s")
        if ended.type == Gst.MessageType.ERROR:
            self._check(ended)
        used = cpu_ms() - cpu_before
        self.pipeline.set_state(Gst.State.NULL)
        return {"frames": self.frames, "decoded": self.decoded, "cpu_ms": used}

    def _on_buffer(self, pad, info, seen):
        buffer = info.get_buffer()
        meta = buffer.get_reference_timestamp_meta(self.host_clock)
        if meta:
            latency = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - meta.timestamp
        else:
            segment = pad.get_sticky_event(Gst.EventType.SEGMENT, 0).parse_segment()
            captured = segment.to_running_time(Gst.Format.TIME, buffer.pts)
            clock = self.pipeline.get_clock()
            latency = clock.get_time() - self.pipeline.get_base_time() - captured
        seen.append((buffer.pts, latency))
        return Gst.PadProbeReturn.OK

    @staticmethod
    def _check(message):
        if message is None:
            return
        if message.type == Gst.MessageType.EOS:
            raise EOFError("the stream ended by itself")
        error, detail = message.parse_error()
        raise RuntimeError(f"{message.src.get_name()}: {error.message} ({detail})")


def cpu_ms():
    """CPU time of this process so far, all threads, in ms."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) * 1000


def main():
    job = json.load(sys.stdin)
    Gst.init(None)
    recording = None
    try:
        recording = Recording(job)
        result = recording.run()
    except Exception as error:  # the parent shows whatever went wrong
        result = {"error": str(error) or repr(error)}
        result["frames"] = recording.frames if recording else []
    json.dump(result, sys.stdout)
    sys.stdout.flush()
    # After an error the pipeline may be stuck in any element; the process ends without asking it.
    os._exit(0)


if __name__ == "__main__":
    main()
