// SPDX-License-Identifier: MIT OR Apache-2.0

//! What pipewirezerocopysrc's EGL module makes of DMA-BUFs, found out by reading them back.

use std::os::fd::{AsFd, OwnedFd};

use gst::prelude::*;
use gstpipewirezerocopy::egl::{Display, DmaBuf, Error, Image, Plane, Reader};

use crate::foreign::{self, Foreign};
use crate::node::{Kind, Node, VIRTIO_GPU};
use crate::{Outcome, buffers, dmabuf};

/// XRGB8888 of drm_fourcc.h; the bytes are blue, green, red and one that means nothing.
const XR24: u32 = u32::from_le_bytes(*b"XR24");
/// DRM_FORMAT_MOD_LINEAR.
const LINEAR: u64 = 0;
/// I915_FORMAT_MOD_X_TILED: no software renderer reads that.
const FOREIGN_TILING: u64 = (1 << 56) | 1;
/// Pixels.
const SIZE: (u32, u32) = (256, 64);

/// Says what can be imported, then imports memory of each kind and compares what is read back:
/// "egl KIND HOW: right", or what else it is.
pub fn show() -> Outcome<()> {
    let node = Node::open(VIRTIO_GPU, Kind::Primary)?;
    let display = Display::open(node.path())?;
    let mut reader = Reader::new(&display)?;
    let formats = display.formats()?;
    println!(
        "egl display {}: {}",
        display.node().display(),
        reader.renderer()
    );
    let modifiers = formats
        .iter()
        .find(|format| format.fourcc == XR24)
        .map_or(&[][..], |format| &format.modifiers);
    println!(
        "egl formats: {}; modifiers of XR24: {modifiers:x?}",
        formats.len()
    );

    show_caps(&node)?;
    for (name, memory) in [
        ("dumb", buffers::dumb(&node, SIZE.0, SIZE.1)),
        ("vgem", foreign::make(Foreign::Vgem, SIZE.0, SIZE.1)),
        ("udmabuf", foreign::make(Foreign::Udmabuf, SIZE.0, SIZE.1)),
        ("heap", foreign::make(Foreign::Heap, SIZE.0, SIZE.1)),
    ] {
        match memory {
            Ok(memory) => look(&display, &mut reader, name, &memory)?,
            Err(error) => println!("absent {name}: {error}"),
        }
    }
    Ok(())
}

/// Says in which kinds of memory pipewirezerocopysrc's frames can leave here, where there is no libcuda.
fn show_caps(node: &Node) -> Outcome<()> {
    gst::init()?;
    gstpipewirezerocopy::plugin_register_static()?;
    let source = gst::ElementFactory::make("pipewirezerocopysrc")
        .property("render-node", node.path().display().to_string())
        .build()?;
    let pad = source.static_pad("src").ok_or("a source without a pad")?;
    let caps = pad.query_caps(None);
    let has = |name: &str| {
        caps.iter_with_features()
            .any(|(_, features)| features.contains(name))
    };
    println!(
        "egl caps: DMA-BUFs {}, CUDA memory {}",
        has("memory:DMABuf"),
        has("memory:CUDAMemory")
    );
    Ok(())
}

/// Imports the memory in several ways.
fn look(
    display: &Display,
    reader: &mut Reader,
    name: &str,
    memory: &(OwnedFd, u32),
) -> Outcome<()> {
    let (fd, stride) = memory;
    let stride = *stride;
    paint(fd, stride, 0)?;
    let import = |modifier, (x, y), (width, height)| {
        let plane = Plane {
            fd: fd.as_fd(),
            offset: y * stride + x * 4,
            stride,
        };
        display.import(&DmaBuf {
            fourcc: XR24,
            modifier,
            width,
            height,
            planes: &[plane],
        })
    };
    let say = |how: &str, result: Result<String, Error>| match result {
        Ok(found) => println!("egl {name} {how}: {found}"),
        Err(error) => println!("egl {name} {how}: refused: {error}"),
    };
    let whole = ((0, 0), SIZE);
    // Lower than the memory, and beginning in the middle of a row.
    let part = ((16, 8), (100, 30));
    for (how, modifier, (at, size)) in [
        ("linear", Some(LINEAR), whole),
        ("without modifier", None, whole),
        ("part", Some(LINEAR), part),
        ("foreign tiling", Some(FOREIGN_TILING), whole),
    ] {
        say(
            how,
            import(modifier, at, size).and_then(|image| compare(reader, &image, at, 0)),
        );
    }
    // One image, made once, shows what is drawn later: it may live as long as the buffer does.
    let again = import(Some(LINEAR), whole.0, whole.1).and_then(|image| {
        compare(reader, &image, whole.0, 0)?;
        paint(fd, stride, 0x80).map_err(|error| Error::Refused(error.to_string()))?;
        compare(reader, &image, whole.0, 0x80)
    });
    say("drawn again", again);
    Ok(())
}

/// Red, green and blue of a pixel; `blue` tells pictures apart.
fn colour(x: u32, y: u32, blue: u8) -> [u8; 3] {
    [x as u8, y as u8, blue]
}

fn paint(fd: &OwnedFd, stride: u32, blue: u8) -> Outcome<()> {
    let bytes: Vec<u8> = (0..SIZE.1)
        .flat_map(|y| {
            (0..stride / 4).flat_map(move |x| {
                let [red, green, blue] = colour(x, y, blue);
                [blue, green, red, 0xff]
            })
        })
        .collect();
    dmabuf::write(fd, &bytes)
}

/// Compares every pixel with what was painted there, the image's corner being at `at`.
fn compare(reader: &mut Reader, image: &Image, at: (u32, u32), blue: u8) -> Result<String, Error> {
    let (width, height) = (image.width(), image.height());
    let bytes = reader.read(image, 0, 0, width, height)?;
    let (pixels, _) = bytes.as_chunks::<4>();
    let wrong = (0..height)
        .flat_map(|y| (0..width).map(move |x| (x, y)))
        .zip(pixels)
        .find(|((x, y), pixel)| pixel[..3] != colour(at.0 + x, at.1 + y, blue));
    Ok(wrong.map_or("right".to_owned(), |((x, y), pixel)| {
        format!("WRONG: {pixel:?} at {x}, {y}")
    }))
}
