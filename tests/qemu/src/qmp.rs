// SPDX-License-Identifier: MIT OR Apache-2.0

//! A QMP client that blocks.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

/// Executes one command in a connection of its own; what QEMU returns.
///
/// # Panics
///
/// If QEMU refuses.
pub fn execute(socket: &Path, command: &str, arguments: &Value) -> Value {
    let stream = UnixStream::connect(socket).expect("QMP can be reached");
    stream.set_read_timeout(Some(crate::LIMIT)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut stream = stream;
    lines.next().expect("a greeting").unwrap();
    let mut returned = Value::Null;
    for (command, arguments) in [("qmp_capabilities", &json!({})), (command, arguments)] {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(stream, "{line}").unwrap();
        loop {
            let line = lines.next().expect("an answer").unwrap();
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                returned = value.take();
                break;
            }
        }
    }
    returned
}
