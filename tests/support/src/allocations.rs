// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the Rust code of a test program asks of its allocator. What the system says of the process
//! (process.rs) does not tell of memory that is taken and never written to.
//!
//! ```text
//! #[global_allocator]
//! static ALLOCATOR: Counting = Counting;
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static LARGEST: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted over all threads.
pub struct Counting;

/// Bytes of the largest single request so far.
pub fn largest_request() -> usize {
    LARGEST.load(Ordering::Relaxed)
}

/// Bytes that were in use at most at one time.
pub fn most_in_use() -> usize {
    PEAK.load(Ordering::Relaxed)
}

fn grew(by: usize) {
    LARGEST.fetch_max(by, Ordering::Relaxed);
    let live = LIVE.fetch_add(by, Ordering::Relaxed) + by;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

fn shrank(by: usize) {
    LIVE.fetch_sub(by, Ordering::Relaxed);
}

// SAFETY: every call goes on to the system's allocator unchanged; the counters are atomics, which
// touch no memory that is handed out and allocate none.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grew(layout.size());
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grew(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        shrank(layout.size());
        // SAFETY: `ptr` came from `System` through this allocator.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // The old block may be there until the new one is filled.
        grew(new_size);
        // SAFETY: `ptr` came from `System` through this allocator.
        let new = unsafe { System.realloc(ptr, layout, new_size) };
        shrank(layout.size());
        new
    }
}
