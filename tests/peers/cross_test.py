#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Our helix-host with client.py, and our vsockenc and scanoutsrc with host.py.

Usage: cross_test.py HELIX_HOST PLUGINS [unittest arguments]: the built program, and the folder
with libgstvsock.so and libgstscanout.so. Everything runs over unix sockets and loopback TCP.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import unittest

import make_vectors
from test_peers import LIMIT, Host

PROGRAM = PLUGINS = None  # from the command line
GST_LIMIT = 60  # seconds; the first start of GStreamer scans all plugins


class OurHost(Host):
    """helix-host as a child process on a loopback port that it chose."""

    def __init__(self, *switches):
        self.process = subprocess.Popen(
            [PROGRAM, "--listen", "tcp:127.0.0.1:0", *switches], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        said = ""
        for said in self.process.stdout:  # it says where it listens, as soon as it does
            found = re.search(r"tcp:127\.0\.0\.1:\d+", said)
            if found:
                self.address = found[0]
                return
        raise AssertionError(f"helix-host did not say where it listens: {said}")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(LIMIT)
        self.process.stdout.close()


class HelixHost(unittest.TestCase):
    """The Rust host, asked by the Python client."""

    @classmethod
    def setUpClass(cls):
        scanout = "1=videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=30/1"
        cls.host = OurHost("--scanout", scanout)

    @classmethod
    def tearDownClass(cls):
        cls.host.__exit__()

    def test_probe_and_ping(self):
        self.host.run_client("ping", "--probe", "--session-id", "65535")

    def test_bgra_with_padded_stride(self):
        self.host.run_client("encode", "--stride-pad", "16", "--verify-psnr", "30")

    def test_nv12_with_requests_and_pings_in_flight(self):
        result = self.host.run_client("encode", "--picture", "640x480:NV12", "--in-flight", "4",
                                      "--ping-every", "3", "--verify-psnr", "30")
        self.assertEqual((result["replies"], result["pongs"]), (30, 10))

    def test_format_and_size_change_in_mid_stream(self):
        pictures = ("64x48:NV12", "33x17:RGBA", "50x38:NV12", "64x48:BGRA")
        switches = [word for name in pictures for word in ("--picture", name)]
        result = self.host.run_client("encode", *switches, "--frames", "10", "--verify-psnr", "25")
        self.assertGreaterEqual(result["keyframes"], 4)

    def test_unknown_resource_is_an_error(self):
        result = self.host.run_client("encode", "--resource", "9", "--frames", "2",
                                      "--allow-errors")
        self.assertEqual(result["errors"], 2)

    def test_scanout_is_pushed_with_a_keyframe_for_each_newcomer(self):
        for _ in range(2):
            result = self.host.run_client("subscribe", "1", "--frames", "20", "--keyframe-within",
                                          "0", "--decode", "320x240")
            self.assertEqual(result["decoded"], 20)

    def test_every_byte_vector(self):
        self.host.run_client("vectors", str(make_vectors.TARGET))

    def test_misbehaving_clients_harm_nobody(self):
        for command in (["garbage"], ["truncate"], ["silent", "--half", "--seconds", "0.5"],
                        ["flood"], ["slow-reader", "1", "--seconds", "2"]):
            with self.subTest(command[0]):
                self.host.run_client(*command)


class Elements(unittest.TestCase):
    """The Rust elements, served by the Python host."""

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        """A file of this test."""
        return os.path.join(self.folder.name, name)

    def launch(self, host, line, fails=False):
        """gst-launch-1.0 with a pipeline; {peer} stands for the connection's properties."""
        _, address, port = host.address.split(":")
        line = line.format(peer=f"tcp-host={address} tcp-port={port}")
        environment = os.environ | {"GST_PLUGIN_PATH": str(PLUGINS)}
        run = subprocess.run(["gst-launch-1.0", "-q", *line.split()], env=environment, text=True,
                             stdin=subprocess.DEVNULL, capture_output=True, timeout=GST_LIMIT,
                             check=False)
        self.assertEqual(bool(run.returncode), fails, f"{line}\n{run.stderr[-600:]}")
        return run.stderr

    def encode(self, host, settings="", fails=False, frames=30):
        """A moving NV12 picture through vsockenc; what went in lies in `in`, what came in `out`."""
        return self.launch(host, f"videotestsrc num-buffers={frames} pattern=ball ! "
                           "video/x-raw,format=NV12,width=64,height=48,framerate=60/1 ! "
                           f"tee name=t ! queue ! vsockenc {{peer}} {settings} ! "
                           f"filesink location={self.path('out')} t. ! queue ! "
                           f"filesink location={self.path('in')}", fails)

    def check_exact(self):
        """The host's H.264 is lossless: what comes out is what went in, byte for byte."""
        subprocess.run(["gst-launch-1.0", "-q", "filesrc", f"location={self.path('out')}", "!",
                        "h264parse", "!", "avdec_h264", "!", "videoconvert", "!",
                        "video/x-raw,format=NV12", "!", "filesink",
                        f"location={self.path('raw')}"], check=True, timeout=GST_LIMIT,
                       stdin=subprocess.DEVNULL, capture_output=True)
        before, after = (pathlib.Path(self.path(name)).read_bytes() for name in ("in", "raw"))
        self.assertTrue(before == after, f"{len(before)} bytes in, {len(after)} bytes out")

    def test_vsockenc_carries_every_picture_exactly(self):
        with Host() as host:
            self.encode(host, "max-in-flight=3")
            end = host.wait(lambda event: event.get("event") == "disconnect")
            self.assertEqual((end["requests"], end["violations"]), (30, 0))
            self.assertLessEqual(end["max_open"], 3)
        self.check_exact()

    def test_vsockenc_survives_bytes_one_by_one_and_unknown_messages(self):
        with Host("--split", "--chatter", "--dts", "min", "--pts", "micros") as host:
            self.encode(host)
        self.check_exact()

    def test_vsockenc_survives_missing_replies_and_errors(self):
        for switch in ("--drop-reply", "--error-every"):
            with self.subTest(switch), Host(switch, "7") as host:
                self.encode(host, "timeout=1000")

    def test_vsockenc_says_what_a_second_generation_host_is(self):
        with Host("--generation", "2") as host:
            said = self.encode(host, "timeout=500 reconnect-timeout=0", fails=True)
            self.assertRegex(said, "FRAME_REQUEST|second.generation|no reply|did not answer")

    def test_vsockenc_ends_with_an_error_when_the_host_lies(self):
        for switches in (("--garbage-after", "3"), ("--truncate-after", "3"),
                         ("--nal-size", "4294967295"), ("--nal-count", "4294967295"),
                         ("--payload-size", "4294967295"), ("--silent-after", "3")):
            with self.subTest(switches[0]), Host(*switches) as host:
                self.encode(host, "timeout=500 reconnect-timeout=0", fails=True)

    def test_scanoutsrc_starts_at_a_keyframe(self):
        with Host("--push", "1=64x48@60", "--push-gop", "20") as host:
            out = self.path("out")
            self.launch(host, f"scanoutsrc scanout-id=1 {{peer}} num-buffers=30 ! "
                        f"filesink location={out}")
            end = host.wait(lambda event: event.get("event") == "disconnect")
            self.assertEqual(end["violations"], 0)
        self.assertEqual(pathlib.Path(out).read_bytes()[:5].hex()[-2:], "67")  # an SPS

    def test_scanoutsrc_finds_back_into_step(self):
        for switch in ("--partial-at", "--truncate-after", "--garbage-after"):
            with self.subTest(switch):
                with Host("--push", "1=64x48@60", "--push-gop", "5", switch, "20") as host:
                    self.launch(host, "scanoutsrc scanout-id=1 {peer} num-buffers=40 ! fakesink")


def main():
    """The program."""
    global PROGRAM, PLUGINS
    if len(sys.argv) < 3 or not pathlib.Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    PROGRAM, PLUGINS = (pathlib.Path(word).resolve() for word in sys.argv[1:3])
    unittest.main(argv=sys.argv[:1] + sys.argv[3:])


if __name__ == "__main__":
    main()
