# SPDX-License-Identifier: MIT OR Apache-2.0
"""The rig of tests/vm itself, as far as that needs no guest."""

import contextlib
import fcntl
import io
import pathlib
import socket
import subprocess
import sys
import tempfile
import types
import unittest
from unittest import mock

sys.path.append(str(pathlib.Path(__file__).parent / "vm"))

import rig  # noqa: E402
from guest import Guest, Job, System  # noqa: E402
from programs import Fault  # noqa: E402


class Stages(unittest.TestCase):
    """Verdicts of a stage."""

    def run_stage(self, run, imported=None):
        """The verdict on a stage that does `run(stage)`, and what was printed; `imported` does more than that."""
        folder = self.enterContext(tempfile.TemporaryDirectory())
        share, sockets = pathlib.Path(folder, "share"), pathlib.Path(folder, "sockets")
        sockets.mkdir()
        module = types.SimpleNamespace(run=run, __doc__="A stage.")
        imported = imported or (lambda _: module)
        printed = io.StringIO()
        with (
            mock.patch.object(rig.importlib, "import_module", imported),
            mock.patch.object(rig, "SOURCE", pathlib.Path(folder)),
            contextlib.redirect_stdout(printed),
        ):
            passed, _ = rig.run_stage("some", System(None, None, share, sockets), 0)
        return passed, printed.getvalue()

    def test_one_whose_checks_are_good_passes(self):
        passed, said = self.run_stage(lambda stage: stage.check(True, "a fact"))
        self.assertTrue(passed)
        self.assertIn("some: passed, 1 checks", said)

    def test_one_without_checks_fails(self):
        passed, said = self.run_stage(lambda stage: None)
        self.assertFalse(passed)
        self.assertIn("it checked nothing", said)

    def test_a_failed_one_shows_logs_and_traces(self):
        def run(stage):
            (stage.folder / "guest.console.log").write_text("last words")
            (stage.folder / "guest.trace").write_text("res_create_2d")
            stage.check(False, "a fact")

        passed, said = self.run_stage(run)
        self.assertFalse(passed)
        self.assertIn("last words", said)
        self.assertIn("res_create_2d", said)

    def test_one_that_cannot_be_imported_fails_like_others(self):
        def imported(_):
            raise SyntaxError("two commas")

        with contextlib.redirect_stderr(io.StringIO()) as errors:
            passed, said = self.run_stage(None, imported)
        self.assertFalse(passed)
        self.assertIn("some: FAILED, 1 of 1 checks", said)
        self.assertIn("two commas", errors.getvalue())

    def test_no_stages_at_all_are_a_failure(self):
        with (
            mock.patch.object(rig, "stage_names", return_value=[]),
            mock.patch.object(sys, "argv", ["ci/vm"]),
            self.assertRaisesRegex(SystemExit, "no stages"),
        ):
            rig.main()


class Sockets(unittest.TestCase):
    """The folder for sockets, and its lock."""

    def setUp(self):
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.lock = self.folder / "vm.lock"

    def test_it_is_there_while_the_rig_runs(self):
        self.lock.touch()
        with rig.sockets_folder(self.lock) as folder:
            self.assertTrue(folder.is_dir())
        self.assertFalse(folder.exists())

    def test_a_second_rig_is_refused_before_it_builds(self):
        target = rig.SOURCE / "target"
        target.mkdir(exist_ok=True)
        with open(target / "vm.lock", "a", encoding="utf-8") as lock:
            # Another ci/vm in this tree has it otherwise, which does as well.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            second = subprocess.run(
                [rig.SOURCE / "ci" / "vm", "drm"], capture_output=True, text=True, timeout=60, check=False
            )
        self.assertEqual(second.returncode, 1)
        self.assertIn("another one runs", second.stderr)
        self.assertNotIn("Building", second.stdout + second.stderr)

    def test_what_a_killed_one_left_is_removed(self):
        left = self.folder / "left"
        left.mkdir()
        self.lock.write_text(str(left))
        with rig.sockets_folder(self.lock) as folder:
            self.assertFalse(left.exists())
            self.assertEqual(self.lock.read_text(), str(folder))
        self.assertEqual(self.lock.read_text(), "")


class Guests(unittest.TestCase):
    """What is said to QEMU, and about jobs."""

    def test_a_comma_in_a_path_is_part_of_it(self):
        system = System(pathlib.Path("/room"), pathlib.Path("/a,b"), pathlib.Path("/share"))
        arguments = [str(argument) for argument in system.arguments("6.12", "")]
        self.assertTrue(any(",path=/a,,b," in argument for argument in arguments))

    def test_the_limit_is_told_from_other_ends(self):
        job = Job(types.SimpleNamespace(jobs=pathlib.Path()), "job", 7)
        job.status = 1
        self.assertEqual(job.ending(), "ended with 1")
        for status in (124, 137):
            job.status = status
            self.assertEqual(job.ending(), "was still running after 7 s")
        job.killed = True
        self.assertEqual(job.ending(), "ended with 137")

    def start_job(self):
        """A job of a guest that is not there, and the other end of its channel."""
        guest = Guest.__new__(Guest)
        guest.name, guest.received = "guest", b""
        guest.jobs = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        guest.channel, theirs = socket.socketpair()
        self.enterContext(guest.channel)
        self.enterContext(theirs)
        guest.running = {}
        job = guest.start("job", "true", 7)
        self.assertEqual(theirs.recv(100), b"run job 7\n")
        return job, theirs

    def test_a_signal_waits_for_the_job_to_begin(self):
        job, theirs = self.start_job()
        theirs.sendall(b"began job\n")
        said = []
        with mock.patch.object(job.guest, "tell", lambda line: said.append((line, job.began))):
            job.signal("TERM")
        self.assertEqual(said, [("signal job TERM", True)])

    def test_a_job_that_has_ended_gets_no_signal(self):
        job, theirs = self.start_job()
        theirs.sendall(b"done job 0\n")
        job.signal("TERM")
        theirs.setblocking(False)
        with self.assertRaises(BlockingIOError):
            theirs.recv(100)

    def test_a_guest_that_does_not_listen_is_a_fault(self):
        guest = Guest.__new__(Guest)
        guest.name = "deaf"
        guest.channel, theirs = socket.socketpair()
        with guest.channel, theirs, mock.patch("guest.GRACE", 0.1):
            with self.assertRaisesRegex(Fault, "tell deaf"):
                while True:
                    guest.tell("x" * 65536)


if __name__ == "__main__":
    unittest.main()
