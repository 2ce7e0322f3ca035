# SPDX-License-Identifier: MIT OR Apache-2.0
"""Looks at a film: decodes it, compares it with the known picture, makes a contact sheet."""

import struct
import zlib
from dataclasses import dataclass, field

import gi
import numpy

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import Gst, GstApp  # noqa: E402, F401

import pattern  # noqa: E402

# What decoded pictures are compared in. A stream that names no colorimetry means the default of its
# size; naming one here makes videoconvert turn any other into it.
RAW = "video/x-raw,format=I420,colorimetry=bt709"
# A decoder that says nothing for this long is stuck (seconds).
DECODE_TIMEOUT = 30
# Rows of luma that the search for a picture's number looks at: one in so many.
SEARCH_STEP = 180


class VerifyError(Exception):
    """The film cannot be read."""


@dataclass
class Film:
    """What a decoded film shows. PSNR in dB against the known picture, empty without one."""

    frames: int = 0
    # No timestamp before the last one's. Equal ones happen in MP4, whose clock ticks 6000 times a second:
    # a picture that was captured just before a keepalive leaves 1 ns after it.
    monotonic: bool = True
    darkest: float = 255.0  # least mean luma of a picture, 16 is black
    flattest: float = 255.0  # least spread of luma in a picture, 0 is one colour
    psnr: list = field(default_factory=list)
    distinct: int = 0  # how many pictures differ from the one before; the first counts
    went_back: int = 0  # how often an older picture followed a newer one


def decoded(path, caps=RAW):
    """Yields (pts in ns, bytes, width, height) of each picture of an MP4 file."""
    pipeline = Gst.parse_launch(
        f"filesrc location={path} ! qtdemux ! h264parse ! avdec_h264 ! videoconvert ! {caps}"
        " ! appsink name=sink sync=false max-buffers=4"
    )
    sink = pipeline.get_by_name("sink")
    pipeline.set_state(Gst.State.PLAYING)
    try:
        while True:
            sample = sink.try_pull_sample(DECODE_TIMEOUT * Gst.SECOND)
            if sample is None:
                break
            buffer = sample.get_buffer()
            shape = sample.get_caps().get_structure(0)
            width, height = shape.get_int("width")[1], shape.get_int("height")[1]
            yield buffer.pts, buffer.extract_dup(0, buffer.get_size()), width, height
        message = pipeline.get_bus().pop_filtered(Gst.MessageType.ERROR)
        if message:
            error, detail = message.parse_error()
            raise VerifyError(f"{path}: {error.message} ({detail})")
        if not sink.is_eos():
            raise VerifyError(f"{path}: the decoder gave nothing for {DECODE_TIMEOUT} s")
    finally:
        pipeline.set_state(Gst.State.NULL)


def planes(data, width, height):
    """Y, U and V of a tightly packed I420 picture with even sides."""
    luma, quarter = width * height, width * height // 4
    pixels = numpy.frombuffer(data, numpy.uint8)
    half = (height // 2, width // 2)
    return (
        pixels[:luma].reshape(height, width),
        pixels[luma : luma + quarter].reshape(half),
        pixels[luma + quarter : luma + 2 * quarter].reshape(half),
    )


def mean_square(first, second):
    """Mean squared difference of two arrays of bytes."""
    difference = first.astype(numpy.int16) - second
    return float(numpy.square(difference, dtype=numpy.int32).mean())


def to_psnr(error):
    """Peak signal to noise ratio in dB of a mean squared difference of bytes; 99 for none."""
    return 99.0 if error == 0 else min(99.0, 10 * numpy.log10(255**2 / error))


class Pattern:
    """The known picture: finds out which of its frames a decoded picture shows, and how well."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        first, *_, last = self._generate(8)
        self.first = planes(first, width, height)
        self.period = width // pattern.SPEED
        # That a frame is the first one, rolled, is a fact about videotestsrc: check it.
        rolled = self.frame(7)
        if to_psnr(self._error(planes(last, width, height), rolled)) < 50:
            raise VerifyError("videotestsrc does not scroll as tests/pattern.py says")

    def frame(self, number):
        """Frame `number` as Y, U and V."""
        shift = number * pattern.SPEED
        luma, u, v = self.first
        return (
            numpy.roll(luma, -shift, axis=1),
            numpy.roll(u, -shift // 2, axis=1),
            numpy.roll(v, -shift // 2, axis=1),
        )

    def match(self, picture):
        """The number (0 to period - 1) of the frame that `picture` shows, and its PSNR in dB."""
        seen = picture[0][::SEARCH_STEP]
        lines = self.first[0][::SEARCH_STEP]
        errors = [
            mean_square(seen, numpy.roll(lines, -number * pattern.SPEED, axis=1))
            for number in range(self.period)
        ]
        number = int(numpy.argmin(errors))
        return number, to_psnr(self._error(picture, self.frame(number)))

    @staticmethod
    def _error(picture, other):
        """Mean squared difference over all samples: luma counts four times as much as each chroma."""
        weights = (4, 1, 1)
        sums = [w * mean_square(a, b) for w, a, b in zip(weights, picture, other)]
        return sum(sums) / sum(weights)

    def _generate(self, count):
        # Through RGB, as the picture came to the encoder.
        source = pattern.description(self.width, self.height, 30, live=False)
        pipeline = Gst.parse_launch(
            source.replace("videotestsrc", f"videotestsrc num-buffers={count}", 1)
            + f" ! videoconvert ! {RAW} ! appsink name=sink sync=false"
        )
        sink = pipeline.get_by_name("sink")
        pipeline.set_state(Gst.State.PLAYING)
        try:
            samples = [sink.try_pull_sample(DECODE_TIMEOUT * Gst.SECOND) for _ in range(count)]
        finally:
            pipeline.set_state(Gst.State.NULL)
        if None in samples:
            raise VerifyError("videotestsrc did not draw the known picture")
        buffers = [sample.get_buffer() for sample in samples]
        return [buffer.extract_dup(0, buffer.get_size()) for buffer in buffers]


def examine(path, known=None, sheet=None, expected_frames=0):
    """Decode a film. `known`: the Pattern it should show. `sheet`: where a contact sheet goes."""
    film = Film()
    contacts = ContactSheet(expected_frames)
    last_pts = last_number = None
    for pts, data, width, height in decoded(path):
        picture = planes(data, width, height)
        film.frames += 1
        film.monotonic &= last_pts is None or pts >= last_pts
        last_pts = pts
        film.darkest = min(film.darkest, float(picture[0].mean()))
        film.flattest = min(film.flattest, float(picture[0].std()))
        contacts.add(picture)
        if known is None:
            continue
        if (width, height) != (known.width, known.height):
            raise VerifyError(f"{path} is {width}x{height}, not {known.width}x{known.height}")
        number, psnr = known.match(picture)
        film.psnr.append(psnr)
        step = 0 if last_number is None else (number - last_number) % known.period
        film.went_back += step > known.period // 2
        film.distinct += last_number is None or step > 0
        last_number = number
    if sheet:
        contacts.write(sheet)
    return film


class ContactSheet:
    """COLUMNS x ROWS small pictures at equal distances through a film of known length."""

    COLUMNS, ROWS, SHRINK, GAP = 4, 3, 4, 4

    def __init__(self, frames):
        count = self.COLUMNS * self.ROWS
        self.wanted = {i * (frames - 1) // (count - 1) for i in range(count)}
        self.tiles = []
        self.seen = 0

    def add(self, picture):
        """Takes the next picture of the film, as Y, U and V."""
        if self.seen in self.wanted:
            self.tiles.append(self._tile(picture))
        self.seen += 1

    def write(self, path):
        """Write what was taken as a PNG file."""
        if not self.tiles:
            raise VerifyError(f"no picture for {path}")
        height, width, _ = self.tiles[0].shape
        across, down = width + self.GAP, height + self.GAP
        size = (self.ROWS * down + self.GAP, self.COLUMNS * across + self.GAP, 3)
        sheet = numpy.full(size, 32, numpy.uint8)
        for index, tile in enumerate(self.tiles):
            y = self.GAP + index // self.COLUMNS * down
            x = self.GAP + index % self.COLUMNS * across
            sheet[y : y + height, x : x + width] = tile[:height, :width]
        write_png(path, sheet)

    def _tile(self, picture):
        """A small RGB picture: block averages, then BT.709 with video range (ITU-R BT.709-6, 3)."""
        luma, u, v = picture
        small = self._average(luma, self.SHRINK)
        u, v = (self._average(plane, self.SHRINK // 2) - 128 for plane in (u, v))
        luma = (small - 16) * (255 / 219)
        scale = 255 / 224
        red = luma + scale * 1.5748 * v
        green = luma - scale * (0.1873 * u + 0.4681 * v)
        blue = luma + scale * 1.8556 * u
        return numpy.clip(numpy.dstack((red, green, blue)), 0, 255).astype(numpy.uint8)

    @staticmethod
    def _average(plane, side):
        height, width = (length // side * side for length in plane.shape)
        blocks = plane[:height, :width].reshape(height // side, side, width // side, side)
        return blocks.mean(axis=(1, 3))


def write_png(path, pixels):
    """Write height x width x 3 bytes as an RGB PNG file (W3C PNG, third edition)."""
    height, width, _ = pixels.shape

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    # Each row starts with its filter type, 0 for none.
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
        file.write(chunk(b"IDAT", zlib.compress(rows, 6)))
        file.write(chunk(b"IEND", b""))
