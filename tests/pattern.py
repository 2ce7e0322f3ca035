# SPDX-License-Identifier: MIT OR Apache-2.0
"""The known moving picture: what the test client shows, and any of its frames made again.

videotestsrc draws it without noise and scrolls it SPEED pixels to the left or right per frame, so
frame n can be computed at any later time and compared pixel by pixel with what came out of a
pipeline. Every frame of one PERIOD differs from every other one.
"""

NAME = "colors"
SPEED = 4  # pixels per frame


def description(width, height, fps, live=True):
    """The gst-launch description of the picture as BGRx, without a sink."""
    return (
        f"videotestsrc is-live={str(live).lower()} pattern={NAME} horizontal-speed={SPEED}"
        f" ! video/x-raw,format=BGRx,width={width},height={height},framerate={fps}/1"
    )
