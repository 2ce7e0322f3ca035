// SPDX-License-Identifier: MIT OR Apache-2.0

//! Known pictures on outputs. tests/vm/stages/screens.py knows how to make them too.

use drm::buffer::{Buffer, DrmFourcc};
use drm::control::{Device, Mode, connector, crtc, dumbbuffer::DumbBuffer, framebuffer};

use crate::Outcome;
use crate::node::{Kind, Node, VIRTIO_GPU};

/// The sides of a cursor, in pixels: virtio-gpu takes no other ones.
const CURSOR_SIDE: u32 = 64;
/// Where it is shown.
const CURSOR_AT: (i32, i32) = (200, 100);
/// Its left half, and its right one, through which half of the picture is to be seen: blue, green, red, alpha.
/// DRM's cursors are premultiplied.
const CURSOR_HALVES: [[u8; 4]; 2] = [[0, 0, 255, 255], [128; 4]];

/// Shows a picture on each connector, with a `cursor` on the first, and does not return.
pub fn show(names: &[String], cursor: bool) -> Outcome<()> {
    let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
    let mut shown = Vec::new();
    for (number, name) in (0..).zip(names) {
        let (connector, crtc, mode) = find(&node, name)?;
        let (width, height) = mode.size();
        let picture = picture(number, width.into(), height.into());
        let (buffer, framebuffer) = draw(&node, &picture, (width.into(), height.into()))?;
        let at = (0, 0);
        node.set_crtc(crtc, Some(framebuffer), at, &[connector], Some(mode))
            .map_err(|error| format!("show {width}x{height} on {name}: {error}"))?;
        println!("output {name} shows picture {number}, {width}x{height}");
        shown.push(buffer);
        if cursor && number == 0 {
            shown.push(show_cursor(&node, crtc)?);
        }
    }
    println!("drawn");
    loop {
        std::thread::park();
    }
}

/// A connected connector, a CRTC that is its alone, and its preferred mode.
fn find(node: &Node, name: &str) -> Outcome<(connector::Handle, crtc::Handle, Mode)> {
    let resources = node.resource_handles()?;
    for handle in resources.connectors() {
        let info = node.get_connector(*handle, true)?;
        if info.to_string() != name {
            continue;
        }
        let mode = info.modes().first();
        let mode = mode.ok_or_else(|| format!("{name} has no mode: is it connected?"))?;
        let encoder = info
            .encoders()
            .first()
            .ok_or("a connector has no encoder")?;
        let possible = node.get_encoder(*encoder)?.possible_crtcs();
        // virtio-gpu has one for each output.
        let crtcs = resources.filter_crtcs(possible);
        let crtc = crtcs.first().ok_or("an encoder has no CRTC")?;
        return Ok((*handle, *crtc, *mode));
    }
    Err(format!("there is no connector {name}").into())
}

/// Shows a cursor. The ioctls are what most of the world's programs use, the X server among them.
#[expect(
    deprecated,
    reason = "the newer way is a plane that virtio-gpu hides from who asks for it"
)]
fn show_cursor(node: &Node, crtc: crtc::Handle) -> Outcome<DumbBuffer> {
    let size = (CURSOR_SIDE, CURSOR_SIDE);
    let mut buffer = node.create_dumb_buffer(size, DrmFourcc::Argb8888, 32)?;
    let row = CURSOR_HALVES.map(|pixel| pixel.repeat(CURSOR_SIDE as usize / 2));
    let stride = buffer.pitch() as usize;
    let mut memory = node.map_dumb_buffer(&mut buffer)?;
    for to in memory.chunks_mut(stride) {
        to[..CURSOR_SIDE as usize * 4].copy_from_slice(&row.concat());
    }
    drop(memory);
    node.set_cursor2(crtc, Some(&buffer), (0, 0))?;
    node.move_cursor(crtc, CURSOR_AT)?;
    Ok(buffer)
}

/// A framebuffer with these pixels.
fn draw(
    node: &Node,
    pixels: &[u8],
    (width, height): (u32, u32),
) -> Outcome<(DumbBuffer, framebuffer::Handle)> {
    let mut buffer = node.create_dumb_buffer((width, height), DrmFourcc::Xrgb8888, 32)?;
    let (stride, row) = (buffer.pitch() as usize, width as usize * 4);
    let mut memory = node.map_dumb_buffer(&mut buffer)?;
    for (to, from) in memory.chunks_mut(stride).zip(pixels.chunks(row)) {
        to[..row].copy_from_slice(from);
    }
    drop(memory);
    let framebuffer = node.add_framebuffer(&buffer, 24, 32)?;
    Ok((buffer, framebuffer))
}

/// The picture of an output: red grows to the right, green downwards, blue tells outputs apart, and a
/// white rectangle says where its beginning is. Bytes are blue, green, red, nothing.
fn picture(number: u32, width: u32, height: u32) -> Vec<u8> {
    let blue = 64 + 128 * number as u8;
    let red = |x| (x * 255 / (width - 1)) as u8;
    let mut row: Vec<u8> = (0..width).flat_map(|x| [blue, 0, red(x), 0]).collect();
    let mut pixels = Vec::with_capacity(row.len() * height as usize);
    for y in 0..height {
        let green = (y * 255 / (height - 1)) as u8;
        for pixel in row.chunks_exact_mut(4) {
            pixel[1] = green;
        }
        pixels.extend_from_slice(&row);
        if y < 64 {
            let start = pixels.len() - row.len();
            pixels[start..start + 128 * 4].fill(255);
        }
    }
    pixels
}
