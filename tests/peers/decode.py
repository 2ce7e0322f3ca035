#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Decode H.264 with GStreamer's avdec_h264, in a child process, and compare pictures.

A decoder that somebody else wrote is the judge of both encoders, ours in h264_pcm.py and a real
host's.
"""

import math
import pathlib
import subprocess
import tempfile

DECODE_LIMIT = 60.0
"""seconds, for the first start of GStreamer on a machine, which scans its plugins"""
SAMPLES = 50_000
"""most bytes that `psnr` looks at"""


class DecodeError(Exception):
    """The stream is not what it was said to be."""


def decode(stream, width, height, pixel_format="I420"):
    """Pictures of an Annex B stream as (planes...): I420 gives (y, u, v), BGRx gives (pixels,).

    Width and height in pixels are what the stream must have; odd ones are taken as padded to even.
    """
    width, height = width + width % 2, height + height % 2
    with tempfile.TemporaryDirectory() as folder:
        source, sink = pathlib.Path(folder, "in.h264"), pathlib.Path(folder, "out.raw")
        source.write_bytes(stream)
        caps = f"video/x-raw,format={pixel_format},width={width},height={height}"
        command = ["gst-launch-1.0", "-q", "filesrc", f"location={source}", "!", "h264parse", "!",
                   "avdec_h264", "!", "videoconvert", "!", caps, "!", "filesink",
                   f"location={sink}"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=DECODE_LIMIT,
                             stdin=subprocess.DEVNULL, check=False)
        if run.returncode:
            raise DecodeError(f"not decoded to {width}x{height} (is the stream of another size?): "
                              f"{run.stderr.strip()[-300:]}")
        raw = sink.read_bytes()
    # GStreamer's own layout: lines of I420 are padded to 4 bytes.
    if pixel_format == "I420":
        shapes = [(width, height), (width // 2, height // 2), (width // 2, height // 2)]
    else:
        shapes = [(width * 4, height)]
    size = sum(_padded(line) * lines for line, lines in shapes)
    if len(raw) % size:
        raise DecodeError(f"{len(raw)} bytes are no number of {width}x{height} pictures")
    return [_planes(raw, at, shapes) for at in range(0, len(raw), size)]


def _padded(line):
    return (line + 3) // 4 * 4


def _planes(raw, at, shapes):
    planes = []
    for line, lines in shapes:
        step = _padded(line)
        end = at + step * lines
        planes.append(b"".join(raw[start : start + line] for start in range(at, end, step)))
        at = end
    return tuple(planes)


def psnr(one, other):
    """Peak signal to noise ratio of two planes in dB; infinite when they are equal."""
    if len(one) != len(other):
        raise DecodeError(f"planes of {len(one)} and {len(other)} bytes")
    if one == other:
        return math.inf
    step = max(len(one) // SAMPLES, 1) | 1  # odd, so that every channel and column has its turn
    pairs = list(zip(one[::step], other[::step]))
    error = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    return 10 * math.log10(255**2 / error) if error else math.inf
