// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program: options, logs and signals around [`helix_host::Server`].

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use clap::{ArgAction, Parser, ValueEnum};
use helix_host::{Config, Prepared, QemuAddress, STALL_LIMIT, ScanoutSpec, Server, StartError};
use helix_protocol::Address;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use tracing_subscriber::EnvFilter;

const EXAMPLES: &str = "\
Examples:
  Encode for guests that reach this machine's loopback (QEMU user networking):
    helix-host

  A unix socket for containers, TCP for guests, a software encoder of your choice:
    helix-host --listen unix:/run/user/1000/helix.sock --listen tcp:127.0.0.1:15937 \\
               --encoder \"x264enc speed-preset=medium\"

  Guests over AF_VSOCK (vsockenc without any setting connects there):
    helix-host --listen vsock:5000

  Only the guest with CID 3, and only with a secret that it knows too:
    (umask 077; openssl rand -hex 32 >token)
    helix-host --listen vsock:5000 --allow-cid 3 --token-file token

  Push a test picture to whoever subscribes to scanout 1, and look at it:
    helix-host --scanout 1=\"videotestsrc is-live=true ! video/x-raw,width=1280,height=720\"
    gst-launch-1.0 scanoutsrc tcp-host=127.0.0.1 scanout-id=1 ! h264parse ! avdec_h264 ! \\
               videoconvert ! autovideosink

  Push a recording as it is, without encoding it again:
    helix-host --scanout 2=\"filesrc location=x.h264 ! h264parse ! identity sync=true\"

  Push the screens of a virtual machine, which may come and go:
    qemu-system-x86_64 -display dbus,p2p=on -qmp unix:/run/vm/qmp,server=on,wait=off ... &
    helix-host --qemu qmp:/run/vm/qmp

The log goes to standard error; RUST_LOG (for example helix_host=debug) wins over -v.
SIGTERM and SIGINT end the program and remove its unix sockets.";

/// The host peer of vsockenc and scanoutsrc: encodes with the best H.264 encoder that GStreamer
/// has here what clients send, and pushes screens to those who subscribe.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
struct Options {
    /// Where to listen: tcp:HOST:PORT, unix:PATH or vsock:PORT; may be given several times.
    /// TCP port 0 takes a free one, and standard output says which.
    #[arg(long, value_name = "ADDRESS", default_value = "tcp:127.0.0.1:15937")]
    listen: Vec<Address>,

    /// The H.264 encoder: auto, or a GStreamer element with its settings as for gst-launch-1.0.
    /// auto is the first that really encodes of nvh264enc, vah264enc, vtenc_h264_hw, x264enc
    /// and openh264enc.
    #[arg(long, value_name = "ELEMENT", default_value = "auto")]
    encoder: String,

    /// A screen to push: its id (0 to 15) and a gst-launch-1.0 description that ends in
    /// video/x-raw, which is encoded, or video/x-h264, which goes out as it is; may be given
    /// several times. It runs while somebody is subscribed.
    #[arg(long, value_name = "ID=DESCRIPTION")]
    scanout: Vec<ScanoutSpec>,

    /// Make the consoles of this QEMU scanouts, console N as scanout N: dbus:ADDRESS, where it has
    /// -display dbus,addr=ADDRESS, or qmp:SOCKET, where it has -display dbus,p2p=on and -qmp.
    #[arg(long, value_name = "ADDRESS")]
    qemu: Option<QemuAddress>,

    /// Let in only clients that send the token in this file (vsockenc and scanoutsrc: auth-token).
    /// Nobody but its owner and group may have access to it.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Over AF_VSOCK let in only the guest with this context id; may be given several times.
    #[arg(long, value_name = "CID")]
    allow_cid: Vec<u32>,

    /// Where Prometheus finds figures, over HTTP: tcp:HOST:PORT or unix:PATH. Keep it on the
    /// loopback: whoever can connect can read them.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<Address>,

    /// Clients at once; more are sent away with an error.
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u16).range(1..))]
    max_clients: u16,

    /// The largest frame, in bytes of pixels (deployed hosts: 64 MiB).
    #[arg(long, value_name = "N", default_value_t = 67_108_864,
          value_parser = clap::value_parser!(u32).range(4..=1 << 30))]
    max_frame_bytes: u32,

    /// Say more in the log; twice for everything.
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,

    /// How the log is written.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// A line for a person.
    Text,
    /// A JSON object a line.
    Json,
}

fn main() -> ExitCode {
    let options = Options::parse();
    start_log(&options);
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed; the exit code says it too.
            let _ = writeln!(io::stderr(), "helix-host: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    // From here on the signals wait for us instead of ending the process.
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let config = Config {
        listen: options.listen,
        encoder: options.encoder,
        scanouts: options.scanout,
        qemu: options.qemu,
        token_file: options.token_file,
        allow_cids: options.allow_cid,
        // A stock QEMU gives nobody its guests' pictures by resource id.
        resolver: None,
        metrics: options.metrics,
        max_clients: options.max_clients.into(),
        max_frame_bytes: options.max_frame_bytes,
        stall_limit: STALL_LIMIT,
    };
    let Some(prepared) = prepare(config)? else {
        return Ok(());
    };
    let server = Server::listen(prepared)?;
    let mut stdout = io::stdout();
    for address in server.addresses() {
        // Nobody may be reading; that is no reason to stop.
        let _ = writeln!(stdout, "listening on {address}");
    }
    if let Some(address) = server.metrics() {
        let _ = writeln!(stdout, "metrics on {address}");
    }
    let _ = stdout.flush();
    if let Some(signal) = signals.forever().next() {
        tracing::info!(signal, "ending");
    }
    server.stop();
    Ok(())
}

/// Looks for the encoder, which may take a driver many seconds, or for ever. `None` if a signal
/// came first; the thread that looks is then left behind, as it cannot be interrupted.
fn prepare(config: Config) -> Result<Option<Prepared>, Box<dyn std::error::Error>> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let done = Done(signals.handle());
    let (result, results) = mpsc::channel::<Result<Prepared, StartError>>();
    thread::Builder::new()
        .name("helix-prepare".to_owned())
        .spawn(move || {
            // Nobody waits for it any more where a signal has come.
            let _ = result.send(Prepared::new(config));
            drop(done);
        })?;
    // Without a signal this ends when `done` is dropped.
    if let Some(signal) = signals.forever().next() {
        tracing::info!(signal, "ending before the start");
        return Ok(None);
    }
    let result = results
        .recv()
        .map_err(|_| "looking for the encoder ended in a panic; this is a bug")?;
    Ok(Some(result?))
}

/// Ends a wait for signals when it is dropped, by a panic too.
struct Done(Handle);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn start_log(options: &Options) {
    let level = match options.verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    match options.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
