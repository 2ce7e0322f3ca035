#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Tests without sockets: the byte vectors, and the encoder against a foreign decoder.

test_peers.py runs them with its own; alone: `/usr/bin/python3 tests/peers/wire_tests.py`.
"""

import json
import random
import unittest

import decode
import h264_pcm
import helix_wire as wire
import make_vectors
import picture


class Vectors(unittest.TestCase):
    """The checked-in byte vectors."""

    @classmethod
    def setUpClass(cls):
        cls.data = json.loads(make_vectors.TARGET.read_text())

    def unpacked(self, entry):
        """The message in the hex of an entry, which must end where the hex does."""
        data = bytes.fromhex(entry["hex"])
        message, size = wire.unpack(data, tagged="request_id" in entry["fields"])
        self.assertEqual(size, len(data))
        return message

    def test_file_is_what_the_generator_writes(self):
        self.assertEqual(self.data, json.loads(json.dumps(make_vectors.build())))

    def test_bytes_written_by_hand_agree(self):
        """Copied from the tables of the description with a pencil, not with helix_wire."""
        by_hand = {
            "ping": "48584652 10 00 0100 00000000",
            "subscribe_last_scanout": "48584652 30 00 0f00 04000000 0f000000",
            "disable_scanout": "48584652 21 00 0000 04000000 01000000",
            "config_req_1080p60": "48584652 04 00 0100 1c000000 80070000 38040000 00093d00"
            "3c000000 01000000 42 2a 01 0000000000",
            "frame_request_tagged_pixels": "48584652 01 01 0100 3c000000 00000000 02000000"
            "02000000 41523234 08000000 2b50fe0000000000 2b50fe0000000000 01 ff ffff 00000000"
            "0000ffff 00ff00ff ff0000ff ffffffff",
            "frame_response_tagged_delta": "48584652 02 00 0100 24000000 2b50fe0000000000"
            "2b50fe0000000000 00 03 0201 01000000 08000000 00000001419a0240",
            "error_tagged": "48584652 ff 00 0100 08010000 fbffffff"
            + b"encode failed".hex() + "00" * (256 - 13) + "03 00 0201",
            "hello_bare": "48584652 40 00 0000 20000000 0100 2000 0200 0000 0700000000000000"
            "01000000 38000004 0020 0020 00000000",
        }
        vectors = {entry["name"]: entry["hex"] for entry in self.data["messages"]}
        for name, text in by_hand.items():
            self.assertEqual(vectors[name], text.replace(" ", ""), name)

    def test_messages_and_decode_only_unpack_to_their_fields(self):
        for entry in self.data["messages"] + self.data["decode_only"]:
            message = self.unpacked(entry)
            message.fields.pop("payload", None)
            self.assertEqual(make_vectors.plain(message.fields), entry["fields"], entry["name"])
            self.assertEqual((message.type, message.flags, message.session_id),
                             (entry["type"], entry["flags"], entry["session_id"]))

    def test_messages_pack_to_their_hex_and_leave_no_remarks(self):
        for entry in self.data["messages"]:
            message = self.unpacked(entry)
            self.assertEqual(wire.pack(message).hex(), entry["hex"])
            self.assertEqual(message.remarks, [], entry["name"])

    def test_every_message_of_the_protocol_is_there(self):
        self.assertEqual({entry["type"] for entry in self.data["messages"]}, set(wire.TABLES))

    def test_every_prefix_waits_for_more(self):
        for entry in self.data["messages"]:
            data = bytes.fromhex(entry["hex"])
            for size in range(len(data)):
                with self.assertRaises(wire.NeedMore):
                    wire.unpack(data[:size])

    def test_any_split_gives_the_same_messages(self):
        stream = b"".join(bytes.fromhex(entry["hex"]) for entry in self.data["messages"])
        for seed in range(20):
            source, decoder, at, names = random.Random(seed), wire.Decoder(), 0, []
            while at < len(stream):
                step = source.choice((1, 3, 12, 100))
                decoder.feed(stream[at : at + step])
                at += step
                while message := decoder.next():
                    names.append(message.type)
            self.assertEqual(names, [entry["type"] for entry in self.data["messages"]])

    def test_malformed_are_refused_for_the_field_that_is_wrong(self):
        for entry in self.data["malformed"]:
            data = bytes.fromhex(entry["hex"])
            if entry["level"] == "framing":
                with self.assertRaises(wire.WireError, msg=entry["name"]) as caught:
                    wire.unpack(data)
                problem = caught.exception
            else:
                problem = wire.check_request(wire.unpack(data)[0])
            self.assertEqual(problem.field, entry["field"], entry["name"])

    def test_decoder_finds_back_into_step_after_a_partial_message(self):
        ping = wire.pack(wire.Message(wire.PING, session_id=9))
        response = wire.pack(make_vectors.response([make_vectors.IDR], is_keyframe=1))
        decoder = wire.Decoder()
        decoder.feed(response[:44] + ping * 2)
        decoder.next()  # takes the first bytes of the PING for its own
        with self.assertRaises(wire.WireError):
            decoder.next()
        decoder.resync()
        self.assertEqual(decoder.next().session_id, 9)


def planes(width, height, number, noise=False):
    """(y, u, v) of the pattern, or of noise that has everything emulation prevention fears."""
    if noise:
        source = random.Random(number)
        make = lambda size: bytes(source.choices((0, 0, 0, 1, 2, 3, 255), k=size))
        return make(width * height), make(width * height // 4), make(width * height // 4)
    pixels = picture.pattern(width, height, wire.FORMAT_NV12, width, number)
    return picture.to_i420(pixels, width, height, wire.FORMAT_NV12, width)


class Pcm(unittest.TestCase):
    """The encoder against a foreign decoder."""

    def check_exact(self, width, height, gop, noise=False, profile=66, force=()):
        encoder = h264_pcm.Encoder(width, height, gop, profile)
        sent = [planes(width, height, number, noise) for number in range(8)]
        stream = b"".join(encoder.encode(*p, number in force)[0] for number, p in enumerate(sent))
        self.assertTrue(decode.decode(stream, width, height) == sent, f"{width}x{height}")

    def test_keyframes_decode_to_the_exact_picture(self):
        self.check_exact(64, 48, gop=1)

    def test_skipped_macroblocks_decode_to_the_exact_picture(self):
        self.check_exact(64, 48, gop=60, force=(3, 4))

    def test_cropped_sizes_decode_to_the_exact_picture(self):
        self.check_exact(50, 38, gop=4)

    def test_bytes_that_look_like_start_codes_survive(self):
        self.check_exact(64, 48, gop=3, noise=True, profile=77)

    def test_more_pictures_than_frame_num_counts(self):
        encoder = h264_pcm.Encoder(64, 48, gop=100)
        sent = [planes(64, 48, number) for number in range(40)]
        stream = b"".join(encoder.encode(*p)[0] for p in sent)
        self.assertTrue(decode.decode(stream, 64, 48) == sent)

    def test_parameter_sets_come_with_keyframes_only(self):
        encoder = h264_pcm.Encoder(64, 48, gop=3)
        kinds = [h264_pcm.nal_types(encoder.encode(*planes(64, 48, n))[0]) for n in range(6)]
        self.assertEqual(kinds, [[7, 8, 5], [1], [1]] * 2)

    def test_lost_picture_shows_until_the_next_keyframe(self):
        encoder = h264_pcm.Encoder(64, 48, gop=4)
        sent = [planes(64, 48, number) for number in (0, 85, 85, 85, 85, 85)]
        units = [encoder.encode(*p)[0] for p in sent]
        got = decode.decode(b"".join(units[:1] + units[2:]), 64, 48)
        self.assertFalse(got[-3] == sent[3], "the loss does not show")
        self.assertTrue(got[-2:] == sent[4:], "the keyframe does not mend it")

    def test_pattern_tells_its_number_in_each_format(self):
        for fourcc in picture.FORMATS.values():
            for number in (0, 1, 85, 170, 255, 256):
                stride = 64 if fourcc == wire.FORMAT_NV12 else 300
                pixels = picture.pattern(64, 48, fourcc, stride, number)
                luma = picture.to_i420(pixels, 64, 48, fourcc, stride)[0]
                self.assertEqual(picture.read_number(luma, 64, 48), number % 256)


if __name__ == "__main__":
    unittest.main()
