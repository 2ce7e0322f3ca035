// SPDX-License-Identifier: MIT OR Apache-2.0

//! A host that resolves every resource id, to a picture that the id alone decides: for tests with
//! real virtio-gpu ids, which nobody knows beforehand.
//!
//! ```sh
//! cargo run -p helix-host --example resolving-host -- vsock:5000 tcp:127.0.0.1:0
//! ```
//!
//! Standard output says `listening on ADDRESS`, a line for each, and then for each request
//! `resource ID WIDTHxHEIGHT FOURCC stride STRIDE`. It ends when its standard input does.

use std::io::{self, Read, Write};
use std::sync::Arc;

use helix_host::{
    ClientIdentity, Config, ResolveError, Resource, ResourceResolver, STALL_LIMIT, Server,
};
use helix_protocol::message::PixelFormat;

/// Resources that are all there.
#[derive(Debug)]
struct Painted;

impl ResourceResolver for Painted {
    fn resolve(&self, _: &ClientIdentity, wanted: &Resource) -> Result<gst::Buffer, ResolveError> {
        let fourcc = wanted.format.fourcc().to_le_bytes();
        // Nobody may be reading; the picture is wanted all the same.
        let _ = writeln!(
            io::stdout(),
            "resource {} {}x{} {} stride {}",
            wanted.id,
            wanted.width,
            wanted.height,
            String::from_utf8_lossy(&fourcc),
            wanted.stride
        );
        Ok(gst::Buffer::from_slice(paint(wanted)))
    }
}

/// One colour: red, green and blue are 64 and more, by bits 0-2, 3-5 and 6-8 of the id.
fn paint(wanted: &Resource) -> Vec<u8> {
    let part = |shift: u32| 64 + 16 * ((wanted.id >> shift) & 7) as u8;
    let (red, green, blue) = (part(0), part(3), part(6));
    let pixel = match wanted.format {
        PixelFormat::Bgra => [blue, green, red, 255],
        PixelFormat::Rgba => [red, green, blue, 255],
        // Grey; two bytes of U and V are alike.
        PixelFormat::Nv12 => {
            let luma = wanted.width as usize * wanted.height as usize;
            let mut bytes = vec![red; wanted.bytes];
            bytes[luma..].fill(128);
            return bytes;
        }
    };
    let mut bytes = pixel.repeat(wanted.bytes.div_ceil(4));
    bytes.truncate(wanted.bytes);
    bytes
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listen = std::env::args()
        .skip(1)
        .map(|address| address.parse())
        .collect::<Result<Vec<_>, _>>()?;
    let server = Server::start(Config {
        listen,
        encoder: "auto".to_owned(),
        scanouts: Vec::new(),
        token_file: None,
        allow_cids: Vec::new(),
        resolver: Some(Arc::new(Painted)),
        max_clients: 64,
        max_frame_bytes: 64 * 1024 * 1024,
        qemu: None,
        metrics: None,
        stall_limit: STALL_LIMIT,
    })?;
    for address in server.addresses() {
        writeln!(io::stdout(), "listening on {address}")?;
    }
    io::stdout().flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    Ok(())
}
