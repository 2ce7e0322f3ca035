#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The Helix frame-export protocol on the wire: tables, pack, unpack, stream decoder.

The second implementation of the protocol, written from its description alone, so that a
mistake in one of the two shows as a disagreement. It shares no code with the Rust crate, and
must not: do not "fix" one of them by looking at the other, look at the description.

Everything is little-endian and packed. A message is a 12-byte header and a payload:

    magic u32, msg_type u8, flags u8, session_id u16, payload_size u32

Each payload is one line of `TABLES`, in the order of the bytes. What follows the fixed part
(pixels, NAL units, TLVs) is packed and unpacked by the functions below the tables.

As an instrument it takes what a tolerant peer takes, and remembers in `Message.remarks` what a
well-behaved sender would not have written: reserved bytes that are not zero, bytes behind the
end, garbage behind the NUL of a text.
"""

import struct
from dataclasses import dataclass, field

MAGIC = 0x52465848  # 48 58 46 52 in memory, "HXFR"
HEADER = struct.Struct("<IBBHI")

FRAME_REQUEST = 0x01
FRAME_RESPONSE = 0x02
KEYFRAME_REQ = 0x03
CONFIG_REQ = 0x04
CONFIG_RESP = 0x05
PING = 0x10
PONG = 0x11
ENABLE_SCANOUT = 0x20
DISABLE_SCANOUT = 0x21
SCANOUT_RESP = 0x22
SUBSCRIBE = 0x30
SUBSCRIBE_RESP = 0x31
HELLO = 0x40
HELLO_RESP = 0x41
ERROR = 0xFF

FLAG_PIXEL_DATA = 0x01

# DRM fourccs. They name little-endian words, so AR24 has the bytes B, G, R, A in memory.
FORMAT_BGRA = 0x34325241  # AR24, also BGRx
FORMAT_RGBA = 0x34324241  # AB24, also RGBx
FORMAT_NV12 = 0x3231564E  # NV12

ERROR_INVALID_MESSAGE = -1
ERROR_RESOURCE_NOT_FOUND = -2
ERROR_ENCODE_FAILED = -5
ERROR_NOT_CONFIGURED = -6
ERROR_INTERNAL = -99

# HELLO capabilities, bit values
CAP_REQUEST_IDS = 1 << 0
CAP_CONFIG_RESP = 1 << 1
CAP_KEYFRAME_REQ = 1 << 2
CAP_RESOURCE_IDS = 1 << 3
CODEC_H264 = 1 << 0

TLV_NAME = 1
TLV_ENCODER = 2
TLV_AUTH_TOKEN = 3
TLV_HOST_CLOCK_ID = 4
HELLO_FIXED_SIZE = 32

I64_MIN = -(1 << 63)
MIB = 1 << 20

TO_HOST, TO_CLIENT, BOTH = "to_host", "to_client", "both"


class WireError(Exception):
    """Bytes that are no message: names the field, its value and the limit it broke."""

    def __init__(self, field_name, value, limit, reason):
        super().__init__(f"{field_name} = {value}: {reason} (limit {limit})")
        self.field, self.value, self.limit, self.reason = field_name, value, limit, reason


class NeedMore(Exception):
    """Not an error: the bytes so far are the beginning of a message."""


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts, in bytes unless said otherwise."""

    pixels: int = 64 * MIB
    nal_count: int = 4096
    """number of NAL units in one FRAME_RESPONSE"""
    access_unit: int = 16 * MIB
    """all NAL units of one FRAME_RESPONSE together"""
    unknown: int = 64 * MIB
    """payload of a message that is read and dropped"""


@dataclass
class Message:
    """One message. `fields` has the names of the tables; see `unpack` for the parts behind them."""

    type: int
    fields: dict = field(default_factory=dict)
    session_id: int = 0
    flags: int = 0
    remarks: list = field(default_factory=list, compare=False)
    size: int = field(default=0, compare=False)
    """bytes on the wire, header included; 0 for one that did not come from there"""

    @property
    def name(self):
        """The name in the description, or `0x7f` for a type that is not in it."""
        table = TABLES.get(self.type)
        return table.name if table else f"0x{self.type:02x}"

    def __getattr__(self, name):
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None


class Table:
    """The fixed part of a payload: `name:code` pairs in byte order, codes as in `struct`.

    `-:7x` are seven reserved bytes, `name:64s` is a NUL-padded text.
    """

    def __init__(self, name, direction, columns=""):
        self.name, self.direction = name, direction
        self.columns = [column.split(":") for column in columns.split()]
        self.names = [column for column, _ in self.columns if column != "-"]
        self.texts = {column: int(code[:-1]) for column, code in self.columns if code.endswith("s")}
        self.struct = struct.Struct("<" + "".join(code for _, code in self.columns))
        self.size = self.struct.size

    def pack(self, fields):
        """The fixed part with these fields; every one of the table must be there."""
        values = []
        for name in self.names:
            value = fields[name]
            if name in self.texts:
                value = value.encode() if isinstance(value, str) else value
                if len(value) > self.texts[name]:
                    raise ValueError(f"{name}: {len(value)} bytes, at most {self.texts[name]}")
            values.append(value)
        return self.struct.pack(*values)

    def unpack(self, payload, remarks):
        """The fields of the fixed part of `payload`, which has at least `size` bytes."""
        fields = dict(zip(self.names, self.struct.unpack_from(payload)))
        for name in self.texts:
            fields[name] = fields[name].split(b"\0")[0]
        if self.pack(fields) != bytes(payload[: self.size]):
            remarks.append("reserved bytes or text padding not zero")
        for name in self.texts:
            fields[name] = fields[name].decode(errors="replace")
        return fields


_REQUEST = (
    "resource_id:I width:I height:I format:I stride:I pts:q duration:q force_keyframe:B"
)
_CONFIG = (
    "width:I height:I bitrate:I framerate_num:I framerate_den:I profile:B level:B realtime:B -:5x"
)
_HELLO = (
    "version:H fixed_size:H max_in_flight:H -:2x capabilities:Q codecs:I max_message:I "
    "max_width:H max_height:H -:4x"
)

TABLES = {
    FRAME_REQUEST: Table("FRAME_REQUEST", TO_HOST, _REQUEST + " -:7x"),
    FRAME_RESPONSE: Table("FRAME_RESPONSE", TO_CLIENT, "pts:q dts:q is_keyframe:B -:3x nal_count:I"),
    KEYFRAME_REQ: Table("KEYFRAME_REQ", TO_HOST),
    CONFIG_REQ: Table("CONFIG_REQ", TO_HOST, _CONFIG),
    CONFIG_RESP: Table("CONFIG_RESP", TO_CLIENT, _CONFIG),
    PING: Table("PING", BOTH),
    PONG: Table("PONG", BOTH),
    ENABLE_SCANOUT: Table(
        "ENABLE_SCANOUT", TO_HOST, "scanout_id:I width:I height:I refresh_rate:I"
    ),
    DISABLE_SCANOUT: Table("DISABLE_SCANOUT", TO_HOST, "scanout_id:I"),
    SCANOUT_RESP: Table("SCANOUT_RESP", TO_CLIENT, "scanout_id:I success:I connector:64s"),
    SUBSCRIBE: Table("SUBSCRIBE", TO_HOST, "scanout_id:I"),
    SUBSCRIBE_RESP: Table("SUBSCRIBE_RESP", TO_CLIENT, "scanout_id:I success:I"),
    HELLO: Table("HELLO", TO_HOST, _HELLO),
    HELLO_RESP: Table("HELLO_RESP", TO_CLIENT, _HELLO),
    ERROR: Table("ERROR", TO_CLIENT, "error_code:i message:256s"),
}

# The same payloads once both peers announced capability bit 0, request ids and epochs.
TAGGED = {
    FRAME_REQUEST: Table("FRAME_REQUEST", TO_HOST, _REQUEST + " epoch:B request_id:H -:4x"),
    FRAME_RESPONSE: Table(
        "FRAME_RESPONSE", TO_CLIENT, "pts:q dts:q is_keyframe:B epoch:B request_id:H nal_count:I"
    ),
    ERROR: Table("ERROR", TO_CLIENT, "error_code:i message:256s epoch:B -:1x request_id:H"),
}

_NAL_SIZE = struct.Struct("<I")
_TLV_HEAD = struct.Struct("<HH")


def pack_header(msg_type, flags, session_id, payload_size):
    """The 12 bytes before each payload."""
    return HEADER.pack(MAGIC, msg_type, flags, session_id, payload_size)


def pack(message):
    """The bytes of a message.

    The request-tag form is written when `request_id` is among the fields. FRAME_REQUEST takes
    `pixels` (bytes), which set the flag PIXEL_DATA; FRAME_RESPONSE takes `nals` (list of bytes)
    and counts them; HELLO and HELLO_RESP take `tlvs` (list of (type, bytes)).
    """
    fields = dict(message.fields)
    flags = message.flags
    rest = b""
    if message.type == FRAME_REQUEST and "pixels" in fields:
        rest = fields["pixels"]
        flags |= FLAG_PIXEL_DATA
    elif message.type == FRAME_RESPONSE:
        fields.setdefault("nal_count", len(fields["nals"]))
        rest = b"".join(_NAL_SIZE.pack(len(nal)) + nal for nal in fields["nals"])
    elif message.type in (HELLO, HELLO_RESP):
        fields.setdefault("fixed_size", HELLO_FIXED_SIZE)
        rest = b"".join(_TLV_HEAD.pack(kind, len(value)) + value for kind, value in fields["tlvs"])
    tables = TAGGED if "request_id" in fields else TABLES
    fixed = tables[message.type].pack(fields)
    size = len(fixed) + len(rest)
    return pack_header(message.type, flags, message.session_id, size) + fixed + rest


def payload_limit(msg_type, limits):
    """The most bytes that a payload of this type may have."""
    if msg_type == FRAME_REQUEST:
        return TABLES[FRAME_REQUEST].size + limits.pixels
    if msg_type == FRAME_RESPONSE:
        sizes = _NAL_SIZE.size * limits.nal_count
        return TABLES[FRAME_RESPONSE].size + sizes + limits.access_unit
    return limits.unknown


def check_header(data, limits=Limits()):
    """Type, flags, session id and payload size of the header that `data` starts with."""
    if len(data) < HEADER.size:
        if not MAGIC.to_bytes(4, "little").startswith(bytes(data[:4])):
            raise WireError("magic", bytes(data[:4]).hex(), f"{MAGIC:#x}", "not a message")
        raise NeedMore
    magic, msg_type, flags, session_id, size = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError("magic", f"{magic:#x}", f"{MAGIC:#x}", "not a message")
    if size > payload_limit(msg_type, limits):
        raise WireError("payload_size", size, payload_limit(msg_type, limits), "payload too large")
    return msg_type, flags, session_id, size


def unpack(data, *, tagged=False, limits=Limits()):
    """The message that `data` starts with, and the number of its bytes.

    `tagged`: both peers announced capability bit 0. Raises NeedMore while the message is not
    whole, WireError when it never can be one. The types are those that `pack` takes.
    """
    msg_type, flags, session_id, size = check_header(data, limits)
    message = Message(msg_type, {}, session_id, flags)
    table = (tagged and TAGGED.get(msg_type)) or TABLES.get(msg_type)
    if table and size < table.size:
        raise WireError("payload_size", size, table.size, f"too small for {table.name}")
    end = HEADER.size + size
    if len(data) < end:
        raise NeedMore
    payload = memoryview(data)[HEADER.size : end]
    if not table:
        message.fields["payload"] = bytes(payload)
        return message, end
    message.fields = table.unpack(payload, message.remarks)
    rest = payload[table.size :]
    if msg_type == FRAME_REQUEST and flags & FLAG_PIXEL_DATA:
        message.fields["pixels"] = bytes(rest)
        rest = b""
    elif msg_type == FRAME_RESPONSE:
        message.fields["nals"], rest = _nals(message.fields["nal_count"], rest, limits)
    elif msg_type in (HELLO, HELLO_RESP):
        message.fields["tlvs"] = _tlvs(message.fields["fixed_size"], payload)
        rest = b""
    if len(rest):
        message.remarks.append(f"{len(rest)} bytes behind the end of the payload")
    if message.flags & ~FLAG_PIXEL_DATA or (message.flags and msg_type != FRAME_REQUEST):
        message.remarks.append(f"unused flags {message.flags:#x}")
    return message, end


def _nals(count, rest, limits):
    if count > limits.nal_count:
        raise WireError("nal_count", count, limits.nal_count, "too many NAL units")
    nals, total = [], 0
    for index in range(count):
        if len(rest) < _NAL_SIZE.size:
            raise WireError("nal_count", count, index, "more NAL units than payload")
        (size,) = _NAL_SIZE.unpack_from(rest)
        rest = rest[_NAL_SIZE.size :]
        if size > len(rest):
            raise WireError("size", size, len(rest), f"NAL unit {index} is longer than the payload")
        total += size
        if total > limits.access_unit:
            raise WireError("size", total, limits.access_unit, "access unit too large")
        nals.append(bytes(rest[:size]))
        rest = rest[size:]
    return nals, rest


def _tlvs(fixed_size, payload):
    if not HELLO_FIXED_SIZE <= fixed_size <= len(payload):
        limit = f"{HELLO_FIXED_SIZE} to {len(payload)}"
        raise WireError("fixed_size", fixed_size, limit, "outside the payload")
    rest = payload[fixed_size:]
    tlvs = []
    while len(rest):
        if len(rest) < _TLV_HEAD.size:
            raise WireError("TLVs", len(rest), _TLV_HEAD.size, "bytes left that are no TLV")
        kind, length = _TLV_HEAD.unpack_from(rest)
        rest = rest[_TLV_HEAD.size :]
        if length > len(rest):
            raise WireError("length", length, len(rest), f"TLV {kind} is longer than the payload")
        tlvs.append((kind, bytes(rest[:length])))
        rest = rest[length:]
    return tlvs


def check_request(request):
    """What is wrong with the content of a FRAME_REQUEST, as a WireError; None when nothing is.

    Framing can be right all the same: a host answers such a request with ERROR and goes on.
    """
    fields = request.fields
    width, height, stride = fields["width"], fields["height"], fields["stride"]
    if width == 0:
        return WireError("width", 0, "1 or more", "no picture")
    if height == 0:
        return WireError("height", 0, "1 or more", "no picture")
    if fields["format"] not in (FORMAT_BGRA, FORMAT_RGBA, FORMAT_NV12):
        return WireError("format", fields["format"], "AR24, AB24 or NV12", "unknown pixel format")
    if "pixels" not in fields:
        if fields["resource_id"] == 0:
            return WireError("resource_id", 0, "1 or more", "no resource and no pixels")
        return None
    if fields["format"] == FORMAT_NV12:
        # The stride field is ignored: Y is tight, UV follows it.
        if width % 2:
            return WireError("width", width, "even", "NV12 has no odd sizes")
        if height % 2:
            return WireError("height", height, "even", "NV12 has no odd sizes")
        needed = width * height * 3 // 2
    else:
        if stride < width * 4:
            return WireError("stride", stride, width * 4, "shorter than a line of pixels")
        needed = stride * height
    if len(fields["pixels"]) < needed:
        return WireError("payload_size", TABLES[FRAME_REQUEST].size + len(fields["pixels"]),
                         TABLES[FRAME_REQUEST].size + needed, "fewer pixels than the picture has")
    return None


class Decoder:
    """Messages out of bytes in any split. After a WireError only `resync` helps."""

    def __init__(self, limits=Limits()):
        self.limits = limits
        self.tagged = False
        self.buffer = bytearray()

    def feed(self, data):
        """Take bytes as they came."""
        self.buffer += data

    def next(self):
        """The next whole message, or None; raises WireError."""
        try:
            message, size = unpack(self.buffer, tagged=self.tagged, limits=self.limits)
        except NeedMore:
            return None
        del self.buffer[:size]
        message.size = size
        return message

    def resync(self):
        """Drop bytes up to the next possible header behind the first byte; how many went."""
        magic = MAGIC.to_bytes(4, "little")
        at = self.buffer.find(magic, 1)
        if at < 0:  # keep what may be the beginning of a magic
            at = max(len(self.buffer) - 3, 1)
            while not magic.startswith(self.buffer[at:]):
                at += 1
        del self.buffer[:at]
        return at


def describe(message, *, blobs=32):
    """A message as a dict for JSON: bytes as hex, those longer than `blobs` as their length."""

    def plain(value):
        if isinstance(value, (bytes, bytearray)):
            return value.hex() if len(value) <= blobs else f"{len(value)} bytes"
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    result = {"message": message.name, "session_id": message.session_id}
    result.update({name: plain(value) for name, value in message.fields.items()})
    if message.remarks:
        result["remarks"] = message.remarks
    return result
