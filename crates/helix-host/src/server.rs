// SPDX-License-Identifier: MIT OR Apache-2.0

//! Listening, accepting, ending.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use helix_protocol::message::ErrorCode;
use helix_protocol::transport::{BindError, is_local};
use helix_protocol::wait::{Deadline, Waiter, Wake, Waker};
use helix_protocol::{Address, Listener, Stream};

use crate::access::{Token, TokenError};
use crate::client::{Client, Host, turn_away};
use crate::monitor::Monitor;
use crate::monitor::figures::Figures;
use crate::probe;
use crate::qemu::{Qemu, QemuAddress};
use crate::resource::{ClientIdentity, ResourceResolver};
use crate::scanout::{Origin, SCANOUTS, Scanout, ScanoutSpec};
use crate::settings::EncoderError;
use crate::source::Description;

/// After an error of accept() (too many open files) it is tried again this much later.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long clients, encoders and scanouts may take to end.
const STOP: Duration = Duration::from_secs(5);

/// For [`Config::stall_limit`]. Deployed hosts close after 60 s to 10 min of silence (quirk 10), so
/// that no client in the field counts on more; and the slowest link known (30 MB/s, L22) moves the
/// largest frame in 3 s, so that none needs more.
pub const STALL_LIMIT: Duration = Duration::from_mins(1);

/// What the host is to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub listen: Vec<Address>,
    /// `auto`, or an element and its properties.
    pub encoder: String,
    /// The screens to push.
    pub scanouts: Vec<ScanoutSpec>,
    /// The QEMU whose consoles are scanouts as well: console N is scanout N.
    pub qemu: Option<QemuAddress>,
    /// A file with the token that clients must send in HELLO; `None` lets in clients without.
    pub token_file: Option<PathBuf>,
    /// The context ids that may connect over AF_VSOCK; none lets in all.
    pub allow_cids: Vec<u32>,
    /// Where the pixels behind resource ids are found; `None` refuses resource ids.
    pub resolver: Option<Arc<dyn ResourceResolver>>,
    /// Where Prometheus finds figures.
    pub metrics: Option<Address>,
    /// Clients at once.
    pub max_clients: usize,
    /// Bytes of pixels in one frame.
    pub max_frame_bytes: u32,
    /// How long a client may keep its place without progress before it is closed: without a first
    /// message, without another byte of a message that it has begun, or without taking a byte of
    /// what waits for it. [`STALL_LIMIT`], except in tests.
    pub stall_limit: Duration,
}

/// Why the host does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// GStreamer is not there.
    #[error("GStreamer does not start: {0}")]
    Gstreamer(#[from] gst::glib::Error),
    /// See [`EncoderError`].
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    /// The same id on two scanouts.
    #[error("scanout {0} is given twice; each id stands for one screen")]
    ScanoutTwice(u32),
    /// The same id on a scanout and on a console.
    #[error(
        "scanout {0} is given by --scanout, and console {0} of --qemu is it too; each id stands \
         for one screen"
    )]
    ScanoutOfQemu(u32),
    /// gst-launch's parser refused it.
    #[error(
        "scanout {id}: '{description}' is no description of a screen: {reason} \
         (gst-launch-1.0 {description} ! fakesink shows whether it works)"
    )]
    Description {
        /// Which.
        id: u32,
        /// What was given.
        description: String,
        /// What the parser said.
        reason: String,
    },
    /// See [`TokenError`].
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Context ids, and no listener that knows them.
    #[error(
        "--allow-cid is about guests over AF_VSOCK, and no --listen vsock:PORT is there; other \
         clients have no CID"
    )]
    CidsWithoutVsock,
    /// See [`BindError`].
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system has no more of something.
    #[error("the system refused a thread or a descriptor: {0}")]
    Io(#[from] io::Error),
}

/// A host that has all it needs, and does not listen yet. Making one can take long, since drivers
/// are asked; nothing outside the process has changed so far.
pub struct Prepared {
    host: Arc<Host>,
    listen: Vec<Address>,
    allow_cids: Vec<u32>,
    metrics: Option<Address>,
    max_clients: usize,
}

/// A running host.
pub struct Server {
    addresses: Vec<Address>,
    host: Arc<Host>,
    clients: Arc<Clients>,
    waker: Waker,
    acceptor: Option<JoinHandle<()>>,
    metrics: Option<Address>,
    monitor: Option<(Waker, JoinHandle<()>)>,
}

/// The clients' threads, so that they can be ended.
#[derive(Default)]
struct Clients {
    wakers: Mutex<BTreeMap<u64, Waker>>,
    gone: Condvar,
}

impl Prepared {
    /// Finds the encoder and checks the scanouts.
    pub fn new(config: Config) -> Result<Self, StartError> {
        let over_vsock = |address: &Address| matches!(address, Address::Vsock { .. });
        if !config.allow_cids.is_empty() && !config.listen.iter().any(over_vsock) {
            return Err(StartError::CidsWithoutVsock);
        }
        let token = config.token_file.as_deref().map(Token::read).transpose()?;
        gst::init()?;
        let mut descriptions = BTreeMap::new();
        for ScanoutSpec { id, description } in config.scanouts {
            let parsed =
                Description::parse(&description).map_err(|reason| StartError::Description {
                    id,
                    description,
                    reason,
                })?;
            if descriptions.insert(id, parsed).is_some() {
                return Err(StartError::ScanoutTwice(id));
            }
        }
        let qemu = match config.qemu {
            Some(QemuAddress(address)) => Some(Qemu::start(
                address,
                descriptions.keys().copied().collect(),
            )?),
            None => None,
        };
        // One that is not there yet is waited for by its scanouts; a console that turns out to be
        // a scanout's already is then not shown.
        let consoles = qemu.as_ref().and_then(Qemu::first_consoles);
        if let Some(id) = consoles
            .iter()
            .flatten()
            .find(|id| descriptions.contains_key(id))
        {
            return Err(StartError::ScanoutOfQemu(*id));
        }
        let encoder = Arc::new(probe::encoder(&config.encoder)?);
        tracing::info!(encoder = %encoder.name(), "encoder chosen");
        let mut scanouts: BTreeMap<_, _> = descriptions
            .into_iter()
            .map(|(id, description)| (id, Origin::Description(description)))
            .collect();
        if let Some(qemu) = &qemu {
            for id in 0..SCANOUTS {
                scanouts
                    .entry(id)
                    .or_insert_with(|| Origin::Console(qemu.link().clone()));
            }
        }
        let scanouts = scanouts
            .into_iter()
            .map(|(id, origin)| (id, Scanout::new(id, origin, encoder.clone())))
            .collect();
        let host = Arc::new(Host {
            encoder,
            scanouts,
            qemu,
            token,
            resolver: config.resolver,
            encoded: Arc::default(),
            max_frame_bytes: config.max_frame_bytes,
            stall_limit: config.stall_limit,
        });
        Ok(Self {
            host,
            listen: config.listen,
            allow_cids: config.allow_cids,
            metrics: config.metrics,
            max_clients: config.max_clients,
        })
    }
}

impl Server {
    /// [`Prepared::new`] and [`Server::listen`].
    pub fn start(config: Config) -> Result<Self, StartError> {
        Self::listen(Prepared::new(config)?)
    }

    /// Listens, and serves who comes.
    pub fn listen(prepared: Prepared) -> Result<Self, StartError> {
        let Prepared {
            host,
            listen,
            allow_cids,
            metrics,
            max_clients,
        } = prepared;
        let mut listeners = Vec::new();
        for address in &listen {
            let listener = Listener::bind(address)?;
            let address = listener.address();
            let guarded = matches!(address, Address::Vsock { .. }) && !allow_cids.is_empty();
            if !is_local(address) && !guarded {
                if host.token.is_some() {
                    tracing::info!(
                        %address,
                        "reachable from outside this machine; token and pictures travel unencrypted"
                    );
                } else {
                    tracing::warn!(
                        %address,
                        "reachable from outside this machine, by anybody: no --token-file is given"
                    );
                }
            }
            listeners.push(listener);
        }
        let metrics = metrics.as_ref().map(Listener::bind).transpose()?;
        let clients = Arc::<Clients>::default();
        let addresses = listeners
            .iter()
            .map(|listener| listener.address().clone())
            .collect();
        let metrics_address = metrics.as_ref().map(|metrics| metrics.address().clone());
        if let Some(address) = &metrics_address
            && !is_local(address)
        {
            tracing::warn!(%address, "figures can be read from outside this machine, by anybody");
        }
        let waiter = Waiter::new()?;
        for listener in &listeners {
            waiter.register(listener.as_fd())?;
        }
        let waker = waiter.waker();
        let acceptor = Acceptor {
            listeners,
            waiter,
            host: host.clone(),
            clients: clients.clone(),
            allow_cids,
            max_clients,
            next_id: 0,
            failing: false,
        };
        let acceptor = std::thread::Builder::new()
            .name("helix-accept".to_owned())
            .spawn(move || acceptor.run())?;
        let mut server = Self {
            addresses,
            host,
            clients,
            waker,
            acceptor: Some(acceptor),
            metrics: metrics_address,
            monitor: None,
        };
        server.monitor = Some(monitor(metrics, &server.host, &server.clients)?);
        Ok(server)
    }

    /// Where Prometheus finds figures, with the port that the system chose.
    pub fn metrics(&self) -> Option<&Address> {
        self.metrics.as_ref()
    }

    /// Where it listens, with the ports that the system chose.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Ends all connections and pipelines. Takes at most some seconds; what does not end by then
    /// is left behind.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(acceptor) = self.acceptor.take() else {
            return;
        };
        let deadline = Instant::now() + STOP;
        self.waker.cancel();
        // It blocks nowhere but in the wait that was cancelled. Its listeners go with it.
        if acceptor.join().is_err() {
            tracing::error!("the accepting thread had panicked");
        }
        if let Some((waker, thread)) = self.monitor.take() {
            waker.cancel();
            // It blocks nowhere else either.
            if thread.join().is_err() {
                tracing::error!("the monitor's thread had panicked");
            }
        }
        for waker in self.clients.wakers().values() {
            waker.cancel();
        }
        for scanout in self.host.scanouts.values() {
            scanout.stop(deadline);
        }
        if let Some(qemu) = &self.host.qemu {
            qemu.stop();
        }
        self.clients.wait(deadline);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts the thread that says how things stand.
fn monitor(
    listener: Option<Listener>,
    host: &Arc<Host>,
    clients: &Arc<Clients>,
) -> io::Result<(Waker, JoinHandle<()>)> {
    let waiter = Waiter::new()?;
    let waker = waiter.waker();
    let (host, clients) = (host.clone(), clients.clone());
    let monitor = Monitor::new(listener, waiter, move || {
        let scanouts = host.scanouts.iter();
        Figures {
            clients: clients.wakers().len() as u64,
            scanouts: scanouts
                .filter(|(_, scanout)| scanout.exists())
                .map(|(id, scanout)| (*id, scanout.figures()))
                .collect(),
            qemu: host.qemu.as_ref().map(|qemu| qemu.link().figures()),
            ..Figures::default()
        }
        .with_encoded(&host.encoded)
    })?;
    let thread = std::thread::Builder::new()
        .name("helix-monitor".to_owned())
        .spawn(move || monitor.run())?;
    Ok((waker, thread))
}

struct Acceptor {
    listeners: Vec<Listener>,
    waiter: Waiter,
    host: Arc<Host>,
    clients: Arc<Clients>,
    /// Empty: all.
    allow_cids: Vec<u32>,
    max_clients: usize,
    next_id: u64,
    /// Whether the last accept() failed: the log has it then.
    failing: bool,
}

impl Acceptor {
    fn run(mut self) {
        loop {
            let deadline = if self.accept() {
                Deadline::NEVER
            } else {
                Deadline::after(ACCEPT_RETRY)
            };
            match self.waiter.wait(deadline) {
                Ok(Wake::Cancelled) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "waiting for clients failed; no more are accepted");
                    return;
                }
            }
        }
    }

    /// Takes all clients that wait; whether there was no error.
    fn accept(&mut self) -> bool {
        let mut fine = true;
        for index in 0..self.listeners.len() {
            loop {
                match self.listeners[index].accept() {
                    Ok(Some(stream)) => self.welcome(index, stream),
                    Ok(None) => break,
                    Err(error) => {
                        if !self.failing {
                            let address = self.listeners[index].address();
                            tracing::warn!(%address, %error, "accept failed, trying again");
                        }
                        fine = false;
                        break;
                    }
                }
            }
        }
        self.failing = !fine;
        fine
    }

    fn welcome(&mut self, listener: usize, stream: Stream) {
        let peer = stream.peer();
        let cid = stream.peer_cid();
        let address = self.listeners[listener].address();
        if !may_connect(&self.allow_cids, address, cid) {
            tracing::warn!(peer, "not among the CIDs that may connect, turned away");
            // About the client, and not the host's state: calling again would change nothing.
            let code = ErrorCode::INVALID_MESSAGE;
            turn_away(
                &stream,
                code,
                "this machine's CID may not connect (--allow-cid)",
            );
            return;
        }
        if self.clients.wakers().len() >= self.max_clients {
            tracing::warn!(
                peer,
                limit = self.max_clients,
                "too many clients, turned away"
            );
            turn_away(
                &stream,
                ErrorCode::INTERNAL,
                &format!(
                    "too many clients: this host takes {} (--max-clients)",
                    self.max_clients
                ),
            );
            return;
        }
        let identity = ClientIdentity {
            connection: self.next_id + 1,
            listener: address.clone(),
            cid,
        };
        self.next_id += 1;
        if let Err(error) = self.spawn(identity, stream, &peer) {
            tracing::error!(peer, %error, "no thread for a client");
        }
    }

    fn spawn(&self, identity: ClientIdentity, stream: Stream, peer: &str) -> io::Result<()> {
        let id = identity.connection;
        let waiter = Waiter::new()?;
        let waker = waiter.waker();
        let client = Client::new(self.host.clone(), stream, identity, waiter)?;
        let place = Place {
            id,
            clients: self.clients.clone(),
        };
        self.clients.wakers().insert(id, waker);
        let span = tracing::info_span!("client", id, peer);
        std::thread::Builder::new()
            .name(format!("helix-client-{id}"))
            .spawn(move || {
                let _place = place;
                let _span = span.entered();
                tracing::info!("connected");
                client.run();
            })?;
        Ok(())
    }
}

/// Whether a client with this context id may connect there. Over AF_VSOCK one that could not be
/// found out (the connection is gone already) is none of the allowed ones.
fn may_connect(allowed: &[u32], listener: &Address, cid: Option<u32>) -> bool {
    let counts = matches!(listener, Address::Vsock { .. }) && !allowed.is_empty();
    !counts || cid.is_some_and(|cid| allowed.contains(&cid))
}

/// A client's entry among the clients; leaves with its thread, even when that panics.
struct Place {
    id: u64,
    clients: Arc<Clients>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.wakers().remove(&self.id);
        self.clients.gone.notify_all();
    }
}

impl Clients {
    fn wakers(&self) -> MutexGuard<'_, BTreeMap<u64, Waker>> {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, deadline: Instant) {
        let mut wakers = self.wakers();
        while !wakers.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(
                    clients = wakers.len(),
                    "clients that do not end are left behind"
                );
                return;
            }
            wakers = self
                .gone
                .wait_timeout(wakers, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::may_connect;

    #[test]
    fn cids_count_only_where_some_are_named_and_over_vsock() {
        let vsock = "vsock:5000".parse().unwrap();
        assert!(may_connect(&[], &vsock, Some(7)));
        assert!(may_connect(&[3, 7], &vsock, Some(7)));
        assert!(!may_connect(&[3, 7], &vsock, Some(8)));
        assert!(!may_connect(&[3, 7], &vsock, None));
        assert!(may_connect(&[3, 7], &"tcp:[::1]:1".parse().unwrap(), None));
    }
}
