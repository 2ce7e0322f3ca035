// SPDX-License-Identifier: MIT OR Apache-2.0

//! What `qemudisplaysrc` and `helix-host` make of a stock QEMU with `gl=on`.
//!
//! Its renderer is llvmpipe, which gives out textures as udmabufs. With a card that draws without a GPU
//! (`ati-vga`) QEMU copies the screen into a texture; with `virtio-gpu-gl-pci` the guest's resources are
//! textures of virglrenderer's. Both are programmed in a guest's place: in a QEMU inside an emulated
//! machine one would take minutes.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use gst::prelude::*;
use zerocopy_test_qemu::card::{Card, Cursor};
use zerocopy_test_qemu::eventually;
use zerocopy_test_qemu::real::Qemu;
use zerocopy_test_qemu::virtio_gpu::VirtioGpu;

use crate::Outcome;
use crate::frames::{Frames, IN_MEMORY, ON_GPU, fd_of, rows};
use crate::node::{Kind, Node, VIRTIO_GPU};

/// Pixels: few, as each is written by a QEMU on an emulated processor. Rows of the second one are no multiple of
/// anything that a renderer likes.
const SIZES: [(u32, u32); 2] = [(128, 64), (136, 72)];
const CURSOR: Cursor = Cursor {
    size: (32, 16),
    left: [255, 0, 0],
    right: [0, 255, 0],
};
/// Where it is shown.
const AT: (u32, u32) = (40, 20);
/// Of decoded pictures, in steps of 0 to 255: 30 dB, as in tests/demo.py.
const MOST_MEAN_SQUARE: f64 = 65.0;

/// What draws in a guest's place.
trait Guest {
    /// Has a screen of this size.
    fn resize(&mut self, size: (u32, u32));
    /// Draws red, green and blue of each pixel.
    fn draw(&mut self, colour: impl Fn(u32, u32) -> [u8; 3]);
}

impl Guest for Card {
    fn resize(&mut self, (width, height): (u32, u32)) {
        self.set_mode(width, height);
    }

    fn draw(&mut self, colour: impl Fn(u32, u32) -> [u8; 3]) {
        Card::draw(self, colour);
    }
}

impl Guest for VirtioGpu {
    fn resize(&mut self, size: (u32, u32)) {
        self.show(size, |_, _| [0; 3]);
    }

    fn draw(&mut self, colour: impl Fn(u32, u32) -> [u8; 3]) {
        VirtioGpu::draw(self, colour);
    }
}

/// What the screen shows.
#[derive(Clone, Copy)]
struct Screen {
    size: (u32, u32),
    /// Tells pictures apart.
    blue: u8,
    cursor: bool,
}

impl Screen {
    fn plain(size: (u32, u32), blue: u8) -> Self {
        Self {
            size,
            blue,
            cursor: false,
        }
    }

    /// Red, green and blue of a pixel.
    fn pixel(&self, x: u32, y: u32) -> [u8; 3] {
        let inside = self
            .cursor
            .then_some(AT)
            .and_then(|(left, top)| CURSOR.pixel(x.checked_sub(left)?, y.checked_sub(top)?));
        inside.unwrap_or([x as u8, y as u8, self.blue])
    }

    /// Has it drawn.
    fn draw(&self, guest: &mut impl Guest) {
        guest.draw(|x, y| [x as u8, y as u8, self.blue]);
    }

    /// Waits until frames show it, but for a mean square of differences. Frames may say that they are upside down.
    fn comes(&self, frames: &Frames, most: f64) -> Outcome<gst::Sample> {
        frames.wait_for(|sample| self.is(sample, is_turned(frames), most))
    }

    /// Whether a frame shows it; an error says why not.
    fn is(&self, sample: &gst::Sample, turned: bool, most: f64) -> Outcome<()> {
        let caps = sample.caps().ok_or("a frame without caps")?;
        let (red, green, blue) = order(caps)?;
        let (mut rows, (width, height)) = (rows(sample)?, self.size);
        if turned {
            rows.reverse();
        }
        let right = rows.iter().all(|row| row.len() == width as usize * 4);
        if rows.len() != height as usize || !right {
            return Err(format!("{} rows, wanted {width}x{height}: {caps}", rows.len()).into());
        }
        let (mut sum, mut first) = (0.0, None);
        for (y, row) in (0..).zip(&rows) {
            for (x, found) in (0..).zip(row.chunks_exact(4)) {
                let found = [found[red], found[green], found[blue]];
                let expected = self.pixel(x, y);
                for (found, expected) in found.iter().zip(expected) {
                    sum += f64::from(found.abs_diff(expected)).powi(2);
                }
                if found != expected {
                    first.get_or_insert((x, y, found, expected));
                }
            }
        }
        let mean = sum / f64::from(width * height * 3);
        if mean <= most {
            return Ok(());
        }
        Err(format!("mean square {mean:.1}; first (x, y, found, expected): {first:?}").into())
    }
}

/// Where red, green and blue are in the four bytes of a pixel.
fn order(caps: &gst::CapsRef) -> Outcome<(usize, usize, usize)> {
    let fields = caps.structure(0).ok_or("empty caps")?;
    let name = fields.get::<&str>("drm-format");
    let name = name.or_else(|_| fields.get::<&str>("format"))?;
    match name.split(':').next() {
        Some("XR24" | "AR24" | "BGRx" | "BGRA") => Ok((2, 1, 0)),
        Some("XB24" | "AB24" | "RGBx" | "RGBA") => Ok((0, 1, 2)),
        _ => Err(format!("an unexpected format: {caps}").into()),
    }
}

/// Whether frames lie upside down in their memory.
fn is_turned(frames: &Frames) -> bool {
    frames.orientation().as_deref() == Some("flip-rotate-180")
}

/// Shows the screen in each way.
pub fn show() -> Outcome<()> {
    gst::init()?;
    let node = Node::open(VIRTIO_GPU, Kind::Render)?.path().to_owned();
    let display = format!("dbus,p2p=on,gl=on,rendernode={}", node.display());
    let (qemu, mut card) = Qemu::with_card(&display);
    let qmp = qemu.qmp();
    say("2d as it is", &as_it_is(&qmp, &mut card));
    say("2d copied", &copied(&qmp, &mut card));
    say("2d cursor beside it", &cursor_beside(&qmp, &mut card));
    say("2d cursor in it", &cursor_in(&qmp, &mut card));
    say("2d helix-host", &helix_host_cursor(&qmp, &mut card));
    drop(qemu);
    let (qemu, mut gpu) = Qemu::with_virtio_gpu(&display, true);
    let qmp = qemu.qmp();
    say("3d as it is", &as_it_is(&qmp, &mut gpu));
    say("3d copied", &copied(&qmp, &mut gpu));
    say("3d off and on", &off_and_on(&qmp, &mut gpu));
    say("3d helix-host", &helix_host(&qmp, &mut gpu));
    Ok(())
}

fn say(how: &str, result: &Outcome<()>) {
    match result {
        Ok(()) => println!("gl {how}: right"),
        Err(error) => println!("gl {how}: WRONG: {error}"),
    }
}

fn element(qmp: &Path, properties: &str) -> String {
    let qmp = qmp.display();
    format!("qemudisplaysrc qmp-socket={qmp} max-framerate=0/1 {properties}")
}

/// Draws pictures one after the other; each must come.
fn come(
    frames: &Frames,
    guest: &mut impl Guest,
    size: (u32, u32),
    most: f64,
) -> Outcome<gst::Sample> {
    guest.resize(size);
    let mut draw = |blue| {
        let screen = Screen::plain(size, blue);
        screen.draw(guest);
        screen.comes(frames, most)
    };
    // QEMU says nothing of the next picture before it has an answer about the one before.
    draw(0)?;
    draw(255)
}

/// Goes out as QEMU's DMA-BUF, in both sizes, whether frames are let go or not, and after a pause.
fn as_it_is(qmp: &Path, guest: &mut impl Guest) -> Outcome<()> {
    let frames = Frames::play(&element(qmp, ""), ON_GPU)?;
    let [first, second] = SIZES;
    let sample = come(&frames, guest, second, 0.0)?;
    let buffer = sample.buffer().ok_or("an empty sample")?;
    fd_of(buffer).ok_or("no DMA-BUF")?;
    let meta = buffer.meta::<gst_video::VideoMeta>().ok_or("no layout")?;
    let (caps, stride) = (sample.caps().ok_or("no caps")?, meta.stride()[0]);
    let turned = is_turned(&frames);
    println!("gl picture {caps} in rows of {stride} bytes, upside down: {turned}");
    // QEMU goes on with frames that nobody lets go.
    let mut kept = vec![sample, come(&frames, guest, first, 0.0)?];
    let screen = Screen::plain(first, 64);
    screen.draw(guest);
    kept.push(screen.comes(&frames, 0.0)?);
    frames.pipeline.set_state(gst::State::Paused)?;
    let screen = Screen::plain(first, 128);
    screen.draw(guest);
    frames.pipeline.set_state(gst::State::Playing)?;
    screen.comes(&frames, 0.0)?;
    Ok(())
}

/// For who takes no DMA-BUFs, a copy, the right way up.
fn copied(qmp: &Path, guest: &mut impl Guest) -> Outcome<()> {
    let frames = Frames::play(&element(qmp, ""), IN_MEMORY)?;
    for size in SIZES {
        let sample = come(&frames, guest, size, 0.0)?;
        if sample.buffer().and_then(fd_of).is_some() {
            return Err("it is in a DMA-BUF".into());
        }
        if is_turned(&frames) {
            return Err("it is upside down".into());
        }
    }
    Ok(())
}

/// An output that is switched off shows its picture no more; on again, it does.
fn off_and_on(qmp: &Path, gpu: &mut VirtioGpu) -> Outcome<()> {
    for caps in [ON_GPU, IN_MEMORY] {
        let frames = Frames::play(&element(qmp, ""), caps)?;
        come(&frames, gpu, SIZES[0], 0.0)?;
        gpu.switch_off();
        // QEMU shows what it has to say about that, and says Disable, in either order.
        let last = Screen::plain(SIZES[0], 255);
        let bus = frames.pipeline.bus().ok_or("no bus")?;
        eventually("an end of the picture", || {
            let said = std::iter::from_fn(|| bus.pop_filtered(&[gst::MessageType::Element]));
            let off = said.into_iter().any(|message| {
                let fields = message.structure();
                fields.and_then(|fields| fields.get::<&str>("state").ok()) == Some("off")
            });
            let sample = frames.sink.try_pull_sample(gst::ClockTime::ZERO);
            let turned = is_turned(&frames);
            let other = sample.is_some_and(|sample| last.is(&sample, turned, 0.0).is_err());
            (off || other).then_some(())
        });
        come(&frames, gpu, SIZES[0], 0.0)?;
    }
    Ok(())
}

/// A cursor goes beside a DMA-BUF.
fn cursor_beside(qmp: &Path, card: &mut Card) -> Outcome<()> {
    let caps = "video/x-raw(memory:DMABuf,meta:GstVideoOverlayComposition)";
    let frames = Frames::play(&element(qmp, "cursor=overlay"), caps)?;
    come(&frames, card, SIZES[0], 0.0)?;
    card.define_cursor(&CURSOR);
    card.show_cursor(Some(AT));
    let screen = Screen::plain(SIZES[0], 255);
    frames.wait_for(|sample| {
        let buffer = sample.buffer().ok_or("an empty sample")?;
        let meta = buffer.meta::<gst_video::VideoOverlayCompositionMeta>();
        let rectangle = meta.ok_or("no overlay")?.overlay().rectangle(0)?;
        let (x, y, ..) = rectangle.render_rectangle();
        if (x as u32, y as u32) != AT {
            return Err(format!("the overlay is at {x}, {y}").into());
        }
        screen.is(sample, false, 0.0)
    })?;
    card.show_cursor(None);
    Ok(())
}

/// A cursor is drawn into a copy.
fn cursor_in(qmp: &Path, card: &mut Card) -> Outcome<()> {
    let frames = Frames::play(&element(qmp, ""), IN_MEMORY)?;
    come(&frames, card, SIZES[0], 0.0)?;
    card.define_cursor(&CURSOR);
    card.show_cursor(Some(AT));
    let screen = Screen {
        cursor: true,
        ..Screen::plain(SIZES[0], 255)
    };
    screen.comes(&frames, 0.0)?;
    card.show_cursor(None);
    Ok(())
}

/// helix-host reads the DMA-BUFs, and a client decodes what is on the screen.
fn helix_host(qmp: &Path, guest: &mut impl Guest) -> Outcome<()> {
    let host = Host::start(qmp)?;
    let frames = host.decoded()?;
    for size in SIZES {
        come(&frames, guest, size, MOST_MEAN_SQUARE)?;
    }
    Ok(())
}

/// The cursor too.
fn helix_host_cursor(qmp: &Path, card: &mut Card) -> Outcome<()> {
    let host = Host::start(qmp)?;
    let frames = host.decoded()?;
    for size in SIZES {
        come(&frames, card, size, MOST_MEAN_SQUARE)?;
    }
    card.define_cursor(&CURSOR);
    card.show_cursor(Some(AT));
    let screen = Screen {
        cursor: true,
        ..Screen::plain(SIZES[1], 255)
    };
    screen.comes(&frames, MOST_MEAN_SQUARE)?;
    card.show_cursor(None);
    Ok(())
}

/// A helix-host that shows a QEMU's screens.
struct Host {
    child: Child,
    socket: PathBuf,
}

impl Host {
    fn start(qmp: &Path) -> Outcome<Self> {
        let socket = qmp.with_file_name("helix");
        let child = Command::new("helix-host")
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .arg("--qemu")
            .arg(format!("qmp:{}", qmp.display()))
            .spawn()?;
        let mut host = Self { child, socket };
        eventually("helix-host's socket", || {
            let ended = host.child.try_wait().unwrap_or_default();
            assert!(ended.is_none(), "helix-host ended: {ended:?}");
            UnixStream::connect(&host.socket).ok()
        });
        Ok(host)
    }

    /// What a client sees of the first scanout.
    fn decoded(&self) -> Outcome<Frames> {
        let socket = self.socket.display();
        let client = format!(
            "scanoutsrc socket-path={socket} scanout-id=0 ! h264parse ! avdec_h264 ! videoconvert"
        );
        Frames::play(&client, "video/x-raw,format=BGRx")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
