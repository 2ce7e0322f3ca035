// SPDX-License-Identifier: MIT OR Apache-2.0

//! The pictures of one console, while its scanout runs.
//!
//! Each is copied once, out of memory that QEMU may change, or cut off, at any moment: into a
//! buffer of ours, where the cursor is drawn as well.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gst_video::prelude::*;
use gst_video::{VideoFormat, VideoFrameRef, VideoInfo};
use helix_protocol::wait::Waker;
use qemu_display::{Error, Layout, Listening, Look, Picture, PixelFormat, Screen};

use super::{Link, REFRESH_RATE};
use crate::source::monotonic_now;

/// A console's pictures; dropping it ends the watch.
pub struct Watch {
    link: Arc<Link>,
    console: u32,
    /// The connection that the last picture was of.
    generation: u64,
    /// While this is kept, QEMU says what the console shows.
    listening: Option<Listening>,
    /// QEMU has come, or come back, since it was last asked for.
    returned: bool,
    /// The grid of the rate: when the last picture was due.
    slot: Option<Instant>,
    /// When the picture that is there may be taken.
    due: Option<Instant>,
    canvas: Option<Canvas>,
    /// The last picture that was given.
    given: Option<gst::Sample>,
}

/// What pictures of one kind become.
struct Canvas {
    info: VideoInfo,
    caps: gst::Caps,
    pool: gst::BufferPool,
}

impl Watch {
    /// Has `waker` woken when the console shows something new.
    pub fn new(link: &Arc<Link>, console: u32, waker: Waker) -> Self {
        link.state().watchers.insert(console, waker);
        Self {
            link: link.clone(),
            console,
            generation: 0,
            listening: None,
            returned: false,
            slot: None,
            due: None,
            canvas: None,
            given: None,
        }
    }

    /// The console's picture and when it was captured, CLOCK_MONOTONIC in nanoseconds: one that
    /// is another one and whose time has come, or `again` what there is. `None` while QEMU is away or
    /// the console is off.
    ///
    /// The error says why there will be none.
    pub fn picture(&mut self, again: bool) -> Result<Option<(gst::Sample, i64)>, String> {
        self.due = None;
        let Some((screen, rate)) = self.screen()? else {
            return Ok(None);
        };
        let now = Instant::now();
        let interval = Duration::from_secs(1) / rate;
        match screen.look() {
            Look::News | Look::Cursor => {
                if let Some(due) = self.slot.map(|slot| slot + interval)
                    && due > now
                    && !again
                {
                    // Until then changes become one.
                    self.due = Some(due);
                    return Ok(None);
                }
            }
            Look::Still if again => {}
            Look::Still | Look::Empty | Look::Off => return Ok(None),
            Look::Failed(error) => return Ok(self.refuse(error.to_string())),
        }
        let picture = match screen.take() {
            Ok(Some(picture)) => picture,
            Ok(None) => return Ok(None),
            Err(error) => return Ok(self.refuse(error.to_string())),
        };
        // A thread that wakes late must not make the next picture late too, nor have what was
        // missed made up for in a burst.
        let slot = self.slot.map_or(now, |slot| slot + interval);
        self.slot = Some(if now < slot + interval {
            slot.min(now)
        } else {
            now
        });
        let age = if picture.is_repeated() {
            Duration::ZERO
        } else {
            picture.arrived.elapsed()
        };
        let captured = monotonic_now() - age.as_nanos() as i64;
        match self.sample(&picture, rate) {
            // A guest that flips pages says so twice, and some compositors flip twice. To compare costs a
            // part of what encoding does, and nearly nothing where pictures differ.
            Ok(sample)
                if !again
                    && self
                        .given
                        .as_ref()
                        .is_some_and(|given| same(given, &sample)) =>
            {
                Ok(None)
            }
            Ok(sample) => {
                self.given = Some(sample.clone());
                Ok(Some((sample, captured)))
            }
            Err(Failure::Qemu(reason)) => Ok(self.refuse(reason)),
            Err(Failure::Ours(reason)) => Err(reason),
        }
    }

    /// When to ask for the picture that is there.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether QEMU has come back since this was last asked.
    pub fn returned(&mut self) -> bool {
        std::mem::take(&mut self.returned)
    }

    /// The console's screen and its rate.
    fn screen(&mut self) -> Result<Option<(Arc<Screen>, u32)>, String> {
        let state = self.link.state();
        let console = self.console;
        if let Some(consoles) = &state.consoles
            && !consoles.contains(&console)
        {
            return Err(format!(
                "QEMU has no console {console}, only {consoles:?}; console N is scanout N"
            ));
        }
        let Some(screen) = state.screen(console) else {
            return Ok(None);
        };
        if self.generation != state.generation {
            self.generation = state.generation;
            self.listening = Some(screen.listen());
            self.returned = true;
        }
        let mode = state.modes.get(&console);
        Ok(Some((
            screen,
            mode.map_or(REFRESH_RATE, |mode| mode.refresh_rate),
        )))
    }

    /// QEMU is to be connected to anew.
    fn refuse<T>(&self, reason: String) -> Option<T> {
        self.link.distrust(self.generation, reason);
        None
    }

    fn sample(&mut self, picture: &Picture, rate: u32) -> Result<gst::Sample, Failure> {
        let layout = picture.pixels.layout().ok_or_else(|| {
            Failure::Ours(format!(
                "console {} is drawn on a GPU, in memory that helix-host cannot read; start QEMU \
                 without gl=on in -display",
                self.console
            ))
        })?;
        let canvas = match self
            .canvas
            .take()
            .filter(|canvas| canvas.fits(&layout, rate))
        {
            Some(canvas) => canvas,
            None => Canvas::new(&layout, rate).map_err(Failure::Ours)?,
        };
        let canvas = self.canvas.insert(canvas);
        let buffer = canvas.draw(picture)?;
        Ok(gst::Sample::builder()
            .buffer(&buffer)
            .caps(&canvas.caps)
            .build())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.link.state().watchers.remove(&self.console);
    }
}

/// Whether two pictures are the same, as far as that is easily seen.
fn same(one: &gst::Sample, other: &gst::Sample) -> bool {
    let bytes = |sample: &gst::Sample| sample.buffer_owned()?.into_mapped_buffer_readable().ok();
    one.caps() == other.caps()
        && bytes(one)
            .zip(bytes(other))
            .is_some_and(|(one, other)| *one == *other)
}

/// Whose fault it is that there is no picture.
enum Failure {
    Qemu(String),
    Ours(String),
}

impl Canvas {
    fn new(layout: &Layout, rate: u32) -> Result<Self, String> {
        let failed = |error: gst::glib::BoolError| error.to_string();
        let info = VideoInfo::builder(format(layout.format), layout.width, layout.height)
            .fps(gst::Fraction::new(rate as i32, 1))
            .build()
            .map_err(failed)?;
        let caps = info.to_caps().map_err(failed)?;
        let size = u32::try_from(info.size()).map_err(|error| error.to_string())?;
        let pool = gst_video::VideoBufferPool::new();
        let mut config = pool.config();
        config.set_params(Some(&caps), size, 0, 0);
        pool.set_config(config).map_err(failed)?;
        pool.set_active(true).map_err(failed)?;
        Ok(Self {
            info,
            caps,
            pool: pool.upcast(),
        })
    }

    fn fits(&self, layout: &Layout, rate: u32) -> bool {
        let info = &self.info;
        (info.width(), info.height()) == (layout.width, layout.height)
            && info.format() == format(layout.format)
            && info.fps() == gst::Fraction::new(rate as i32, 1)
    }

    /// A buffer with a picture and its cursor.
    fn draw(&self, picture: &Picture) -> Result<gst::Buffer, Failure> {
        let ours = |error: gst::glib::BoolError| Failure::Ours(error.to_string());
        let mut buffer = self
            .pool
            .acquire_buffer(None)
            .map_err(|error| Failure::Ours(format!("no memory for a picture: {error}")))?;
        let mut frame =
            VideoFrameRef::from_buffer_ref_writable(buffer.make_mut(), &self.info).map_err(ours)?;
        let stride = frame.plane_stride()[0] as usize;
        let out = frame.plane_data_mut(0).map_err(ours)?;
        picture
            .pixels
            .copy_to(out, stride)
            .map_err(|error| match error {
                Error::Nonsense(_) => Failure::Qemu(error.to_string()),
                error => Failure::Ours(error.to_string()),
            })?;
        if let Some(layout) = picture.pixels.layout() {
            let size = (layout.width, layout.height);
            picture.cursor.draw(layout.format, size, out, stride);
        }
        drop(frame);
        Ok(buffer)
    }
}

impl Drop for Canvas {
    fn drop(&mut self) {
        // What is out comes back all the same. It fails for a pool that is not active.
        let _ = self.pool.set_active(false);
    }
}

/// GStreamer's name of a format; both are named by bytes in the order of addresses.
fn format(format: PixelFormat) -> VideoFormat {
    match format {
        PixelFormat::Bgrx => VideoFormat::Bgrx,
        PixelFormat::Rgbx => VideoFormat::Rgbx,
        PixelFormat::Xrgb => VideoFormat::Xrgb,
        PixelFormat::Xbgr => VideoFormat::Xbgr,
        PixelFormat::Bgr => VideoFormat::Bgr,
        PixelFormat::Rgb => VideoFormat::Rgb,
        PixelFormat::Rgb16 => VideoFormat::Rgb16,
        PixelFormat::Rgb15 => VideoFormat::Rgb15,
    }
}
