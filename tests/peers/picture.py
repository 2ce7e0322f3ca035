#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Pictures for the peers: a known moving pattern, and pixels in wire formats to I420 planes.

The pattern: colour bars that stand still, a white box that moves two pixels a frame to the right,
and along the top a bar code of the picture's number, so that a decoded picture tells which one it
is even after lossy encoding.
"""

import functools

import helix_wire as wire

FORMATS = {"BGRA": wire.FORMAT_BGRA, "RGBA": wire.FORMAT_RGBA, "NV12": wire.FORMAT_NV12}

BARS = ((128, 128, 128), (192, 192, 0), (0, 192, 192), (0, 160, 0), (192, 0, 192), (160, 0, 0),
        (0, 0, 192), (64, 64, 64))  # red, green, blue
CODE_BITS = 8
BOX = 16

# BT.601, limited range, as one table per channel. Each rounds for itself, which costs at most
# two steps against the exact sum, and keeps every byte's sum within the byte (see _sum).
_Y = tuple(bytes(round(o + k * i) for i in range(256)) for k, o in
           ((0.2568, 16), (0.5041, 0), (0.0979, 0)))
_U = tuple(bytes(round(o + k * i) for i in range(256)) for k, o in
           ((0.1482, 0), (0.2910, 0), (0.4392, 128)))
_V = tuple(bytes(round(o + k * i) for i in range(256)) for k, o in
           ((0.4392, 128), (0.3678, 0), (0.0714, 0)))


def _sum(plus, minus=()):
    """Byte-wise sum of planes at C speed: long integers, where no byte may carry or borrow."""
    total = sum(int.from_bytes(plane, "little") for plane in plus)
    total -= sum(int.from_bytes(plane, "little") for plane in minus)
    return total.to_bytes(len(plus[0]), "little")


def rgb_to_yuv(red, green, blue):
    """One colour as (y, u, v), rounded as the planes are."""
    return (
        _Y[0][red] + _Y[1][green] + _Y[2][blue],
        _U[2][blue] - _U[0][red] - _U[1][green],
        _V[0][red] - _V[1][green] - _V[2][blue],
    )


def to_i420(pixels, width, height, fourcc, stride):
    """Planes (y, u, v) of pixels as FRAME_REQUEST carries them, padded to even sizes.

    NV12: the stride is ignored, as deployed hosts do. BGRA, RGBA: chroma is that of the
    top-left pixel of each 2x2, a pattern of even blocks therefore keeps its colours.
    """
    if fourcc == wire.FORMAT_NV12:
        luma, chroma = pixels[: width * height], pixels[width * height : width * height * 3 // 2]
        return bytes(luma), bytes(chroma[0::2]), bytes(chroma[1::2])
    blue, red = (0, 2) if fourcc == wire.FORMAT_BGRA else (2, 0)
    rows = []
    for at in range(0, height * stride, stride):
        row = pixels[at : at + width * 4]
        rows.append(row + row[-4:] if width % 2 else row)
    if height % 2:
        rows.append(rows[-1])
    data = b"".join(rows)
    half = b"".join(row[:] for row in rows[0::2])
    red1, green1, blue1 = data[red::4], data[1::4], data[blue::4]
    red2, green2, blue2 = half[red::8], half[1::8], half[blue::8]
    return (
        _sum([c.translate(t) for c, t in zip((red1, green1, blue1), _Y)]),
        _sum([blue2.translate(_U[2])], [red2.translate(_U[0]), green2.translate(_U[1])]),
        _sum([red2.translate(_V[0])], [green2.translate(_V[1]), blue2.translate(_V[2])]),
    )


def _geometry(width, height):
    """Side of a bar code cell and of the box, both even, or 0 where the picture is too small."""
    cell = min(16, width // CODE_BITS // 2 * 2, height // 4 * 2)
    box = min(BOX, (height - cell) // 2 * 2, width // 2 * 2)
    return cell, max(box, 0)


def _rectangles(width, height, number):
    """(x, y, w, h, colour) of all that is drawn over the bars in picture `number`."""
    cell, box = _geometry(width, height)
    for bit in range(CODE_BITS if cell else 0):
        level = 235 if number >> bit & 1 else 16
        yield bit * cell, 0, cell, cell, (level, level, level)
    if box:
        x = number * 2 % max(width - box + 1, 1) // 2 * 2
        yield x, cell + (height - cell - box) // 4 * 2, box, box, (235, 235, 235)


@functools.lru_cache(4)
def _background(width, height, fourcc, stride):
    wide = -(-width // len(BARS) // 2) * 2 or 2
    colours = [BARS[min(x // wide, len(BARS) - 1)] for x in range(width)]
    if fourcc == wire.FORMAT_NV12:
        yuv = [rgb_to_yuv(*colour) for colour in colours]
        luma = bytes(y for y, _, _ in yuv)
        chroma = b"".join(bytes(uv) for _, *uv in yuv[0::2])
        return luma * height + chroma * (height // 2)
    row = b"".join(_pixel(colour, fourcc) for colour in colours)
    return (row + bytes(stride - len(row))) * height


def _pixel(colour, fourcc):
    red, green, blue = colour
    if fourcc == wire.FORMAT_BGRA:
        return bytes((blue, green, red, 255))
    return bytes((red, green, blue, 255))


def pattern(width, height, fourcc, stride, number):
    """Picture `number` of the pattern, as the bytes behind FRAME_REQUEST.

    `stride` in bytes, of plane 0; NV12 is always tight. Padding bytes are zero.
    """
    data = bytearray(_background(width, height, fourcc, stride))
    for left, top, wide, high, colour in _rectangles(width, height, number):
        if fourcc == wire.FORMAT_NV12:
            y, u, v = rgb_to_yuv(*colour)
            for line in range(top, top + high):
                data[line * width + left : line * width + left + wide] = bytes([y]) * wide
            for line in range(top // 2, (top + high) // 2):
                at = width * height + line * width + left
                data[at : at + wide] = bytes((u, v)) * (wide // 2)
        else:
            pixels = _pixel(colour, fourcc) * wide
            for line in range(top, top + high):
                at = line * stride + left * 4
                data[at : at + len(pixels)] = pixels
    return bytes(data)


def read_number(luma, width, height):
    """The number (mod 256) in the bar code of a decoded picture's tight luma plane."""
    cell, _ = _geometry(width, height)
    if not cell:
        return None
    line = cell // 2 * width
    cells = [luma[line + bit * cell + cell // 2] for bit in range(CODE_BITS)]
    return sum(1 << bit for bit, level in enumerate(cells) if level > 125)
