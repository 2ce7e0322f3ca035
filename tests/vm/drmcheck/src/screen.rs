// SPDX-License-Identifier: MIT OR Apache-2.0

//! What `qemudisplaysrc` makes of real DMA-BUFs. A QEMU of ours says that it shows them, as one with
//! `gl=on` does.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use nix::sys::stat::fstat;
use zerocopy_test_qemu::eventually;
use zerocopy_test_qemu::fake::{FakeQemu, Listener};

use crate::foreign::{self, Foreign};
use crate::frames::{Frames, IN_MEMORY, ON_GPU, fd_of, rows};
use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::{Outcome, buffers, dmabuf};

/// Pixels.
const SIZE: (u32, u32) = (256, 64);
/// Of a part of it, and where that begins.
const PART: ((u32, u32), (u32, u32)) = ((32, 8), (128, 32));
/// `DRM_FORMAT_MOD_LINEAR` of drm_fourcc.h.
const LINEAR: u64 = 0;
/// `DRM_FORMAT_MOD_INVALID`.
const INVALID: u64 = 0x00ff_ffff_ffff_ffff;
/// `I915_FORMAT_MOD_X_TILED`: only its driver knows where pixels lie.
const TILED: u64 = (1 << 56) | 1;

/// Shows memory of each kind in each way.
pub fn show() -> Outcome<()> {
    gst::init()?;
    let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
    for (name, memory) in [
        ("dumb", buffers::dumb(&node, SIZE.0, SIZE.1)),
        ("vgem", foreign::make(Foreign::Vgem, SIZE.0, SIZE.1)),
        ("udmabuf", foreign::make(Foreign::Udmabuf, SIZE.0, SIZE.1)),
        ("heap", foreign::make(Foreign::Heap, SIZE.0, SIZE.1)),
    ] {
        let (fd, stride) = memory?;
        let buffer = Buffer { fd, stride };
        let say = |how: &str, result: Outcome<()>| match result {
            Ok(()) => println!("screen {name} {how}: right"),
            Err(error) => println!("screen {name} {how}: WRONG: {error}"),
        };
        say("as it is", as_it_is(&buffer));
        say("upside down", upside_down(&buffer));
        say("part", part(&buffer));
        say("copied", copied(&buffer));
        say("let go", let_go(&buffer));
        say("tiled", unreadable(&buffer, TILED));
        // The kernel says of pages of a memfd that they are no GPU's.
        let unknown = match name {
            "udmabuf" => taken_as_linear(&buffer),
            _ => unreadable(&buffer, INVALID),
        };
        say("nobody knows how", unknown);
    }
    Ok(())
}

/// A DMA-BUF to show.
struct Buffer {
    fd: OwnedFd,
    /// Bytes.
    stride: u32,
}

impl Buffer {
    fn layout(&self) -> (u32, u32, u32) {
        (SIZE.0, SIZE.1, self.stride)
    }

    /// Fills it with a picture of which `blue` is the blue part.
    fn paint(&self, blue: u8) -> Outcome<()> {
        let row = |y| (0..self.stride / 4).flat_map(move |x| pixel(x, y, blue));
        let bytes: Vec<u8> = (0..SIZE.1).flat_map(row).collect();
        dmabuf::write(&self.fd, &bytes)
    }
}

fn pixel(x: u32, y: u32, blue: u8) -> [u8; 4] {
    [blue, y as u8, x as u8, 0xff]
}

/// The element in a pipeline, and the QEMU that it is at.
struct Rig {
    frames: Frames,
    listener: Listener,
    _qemu: FakeQemu,
}

impl Rig {
    /// Plays, with a sink that takes `caps`.
    fn new(caps: &str) -> Outcome<Self> {
        let qemu = FakeQemu::start(&[0]);
        let qmp = qemu.qmp();
        let element = format!(
            "qemudisplaysrc qmp-socket={} max-framerate=0/1",
            qmp.display()
        );
        let frames = Frames::play(&element, caps)?;
        Ok(Self {
            frames,
            listener: qemu.listener(),
            _qemu: qemu,
        })
    }
}

/// Compares with a painted picture, or with a part of it; `y` says which row of it lies where.
fn compare(
    sample: &gst::Sample,
    (at, size): ((u32, u32), (u32, u32)),
    blue: u8,
    y: impl Fn(u32) -> u32,
) -> Outcome<()> {
    let rows = rows(sample)?;
    if rows.len() != size.1 as usize || rows.iter().any(|row| row.len() != size.0 as usize * 4) {
        return Err(format!("{} rows, caps {:?}", rows.len(), sample.caps()).into());
    }
    for (row, bytes) in (0..).zip(&rows) {
        for (x, found) in (0..).zip(bytes.chunks_exact(4)) {
            let expected = pixel(at.0 + x, at.1 + y(row), blue);
            // The last byte means nothing.
            if found[..3] != expected[..3] {
                return Err(format!("{found:?} at {x}, {row} for {expected:?}").into());
            }
        }
    }
    Ok(())
}

const WHOLE: ((u32, u32), (u32, u32)) = ((0, 0), SIZE);

/// Goes out as the same DMA-BUF; QEMU, which waits with drawing, goes on when the frame was let go.
fn as_it_is(buffer: &Buffer) -> Outcome<()> {
    let rig = Rig::new(ON_GPU)?;
    buffer.paint(1)?;
    rig.listener
        .scanout_dmabuf(buffer.fd.as_fd(), buffer.layout(), LINEAR, false)?;
    let sample = rig.frames.next()?;
    compare(&sample, WHOLE, 1, |y| y)?;
    is_of(&sample, buffer)?;
    drop(sample);
    buffer.paint(2)?;
    thread::scope(|scope| {
        let update = scope.spawn(|| rig.listener.update_dmabuf((0, 0), (16, 16)));
        let sample = rig.frames.next();
        let compared = sample.and_then(|sample| compare(&sample, WHOLE, 2, |y| y));
        update.join().map_err(|_| "the update panicked")??;
        compared
    })
}

/// QEMU's `y0_top`: the memory as it is, and a tag that says how to look at it.
fn upside_down(buffer: &Buffer) -> Outcome<()> {
    let rig = Rig::new(ON_GPU)?;
    buffer.paint(3)?;
    for (flipped, expected) in [(true, "flip-rotate-180"), (false, "rotate-0")] {
        rig.listener
            .scanout_dmabuf(buffer.fd.as_fd(), buffer.layout(), LINEAR, flipped)?;
        compare(&rig.frames.next()?, WHOLE, 3, |y| y)?;
        let said = rig.frames.orientation();
        if said.as_deref() != Some(expected) {
            return Err(format!("the tag says {said:?}").into());
        }
    }
    Ok(())
}

/// A part of a larger one, counted from the top of the picture.
fn part(buffer: &Buffer) -> Outcome<()> {
    let (at, size) = PART;
    buffer.paint(4)?;
    let rig = Rig::new(ON_GPU)?;
    rig.listener
        .scanout_dmabuf2(buffer.fd.as_fd(), at, size, buffer.layout(), false)?;
    compare(&rig.frames.next()?, PART, 4, |y| y)?;
    let rig = Rig::new(IN_MEMORY)?;
    for at in [at, (0, 0)] {
        rig.listener
            .scanout_dmabuf2(buffer.fd.as_fd(), at, size, buffer.layout(), true)?;
        // The picture's row 0 is the memory's last one.
        compare(&rig.frames.next()?, ((at.0, 0), size), 4, |y| {
            SIZE.1 - 1 - at.1 - y
        })?;
    }
    Ok(())
}

/// For who takes no DMA-BUFs, a copy that is the right way up. QEMU goes on as soon as it is made.
fn copied(buffer: &Buffer) -> Outcome<()> {
    let rig = Rig::new(IN_MEMORY)?;
    buffer.paint(5)?;
    rig.listener
        .scanout_dmabuf(buffer.fd.as_fd(), buffer.layout(), LINEAR, false)?;
    compare(&rig.frames.next()?, WHOLE, 5, |y| y)?;
    rig.listener
        .scanout_dmabuf(buffer.fd.as_fd(), buffer.layout(), LINEAR, true)?;
    let kept = rig.frames.next()?;
    compare(&kept, WHOLE, 5, |y| SIZE.1 - 1 - y)?;
    buffer.paint(6)?;
    rig.listener.update_dmabuf((0, 0), (16, 16))?;
    compare(&rig.frames.next()?, WHOLE, 6, |y| SIZE.1 - 1 - y)?;
    compare(&kept, WHOLE, 5, |y| SIZE.1 - 1 - y)
}

/// A DMA-BUF whose place another one has taken, or nothing, is QEMU's alone again.
fn let_go(buffer: &Buffer) -> Outcome<()> {
    let file = identity(&buffer.fd)?;
    let other = foreign::make(Foreign::Udmabuf, SIZE.0, SIZE.1)?;
    let other = Buffer {
        fd: other.0,
        stride: other.1,
    };
    let rig = Rig::new(ON_GPU)?;
    for replace in [true, false] {
        rig.listener
            .scanout_dmabuf(buffer.fd.as_fd(), buffer.layout(), LINEAR, false)?;
        drop(rig.frames.next()?);
        // Ours, the one that came, and the memory's.
        if descriptors(file)? < 3 {
            return Err("nobody has it while it is shown".into());
        }
        if replace {
            rig.listener
                .scanout_dmabuf(other.fd.as_fd(), other.layout(), LINEAR, false)?;
            // This is how QEMU lets go of the one before; the picture stays.
            rig.listener.disable()?;
            is_of(&rig.frames.next()?, &other)?;
        } else {
            // The first one is about the DMA-BUF before, see above.
            rig.listener.disable()?;
            rig.listener.disable()?;
        }
        // An appsink keeps the memory of the frame that it gave last.
        let left = if replace { 1 } else { 2 };
        eventually("descriptors of a DMA-BUF closed", || {
            descriptors(file).ok().filter(|count| *count == left)
        });
    }
    Ok(())
}

/// The frame must be in this very DMA-BUF.
fn is_of(sample: &gst::Sample, buffer: &Buffer) -> Outcome<()> {
    let fd = sample.buffer().and_then(fd_of).ok_or("no DMA-BUF")?;
    if identity(fd)? == identity(&buffer.fd)? {
        return Ok(());
    }
    Err("not the DMA-BUF that is shown".into())
}

/// What tells files apart: file system and inode.
fn identity(fd: impl AsFd) -> Outcome<(u64, u64)> {
    let info = fstat(fd)?;
    Ok((info.st_dev, info.st_ino))
}

/// How many descriptors this process has of a file.
fn descriptors(file: (u64, u64)) -> Outcome<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc/self/fd")? {
        // What was closed meanwhile does not count.
        let info = fs::metadata(entry?.path());
        count += usize::from(info.is_ok_and(|info| {
            use std::os::unix::fs::MetadataExt;
            (info.dev(), info.ino()) == file
        }));
    }
    Ok(count)
}

/// Memory that no processor can read, or nobody says how: an error.
fn unreadable(buffer: &Buffer, modifier: u64) -> Outcome<()> {
    let rig = Rig::new(IN_MEMORY)?;
    rig.listener
        .scanout_dmabuf(buffer.fd.as_fd(), buffer.layout(), modifier, false)?;
    let error = rig.frames.error();
    for part in ["DMA-BUF of XR24", "gl=on"] {
        if !error.contains(part) {
            return Err(format!("{part} is not in {error}").into());
        }
    }
    Ok(())
}

/// Memory of no GPU needs no modifier.
fn taken_as_linear(buffer: &Buffer) -> Outcome<()> {
    for caps in [ON_GPU, IN_MEMORY] {
        let rig = Rig::new(caps)?;
        buffer.paint(7)?;
        rig.listener
            .scanout_dmabuf(buffer.fd.as_fd(), buffer.layout(), INVALID, false)?;
        compare(&rig.frames.next()?, WHOLE, 7, |y| y)?;
    }
    Ok(())
}
