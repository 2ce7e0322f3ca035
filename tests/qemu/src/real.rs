// SPDX-License-Identifier: MIT OR Apache-2.0

//! A stock QEMU without a guest, and a D-Bus for it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::json;
use tempfile::TempDir;

use crate::card::{self, Card};
use crate::ppm::Rgb;
use crate::qtest::SLOT;
use crate::virtio_gpu::{self, VirtioGpu};
use crate::{eventually, qmp};

/// QEMU's program: the usual one, unless `QEMU` in the environment names another.
pub fn program() -> String {
    std::env::var("QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

/// Whether it is 8.1 or newer, as Debian 13's.
///
/// # Panics
///
/// If there is no QEMU.
pub fn is_newer() -> bool {
    let version = Command::new(program()).arg("--version").output().unwrap();
    !String::from_utf8_lossy(&version.stdout).contains("version 7.")
}

/// A bus of a test's own.
pub struct Bus {
    daemon: Child,
    address: String,
    _folder: TempDir,
}

impl Bus {
    /// Starts one.
    ///
    /// # Panics
    ///
    /// If there is no dbus-daemon.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix:path={}", folder.path().join("bus").display());
        let mut daemon = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--print-address=1"])
            .arg(format!("--address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon is installed");
        // It says so when it listens.
        let mut said = String::new();
        let output = daemon.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut said).unwrap();
        assert!(said.starts_with("unix:"), "dbus-daemon said {said:?}");
        Self {
            daemon,
            address,
            _folder: folder,
        }
    }

    /// Where it is.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Starts a machine like [`Qemu::with_vga`] with its display on this bus.
    ///
    /// # Panics
    ///
    /// If there is no QEMU, or it does not come to the bus.
    pub fn qemu_with_vga(&self) -> Qemu {
        self.qemu(&["-vga", "std"])
    }

    /// The same with other devices, as in [`Qemu::start`].
    ///
    /// # Panics
    ///
    /// As above.
    pub fn qemu(&self, options: &[&str]) -> Qemu {
        let qemu = Qemu::start(&format!("dbus,addr={}", self.address), options);
        // QEMU takes its name some time after it can be talked to.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let has_come = async || {
            let builder = zbus::connection::Builder::address(self.address.as_str());
            let connection = builder.build().await.unwrap();
            let bus = zbus::fdo::DBusProxy::new(&connection).await.unwrap();
            let name = zbus::names::BusName::try_from("org.qemu").unwrap();
            bus.name_has_owner(name).await.unwrap()
        };
        eventually("QEMU on the bus", || {
            runtime.block_on(has_come()).then_some(())
        });
        qemu
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A running QEMU.
pub struct Qemu {
    child: Child,
    folder: TempDir,
}

impl Qemu {
    /// Starts a machine with the given -display and video device.
    ///
    /// # Panics
    ///
    /// If there is no QEMU.
    pub fn start(display: &str, devices: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), display, devices)
    }

    fn start_in(folder: TempDir, display: &str, devices: &[&str]) -> Self {
        let socket = folder.path().join("qmp");
        // A group of pixels is all it draws: no disk, no network, little memory, no KVM (which
        // can exist and hang).
        let child = Command::new(program())
            .args([
                "-accel",
                "tcg",
                "-m",
                "64",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-name", "test", "-display", display, "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(["-trace", "dbus_*", "-D"])
            .arg(folder.path().join("trace"))
            .args(devices)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 is installed");
        let mut qemu = Self { child, folder };
        eventually("QEMU's QMP socket", || {
            let ended = qemu.child.try_wait().unwrap();
            assert!(ended.is_none(), "QEMU ended: {ended:?}");
            std::os::unix::net::UnixStream::connect(&socket).ok()
        });
        qemu
    }

    /// A machine with a VGA, whose firmware draws a screen of text.
    pub fn with_vga(display: &str) -> Self {
        Self::start(display, &["-vga", "std"])
    }

    /// A machine without a guest, whose graphics card the test programs instead.
    ///
    /// # Panics
    ///
    /// If there is no QEMU.
    pub fn with_card(display: &str) -> (Self, Card) {
        let (qemu, socket) = Self::without_guest(display, card::DEVICE);
        (qemu, Card::take(&socket))
    }

    /// The same with virtio-gpu; `gl` for the one that draws on the host's GPU.
    ///
    /// # Panics
    ///
    /// If there is no QEMU.
    pub fn with_virtio_gpu(display: &str, gl: bool) -> (Self, VirtioGpu) {
        let (qemu, socket) = Self::without_guest(display, virtio_gpu::DEVICES[usize::from(gl)]);
        (qemu, VirtioGpu::take(&socket))
    }

    /// A machine that stands still, and its qtest socket.
    fn without_guest(display: &str, device: &str) -> (Self, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qtest");
        let server = format!("unix:{},server=on,wait=off", socket.display());
        let device = format!("{device},{SLOT}");
        let arguments = [
            "-S",
            "-device",
            &device,
            "-qtest",
            &server,
            "-qtest-log",
            "none",
        ];
        (Self::start_in(folder, display, &arguments), socket)
    }

    /// Its QMP socket.
    pub fn qmp(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    /// Its version, major and minor.
    ///
    /// # Panics
    ///
    /// If it does not say.
    pub fn version(&self) -> (u64, u64) {
        let version = qmp::execute(&self.qmp(), "query-version", &json!({}));
        let part = |name: &str| version["qemu"][name].as_u64().expect(name);
        (part("major"), part("minor"))
    }

    /// What its display has done so far, an event a line, each with its name in front and a space
    /// behind (`-trace dbus_*`, ui/trace-events in QEMU's source).
    ///
    /// # Panics
    ///
    /// If it is not there.
    pub fn trace(&self) -> String {
        fs::read_to_string(self.folder.path().join("trace")).unwrap()
    }

    /// What the first console shows, as QEMU itself sees it.
    ///
    /// # Panics
    ///
    /// If QEMU cannot say.
    pub fn screendump(&self) -> Rgb {
        let file = self.folder.path().join("screen.ppm");
        qmp::execute(&self.qmp(), "screendump", &json!({ "filename": file }));
        Rgb::from_ppm(&fs::read(file).unwrap()).expect("QEMU writes a PPM")
    }

    /// Stops it as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}
