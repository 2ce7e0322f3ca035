// SPDX-License-Identifier: MIT OR Apache-2.0

//! A real desktop for tests: `tests/desktop.py`, driven from Rust.
//!
//! [`Desktop::start`] brings up D-Bus, PipeWire, WirePlumber and a headless mutter in a folder of
//! their own, and answers when all of it is ready. Everything ends when the value is dropped, or
//! when the test's process ends in whatever way. What fails panics and says what was tried: a test
//! cannot go on without its desktop.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

/// How often a client is started before that counts as failed.
const CLIENT_TRIES: u32 = 3;

/// A desktop that runs.
#[derive(Debug)]
pub struct Desktop {
    process: Child,
    /// None once it was told to end.
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    runtime_dir: PathBuf,
    environment: Vec<(String, String)>,
}

/// What a ScreenCast session records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recording {
    /// The desktop's monitor.
    Monitor,
    /// A virtual monitor of its own, whose size the consumer chooses.
    Virtual,
}

impl Recording {
    fn mode(self) -> &'static str {
        match self {
            Self::Monitor => "monitor",
            Self::Virtual => "virtual",
        }
    }
}

/// A ScreenCast session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Screencast {
    /// Id of its PipeWire node.
    pub node: u32,
    session: String,
}

/// How a ScreenCast session shows the pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CursorMode {
    /// Not at all.
    Hidden,
    /// In the picture.
    Embedded,
    /// Beside it.
    Metadata,
}

/// A client on the desktop, by its process id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client(u64);

/// What [`Desktop::kill`] kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// mutter.
    Compositor,
    /// The PipeWire daemon.
    PipeWire,
    /// WirePlumber.
    SessionManager,
}

impl Desktop {
    /// Starts a desktop with a monitor of `width` x `height` pixels.
    pub fn start(width: u32, height: u32) -> Self {
        let size = format!("{width}x{height}");
        Self::of(&["--size", &size]).unwrap_or_else(|error| panic!("starting the desktop: {error}"))
    }

    /// Starts a desktop that has no monitor until a screencast makes a virtual one.
    pub fn without_monitor() -> Self {
        Self::of(&["--no-monitor"]).unwrap_or_else(|error| panic!("starting the desktop: {error}"))
    }

    /// The same as [`start`](Self::start) with weston, whose node is called "weston.pipewire". Says
    /// why where that has no such backend.
    pub fn weston(width: u32, height: u32) -> Result<Self, String> {
        let size = format!("{width}x{height}");
        Self::of(&["--size", &size, "--compositor", "weston"])
            .inspect_err(|error| assert!(error.contains("no PipeWire backend"), "{error}"))
    }

    /// With these options of the program.
    fn of(options: &[&str]) -> Result<Self, String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../desktop.py");
        // Debian's own interpreter: the one that has the GObject bindings.
        let mut process = Command::new("/usr/bin/python3")
            .arg(&script)
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", script.display()));
        let commands = process.stdin.take();
        let mut answers = BufReader::new(process.stdout.take().expect("its output is a pipe"));
        let ready = match read_answer(&mut answers) {
            Ok(ready) => ready,
            Err(error) => {
                drop(commands);
                let _ = process.wait();
                return Err(error);
            }
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(Self {
            process,
            commands,
            answers,
            runtime_dir: PathBuf::from(text(&ready["runtime_dir"])),
            environment: ready["env"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(key, value)| (key.clone(), text(value)))
                .collect(),
        })
    }

    /// The folder in which its sockets are.
    pub fn runtime_dir(&self) -> &Path {
        &self.runtime_dir
    }

    /// What a program needs in its environment to find the desktop.
    pub fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// A new connection to its PipeWire daemon, such as the portal hands out.
    pub fn pipewire(&self) -> UnixStream {
        let path = self.runtime_dir.join("pipewire-0");
        UnixStream::connect(&path)
            .unwrap_or_else(|error| panic!("connect to {}: {error}", path.display()))
    }

    /// Starts a ScreenCast session.
    pub fn screencast(&mut self, recording: Recording) -> Screencast {
        self.cast(&json!({"cmd": "screencast", "mode": recording.mode()}))
    }

    /// Starts a ScreenCast session with a pointer that can be moved.
    pub fn screencast_with_pointer(
        &mut self,
        recording: Recording,
        cursor: CursorMode,
    ) -> Screencast {
        let cursor = match cursor {
            CursorMode::Hidden => "hidden",
            CursorMode::Embedded => "embedded",
            CursorMode::Metadata => "metadata",
        };
        self.cast(&json!({
            "cmd": "screencast", "mode": recording.mode(), "cursor-mode": cursor, "pointer": true,
        }))
    }

    /// Moves the pointer of such a session to this pixel. New windows open on the pointer's monitor.
    pub fn move_pointer(&mut self, screencast: &Screencast, x: u32, y: u32) {
        let session = &screencast.session;
        self.ask(&json!({"cmd": "move-pointer", "session": session, "x": x, "y": y}));
    }

    fn cast(&mut self, command: &Value) -> Screencast {
        let answer = self.ask(command);
        Screencast {
            node: answer["node"]
                .as_u64()
                .and_then(|node| node.try_into().ok())
                .unwrap_or_else(|| panic!("no node id in {answer}")),
            session: answer["session"].as_str().unwrap_or_default().to_owned(),
        }
    }

    /// Ends a ScreenCast session; its node goes away.
    pub fn close(&mut self, screencast: &Screencast) {
        self.ask(&json!({"cmd": "close-session", "session": screencast.session}));
    }

    /// Starts a client that fills the screen with a moving picture (see `tests/pattern.py`), and
    /// waits until it is shown. Only while a screencast is running: without one, mutter keeps
    /// every picture in memory.
    pub fn moving_picture(&mut self, fps: u32) -> Client {
        self.client(&json!({"cmd": "client", "kind": "pattern", "fps": fps}))
    }

    /// The same on a screen that has so many pixels, as width and height, other than the desktop's
    /// own monitor.
    pub fn moving_picture_of(&mut self, fps: u32, size: (u32, u32)) -> Client {
        self.client(&json!({"cmd": "client", "kind": "pattern", "fps": fps, "screen": size}))
    }

    /// The same in a window of so many pixels, as width and height.
    pub fn moving_window(&mut self, fps: u32, size: (u32, u32)) -> Client {
        self.client(&json!({"cmd": "client", "kind": "pattern", "fps": fps, "window": size}))
    }

    fn client(&mut self, command: &Value) -> Client {
        // Debian 12's waylandsink sometimes fails to make its window.
        let answer = (1..CLIENT_TRIES)
            .find_map(|_| self.try_ask(command).ok())
            .unwrap_or_else(|| self.ask(command));
        Client(
            answer["pid"]
                .as_u64()
                .unwrap_or_else(|| panic!("no process id in {answer}")),
        )
    }

    /// Ends a client.
    pub fn stop(&mut self, client: Client) {
        self.ask(&json!({"cmd": "stop-client", "pid": client.0}));
    }

    /// Kills a part of the desktop by SIGKILL.
    pub fn kill(&mut self, victim: Victim) {
        let what = match victim {
            Victim::Compositor => "compositor",
            Victim::PipeWire => "pipewire",
            Victim::SessionManager => "wireplumber",
        };
        self.ask(&json!({"cmd": "kill", "what": what}));
    }

    /// Kills the PipeWire daemon, and waits until another one runs in its place.
    pub fn restart_pipewire(&mut self) {
        self.ask(&json!({"cmd": "restart-pipewire"}));
    }

    /// Keeps the PipeWire daemon from doing anything (SIGSTOP), or lets it go on.
    pub fn freeze_pipewire(&mut self, frozen: bool) {
        let command = if frozen {
            "freeze-pipewire"
        } else {
            "thaw-pipewire"
        };
        self.ask(&json!({"cmd": command}));
    }

    fn ask(&mut self, command: &Value) -> Value {
        self.try_ask(command)
            .unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    fn try_ask(&mut self, command: &Value) -> Result<Value, String> {
        let commands = self.commands.as_mut().expect("the desktop runs");
        writeln!(commands, "{command}").map_err(|error| error.to_string())?;
        read_answer(&mut self.answers)
    }
}

impl Drop for Desktop {
    fn drop(&mut self) {
        // The end of its input is what ends it, with all that it has started.
        drop(self.commands.take());
        let _ = self.process.wait();
    }
}

fn read_answer(answers: &mut impl BufRead) -> Result<Value, String> {
    let mut line = String::new();
    match answers.read_line(&mut line) {
        Ok(0) => return Err("desktop.py ended without an answer".into()),
        Ok(_) => {}
        Err(error) => return Err(error.to_string()),
    }
    let answer: Value =
        serde_json::from_str(&line).map_err(|error| format!("{error} in {line}"))?;
    match answer.get("error") {
        Some(error) => Err(error.as_str().unwrap_or_default().to_owned()),
        None => Ok(answer),
    }
}
