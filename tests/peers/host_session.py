#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""One client of host.py: reads its messages, answers them in order, and breaks what it was told to.

Two tasks read and answer, so that the number of open requests can be seen (`max_open`); a third
pushes scanouts. All writing goes through `send`, where the faults are.
"""

import asyncio
import random
import socket
import zlib

import h264_pcm
import helix_wire as wire
import picture
from host_scanout import MAX_SCANOUTS, MAX_SIDE, Scanout

WRITE_LIMIT = 10.0
"""seconds that a client may take to read one message"""
PUSH_QUEUE = 4
"""pushed frames waiting for a client that does not read; then it counts as slow"""
PARTIAL_STEP = 1024
"""bytes given to the kernel at once where a frame may be sent in part"""
READ_AHEAD = 64
"""messages read and not yet answered"""

GENERATION_2 = {wire.ENABLE_SCANOUT, wire.DISABLE_SCANOUT, wire.SUBSCRIBE}
UNKNOWN = wire.pack_header(0x7E, 0, 0, 5) + b"hello"  # for --chatter

# Offsets in a FRAME_RESPONSE, for the faults
PAYLOAD_SIZE_AT, NAL_COUNT_AT, NAL_SIZE_AT = 8, 12 + 20, 12 + 24


class Goodbye(Exception):
    """The connection ends, for this reason."""


class Session:
    """One connection."""

    def __init__(self, host, sock, number):
        self.host, self.options, self.sock, self.number = host, host.options, sock, number
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.options.sndbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.options.sndbuf)
        self.loop = asyncio.get_running_loop()
        self.decoder = wire.Decoder()
        self.inbox = asyncio.Queue(READ_AHEAD)
        self.pushes = asyncio.Queue(PUSH_QUEUE)
        self.lock = asyncio.Lock()
        self.scanout = None
        self.encoder = None
        self.held = []  # replies, for --reorder
        self.late_hello = None  # HELLO_RESP, for --hello-late
        self.configured = self.force_keyframe = False
        self.capabilities = 0
        self.greeted = self.awaits_ping = False
        self.received = self.answered = self.requests = self.sent = self.frames = self.violations = 0
        self.open = self.max_open = 0
        self.ended = self.loop.create_future()  # set by those who are no task of this session

    def event(self, name, **fields):
        """Print what happened to this client."""
        self.host.event(event=name, client=self.number, **fields)

    def violation(self, what):
        """Print what a well-behaved client does not do."""
        self.violations += 1
        self.event("violation", what=what)

    async def run(self):
        """The connection's life."""
        self.event("connect")
        tasks = [asyncio.ensure_future(work()) for work in (self._read, self._answer, self._pusher)]
        tasks.append(self.ended)
        reason = "host ends"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Goodbye as goodbye:
            reason = str(goodbye)
        except OSError as error:
            reason = f"connection lost: {error}"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.scanout:
                self.scanout.unsubscribe(self)
            self.sock.close()
            self.host.sessions.discard(self)
            self.event("disconnect", reason=reason, messages=self.received, frames=self.frames,
                       requests=self.requests, max_open=self.max_open, violations=self.violations)

    # Reading

    async def _read(self):
        while True:
            await self._silence_if_due()
            message = self._next()
            if message is None:
                try:
                    # Not wait_for, which in Python 3.11 can lose a cancellation.
                    async with asyncio.timeout(self.options.idle):
                        data = await self.loop.sock_recv(self.sock, 1 << 18)
                except TimeoutError:
                    raise Goodbye("idle") from None
                if not data:
                    if self.decoder.buffer:
                        self.violation(f"closed within a message, {len(self.decoder.buffer)} bytes in")
                    await self.inbox.join()
                    raise Goodbye("client closed")
                self.decoder.feed(data)
                continue
            self.received += 1
            if message.type == wire.FRAME_REQUEST:
                self.open += 1
                self.max_open = max(self.max_open, self.open)
            self._hold_to_limits(message)
            if message.type == wire.HELLO and self.options.hello and not self.options.hello_late:
                self.capabilities = self.options.capabilities & message.capabilities
                self.decoder.tagged = bool(self.capabilities & wire.CAP_REQUEST_IDS)
            await self.inbox.put(message)

    def _hold_to_limits(self, message):
        """HELLO_RESP announced them. One that comes late is none for the client."""
        if not self.greeted or self.options.hello_late:
            return
        in_flight, size = self.options.max_in_flight, self.options.max_message
        if message.type == wire.FRAME_REQUEST and self.open > in_flight:
            self.violation(f"{self.open} requests open, {in_flight} allowed")
        if size and message.size > size:
            self.violation(f"{message.name} of {message.size} bytes, {size} allowed")

    def _next(self):
        try:
            return self.decoder.next()
        except wire.WireError as error:
            self.violation(str(error))
            raise Goodbye(f"cannot be read on: {error}") from None

    async def _silence_if_due(self):
        if self.options.silent_after is not None and self.received >= self.options.silent_after:
            await self.inbox.join()
            self.event("silent")
            await self.lock.acquire()  # nothing is written either
            await asyncio.sleep(self.options.idle)
            raise Goodbye("idle")

    # Answering, in order

    async def _answer(self):
        while True:
            message = await self.inbox.get()
            self.answered += 1
            self._report(message)
            self._refuse_stranger(message)
            handler = self._HANDLERS.get(message.type)
            if self.options.generation == "1" and message.type in GENERATION_2:
                handler = None
            if handler:
                await handler(self, message)
            if message.type == wire.FRAME_REQUEST:
                self.open -= 1
            self.inbox.task_done()

    def _report(self, message):
        fields = wire.describe(message)
        if "pixels" in message.fields:
            fields["pixels"] = len(message.pixels)
            fields["pixels_crc32"] = zlib.crc32(message.pixels)
        self.event("message", **fields)
        for remark in message.remarks:
            self.violation(f"{message.name}: {remark}")
        table = wire.TABLES.get(message.type)
        if table and table.direction == wire.TO_CLIENT:
            self.violation(f"{message.name} is a host's message")
        if self.awaits_ping and message.type != wire.PING:
            self.violation("HELLO is not followed by PING")
        self.awaits_ping = message.type == wire.HELLO

    def _refuse_stranger(self, message):
        if self.options.token is not None and not self.greeted and message.type != wire.HELLO:
            raise Goodbye("no HELLO with the token")

    async def _frame_request(self, request):
        self.requests += 1
        if self.options.generation == "2":
            return None
        if self._due(self.options.drop_reply):
            return None
        if self._due(self.options.error_every):
            return await self._error(wire.ERROR_ENCODE_FAILED, "encode failed (--error-every)", request)
        if self.options.need_config and not self.configured:
            return await self._error(wire.ERROR_NOT_CONFIGURED, "no CONFIG_REQ yet", request)
        problem = wire.check_request(request)
        if not problem and max(request.width, request.height) > MAX_SIDE:
            problem = wire.WireError("width, height", max(request.width, request.height), MAX_SIDE,
                                     "too large to encode")
        if problem:
            self.violation(f"FRAME_REQUEST: {problem}")
            return await self._error(wire.ERROR_INVALID_MESSAGE, str(problem), request)
        if "pixels" not in request.fields:
            if self.options.resources == "error":
                text = f"resource {request.resource_id} not found"
                return await self._error(wire.ERROR_RESOURCE_NOT_FOUND, text, request)
            if self.options.resources == "silent":
                return None
        elif request.format == wire.FORMAT_NV12 and request.stride != request.width:
            self.violation(f"NV12 stride {request.stride} with width {request.width}: it is ignored")
        return await self._reply(request)

    def _due(self, every):
        return every and self.requests % every == 0

    async def _reply(self, request):
        unit, key = self._encode(request)
        pts = {
            "exact": request.pts,
            "double": min(max(int(request.pts / 1e9 * 1e9), wire.I64_MIN), -wire.I64_MIN - 1),
            "micros": request.pts // 1000 * 1000,
        }[self.options.pts]
        fields = {
            "pts": pts,
            "dts": {"pts": pts, "zero": 0, "min": wire.I64_MIN}[self.options.dts],
            "is_keyframe": int(key),
            "nals": self._nals(unit),
        }
        reply = wire.Message(wire.FRAME_RESPONSE, fields | self._tags(request), request.session_id)
        for _ in range(2 if self.options.reply_twice else 1):
            await self._send_reply(reply)

    async def _send_reply(self, reply):
        if not self.decoder.tagged:
            return await self.send(reply)
        if self.options.stray:
            for name, other in (("epoch", 0xA5), ("request_id", 0xA5A5)):
                fields = reply.fields | {name: reply.fields[name] ^ other}
                await self.send(wire.Message(wire.FRAME_RESPONSE, fields, reply.session_id))
        self.held.append(reply)
        if len(self.held) >= self.options.reorder:
            for held in reversed(self.held):
                await self.send(held)
            self.held = []
        return None

    def _encode(self, request):
        width, height = request.width, request.height
        encoder = self.encoder
        if not encoder or (encoder.width, encoder.height) != (width + width % 2, height + height % 2):
            options = self.options
            self.encoder = h264_pcm.Encoder(width, height, options.gop, options.profile)
        fourcc, stride = request.format, request.stride
        pixels = request.fields.get("pixels")
        if pixels is None:  # --resources wrong: some other picture
            fourcc, stride = wire.FORMAT_BGRA, width * 4
            pixels = bytes((255, 0, 255, 255)) * (width * height)
        planes = picture.to_i420(pixels, width, height, fourcc, stride)
        force = bool(request.force_keyframe) or self.force_keyframe
        self.force_keyframe = False
        return self.encoder.encode(*planes, force_keyframe=force)

    def _nals(self, unit):
        if not self.options.split_nals:
            return [unit]
        return [b"\0\0\0\1" + part for part in unit.split(b"\0\0\0\1")[1:]]

    def _tags(self, request):
        return {name: request.fields[name] for name in ("epoch", "request_id")
                if name in request.fields}

    async def _error(self, code, text, request=None):
        fields = {"error_code": code, "message": text}
        session_id = 0
        if request:
            fields |= self._tags(request)
            session_id = request.session_id
        elif self.decoder.tagged:
            fields |= {"epoch": 0, "request_id": 0}
        await self.send(wire.Message(wire.ERROR, fields, session_id))

    async def _ping(self, ping):
        await self.send(wire.Message(wire.PONG, {}, ping.session_id))
        if self.late_hello:
            await self.send(self.late_hello)
            self.late_hello = None

    async def _keyframe_req(self, _):
        if self.capabilities & wire.CAP_KEYFRAME_REQ:  # deployed hosts skip it
            self.force_keyframe = True
            if self.scanout:
                self.scanout.restart = True

    async def _config_req(self, config):
        self.configured = True
        if self.scanout:
            self.scanout.configure(config.bitrate)
        if self.capabilities & wire.CAP_CONFIG_RESP:
            fields = config.fields | {"profile": self.options.profile}
            await self.send(wire.Message(wire.CONFIG_RESP, fields, config.session_id))

    async def _enable_scanout(self, message):
        number = message.scanout_id
        success = (number < MAX_SCANOUTS and 0 < message.width <= MAX_SIDE
                   and 0 < message.height <= MAX_SIDE and message.refresh_rate > 0)
        mode = (message.width, message.height, message.refresh_rate)
        if success and number in self.host.scanouts:
            self.host.scanouts[number].resize(*mode)
        elif success:
            self.host.scanouts[number] = Scanout(self.host, number, *mode)
        fields = {
            "scanout_id": number,
            "success": int(success),
            "connector": f"Virtual-{number + 1}" if success else "",
        }
        await self.send(wire.Message(wire.SCANOUT_RESP, fields, message.session_id))

    async def _disable_scanout(self, message):
        if message.scanout_id in self.host.scanouts:
            self.host.scanouts[message.scanout_id].enabled = False

    async def _subscribe(self, message):
        number = message.scanout_id
        if message.session_id != number:
            self.violation(f"SUBSCRIBE: session_id {message.session_id}, scanout_id {number}")
        scanout = self.host.scanouts.get(number) if number < MAX_SCANOUTS else None
        fields = {"scanout_id": number, "success": int(scanout is not None)}
        await self.send(wire.Message(wire.SUBSCRIBE_RESP, fields, number & 0xFFFF))
        if scanout:
            if self.scanout:
                self.scanout.unsubscribe(self)
            self.scanout = scanout
            scanout.subscribe(self)

    async def _hello(self, hello):
        if not self.options.hello:
            return  # a legacy host: skipped as an unknown type
        if self.answered > 1:
            self.violation("HELLO is not the first message")
        if self.options.token is not None:
            token = dict(hello.tlvs).get(wire.TLV_AUTH_TOKEN)
            if token != self.options.token.encode():
                await self._error(wire.ERROR_INVALID_MESSAGE, "the auth token is missing or wrong")
                raise Goodbye("wrong token")
        self.greeted = True
        fields = {
            "version": min(hello.version, 1),
            "max_in_flight": self.options.max_in_flight,
            "capabilities": self.options.capabilities,
            "codecs": self.options.codecs,
            "max_message": self.options.max_message,
            "max_width": MAX_SIDE,
            "max_height": MAX_SIDE,
            "tlvs": [(wire.TLV_NAME, b"tests/peers/host.py"), (wire.TLV_ENCODER, b"I_PCM")],
        }
        answer = wire.Message(wire.HELLO_RESP, fields, hello.session_id)
        if self.options.hello_late:
            self.late_hello = answer
            return
        await self.send(answer)
        if self.options.hello_twice:
            nothing = fields | {"capabilities": 0, "max_in_flight": 0, "codecs": 0, "max_message": 0}
            await self.send(wire.Message(wire.HELLO_RESP, nothing, hello.session_id))

    _HANDLERS = {
        wire.FRAME_REQUEST: _frame_request,
        wire.KEYFRAME_REQ: _keyframe_req,
        wire.CONFIG_REQ: _config_req,
        wire.PING: _ping,
        wire.ENABLE_SCANOUT: _enable_scanout,
        wire.DISABLE_SCANOUT: _disable_scanout,
        wire.SUBSCRIBE: _subscribe,
        wire.HELLO: _hello,
    }

    # Pushing

    def push(self, message):
        """A scanout's frame for this client, or the end of a client that does not read."""
        if self.pushes.full():
            if self.options.slow == "close" and self.scanout:
                self.scanout.unsubscribe(self)
                self.ended.set_exception(Goodbye("slow"))
            return
        self.pushes.put_nowait(message)

    async def _pusher(self):
        while True:
            await self.send(await self.pushes.get(), pushed=True)

    # Writing, and what goes wrong there

    async def send(self, message, pushed=False):
        """Write a message, with the faults that are due."""
        if self.options.late and message.type in (wire.FRAME_RESPONSE, wire.ERROR) and not pushed:
            await asyncio.sleep(self.options.late / 1000)
        async with self.lock:
            options = self.options
            data = bytearray(wire.pack(message))
            if options.garbage_after is not None and self.sent >= options.garbage_after:
                self.event("fault", what="garbage")
                data = random.Random(self.sent).randbytes(4096)
            elif options.truncate_after is not None and self.sent >= options.truncate_after:
                self.event("fault", what="truncated")
                await self._write(data[: len(data) // 2])
                raise Goodbye("truncated (--truncate-after)")
            elif message.type == wire.FRAME_RESPONSE:
                data = self._damaged(data)
            if options.chatter:
                data = UNKNOWN + data
            self.sent += 1
            self.event("sent", **wire.describe(message))
            if pushed and options.slow == "partial":
                self._write_what_fits(data)
            else:
                await self._write(data)

    def _damaged(self, data):
        self.frames += 1
        options = self.options
        if self.frames == options.fault_at:
            for value, at in ((options.payload_size, PAYLOAD_SIZE_AT),
                              (options.nal_count, NAL_COUNT_AT), (options.nal_size, NAL_SIZE_AT)):
                if value is not None:
                    self.event("fault", what=f"{value} at byte {at}")
                    data[at : at + 4] = value.to_bytes(4, "little")
        if self.frames == options.partial_at:
            self.event("fault", what="partial")
            data = data[: len(data) // 2]
        return data

    async def _write(self, data):
        step = 1 if self.options.split else len(data)
        try:
            async with asyncio.timeout(WRITE_LIMIT):
                for at in range(0, len(data), step):
                    await self.loop.sock_sendall(self.sock, data[at : at + step])
        except TimeoutError:
            raise Goodbye("client does not read") from None

    def _write_what_fits(self, data):
        """One build writes without looking at the count, and goes on (quirk 8).

        In small steps, for the kernel takes the last piece that fits whole, however large.
        """
        count = 0
        try:
            while count < len(data):
                count += self.sock.send(data[count : count + PARTIAL_STEP])
        except BlockingIOError:
            self.event("fault", what=f"{count} of {len(data)} bytes sent")
