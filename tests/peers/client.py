#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""A client of the Helix protocol: as deployed ones behave, and as nobody should. See --help.

This file has the command line and the well-behaved part: encode (as the C encoder in guests),
subscribe (as the receiver of scanouts) and ping. client_faults.py misbehaves.
"""

import argparse
import collections
import json
import pathlib
import statistics
import sys
import time

import client_faults
import decode
import h264_pcm
import helix_wire as wire
import picture
from peer_net import Connection, PeerClosed, PeerSilent

PTS_TOLERANCE = 1000  # ns; a PTS in a reply went through double-precision seconds (quirk 3)

DESCRIPTION = """\
A client of the Helix frame-export protocol for tests, written from its description alone. Prints
one line of JSON and ends with 0 when the peer did what it should, else 1 with "problems" filled.
No wait is longer than --timeout."""

EPILOG = """\
examples:
  client.py tcp:127.0.0.1:15937 ping --probe
  client.py tcp:127.0.0.1:15937 encode --picture 640x480:NV12 --frames 120 --verify-psnr 30
  client.py tcp:127.0.0.1:15937 encode --picture 64x48:BGRA --picture 33x17:RGBA --hello
  client.py unix:/tmp/helix.sock subscribe 1 --frames 100 --output /tmp/scanout.h264
  client.py unix:/tmp/helix.sock vectors crates/helix-protocol/vectors/vectors.json
"""


class Result:
    """What the client prints: counts, and problems in words."""

    def __init__(self, **fields):
        self.fields = fields
        self.problems = []

    def problem(self, text):
        """Something the peer should not have done; at most 20 are kept."""
        if len(self.problems) < 20:
            self.problems.append(text)

    def finish(self):
        """Print, and give the exit code."""
        print(json.dumps(self.fields | {"problems": self.problems}))
        return 1 if self.problems else 0


CAPABILITIES = wire.CAP_REQUEST_IDS | wire.CAP_CONFIG_RESP | wire.CAP_KEYFRAME_REQ | wire.CAP_RESOURCE_IDS


def greet(connection, token=None, capabilities=CAPABILITIES):
    """HELLO and at once PING: the HELLO_RESP, or None for a legacy peer (PONG alone)."""
    tlvs = [(wire.TLV_NAME, b"tests/peers/client.py")]
    if token is not None:
        tlvs.append((wire.TLV_AUTH_TOKEN, token.encode()))
    fields = {
        "version": 1, "max_in_flight": 16, "capabilities": capabilities,
        "codecs": wire.CODEC_H264, "max_message": 64 * wire.MIB, "max_width": 8192,
        "max_height": 8192, "tlvs": tlvs,
    }
    hello = wire.pack(wire.Message(wire.HELLO, fields))
    connection.send(hello + wire.pack(wire.Message(wire.PING)))
    answer = connection.receive()
    if answer.type == wire.PONG:
        return None
    if answer.type != wire.HELLO_RESP:
        raise PeerClosed(f"HELLO answered with {wire.describe(answer)}")
    if not 1 <= answer.version <= fields["version"]:
        raise PeerClosed(f"HELLO_RESP: version {answer.version} for {fields['version']}")
    pong = connection.receive()
    if pong.type != wire.PONG:
        raise PeerClosed(f"HELLO_RESP is followed by {wire.describe(pong)}, not by PONG")
    connection.decoder.tagged = bool(answer.capabilities & capabilities & wire.CAP_REQUEST_IDS)
    return answer


def check_unit(result, reply, one_nal=True):
    """What every FRAME_RESPONSE must be: Annex B, SPS and PPS with keyframes and only there."""
    data = b"".join(reply.nals)
    kinds = h264_pcm.nal_types(data)
    where = f"reply with PTS {reply.pts}"
    if one_nal and reply.nal_count != 1:
        result.problem(f"{where}: nal_count {reply.nal_count}, legacy peers get 1")
    if not data.startswith((b"\0\0\1", b"\0\0\0\1")):
        result.problem(f"{where}: no Annex B start code in front: {data[:8].hex()}")
    idr = h264_pcm.NAL_IDR in kinds
    if idr != bool(reply.is_keyframe):
        result.problem(f"{where}: is_keyframe {reply.is_keyframe}, NAL types {kinds}")
    sets = [h264_pcm.NAL_SPS in kinds, h264_pcm.NAL_PPS in kinds]
    if idr and not all(sets):
        result.problem(f"{where}: keyframe without SPS and PPS, NAL types {kinds}")
    for remark in reply.remarks:
        result.problem(f"{where}: {remark}")
    return data


Open = collections.namedtuple("Open", "pts number sent_at request_id forced segment")


class Encode:
    """The command encode: CONFIG_REQ, then requests with pixels, replies matched in order."""

    def __init__(self, options):
        self.options = options
        self.result = Result(requests=0, replies=0, errors=0, missing=0, keyframes=0, bytes=0)
        self.open = collections.deque()
        self.units = collections.defaultdict(list)  # segment: [(picture number, bytes)]
        self.delays = []
        self.error_texts = collections.Counter()
        self.epoch = 0
        self.flushed = set()  # tags of requests whose replies are not wanted any more
        self.pongs = 0
        self.greeting = None

    def run(self):
        """Do it all; the exit code."""
        fields = self.result.fields
        try:
            with Connection(self.options.address, self.options.timeout) as self.connection:
                self._exchange()
        except (PeerClosed, PeerSilent, wire.WireError) as error:
            self.result.problem(f"{error} ({len(self.open)} requests open)")
        if self.delays:
            ordered = sorted(self.delays)
            fields["latency_ms"] = {
                "p50": round(statistics.median(ordered) * 1e3, 2),
                "p99": round(ordered[int(len(ordered) * 0.99)] * 1e3, 2),
            }
        fields["pongs"] = self.pongs
        fields["error_texts"] = dict(self.error_texts)
        if self.options.output:
            units = [unit for segment in self.units.values() for _, unit in segment]
            pathlib.Path(self.options.output).write_bytes(b"".join(units))
        if self.options.verify_psnr is not None:
            self._verify()
        return self.result.finish()

    def _exchange(self):
        options, number = self.options, 0
        if options.hello:
            self.greeting = greet(self.connection, options.token, options.capabilities)
            self.result.fields["peer"] = "hello" if self.greeting else "legacy"
        start = time.monotonic()
        for segment, (width, height, name) in enumerate(options.picture):
            self._configure(width, height)
            for index in range(options.frames):
                if options.realtime:
                    time.sleep(max(start + number / options.fps - time.monotonic(), 0))
                while len(self.open) >= options.in_flight:
                    self._take()
                flush = options.flush_every and number and number % options.flush_every == 0
                if flush:
                    self._flush()
                self._request(number, segment, width, height, name,
                              flush or options.gop and index % options.gop == 0)
                if options.ping_every and number % options.ping_every == 0:
                    self.connection.send(wire.Message(wire.PING, session_id=number & 0xFFFF))
                number += 1
        while self.open:
            self._take()
        self._end()

    def _configure(self, width, height):
        options = self.options
        fields = {"width": width, "height": height, "bitrate": options.bitrate,
                  "framerate_num": options.fps, "framerate_den": 1, "profile": 66, "level": 42,
                  "realtime": 1}
        self.connection.send(wire.Message(wire.CONFIG_REQ, fields, session_id=1))
        if self.greeting and self.greeting.capabilities & options.capabilities & wire.CAP_CONFIG_RESP:
            answer = self.connection.receive_only(wire.CONFIG_RESP)
            self.result.fields["config"] = answer.fields

    def _flush(self):
        """What is open is not wanted any more; its replies may come all the same."""
        self.flushed |= {(self.epoch, asked.request_id) for asked in self.open}
        self.open.clear()
        self.epoch = (self.epoch + 1) & 0xFF

    def _stale(self, message):
        """Whether a message belongs to a request from before a flush; then it is counted."""
        tag = (message.fields.get("epoch"), message.fields.get("request_id"))
        if tag not in self.flushed:
            return False
        self.flushed.remove(tag)
        self.result.fields["stale"] = self.result.fields.get("stale", 0) + 1
        return True

    def _request(self, number, segment, width, height, name, force):
        options = self.options
        fourcc = picture.FORMATS[name]
        stride = width if name == "NV12" else width * 4 + options.stride_pad
        pts = options.pts_start + number * 10**9 // options.fps
        fields = {"resource_id": options.resource, "width": width, "height": height,
                  "format": fourcc, "stride": stride, "pts": pts, "duration": 10**9 // options.fps,
                  "force_keyframe": int(force)}
        if not options.resource:
            even = (width + width % 2, height + height % 2) if name == "NV12" else (width, height)
            fields["width"], fields["height"] = even
            fields["stride"] = even[0] if name == "NV12" else stride
            fields["pixels"] = picture.pattern(*even, fourcc, fields["stride"], number)
        request_id = None
        if self.connection.decoder.tagged:
            request_id = number & 0xFFFF
            fields |= {"epoch": self.epoch, "request_id": request_id}
        self.open.append(Open(pts, number, time.monotonic(), request_id, force, segment))
        self.connection.send(wire.Message(wire.FRAME_REQUEST, fields, session_id=1))
        self.result.fields["requests"] += 1

    def _take(self):
        """One message of the host; or a request given up after the time limit."""
        fields = self.result.fields
        try:
            message = self.connection.receive()
        except PeerSilent:
            fields["missing"] += 1
            lost = self.open.popleft()
            if not self.options.allow_missing:
                self._explain_silence(lost)
            return
        if self._stale(message):
            return
        if message.type == wire.FRAME_RESPONSE:
            self._reply(message)
        elif message.type == wire.ERROR:
            fields["errors"] += 1
            if self.open and "request_id" in message.fields:
                tag, wanted = (message.epoch, message.request_id), (self.epoch, self.open[0].request_id)
                if tag != wanted:
                    self.result.problem(f"ERROR with tag {tag}, the oldest open request has {wanted}")
            self.error_texts[f"{message.error_code}: {message.message}"] += 1
            asked = self.open.popleft() if self.open else None
            if not self.options.allow_errors:
                self.result.problem(f"ERROR {message.error_code} {message.message!r} for {asked}")
        elif message.type == wire.PONG:
            self.pongs += 1
        elif message.name.startswith("0x"):
            fields["skipped_unknown"] = fields.get("skipped_unknown", 0) + 1
        else:
            self.result.problem(f"{message.name} while encoding")

    def _explain_silence(self, lost):
        self.connection.send(wire.Message(wire.PING, session_id=1))
        text = f"no reply to picture {lost.number} within {self.options.timeout} s"
        try:
            self.connection.receive_only(wire.PONG)
            text += ", though PING is answered"
            if not self.result.fields["replies"]:
                text += ": a second-generation host, which skips FRAME_REQUEST?"
        except PeerSilent:
            text += ", nor to PING: the host is dead or unreachable"
        raise PeerClosed(text)

    def _reply(self, reply):
        fields = self.result.fields
        asked = self._match(reply)
        if not asked:
            self.result.problem(f"reply with PTS {reply.pts} that no open request has")
            return
        self.delays.append(time.monotonic() - asked.sent_at)
        fields["replies"] += 1
        fields["keyframes"] += reply.is_keyframe
        data = check_unit(self.result, reply, one_nal=not self.greeting)
        fields["bytes"] += len(data)
        first = not self.units[asked.segment]
        if (asked.forced or first) and not reply.is_keyframe:
            self.result.problem(f"picture {asked.number}: no keyframe, though forced or first")
        self.units[asked.segment].append((asked.number, data))

    def _match(self, reply):
        """The request that a reply belongs to; those before it were skipped."""
        tagged = "request_id" in reply.fields
        for index, asked in enumerate(self.open):
            if tagged and (reply.epoch, reply.request_id) != (self.epoch, asked.request_id):
                continue
            if abs(reply.pts - asked.pts) > PTS_TOLERANCE:
                continue
            for _ in range(index):
                lost = self.open.popleft()
                self.result.fields["missing"] += 1
                if not self.options.allow_missing:
                    self.result.problem(f"no reply to picture {lost.number}")
            return self.open.popleft()
        return None

    def _end(self):
        """PING: whatever comes before its PONG is a reply too many."""
        self.connection.send(wire.Message(wire.PING, session_id=0xFFFF))
        while True:
            message = self.connection.receive()
            if message.type == wire.PONG and message.session_id == 0xFFFF:
                return
            if message.type == wire.PONG:
                self.pongs += 1
            elif not self._stale(message) and not message.name.startswith("0x"):
                self.result.problem(f"{message.name} that nobody asked for")

    def _verify(self):
        """Decode what came and compare it with what was sent."""
        worst = float("inf")
        for segment, units in self.units.items():
            width, height, name = self.options.picture[segment]
            if name == "NV12":
                width, height = width + width % 2, height + height % 2
            kind = "I420" if name == "NV12" else "BGRx"
            try:
                pictures = decode.decode(b"".join(unit for _, unit in units), width, height, kind)
            except decode.DecodeError as error:
                self.result.problem(str(error))
                continue
            if len(pictures) != len(units):
                self.result.problem(f"{len(pictures)} pictures decoded of {len(units)} replies")
            for (number, _), planes in zip(units, pictures):
                expected = self._expected(width, height, name, number)
                quality = min(decode.psnr(*pair) for pair in zip(expected, planes))
                worst = min(worst, quality)
                if quality < self.options.verify_psnr:
                    self.result.problem(f"picture {number}: {quality:.1f} dB")
        self.result.fields["psnr"] = "exact" if worst == float("inf") else round(worst, 2)

    @staticmethod
    def _expected(width, height, name, number):
        if name == "NV12":
            pixels = picture.pattern(width, height, wire.FORMAT_NV12, width, number)
            return picture.to_i420(pixels, width, height, wire.FORMAT_NV12, width)
        pixels = picture.pattern(width, height, wire.FORMAT_BGRA, width * 4, number)
        rows = [pixels[at : at + width * 4] for at in range(0, len(pixels), width * 4)]
        if width % 2:  # the host repeats the edge
            rows = [row + row[-4:] for row in rows]
        if height % 2:
            rows.append(rows[-1])
        return (b"".join(rows),)


class Subscribe:
    """The command subscribe: counts and checks pushed frames, and finds back into step."""

    def __init__(self, options):
        self.options = options
        self.result = Result(frames=0, keyframes=0, before_keyframe=0, bytes=0, pings=0,
                             resyncs=0, reconnects=0)
        self.stream = []
        self.last_pts = None
        self.steps = set()
        self.in_step = False

    def run(self):
        """Do it all; the exit code."""
        options, fields = self.options, self.result.fields
        self.until = time.monotonic() + options.seconds
        while not self._done():
            try:
                with Connection(options.address, options.timeout) as self.connection:
                    self._join()
                    while not self._done():
                        self._take()
                    self._leave()
            except (PeerClosed, PeerSilent, wire.WireError) as error:
                if options.broken != "reconnect" or fields["reconnects"] >= 5:
                    self.result.problem(str(error))
                    break
                fields["reconnects"] += 1
                fields["reconnect_reason"] = str(error)
                self.in_step, self.last_pts = False, None
        fields["pts_steps_ns"] = sorted(self.steps)[:5]
        if fields["frames"] < options.frames:
            self.result.problem(f"{fields['frames']} frames, {options.frames} expected")
        if options.output:
            pathlib.Path(options.output).write_bytes(b"".join(self.stream))
        if options.decode and self.stream:
            self._decode()
        return self.result.finish()

    def _done(self):
        wanted = self.options.frames
        return time.monotonic() >= self.until or wanted and self.result.fields["frames"] >= wanted

    def _join(self):
        number = self.options.scanout
        if self.options.hello:
            peer = greet(self.connection, self.options.token)
            self.result.fields["peer"] = "hello" if peer else "legacy"
        if self.options.enable:
            width, height, rate = self.options.enable
            fields = {"scanout_id": number, "width": width, "height": height, "refresh_rate": rate}
            self.connection.send(wire.Message(wire.ENABLE_SCANOUT, fields))
            answer = self.connection.receive_only(wire.SCANOUT_RESP)
            if not answer.success or answer.connector != f"Virtual-{number + 1}":
                raise PeerClosed(f"ENABLE_SCANOUT answered with {wire.describe(answer)}")
            self.result.fields["connector"] = answer.connector
        self.connection.send(wire.Message(wire.SUBSCRIBE, {"scanout_id": number}, number & 0xFFFF))
        answer = self.connection.receive_only(wire.SUBSCRIBE_RESP)
        if not answer.success or answer.scanout_id != number:
            raise PeerClosed(f"SUBSCRIBE answered with {wire.describe(answer)}")
        if self.options.bitrate:
            fields = {"width": 0, "height": 0, "bitrate": self.options.bitrate,
                      "framerate_num": 60, "framerate_den": 1, "profile": 66, "level": 42,
                      "realtime": 1}
            self.connection.send(wire.Message(wire.CONFIG_REQ, fields, session_id=number & 0xFFFF))

    def _leave(self):
        if self.options.enable:
            fields = {"scanout_id": self.options.scanout}
            self.connection.send(wire.Message(wire.DISABLE_SCANOUT, fields))

    def _take(self):
        left = max(self.until - time.monotonic(), 0)
        try:
            message = self.connection.receive(min(left, self.options.ping_after))
        except PeerSilent:
            # A still screen pushes nothing: silence is no error while PING is answered.
            self.connection.send(wire.Message(wire.PING, session_id=self.options.scanout & 0xFFFF))
            self.connection.receive_only(wire.PONG)
            self.result.fields["pings"] += 1
            return
        except wire.WireError:
            if self.options.broken != "resync":
                raise
            self.connection.decoder.resync()
            self.result.fields["resyncs"] += 1
            self.in_step = False
            return
        if message.type == wire.FRAME_RESPONSE:
            self._frame(message)
        elif message.type == wire.ERROR:
            self.result.problem(f"ERROR {message.error_code} {message.message!r}")
        elif not message.name.startswith("0x") and message.name != "CONFIG_RESP":
            self.result.problem(f"{message.name} while subscribed")

    def _frame(self, frame):
        fields = self.result.fields
        data = check_unit(self.result, frame, one_nal=not self.options.hello)
        if frame.session_id != self.options.scanout & 0xFFFF:
            self.result.problem(f"frame of session {frame.session_id}")
        if self.last_pts is not None:
            self.steps.add(frame.pts - self.last_pts)
            if frame.pts <= self.last_pts:
                self.result.problem(f"PTS {frame.pts} after {self.last_pts}")
        self.last_pts = frame.pts
        if frame.is_keyframe and not fields["keyframes"]:
            fields["first_keyframe"] = fields["before_keyframe"]
            most = self.options.keyframe_within
            if most is not None and fields["first_keyframe"] > most:
                self.result.problem(f"{fields['first_keyframe']} frames before a keyframe")
        self.in_step = self.in_step or bool(frame.is_keyframe)
        if not self.in_step:
            fields["before_keyframe"] += 1
            return
        fields["frames"] += 1
        fields["keyframes"] += frame.is_keyframe
        fields["bytes"] += len(data)
        self.stream.append(data)

    def _decode(self):
        width, height = self.options.decode
        try:
            pictures = decode.decode(b"".join(self.stream), width, height)
        except decode.DecodeError as error:
            self.result.problem(str(error))
            return
        self.result.fields["decoded"] = len(pictures)
        self.result.fields["numbers"] = [picture.read_number(p[0], width, height) for p in pictures]
        if len(pictures) != len(self.stream):
            self.result.problem(f"{len(pictures)} pictures decoded of {len(self.stream)} frames")


def ping(options):
    """The command ping."""
    result = Result(pongs=0)
    delays = []
    try:
        with Connection(options.address, options.timeout) as connection:
            if options.hello:
                answer = greet(connection, options.token)
                result.fields["peer"] = wire.describe(answer) if answer else "legacy"
            if options.probe:  # quirk 2: skipped by every peer, old or new
                connection.send(wire.pack_header(0x7F, 0, 0, 3) + b"???")
            for number in range(options.count):
                start = time.monotonic()
                session_id = (options.session_id + number) & 0xFFFF
                connection.send(wire.Message(wire.PING, session_id=session_id))
                answer = connection.receive()
                delays.append(time.monotonic() - start)
                if (answer.type, answer.session_id) != (wire.PONG, session_id):
                    result.problem(f"PING {session_id} answered with {wire.describe(answer)}")
                result.fields["pongs"] += 1
            result.fields["rtt_ms"] = round(statistics.median(delays) * 1e3, 3)
    except (PeerClosed, PeerSilent, wire.WireError) as error:
        result.problem(str(error))
    return result.finish()


def size(text):
    """WxH as two numbers."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def picture_option(text):
    """WxH:FORMAT as (width, height, format)."""
    dimensions, _, name = text.partition(":")
    if name not in picture.FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r}: format one of {', '.join(picture.FORMATS)}")
    return *size(dimensions), name


def mode(text):
    """WxH@HZ as three numbers."""
    dimensions, _, rate = text.partition("@")
    return *size(dimensions), int(rate)


def parse(arguments=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser("client.py", description=DESCRIPTION, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="tcp:HOST:PORT, tcp:[IPV6]:PORT or unix:PATH")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("--timeout", type=float, default=5.0, metavar="S", help="for each wait")
        return sub.add_argument

    add = command("encode", lambda options: Encode(options).run(),
                  "send pictures of a known moving pattern and take the replies in order")
    add("--picture", type=picture_option, action="append", metavar="WxH:FORMAT",
        help="BGRA, RGBA or NV12; several = a change in mid-stream (default 64x48:BGRA)")
    add("--frames", type=int, default=30, help="of each --picture")
    add("--fps", type=int, default=60, help="for the PTS")
    add("--realtime", action="store_true", help="send at that rate, not as fast as it goes")
    add("--gop", type=int, default=60, help="force_keyframe every so many pictures; 0 = never")
    add("--in-flight", type=int, default=1, help="requests open at once")
    add("--stride-pad", type=int, default=0, help="bytes behind each line (BGRA, RGBA)")
    add("--bitrate", type=int, default=4_000_000, help="bit/s, in CONFIG_REQ")
    add("--pts-start", type=int, default=0, help="ns")
    add("--resource", type=int, default=0, help="send this resource id and no pixels")
    add("--flush-every", type=int, default=0,
        help="a new epoch every so many pictures: replies to older ones are not wanted (with tags only)")
    add("--capabilities", type=int, default=CAPABILITIES, help="announced in HELLO")
    add("--ping-every", type=int, default=0, help="PING between the requests")
    add("--allow-missing", action="store_true", help="replies may be missing (quirk 3)")
    add("--allow-errors", action="store_true", help="ERRORs are fine")
    add("--output", help="write the H.264 there")
    add("--verify-psnr", type=float, metavar="DB",
        help="decode with avdec_h264; every picture must be this close to what was sent")
    add("--hello", action="store_true", help="offer the extensions")
    add("--token", help="auth token, in HELLO")

    add = command("subscribe", lambda options: Subscribe(options).run(),
                  "take the pushed frames of a scanout, from a keyframe on")
    add("scanout", type=int)
    add("--frames", type=int, default=0, help="end after so many; 0 = after --seconds")
    add("--seconds", type=float, default=10, help="end after so long")
    add("--enable", type=mode, metavar="WxH@HZ", help="ENABLE_SCANOUT first, DISABLE_SCANOUT last")
    add("--bitrate", type=int, default=0, help="CONFIG_REQ with it, bit/s")
    add("--keyframe-within", type=int, metavar="N", help="at most N frames before the first keyframe")
    add("--ping-after", type=float, default=1.0, metavar="S", help="of silence")
    add("--broken", choices=("reconnect", "resync", "fail"), default="reconnect",
        help="what to do when the stream is out of step (quirk 8)")
    add("--output", help="write the H.264 there")
    add("--decode", type=size, metavar="WxH", help="decode with avdec_h264 and count")
    add("--hello", action="store_true", help="offer the extensions")
    add("--token", help="auth token, in HELLO")

    add = command("ping", ping, "PING, and see that PONG echoes the session id")
    add("--count", type=int, default=3)
    add("--session-id", type=int, default=1)
    add("--probe", action="store_true", help="an unknown message first (quirk 2)")
    add("--hello", action="store_true", help="HELLO first; prints what the peer announces")
    add("--token", help="auth token, in HELLO")

    client_faults.add_commands(command)
    options = parser.parse_args(arguments)
    if options.command == "encode" and not options.picture:
        options.picture = [(64, 48, "BGRA")]
    options.result = Result()
    return options


def main():
    """The program."""
    options = parse()
    sys.exit(options.run(options))


if __name__ == "__main__":
    main()
