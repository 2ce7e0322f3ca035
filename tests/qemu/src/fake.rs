// SPDX-License-Identifier: MIT OR Apache-2.0

//! A QEMU of ours, as far as `-display dbus,p2p=on` and QMP show it. What it draws, and whether
//! that can be, is up to the test.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, IoSliceMut, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use zbus::connection::Builder;
use zbus::{Connection, DynamicType, Fd, Guid, Variant, interface};

use crate::LIMIT;

/// x8r8g8b8 of pixman.h: in memory blue, green, red, nothing.
pub const X8R8G8B8: u32 = 0x2002_0888;

/// `DRM_FORMAT_XRGB8888` of drm_fourcc.h; the same bytes.
const XR24: u32 = u32::from_le_bytes(*b"XR24");

const LISTENER: &str = "org.qemu.Display1.Listener";
const MAP: &str = "org.qemu.Display1.Listener.Unix.Map";
const DMABUF2: &str = "org.qemu.Display1.Listener.Unix.ScanoutDMABUF2";

/// Sizes that clients have asked for: console, width, height.
type Sizes = Arc<Mutex<Sender<(u32, u32, u32)>>>;

/// Width and height of each console that has any, in pixels.
type Dimensions = Arc<Mutex<BTreeMap<u32, (u32, u32)>>>;

/// The fake. It serves one client after the other, as QMP does.
pub struct FakeQemu {
    folder: TempDir,
    listeners: Receiver<Listener>,
    registered: Arc<AtomicUsize>,
    mute: Arc<AtomicBool>,
    newer: Arc<AtomicBool>,
    sizes: Receiver<(u32, u32, u32)>,
    silent: watch::Sender<bool>,
    refuses: Arc<AtomicBool>,
    away: Arc<AtomicBool>,
    dimensions: Dimensions,
    connections: Arc<Mutex<Vec<Connection>>>,
    runtime: Runtime,
}

impl FakeQemu {
    /// A QEMU with these consoles.
    ///
    /// # Panics
    ///
    /// If there is no folder for its socket.
    pub fn start(consoles: &[u32]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(folder.path().join("qmp")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (listener_sender, listeners) = channel();
        let (size_sender, sizes) = channel();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let registered = Arc::new(AtomicUsize::new(0));
        let mute = Arc::new(AtomicBool::new(false));
        let newer = Arc::new(AtomicBool::new(false));
        let silent = watch::Sender::new(false);
        let refuses = Arc::new(AtomicBool::new(false));
        let away = Arc::new(AtomicBool::new(false));
        let dimensions = Dimensions::default();
        let server = Server {
            consoles: consoles.to_vec(),
            listeners: listener_sender,
            registered: registered.clone(),
            mute: mute.clone(),
            newer: newer.clone(),
            sizes: Arc::new(Mutex::new(size_sender)),
            silent: silent.clone(),
            refuses: refuses.clone(),
            away: away.clone(),
            dimensions: dimensions.clone(),
            connections: connections.clone(),
            handle: runtime.handle().clone(),
        };
        // Ends with the process; it holds nothing but a socket.
        std::thread::spawn(move || server.run(&socket));
        Self {
            folder,
            listeners,
            registered,
            mute,
            newer,
            sizes,
            silent,
            refuses,
            away,
            dimensions,
            connections,
            runtime,
        }
    }

    /// Its QMP socket.
    pub fn qmp(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    /// The next listener that a client registers.
    ///
    /// # Panics
    ///
    /// If none does.
    pub fn listener(&self) -> Listener {
        self.listeners.recv_timeout(LIMIT).expect("a listener")
    }

    /// How many listeners clients have registered so far.
    pub fn registered(&self) -> usize {
        self.registered.load(Ordering::Acquire)
    }

    /// From now on it is one of 8.1 or newer, which says that it has extensions.
    pub fn grow_up(&self) {
        self.newer.store(true, Ordering::Release);
    }

    /// From now on listeners are registered, and nothing is said on their sockets.
    pub fn say_nothing(&self) {
        self.mute.store(true, Ordering::Release);
    }

    /// The next size that a client asks for: console, width, height.
    ///
    /// # Panics
    ///
    /// If none does.
    pub fn size(&self) -> (u32, u32, u32) {
        self.sizes.recv_timeout(LIMIT).expect("a size")
    }

    /// The sizes that clients have asked for by now and nobody has taken.
    pub fn sizes(&self) -> Vec<(u32, u32, u32)> {
        self.sizes.try_iter().collect()
    }

    /// From now on no client that asks for a size gets an answer, until [`FakeQemu::answer`].
    pub fn fall_silent(&self) {
        self.silent.send_replace(true);
    }

    /// Answers those that wait for it, and all others at once.
    pub fn answer(&self) {
        self.silent.send_replace(false);
    }

    /// From now on clients that ask for a size are told that it cannot be.
    pub fn refuse_sizes(&self) {
        self.refuses.store(true, Ordering::Release);
    }

    /// Is not there for clients, those that it has included, until [`FakeQemu::come_back`].
    pub fn leave(&self) {
        self.away.store(true, Ordering::Release);
        self.forget_clients();
    }

    /// Is there again.
    pub fn come_back(&self) {
        self.away.store(false, Ordering::Release);
    }

    /// A console has another size from now on, and clients are told so.
    ///
    /// # Panics
    ///
    /// If one cannot be told.
    pub fn resize(&self, console: u32, size: (u32, u32)) {
        self.dimensions.lock().unwrap().insert(console, size);
        let path = format!("/org/qemu/Display1/Console_{console}");
        let changed = [("Width", size.0), ("Height", size.1)];
        let changed: HashMap<_, _> = changed
            .map(|(name, side)| (name, Variant::from(side)))
            .into();
        let body = ("org.qemu.Display1.Console", changed, &[""; 0][..]);
        for connection in &*self.connections.lock().unwrap() {
            let properties = "org.freedesktop.DBus.Properties";
            let path = path.as_str();
            let told =
                connection.emit_signal(None::<()>, path, properties, "PropertiesChanged", &body);
            self.runtime.block_on(told).expect("the client is there");
        }
    }

    /// Closes the connections on which clients ask things; listeners stay.
    ///
    /// # Panics
    ///
    /// Never.
    pub fn forget_clients(&self) {
        self.connections.lock().unwrap().clear();
    }
}

/// A client's listener, on which this QEMU says what it shows.
pub struct Listener {
    /// Of which console.
    pub console: u32,
    connection: Connection,
    handle: Handle,
}

impl Listener {
    /// Calls any method, and returns when the client has answered.
    pub fn call<B>(&self, interface: &str, member: &str, body: &B) -> zbus::Result<()>
    where
        B: zbus::export::serde::Serialize + DynamicType + Sync,
    {
        let path = "/org/qemu/Display1/Listener";
        let call = self
            .connection
            .call_method(None::<()>, path, Some(interface), member, body);
        self.handle.block_on(call).map(|_| ())
    }

    /// A whole picture of x8r8g8b8 pixels without padding.
    pub fn scanout(&self, width: u32, height: u32, data: &[u8]) -> zbus::Result<()> {
        let body = (width, height, width * 4, X8R8G8B8, data);
        self.call(LISTENER, "Scanout", &body)
    }

    /// A part of a picture, likewise.
    pub fn update(&self, at: (i32, i32), size: (i32, i32), data: &[u8]) -> zbus::Result<()> {
        let stride = size.0.unsigned_abs() * 4;
        let body = (at.0, at.1, size.0, size.1, stride, X8R8G8B8, data);
        self.call(LISTENER, "Update", &body)
    }

    /// A picture of x8r8g8b8 pixels in a file.
    pub fn scanout_map(
        &self,
        fd: BorrowedFd<'_>,
        offset: u32,
        (width, height, stride): (u32, u32, u32),
    ) -> zbus::Result<()> {
        let body = (Fd::from(fd), offset, width, height, stride, X8R8G8B8);
        self.call(MAP, "ScanoutMap", &body)
    }

    /// Something was drawn into the file.
    pub fn update_map(&self, at: (i32, i32), size: (i32, i32)) -> zbus::Result<()> {
        self.call(MAP, "UpdateMap", &(at.0, at.1, size.0, size.1))
    }

    /// A picture of XRGB8888 pixels in a DMA-BUF with a `DRM_FORMAT_MOD_*`.
    pub fn scanout_dmabuf(
        &self,
        fd: BorrowedFd<'_>,
        (width, height, stride): (u32, u32, u32),
        modifier: u64,
        y0_top: bool,
    ) -> zbus::Result<()> {
        let fd = Fd::from(fd);
        let body = (fd, width, height, stride, XR24, modifier, y0_top);
        self.call(LISTENER, "ScanoutDMABUF", &body)
    }

    /// A part of a larger linear one that `at` and `size` tell, as QEMU newer than 10.0 says it.
    pub fn scanout_dmabuf2(
        &self,
        fd: BorrowedFd<'_>,
        at: (u32, u32),
        size: (u32, u32),
        (width, height, stride): (u32, u32, u32),
        y0_top: bool,
    ) -> zbus::Result<()> {
        let (offsets, strides) = (&[0_u32][..], &[stride][..]);
        let (planes, modifier) = (1_u32, 0_u64);
        let body = (
            &[Fd::from(fd)][..],
            at.0,
            at.1,
            size.0,
            size.1,
            offsets,
            strides,
            planes,
            XR24,
            width,
            height,
            modifier,
            y0_top,
        );
        self.call(DMABUF2, "ScanoutDMABUF2", &body)
    }

    /// Something was drawn into the DMA-BUF. Returns when the client is done with it.
    pub fn update_dmabuf(&self, at: (i32, i32), size: (i32, i32)) -> zbus::Result<()> {
        self.call(LISTENER, "UpdateDMABUF", &(at.0, at.1, size.0, size.1))
    }

    /// The console is off.
    pub fn disable(&self) -> zbus::Result<()> {
        self.call(LISTENER, "Disable", &())
    }

    /// A cursor's shape: blue, green, red, alpha.
    pub fn cursor_define(&self, width: i32, height: i32, data: &[u8]) -> zbus::Result<()> {
        self.call(LISTENER, "CursorDefine", &(width, height, 0, 0, data))
    }

    /// A cursor's place.
    pub fn mouse_set(&self, x: i32, y: i32, on: bool) -> zbus::Result<()> {
        self.call(LISTENER, "MouseSet", &(x, y, i32::from(on)))
    }

    /// The extensions that the client has.
    ///
    /// # Panics
    ///
    /// If the client does not answer as it should.
    pub fn interfaces(&self) -> Vec<String> {
        let path = "/org/qemu/Display1/Listener";
        let properties = Some("org.freedesktop.DBus.Properties");
        let body = (LISTENER, "Interfaces");
        let call = self
            .connection
            .call_method(None::<()>, path, properties, "Get", &body);
        let reply = self.handle.block_on(call).expect("the client answers");
        let body = reply.body();
        let value: Variant<'_> = body.deserialize().unwrap();
        value.downcast::<Vec<String>>().unwrap()
    }

    /// Closes the connection, as a QEMU that ends does.
    pub fn close(self) {
        let closing = self.connection.close();
        let _ = self.handle.block_on(closing);
    }

    /// Waits until the client has closed the connection.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn wait_for_close(&self) {
        let closed = async { tokio::time::timeout(LIMIT, self.connection.closed()).await };
        let closed = self.handle.block_on(closed);
        closed.expect("the client closes the connection");
    }
}

/// What runs in the fake's thread.
struct Server {
    consoles: Vec<u32>,
    listeners: Sender<Listener>,
    registered: Arc<AtomicUsize>,
    mute: Arc<AtomicBool>,
    newer: Arc<AtomicBool>,
    sizes: Sizes,
    silent: watch::Sender<bool>,
    refuses: Arc<AtomicBool>,
    away: Arc<AtomicBool>,
    dimensions: Dimensions,
    connections: Arc<Mutex<Vec<Connection>>>,
    handle: Handle,
}

impl Server {
    fn run(&self, socket: &UnixListener) {
        for client in socket.incoming().map_while(Result::ok) {
            if !self.away.load(Ordering::Acquire) {
                // A client that goes away early is none of the fake's problems.
                let _ = self.serve(client);
            }
        }
    }

    /// QMP: three commands, of which two matter.
    fn serve(&self, mut client: UnixStream) -> std::io::Result<()> {
        writeln!(
            client,
            "{}",
            json!({ "QMP": { "version": {}, "capabilities": [] } })
        )?;
        // As real ones do at any time.
        writeln!(client, "{}", json!({ "event": "RESUME", "data": {} }))?;
        let mut given = None;
        let mut commands = Commands(client.try_clone()?, Vec::new());
        while let Some((command, fd)) = commands.next()? {
            given = fd.or(given);
            if command["execute"] == "add_client" {
                let display = command["arguments"]["protocol"] == "@dbus-display";
                if let Some(fd) = given.take().filter(|_| display) {
                    self.add_client(UnixStream::from(fd));
                }
            }
            writeln!(client, "{}", json!({ "return": {} }))?;
        }
        Ok(())
    }

    fn add_client(&self, socket: UnixStream) {
        let mut builder = Builder::unix_stream(socket)
            .server(Guid::generate())
            .p2p()
            .serve_at("/org/qemu/Display1/VM", Vm(self.consoles.clone()));
        for id in &self.consoles {
            let console = Console {
                id: *id,
                listeners: self.listeners.clone(),
                registered: self.registered.clone(),
                mute: self.mute.clone(),
                newer: self.newer.clone(),
                sizes: self.sizes.clone(),
                silent: self.silent.subscribe(),
                refuses: self.refuses.clone(),
                dimensions: self.dimensions.clone(),
                handle: self.handle.clone(),
            };
            builder = builder.serve_at(format!("/org/qemu/Display1/Console_{id}"), console);
        }
        let connections = self.connections.clone();
        self.handle.spawn(async move {
            if let Ok(connection) = builder.build().await {
                connections.lock().unwrap().push(connection);
            }
        });
    }
}

/// Lines of a socket, with the descriptors that came beside them.
struct Commands(UnixStream, Vec<u8>);

impl Commands {
    fn next(&mut self) -> std::io::Result<Option<(Value, Option<OwnedFd>)>> {
        let mut fd = None;
        loop {
            if let Some(end) = self.1.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.1.drain(..=end).collect();
                let text = BufReader::new(&line[..]).lines().next().transpose()?;
                let command = serde_json::from_str(&text.unwrap_or_default())?;
                return Ok(Some((command, fd)));
            }
            let mut bytes = [0; 4096];
            let mut space = nix::cmsg_space!([RawFd; 4]);
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    // SAFETY: the kernel has just made these descriptors for us; nobody else
                    // knows them.
                    fd = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
                }
            }
            let length = message.bytes;
            if length == 0 {
                return Ok(None);
            }
            self.1.extend_from_slice(&bytes[..length]);
        }
    }
}

struct Vm(Vec<u32>);

#[expect(clippy::unused_self, reason = "the interface macro wants it")]
#[interface(name = "org.qemu.Display1.VM")]
impl Vm {
    #[zbus(property)]
    fn name(&self) -> String {
        "fake".to_owned()
    }

    #[zbus(property, name = "ConsoleIDs")]
    fn console_ids(&self) -> Vec<u32> {
        self.0.clone()
    }
}

struct Console {
    id: u32,
    listeners: Sender<Listener>,
    registered: Arc<AtomicUsize>,
    mute: Arc<AtomicBool>,
    newer: Arc<AtomicBool>,
    sizes: Sizes,
    silent: watch::Receiver<bool>,
    refuses: Arc<AtomicBool>,
    dimensions: Dimensions,
    handle: Handle,
}

impl Console {
    fn dimensions(&self) -> (u32, u32) {
        let all = self.dimensions.lock().unwrap();
        all.get(&self.id).copied().unwrap_or_default()
    }
}

#[expect(
    clippy::needless_pass_by_value,
    clippy::unused_self,
    reason = "the interface macro wants it"
)]
#[interface(name = "org.qemu.Display1.Console")]
impl Console {
    fn register_listener(&self, listener: Fd<'_>) {
        self.registered.fetch_add(1, Ordering::AcqRel);
        let owned: zbus::OwnedFd = listener.try_to_owned().expect("a descriptor").into();
        let socket = UnixStream::from(OwnedFd::from(owned));
        let (console, handle) = (self.id, self.handle.clone());
        let listeners = self.listeners.clone();
        if self.mute.load(Ordering::Acquire) {
            // Open until the fake ends.
            self.handle.spawn(async move {
                let _socket = socket;
                std::future::pending::<()>().await;
            });
            return;
        }
        // QEMU authenticates after it has answered.
        self.handle.spawn(async move {
            let builder = Builder::unix_stream(socket).server(Guid::generate()).p2p();
            if let Ok(connection) = builder.build().await {
                // A test that is over listens no more.
                let _ = listeners.send(Listener {
                    console,
                    connection,
                    handle,
                });
            }
        });
    }

    #[zbus(name = "SetUIInfo")]
    async fn set_ui_info(
        &self,
        width_mm: u16,
        height_mm: u16,
        xoff: i32,
        yoff: i32,
        width: u32,
        height: u32,
    ) -> zbus::fdo::Result<()> {
        // Clients do not know these.
        assert_eq!((width_mm, height_mm, xoff, yoff), (0, 0, 0, 0));
        // Before a test sees the size, and may then silence what comes later.
        let silent = *self.silent.borrow();
        let _ = self.sizes.lock().unwrap().send((self.id, width, height));
        if silent {
            // For ever, if the fake ends.
            let _ = self.silent.clone().wait_for(|silent| !silent).await;
        }
        if self.refuses.load(Ordering::Acquire) {
            let text = "refused as a test wants it".to_owned();
            return Err(zbus::fdo::Error::InvalidArgs(text));
        }
        Ok(())
    }

    #[zbus(property)]
    fn width(&self) -> u32 {
        self.dimensions().0
    }

    #[zbus(property)]
    fn height(&self) -> u32 {
        self.dimensions().1
    }

    #[zbus(property)]
    fn interfaces(&self) -> zbus::fdo::Result<Vec<String>> {
        if self.newer.load(Ordering::Acquire) {
            return Ok(Vec::new());
        }
        let text = "no such property".to_owned();
        Err(zbus::fdo::Error::UnknownProperty(text))
    }

    #[zbus(property)]
    fn label(&self) -> String {
        format!("fake {}", self.id)
    }

    #[zbus(property, name = "Type")]
    fn kind(&self) -> String {
        "Graphic".to_owned()
    }
}
