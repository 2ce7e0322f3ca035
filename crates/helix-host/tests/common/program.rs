// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program, in a process of its own.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use helix_protocol::Address;

/// The program with these options.
pub fn helix_host(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_helix-host"));
    command.args(arguments).env_remove("RUST_LOG");
    command
}

/// A program that runs; it does not outlive the test.
pub struct Running {
    pub child: Child,
    pub stdout: BufReader<ChildStdout>,
}

impl Running {
    pub fn start(arguments: &[&str]) -> Self {
        let mut child = helix_host(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout }
    }

    /// The next address it says it listens on.
    pub fn address(&mut self) -> Address {
        self.says("listening on ")
    }

    /// Where it gives its figures; it says so last.
    pub fn metrics(&mut self) -> Address {
        self.says("metrics on ")
    }

    fn says(&mut self, what: &str) -> Address {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end()
            .strip_prefix(what)
            .unwrap_or_else(|| panic!("{line:?}"))
            .parse()
            .unwrap()
    }

    /// Sends a signal and waits for the end; the exit code and the log.
    pub fn end_by(mut self, signal: libc::c_int) -> (Option<i32>, String) {
        let pid = self.child.id() as libc::pid_t;
        // SAFETY: a signal to our own child, which has not been waited for; no memory involved.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        let status = self.child.wait().unwrap();
        let mut log = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut log).unwrap();
        (status.code(), log)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
