// SPDX-License-Identifier: MIT OR Apache-2.0

//! A connection to QEMU's display without a bus: one end of a socket pair goes to QEMU through its
//! QMP socket (`getfd` and `add_client` in QEMU's qapi/misc.json).

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;

/// The longest line that is read; QMP's answers here have a few hundred bytes, events may be longer.
const LONGEST_LINE: u64 = 1 << 20;

/// The name that the descriptor has in QEMU for a moment. With `getfd` the latest one of a name
/// counts.
const FD_NAME: &str = "zerocopy-display";

/// Gives one end of a socket pair to the QEMU whose QMP socket is at `path`, as its display's, and
/// returns the other. QEMU is the authenticating server on it. The error says what to do.
pub async fn open_display(path: &Path) -> Result<StdStream, String> {
    let mut qmp = Qmp::connect(path).await?;
    qmp.execute("qmp_capabilities", json!({}), None).await?;
    let (ours, theirs) = StdStream::pair().map_err(|error| format!("no socket pair: {error}"))?;
    let name = json!({ "fdname": FD_NAME });
    qmp.execute("getfd", name, Some(theirs.into())).await?;
    let arguments = json!({ "protocol": "@dbus-display", "fdname": FD_NAME });
    qmp.execute("add_client", arguments, None)
        .await
        .map_err(|error| format!("{error} (was QEMU started with -display dbus,p2p=on?)"))?;
    Ok(ours)
}

struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    async fn connect(path: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(path).await.map_err(|error| {
            format!("{error} (was QEMU started with -qmp unix:PATH,server=on,wait=off?)")
        })?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        let greeting = qmp.read().await?;
        if greeting.get("QMP").is_none() {
            return Err("what listens there does not greet as QMP does".to_owned());
        }
        Ok(qmp)
    }

    async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
    ) -> Result<(), String> {
        let line = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments })
        );
        self.send(line.as_bytes(), fd)
            .await
            .map_err(|error| format!("{command}: {error}"))?;
        loop {
            let answer = self.read().await?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = answer.get("error") {
                let text = error.get("desc").and_then(Value::as_str);
                return Err(format!("{command}: {}", text.unwrap_or("refused")));
            }
            // An event.
        }
    }

    async fn send(&self, line: &[u8], fd: Option<OwnedFd>) -> std::io::Result<()> {
        let stream = self.stream.get_ref();
        let raw = fd.as_ref().map(|fd| [fd.as_raw_fd()]);
        let mut control: Vec<ControlMessage<'_>> = Vec::new();
        control.extend(raw.as_ref().map(|fds| ControlMessage::ScmRights(fds)));
        let mut sent = 0;
        while sent < line.len() {
            sent += stream
                .async_io(Interest::WRITABLE, || {
                    let rest = [IoSlice::new(&line[sent..])];
                    let flags = MsgFlags::MSG_NOSIGNAL;
                    sendmsg::<UnixAddr>(stream.as_raw_fd(), &rest, &control, flags, None)
                        .map_err(std::io::Error::from)
                })
                .await?;
            // It has gone with the first byte.
            control.clear();
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<Value, String> {
        let mut line = Vec::new();
        let read = (&mut self.stream)
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut line)
            .await
            .map_err(|error| format!("reading failed: {error}"))?;
        if read == 0 {
            return Err("QEMU closed the QMP connection".to_owned());
        }
        serde_json::from_slice(&line).map_err(|error| format!("what came is no QMP: {error}"))
    }
}
