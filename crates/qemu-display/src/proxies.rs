// SPDX-License-Identifier: MIT OR Apache-2.0

//! The few interfaces of QEMU's that are called here (its ui/dbus-display1.xml).

use zbus::Fd;

/// The virtual machine.
#[zbus::proxy(
    interface = "org.qemu.Display1.VM",
    default_path = "/org/qemu/Display1/VM",
    default_service = "org.qemu"
)]
pub trait Vm {
    /// Its name.
    #[zbus(property(emits_changed_signal = "false"))]
    fn name(&self) -> zbus::Result<String>;

    /// The numbers of its consoles.
    #[zbus(property(emits_changed_signal = "false"), name = "ConsoleIDs")]
    fn console_ids(&self) -> zbus::Result<Vec<u32>>;
}

/// One console.
#[zbus::proxy(interface = "org.qemu.Display1.Console", default_service = "org.qemu")]
pub trait Console {
    /// Sends updates over this socket, on which QEMU is the authenticating server.
    fn register_listener(&self, listener: Fd<'_>) -> zbus::Result<()>;

    /// What shows the console: size in millimetres, position and size in pixels.
    #[zbus(name = "SetUIInfo")]
    fn set_ui_info(
        &self,
        width_mm: u16,
        height_mm: u16,
        xoff: i32,
        yoff: i32,
        width: u32,
        height: u32,
    ) -> zbus::Result<()>;

    /// Its name for people.
    #[zbus(property(emits_changed_signal = "false"))]
    fn label(&self) -> zbus::Result<String>;

    /// "Graphic" or "Text".
    #[zbus(property(emits_changed_signal = "false"), name = "Type")]
    fn kind(&self) -> zbus::Result<String>;

    /// Pixels.
    #[zbus(property(emits_changed_signal = "false"))]
    fn width(&self) -> zbus::Result<u32>;

    /// Pixels.
    #[zbus(property(emits_changed_signal = "false"))]
    fn height(&self) -> zbus::Result<u32>;

    /// Its extensions. QEMU has had this since 8.1.
    #[zbus(property(emits_changed_signal = "false"))]
    fn interfaces(&self) -> zbus::Result<Vec<String>>;
}
