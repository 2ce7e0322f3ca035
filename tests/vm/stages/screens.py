# SPDX-License-Identifier: MIT OR Apache-2.0
"""A guest's outputs through helix-host --qemu and scanoutsrc: switched on by clients, and seen by them.

The guest knows nothing of this: `drmcheck output` looks at its connectors, and `drmcheck draw` shows a
known picture on each, at first with a cursor on the first. Everything else runs on the host, as it would beside any
QEMU: helix-host is started before QEMU, and one scanoutsrc for each output asks for a size (ENABLE_SCANOUT)
and decodes what it gets, which must be the picture of its output. Then one output is switched off, and on again as the guest's side does
it: it waits for the answer, which names the connector, and only then uses that. All of it once with this
machine's QEMU, once with Debian 13's.
"""

import subprocess
import time

import gi
import numpy

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import Gst, GstApp  # noqa: E402, F401

import helix_wire as wire  # noqa: E402
import peer_net  # noqa: E402
import verify  # noqa: E402
from display import Display  # noqa: E402
from programs import Fault  # noqa: E402

# Of console 0 and 1, in pixels: sizes that nobody has by default. Widths in steps of 8, as EDID has them.
SIZES = {0: (1304, 744), 1: (1048, 664)}
# Of console 1 when it is switched on again.
OTHER_SIZE = (920, 584)
LIMIT = 90
# In dB, as in tests/demo.py; of the whole picture, and around the cursor.
MIN_PSNR = 30
# Rows and columns of the cursor that `drmcheck draw --cursor` shows on the first output, and of what is around it.
CURSOR = (slice(100, 164), slice(200, 264))
AROUND = (slice(84, 180), slice(184, 280))


def run(stage):
    Gst.init(None)
    Gst.Registry.get().scan_path(str(stage.built("gstreamer-1.0")))
    display = Display(stage)
    for name, of_room in (("qemu", False), ("qemu-of-debian-13", True)):
        with stage.part(f"{name}: {version(stage.system, of_room)}"):
            look(stage, display, name, of_room)


def version(system, of_room):
    """What QEMU says it is."""
    line, environment = system.qemu(of_room)
    argv = [str(part) for part in [*line, "--version"]]
    said = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=True)
    return said.stdout.splitlines()[0]


def look(stage, display, name, of_room):
    """Boots the guest in this QEMU, and watches both of its outputs."""
    socket = stage.sockets / name
    address = display.arguments[1].removeprefix("dbus,addr=")
    argv = [stage.built("helix-host"), "-v", "--listen", f"unix:{socket}", "--qemu", f"dbus:{address}"]
    host = stage.program(f"helix-host-{name}", argv)
    host.wait_for("listening on", LIMIT)
    gpu = ["-device", "virtio-gpu-pci,max_outputs=2", *display.arguments]
    clients = {}
    try:
        with stage.guest(name, "6.12", gpu, of_room) as guest:
            stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
            guest.run(f"modules-{name}", "modprobe virtio-gpu", LIMIT)
            host.wait_for("connected to QEMU", LIMIT)
            for console, size in SIZES.items():
                clients[console] = Client(socket, console, size)
                check_output(stage, guest, f"on-{console}-{name}", console, size)
            drawing = draw(guest, f"draw-{name}", ["--cursor", *map(connector, SIZES)])
            check_pictures(stage, clients, cursor=True)
            # The kernel looks at connectors for nobody but who draws on them (drm_mode_getconnector()).
            drawing.kill()
            # DISABLE_SCANOUT, with which a client ends. The other output stays: Linux wants one.
            clients[1].stop()
            check_output(stage, guest, f"off-{name}", 1, None)
            answered = enable(socket, 1, OTHER_SIZE)
            stage.check(answered == connector(1), f"ENABLE_SCANOUT is answered with {answered}")
            check_output(stage, guest, f"again-{name}", 1, OTHER_SIZE)
            clients[1] = Client(socket, 1, OTHER_SIZE, enable=False)
            draw(guest, f"draw-again-{name}", [connector(0), answered])
            check_pictures(stage, clients, cursor=False)
    finally:
        for client in clients.values():
            client.stop()
        host.stop()


def connector(console):
    """The guest's name for a console's output."""
    return f"Virtual-{console + 1}"


def enable(socket, console, size):
    """ENABLE_SCANOUT, and the connector that its answer names."""
    fields = {"scanout_id": console, "width": size[0], "height": size[1], "refresh_rate": 60}
    try:
        with peer_net.Connection(f"unix:{socket}", LIMIT) as connection:
            connection.send(wire.Message(wire.ENABLE_SCANOUT, fields))
            answer = connection.receive_only(wire.SCANOUT_RESP)
    except (peer_net.PeerClosed, peer_net.PeerSilent) as error:
        raise Fault(f"ENABLE_SCANOUT {console}: {error}") from error
    return answer.connector if answer.success else "success 0"


def draw(guest, job, arguments):
    """Has the guest show its pictures, and goes on showing them."""
    drawing = guest.start(job, f"drmcheck draw {' '.join(arguments)}", 4 * LIMIT)
    drawing.wait_for("drawn", LIMIT)
    return drawing


def check_pictures(stage, clients, cursor):
    """Each client must see what the guest draws on its output, with a cursor on the first or without."""
    for console, client in clients.items():
        psnr = client.wait_for_picture(console, cursor)
        text = f"scanout {console} shows what the guest draws on {connector(console)}, {psnr:.1f} dB"
        stage.check(psnr >= MIN_PSNR, text)


def check_output(stage, guest, job, console, size):
    """The guest must see the output connected at this size, or not at all without one."""
    name = connector(console)
    wanted = " {} {}".format(*size) if size else ""
    status = guest.start(job, f"drmcheck output {name}{wanted}", LIMIT).wait()
    state = "connected at {}x{}".format(*size) if size else "disconnected"
    stage.check(status == 0, f"{name} is {state} in the guest")


def picture(console, width, height, cursor):
    """What `drmcheck draw` shows on this output, as rows of red, green and blue."""
    pixels = numpy.empty((height, width, 3), numpy.uint8)
    pixels[:, :, 0] = numpy.arange(width) * 255 // (width - 1)
    pixels[:, :, 1] = (numpy.arange(height) * 255 // (height - 1))[:, None]
    pixels[:, :, 2] = 64 + 128 * console
    # So that no mirrored or turned picture is taken for it.
    pixels[:64, :128] = 255
    if cursor and console == 0:
        opaque, half = numpy.hsplit(pixels[CURSOR], 2)
        opaque[:] = (255, 0, 0)
        half[:] = 128 + half // 2
    return pixels


class Client:
    """A scanoutsrc on the host, and what a decoder makes of its stream."""

    def __init__(self, socket, console, size, enable=True):
        self.size = size
        source = "scanoutsrc enable={} width={} height={}".format(enable, *size)
        self.pipeline = Gst.parse_launch(
            f"{source} socket-path={socket} scanout-id={console} ! h264parse ! avdec_h264 ! videoconvert"
            " ! video/x-raw,format=RGB ! appsink name=sink sync=false max-buffers=1 drop=true"
        )
        self.sink = self.pipeline.get_by_name("sink")
        # The newest sample.
        self.shown = None
        self.pipeline.set_state(Gst.State.PLAYING)

    def wait_for_picture(self, console, cursor):
        """Decodes until the known picture is there. Returns its PSNR in dB, or the best there was."""
        known, best = picture(console, *self.size, cursor), 0.0
        deadline = time.monotonic() + LIMIT
        # What is shown stays until another picture comes: the host sends none twice.
        sample = self.sink.try_pull_sample(0) or self.shown
        while best < MIN_PSNR and time.monotonic() < deadline:
            sample = sample or self.sink.try_pull_sample(LIMIT * Gst.SECOND)
            if sample is None:
                message = self.pipeline.get_bus().pop_filtered(Gst.MessageType.ERROR)
                raise Fault(f"scanout {console}: {message.parse_error() if message else 'no picture'}")
            self.shown, sample = sample, None
            shape = self.shown.get_caps().get_structure(0)
            size = (shape.get_int("width")[1], shape.get_int("height")[1])
            if size != self.size:
                continue
            buffer = self.shown.get_buffer()
            # Widths in steps of 8 have no padding.
            pixels = numpy.frombuffer(buffer.extract_dup(0, buffer.get_size()), numpy.uint8)
            pixels = pixels.reshape(known.shape)
            parts = [(pixels, known), (pixels[AROUND], known[AROUND])]
            best = max(best, min(verify.to_psnr(verify.mean_square(*part)) for part in parts))
        return best

    def stop(self):
        """Ends it, for good."""
        self.pipeline.set_state(Gst.State.NULL)
