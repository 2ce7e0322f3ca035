// SPDX-License-Identifier: MIT OR Apache-2.0

//! A libcuda without a GPU. Its memory is the process's own, so that what a test copied can be looked
//! at; its streams do what was queued only when somebody waits for them, so that who does not wait
//! gets old bytes; each call is noted and can be made to fail; and what was made and not given back
//! is counted.
//!
//! It has the functions that libgstcuda's loader asks for (gstcudaloader.cpp of GStreamer 1.24 to
//! 1.28) and those of EGL and GL interoperation; most of the former only say that they cannot.
//!
//! A test calls [`Fake::load`] before anything else: see there.

mod control;
mod driver;
mod gl;
mod state;

pub use control::{Alive, Fake};
pub use gl::WithGl;
