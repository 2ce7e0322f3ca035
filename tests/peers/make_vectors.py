#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Write crates/helix-protocol/vectors/vectors.json, or with --check say whether it is current.

The vectors are built from the tables of helix_wire.py; what they mean is in the README beside
the file. Every message of the protocol is there at least once, in its smallest and its most
awkward forms, then messages that only a receiver meets, then bytes that must be refused.
"""

import argparse
import json
import pathlib
import struct
import sys

import helix_wire as wire
from helix_wire import MIB, Message, WireError

TARGET = pathlib.Path(__file__).resolve().parents[2] / "crates/helix-protocol/vectors/vectors.json"

# Short stand-ins for H.264: the bytes matter to the framing, not to a decoder.
SPS = bytes.fromhex("0000000167420020")
PPS = bytes.fromhex("0000000168ce3c80")
IDR = bytes.fromhex("000000016588843f")
NON_IDR = bytes.fromhex("00000001419a0240")

BGRA_2X2 = bytes.fromhex("0000ffff" "00ff00ff" "ff0000ff" "ffffffff")
NV12_2X2 = bytes.fromhex("10eb8030" "80ff")
U32_MAX, I64_MIN, I64_MAX = (1 << 32) - 1, wire.I64_MIN, (1 << 63) - 1


def request(**changes):
    """FRAME_REQUEST for a 2x2 BGRA resource, at the second frame of 60 a second."""
    fields = {
        "resource_id": 7,
        "width": 2,
        "height": 2,
        "format": wire.FORMAT_BGRA,
        "stride": 8,
        "pts": 16_666_667,
        "duration": 16_666_667,
        "force_keyframe": 0,
    }
    return Message(wire.FRAME_REQUEST, fields | changes, session_id=1)


def with_pixels(pixels=BGRA_2X2, **changes):
    """FRAME_REQUEST with pixels instead of a resource."""
    message = request(resource_id=0, **changes, pixels=pixels)
    message.flags = wire.FLAG_PIXEL_DATA
    return message


def response(nals, session_id=1, **changes):
    """FRAME_RESPONSE with these NAL units."""
    fields = {"pts": 16_666_667, "dts": 16_666_667, "is_keyframe": 0, "nal_count": len(nals)}
    return Message(wire.FRAME_RESPONSE, fields | changes | {"nals": nals}, session_id)


def config(msg_type, **changes):
    """CONFIG_REQ or CONFIG_RESP for 1080p60 at 4 Mbit/s."""
    fields = {
        "width": 1920,
        "height": 1080,
        "bitrate": 4_000_000,
        "framerate_num": 60,
        "framerate_den": 1,
        "profile": 66,
        "level": 42,
        "realtime": 1,
    }
    return Message(msg_type, fields | changes, session_id=1)


def hello(msg_type, tlvs=(), **changes):
    """HELLO or HELLO_RESP with modest values."""
    fields = {
        "version": 1,
        "fixed_size": wire.HELLO_FIXED_SIZE,
        "max_in_flight": 2,
        "capabilities": wire.CAP_REQUEST_IDS | wire.CAP_CONFIG_RESP | wire.CAP_KEYFRAME_REQ,
        "codecs": wire.CODEC_H264,
        "max_message": 12 + 44 + 64 * MIB,
        "max_width": 8192,
        "max_height": 8192,
    }
    return Message(msg_type, fields | changes | {"tlvs": list(tlvs)})


def error(code, text, **tags):
    """ERROR, in the long form when `epoch` and `request_id` are given."""
    return Message(wire.ERROR, {"error_code": code, "message": text} | tags, session_id=1)


def scanout(msg_type, scanout_id, session_id=0, **fields):
    """One of the messages about scanouts."""
    return Message(msg_type, {"scanout_id": scanout_id} | fields, session_id)


def messages():
    """(name, message) of all that both sides write."""
    tags = {"epoch": 3, "request_id": 258}
    top = {"epoch": 255, "request_id": 65535}
    for name, msg_type in (("config_req", wire.CONFIG_REQ), ("config_resp", wire.CONFIG_RESP)):
        yield f"{name}_1080p60", config(msg_type)
        yield f"{name}_ntsc_main", config(
            msg_type, framerate_num=60000, framerate_den=1001, profile=77, level=31, realtime=0
        )
        yield f"{name}_bitrate_max", config(msg_type, bitrate=U32_MAX, profile=100, level=52)

    yield "frame_request_resource", request()
    yield "frame_request_resource_max_id", request(resource_id=U32_MAX)
    yield "frame_request_force_keyframe", request(force_keyframe=1)
    yield "frame_request_negative_pts", request(pts=-1, duration=-1)
    yield "frame_request_extreme_times", request(pts=I64_MIN, duration=I64_MAX)
    yield "frame_request_pixels_bgra", with_pixels()
    yield "frame_request_pixels_bgra_padded_stride", with_pixels(
        BGRA_2X2[:8] + bytes(8) + BGRA_2X2[8:] + bytes(8), stride=16
    )
    yield "frame_request_pixels_bgra_odd_size", with_pixels(
        bytes(range(12)), width=1, height=3, stride=4
    )
    yield "frame_request_pixels_rgba", with_pixels(format=wire.FORMAT_RGBA)
    yield "frame_request_pixels_nv12", with_pixels(NV12_2X2, format=wire.FORMAT_NV12, stride=2)
    yield "frame_request_tagged_resource", request(**tags)
    yield "frame_request_tagged_pixels", with_pixels(**top, force_keyframe=1)
    yield "frame_request_tagged_zero", request(epoch=0, request_id=0)

    yield "frame_response_delta", response([NON_IDR])
    yield "frame_response_keyframe_one_nal", response([SPS + PPS + IDR], is_keyframe=1)
    yield "frame_response_keyframe_three_nals", response([SPS, PPS, IDR], is_keyframe=1)
    yield "frame_response_negative_pts", response([NON_IDR], pts=-16_666_667, dts=-33_333_334)
    yield "frame_response_dts_min", response([NON_IDR], dts=I64_MIN)
    yield "frame_response_dts_zero", response([NON_IDR], dts=0)
    yield "frame_response_pts_max", response([NON_IDR], pts=I64_MAX, dts=I64_MAX)
    yield "frame_response_empty_nal", response([SPS, b"", IDR], is_keyframe=1)
    yield "frame_response_no_nal", response([])
    yield "frame_response_pushed_scanout_15", response(
        [SPS + PPS + IDR], session_id=15, pts=60 * 16_666_667, dts=0, is_keyframe=1
    )
    yield "frame_response_tagged_delta", response([NON_IDR], **tags)
    yield "frame_response_tagged_keyframe", response([SPS, PPS, IDR], **top, is_keyframe=1)

    yield "keyframe_req", Message(wire.KEYFRAME_REQ, session_id=1)
    yield "ping", Message(wire.PING, session_id=1)
    yield "ping_session_max", Message(wire.PING, session_id=65535)
    yield "pong", Message(wire.PONG, session_id=1)
    yield "pong_session_max", Message(wire.PONG, session_id=65535)

    yield "enable_scanout", scanout(
        wire.ENABLE_SCANOUT, 1, width=1920, height=1080, refresh_rate=60
    )
    yield "disable_scanout", scanout(wire.DISABLE_SCANOUT, 1)
    yield "scanout_resp_success", scanout(
        wire.SCANOUT_RESP, 1, success=1, connector="Virtual-2"
    )
    yield "scanout_resp_failure", scanout(wire.SCANOUT_RESP, 16, success=0, connector="")
    yield "scanout_resp_longest_terminated_name", scanout(
        wire.SCANOUT_RESP, 1, success=1, connector="V" * 63
    )
    yield "subscribe", scanout(wire.SUBSCRIBE, 1, session_id=1)
    yield "subscribe_last_scanout", scanout(wire.SUBSCRIBE, 15, session_id=15)
    yield "subscribe_resp_success", scanout(wire.SUBSCRIBE_RESP, 1, session_id=1, success=1)
    yield "subscribe_resp_failure", scanout(wire.SUBSCRIBE_RESP, 15, session_id=15, success=0)

    yield "hello_bare", hello(wire.HELLO)
    yield "hello_nothing", hello(
        wire.HELLO, max_in_flight=1, capabilities=0, codecs=0, max_message=0, max_width=0,
        max_height=0,
    )
    yield "hello_name_and_token", hello(
        wire.HELLO, [(wire.TLV_NAME, b"vsockenc"), (wire.TLV_AUTH_TOKEN, b"\x00secret\xff")]
    )
    yield "hello_empty_tlv", hello(wire.HELLO, [(wire.TLV_NAME, b"")])
    yield "hello_resp_bare", hello(wire.HELLO_RESP)
    yield "hello_resp_all", hello(
        wire.HELLO_RESP,
        [(wire.TLV_NAME, b"helix-host"), (wire.TLV_ENCODER, b"x264enc"),
         (wire.TLV_HOST_CLOCK_ID, bytes(range(16)))],
        max_in_flight=65535, capabilities=0x1FF, codecs=7, max_message=U32_MAX,
        max_width=65535, max_height=65535,
    )

    for code, text in (
        (0, ""),
        (-1, "invalid message"),
        (-2, "resource 7 not found"),
        (-3, "no native texture"),
        (-4, "no native surface"),
        (-5, "encode failed"),
        (-6, "not configured"),
        (-99, "internal error: \u00fc\u2192"),
    ):
        yield f"error_{-code}", error(code, text)
    yield "error_longest_terminated_text", error(-99, "e" * 255)
    yield "error_tagged", error(-5, "encode failed", **tags)
    yield "error_tagged_max", error(-2, "resource 7 not found", **top)


def decode_only():
    """(name, message as it must be understood, bytes) of what only a receiver meets."""

    def patched(message, *patches):
        data = bytearray(wire.pack(message))
        for offset, replacement in patches:
            start = wire.HEADER.size + offset
            data[start : start + len(replacement)] = replacement
        return message, bytes(data)

    # Reserved bytes are ignored on receipt.
    yield "frame_request_reserved_not_zero", *patched(request(), (37, b"\xff" * 7))
    yield "frame_response_reserved_not_zero", *patched(response([NON_IDR]), (17, b"\xff" * 3))
    yield "config_req_reserved_not_zero", *patched(config(wire.CONFIG_REQ), (23, b"\xff" * 5))
    yield "hello_reserved_not_zero", *patched(
        hello(wire.HELLO), (6, b"\xff\xff"), (28, b"\xff" * 4)
    )
    # Texts may fill their field without a NUL, or have garbage behind it.
    yield "scanout_resp_name_without_nul", *patched(
        scanout(wire.SCANOUT_RESP, 1, success=1, connector="V" * 64)
    )
    yield "error_text_without_nul", *patched(error(-99, "e" * 256))
    yield "error_garbage_behind_nul", *patched(
        error(-5, "encode failed"), (4 + len("encode failed") + 1, b"\xcc" * 8)
    )
    # A later version: a longer fixed part is skipped up to the first TLV, unknown TLVs too.
    longer = hello(
        wire.HELLO_RESP, [(wire.TLV_NAME, b"later"), (0xBEEF, b"\x01\x02\x03")], version=2,
        fixed_size=40,
    )
    data = wire.pack(longer)
    data = data[: 12 + 32] + b"\xaa" * 8 + data[12 + 32 :]
    yield "hello_resp_longer_fixed_part_unknown_tlv", longer, data[:8] + struct.pack(
        "<I", len(data) - 12
    ) + data[12:]
    # Unknown types are read and dropped.
    for name, msg_type, payload in (
        ("unknown_type_empty", 0x7F, b""),
        ("unknown_type_with_payload", 0x06, bytes(range(32))),
        ("unknown_type_payload_looks_like_ping", 0xFE, wire.pack(Message(wire.PING))),
    ):
        head = wire.pack_header(msg_type, 0x80, 9, len(payload))
        yield name, Message(msg_type, {}, 9, 0x80), head + payload


def header(msg_type, size, flags=0):
    """A header with a payload size of our choice."""
    return wire.pack_header(msg_type, flags, 1, size)


def malformed():
    """(name, level, direction, bytes, field, value, limit, reason) of what must be refused."""
    ping = wire.pack(Message(wire.PING, session_id=1))
    to_host, to_client = wire.TO_HOST, wire.TO_CLIENT

    for name, magic in (
        ("magic_big_endian", b"RFXH"),
        ("magic_zero", bytes(4)),
        ("magic_last_byte_wrong", b"HXFr"),
        ("magic_http", b"GET "),
    ):
        yield (name, "framing", to_host, magic + ping[4:], "magic",
               int.from_bytes(magic, "little"), wire.MAGIC, "not the magic of this protocol")

    for name, msg_type, direction, limit, flags in (
        ("frame_request", wire.FRAME_REQUEST, to_host, 44 + 64 * MIB, wire.FLAG_PIXEL_DATA),
        ("frame_response", wire.FRAME_RESPONSE, to_client, 24 + 4 * 4096 + 16 * MIB, 0),
        ("unknown_type", 0x7F, to_host, 64 * MIB, 0),
    ):
        yield (f"{name}_payload_one_over_limit", "framing", direction,
               header(msg_type, limit + 1, flags), "payload_size", limit + 1, limit,
               "refused from the header alone, before anything is allocated")
    for name, msg_type, direction, flags in (
        ("frame_request", wire.FRAME_REQUEST, to_host, wire.FLAG_PIXEL_DATA),
        ("frame_response", wire.FRAME_RESPONSE, to_client, 0),
        ("ping", wire.PING, to_host, 0),
        ("hello", wire.HELLO, to_host, 0),
        ("error", wire.ERROR, to_client, 0),
        ("unknown_type", 0x7F, to_host, 0),
    ):
        yield (f"{name}_payload_u32_max", "framing", direction, header(msg_type, U32_MAX, flags),
               "payload_size", U32_MAX, None, "refused from the header alone")

    for msg_type, table in wire.TABLES.items():
        if not table.size:
            continue
        direction = table.direction
        for size in sorted({0, table.size - 1}):
            yield (f"{table.name.lower()}_payload_{size}_bytes", "framing", direction,
                   header(msg_type, size) + bytes(size), "payload_size", size, table.size,
                   f"shorter than the fixed part of {table.name}")

    def nals(count, body):
        fixed = struct.pack("<qqB3xI", 0, 0, 1, count)
        return header(wire.FRAME_RESPONSE, len(fixed) + len(body)) + fixed + body

    one = struct.pack("<I", len(IDR)) + IDR
    for name, data, field, value, limit, reason in (
        ("nal_count_one_over_limit", nals(4097, struct.pack("<I", 0) * 4097), "nal_count", 4097,
         4096, "too many NAL units"),
        ("nal_count_u32_max", nals(U32_MAX, one), "nal_count", U32_MAX, 4096,
         "too many NAL units"),
        ("nal_count_more_than_payload", nals(2, one), "nal_count", 2, 1,
         "the payload ends before the second size"),
        ("nal_size_cut", nals(2, one + b"\x01\x00\x00"), "nal_count", 2, 1,
         "the payload ends in the middle of the second size"),
        ("nal_size_one_over_payload", nals(1, struct.pack("<I", len(IDR) + 1) + IDR), "size",
         len(IDR) + 1, len(IDR), "NAL unit longer than the payload"),
        ("nal_size_u32_max", nals(1, struct.pack("<I", U32_MAX) + IDR), "size", U32_MAX, len(IDR),
         "NAL unit longer than the payload"),
        ("nal_second_size_over_payload", nals(2, one + struct.pack("<I", 1)), "size", 1, 0,
         "the second NAL unit is longer than the payload"),
        ("nal_sizes_wrap_u32", nals(2, one + struct.pack("<I", U32_MAX - 7) + IDR), "size",
         U32_MAX - 7, len(IDR), "a sum in 32 bits would wrap to zero"),
    ):
        yield f"frame_response_{name}", "framing", to_client, data, field, value, limit, reason

    def raw_hello(tlvs, msg_type=wire.HELLO, fixed_size=32):
        body = bytearray(wire.pack(hello(msg_type, fixed_size=fixed_size)))[12:] + tlvs
        return header(msg_type, len(body)) + body

    for name, tlvs, fixed_size, field, value, limit, reason in (
        ("fixed_size_31", b"", 31, "fixed_size", 31, 32, "shorter than the fixed part"),
        ("fixed_size_0", b"", 0, "fixed_size", 0, 32, "shorter than the fixed part"),
        ("fixed_size_over_payload", b"", 33, "fixed_size", 33, 32, "behind the payload"),
        ("fixed_size_u16_max", b"", 65535, "fixed_size", 65535, 32, "behind the payload"),
        ("tlv_head_cut", b"\x01\x00\x00", 32, "TLVs", 3, 4, "bytes left that are no TLV"),
        ("tlv_length_over_payload", b"\x01\x00\x05\x00name", 32, "length", 5, 4,
         "TLV longer than the payload"),
        ("tlv_length_u16_max", b"\x01\x00\xff\xff", 32, "length", 65535, 0,
         "TLV longer than the payload"),
        ("tlv_second_length_over_payload", b"\x01\x00\x01\x00x\x02\x00\x01\x00", 32, "length", 1,
         0, "the second TLV is longer than the payload"),
    ):
        for prefix, msg_type, direction in (
            ("hello", wire.HELLO, to_host), ("hello_resp", wire.HELLO_RESP, to_client)
        ):
            yield (f"{prefix}_{name}", "framing", direction, raw_hello(tlvs, msg_type, fixed_size),
                   field, value, limit, reason)

    # Framing is right, the content is not: a host answers ERROR and goes on with the connection.
    nv12 = {"format": wire.FORMAT_NV12, "stride": 2}
    for name, message, field, value, limit, reason in (
        ("width_0", with_pixels(b"", width=0), "width", 0, 1, "no picture"),
        ("height_0", with_pixels(b"", height=0), "height", 0, 1, "no picture"),
        ("format_unknown", with_pixels(format=0x34325258), "format", 0x34325258, None,
         "XR24 is not one of AR24, AB24, NV12"),
        ("pixels_one_short", with_pixels(BGRA_2X2[:-1]), "payload_size", 44 + 15, 44 + 16,
         "stride * height bytes are needed"),
        ("pixels_none", with_pixels(b""), "payload_size", 44, 44 + 16,
         "PIXEL_DATA without pixels"),
        ("stride_one_short", with_pixels(stride=7), "stride", 7, 8, "width * 4 bytes are needed"),
        ("stride_times_height_wraps_u32", with_pixels(stride=1 << 31, height=2), "payload_size",
         44 + 16, 44 + (1 << 32), "stride * height is 2^32, which is 0 in 32 bits"),
        ("width_times_4_wraps_u32", with_pixels(width=1 << 30, stride=0), "stride", 0, 1 << 32,
         "width * 4 is 2^32, which is 0 in 32 bits"),
        ("nv12_pixels_one_short", with_pixels(NV12_2X2[:-1], **nv12), "payload_size", 44 + 5,
         44 + 6, "width * height * 3 / 2 bytes are needed"),
        ("nv12_odd_width", with_pixels(NV12_2X2, **nv12 | {"width": 1}), "width", 1, None,
         "NV12 has no odd sizes"),
        ("nv12_odd_height", with_pixels(NV12_2X2, **nv12 | {"height": 1}), "height", 1, None,
         "NV12 has no odd sizes"),
        ("resource_0_without_pixels", request(resource_id=0), "resource_id", 0, 1,
         "made one host encode the VM's own console: never sent, never served"),
    ):
        yield (f"frame_request_{name}", "content", to_host, wire.pack(message), field, value,
               limit, reason)


def plain(fields):
    """Fields as JSON has them: bytes as hex, a TLV as an object."""
    result = {}
    for name, value in fields.items():
        if name == "tlvs":
            value = [{"type": kind, "value": data.hex()} for kind, data in value]
        elif name == "nals":
            value = [nal.hex() for nal in value]
        elif isinstance(value, bytes):
            value = value.hex()
        result[name] = value
    return result


def entry(name, message, data):
    """One entry of `messages` or `decode_only`."""
    table = wire.TABLES.get(message.type)
    return {
        "name": name,
        "direction": table.direction if table else wire.BOTH,
        "type": message.type,
        "flags": message.flags,
        "session_id": message.session_id,
        "fields": plain(message.fields),
        "hex": data.hex(),
    }


def build():
    """The whole file as a dict, after the tables themselves agreed with each entry."""
    for name, level, _, data, field, *_ in malformed():
        try:
            message, _ = wire.unpack(data)
            problem = wire.check_request(message) if level == "content" else None
        except WireError as error_found:
            problem = error_found if level == "framing" else None
        if problem is None or problem.field != field:
            raise SystemExit(f"malformed vector {name}: expected trouble with {field}: {problem}")
    keys = ("name", "level", "direction", "hex", "field", "value", "limit", "reason")
    return {
        "limits": {
            "pixels": 64 * MIB,
            "nal_count": 4096,
            "access_unit": 16 * MIB,
            "unknown": 64 * MIB,
        },
        "messages": [entry(name, message, wire.pack(message)) for name, message in messages()],
        "decode_only": [entry(*item) for item in decode_only()],
        "malformed": [
            dict(zip(keys, (*item[:3], item[3].hex(), *item[4:]))) for item in malformed()
        ],
    }


def main():
    """Write or check; exit code 1 when --check finds the file stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, exit 1 when stale")
    options = parser.parse_args()
    text = json.dumps(build(), indent=1, ensure_ascii=True) + "\n"
    if not options.check:
        TARGET.write_text(text)
        print(f"wrote {TARGET.name}")
    elif not TARGET.exists() or TARGET.read_text() != text:
        sys.exit(f"{TARGET.name} is not what make_vectors.py writes: run it and look at the diff")


if __name__ == "__main__":
    main()
