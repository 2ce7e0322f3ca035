#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""A host of the Helix protocol with a switch for each quirk of deployed hosts: see --help.

This file listens and ends; host_session.py is one client's connection, host_scanout.py makes the
pushed frames, host_options.py says what the switches mean.
"""

import asyncio
import os
import signal
import socket
import sys

import host_options
import peer_net
from host_scanout import Scanout
from host_session import Session


class Host:
    """The listening sockets, the clients and the scanouts of one process."""

    def __init__(self, options):
        self.options = options
        self.event = peer_net.Events()
        self.sessions = set()
        self.tasks = set()
        self.clients = 0
        self.scanouts = {
            number: Scanout(self, number, width, height, fps)
            for number, width, height, fps in options.push
        }

    def spawn(self, coroutine):
        """Run a coroutine until it ends or the host does."""
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task):
        self.tasks.discard(task)
        if not task.cancelled() and task.exception():
            self.event(event="bug", what=repr(task.exception()))

    async def run(self):
        """Serve until told to end."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        peer_net.parent_gone(lambda: loop.call_soon_threadsafe(ended.set))
        listeners = []
        for address in self.options.listen:
            sock, text = peer_net.listen(address)
            sock.setblocking(False)
            listeners.append(sock)
            self.event(listening=text)
            self.spawn(self._accept(sock))
        try:
            await asyncio.wait_for(ended.wait(), self.options.lifetime)
        except TimeoutError:
            pass
        # Again and again: Python 3.11's wait_for() loses a cancellation that comes together with
        # the end of what it waits for (cpython issue 86296).
        while self.tasks:
            for task in self.tasks:
                task.cancel()
            await asyncio.wait(self.tasks, timeout=0.2)
        for sock in listeners:
            if sock.family == socket.AF_UNIX:
                os.unlink(sock.getsockname())
            sock.close()
        self.event(event="stopped", events_lost=self.event.lost)

    async def _accept(self, listener):
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            self.clients += 1
            if len(self.sessions) >= self.options.max_clients:
                self.event(event="refused", client=self.clients, reason="too many clients")
                sock.close()
                continue
            session = Session(self, sock, self.clients)
            self.sessions.add(session)
            self.spawn(session.run())


def main():
    """The program."""
    options = host_options.parse()
    try:
        asyncio.run(Host(options).run())
    except (OSError, ValueError) as error:
        sys.exit(f"host.py: listen on {', '.join(options.listen)}: {error}")


if __name__ == "__main__":
    main()
