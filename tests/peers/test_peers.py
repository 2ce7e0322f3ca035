#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Tests of the Python peers themselves: client.py against host.py, each switch; and wire_tests.py.

Run with `/usr/bin/python3 tests/peers/test_peers.py`. Needs gst-launch-1.0 with h264parse and
avdec_h264 (gst-libav), which is the foreign decoder that judges the H.264.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import client
import client_faults
import helix_wire as wire
import make_vectors
from peer_net import Connection, PeerClosed, PeerSilent
from wire_tests import Pcm, Vectors  # pylint: disable=unused-import  # one command runs them all

HERE = pathlib.Path(__file__).resolve().parent
LIMIT = 20  # seconds, for whatever should take less than one


class Host:
    """host.py as a child process, its events in a list."""

    def __init__(self, *switches, listen="tcp:127.0.0.1:0"):
        command = [sys.executable, HERE / "host.py", "--listen", listen, *switches]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.events = []
        self.news = threading.Condition()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        self.address = self.wait(lambda event: "listening" in event)["listening"]

    def _read(self):
        for line in self.process.stdout:
            with self.news:
                self.events.append(json.loads(line))
                self.news.notify_all()
        with self.news:
            self.events.append({"event": "eof"})
            self.news.notify_all()

    def wait(self, wanted):
        """The first event that is wanted, once it is there."""
        found = []

        def look():
            found[:] = [event for event in self.events if wanted(event)][:1]
            return found

        with self.news:
            if not self.news.wait_for(look, LIMIT):
                raise AssertionError(f"no such event among {self.events[-5:]}")
        return found[0]

    def wait_violation(self, text):
        """The violation that has this text in it."""
        return self.wait(lambda event: event.get("event") == "violation" and text in event["what"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.thread.join()
            self.process.stdout.close()

    def of(self, name):
        """All events of this name so far."""
        with self.news:
            return [event for event in self.events if event.get("event") == name]

    def answers(self, count):
        """Its first FRAME_RESPONSEs, once it has said that it sent them: who has got them may be first."""

        def sent():
            found = [event for event in self.of("sent") if event["message"] == "FRAME_RESPONSE"]
            return found[:count] if len(found) >= count else None

        with self.news:
            found = self.news.wait_for(sent, LIMIT)
        if not found:
            raise AssertionError(f"no {count} answers among {self.of('sent')}")
        return found

    def run_client(self, *arguments, fails=False):
        """client.py against this host: its result; it must succeed, or fail where told.

        In this process, because starting Python twice for each test is most of the time; the
        class CommandLine runs it as a program.
        """
        options = client.parse([self.address, *arguments])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = options.run(options)
        if code != int(fails):
            raise AssertionError(f"client {arguments}: {code}\n{output.getvalue()}")
        return json.loads(output.getvalue())


def hosted(*switches, **how):
    """Decorator: the test gets a host with these switches; no bug may show in it."""

    def wrap(test):
        def wrapped(self):
            with Host(*switches, **how) as host:
                test(self, host)
            self.assertEqual(host.of("bug"), [])

        wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
        return wrapped

    return wrap


class Normal(unittest.TestCase):
    """The peers when both behave."""

    @hosted()
    def test_nv12_comes_back_exactly(self, host):
        result = host.run_client("encode", "--picture", "64x48:NV12", "--verify-psnr", "99")
        self.assertEqual((result["replies"], result["keyframes"], result["psnr"]), (30, 1, "exact"))

    @hosted()
    def test_padded_strides_and_changes_in_mid_stream(self, host):
        pictures = ("64x48:BGRA", "33x17:RGBA", "50x38:NV12", "8x6:BGRA", "1x1:RGBA")
        switches = [word for name in pictures for word in ("--picture", name)]
        result = host.run_client("encode", *switches, "--frames", "5", "--stride-pad", "20",
                             "--verify-psnr", "35", "--in-flight", "3", "--ping-every", "2")
        self.assertEqual((result["replies"], result["keyframes"]), (25, 5))
        self.assertEqual(host.wait(lambda e: e.get("event") == "disconnect")["max_open"], 3)
        self.assertEqual(host.of("violation"), [])

    @hosted(listen="tcp:[::1]:0")
    def test_ipv6(self, host):
        self.assertEqual(host.run_client("ping", "--session-id", "65535")["pongs"], 3)

    def test_unix_socket_is_removed_and_a_stale_one_replaced(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "socket")
            stale = socket.socket(socket.AF_UNIX)
            stale.bind(path)
            stale.close()
            with Host(listen=f"unix:{path}") as host:
                self.assertEqual(host.run_client("encode", "--frames", "2")["replies"], 2)
            self.assertFalse(os.path.exists(path))

    def test_host_ends_on_sigterm(self):
        with Host() as host:
            host.process.send_signal(signal.SIGTERM)
            host.wait(lambda event: event.get("event") == "stopped")
            self.assertEqual(host.process.wait(LIMIT), 0)

    @hosted("--push", "1=64x48@120", "--push-gop", "10")
    def test_scanout_is_pushed_and_decodes_in_order(self, host):
        result = host.run_client("subscribe", "1", "--frames", "25", "--decode", "64x48")
        first = result["numbers"][0]
        self.assertEqual(result["numbers"], list(range(first, first + 25)))
        self.assertEqual(result["pts_steps_ns"], [16_666_667])

    @hosted()
    def test_enabled_scanout_is_pushed(self, host):
        result = host.run_client("subscribe", "4", "--enable", "64x48@100", "--frames", "5")
        self.assertEqual(result["connector"], "Virtual-5")
        host.wait(lambda event: event.get("message") == "DISABLE_SCANOUT")

    @hosted("--hello", "--split-nals")
    def test_hello_brings_request_ids_and_config_resp(self, host):
        result = host.run_client("encode", "--hello", "--frames", "10", "--in-flight", "4",
                             "--verify-psnr", "35")
        self.assertEqual((result["peer"], result["replies"]), ("hello", 10))
        self.assertEqual(result["config"]["bitrate"], 4_000_000)
        self.assertEqual(host.of("violation"), [])
        self.assertEqual([e["request_id"] for e in host.answers(10)], list(range(10)))

    @hosted("--hello", "--late", "20")
    def test_replies_of_an_older_epoch_are_told_from_others(self, host):
        result = host.run_client("encode", "--hello", "--frames", "20", "--in-flight", "4",
                                 "--flush-every", "6", "--verify-psnr", "40")
        self.assertGreater(result["stale"], 0)
        self.assertEqual(result["replies"] + result["stale"], 20)

    @hosted("--hello")
    def test_keyframe_req_is_honoured_after_hello(self, host):
        with Connection(host.address) as connection:
            kinds = []
            for message in ({}, {}, None, {}):
                if message is None:
                    connection.send(wire.Message(wire.KEYFRAME_REQ, session_id=1))
                    continue
                connection.send(client_faults.sample_request(len(kinds)))
                kinds.append(connection.receive().is_keyframe)
            self.assertEqual(kinds, [1, 0, 0])  # skipped without HELLO
        with Connection(host.address) as connection:
            client.greet(connection, capabilities=wire.CAP_KEYFRAME_REQ)
            connection.send(client_faults.sample_request(0))
            connection.send(wire.Message(wire.KEYFRAME_REQ, session_id=1))
            connection.send(client_faults.sample_request(1))
            self.assertEqual([connection.receive().is_keyframe for _ in range(2)], [1, 1])

    @hosted()
    def test_legacy_host_is_known_by_its_pong(self, host):
        self.assertEqual(host.run_client("ping", "--hello")["peer"], "legacy")
        self.assertEqual(host.run_client("encode", "--hello", "--frames", "3")["peer"], "legacy")

    @hosted("--token", "secret", "--push", "1=64x48@60")
    def test_token_is_asked_for(self, host):
        self.assertEqual(host.run_client("ping", "--hello", "--token", "secret")["pongs"], 3)
        host.run_client("ping", "--hello", "--token", "wrong", fails=True)
        host.run_client("subscribe", "1", "--frames", "1", "--broken", "fail", fails=True)


class Quirks(unittest.TestCase):
    """Each quirk of deployed hosts, by its number."""

    @hosted("--generation", "2", "--push", "1=64x48@120", "--push-gop", "5")
    def test_1_second_generation_skips_frame_request(self, host):
        result = host.run_client("encode", "--timeout", "0.3", fails=True)
        self.assertIn("second-generation host", result["problems"][0])
        self.assertEqual(host.run_client("subscribe", "1", "--frames", "5")["frames"], 5)

    @hosted("--generation", "1", "--push", "1=64x48@60")
    def test_1_first_generation_knows_no_subscribe(self, host):
        self.assertEqual(host.run_client("encode", "--frames", "3")["replies"], 3)
        host.run_client("subscribe", "1", "--frames", "1", "--timeout", "0.3", "--broken", "fail",
                    fails=True)

    @hosted()
    def test_2_unknown_messages_are_skipped_and_ping_is_answered_in_order(self, host):
        self.assertEqual(host.run_client("ping", "--probe", "--count", "1")["pongs"], 1)
        host.wait(lambda event: event.get("message") == "0x7f")

    @hosted("--drop-reply", "3")
    def test_3_missing_replies(self, host):
        result = host.run_client("encode", "--frames", "9", "--in-flight", "2", "--allow-missing",
                             "--timeout", "0.3")
        self.assertEqual((result["replies"], result["missing"]), (6, 3))
        host.run_client("encode", "--frames", "9", "--in-flight", "2", "--timeout", "0.3", fails=True)

    @hosted("--error-every", "3")
    def test_3_errors_instead_of_replies(self, host):
        result = host.run_client("encode", "--frames", "9", "--allow-errors", "--verify-psnr", "35")
        self.assertEqual((result["replies"], result["errors"]), (6, 3))
        self.assertTrue(host.run_client("encode", fails=True)["problems"])

    @hosted("--dts", "min", "--pts", "micros")
    def test_3_rounded_pts_and_no_dts(self, host):
        host.run_client("encode", "--frames", "5", "--pts-start", str(10**18 + 999))
        sent = host.answers(5)
        self.assertEqual({event["dts"] for event in sent}, {wire.I64_MIN})
        self.assertEqual({event["pts"] % 1000 for event in sent}, {0})

    @hosted("--dts", "zero", "--pts", "double")
    def test_3_pts_through_double_seconds(self, host):
        host.run_client("encode", "--frames", "5", "--pts-start", str(10**18 + 999))
        sent = host.answers(5)
        self.assertEqual({event["dts"] for event in sent}, {0})
        self.assertNotEqual(sent[0]["pts"], 10**18 + 999)

    @hosted()
    def test_4_nv12_stride_is_ignored_and_reported(self, host):
        request = client_faults.sample_request()
        request.fields |= {"format": wire.FORMAT_NV12, "stride": 80, "pixels": bytes(64 * 72)}
        with Connection(host.address) as connection:
            connection.send(request)
            self.assertEqual(connection.receive().type, wire.FRAME_RESPONSE)
        host.wait_violation("NV12 stride 80")

    @hosted()
    def test_5_resource_0_without_pixels_is_refused_and_reported(self, host):
        request = client_faults.sample_request()
        del request.fields["pixels"]
        with Connection(host.address) as connection:
            connection.send(request)
            self.assertEqual(connection.receive().error_code, wire.ERROR_INVALID_MESSAGE)
        host.wait_violation("no resource and no pixels")

    @hosted()
    def test_6_unknown_resource_gets_an_error(self, host):
        result = host.run_client("encode", "--resource", "9", "--frames", "3", "--allow-errors")
        self.assertEqual(result["error_texts"], {"-2: resource 9 not found": 3})

    @hosted("--resources", "wrong")
    def test_6_unknown_resource_gets_a_wrong_picture(self, host):
        result = host.run_client("encode", "--resource", "9", "--frames", "3")
        self.assertEqual(result["replies"], 3)

    @hosted("--resources", "silent")
    def test_6_unknown_resource_gets_nothing(self, host):
        result = host.run_client("encode", "--resource", "9", "--frames", "2", "--allow-missing",
                             "--timeout", "0.2")
        self.assertEqual(result["missing"], 2)

    @hosted("--need-config")
    def test_not_configured(self, host):
        with Connection(host.address) as connection:
            connection.send(client_faults.sample_request())
            self.assertEqual(connection.receive().error_code, wire.ERROR_NOT_CONFIGURED)
        self.assertEqual(host.run_client("encode", "--frames", "2")["replies"], 2)

    @hosted("--push", "1=64x48@120", "--push-gop", "20")
    def test_7_newcomer_waits_for_a_keyframe(self, host):
        result = host.run_client("subscribe", "1", "--frames", "1", "--keyframe-within", "19")
        self.assertEqual(result["before_keyframe"], 19)
        host.run_client("subscribe", "1", "--frames", "1", "--keyframe-within", "19")

    @hosted("--push", "1=64x48@120", "--keyframe-on-subscribe")
    def test_7_unless_the_host_is_kind(self, host):
        result = host.run_client("subscribe", "1", "--frames", "1", "--keyframe-within", "0")
        self.assertEqual(result["before_keyframe"], 0)

    @hosted("--push", "1=64x48@120", "--push-gop", "5", "--push-still", "10")
    def test_7_still_screen_pushes_nothing_but_answers_ping(self, host):
        result = host.run_client("subscribe", "1", "--seconds", "0.8", "--ping-after", "0.1")
        self.assertLess(result["frames"], 12)
        self.assertGreater(result["pings"], 1)

    @hosted("--push", "1=64x48@120", "--push-gop", "5", "--partial-at", "12")
    def test_8_out_of_step_is_seen_and_mended(self, host):
        result = host.run_client("subscribe", "1", "--frames", "40", "--broken", "resync")
        self.assertGreaterEqual(result["resyncs"], 1)
        with Host("--push", "1=64x48@120", "--push-gop", "5", "--partial-at", "12") as other:
            result = other.run_client("subscribe", "1", "--frames", "15")
            self.assertGreaterEqual(result["reconnects"], 1)
            other.run_client("subscribe", "1", "--frames", "40", "--broken", "fail", fails=True)

    @hosted("--push", "1=128x96@40", "--push-gop", "1", "--slow", "partial", "--sndbuf", "32768")
    def test_8_slow_reader_gets_parts_of_frames(self, host):
        result = host.run_client("slow-reader", "1", "--rate", "100000", "--seconds", "2")
        self.assertTrue(result["out_of_step"])
        host.wait(lambda event: event.get("event") == "fault" and "bytes sent" in event["what"])

    @hosted("--push", "1=128x96@40", "--push-gop", "1", "--sndbuf", "32768")
    def test_8_slow_reader_is_cut_off_and_others_are_not(self, host):
        result = host.run_client("slow-reader", "1", "--seconds", "2")
        self.assertTrue(result["other_frames"] > 5)
        host.wait(lambda event: event.get("reason") == "slow")

    @hosted("--profile", "77")
    def test_9_profile_is_the_hosts(self, host):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "out.h264")
            host.run_client("encode", "--frames", "3", "--output", path)
            sps = pathlib.Path(path).read_bytes()
            self.assertEqual(sps[:6].hex(), "00000001674d")

    @hosted("--silent-after", "3", "--idle", "1")
    def test_10_host_goes_silent_then_closes(self, host):
        result = host.run_client("ping", "--count", "5", "--timeout", "0.3", fails=True)
        self.assertEqual(result["pongs"], 3)
        with Connection(host.address) as connection:
            for _ in range(3):
                connection.send(wire.Message(wire.PING))
            self.assertTrue(connection.wait_closed(LIMIT))

    @hosted("--idle", "0.5")
    def test_10_idle_limit(self, host):
        host.run_client("silent", "--seconds", "5", "--expect", "closed")
        self.assertEqual(host.wait(lambda e: e.get("event") == "disconnect"
                                   and e["messages"] == 0)["reason"], "idle")

    @hosted("--push", "1=64x48@120", "--push-gop", "1000")
    def test_11_config_req_restarts_the_scanout(self, host):
        result = host.run_client("subscribe", "1", "--frames", "3", "--bitrate", "1000000")
        self.assertLess(result["before_keyframe"], 30)

    @hosted()
    def test_12_seventeenth_client_is_refused(self, host):
        host.run_client("crowd", "--clients", "17", "--served", "16", "--timeout", "1")
        host.wait(lambda event: event.get("event") == "refused")

    @hosted("--push", "1=64x48@60")
    def test_12_sixteen_scanouts(self, host):
        host.run_client("subscribe", "16", "--enable", "64x48@60", "--broken", "fail", fails=True)
        host.run_client("subscribe", "15", "--broken", "fail", fails=True)


class Faults(unittest.TestCase):
    """Hosts that break: the client says what happened, and ends."""

    def problems(self, host, *arguments):
        return " ".join(host.run_client("encode", "--timeout", "0.5", *arguments, fails=True)["problems"])

    @hosted("--garbage-after", "2")
    def test_garbage(self, host):
        self.assertIn("magic", self.problems(host))

    @hosted("--truncate-after", "2")
    def test_truncation(self, host):
        self.assertIn("peer closed with", self.problems(host))

    @hosted("--nal-count", "4294967295")
    def test_nal_count(self, host):
        self.assertIn("nal_count", self.problems(host))

    @hosted("--nal-size", "4294967295", "--fault-at", "3")
    def test_nal_size(self, host):
        self.assertIn("longer than the payload", self.problems(host))

    @hosted("--payload-size", "4294967295")
    def test_payload_size_over_the_limit(self, host):
        self.assertIn("payload too large", self.problems(host))

    @hosted("--payload-size", "16000000")
    def test_payload_that_never_comes(self, host):
        self.assertIn("no reply", self.problems(host))

    @hosted("--reply-twice")
    def test_replies_twice(self, host):
        self.assertIn("that no open request has", self.problems(host))

    @hosted("--late", "50")
    def test_late_replies_and_open_requests(self, host):
        result = host.run_client("encode", "--frames", "5", "--in-flight", "2")
        self.assertGreater(result["latency_ms"]["p50"], 45)
        self.assertEqual(host.wait(lambda e: e.get("event") == "disconnect")["max_open"], 2)

    @hosted("--split", "--chatter")
    def test_bytes_one_by_one_and_unknown_messages(self, host):
        result = host.run_client("encode", "--picture", "16x16:NV12", "--frames", "5", "--verify-psnr",
                             "99")
        self.assertEqual((result["replies"], result["skipped_unknown"]), (5, 5))


class Misbehaving(unittest.TestCase):
    """Clients that break: the host says so, and serves the others."""

    @hosted()
    def test_garbage(self, host):
        self.assertEqual(host.run_client("garbage")["closed"], 10)
        host.wait_violation("magic")
        host.wait_violation("payload too large")

    @hosted()
    def test_truncation(self, host):
        host.run_client("truncate")
        host.wait_violation("closed within a message, 57 bytes in")

    @hosted()
    def test_silence(self, host):
        host.run_client("silent", "--half", "--seconds", "0.3", "--expect", "open")

    @hosted()
    def test_flood(self, host):
        self.assertEqual(host.run_client("flood", "--requests", "300")["replies"], 300)

    @hosted()
    def test_every_vector(self, host):
        result = host.run_client("vectors", str(make_vectors.TARGET))
        self.assertEqual(result["content: error"], 12)

    @hosted("--hello", "--max-in-flight", "2", "--late", "20")
    def test_what_a_client_should_not_do_is_reported(self, host):
        with Connection(host.address) as connection:
            client.greet(connection)
            request = client_faults.sample_request()
            request.fields |= {"epoch": 0, "request_id": 1}
            connection.send(wire.pack(request) * 4)
            for _ in range(4):
                connection.receive()
            fields = make_vectors.hello(wire.HELLO).fields
            connection.send(wire.Message(wire.HELLO, fields))
            connection.send(wire.Message(wire.SUBSCRIBE, {"scanout_id": 3}, session_id=2))
            connection.send(make_vectors.response([]))
            config = bytearray(wire.pack(make_vectors.config(wire.CONFIG_REQ)))
            config[-1] = 1
            connection.send(bytes(config) + wire.pack_header(wire.PING, 0, 0, 1) + b"x")
            connection.receive_only(wire.PONG)
        for text in ("requests open, 2 allowed", "HELLO is not the first message",
                     "HELLO is not followed by PING", "session_id 2, scanout_id 3",
                     "FRAME_RESPONSE is a host's message", "CONFIG_REQ: reserved bytes",
                     "1 bytes behind the end"):
            host.wait_violation(text)

    @hosted("--hello", "--capabilities", "0", "--max-in-flight", "1", "--max-message", "57", "--late", "20")
    def test_limits_are_watched_whatever_was_agreed(self, host):
        with Connection(host.address) as connection:
            client.greet(connection)
            connection.send(wire.pack(client_faults.sample_request()) * 2)
            for _ in range(2):
                connection.receive()
        host.wait_violation("2 requests open, 1 allowed")
        host.wait_violation("bytes, 57 allowed")


class Clients(unittest.TestCase):
    """The client's own limits."""

    def test_nobody_listens(self):
        with self.assertRaisesRegex(PeerClosed, "does the host listen there"):
            Connection("unix:/nonexistent/socket")

    def test_nobody_answers(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
            start = time.monotonic()
            with self.assertRaises(PeerSilent), Connection(address, 0.2) as connection:
                connection.send(wire.Message(wire.PING))
                connection.receive()
            self.assertLess(time.monotonic() - start, LIMIT)

    def test_nobody_reads(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
            with self.assertRaises(PeerSilent), Connection(address, 0.2) as connection:
                connection.send(bytes(64 * wire.MIB))


class CommandLine(unittest.TestCase):
    """The peers as programs: exit codes, one line of JSON, help."""

    def program(self, name, *arguments):
        return subprocess.run([sys.executable, HERE / name, *arguments], capture_output=True,
                              stdin=subprocess.DEVNULL, text=True, timeout=LIMIT, check=False)

    @hosted()
    def test_client_ends_with_0_when_all_is_well(self, host):
        run = self.program("client.py", host.address, "encode", "--frames", "2")
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertEqual(json.loads(run.stdout)["replies"], 2)

    @hosted("--error-every", "1")
    def test_client_ends_with_1_when_it_is_not(self, host):
        run = self.program("client.py", host.address, "encode", "--frames", "2")
        self.assertEqual((run.returncode, run.stderr), (1, ""))
        self.assertEqual(len(json.loads(run.stdout)["problems"]), 2)

    def test_help_teaches(self):
        for name in ("host.py", "client.py"):
            self.assertIn("examples:", self.program(name, "--help").stdout)

    def test_host_says_why_it_cannot_listen(self):
        run = self.program("host.py", "--listen", "tcp:nonsense")
        self.assertEqual(run.returncode, 1)
        self.assertIn("expected tcp:HOST:PORT", run.stderr)


if __name__ == "__main__":
    unittest.main()
