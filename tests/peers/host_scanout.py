#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""A scanout of host.py: a moving picture, encoded once and pushed to every subscriber."""

import asyncio

import h264_pcm
import helix_wire as wire
import picture

PUSH_PTS_STEP = 16_666_667
"""ns between pushed frames by their PTS, whatever their real rate is (quirk 7)"""
MAX_SCANOUTS = 16  # quirk 12
MAX_SIDE = 8192  # pixels


class Scanout:
    """One scanout. It starts with its first subscriber, and then never stops for lack of one.

    Picture 0 counts as made before anybody came, so newcomers, the first one too, get no
    keyframe until the GOP ends, unless the host was told to be kinder than deployed ones.
    """

    def __init__(self, host, number, width, height, fps):
        self.host, self.number = host, number
        self.width, self.height, self.fps = width, height, fps
        self.subscribers = set()
        self.bitrate = None
        self.enabled = True
        self.restart = False
        self.task = None
        self.frame = 0
        self._new_encoder()

    def _new_encoder(self):
        options = self.host.options
        self.encoder = h264_pcm.Encoder(self.width, self.height, options.push_gop, options.profile)

    def subscribe(self, session):
        """Push to this session from the next picture on."""
        self.subscribers.add(session)
        if self.host.options.keyframe_on_subscribe:
            self.restart = True
        if self.task is None:
            self.task = self.host.spawn(self._run())

    def unsubscribe(self, session):
        """Push no more to this session."""
        self.subscribers.discard(session)

    def configure(self, bitrate):
        """CONFIG_REQ on a subscribed connection: only the bit rate counts, and the encoder restarts
        (quirk 11)."""
        self.bitrate = bitrate
        self.restart = True

    def resize(self, width, height, fps):
        """ENABLE_SCANOUT: a new mode, and a keyframe with it."""
        changed = (self.width, self.height) != (width, height)
        self.width, self.height, self.fps = width, height, fps
        self.enabled = True
        if changed:
            self._new_encoder()

    async def _run(self):
        loop = asyncio.get_running_loop()
        at = loop.time()
        if not self.host.options.keyframe_on_subscribe:
            self._encode()
        while True:
            still = self.host.options.push_still
            if self.enabled and not (still and self.frame > still):
                self._push(*self._encode())
            # A host that fell behind goes on from now, it does not hurry after lost time.
            at = max(at + 1 / max(self.fps, 1), loop.time())
            await asyncio.sleep(at - loop.time())

    def _encode(self):
        stride = self.width * 4
        pixels = picture.pattern(self.width, self.height, wire.FORMAT_BGRA, stride, self.frame)
        planes = picture.to_i420(pixels, self.width, self.height, wire.FORMAT_BGRA, stride)
        unit, key = self.encoder.encode(*planes, force_keyframe=self.restart)
        self.restart = False
        self.frame += 1
        return unit, key

    def _push(self, unit, key):
        pts = (self.frame - 1) * PUSH_PTS_STEP
        fields = {"pts": pts, "dts": pts, "is_keyframe": int(key), "nals": [unit]}
        message = wire.Message(wire.FRAME_RESPONSE, fields, session_id=self.number)
        for session in list(self.subscribers):
            session.push(message)
