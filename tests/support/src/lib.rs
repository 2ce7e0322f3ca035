// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the tests of several crates share.

pub mod allocations;
pub mod desktop;
pub mod peer;
pub mod process;
pub mod split;
