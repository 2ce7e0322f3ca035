# SPDX-License-Identifier: MIT OR Apache-2.0
"""The desktop as a program: it answers each line, and leaves nothing behind however it ends."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import unittest

PROGRAM = pathlib.Path(__file__).with_name("desktop.py")
END_TIMEOUT = 20


class DesktopProgram(unittest.TestCase):
    def start(self, *options, **env):
        """Starts a small desktop and returns what it said first."""
        self.program = subprocess.Popen(
            [sys.executable, str(PROGRAM), "--size", "320x240", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | env,
            text=True,
        )
        self.addCleanup(self.finish)
        return json.loads(self.program.stdout.readline())

    def finish(self):
        self.program.kill()
        self.program.wait()
        for pipe in (self.program.stdin, self.program.stdout):
            pipe.close()

    def ask(self, **request):
        self.program.stdin.write(json.dumps(request) + "\n")
        self.program.stdin.flush()
        return json.loads(self.program.stdout.readline())

    def assert_all_gone(self, ready):
        self.assertFalse(os.path.exists(ready["runtime_dir"]))
        for name, pid in ready["pids"].items():
            self.assertFalse(os.path.exists(f"/proc/{pid}"), f"{name} still runs")

    def test_without_a_monitor_there_are_virtual_ones_only(self):
        self.start("--no-monitor")
        self.assertIn("error", self.ask(cmd="screencast", mode="monitor"))
        self.assertGreater(self.ask(cmd="screencast", mode="virtual")["node"], 0)

    def test_answers_each_line_and_ends_with_its_input(self):
        ready = self.start()
        self.assertEqual(ready["event"], "ready")
        cast = self.ask(cmd="screencast", mode="monitor")
        self.assertGreater(cast["node"], 0)
        self.assertEqual(self.ask(cmd="close-session", session=cast["session"]), {"ok": True})
        client = self.ask(cmd="client", kind="pattern", fps=30, window=[64, 48])
        self.assertTrue(os.path.exists(f"/proc/{client['pid']}"))
        self.assertEqual(self.ask(cmd="stop-client", pid=client["pid"]), {"ok": True})
        self.assertFalse(os.path.exists(f"/proc/{client['pid']}"))
        killed = self.ask(cmd="kill", what="compositor")
        self.assertEqual(killed["pid"], ready["pids"]["compositor"])
        self.program.stdin.close()
        self.assertEqual(self.program.wait(END_TIMEOUT), 0)
        self.assert_all_gone(ready)

    def test_says_what_is_wrong_with_a_line_and_goes_on(self):
        self.start()
        self.assertIn("unknown cmd", self.ask(cmd="dance")["error"])
        self.assertIn("'session' is missing", self.ask(cmd="close-session")["error"])
        self.assertIn("cursor-mode", self.ask(cmd="screencast", **{"cursor-mode": "x"})["error"])
        self.assertIn("no client", self.ask(cmd="stop-client", pid=1)["error"])
        self.assertIn("only compositor", self.ask(cmd="kill", what="init")["error"])
        self.assertGreater(self.ask(cmd="screencast")["node"], 0)

    def test_sigterm_ends_everything(self):
        ready = self.start()
        self.program.send_signal(signal.SIGTERM)
        self.program.wait(END_TIMEOUT)
        self.assert_all_gone(ready)

    def test_part_that_does_not_start_is_named_with_its_log(self):
        with tempfile.TemporaryDirectory() as folder:
            broken = pathlib.Path(folder) / "mutter"
            broken.write_text("#!/bin/sh\necho no screen today >&2\nexit 3\n")
            broken.chmod(0o755)
            said = self.start(PATH=f"{folder}:{os.environ['PATH']}")
        self.assertIn("compositor ended with 3", said["error"])
        self.assertIn("no screen today", said["error"])
        self.assertEqual(self.program.wait(END_TIMEOUT), 1)


if __name__ == "__main__":
    unittest.main()
