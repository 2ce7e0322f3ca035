// SPDX-License-Identifier: MIT OR Apache-2.0

//! What pipewirezerocopysrc makes of producers of DMA-BUFs: our own, which do what compositors do only
//! with the right hardware, and what they should not do.
//!
//! Each scene is a producer and a pipeline, and says "capture NAME: right", or what is wrong. PipeWire
//! and a session manager must run.

use std::cell::Cell;
use std::time::{Duration, Instant};

mod canvas;
mod cuda;
mod run;
mod stage;
mod sync;

use canvas::{Memory, Style};
use run::Run;
use stage::{AGAIN, ANY, LIMIT, Stage, TOO_EARLY, expect, expect_dmabuf};
use zerocopy_test_producer::{Offer, Pixels, STALE, When};

use crate::Outcome;

/// DRM_FORMAT_MOD_LINEAR.
const LINEAR: u64 = 0;
/// DRM_FORMAT_MOD_INVALID: whoever made the memory knows.
const UNSAID: u64 = 0x00ff_ffff_ffff_ffff;
/// I915_FORMAT_MOD_X_TILED: nobody here reads that.
const TILED: u64 = (1 << 56) | 1;
/// Pixels.
const SIZE: (u32, u32) = (64, 48);

/// Which scenes to play.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Their names; all without one.
    names: Vec<String>,
}

type Scene = fn(&str) -> Outcome<()>;

const SCENES: &[(&str, Scene)] = &[
    ("dumb", |node| {
        passed_on(node, Pixels::Bgrx, padded(Memory::Dumb))
    }),
    ("vgem", |node| {
        passed_on(node, Pixels::Bgrx, padded(Memory::Vgem))
    }),
    ("udmabuf", |node| {
        passed_on(node, Pixels::Bgrx, Style::plain(Memory::Udmabuf))
    }),
    ("heap", |node| {
        passed_on(node, Pixels::Bgrx, Style::plain(Memory::Heap))
    }),
    ("rgba", |node| {
        passed_on(node, Pixels::Rgba, Style::plain(Memory::Dumb))
    }),
    ("offset", |node| {
        let more_rows = (3, 2);
        let no_sizes = true;
        let style = Style {
            more_rows,
            no_sizes,
            ..padded(Memory::Dumb)
        };
        passed_on(node, Pixels::Bgrx, style)
    }),
    ("nv12", |node| {
        passed_on(node, Pixels::Nv12, padded(Memory::Dumb))
    }),
    ("nv12-apart", |node| {
        let style = Style {
            apart: true,
            ..padded(Memory::Dumb)
        };
        passed_on(node, Pixels::Nv12, style)
    }),
    ("cuda", |node| cuda::copied(node, Pixels::Bgrx)),
    ("cuda-rgba", |node| cuda::copied(node, Pixels::Rgba)),
    ("cuda-nv12", |node| cuda::copied(node, Pixels::Nv12)),
    ("cuda-device", cuda::device),
    ("cuda-shared", cuda::shared),
    ("cuda-latch", cuda::latched),
    ("cuda-fence", cuda::fence),
    ("cuda-stopped", cuda::late::stopped),
    ("cuda-lost", cuda::lost),
    ("cuda-refused", cuda::refused),
    ("cuda-exhausted", cuda::exhausted),
    ("cuda-strict", cuda::strict),
    ("cuda-only", cuda::only),
    ("cuda-still", cuda::still::fallback),
    ("cuda-kept", cuda::still::kept),
    ("cuda-agreed-again", cuda::still::agreed_again),
    ("cuda-unwanted", cuda::unwanted),
    ("cuda-cycles", cuda::cycles),
    ("system", system),
    ("read", read),
    ("second-modifier", second_modifier),
    ("no-modifier", no_modifier),
    ("refused-modifier", refused_modifier),
    ("refused-strict", refused_strict),
    ("refused-caps", refused_caps),
    ("read-by-gpu", read_by_gpu),
    ("resized", resized),
    ("reformatted", reformatted),
    ("format-twice", format_twice),
    ("modifier-dropped", modifier_dropped),
    ("few-buffers", few_buffers),
    ("held", held),
    ("hoarded", hoarded),
    ("no-sync", no_sync),
    ("implicit", implicit),
    ("explicit", explicit),
    ("explicit-dropped", explicit_dropped),
    ("explicit-stopped", explicit_stopped),
    ("explicit-paused", explicit_paused),
    ("explicit-never", explicit_never),
];

/// Plays the scenes.
pub fn show(options: &Options) -> Outcome<()> {
    gst::init()?;
    // Before anybody looks for libcuda.
    cuda::fake();
    let known = |name: &String| SCENES.iter().any(|(scene, _)| scene == name);
    if let Some(name) = options.names.iter().find(|name| !known(name)) {
        return Err(format!("no scene {name}").into());
    }
    for (name, scene) in SCENES {
        if !options.names.is_empty() && !options.names.iter().any(|wanted| wanted == name) {
            continue;
        }
        let start = Instant::now();
        match scene(&format!("scene-{name}")) {
            Ok(()) => println!("capture {name}: right"),
            Err(error) => println!("capture {name}: wrong: {error}"),
        }
        eprintln!("{name} took {:.1} s", start.elapsed().as_secs_f32());
    }
    Ok(())
}

/// Memory that is wider and higher than the picture.
fn padded(memory: Memory) -> Style {
    Style {
        more_columns: 16,
        more_rows: (0, 16),
        ..Style::plain(memory)
    }
}

fn offer(pixels: Pixels, modifiers: &[u64], shared: bool) -> Offer {
    Offer {
        pixels,
        size: SIZE,
        modifiers: modifiers.to_vec(),
        shared,
        most: Some(60),
    }
}

/// Frames are the producer's own DMA-BUFs, with the right picture in them.
fn passed_on(node: &str, pixels: Pixels, style: Style) -> Outcome<()> {
    let stage = Stage::start(node, offer(pixels, &[LINEAR], false), style, "dmabuf")?;
    for number in 1..=8 {
        let (frame, shown) = stage.shown(number)?;
        expect_dmabuf(&frame, true)?;
        // One DMA-BUF is one memory, however many planes are in it.
        let dmabufs = if style.apart { "2" } else { "1" };
        expect("memories", frame.memories().to_string(), dmabufs)?;
        if style.memory == Memory::Dumb && !style.apart && frame.resource()? == 0 {
            return Err("a resource without a number".into());
        }
        if number == 1 && shown.resource.is_some() != (style.memory == Memory::Dumb) {
            return Err("only dumb buffers are resources".into());
        }
    }
    expect("memory", stage.run.stat("memory"), "dmabuf")?;
    expect("copies", stage.run.stat("copies"), "0")
}

/// `output-mode=system` takes shared memory from who has both.
fn system(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], true);
    let stage = Stage::start(node, offer, padded(Memory::Dumb), "system")?;
    expect("modifier", format!("{:?}", stage.agreed()?), "None")?;
    let (frame, _) = stage.shown(1)?;
    expect_dmabuf(&frame, false)
}

/// And reads DMA-BUFs of who has nothing else.
fn read(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], false);
    let stage = Stage::start(node, offer, padded(Memory::Dumb), "system")?;
    for number in 1..=3 {
        expect_dmabuf(&stage.shown(number)?.0, false)?;
    }
    expect("memory", stage.run.stat("memory"), "system")
}

/// Of a producer's modifiers, one that works here is taken, though it prefers another.
fn second_modifier(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[TILED, LINEAR], false);
    let stage = Stage::start(node, offer, padded(Memory::Dumb), "dmabuf")?;
    expect("modifier", format!("{:?}", stage.agreed()?), "Some(0)")?;
    expect_dmabuf(&stage.shown(1)?.0, true)
}

/// A producer that says nothing about modifiers, and then names one.
fn no_modifier(node: &str) -> Outcome<()> {
    let offer = |modifier| offer(Pixels::Bgrx, &[modifier], false);
    let stage = Stage::start(node, offer(UNSAID), padded(Memory::Dumb), "dmabuf")?;
    expect(
        "modifier",
        format!("{:x?}", stage.agreed()?),
        "Some(ffffffffffffff)",
    )?;
    expect_dmabuf(&stage.shown(1)?.0, true)?;
    stage.producer.offer(offer(LINEAR));
    expect("modifier", format!("{:x?}", stage.agreed()?), "Some(0)")?;
    expect_dmabuf(&stage.shown(2)?.0, true)
}

/// Where none works, `auto` takes shared memory.
fn refused_modifier(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[TILED], true);
    let stage = Stage::start(node, offer, padded(Memory::Dumb), "auto")?;
    expect("modifier", format!("{:?}", stage.agreed()?), "None")?;
    expect_dmabuf(&stage.shown(1)?.0, false)?;
    expect("memory", stage.run.stat("memory"), "system")
}

/// Who says to take DMA-BUFs and refuses them when they come gets shared memory, and is told why.
fn refused_caps(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], true);
    let stage = Stage::refused(node, offer, padded(Memory::Dumb))?;
    expect("modifier", format!("{:?}", stage.agreed()?), "Some(0)")?;
    expect_dmabuf(&stage.shown(1)?.0, false)?;
    // The first ones are copies of DMA-BUFs, until the producer has changed over.
    let mut number = 1;
    while stage.run.stat("sync") != "none" {
        number += 1;
        expect_dmabuf(&stage.shown(number)?.0, false)?;
    }
    expect("memory", stage.run.stat("memory"), "system")?;
    let reason = stage.run.reason("system")?;
    if !reason.contains("XR24 cannot be passed on: downstream refused") {
        return Err(format!("the reason is {reason}").into());
    }
    Ok(())
}

/// What only the driver knows the layout of is read back through OpenGL ES.
fn read_by_gpu(node: &str) -> Outcome<()> {
    for pixels in [Pixels::Bgrx, Pixels::Rgba] {
        let node = format!("{node}-{pixels:?}");
        let offer = offer(pixels, &[UNSAID], false);
        let stage = Stage::start(&node, offer, padded(Memory::Dumb), "system")?;
        for number in 1..=12 {
            expect_dmabuf(&stage.shown(number)?.0, false)?;
        }
        expect("memory", stage.run.stat("memory"), "system")?;
        expect("transfer", stage.run.stat("transfer"), "copy")?;
    }
    Ok(())
}

/// Where none works, `dmabuf` is an error.
fn refused_strict(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[TILED], true);
    let stage = Stage::start(node, offer, padded(Memory::Dumb), "dmabuf")?;
    let error = stage.run.error(LIMIT)?;
    eprintln!("{error}");
    Ok(())
}

/// Another size in mid-stream.
fn resized(node: &str) -> Outcome<()> {
    let mut offer = offer(Pixels::Bgrx, &[LINEAR], true);
    let stage = Stage::start(node, offer.clone(), padded(Memory::Dumb), "dmabuf")?;
    stage.shown(1)?;
    for (number, size) in [(2, (96, 32)), (3, (16, 16)), (4, SIZE)] {
        offer.size = size;
        stage.size.set(size);
        stage.producer.offer(offer.clone());
        expect_dmabuf(&stage.shown(number)?.0, true)?;
    }
    Ok(())
}

/// Other pixels in mid-stream.
fn reformatted(node: &str) -> Outcome<()> {
    let mut offer = offer(Pixels::Bgrx, &[LINEAR], true);
    let stage = Stage::start(node, offer.clone(), padded(Memory::Dumb), "dmabuf")?;
    stage.shown(1)?;
    for (number, pixels) in [(2, Pixels::Rgba), (3, Pixels::Nv12), (4, Pixels::Bgrx)] {
        offer.pixels = pixels;
        stage.pixels.set(pixels);
        stage.producer.offer(offer.clone());
        expect_dmabuf(&stage.shown(number)?.0, true)?;
    }
    Ok(())
}

/// The same format once more, after each picture (L5). It came twice already: when the producer was
/// asked for a modifier, and when it had chosen.
fn format_twice(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], true);
    let stage = Stage::start(node, offer.clone(), padded(Memory::Dumb), "dmabuf")?;
    for number in 1..=4 {
        expect_dmabuf(&stage.shown(number)?.0, true)?;
        stage.producer.offer(offer.clone());
    }
    Ok(())
}

/// A producer that can make no DMA-BUFs any more, and then again.
fn modifier_dropped(node: &str) -> Outcome<()> {
    let offer = |modifiers: &[u64]| offer(Pixels::Bgrx, modifiers, true);
    let stage = Stage::start(node, offer(&[LINEAR]), padded(Memory::Dumb), "auto")?;
    expect_dmabuf(&stage.shown(1)?.0, true)?;
    stage.producer.offer(offer(&[]));
    stage.agreed()?;
    expect_dmabuf(&stage.shown(2)?.0, false)?;
    stage.producer.offer(offer(&[LINEAR]));
    stage.agreed()?;
    expect_dmabuf(&stage.shown(3)?.0, true)
}

/// A sink that keeps its last buffer gets the next one, of as few buffers as compositors have.
fn few_buffers(node: &str) -> Outcome<()> {
    // Of one, PipeWire 1.4 makes two.
    for buffers in [1, 2, 3, 4] {
        let style = Style {
            buffers,
            ..padded(Memory::Dumb)
        };
        let offer = offer(Pixels::Bgrx, &[LINEAR], false);
        let stage = Stage::start(&format!("{node}-{buffers}"), offer, style, "dmabuf")?;
        stage.run.keep_last();
        for number in 1..=8 {
            expect_dmabuf(&stage.shown(number)?.0, true)?;
        }
    }
    Ok(())
}

/// A frame that somebody keeps is not drawn over.
fn held(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], false);
    let stage = Stage::start(node, offer, padded(Memory::Dumb), "dmabuf")?;
    let (first, _) = stage.shown(1)?;
    for number in 2..=20 {
        stage.shown(number)?;
    }
    stage.compare(&first, 1)
}

/// Somebody keeps all that comes: the producer goes on, and so does the stream once frames are let go.
fn hoarded(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], false);
    let stage = Stage::start(node, offer, padded(Memory::Dumb), "dmabuf")?;
    let (first, _) = stage.shown(1)?;
    let mut kept = vec![(1, first)];
    for number in 2..=12 {
        stage.show(number, When::Before)?;
        if let Some(frame) = stage.run.frame(TOO_EARLY)? {
            kept.push((number, frame));
        }
    }
    if kept.len() < 2 {
        return Err("nothing may be kept".into());
    }
    for (number, frame) in &kept {
        stage.compare(frame, *number)?;
    }
    drop(kept);
    stage.shown(13)?;
    Ok(())
}

/// What the next scenes would see of somebody who does not wait: without a fence nobody can.
fn no_sync(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], false);
    let stage = Stage::start(node, offer, padded(Memory::Dumb), "dmabuf")?;
    stage.shown(1)?;
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        stage.show(2, When::After)?;
        while let Some(frame) = stage.run.frame(AGAIN)? {
            // What was shown before may come once more.
            if stage.compare(&frame, STALE).is_ok() {
                return Ok(());
            }
        }
    }
    Err("a buffer with nothing in it did not come".into())
}

/// A fence on the DMA-BUF is waited for.
fn implicit(node: &str) -> Outcome<()> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], false);
    let stage = Stage::start(node, offer, padded(Memory::Vgem), "dmabuf")?;
    stage.shown(1)?;
    for number in 2..=4 {
        stage.waited_for(number)?;
    }
    expect("sync", stage.run.stat("sync"), "implicit")
}

fn explicit_stage(node: &str) -> Outcome<Stage> {
    explicit_stage_with(node, "dmabuf")
}

fn explicit_stage_with(node: &str, settings: &str) -> Outcome<Stage> {
    let offer = offer(Pixels::Bgrx, &[LINEAR], true);
    // So many that the producer can do for long without one of them.
    let style = Style {
        buffers: 8,
        ..padded(Memory::Dumb)
    };
    Stage::with_sync(node, offer, style, settings, true)
}

/// Acquire points are waited for; release points are signalled when a frame is done with, not before.
fn explicit(node: &str) -> Outcome<()> {
    let stage = explicit_stage(node)?;
    let (frame, shown) = stage.shown(1)?;
    let release = shown.release.ok_or("no explicit sync was agreed on")?;
    expect("sync", stage.run.stat("sync"), "explicit")?;
    for number in 2..=4 {
        stage.waited_for(number)?;
    }
    if release.within(Duration::ZERO)? {
        return Err("released while somebody had it".into());
    }
    stage.compare(&frame, 1)?;
    drop(frame);
    if !release.within(LIMIT)? {
        return Err("never released".into());
    }
    // More than there are buffers: each is used again only when it was released.
    let mut promised = 0;
    for number in 5..=20 {
        let (_, shown) = stage.shown(number)?;
        promised += u32::from(shown.promised == Some(true));
    }
    // What PipeWire throws away is not promised.
    if promised == 0 {
        return Err("no release was promised".into());
    }
    Ok(())
}

/// Frames that nobody takes are released as well.
fn explicit_dropped(node: &str) -> Outcome<()> {
    let stage = explicit_stage(node)?;
    let (_, first) = stage.shown(1)?;
    let mut releases = vec![first.release];
    for number in 2..=12 {
        let before = stage.run.seen();
        releases.push(stage.show(number, When::Before)?.release);
        // One after another: what PipeWire throws away, because somebody is busy, nobody releases.
        let end = Instant::now() + AGAIN;
        while stage.run.seen() == before && Instant::now() < end {
            // Nobody tells when a frame is dropped.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let releases: Option<Vec<_>> = releases.into_iter().collect();
    let releases = releases.ok_or("no explicit sync was agreed on")?;
    while stage.run.frame(AGAIN)?.is_some() {}
    stage.run.stop()?;
    let dropped: usize = stage.run.stat("dropped").parse()?;
    if dropped == 0 {
        return Err("nothing was dropped".into());
    }
    for (index, release) in releases.iter().enumerate() {
        if !release.within(LIMIT)? {
            return Err(format!("frame {index} of {} was never released", releases.len()).into());
        }
    }
    Ok(())
}

/// A picture that is never drawn does not keep the pipeline from ending, nor the next one from beginning.
fn explicit_stopped(node: &str) -> Outcome<()> {
    let stage = explicit_stage(node)?;
    stage.shown(1)?;
    stage.late(2)?;
    let took = stage.run.stop()?;
    eprintln!("stopped within {took:?}");
    if took > LIMIT / 4 {
        return Err(format!("stopping took {took:?}").into());
    }
    let Stage { producer, .. } = stage;
    let run = Run::start(node, "dmabuf", ANY)?;
    let stage = Stage {
        producer,
        run,
        pixels: Cell::new(Pixels::Bgrx),
        size: Cell::new(SIZE),
    };
    stage.shown(3)?;
    Ok(())
}

/// A pause while a picture is waited for does not cost it, though the producer shows no other.
fn explicit_paused(node: &str) -> Outcome<()> {
    let stage = explicit_stage(node)?;
    stage.shown(1)?;
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        let waited_for = stage.late(2)?.is_some();
        stage.run.pause()?;
        stage.finish()?;
        stage.run.play()?;
        while let Some(frame) = stage.run.frame(AGAIN)? {
            if waited_for && stage.compare(&frame, 2).is_ok() {
                return Ok(());
            }
        }
        // The machine was busy, and the element has given the picture up before the pause.
    }
    Err("a picture that was waited for before the pause did not come after it".into())
}

/// A picture that is never drawn does not take the place of the one before, which is kept alive.
fn explicit_never(node: &str) -> Outcome<()> {
    let stage = explicit_stage_with(node, "dmabuf keepalive-time=100")?;
    stage.shown(1)?;
    let keepalives = || stage.run.stat("keepalives").parse::<u64>();
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        stage.show(2, When::After)?;
        // Longer than the element waits.
        let again = Instant::now() + 3 * AGAIN;
        while stage.run.stat("corrupted") == "0" && Instant::now() < again {
            // Nobody tells when a frame is given up.
            std::thread::sleep(Duration::from_millis(5));
        }
        if stage.run.stat("corrupted") != "0" {
            let before = keepalives()?;
            let end = Instant::now() + LIMIT;
            while keepalives()? < before + 3 {
                if Instant::now() > end {
                    return Err("the picture before is not kept alive any more".into());
                }
                stage.run.frame(AGAIN)?;
            }
            return Ok(());
        }
        // PipeWire has thrown it away.
        stage.finish()?;
    }
    Err("no picture was given up".into())
}
