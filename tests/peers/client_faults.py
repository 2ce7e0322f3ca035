#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The commands of client.py that no well-behaved client does, or that need a crowd of clients.

What a host may do with the one who misbehaves: answer ERROR or close. What it must do: serve
everybody else, meanwhile and afterwards.
"""

import collections
import json
import pathlib
import random
import select
import threading
import time

import helix_wire as wire
import picture
from peer_net import Connection, PeerClosed, PeerSilent

TROUBLE = (PeerClosed, PeerSilent, wire.WireError)


def still_serves(options, when):
    """A new client gets its PONG; else a problem."""
    try:
        with Connection(options.address, options.timeout) as connection:
            connection.send(wire.Message(wire.PING, session_id=77))
            answer = connection.receive()
            if (answer.type, answer.session_id) != (wire.PONG, 77):
                options.result.problem(f"{when}: PING answered with {wire.describe(answer)}")
    except TROUBLE as error:
        options.result.problem(f"{when}: a new client is not served: {error}")


def refusal(connection, limit):
    """How the host refused: "error", "closed", or None when it did neither within `limit` seconds.

    Other messages before that are skipped.
    """
    deadline = time.monotonic() + limit
    try:
        while True:
            message = connection.receive(max(deadline - time.monotonic(), 0))
            if message.type == wire.ERROR:
                return "error"
    except (PeerClosed, wire.WireError):
        return "closed"
    except PeerSilent:
        return None


def garbage(options):
    """Random bytes; every second time with a right magic and a size over every limit."""
    counts = collections.Counter()
    for index in range(options.rounds):
        source = random.Random(options.seed + index)
        data = source.randbytes(options.bytes)
        if index % 2:
            size = 64 * wire.MIB + 45 + source.randrange(1 << 30)
            data = wire.pack_header(source.randrange(256), 0, 0, size) + data
        try:
            with Connection(options.address, options.timeout) as connection:
                try:
                    connection.send(data)
                except PeerClosed:
                    pass  # it may close before it took them all
                how = refusal(connection, options.timeout)
        except TROUBLE as error:
            options.result.problem(f"round {index}: {error}")
            continue
        counts[how or "ignored"] += 1
        if how is None:
            options.result.problem(f"round {index}: neither ERROR nor closed: {data[:12].hex()}")
    still_serves(options, "after garbage")
    options.result.fields |= counts
    return options.result.finish()


def sample_request(number=0, width=64, height=48):
    """A good FRAME_REQUEST with pixels."""
    fields = {"resource_id": 0, "width": width, "height": height, "format": wire.FORMAT_BGRA,
              "stride": width * 4, "pts": number * 16_666_667, "duration": 16_666_667,
              "force_keyframe": 0,
              "pixels": picture.pattern(width, height, wire.FORMAT_BGRA, width * 4, number)}
    return wire.Message(wire.FRAME_REQUEST, fields, session_id=1)


def truncate(options):
    """A request that ends too early, then the connection does."""
    data = wire.pack(sample_request())
    cuts = options.at or [1, 4, 11, 12, 13, 55, 56, 57, len(data) // 2, len(data) - 1]
    for cut in cuts:
        try:
            with Connection(options.address, options.timeout) as connection:
                connection.send(data[:cut])
        except TROUBLE as error:
            options.result.problem(f"cut at {cut}: {error}")
    still_serves(options, "after truncated requests")
    options.result.fields["cuts"] = len(cuts)
    return options.result.finish()


def silent(options):
    """Connect and say nothing, or half a message; others must be served meanwhile."""
    start = time.monotonic()
    with Connection(options.address, options.timeout) as connection:
        if options.half:
            data = wire.pack(sample_request())
            connection.send(data[: len(data) // 2])
        still_serves(options, "beside a silent client")
        closed = connection.wait_closed(options.seconds)
    options.result.fields["closed_after_s"] = round(time.monotonic() - start, 2) if closed else None
    if options.expect != "either" and closed != (options.expect == "closed"):
        options.result.problem(f"connection {'closed' if closed else 'open'} after {options.seconds} s")
    still_serves(options, "after a silent client")
    return options.result.finish()


def flood(options):
    """Requests without reading a single reply; then all replies are read."""
    result, fields = options.result, options.result.fields
    fields |= {"requests": options.requests, "replies": 0, "errors": 0, "stalled": False}
    requests = (sample_request(n, *options.size) for n in range(options.requests))
    data = memoryview(b"".join(wire.pack(request) for request in requests))
    try:
        with Connection(options.address, options.timeout) as connection:
            while data:
                if not select.select([], [connection.sock], [], 1)[1]:
                    fields["stalled"] = True  # the host waits for us to read: as it should
                    break
                data = data[connection.sock.send(data) :]
            still_serves(options, "beside a client that does not read")
            connection.send(bytes(data))
            while fields["replies"] + fields["errors"] < options.requests:
                message = connection.receive()
                fields["replies"] += message.type == wire.FRAME_RESPONSE
                fields["errors"] += message.type == wire.ERROR
    except (*TROUBLE, OSError) as error:
        fields["ended"] = str(error)
        if options.expect == "answers":
            result.problem(f"{error} after {fields['replies']} replies, {fields['errors']} ERRORs")
    still_serves(options, "after a flood")
    return result.finish()


def slow_reader(options):
    """Subscribe and read too slowly; another client's PINGs and another subscriber are watched."""
    result, fields = options.result, options.result.fields
    fields |= {"bytes": 0, "closed": False, "out_of_step": False, "other_frames": 0}
    end = time.monotonic() + options.seconds
    longest = 0.0

    def other():
        try:
            with Connection(options.address, options.timeout) as connection:
                subscribe(connection, options.scanout)
                while time.monotonic() < end:
                    fields["other_frames"] += connection.receive().type == wire.FRAME_RESPONSE
        except TROUBLE as error:
            result.problem(f"the other subscriber: {error}")

    watcher = threading.Thread(target=other)
    watcher.start()
    try:
        with (Connection(options.address, options.timeout) as slow,
              Connection(options.address, options.timeout) as pinger):
            subscribe(slow, options.scanout)
            while time.monotonic() < end:
                start = time.monotonic()
                pinger.send(wire.Message(wire.PING, session_id=1))
                pinger.receive_only(wire.PONG)
                longest = max(longest, time.monotonic() - start)
                if not fields["closed"]:
                    read_slowly(slow, options.rate // 10, fields)
                time.sleep(0.1)  # the rate is what this is about
            read_rest(slow, fields)
    except TROUBLE as error:
        result.problem(str(error))
    watcher.join()
    fields["longest_ping_ms"] = round(longest * 1e3, 1)
    if longest > 1:
        result.problem(f"another client waited {longest:.1f} s for its PONG")
    if not fields["other_frames"]:
        result.problem("the other subscriber got nothing")
    return result.finish()


def subscribe(connection, number):
    """SUBSCRIBE, or PeerClosed."""
    connection.send(wire.Message(wire.SUBSCRIBE, {"scanout_id": number}, number))
    answer = connection.receive_only(wire.SUBSCRIBE_RESP)
    if not answer.success:
        raise PeerClosed(f"scanout {number} is not there")


def read_slowly(connection, most, fields):
    """At most `most` bytes, as a client that has no time."""
    try:
        data = connection.sock.recv(most)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    fields["closed"] = not data
    fields["bytes"] += len(data)
    parse_on(connection, data, fields)


def read_rest(connection, fields):
    """What already lies in the socket: is the stream still in step?"""
    try:
        while not fields["closed"] and select.select([connection.sock], [], [], 0)[0]:
            data = connection.sock.recv(1 << 20)
            fields["closed"] = not data
            parse_on(connection, data, fields)
    except OSError:
        fields["closed"] = True


def parse_on(connection, data, fields):
    """Decode bytes only to see whether they are messages."""
    connection.decoder.feed(data)
    try:
        while not fields["out_of_step"] and connection.decoder.next():
            pass
    except wire.WireError:
        fields["out_of_step"] = True


def crowd(options):
    """Many clients at once: how many are served, and what happens to the others (quirk 12)."""
    served, refused, connections = 0, 0, []
    try:
        for index in range(options.clients):
            try:
                connection = Connection(options.address, options.timeout)
                connections.append(connection)
                connection.send(wire.Message(wire.PING, session_id=index & 0xFFFF))
                connection.receive_only(wire.PONG)
                served += 1
            except TROUBLE:
                refused += 1
    finally:
        for connection in connections:
            connection.sock.close()
    options.result.fields |= {"served": served, "refused": refused}
    if options.served is not None and served != options.served:
        options.result.problem(f"{served} of {options.clients} served, {options.served} expected")
    return options.result.finish()


def hello_faults(options):
    """HELLOs that break the description, each on its own connection: ERROR and an end."""
    def hello(msg_type=wire.HELLO, tlvs=b"", **changes):
        fields = {"version": 1, "max_in_flight": 2, "capabilities": 7, "codecs": wire.CODEC_H264,
                  "max_message": wire.MIB, "max_width": 64, "max_height": 64,
                  "fixed_size": wire.HELLO_FIXED_SIZE, "tlvs": []} | changes
        data = wire.pack(wire.Message(msg_type, fields))
        return wire.pack_header(msg_type, 0, 0, len(data) - wire.HEADER.size + len(tlvs)) + data[
            wire.HEADER.size :] + tlvs

    ping = wire.pack(wire.Message(wire.PING, session_id=3))
    faults = {
        "version 0": hello(version=0),
        "fixed_size over the payload": hello(fixed_size=0xFFFF),
        "fixed_size under 32": hello(fixed_size=16),
        "half a TLV head": hello(tlvs=b"\1\0\4"),
        "a TLV longer than the payload": hello(tlvs=b"\1\0\xff\xff" + b"name"),
        "4 GiB announced": wire.pack_header(wire.HELLO, 0, 0, 0xFFFFFFFF),
        "1 MiB of TLVs": hello(tlvs=b"\x63\0\xfc\0" * (wire.MIB // 256)),
        "twice": hello() + hello(),
        "after a PING": ping + hello(),
    }
    for name, data in faults.items():
        try:
            with Connection(options.address, options.timeout) as connection:
                try:
                    connection.send(data)
                except PeerClosed:
                    pass  # it may close before it took them all
                if name == "twice":  # the first was good, so ERROR has its tag
                    connection.receive_only(wire.HELLO_RESP)
                    connection.decoder.tagged = True
                how = refusal(connection, options.timeout)
                if how != "error":
                    options.result.problem(f"{name}: {how or 'ignored'}, not an ERROR")
                elif not connection.wait_closed(options.timeout):
                    options.result.problem(f"{name}: still open after the ERROR")
        except TROUBLE as error:
            options.result.problem(f"{name}: {error}")
    still_serves(options, "after broken HELLOs")
    options.result.fields["faults"] = len(faults)
    return options.result.finish()


def stranger(options):
    """A host with a token: whoever does not begin with it gets one ERROR that says so, and an end."""
    def hello(*tlvs):
        fields = {"version": 1, "max_in_flight": 2, "capabilities": 7, "codecs": wire.CODEC_H264,
                  "max_message": wire.MIB, "max_width": 64, "max_height": 64, "tlvs": list(tlvs)}
        return wire.pack(wire.Message(wire.HELLO, fields))

    firsts = {
        "PING": wire.pack(wire.Message(wire.PING)),
        "FRAME_REQUEST": wire.pack(sample_request()),
        "SUBSCRIBE": wire.pack(wire.Message(wire.SUBSCRIBE, {"scanout_id": 0})),
        "an unknown message": wire.pack_header(0x7F, 0, 0, 3) + b"???",
        "HELLO without a token": hello(),
        "HELLO with an empty token": hello((wire.TLV_AUTH_TOKEN, b"")),
        "HELLO with another token": hello((wire.TLV_AUTH_TOKEN, b"not it")),
        "HELLO with 3000 bytes of token": hello((wire.TLV_AUTH_TOKEN, b"x" * 3000)),
    }
    for name, data in firsts.items():
        try:
            with Connection(options.address, options.timeout) as connection:
                connection.send(data + wire.pack(wire.Message(wire.PING, session_id=9)))
                answer = connection.receive()
                if answer.type != wire.ERROR or "token" not in answer.message:
                    options.result.problem(f"{name}: answered with {wire.describe(answer)}")
                elif connection.messages or not connection.wait_closed(options.timeout):
                    options.result.problem(f"{name}: still open after the ERROR")
        except TROUBLE as error:
            options.result.problem(f"{name}: {error}")
    options.result.fields["refused"] = len(firsts)
    return options.result.finish()


def vectors(options):
    """Every malformed vector for hosts, each on its own connection, then every good one."""
    def may_skip(entry):
        # A HELLO is an unknown message to a legacy host, which skips it.
        return "hello" in entry["name"] and not options.hello

    result = options.result
    data = json.loads(pathlib.Path(options.file).read_text())
    counts = collections.Counter()
    for entry in data["malformed"]:
        if entry["direction"] == wire.TO_CLIENT:
            continue
        try:
            with Connection(options.address, options.timeout) as connection:
                connection.send(bytes.fromhex(entry["hex"]))
                if entry["level"] == "framing":
                    how = refusal(connection, 0.3 if may_skip(entry) else options.timeout)
                else:
                    how = connection.receive_only(wire.ERROR) and "error"
                    connection.send(wire.Message(wire.PING, session_id=5))
                    connection.receive_only(wire.PONG)
        except TROUBLE as error:
            result.problem(f"{entry['name']}: {error}")
            continue
        counts[f"{entry['level']}: {how or 'ignored'}"] += 1
        if how is None and not may_skip(entry):
            result.problem(f"{entry['name']}: neither ERROR nor closed")
    for entry in data["messages"] + data["decode_only"]:
        if entry["direction"] == wire.TO_CLIENT or "tagged" in entry["name"]:
            continue
        try:
            with Connection(options.address, options.timeout) as connection:
                connection.send(bytes.fromhex(entry["hex"]))
                connection.send(wire.Message(wire.PING, session_id=4242))
                while connection.receive_only(wire.PONG).session_id != 4242:
                    pass
            counts["good"] += 1
        except TROUBLE as error:
            result.problem(f"{entry['name']}: a good message, but then: {error}")
    still_serves(options, "after all vectors")
    result.fields |= counts
    return result.finish()


def add_commands(command):
    """The commands of this file; `command(name, function, help)` gives their add_argument."""
    add = command("garbage", garbage, "send random bytes; the host must refuse and go on")
    add("--rounds", type=int, default=10)
    add("--bytes", type=int, default=4096, help="per round")
    add("--seed", type=int, default=1)

    add = command("truncate", truncate, "close within a message; the host must go on")
    add("--at", type=int, action="append", help="bytes; several; default: all interesting places")

    add = command("silent", silent, "connect and say nothing; others must be served")
    add("--seconds", type=float, default=5.0, help="wait so long for the host to close")
    add("--half", action="store_true", help="send half a request first")
    add("--expect", choices=("open", "closed", "either"), default="either")

    add = command("flood", flood, "send requests without reading replies, then read them all")
    add("--requests", type=int, default=200)
    add("--size", type=lambda text: tuple(map(int, text.split("x"))), default=(64, 48),
        metavar="WxH")
    add("--expect", choices=("answers", "any"), default="answers",
        help="an answer to each, or anything that leaves the host alive")

    add = command("slow-reader", slow_reader, "subscribe, read slowly; others must not suffer")
    add("scanout", type=int)
    add("--rate", type=int, default=10_000, help="bytes a second")
    add("--seconds", type=float, default=5.0)

    add = command("crowd", crowd, "many clients at once")
    add("--clients", type=int, default=17)
    add("--served", type=int, help="so many must be served, no more and no less")

    command("hello-faults", hello_faults, "HELLOs that break the rules; the host must refuse and go on")
    command("stranger", stranger, "a host with a token must refuse all who do not know it")

    add = command("vectors", vectors, "send the host every byte vector that is for hosts")
    add("file", help="crates/helix-protocol/vectors/vectors.json")
    add("--hello", action="store_true", help="the host speaks HELLO, so it must refuse broken ones")
