# SPDX-License-Identifier: MIT OR Apache-2.0
"""docs/helix-host.service under systemd: in its sandbox it encodes, listens on AF_VSOCK and reaches QEMU's socket.

systemd is the first process of a namespace in the guest, whose kernel enforces the sandbox. The unit is
taken as it is, but for the program's path; then with the options that its comments name. `ci/check-unit` has
systemd-analyze judge it.
"""

from programs import wait_until

PORT = 5000
LIMIT = 90
FRAMES = 30
TOKEN = "a secret of more than 16 bytes"
# Of the room: a user who owns nothing but what is made for it here.
USER = "daemon"

# systemd switches on parts of the kernel, which patches its own code then; on two emulated processors Linux 6.12
# was seen to panic in there (see tests/vm/guest.py).
ALONE = "echo 0 >/sys/devices/system/cpu/cpu1/online"

# What systemd needs to write to beside /run and /tmp.
BOOT = """
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for folder in cache lib log tmp; do mount -t tmpfs "$folder" "/var/$folder"; done
mkdir -p /run/systemd/system/helix-host.service.d
cd /run/systemd/system
sed "s#/usr/bin/helix-host#/src/target/debug/helix-host#" /src/docs/helix-host.service >helix-host.service
cat >helix-host.service.d/rig.conf <<END
[Service]
StandardOutput=append:/share/unit/service.log
StandardError=inherit
Environment=GST_PLUGIN_PATH=$GST_PLUGIN_PATH
END
# The service's own registry is as if it had run before: a first look at all plugins takes a minute here.
install -d -m 700 /var/cache/private
install -d /var/cache/private/helix-host
cp "$GST_REGISTRY" /var/cache/private/helix-host/registry.bin
printf '[Unit]\\nDefaultDependencies=no\\n' >rig.target
# Shared, as a booted machine's mounts are: credentials are mounted that way.
exec unshare --fork --kill-child --pid --mount --propagation shared --mount-proc \\
    /lib/systemd/systemd --system --unit=rig.target --log-target=console
"""

# Talks to systemd, which only listens to who is in its own namespaces.
SYSTEMCTL = "nsenter --target $(pgrep --oldest --exact systemd) --all systemctl"

# The other options: AF_VSOCK, a guest's CID, a QEMU whose socket one user may open, a token.
OPTIONS = f"""
cat >/run/systemd/system/helix-host.service.d/options.conf <<'END'
[Service]
ExecStart=
ExecStart=/src/target/debug/helix-host --listen vsock:{PORT} --allow-cid 1 --qemu qmp:/run/vm/qmp --token-file ${{CREDENTIALS_DIRECTORY}}/token
User={USER}
LoadCredential=token:/run/token
END
(umask 077 && echo '{TOKEN}' >/run/token)
install -d -o {USER} -m 700 /run/vm
{SYSTEMCTL} daemon-reload
"""

# As QEMU does, says what it is to whoever may open its socket; and which user that was.
QMP = f"""exec /usr/bin/python3 -u -c '
import os, pwd, socket, struct
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/vm/qmp")
os.chmod("/run/vm/qmp", 0o600)
os.chown("/run/vm/qmp", pwd.getpwnam("{USER}").pw_uid, -1)
listener.listen()
print("listening")
while True:
    client, _ = listener.accept()
    uid = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    client.sendall(b"{{\\"QMP\\": {{\\"version\\": {{}}, \\"capabilities\\": []}}}}\\n")
    print("user", pwd.getpwuid(uid).pw_name, client.recv(4096))
'"""


def run(stage):
    with stage.guest("guest", "6.12") as guest:
        stage.say(f"guest with Linux {guest.kernel} up after {guest.boot_seconds:.1f} s")
        guest.run("modules", f"{ALONE}; modprobe vsock_loopback", LIMIT)
        guest.start("systemd", BOOT, 10 * LIMIT)
        guest.run("booted", "until [ -S /run/systemd/private ]; do sleep 0.1; done", LIMIT)

        guest.run("start", f"{SYSTEMCTL} start helix-host", LIMIT)
        listens(stage, guest, 1)
        encodes(stage, guest, "tcp", "tcp-host=127.0.0.1", "as it is, over TCP")
        guest.run("kill", f"{SYSTEMCTL} kill --signal=KILL helix-host", LIMIT)
        listens(stage, guest, 2)
        encodes(stage, guest, "again", "tcp-host=127.0.0.1", "when it was killed, started again by systemd")

        guest.run("options", OPTIONS, LIMIT)
        qmp = guest.start("qmp", QMP, 10 * LIMIT)
        qmp.wait_for("listening", LIMIT)
        guest.run("restart", f"{SYSTEMCTL} restart helix-host", LIMIT)
        listens(stage, guest, 3)
        encodes(stage, guest, "vsock", f"cid=1 port={PORT} auth-token='{TOKEN}'", "with a token, over AF_VSOCK")
        qmp.wait_for(f"user {USER} b'", LIMIT)
        stage.check("qmp_capabilities" in qmp.output(), f"{USER} reaches QEMU's socket")

        guest.run("stop", f"{SYSTEMCTL} stop helix-host", LIMIT)
        result = guest.run("result", f"{SYSTEMCTL} show --property=Result,ActiveState helix-host", LIMIT)
        stage.check("Result=success" in result, f"it ends when it is told to ({' '.join(result.split())})")


def listens(stage, guest, times):
    """Returns when the service has come so far as many times."""
    log = stage.folder / "service.log"
    wait_until(
        lambda: log.exists() and log.read_text(errors="replace").count("listening on") >= times,
        LIMIT,
        guest.qemu.alive,
        "helix-host.service",
        f"it listened, start {times}",
    )


def encodes(stage, guest, name, connection, how):
    """Pictures must come back encoded, so that they can be decoded."""
    pipeline = (
        f"videotestsrc num-buffers={FRAMES} ! video/x-raw,width=320,height=240 ! vsockenc {connection}"
        " ! h264parse ! avdec_h264 ! identity silent=false ! fakesink sync=false"
    )
    job = guest.start(f"encode-{name}", f"gst-launch-1.0 -v {pipeline}", 2 * LIMIT)
    status = job.wait()
    frames = job.output().count("last-message = chain ")
    stage.check(status == 0 and frames == FRAMES, f"{how}: {frames} of {FRAMES} pictures encoded")
