#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The switches of host.py: its quirks and its faults, one line each."""

import argparse
import re

DESCRIPTION = """\
A host of the Helix frame-export protocol for tests, written from its description alone. Without
switches it behaves: it answers FRAME_REQUESTs with H.264 that decodes to exactly the pixels it
got, and pushes scanouts to subscribers, as deployed hosts of both generations do (legacy: no
HELLO). Each quirk of those hosts, and each fault, is a switch.

It prints {"listening": ADDRESS} and then one JSON line for each thing it sees. "violation" lines
are what no well-behaved client does. It ends on SIGTERM, when its stdin (a pipe) closes, or after
--lifetime seconds."""

EPILOG = """\
examples:
  host.py --listen tcp:127.0.0.1:15937
  host.py --listen unix:/tmp/helix.sock --push 1=320x240@30
  host.py --listen tcp:127.0.0.1:0 --generation 2          (FRAME_REQUEST gets no answer, ever)
  host.py --listen tcp:127.0.0.1:0 --push 1=320x240@30 --partial-at 5   (stream out of step)
"""


def scanout(text):
    """ID=WxH@FPS as (id, width, height, fps)."""
    match = re.fullmatch(r"(\d+)=(\d+)x(\d+)@(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=WIDTHxHEIGHT@FPS, as 1=320x240@30")
    return tuple(int(part) for part in match.groups())


def parse(arguments=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        "host.py", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--listen", metavar="ADDRESS", action="append", required=True,
        help="tcp:HOST:PORT (0 = any port), tcp:[IPV6]:PORT or unix:PATH; may be given several times")
    add("--lifetime", metavar="S", type=float, default=600, help="end after so long (600)")

    group = parser.add_argument_group("pictures")
    add = group.add_argument
    add("--gop", metavar="N", type=int, default=60,
        help="a keyframe at least every N replies (60); 1 = keyframes only")
    add("--profile", type=int, choices=(66, 77), default=66,
        help="profile in the SPS, whatever CONFIG_REQ asks for (quirk 9)")
    add("--push", metavar="ID=WxH@FPS", type=scanout, action="append", default=[],
        help="a scanout with a moving picture, for SUBSCRIBE")
    add("--push-gop", metavar="N", type=int, default=60, help="keyframe distance of scanouts (60)")
    add("--push-still", metavar="N", type=int, default=0,
        help="a scanout's screen stands still after N pictures: nothing is pushed (quirk 7)")
    add("--keyframe-on-subscribe", action="store_true",
        help="a newcomer gets a keyframe at once; deployed hosts let it wait for the GOP (quirk 7)")

    group = parser.add_argument_group("extensions (a legacy host without them)")
    add = group.add_argument
    add("--hello", action="store_true", help="answer HELLO")
    add("--capabilities", metavar="N", type=lambda text: int(text, 0), default=7,
        help="capability bits to announce of 1 ids, 2 CONFIG_RESP, 4 KEYFRAME_REQ, 8 resource ids (7);"
        " what ids bring is said by --resources")
    add("--max-in-flight", metavar="N", type=int, default=16, help="requests open at once (16)")
    add("--token", metavar="TEXT", help="refuse clients without this auth token; implies --hello")
    add("--codecs", metavar="N", type=lambda text: int(text, 0), default=1,
        help="codec bits to announce (1 = H.264)")
    add("--max-message", metavar="BYTES", type=int, default=12 + 44 + (64 << 20),
        help="the largest message to announce")
    add("--hello-late", action="store_true", help="HELLO_RESP comes after the PONG: as a legacy host")
    add("--hello-twice", action="store_true",
        help="a second HELLO_RESP, which announces nothing, follows the first")
    add("--reorder", metavar="N", type=int, default=0,
        help="with request ids: hold N replies and send them in reverse")
    add("--stray", action="store_true",
        help="with request ids: before each reply one of another epoch and one of another id")
    add("--split-nals", action="store_true",
        help="nal_count = number of NAL units; else 1 with the whole access unit")

    group = parser.add_argument_group("quirks of deployed hosts")
    add = group.add_argument
    add("--generation", choices=("1", "2", "both"), default="both",
        help="1: knows no SUBSCRIBE and no scanouts; 2: skips FRAME_REQUEST in silence (quirk 1)")
    add("--drop-reply", metavar="N", type=int, default=0,
        help="every Nth request gets no reply (quirk 3)")
    add("--error-every", metavar="N", type=int, default=0,
        help="every Nth request gets ERROR -5 instead (quirk 3)")
    add("--pts", choices=("exact", "double", "micros"), default="double",
        help="PTS of replies: as sent, through double seconds, or cut to microseconds (quirk 3)")
    add("--dts", choices=("pts", "zero", "min"), default="pts",
        help="DTS of replies: the PTS, 0, or i64::MIN (quirk 3)")
    add("--resources", choices=("error", "wrong", "silent"), default="error",
        help="unknown resource id: ERROR -2, a wrong picture, or nothing (quirk 6)")
    add("--need-config", action="store_true", help="ERROR -6 before the first CONFIG_REQ")
    add("--slow", choices=("close", "partial"), default="close",
        help="what a subscriber that does not read gets: an end, or parts of frames (quirk 8)")
    add("--sndbuf", metavar="BYTES", type=int, default=0,
        help="send buffer of each connection, to make clients slow sooner")
    add("--partial-at", metavar="N", type=int, default=0,
        help="frame N of a connection is sent in half, then on with the next message (quirk 8)")
    add("--silent-after", metavar="N", type=int, default=None,
        help="after N messages of a client neither read nor write, nor close (quirk 10)")
    add("--idle", metavar="S", type=float, default=60,
        help="close after so many seconds of client silence (60; quirk 10)")
    add("--max-clients", metavar="N", type=int, default=16, help="refuse more (16; quirk 12)")

    group = parser.add_argument_group("faults")
    add = group.add_argument
    add("--garbage-after", metavar="N", type=int, default=None,
        help="after N messages to a client send 4096 random bytes instead of the next")
    add("--truncate-after", metavar="N", type=int, default=None,
        help="after N messages to a client send half of the next, then close")
    add("--fault-at", metavar="N", type=int, default=1,
        help="which frame of a connection the next three change (1)")
    add("--nal-count", metavar="N", type=int, default=None, help="nal_count says N")
    add("--nal-size", metavar="N", type=int, default=None, help="the first NAL size says N")
    add("--payload-size", metavar="N", type=int, default=None, help="payload_size says N")
    add("--reply-twice", action="store_true", help="each reply is sent twice")
    add("--late", metavar="MS", type=int, default=0, help="each reply comes so much later")
    add("--split", action="store_true", help="write one byte at a time")
    add("--chatter", action="store_true", help="an unknown message before each of ours")

    options = parser.parse_args(arguments)
    options.hello = options.hello or options.token is not None or options.hello_late
    return options
