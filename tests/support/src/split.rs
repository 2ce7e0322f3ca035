// SPDX-License-Identifier: MIT OR Apache-2.0

//! Bytes that are read in pieces of a test's choice. Two writes alone may well be one read.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Writes `parts` so that no read of the peer has bytes of two of them: ancillary data forms a
/// barrier on received data (unix(7), "Ancillary messages"), whether it is asked for or not.
pub fn write_split(mut stream: &UnixStream, parts: &[&[u8]]) -> io::Result<()> {
    let barrier = File::open("/dev/null")?;
    let (last, first) = parts.split_last().expect("something to write");
    for part in first.iter().filter(|part| !part.is_empty()) {
        let descriptors = [barrier.as_raw_fd()];
        let count = sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(part)],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        assert_eq!(count, part.len(), "parts are small");
    }
    stream.write_all(last)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn each_part_is_read_alone() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        here.write_all(b"x").unwrap();
        write_split(&here, &[b"a", b"", b"bc", b"def"]).unwrap();
        here.write_all(b"g").unwrap();
        let mut space = [0; 100];
        for expected in [&b"xa"[..], b"bc", b"defg"] {
            let count = there.read(&mut space).unwrap();
            assert_eq!(&space[..count], expected);
        }
    }
}
