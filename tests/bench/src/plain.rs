// SPDX-License-Identifier: MIT OR Apache-2.0

//! The least that carrying a frame costs: one thread, a blocking socket, pixels that lie ready.

use std::error::Error;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use helix_protocol::message::FrameRequest;
use helix_protocol::transport::UNIX_SEND_BUFFER;
use helix_protocol::{Address, encode};
use nix::sys::socket::{setsockopt, sockopt::SndBuf};

use crate::case::{Case, Contender, Pace, Picture};
use crate::meter::{Meter, Outcome};
use crate::peer::{Head, UNIT};
use crate::source::{PICTURES, STUCK, due};

trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

/// A client with a blocking socket.
pub struct Plain {
    socket: Box<dyn Socket>,
    picture: Picture,
    /// Whether each row is sent from where it lies.
    by_rows: bool,
    /// Space for a reply.
    reply: Vec<u8>,
}

impl Plain {
    /// Connects to the peer of a case.
    pub fn connect(case: &Case) -> Result<Self, Box<dyn Error>> {
        let socket: Box<dyn Socket> = match case.address.parse()? {
            Address::Tcp { host, port } => {
                let socket = TcpStream::connect((host.as_str(), port))?;
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(STUCK))?;
                Box::new(socket)
            }
            Address::Unix(path) => {
                let socket = UnixStream::connect(path)?;
                setsockopt(&socket, SndBuf, &UNIX_SEND_BUFFER)?;
                socket.set_read_timeout(Some(STUCK))?;
                Box::new(socket)
            }
            address @ Address::Vsock { .. } => {
                return Err(format!("no benchmark opens {address}").into());
            }
        };
        Ok(Self {
            socket,
            picture: case.picture,
            by_rows: case.contender == Contender::Rows,
            reply: vec![0; 2 * UNIT],
        })
    }

    /// Sends the frame of this number, which is in `pixels`.
    pub fn send(&mut self, number: u32, pixels: &[u8]) -> io::Result<()> {
        let picture = self.picture;
        let size = picture.wire_size();
        let request = FrameRequest {
            width: picture.width,
            height: picture.height,
            format: picture.pixel_format().fourcc(),
            stride: picture.stride() as u32,
            pts: due(number).as_nanos() as i64,
            duration: due(1).as_nanos() as i64,
            force_keyframe: number.is_multiple_of(60),
            ..FrameRequest::default()
        };
        let head = encode::frame_request(1, &request, size as u32);
        let mut slices = vec![IoSlice::new(&head)];
        if self.by_rows {
            let rows = pixels.chunks_exact(picture.stride());
            slices.extend(rows.map(|row| IoSlice::new(&row[..picture.row()])));
        } else {
            slices.push(IoSlice::new(&pixels[..size]));
        }
        let mut left = &mut slices[..];
        while !left.is_empty() {
            let sent = self.socket.write_vectored(left)?;
            IoSlice::advance_slices(&mut left, sent);
        }
        Ok(())
    }

    /// Reads one reply.
    pub fn read_reply(&mut self) -> io::Result<()> {
        let mut head = [0; Head::SIZE];
        self.socket.read_exact(&mut head)?;
        let size = Head::parse(&head)?.payload;
        let space = self
            .reply
            .get_mut(..size)
            .ok_or_else(|| io::Error::other("the reply is larger than the peer's"))?;
        self.socket.read_exact(space)
    }
}

/// Runs a case that is not paced: at 60 frames a second the element and this take turns
/// (source.rs).
pub fn run(case: &Case) -> Result<Vec<Outcome>, Box<dyn Error>> {
    let mut plain = Plain::connect(case)?;
    let pictures: Vec<Vec<u8>> = (0..PICTURES)
        .map(|number| case.picture.paint(number))
        .collect();
    let meter = Meter::new(case);
    let mut open = 0;
    for number in 0..case.total() {
        meter.enter();
        plain.send(number, &pictures[number as usize % PICTURES])?;
        open += 1;
        // As many open ones as the element has: one goes out while the other is answered.
        if open == 2 || case.pace != Pace::Flow {
            plain.read_reply()?;
            meter.leave();
            open -= 1;
        }
    }
    for _ in 0..open {
        plain.read_reply()?;
        meter.leave();
    }
    Ok(vec![meter.finish()?])
}
