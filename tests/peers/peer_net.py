#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""What both peers need around the protocol: addresses, a client connection, events, an end.

Addresses are `tcp:HOST:PORT` (`tcp:[::1]:PORT` for IPv6) and `unix:PATH`. There is no AF_VSOCK
here: these peers run on loopback only, and the bytes are the same.
"""

import errno
import json
import os
import select
import socket
import stat
import sys
import threading
import time

import helix_wire as wire


def parse_address(text):
    """(family, socket address) of an address text; raises ValueError that says what was expected."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        if host.startswith("["):
            return socket.AF_INET6, (host.strip("[]"), int(port))
        return socket.AF_INET, (host, int(port))
    raise ValueError(f"address {text!r}: expected tcp:HOST:PORT, tcp:[IPV6]:PORT or unix:PATH")


def listen(text):
    """A listening socket and its address as text, with the port that the kernel chose."""
    family, address = parse_address(text)
    sock = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_UNIX:
        remove_stale(address)
        sock.bind(address)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        host, port = sock.getsockname()[:2]
        text = f"tcp:[{host}]:{port}" if family == socket.AF_INET6 else f"tcp:{host}:{port}"
    sock.listen(64)
    return sock, text


def remove_stale(path):
    """Remove a unix socket that nobody listens on any more; one in use stays, and bind fails."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


class Events:
    """JSON lines on stdout. Never blocks: what a full pipe does not take is counted as lost."""

    def __init__(self):
        self.lost = 0
        self.fd = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(self.fd).st_mode):
            os.set_blocking(self.fd, False)

    def __call__(self, **fields):
        line = json.dumps(fields) + "\n"
        if len(line) > select.PIPE_BUF:  # a write up to this size is whole or not at all
            line = json.dumps({"event": fields.get("event"), "too_long": len(line)}) + "\n"
        try:
            os.write(self.fd, line.encode())
        except BlockingIOError:
            self.lost += 1
        except OSError:
            pass  # nobody reads any more; the host itself goes on


def parent_gone(callback):
    """Call back (from a thread) when stdin ends, if stdin is a pipe or a socket.

    A terminal and /dev/null say nothing about a parent, so they are left alone.
    """
    mode = os.fstat(0).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return

    def wait():
        while os.read(0, 4096):
            pass
        callback()

    threading.Thread(target=wait, daemon=True).start()


class PeerClosed(Exception):
    """The peer closed or reset the connection."""


class PeerSilent(Exception):
    """The peer did not do in time what was waited for."""


class Connection:
    """The client's end of a connection. Every wait has an end: `timeout` seconds, if no other."""

    def __init__(self, address, timeout=5.0):
        self.timeout = timeout
        self.decoder = wire.Decoder()
        self.messages = []  # decoded, not yet taken
        self.bytes_sent = self.bytes_received = 0
        family, where = parse_address(address)
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(timeout)
        try:
            self.sock.connect(where)
        except OSError as error:
            self.sock.close()
            raise PeerClosed(f"connect to {address}: {error} (does the host listen there?)") from None
        if family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def send(self, message, read=True):
        """Send a message (or raw bytes), reading meanwhile what the peer sends, unless told not to.

        A client that only writes can lock up with a host that only writes, each waiting for the
        other to read.
        """
        data = memoryview(message if isinstance(message, bytes) else wire.pack(message))
        deadline = time.monotonic() + self.timeout
        while data:
            self._wait([self.sock] if read else [], [self.sock], deadline, "take what was sent")
            try:
                count = self.sock.send(data)
                data = data[count:]
                self.bytes_sent += count
            except BlockingIOError:
                pass
            except OSError as error:
                raise PeerClosed(f"sending: {error}") from None
            if read:
                self._read()

    def receive(self, timeout=None):
        """The next message; PeerSilent after `timeout` seconds, PeerClosed, WireError."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            if self.messages:
                return self.messages.pop(0)
            message = self.decoder.next()
            if message:
                return message
            self._wait([self.sock], [], deadline, "send a whole message")
            if self._read() == 0:
                raise PeerClosed(f"peer closed with {len(self.decoder.buffer)} bytes of a message")

    def receive_only(self, kind, timeout=None):
        """The next message of type `kind`, keeping the others for `receive`."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        kept = []
        try:
            while True:
                message = self.receive(max(deadline - time.monotonic(), 0))
                if message.type == kind:
                    return message
                kept.append(message)
        finally:
            self.messages = kept + self.messages

    def wait_closed(self, timeout):
        """True once the peer closed, False when it did not within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                self._wait([self.sock], [], deadline, "close")
                if self._read() == 0:
                    return True
        except PeerClosed:
            return True
        except PeerSilent:
            return False

    def _wait(self, readers, writers, deadline, what):
        left = deadline - time.monotonic()
        if left <= 0 or not any(select.select(readers, writers, [], left)):
            raise PeerSilent(f"peer did not {what} in time")

    def _read(self):
        """Bytes read without waiting: their number, 0 at the end, None when there are none now."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerClosed(f"receiving: {error}") from None
        self.bytes_received += len(data)
        self.decoder.feed(data)
        return len(data)
