# SPDX-License-Identifier: MIT OR Apache-2.0
"""This project's elements and host against the peers in this folder, which share no code with them.

The elements run in this process, against host.py with each of its quirks and faults; client.py runs
against helix-host. Both must have been built: `cargo build --workspace`.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
# Where cargo put what is tested; ci/debian13 builds in release mode.
BUILT = pathlib.Path(os.environ.get("BUILT", ROOT / "target" / "debug"))
HELIX_HOST = os.environ.get("HELIX_HOST", str(BUILT / "helix-host"))
VECTORS = ROOT / "crates" / "helix-protocol" / "vectors" / "vectors.json"

# A registry of our own: no other copy of the plugins may answer, and none of ours stays in it.
_scratch = tempfile.TemporaryDirectory()
_plugins = pathlib.Path(_scratch.name) / "plugins"
_plugins.mkdir()
for _library in ("libgstvsock.so", "libgstscanout.so"):
    (_plugins / _library).symlink_to(BUILT / _library)
os.environ["GST_PLUGIN_PATH"] = str(_plugins)
os.environ["GST_REGISTRY"] = f"{_scratch.name}/registry.bin"

import gi  # noqa: E402

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

Gst.init(None)

# Generous, in seconds: what has not happened by then never will.
LONG = 40
FRAMES = 60
SIZE = (64, 48)


class Running:
    """A child that prints where it listens; ends with the block it is used in."""

    def __init__(self, command, read_address):
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.read_address = read_address
        self.lines = []

    def __enter__(self):
        line = self.child.stdout.readline()
        if not line:
            self.child.wait(LONG)
            raise AssertionError(f"{self.child.args} ended with {self.child.returncode}")
        self.address = self.read_address(line)
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """End it, and keep the rest of what it printed."""
        if self.child.returncode is None:
            self.child.send_signal(signal.SIGTERM)
            rest, _ = self.child.communicate(timeout=LONG)
            self.lines = rest.splitlines()

    def rss(self):
        """Resident memory in KiB."""
        with open(f"/proc/{self.child.pid}/status", encoding="ascii") as status:
            return int(next(line for line in status if line.startswith("VmRSS")).split()[1])


def python_host(*switches, listen="tcp:127.0.0.1:0"):
    """host.py with these switches."""
    command = [sys.executable, str(FOLDER / "host.py"), "--listen", listen, *switches]
    return Running(command, lambda line: json.loads(line)["listening"])


def helix_host(*options, listen="tcp:127.0.0.1:0"):
    """helix-host with these options."""
    command = [HELIX_HOST, "--listen", listen, "--encoder", "x264enc", *options]
    return Running(command, lambda line: line.removeprefix("listening on ").strip())


def properties(address):
    """The connection properties for an address."""
    kind, _, rest = address.partition(":")
    if kind == "unix":
        return f"socket-path={rest}"
    host, _, port = rest.rpartition(":")
    return f"tcp-host={host} tcp-port={port}"


class Result:
    """How a pipeline ended."""

    def __init__(self):
        self.buffers = []
        self.error = None
        self.states = []
        self.stats = {}


def run(description, frames=None, seconds=LONG):
    """Play a pipeline whose element `e` is ours and whose appsink is `sink`, to EOS or an error, or
    until `frames` buffers have come."""
    result = Result()
    pipeline = Gst.parse_launch(description)
    bus, sink = pipeline.get_bus(), pipeline.get_by_name("sink")
    pipeline.set_state(Gst.State.PLAYING)
    deadline = time.monotonic() + seconds
    try:
        while True:
            if time.monotonic() > deadline:
                raise AssertionError(f"no end after {seconds} s: {len(result.buffers)} buffers")
            sample = sink.emit("try-pull-sample", 20 * Gst.MSECOND)
            while sample:
                buffer = sample.get_buffer()
                data = buffer.extract_dup(0, buffer.get_size())
                result.buffers.append((buffer.pts, bytes(data)))
                sample = sink.emit("try-pull-sample", 0)
            ended = False
            while message := bus.pop():
                if message.type == Gst.MessageType.ERROR:
                    # The first says why; others follow from it.
                    result.error = result.error or message.parse_error()[0].message
                    ended = True
                elif message.type == Gst.MessageType.ELEMENT:
                    structure = message.get_structure()
                    if structure.get_name() == "helix-connection":
                        result.states.append(structure.get_string("state"))
                ended = ended or message.type == Gst.MessageType.EOS
            if ended or (frames and len(result.buffers) >= frames):
                break
        stats = pipeline.get_by_name("e").get_property("stats")
        names = [stats.nth_field_name(index) for index in range(stats.n_fields())]
        result.stats = {name: stats.get_value(name) for name in names}
    finally:
        pipeline.set_state(Gst.State.NULL)
        bus.set_flushing(True)
    return result


def source(frames=FRAMES, size=SIZE, live=False):
    """Pictures that differ from each other, in NV12."""
    return (
        f"videotestsrc num-buffers={frames} pattern=smpte100 horizontal-speed=3 "
        f"is-live={str(live).lower()} ! video/x-raw,format=NV12,width={size[0]},height={size[1]},framerate=60/1"
    )


def encode(address, options="", frames=FRAMES, live=False, decode=True):
    """vsockenc on the host at `address`."""
    tail = "h264parse ! avdec_h264 ! videoconvert ! video/x-raw,format=NV12 ! " if decode else ""
    return run(
        f"{source(frames, live=live)} ! vsockenc name=e {properties(address)} {options} "
        f"! {tail}appsink name=sink sync=false max-buffers=0"
    )


def original(frames=FRAMES):
    """What went in."""
    pipeline = Gst.parse_launch(f"{source(frames)} ! appsink name=sink sync=false")
    pipeline.set_state(Gst.State.PLAYING)
    sink, buffers = pipeline.get_by_name("sink"), []
    while sample := sink.emit("try-pull-sample", LONG * Gst.SECOND):
        buffer = sample.get_buffer()
        buffers.append(bytes(buffer.extract_dup(0, buffer.get_size())))
    pipeline.set_state(Gst.State.NULL)
    return buffers


class EncoderAgainstForeignHost(unittest.TestCase):
    """vsockenc and host.py."""

    def violations(self, host):
        """What host.py says that no well-behaved client does."""
        host.stop()
        return [line for line in host.lines if json.loads(line).get("event") == "violation"]

    def exact(self, *switches, options="", listen="tcp:127.0.0.1:0"):
        """Every picture comes out as it went in."""
        with python_host(*switches, listen=listen) as host:
            result = encode(host.address, options)
            self.assertIsNone(result.error)
            self.assertEqual([data for _, data in result.buffers], original())
            self.assertEqual(result.states, ["connected"])
            self.assertEqual(result.stats["dropped"], 0)
            self.assertEqual(self.violations(host), [])

    def test_every_picture_comes_back_exactly_over_tcp(self):
        self.exact()

    def test_every_picture_comes_back_exactly_over_ipv6(self):
        try:
            self.exact(listen="tcp:[::1]:0")
        except AssertionError as error:
            if "ended with" in str(error):
                self.skipTest("no IPv6 here")
            raise

    def test_every_picture_comes_back_exactly_over_a_unix_socket(self):
        with tempfile.TemporaryDirectory() as folder:
            self.exact(listen=f"unix:{folder}/host.sock")

    def test_many_in_flight(self):
        self.exact("--late", "20", options="max-in-flight=16")

    def test_timestamps_that_went_through_a_double(self):
        for how in ("double", "micros"):
            with self.subTest(how):
                self.exact("--pts", how, options="max-in-flight=4")

    def test_nonsense_in_dts(self):
        for how in ("zero", "min"):
            with self.subTest(how):
                self.exact("--dts", how)

    def test_replies_byte_by_byte(self):
        self.exact("--split")

    def test_a_part_for_each_nal_unit(self):
        self.exact("--split-nals")

    def test_unknown_messages_in_between(self):
        self.exact("--chatter")

    def test_each_reply_twice(self):
        self.exact("--reply-twice", options="max-in-flight=4")

    def test_a_host_that_wants_its_configuration_first(self):
        self.exact("--need-config")

    def test_request_ids_and_epochs(self):
        self.exact("--hello", options="max-in-flight=4")
        self.exact("--hello", "--capabilities", "1", "--stray", options="max-in-flight=4")
        self.exact("--hello", "--reply-twice", "--pts", "micros", options="max-in-flight=4")

    def test_replies_out_of_order(self):
        self.exact("--hello", "--reorder", "4", options="max-in-flight=4")

    def test_fewer_requests_where_the_host_wants_fewer(self):
        # More than two at once would be a violation.
        self.exact("--hello", "--max-in-flight", "2", "--late", "5", options="max-in-flight=16")

    def test_hello_resp_twice_or_late(self):
        self.exact("--hello", "--hello-twice")
        self.exact("--hello-late")

    def test_hosts_of_no_use_are_named(self):
        for text, switches in {
            "encodes no H.264": ["--codecs", "2"],
            "takes no requests": ["--max-in-flight", "0"],
            "limit of 1000 bytes": ["--max-message", "1056"],
        }.items():
            with self.subTest(text), python_host("--hello", *switches) as host:
                self.assertIn(text, encode(host.address, decode=False).error)

    def test_a_token_is_wanted_or_not(self):
        self.exact("--token", "secret", options="auth-token=secret")
        self.exact("--hello", options="auth-token=secret")
        self.exact(options="auth-token=secret")
        for option, advice in {"": "Set auth-token", "auth-token=guess": "is auth-token the one"}.items():
            with self.subTest(advice), python_host("--token", "secret") as host:
                begin = time.monotonic()
                result = encode(host.address, f"{option} reconnect-timeout=60000", decode=False)
                self.assertIn("the auth token is missing or wrong", result.error)
                self.assertIn(advice, result.error)
                self.assertLess(time.monotonic() - begin, LONG)

    def test_a_missing_reply_loses_its_own_frame_only(self):
        with python_host("--drop-reply", "5", "--gop", "1") as host:
            result = encode(host.address, "timeout=500 max-in-flight=4", decode=False)
        self.assertIsNone(result.error)
        self.assertEqual(len(result.buffers), FRAMES - FRAMES // 5)
        self.assertEqual(result.states, ["connected"])
        self.assertEqual(result.stats["dropped"], FRAMES // 5)

    def test_an_error_loses_its_own_frame_only(self):
        with python_host("--error-every", "5", "--gop", "1") as host:
            result = encode(host.address, decode=False)
        self.assertIsNone(result.error)
        self.assertEqual(len(result.buffers), FRAMES - FRAMES // 5)
        self.assertEqual((result.stats["errors"], result.stats["dropped"]), (FRAMES // 5,) * 2)

    def test_a_host_that_skips_frames_in_silence_is_named(self):
        with python_host("--generation", "2") as host:
            result = encode(host.address, "timeout=400", decode=False)
        self.assertIn("did not answer a FRAME_REQUEST", result.error)

    def test_broken_hosts_are_left_and_called_again(self):
        faults = {
            "garbage": ["--garbage-after", "20"],
            "half a message": ["--truncate-after", "20"],
            "too many NAL units": ["--fault-at", "20", "--nal-count", "100000"],
            "a NAL unit of 4 GiB": ["--fault-at", "20", "--nal-size", str(2**32 - 1)],
            "a payload of 4 GiB": ["--fault-at", "20", "--payload-size", str(2**32 - 1)],
            "silence": ["--silent-after", "20"],
        }
        for name, switches in faults.items():
            with self.subTest(name), python_host(*switches) as host:
                # Live, so that there are still frames when the host is back.
                result = encode(host.address, "timeout=1000", frames=240, live=True, decode=False)
                self.assertIsNone(result.error)
                self.assertGreaterEqual(result.stats["reconnects"], 1)
                self.assertGreaterEqual(len(result.buffers), 19)
                times = [pts for pts, _ in result.buffers]
                self.assertEqual(times, sorted(set(times)))
                self.assertEqual(self.violations(host), [])

    def test_broken_hosts_are_an_error_where_that_is_wanted(self):
        faults = {
            "magic is": ["--garbage-after", "5"],
            "the stream ended inside FRAME_RESPONSE": ["--truncate-after", "5"],
            "nal_count is 100000": ["--fault-at", "5", "--nal-count", "100000"],
            "NAL size is": ["--fault-at", "5", "--nal-size", str(2**32 - 1)],
            "payload_size is": ["--fault-at", "5", "--payload-size", str(2**32 - 1)],
            "no sign of life": ["--silent-after", "5"],
        }
        for text, switches in faults.items():
            with self.subTest(text), python_host(*switches) as host:
                result = encode(host.address, "timeout=2000 reconnect-timeout=0", decode=False)
                self.assertIn(text, result.error)


class SourceAgainstForeignHost(unittest.TestCase):
    """scanoutsrc and host.py."""

    def watch(self, host, options="", frames=60, decode=True):
        tail = "h264parse ! avdec_h264 ! " if decode else ""
        return run(
            f"scanoutsrc name=e scanout-id=1 {properties(host.address)} {options} "
            f"! {tail}appsink name=sink sync=false",
            frames=frames,
        )

    def test_frames_from_the_next_keyframe_on(self):
        with python_host("--push", "1=160x120@60", "--push-gop", "20") as host:
            result = self.watch(host)
        self.assertIsNone(result.error)
        self.assertGreaterEqual(len(result.buffers), 60)
        self.assertEqual(result.states, ["connected"])

    def test_a_stream_out_of_step_is_found_again(self):
        with python_host("--push", "1=160x120@60", "--push-gop", "5", "--partial-at", "20") as host:
            result = self.watch(host, decode=False)
        self.assertIsNone(result.error)
        self.assertGreaterEqual(result.stats["resyncs"], 1)
        self.assertEqual(result.states[:3], ["connected", "reconnecting", "connected"])

    def test_broken_hosts_are_left_and_called_again(self):
        faults = {
            "garbage": ["--garbage-after", "20"],
            "half a message": ["--truncate-after", "20"],
            "a payload of 4 GiB": ["--fault-at", "20", "--payload-size", str(2**32 - 1)],
            "too many NAL units": ["--fault-at", "20", "--nal-count", "100000"],
        }
        for name, switches in faults.items():
            with self.subTest(name):
                with python_host("--push", "1=160x120@60", "--push-gop", "5", *switches) as host:
                    result = self.watch(host, decode=False)
                self.assertIsNone(result.error)
                self.assertGreaterEqual(result.stats["reconnects"], 1)

    def test_a_token_is_wanted(self):
        with python_host("--token", "secret", "--push", "1=64x48@30") as host:
            base = f"scanoutsrc name=e scanout-id=1 {properties(host.address)}"
            self.assertIn("Set auth-token", run(f"{base} ! appsink name=sink").error)
            result = run(f"{base} auth-token=secret ! appsink name=sink sync=false", frames=3)
            self.assertIsNone(result.error)

    def test_a_still_screen_is_no_error(self):
        with python_host("--push", "1=160x120@60", "--push-gop", "5", "--push-still", "10") as host:
            began = time.monotonic()
            with self.assertRaisesRegex(AssertionError, "no end after 2 s"):
                # Twenty times the time limit passes in silence.
                run(
                    f"scanoutsrc name=e scanout-id=1 {properties(host.address)} timeout=100 "
                    "! appsink name=sink sync=false",
                    seconds=2,
                )
            self.assertGreaterEqual(time.monotonic() - began, 2)
            host.stop()
            self.assertEqual(len([line for line in host.lines if '"connect"' in line]), 1)

    def test_a_dead_host_is_an_error_where_that_is_wanted(self):
        # The first PING comes when the screen stands still, and gets no answer any more.
        switches = ("--push", "1=160x120@60", "--push-gop", "5", "--push-still", "10", "--silent-after", "4")
        with python_host(*switches) as host:
            result = self.watch(host, "timeout=200 reconnect-timeout=0", frames=100000, decode=False)
        self.assertIn("not even to a PING", result.error)

    def test_a_host_without_screens_is_named(self):
        with python_host("--generation", "1") as host:
            result = self.watch(host, "timeout=300")
        self.assertIn("does not answer", result.error)


class ElementsAgainstHelixHost(unittest.TestCase):
    """What only both of ours do with each other: greetings that find more than a legacy peer."""

    def test_a_token_lets_both_elements_in_and_nobody_else(self):
        with tempfile.NamedTemporaryFile("w", suffix=".token") as file:
            file.write("open sesame\n")
            file.flush()
            os.chmod(file.name, 0o600)
            screen = "1=videotestsrc is-live=true ! video/x-raw,width=64,height=48"
            with helix_host("--token-file", file.name, "--scanout", screen) as host:
                watch = f"scanoutsrc name=e scanout-id=1 {properties(host.address)}"
                sink = "! appsink name=sink sync=false"
                for token in ("", 'auth-token="close sesame"'):
                    error = encode(host.address, token, decode=False).error
                    self.assertIn("auth-token", error)
                    self.assertNotIn("sesame", error)
                    self.assertIn("auth-token", run(f"{watch} {token} {sink}").error)
                token = 'auth-token="open sesame"'
                result = encode(host.address, f"{token} max-in-flight=4", decode=False)
                self.assertEqual((result.error, len(result.buffers)), (None, FRAMES))
                self.assertEqual(result.stats["unmatched"], 0)
                self.assertIsNone(run(f"{watch} {token} {sink}", frames=3).error)

    def test_the_limit_of_this_host_is_named(self):
        with helix_host("--max-frame-bytes", "4000") as host:
            self.assertIn("limit of 4000 bytes", encode(host.address, decode=False).error)


class ForeignClientAgainstHelixHost(unittest.TestCase):
    """client.py and helix-host."""

    def client(self, host, *arguments):
        """Runs client.py; its verdict, which must be good."""
        command = [sys.executable, str(FOLDER / "client.py"), host.address, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LONG, check=False)
        self.assertEqual(done.returncode, 0, f"{arguments}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def test_pictures_come_back_as_they_were(self):
        with tempfile.TemporaryDirectory() as folder:
            for listen in ("tcp:127.0.0.1:0", f"unix:{folder}/host.sock"):
                with self.subTest(listen), helix_host(listen=listen) as host:
                    for picture in ("320x240:BGRA", "320x240:RGBA", "320x240:NV12"):
                        self.client(
                            host, "encode", "--picture", picture, "--frames", "30",
                            "--verify-psnr", "30", "--stride-pad", "16", "--ping-every", "7",
                        )  # fmt: skip

    def test_size_and_format_change_in_mid_stream(self):
        with helix_host() as host:
            self.client(
                host, "encode", "--picture", "320x240:BGRA", "--picture", "176x144:NV12",
                "--picture", "33x17:RGBA", "--frames", "20", "--in-flight", "4",
            )  # fmt: skip

    def test_ping_and_the_probe_for_legacy_peers(self):
        with helix_host() as host:
            self.client(host, "ping", "--count", "20", "--probe")

    def test_a_resource_id_is_refused_with_an_error(self):
        with helix_host() as host:
            self.client(host, "encode", "--resource", "7", "--allow-errors", "--frames", "3")

    def test_a_screen_is_pushed_from_a_keyframe_on(self):
        screen = "1=videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=30/1"
        with helix_host("--scanout", screen) as host:
            self.client(
                host, "subscribe", "1", "--frames", "60", "--keyframe-within", "1", "--decode", "320x240"
            )

    def test_enable_comes_before_subscribe(self):
        screen = "1=videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=30/1"
        with helix_host("--scanout", screen) as host:
            self.client(host, "subscribe", "1", "--frames", "20", "--enable", "320x240@30", "--bitrate", "500000")

    def test_every_byte_vector(self):
        with helix_host() as host:
            self.client(host, "vectors", "--hello", str(VECTORS))

    def test_hello_says_what_the_host_is_and_can(self):
        with helix_host() as host:
            peer = self.client(host, "ping", "--hello", "--probe")["peer"]
        self.assertEqual((peer["version"], peer["codecs"], peer["max_in_flight"]), (1, 1, 16))
        self.assertEqual((peer["max_width"], peer["max_height"]), (8192, 8192))
        self.assertEqual(peer["max_message"], 12 + 44 + 64 * 2**20)
        # Request ids, CONFIG_RESP, KEYFRAME_REQ, capture time.
        self.assertEqual(peer["capabilities"], 0b1_0000_0111)
        tlvs = {kind: bytes.fromhex(value) for kind, value in peer["tlvs"]}
        self.assertTrue(tlvs[1].startswith(b"helix-host "), tlvs)
        self.assertEqual((tlvs[2], tlvs[4]), (b"x264enc", b"CLOCK_MONOTONIC"))
        self.assertNotIn("remarks", peer)

    def test_request_ids_epochs_and_config_resp(self):
        with helix_host() as host:
            result = self.client(
                host, "encode", "--hello", "--picture", "320x240:BGRA", "--frames", "40", "--in-flight", "8",
                "--flush-every", "12", "--bitrate", "2345678", "--verify-psnr", "30",
            )  # fmt: skip
        self.assertEqual(result["replies"] + result["stale"], 40)
        # x264enc counts in kbit/s.
        expected = {
            "width": 320, "height": 240, "bitrate": 2345000, "framerate_num": 60, "framerate_den": 1,
            "profile": 66, "level": 0, "realtime": 1,
        }  # fmt: skip
        self.assertEqual(result["config"], expected)

    def test_errors_carry_the_tag_of_their_request(self):
        with helix_host() as host:
            for greeting in (["--hello"], ["--hello", "--capabilities", "2"], []):
                with self.subTest(greeting):
                    result = self.client(
                        host, "encode", *greeting, "--resource", "7", "--allow-errors", "--frames", "20",
                        "--in-flight", "4",
                    )  # fmt: skip
                    self.assertEqual(result["errors"], 20)
                    self.assertIn("send pixels", str(result["error_texts"]))

    def test_a_screen_is_pushed_after_hello_too(self):
        screen = "1=videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=30/1"
        with helix_host("--scanout", screen) as host:
            self.client(host, "subscribe", "1", "--frames", "20", "--hello", "--bitrate", "500000")

    def test_broken_hellos_are_refused(self):
        with helix_host() as host:
            self.client(host, "hello-faults")
            before = host.rss()
            for _ in range(10):
                self.client(host, "hello-faults")
            self.assertLess(host.rss() - before, 16 * 1024, "KiB more than before")

    def test_only_who_knows_the_token_gets_in(self):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "token"
            file.touch(0o600)
            file.write_text("open sesame\n", encoding="ascii")
            with helix_host("--token-file", str(file)) as host:
                knows = ("--hello", "--token", "open sesame")
                self.client(host, "stranger")
                self.client(host, "encode", *knows, "--picture", "320x240:NV12", "--frames", "10")
                before = host.rss()
                for _ in range(20):
                    self.client(host, "stranger")
                self.assertLess(host.rss() - before, 16 * 1024, "KiB more than before")
                self.client(host, "ping", *knows)

    def test_a_client_that_offers_a_token_nobody_asked_for_gets_in(self):
        with helix_host() as host:
            self.client(host, "ping", "--hello", "--token", "whatever")

    def test_misbehaviour_hurts_nobody_else_and_memory_stays_flat(self):
        screen = "1=videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=30/1"
        with helix_host("--scanout", screen) as host:
            good = ["encode", "--picture", "320x240:NV12", "--frames", "10"]
            self.client(host, *good)
            self.client(host, "garbage", "--rounds", "20")
            before = host.rss()
            for bad in (
                ["garbage", "--rounds", "100"],
                ["truncate"],
                ["silent", "--half", "--seconds", "1", "--expect", "open"],
                ["flood", "--requests", "40"],
                ["slow-reader", "1", "--seconds", "2"],
            ):
                with self.subTest(bad[0]):
                    self.client(host, *bad)
                    self.client(host, *good)
            self.assertLess(host.rss() - before, 64 * 1024, "KiB more than before")

    def test_too_many_clients_are_told(self):
        with helix_host("--max-clients", "5") as host:
            self.client(host, "crowd", "--clients", "8", "--served", "5")


if __name__ == "__main__":
    unittest.main()
