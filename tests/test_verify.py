# SPDX-License-Identifier: MIT OR Apache-2.0
"""The demo's verdict can fail: wrong pictures are told from right ones, through a real encoder."""

import pathlib
import tempfile
import unittest

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

import pattern  # noqa: E402
import verify  # noqa: E402
from demo import MIN_PSNR  # noqa: E402

WIDTH, HEIGHT, FRAMES = 1280, 720, 12


class KnownPicture(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        Gst.init(None)
        cls.known = verify.Pattern(WIDTH, HEIGHT)
        cls.folder = tempfile.TemporaryDirectory()

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def film(self, spoil=""):
        """Encode the picture, changed by the elements `spoil`, and look at the film."""
        path = pathlib.Path(self.folder.name) / f"{self.id()}.mp4"
        source = pattern.description(WIDTH, HEIGHT, 30, live=False)
        pipeline = Gst.parse_launch(
            source.replace("videotestsrc", f"videotestsrc num-buffers={FRAMES}", 1)
            + f"{spoil} ! videoconvert ! video/x-raw,format=I420,width={WIDTH},height={HEIGHT}"
            " ! x264enc tune=zerolatency speed-preset=superfast bitrate=4000"
            f" ! h264parse ! mp4mux ! filesink location={path}"
        )
        pipeline.set_state(Gst.State.PLAYING)
        message = pipeline.get_bus().timed_pop_filtered(
            60 * Gst.SECOND, Gst.MessageType.EOS | Gst.MessageType.ERROR
        )
        pipeline.set_state(Gst.State.NULL)
        self.assertEqual(message.type, Gst.MessageType.EOS)
        self.sheet = path.with_suffix(".png")
        return verify.examine(path, self.known, self.sheet, FRAMES)

    def test_right_picture_is_recognised(self):
        film = self.film()
        self.assertEqual((film.frames, film.distinct, film.went_back), (FRAMES, FRAMES, 0))
        self.assertTrue(film.monotonic)
        self.assertGreater(min(film.psnr), MIN_PSNR + 5)
        self.assertEqual(self.sheet.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_exchanged_red_and_blue_is_refused(self):
        # The same bytes, called by the other name: what a wrong table of formats does (L9).
        spoil = " ! videoconvert ! video/x-raw,format=RGBx ! rawvideoparse format=bgrx"
        film = self.film(f"{spoil} width={WIDTH} height={HEIGHT} framerate=30/1")
        self.assertLess(max(film.psnr), MIN_PSNR)

    def test_shifted_picture_is_refused(self):
        film = self.film(" ! videobox top=-8 bottom=8 autocrop=false")
        self.assertLess(max(film.psnr), MIN_PSNR)

    def test_upside_down_picture_is_refused(self):
        film = self.film(" ! videoflip video-direction=vert")
        self.assertLess(max(film.psnr), MIN_PSNR)

    def test_black_picture_is_told(self):
        film = self.film(" ! videobalance saturation=0 brightness=-1")
        self.assertLess(film.darkest, 20)

    def test_neighbouring_frame_is_told_from_the_right_one(self):
        picture = self.known.frame(41)
        error = self.known._error(picture, self.known.frame(42))
        self.assertLess(verify.to_psnr(error), MIN_PSNR)
        self.assertEqual(self.known.match(picture), (41, 99.0))


if __name__ == "__main__":
    unittest.main()
