// SPDX-License-Identifier: MIT OR Apache-2.0

//! Counts, from outside, what a program does: `LD_PRELOAD=libzerocopy_counter.so PROGRAM`.
//!
//! The dynamic linker resolves `malloc`, `memcpy`, `sendmsg` and the like to the functions here,
//! for the program and for every library in it; each counts and calls the C library's own. The
//! program reads a count with the function `zerocopy_count`, which it finds with `dlsym`.
//!
//! Not seen are copies that a compiler inlined (of small, constant size, or a loop over elements),
//! those that the C library makes inside itself, and system calls made without the C library's
//! functions. A copy of a picture's rows has a size known only at run time: compilers make a call
//! of `memcpy` of it, unless it is written by hand with vector instructions.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::transmute;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use libc::{epoll_event, iovec, msghdr, size_t, ssize_t};

/// Allocations of so many bytes grow with the frame: 64 KiB is a picture of 128x128 BGRA.
const LARGE_ALLOCATION: usize = 64 * 1024;
/// Copies of so many bytes are no structures any more.
const LARGE_COPY: usize = 4096;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static ALLOCATED_BYTES: AtomicU64 = AtomicU64::new(0);
static LARGE_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static COPIES: AtomicU64 = AtomicU64::new(0);
static COPIED_BYTES: AtomicU64 = AtomicU64::new(0);
static LARGE_COPIES: AtomicU64 = AtomicU64::new(0);
static SENDS: AtomicU64 = AtomicU64::new(0);
static RECEIVES: AtomicU64 = AtomicU64::new(0);
static WAITS: AtomicU64 = AtomicU64::new(0);
static WRITES: AtomicU64 = AtomicU64::new(0);

/// The count of that name since the program began; `u64::MAX` where there is none.
///
/// # Safety
/// `name` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn zerocopy_count(name: *const c_char) -> u64 {
    // SAFETY: the caller's promise.
    let counter = match unsafe { CStr::from_ptr(name) }.to_bytes() {
        b"allocations" => &ALLOCATIONS,
        b"allocated_bytes" => &ALLOCATED_BYTES,
        b"large_allocations" => &LARGE_ALLOCATIONS,
        b"copies" => &COPIES,
        b"copied_bytes" => &COPIED_BYTES,
        b"large_copies" => &LARGE_COPIES,
        b"sends" => &SENDS,
        b"receives" => &RECEIVES,
        b"waits" => &WAITS,
        b"writes" => &WRITES,
        _ => return u64::MAX,
    };
    counter.load(Ordering::Relaxed)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn count_allocation(size: usize) {
    count(&ALLOCATIONS);
    ALLOCATED_BYTES.fetch_add(size as u64, Ordering::Relaxed);
    if size >= LARGE_ALLOCATION {
        count(&LARGE_ALLOCATIONS);
    }
}

fn count_copy(size: usize) {
    count(&COPIES);
    COPIED_BYTES.fetch_add(size as u64, Ordering::Relaxed);
    if size >= LARGE_COPY {
        count(&LARGE_COPIES);
    }
}

// glibc's own names for its allocator: they need no dlsym(), which may itself allocate.
unsafe extern "C" {
    fn __libc_malloc(size: size_t) -> *mut c_void;
    fn __libc_calloc(count: size_t, size: size_t) -> *mut c_void;
    fn __libc_realloc(old: *mut c_void, size: size_t) -> *mut c_void;
    fn __libc_memalign(alignment: size_t, size: size_t) -> *mut c_void;
}

/// # Safety
/// As malloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc(size: size_t) -> *mut c_void {
    count_allocation(size);
    // SAFETY: the caller's arguments, unchanged.
    unsafe { __libc_malloc(size) }
}

/// # Safety
/// As calloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn calloc(number: size_t, size: size_t) -> *mut c_void {
    count_allocation(number.saturating_mul(size));
    // SAFETY: the caller's arguments, unchanged.
    unsafe { __libc_calloc(number, size) }
}

/// # Safety
/// As realloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(old: *mut c_void, size: size_t) -> *mut c_void {
    count_allocation(size);
    // SAFETY: the caller's arguments, unchanged.
    unsafe { __libc_realloc(old, size) }
}

/// # Safety
/// As aligned_alloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aligned_alloc(alignment: size_t, size: size_t) -> *mut c_void {
    count_allocation(size);
    // SAFETY: the caller's arguments; glibc's aligned_alloc() is its memalign().
    unsafe { __libc_memalign(alignment, size) }
}

/// # Safety
/// As posix_memalign(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(
    out: *mut *mut c_void,
    alignment: size_t,
    size: size_t,
) -> c_int {
    if !alignment.is_power_of_two() || alignment < size_of::<*mut c_void>() {
        return libc::EINVAL;
    }
    count_allocation(size);
    // SAFETY: the alignment is valid.
    let memory = unsafe { __libc_memalign(alignment, size) };
    if memory.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: `out` is the caller's place for the result.
    unsafe { out.write(memory) };
    0
}

/// The C library's function of a name, looked up once.
struct Real(AtomicPtr<c_void>, &'static CStr);

impl Real {
    const fn new(name: &'static CStr) -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()), name)
    }

    fn get(&self) -> *mut c_void {
        let known = self.0.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name is a C string.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.1.as_ptr()) };
        if found.is_null() {
            // SAFETY: abort() has no conditions. There is nothing to call, and nobody to tell.
            unsafe { libc::abort() };
        }
        self.0.store(found, Ordering::Relaxed);
        found
    }
}

/// The same signature for memcpy() and memmove().
type Copy = unsafe extern "C" fn(*mut c_void, *const c_void, size_t) -> *mut c_void;

// A lookup calls memcpy() in turn: these are looked up before anything else runs, and until then
// copies are made by hand.
static MEMCPY: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
static MEMMOVE: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_UP: extern "C" fn() = look_up;

extern "C" fn look_up() {
    for (place, name) in [(&MEMCPY, c"memcpy"), (&MEMMOVE, c"memmove")] {
        // SAFETY: the name is a C string.
        place.store(
            unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) },
            Ordering::Relaxed,
        );
    }
}

/// # Safety
/// `to` and `from` are `size` bytes each; they may overlap where `real` says so.
unsafe fn copy(
    real: &AtomicPtr<c_void>,
    to: *mut c_void,
    from: *const c_void,
    size: usize,
) -> *mut c_void {
    count_copy(size);
    let real = real.load(Ordering::Relaxed);
    if !real.is_null() {
        // SAFETY: it is the function of that name, called with the caller's arguments.
        return unsafe { transmute::<*mut c_void, Copy>(real)(to, from, size) };
    }
    let (to_bytes, from_bytes) = (to.cast::<u8>(), from.cast::<u8>());
    let backwards = to.addr() > from.addr();
    for index in 0..size {
        let at = if backwards { size - 1 - index } else { index };
        // SAFETY: inside what the caller gave. Volatile, or a compiler would call memcpy() here.
        unsafe {
            to_bytes
                .add(at)
                .write_volatile(from_bytes.add(at).read_volatile());
        }
    }
    to
}

/// # Safety
/// As memcpy(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut c_void, from: *const c_void, n: size_t) -> *mut c_void {
    // SAFETY: the caller's promises.
    unsafe { copy(&MEMCPY, to, from, n) }
}

/// # Safety
/// As memmove(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut c_void, from: *const c_void, n: size_t) -> *mut c_void {
    // SAFETY: the caller's promises.
    unsafe { copy(&MEMMOVE, to, from, n) }
}

/// What programs built with _FORTIFY_SOURCE call.
///
/// # Safety
/// As memcpy(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __memcpy_chk(
    to: *mut c_void,
    from: *const c_void,
    n: size_t,
    _room: size_t,
) -> *mut c_void {
    // SAFETY: the caller's promises.
    unsafe { copy(&MEMCPY, to, from, n) }
}

/// What programs built with _FORTIFY_SOURCE call.
///
/// # Safety
/// As memmove(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __memmove_chk(
    to: *mut c_void,
    from: *const c_void,
    n: size_t,
    _room: size_t,
) -> *mut c_void {
    // SAFETY: the caller's promises.
    unsafe { copy(&MEMMOVE, to, from, n) }
}

/// A function of the C library that counts and is otherwise what it was.
macro_rules! counted {
    ($counter:ident: $($name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {$(
        /// # Safety
        /// As the C library's function of that name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $result {
            const NAME: &CStr = match CStr::from_bytes_with_nul(
                concat!(stringify!($name), "\0").as_bytes(),
            ) {
                Ok(name) => name,
                Err(_) => panic!("not a C string"),
            };
            static REAL: Real = Real::new(NAME);
            count(&$counter);
            // SAFETY: it is the function of that name and signature, called with the caller's
            // arguments.
            unsafe {
                transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> $result>(REAL.get())(
                    $($arg),*
                )
            }
        }
    )*};
}

counted! { SENDS:
    sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t;
    send(fd: c_int, bytes: *const c_void, n: size_t, flags: c_int) -> ssize_t;
    writev(fd: c_int, slices: *const iovec, n: c_int) -> ssize_t;
}

counted! { RECEIVES:
    recv(fd: c_int, bytes: *mut c_void, n: size_t, flags: c_int) -> ssize_t;
    recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t;
}

counted! { WRITES:
    write(fd: c_int, bytes: *const c_void, n: size_t) -> ssize_t;
}

counted! { WAITS:
    epoll_wait(fd: c_int, events: *mut epoll_event, n: c_int, timeout: c_int) -> c_int;
    poll(fds: *mut libc::pollfd, n: libc::nfds_t, timeout: c_int) -> c_int;
}
