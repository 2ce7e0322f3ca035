// SPDX-License-Identifier: MIT OR Apache-2.0

//! PipeWire's data loop, run by the loop thread.
//!
//! A producer wakes a consumer's data loop. By default that is a thread of its own, which does
//! nothing for a stream like ours but wake the thread with the main loop: a second wake-up for each
//! frame, which is most of what a frame costs. Since PipeWire 1.2 a context can be told to do
//! without, and runs everything in the main loop ([`NONE`]). Before, its thread is stopped, and
//! the loop thread runs the data loop, and in it the main loop when there is something to do.

use std::cell::Cell;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use libspa::support::system::IoFlags;
use pipewire::context::ContextRc;
use pipewire::loop_::{IoSource, Loop, LoopRc, Timeout};
use pipewire::sys as pw_sys;

/// The context's property that says how many data loops it has, and its value for none
/// (`pipewire.conf(5)`).
pub(super) const NONE: (&str, &str) = ("context.num-data-loops", "0");

/// A data loop without a thread of its own, and in it the main loop.
pub(super) struct DataLoop {
    // Valid as long as the context.
    looped: &'static Loop,
    /// The main loop has had something to do.
    busy: Rc<Cell<bool>>,
    _main: IoSource<'static, RawFd>,
    // Last: the above is its.
    _context: ContextRc,
}

impl DataLoop {
    /// Takes the context's data loop over; none where it has none.
    ///
    /// # Safety
    /// `main` must be entered whenever the result is iterated.
    pub unsafe fn take_over(context: &ContextRc, main: &LoopRc) -> io::Result<Option<Self>> {
        // SAFETY: The context is alive. What it returns is null or a data loop that lives as long.
        let data = unsafe { pw_sys::pw_context_get_data_loop(context.as_raw_ptr()) };
        if data.is_null() {
            return Ok(None);
        }
        // SAFETY: As above. `Loop` is a transparent wrapper of what the data loop has, which lives
        // as long as the context, and that lives as long as the result.
        let looped: &'static Loop = unsafe { &*pw_sys::pw_data_loop_get_loop(data).cast() };
        stop(data, looped)?;
        let fd = main.fd().as_raw_fd();
        let main = main.clone();
        let busy = Rc::new(Cell::new(false));
        let noted = busy.clone();
        let main = looped.add_io(fd, IoFlags::IN, move |_| {
            noted.set(true);
            // SAFETY: By the contract above.
            unsafe { main.iterate_unguarded(Timeout::None) };
        });
        // SAFETY: Paired with the leave in `drop`; both are called by the thread that has `main`.
        unsafe { looped.enter() };
        Ok(Some(Self {
            looped,
            busy,
            _main: main,
            _context: context.clone(),
        }))
    }

    /// Waits for something to do in either loop, and does it. False where there was nothing in the main
    /// loop, from which all comes but frames.
    pub fn iterate(&self, timeout: Timeout) -> bool {
        // SAFETY: Entered by `take_over`, and left after this.
        unsafe { self.looped.iterate_unguarded(timeout) };
        self.busy.take()
    }
}

impl Drop for DataLoop {
    fn drop(&mut self) {
        // SAFETY: Paired with the enter in `take_over`.
        unsafe { self.looped.leave() };
    }
}

/// Ends the thread of a data loop, and waits for that.
///
/// libpipewire tells the thread by the loop, and wakes it only where it sees that it has begun to
/// run that. A thread that begins just then would sleep for ever, so it is kept awake.
fn stop(data: *mut pw_sys::pw_data_loop, looped: &Loop) -> io::Result<()> {
    let (readable, mut writer) = io::pipe()?;
    writer.write_all(&[0])?;
    let _awake = looped.add_io(readable, IoFlags::IN, |_| {});
    // SAFETY: The caller's data loop is alive. Nobody else starts or stops it.
    unsafe { pw_sys::pw_data_loop_stop(data) };
    Ok(())
}
