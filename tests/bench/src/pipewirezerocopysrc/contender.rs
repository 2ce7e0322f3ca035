// SPDX-License-Identifier: MIT OR Apache-2.0

//! The processes that capture, and what they see in the same time.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use zerocopy_test_support::desktop::Desktop;

use crate::capture::{Capture, Seen, Window, now};

/// Nanoseconds until all contenders have read that a window begins.
const SOON: u64 = 200_000_000;

/// A contender that captures.
pub struct Contender {
    child: Child,
    /// None once it was told to end.
    windows: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Contender {
    /// Starts one and waits until it streams.
    pub fn start(
        desktop: &Desktop,
        case: &Capture,
        counter: Option<&Path>,
    ) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("capture")
            .arg(serde_json::to_string(case)?)
            .envs(desktop.environment().iter().cloned())
            .env_remove("PIPEWIRE_REMOTE")
            .env_remove("PIPEWIRE_RUNTIME_DIR")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(counter) = counter {
            if !counter.exists() {
                return Err(format!("no {} here", counter.display()).into());
            }
            command
                .env("LD_PRELOAD", counter)
                // GLib's own allocator would hide allocations from malloc().
                .env("G_SLICE", "always-malloc");
        }
        let mut child = command.spawn()?;
        let windows = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().ok_or("it has an output")?);
        let mut contender = Self {
            child,
            windows,
            answers,
        };
        let ready: String = contender.answer()?;
        debug_assert_eq!(ready, "ready");
        Ok(contender)
    }

    fn ask(&mut self, window: Window) -> Result<(), Box<dyn Error>> {
        let windows = self.windows.as_mut().ok_or("it has an input")?;
        Ok(writeln!(windows, "{}", serde_json::to_string(&window)?)?)
    }

    fn answer<T: for<'a> serde::Deserialize<'a>>(&mut self) -> Result<T, Box<dyn Error>> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            return Err("a contender has ended; it said why".into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        drop(self.windows.take());
        let _ = self.child.wait();
    }
}

/// What all `contenders` see in the same time from now on.
pub fn look<const N: usize>(
    seconds: f64,
    mut contenders: [&mut Contender; N],
) -> Result<[Seen; N], Box<dyn Error>> {
    let from = now() + SOON;
    let window = Window {
        from,
        until: from + (seconds * 1e9) as u64,
    };
    for contender in &mut contenders {
        contender.ask(window)?;
    }
    let mut seen = Vec::new();
    for contender in contenders {
        seen.push(contender.answer()?);
    }
    Ok(seen.try_into().map_err(|_| "one each")?)
}
