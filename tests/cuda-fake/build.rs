// SPDX-License-Identifier: MIT OR Apache-2.0

//! Gives the library libcuda's name for the dynamic linker: whoever asks for `libcuda.so.1` once this
//! is loaded gets this.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
}
