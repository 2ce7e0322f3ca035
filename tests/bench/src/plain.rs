// SPDX-License-Identifier: MIT OR Apache-2.0

//! The least that carrying a frame costs: one thread, a blocking socket, pixels that lie ready.

use std::error::Error;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use helix_protocol::message::FrameRequest;
use helix_protocol::{Address, encode};

use crate::case::{Case, Contender, Pace};
use crate::meter::{Meter, Outcome};
use crate::peer::{Head, UNIT};
use crate::source::{PICTURES, STUCK, due};

trait Socket: Read + Write {}
impl<T: Read + Write> Socket for T {}

pub fn run(case: &Case) -> Result<Outcome, Box<dyn Error>> {
    let mut socket: Box<dyn Socket> = match case.address.parse()? {
        Address::Tcp { host, port } => {
            let socket = TcpStream::connect((host.as_str(), port))?;
            socket.set_nodelay(true)?;
            socket.set_read_timeout(Some(STUCK))?;
            Box::new(socket)
        }
        Address::Unix(path) => {
            let socket = UnixStream::connect(path)?;
            socket.set_read_timeout(Some(STUCK))?;
            Box::new(socket)
        }
        address @ Address::Vsock { .. } => {
            return Err(format!("no benchmark opens {address}").into());
        }
    };
    let picture = case.picture;
    let size = picture.wire_size();
    let pictures: Vec<Vec<u8>> = (0..PICTURES).map(|number| picture.paint(number)).collect();
    let meter = Meter::new(case);
    let mut reply = vec![0; 2 * UNIT];
    let start = Instant::now();
    let mut open = 0;
    for number in 0..case.total() {
        match case.pace {
            Pace::Flow | Pace::Single => {}
            Pace::Paced => {
                std::thread::sleep((start + due(number)).saturating_duration_since(Instant::now()));
            }
        }
        meter.enter();
        let request = FrameRequest {
            width: picture.width,
            height: picture.height,
            format: picture.pixel_format().fourcc(),
            stride: picture.stride() as u32,
            pts: due(number).as_nanos() as i64,
            duration: due(1).as_nanos() as i64,
            force_keyframe: number % 60 == 0,
            ..FrameRequest::default()
        };
        let head = encode::frame_request(1, &request, size as u32);
        let pixels = &pictures[number as usize % PICTURES];
        let mut slices = vec![IoSlice::new(&head)];
        match case.contender {
            Contender::Rows => slices.extend(
                pixels
                    .chunks_exact(picture.stride())
                    .map(|row| IoSlice::new(&row[..picture.row()])),
            ),
            _ => slices.push(IoSlice::new(&pixels[..size])),
        }
        write_all(&mut socket, &mut slices)?;
        open += 1;
        // As many open ones as the element has: one goes out while the other is answered.
        if open == 2 || case.pace != Pace::Flow {
            read_reply(&mut socket, &mut reply)?;
            meter.leave();
            open -= 1;
        }
    }
    for _ in 0..open {
        read_reply(&mut socket, &mut reply)?;
        meter.leave();
    }
    Ok(meter.finish()?)
}

fn write_all(socket: &mut impl Write, mut left: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !left.is_empty() {
        let sent = socket.write_vectored(left)?;
        IoSlice::advance_slices(&mut left, sent);
    }
    Ok(())
}

fn read_reply(socket: &mut impl Read, space: &mut [u8]) -> io::Result<()> {
    let mut head = [0; Head::SIZE];
    socket.read_exact(&mut head)?;
    let size = Head::parse(&head)?.payload;
    let space = space
        .get_mut(..size)
        .ok_or_else(|| io::Error::other("the reply is larger than the peer's"))?;
    socket.read_exact(space)
}
