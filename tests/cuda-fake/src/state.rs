// SPDX-License-Identifier: MIT OR Apache-2.0

//! What there is, in one place behind one lock.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::env;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use crate::gl::{self, WithGl};

/// `CUresult`
pub type Code = i32;
pub const SUCCESS: Code = 0;
pub const INVALID_VALUE: Code = 1;
pub const INVALID_DEVICE: Code = 101;
pub const INVALID_CONTEXT: Code = 201;
pub const INVALID_HANDLE: Code = 400;
pub const NOT_SUPPORTED: Code = 801;

/// Pixels that somebody else has, in rows.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    pub start: usize,
    pub length: usize,
    pub pitch: usize,
    pub bytes_per_pixel: u32,
}

/// A registered image or texture.
#[derive(Clone, Debug)]
pub enum Resource {
    /// Of which the test has said where its bytes are.
    Image(Rows),
    /// Which GL shows, with its pixels as they were at the last copy.
    Shown(usize, Rows, Box<[u8]>),
    /// The pixels are there while it is mapped.
    Texture(u32, Option<Box<[u8]>>, Rows),
}

/// `CUDA_MEMCPY2D`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Memcpy2d {
    pub src_x: usize,
    pub src_y: usize,
    pub src_type: u32,
    pub src_host: usize,
    pub src_device: usize,
    pub src_array: usize,
    pub src_pitch: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_type: u32,
    pub dst_host: usize,
    pub dst_device: usize,
    pub dst_array: usize,
    pub dst_pitch: usize,
    pub width: usize,
    pub height: usize,
}

const ARRAY: u32 = 3;
const HOST: u32 = 1;

/// The PCI addresses of the devices, for programs that are not tests; separated by commas.
const DEVICES: &str = "ZEROCOPY_CUDA_FAKE_DEVICES";

#[derive(Default)]
pub struct State {
    /// PCI addresses.
    pub devices: Vec<String>,
    /// The devices that they are on.
    pub contexts: HashMap<usize, i32>,
    pub streams: HashSet<usize>,
    /// The stream in which each was recorded.
    pub events: HashMap<usize, usize>,
    /// Address and bytes.
    pub memories: HashMap<usize, usize>,
    pub images: HashMap<usize, Rows>,
    /// By which the pixels of other images are had.
    pub with_gl: Option<WithGl>,
    /// Pixels of four bytes begin with blue.
    pub blue_first: bool,
    pub resources: HashMap<usize, Resource>,
    /// Arrays are numbers here; these are their pixels.
    pub arrays: HashMap<usize, Rows>,
    /// Copies that nobody has waited for yet, with their streams.
    pub queued: Vec<(usize, Memcpy2d)>,
    pub calls: Vec<&'static str>,
    pub failures: HashMap<String, (u32, Code)>,
    last: usize,
}

impl State {
    fn new() -> Self {
        let said = env::var(DEVICES).unwrap_or_else(|_| "0000:65:00.0,0000:66:00.0".into());
        Self {
            devices: said.split(',').map(str::to_owned).collect(),
            ..Self::default()
        }
    }

    /// Whether there is such a device.
    pub fn has_device(&self, number: i32) -> Result<(), Code> {
        let known = usize::try_from(number).is_ok_and(|number| number < self.devices.len());
        known.then_some(()).ok_or(INVALID_DEVICE)
    }

    /// A handle that was never used.
    pub fn handle(&mut self) -> usize {
        self.last += 16;
        self.last
    }

    /// Notes a call, and says how it is to fail, if it is.
    pub fn note(&mut self, call: &'static str) -> Result<(), Code> {
        self.calls.push(call);
        match self.failures.get_mut(call) {
            None | Some((_, SUCCESS)) => Ok(()),
            Some((0, code)) => Err(*code),
            Some((after, _)) => {
                *after -= 1;
                Ok(())
            }
        }
    }

    /// Does what was queued in a stream.
    pub fn finish(&mut self, stream: usize) -> Result<(), Code> {
        let (now, later) = self
            .queued
            .drain(..)
            .partition::<Vec<_>, _>(|(of, _)| *of == stream);
        self.queued = later;
        for (_, copy) in &now {
            self.look_at(copy.src_array)?;
        }
        now.iter().try_for_each(|(_, copy)| self.copy(copy))
    }

    /// Takes what an image shows now, if it is one of those that GL shows.
    fn look_at(&mut self, array: usize) -> Result<(), Code> {
        let (with_gl, blue_first) = (self.with_gl, self.blue_first);
        if let Some(Resource::Shown(image, rows, pixels)) = self.resources.get_mut(&array) {
            let with_gl = with_gl.ok_or(NOT_SUPPORTED)?;
            let read = gl::with_image(with_gl, *image, |texture| gl::read(texture, *rows));
            *pixels = read.ok_or(NOT_SUPPORTED)?;
            if blue_first && rows.bytes_per_pixel == 4 {
                pixels
                    .chunks_exact_mut(4)
                    .for_each(|pixel| pixel.swap(0, 2));
            }
            let start = pixels.as_ptr() as usize;
            self.arrays.insert(array, Rows { start, ..*rows });
        }
        Ok(())
    }

    /// Copies, if both sides have that much.
    pub fn copy(&self, copy: &Memcpy2d) -> Result<(), Code> {
        // The address of the first row, the pitch, and how much is there, if that is known.
        type Side = Result<(usize, usize, Option<usize>), Code>;
        let side = |kind, host, device, array, pitch| -> Side {
            match kind {
                HOST => Ok((host, pitch, None)),
                ARRAY => {
                    let rows: &Rows = self.arrays.get(&array).ok_or(INVALID_HANDLE)?;
                    Ok((rows.start, rows.pitch, Some(rows.length)))
                }
                _ => {
                    let start = self
                        .memories
                        .iter()
                        .find(|&(&start, &length)| start <= device && device < start + length);
                    let image = self.images.values().find(|rows| rows.start == device);
                    let room = start
                        .map(|(start, length)| start + length - device)
                        .or(image.map(|rows| rows.length));
                    Ok((device, pitch, Some(room.ok_or(INVALID_VALUE)?)))
                }
            }
        };
        let (from, from_pitch, from_room) = side(
            copy.src_type,
            copy.src_host,
            copy.src_device,
            copy.src_array,
            copy.src_pitch,
        )?;
        let (to, to_pitch, to_room) = side(
            copy.dst_type,
            copy.dst_host,
            copy.dst_device,
            copy.dst_array,
            copy.dst_pitch,
        )?;
        let from_start = copy.src_y * from_pitch + copy.src_x;
        let to_start = copy.dst_y * to_pitch + copy.dst_x;
        let needs =
            |start: usize, pitch: usize| start + copy.height.saturating_sub(1) * pitch + copy.width;
        let fits = |room: Option<usize>, needed| room.is_none_or(|room| needed <= room);
        if !fits(from_room, needs(from_start, from_pitch))
            || !fits(to_room, needs(to_start, to_pitch))
        {
            return Err(INVALID_VALUE);
        }
        for row in 0..copy.height {
            // SAFETY: both sides have as many bytes, as far as it is known; host memory is the
            // caller's word, as with the real one.
            unsafe {
                std::ptr::copy(
                    (from + from_start + row * from_pitch) as *const u8,
                    (to + to_start + row * to_pitch) as *mut u8,
                    copy.width,
                );
            }
        }
        Ok(())
    }
}

pub fn state() -> MutexGuard<'static, State> {
    static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| Mutex::new(State::new()));
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// The contexts that are current on this thread, the innermost last.
    pub static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Whether a call that needs a context has one.
pub fn has_context() -> Result<(), Code> {
    let current = CURRENT.with_borrow(|stack| stack.last().copied());
    current
        .filter(|context| state().contexts.contains_key(context))
        .map(drop)
        .ok_or(INVALID_CONTEXT)
}
