// SPDX-License-Identifier: MIT OR Apache-2.0

//! The other end: takes requests as fast as they come and answers each with an access unit that it
//! has ready. It speaks as deployed hosts do, and knows no HELLO.

use std::error::Error;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::thread;

use helix_protocol::encode;
use helix_protocol::message::FrameResponse;
use serde::{Deserialize, Serialize};
use zerocopy_test_support::peer::{DELTA, KEYFRAME};

/// Bytes of an access unit: 4 Mbit/s at 60 frames a second.
pub const UNIT: usize = 8 * 1024;

/// Bytes read at once at most.
const READ: usize = 1024 * 1024;

const FRAME_REQUEST: u8 = 0x01;
const PING: u8 = 0x10;

/// Where the peer listens: what it prints first.
#[derive(Debug, Serialize, Deserialize)]
pub struct Addresses {
    pub tcp: String,
    pub unix: String,
}

/// The 12 bytes before each message (docs/protocol.md).
pub struct Head {
    pub kind: u8,
    /// Bytes after the head.
    pub payload: usize,
}

impl Head {
    pub const SIZE: usize = 12;

    pub fn parse(bytes: &[u8; Self::SIZE]) -> io::Result<Self> {
        let [b'H', b'X', b'F', b'R', kind, _, _, _, size @ ..] = *bytes else {
            return Err(io::Error::other("no message begins like this"));
        };
        Ok(Self {
            kind,
            payload: u32::from_le_bytes(size) as usize,
        })
    }
}

/// Serves any number of clients until standard input ends.
pub fn serve() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("peer");
    let unix = UnixListener::bind(&path)?;
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let addresses = Addresses {
        tcp: format!("tcp:{}", tcp.local_addr()?),
        unix: format!("unix:{}", path.display()),
    };
    println!("{}", serde_json::to_string(&addresses)?);
    thread::spawn(move || {
        for stream in unix.incoming().flatten() {
            let Ok(writer) = stream.try_clone() else {
                continue;
            };
            thread::spawn(move || answer(stream, writer));
        }
    });
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let Ok(writer) = stream.try_clone() else {
                continue;
            };
            // A reply must not wait for the next one. Fails where the client has gone already.
            let _ = stream.set_nodelay(true);
            thread::spawn(move || answer(stream, writer));
        }
    });
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

/// Answers until the client goes.
fn answer(reader: impl Read, mut writer: impl Write) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(READ, reader);
    let unit = |front: &[u8]| {
        let mut unit = front.to_vec();
        // No start code can come of it.
        unit.resize(UNIT, 0x55);
        unit
    };
    let (keyframe, delta) = (unit(KEYFRAME), unit(DELTA));
    let mut reply = Vec::with_capacity(2 * UNIT);
    loop {
        let mut head = [0; Head::SIZE];
        reader.read_exact(&mut head)?;
        let head = Head::parse(&head)?;
        let mut left = head.payload;
        reply.clear();
        match head.kind {
            FRAME_REQUEST => {
                let mut fixed = [0; 44];
                reader.read_exact(&mut fixed)?;
                left = left.saturating_sub(fixed.len());
                let pts = i64::from_le_bytes(fixed[20..28].try_into().expect("eight bytes"));
                let is_keyframe = fixed[36] != 0;
                let response = FrameResponse {
                    pts,
                    dts: pts,
                    is_keyframe,
                    ..FrameResponse::default()
                };
                let unit = if is_keyframe { &keyframe } else { &delta };
                reply.extend_from_slice(&encode::frame_response(1, &response, UNIT as u32));
                reply.extend_from_slice(unit);
            }
            PING => reply.extend_from_slice(&encode::pong(1)),
            _ => {}
        }
        while left > 0 {
            let count = reader.fill_buf()?.len().min(left);
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            reader.consume(count);
            left -= count;
        }
        writer.write_all(&reply)?;
    }
}
