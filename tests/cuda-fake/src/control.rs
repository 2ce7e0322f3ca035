// SPDX-License-Identifier: MIT OR Apache-2.0

//! The test's side: loads the library and steers it, through functions of its own.

use std::ffi::{CString, c_char, c_int};
use std::path::PathBuf;

use crate::gl::WithGl;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// The library, loaded in libcuda's place.
pub struct Fake {
    library: Library,
}

/// What was made and not given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Alive {
    /// Contexts.
    pub contexts: usize,
    /// Streams.
    pub streams: usize,
    /// Events.
    pub events: usize,
    /// Pieces of memory.
    pub memories: usize,
    /// Registered images and textures.
    pub resources: usize,
}

impl Fake {
    /// Loads the library that cargo has built beside the test. From then on `libcuda.so.1` is this
    /// one, for the whole process: the dynamic linker knows it by that name.
    pub fn load() -> Self {
        let program = std::env::current_exe().expect("a test is a program");
        let path: PathBuf = program.with_file_name("libzerocopy_cuda_fake.so");
        // SAFETY: it is this crate, whose initialisers do nothing.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { library }
    }

    /// Lets an `EGLImage` show these bytes, `pitch` of them in a row. They stay where they are.
    pub fn set_image(
        &self,
        image: usize,
        bytes: &'static [u8],
        pitch: usize,
        bytes_per_pixel: u32,
    ) {
        // SAFETY: the type is that of the function in `driver`.
        unsafe {
            let set = self
                .library
                .get::<unsafe extern "C" fn(usize, *const u8, usize, usize, u32)>(
                    b"fake_set_image\0",
                )
                .expect("it is there");
            set(image, bytes.as_ptr(), bytes.len(), pitch, bytes_per_pixel);
        }
    }

    /// Lets the library look at EGL images of a display with a GL context of it: `with_gl` makes one
    /// current, calls its first argument with the second, and ends. Pixels of four bytes begin with
    /// blue, or with red. Without it, images that were not set are refused.
    pub fn lend_gl(&self, with_gl: Option<WithGl>, blue_first: bool) {
        // SAFETY: the type is that of the function in `driver`.
        unsafe {
            let lend = self
                .library
                .get::<unsafe extern "C" fn(Option<WithGl>, bool)>(b"fake_lend_gl\0")
                .expect("it is there");
            lend(with_gl, blue_first);
        }
    }

    /// Lets the call of this name fail with a `CUresult` after it has worked `after` times more; 0
    /// as the code lets it work again.
    pub fn fail(&self, call: &str, after: u32, code: c_int) {
        let call = CString::new(call).expect("a name");
        // SAFETY: the type is that of the function in `driver`.
        unsafe {
            let fail = self
                .library
                .get::<unsafe extern "C" fn(*const c_char, u32, c_int)>(b"fake_fail\0")
                .expect("it is there");
            fail(call.as_ptr(), after, code);
        }
    }

    /// Lets there be one device for each of these PCI addresses, in this order.
    pub fn set_devices(&self, addresses: &[&str]) {
        let addresses = CString::new(addresses.join(",")).expect("addresses");
        // SAFETY: the type is that of the function in `driver`.
        unsafe {
            let set = self
                .library
                .get::<unsafe extern "C" fn(*const c_char)>(b"fake_set_devices\0")
                .expect("it is there");
            set(addresses.as_ptr());
        }
    }

    /// How many contexts are alive on the device of this number.
    pub fn contexts_on(&self, device: c_int) -> usize {
        // SAFETY: the type is that of the function in `driver`.
        unsafe {
            let count = self
                .library
                .get::<unsafe extern "C" fn(c_int) -> usize>(b"fake_contexts_on\0")
                .expect("it is there");
            count(device)
        }
    }

    /// What is alive now.
    pub fn alive(&self) -> Alive {
        let mut alive = Alive::default();
        // SAFETY: the type is that of the function in `driver`.
        unsafe {
            let count = self
                .library
                .get::<unsafe extern "C" fn(*mut Alive)>(b"fake_alive\0")
                .expect("it is there");
            count(&raw mut alive);
        }
        alive
    }

    /// The calls since the last time, in their order.
    pub fn calls(&self) -> Vec<String> {
        let mut text = vec![0_u8; 1 << 20];
        // SAFETY: the type is that of the function in `driver`, and there is as much room.
        let length = unsafe {
            let take = self
                .library
                .get::<unsafe extern "C" fn(*mut u8, usize) -> usize>(b"fake_take_calls\0")
                .expect("it is there");
            take(text.as_mut_ptr(), text.len())
        };
        text.truncate(length);
        let text = String::from_utf8(text).expect("names");
        text.split_whitespace().map(str::to_owned).collect()
    }
}
