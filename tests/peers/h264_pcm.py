#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""An H.264 encoder that loses nothing, in pure Python: I_PCM and P_Skip macroblocks only.

A keyframe carries every macroblock as its 384 raw bytes (I_PCM). A picture between keyframes
repeats the macroblocks that did not change (P_Skip) and sends the others raw. So any decoder
shows exactly the bytes that went in, which makes pictures comparable byte by byte, and a stream
that lost a picture really shows it. It costs no encoding time to speak of and much bandwidth:
made for tests, not for viewers.

The stream is constrained baseline (or the same tools labelled main), Annex B, one slice for a
picture, SPS and PPS before each keyframe only, no reordering, and says so in its VUI.
Numbers in brackets are clauses of ITU-T H.264.
"""

import re

PROFILE_BASELINE = 66
PROFILE_MAIN = 77

NAL_NON_IDR, NAL_IDR, NAL_SPS, NAL_PPS = 1, 5, 7, 8
_START_CODE = b"\0\0\0\1"
_LOG2_MAX_FRAME_NUM = 4
_SLICE_P, _SLICE_I = 5, 7  # all slices of the picture are P, I (7.4.3)
_MB_I_PCM_IN_I, _MB_I_PCM_IN_P = 25, 30  # mb_type (table 7-11; plus 5 in P slices)
# (macroblocks of a picture, level_idc): MaxFS of table A-1. Bit rates are not kept, decoders
# do not mind.
_LEVELS = ((99, 10), (396, 20), (1620, 30), (3600, 31), (8192, 42), (8704, 42), (36864, 52))


class Bits:
    """A bit string, most significant bit first."""

    def __init__(self):
        self.text = []

    def u(self, width, value):
        """Unsigned, `width` bits."""
        self.text.append(f"{value:0{width}b}")
        return self

    def ue(self, *values):
        """Unsigned Exp-Golomb codes (9.1). For 0 that is also se(0)."""
        for value in values:
            code = f"{value + 1:b}"
            self.text.append("0" * (len(code) - 1) + code)
        return self

    def align(self):
        """Zero bits up to the next byte (pcm_alignment_zero_bit)."""
        self.text.append("0" * (-sum(map(len, self.text)) % 8))
        return self

    def stop(self):
        """rbsp_trailing_bits (7.3.2.11)."""
        return self.u(1, 1).align()

    def bytes(self):
        """The bits, which must be whole bytes by now."""
        text = "".join(self.text)
        return int(text, 2).to_bytes(len(text) // 8, "big") if text else b""


def nal_unit(kind, rbsp, ref_idc=3):
    """Start code, NAL header and the payload with emulation prevention (7.4.1)."""
    escaped = re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\x00\x00\x03", rbsp)
    return _START_CODE + bytes([ref_idc << 5 | kind]) + escaped


def nal_types(annex_b):
    """The nal_unit_type of each NAL unit in Annex B bytes; empty when there is no start code."""
    return [annex_b[match.end()] & 0x1F for match in re.finditer(rb"\x00\x00\x01(?=.)", annex_b, re.S)]


class Encoder:
    """Encodes pictures of one size. Width and height in pixels; odd ones are padded to even."""

    def __init__(self, width, height, gop=60, profile=PROFILE_BASELINE):
        self.width, self.height = width + width % 2, height + height % 2
        self.mb_width, self.mb_height = -(-width // 16), -(-height // 16)
        self.gop = gop
        self.profile = profile
        self.since_keyframe = None
        self.frame_num = 0
        self.idr_pic_id = 0
        self.previous = None

    def parameter_sets(self):
        """SPS and PPS as Annex B bytes."""
        macroblocks = self.mb_width * self.mb_height
        level = next((idc for most, idc in _LEVELS if macroblocks <= most), 62)
        constraints = 0xC0 if self.profile == PROFILE_BASELINE else 0x40
        sps = Bits().u(8, self.profile).u(8, constraints).u(8, level)
        # sps id, log2_max_frame_num - 4, pic_order_cnt_type 2 (output order is decoding order),
        # one reference frame, no gaps
        sps.ue(0, _LOG2_MAX_FRAME_NUM - 4, 2, 1).u(1, 0)
        sps.ue(self.mb_width - 1, self.mb_height - 1)
        sps.u(1, 1).u(1, 1)  # frames only, direct_8x8_inference
        right = (self.mb_width * 16 - self.width) // 2
        bottom = (self.mb_height * 16 - self.height) // 2
        if right or bottom:
            sps.u(1, 1).ue(0, right, 0, bottom)
        else:
            sps.u(1, 0)
        sps.u(1, 1)  # VUI
        sps.u(1, 0).u(1, 0)  # no aspect ratio, no overscan
        # video_signal_type: unspecified format, limited range, BT.601 as picture.py computes it
        sps.u(1, 1).u(3, 5).u(1, 0).u(1, 1).u(8, 6).u(8, 6).u(8, 6)
        sps.u(1, 0).u(1, 0).u(1, 0).u(1, 0).u(1, 0)  # chroma loc, timing, HRD twice, pic_struct
        # bitstream_restriction: no reordering, one frame held, so that no player waits
        sps.u(1, 1).u(1, 1).ue(0, 0, 0, 0, 0, 1)
        pps = Bits().ue(0, 0).u(1, 0).u(1, 0)  # CAVLC
        pps.ue(0, 0, 0).u(1, 0).u(2, 0)  # one slice group, one reference, no weights
        pps.ue(0, 0, 0).u(1, 1).u(1, 0).u(1, 0)  # QP 26, deblocking control present
        return nal_unit(NAL_SPS, sps.stop().bytes()) + nal_unit(NAL_PPS, pps.stop().bytes())

    def encode(self, y, u, v, force_keyframe=False):
        """One picture as an access unit, and whether it is a keyframe.

        Planes are tight bytes: y of (padded-to-even) width x height, u and v of half of both.
        """
        picture = self._pad(y, u, v)
        key = force_keyframe or self.since_keyframe is None or self.since_keyframe + 1 >= self.gop
        if key:
            self.since_keyframe = self.frame_num = 0
            self.idr_pic_id ^= 1
            unit = self.parameter_sets() + nal_unit(NAL_IDR, self._intra(picture))
        else:
            self.since_keyframe += 1
            self.frame_num = (self.frame_num + 1) % (1 << _LOG2_MAX_FRAME_NUM)
            unit = nal_unit(NAL_NON_IDR, self._changes(picture), ref_idc=2)
        self.previous = picture
        return unit, key

    def _pad(self, y, u, v):
        """Each macroblock row as its (y, u, v) bytes, edges repeated up to whole macroblocks."""

        def grow(plane, width, height, block, across, down):
            if len(plane) != width * height:
                raise ValueError(f"plane of {len(plane)} bytes, {width}x{height} expected")
            size = across * block
            if size != width:
                plane = b"".join(
                    plane[at : at + width] + plane[at + width - 1 : at + width] * (size - width)
                    for at in range(0, width * height, width)
                )
            plane += plane[-size:] * (down * block - height)
            band = size * block
            return [plane[at : at + band] for at in range(0, down * band, band)]

        across, down = self.mb_width, self.mb_height
        return list(zip(
            grow(y, self.width, self.height, 16, across, down),
            grow(u, self.width // 2, self.height // 2, 8, across, down),
            grow(v, self.width // 2, self.height // 2, 8, across, down),
        ))

    def _macroblocks(self, row):
        """The 384 bytes of each macroblock in a row of them."""
        wide, half = self.mb_width * 16, self.mb_width * 8
        lines = [(row[0], at, 16) for at in range(0, wide * 16, wide)]
        lines += [(plane, at, 8) for plane in row[1:] for at in range(0, half * 8, half)]
        return [
            b"".join([plane[at + x * n : at + x * n + n] for plane, at, n in lines])
            for x in range(self.mb_width)
        ]

    def _slice_header(self, kind):
        """slice_header (7.3.3) up to slice_data."""
        bits = Bits().ue(0, kind, 0).u(_LOG2_MAX_FRAME_NUM, self.frame_num)
        if kind == _SLICE_I:
            bits.ue(self.idr_pic_id).u(1, 0).u(1, 0)  # not long-term
        else:
            bits.u(1, 0).u(1, 0).u(1, 0)  # default reference count, list and marking
        return bits.ue(0, 1)  # QP as in the PPS, no deblocking

    def _intra(self, picture):
        """A slice of I_PCM macroblocks."""
        parts = [self._slice_header(_SLICE_I).ue(_MB_I_PCM_IN_I).align().bytes()]
        between = Bits().ue(_MB_I_PCM_IN_I).align().bytes()
        blocks = [block for row in picture for block in self._macroblocks(row)]
        parts.append(between.join(blocks))
        parts.append(Bits().stop().bytes())
        return b"".join(parts)

    def _changes(self, picture):
        """A P slice: P_Skip where nothing changed (motion is 0 all over), else I_PCM."""
        bits, parts, skipped = self._slice_header(_SLICE_P), [], 0
        for row, old in zip(picture, self.previous):
            if row == old:
                skipped += self.mb_width
                continue
            for block, before in zip(self._macroblocks(row), self._macroblocks(old)):
                if block == before:
                    skipped += 1
                    continue
                parts += [bits.ue(skipped, _MB_I_PCM_IN_P).align().bytes(), block]
                bits, skipped = Bits(), 0
        if skipped:
            bits.ue(skipped)
        parts.append(bits.stop().bytes())
        return b"".join(parts)
