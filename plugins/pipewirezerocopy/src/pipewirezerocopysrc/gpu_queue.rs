// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the GPU was told to do once a fence is signalled, when nobody waits for that fence any more: it came
//! too late, or everything was stopped meanwhile. Whoever waits for the GPU then waits for the fence too, and
//! cannot be interrupted (L11).

use std::ops::{Deref, DerefMut};
use std::thread;
use std::time::Duration;

use zerocopy_plugin_common::wait::Waiter;

use super::dmabuf::until_none;
use crate::capture::dmabuf::Fence;

/// Every fence of the kernel's is signalled at some time: drivers end work that hangs after some seconds.
const LONGEST: Duration = Duration::from_mins(1);

/// What works on the GPU, in order, and may have been told to wait.
pub(super) struct GpuQueue<T: Send + 'static> {
    /// There until this is dropped.
    worker: Option<T>,
    /// What was left behind. Before the GPU is waited for, this must be.
    unfinished: Option<Fence>,
}

impl<T: Send + 'static> GpuQueue<T> {
    /// Nothing is queued yet.
    pub fn new(worker: T) -> Self {
        Self {
            worker: Some(worker),
            unfinished: None,
        }
    }

    /// The fence to wait for before the worker is told to do more.
    pub fn unfinished(&self) -> Option<&Fence> {
        let fence = self.unfinished.as_ref();
        fence.filter(|fence| fence.pending().is_some())
    }

    /// The worker was told to wait for a fence, and nobody waits for what it does then.
    pub fn leave_behind(&mut self, fence: Fence) {
        self.unfinished = Some(fence);
    }
}

impl<T: Send + 'static> Deref for GpuQueue<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.worker.as_ref().expect("it is there until the drop")
    }
}

impl<T: Send + 'static> DerefMut for GpuQueue<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.worker.as_mut().expect("it is there until the drop")
    }
}

impl<T: Send + 'static> Drop for GpuQueue<T> {
    /// Deleting what the GPU is still to draw into may wait for the GPU. Whoever stops a pipeline does not.
    fn drop(&mut self) {
        let (worker, fence) = (self.worker.take(), self.unfinished.take());
        let Some(fence) = fence.filter(|fence| fence.pending().is_some()) else {
            return;
        };
        let wait = move || {
            if let Ok(mut waiter) = Waiter::new() {
                // Whatever came of it: there is nothing else to be done.
                let _ = until_none(|| fence.pending(), &mut waiter, LONGEST);
            }
            drop(worker);
        };
        // Without a thread the closure, and the worker with it, is dropped here.
        let _ = thread::Builder::new().name("gpu-queue".into()).spawn(wait);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeWriter, Write};
    use std::os::fd::OwnedFd;
    use std::sync::mpsc::{self, RecvTimeoutError, Sender};

    use super::*;

    /// Tells when it is dropped.
    struct Worker(Sender<()>);

    impl Drop for Worker {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }

    /// A fence, and what signals it when it is written to.
    fn fence() -> (Fence, PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Fence::new(OwnedFd::from(reader)), writer)
    }

    #[test]
    fn what_was_left_behind_is_to_be_waited_for_until_it_is_signalled() {
        let (sender, _dropped) = mpsc::channel();
        let mut queue = GpuQueue::new(Worker(sender));
        assert!(queue.unfinished().is_none());
        let (fence, mut signal) = fence();
        queue.leave_behind(fence);
        assert!(queue.unfinished().is_some());
        signal.write_all(&[1]).unwrap();
        assert!(queue.unfinished().is_none());
    }

    #[test]
    fn who_drops_it_does_not_wait_for_the_fence_and_the_worker_is_dropped_after_it() {
        let (sender, dropped) = mpsc::channel();
        let mut queue = GpuQueue::new(Worker(sender));
        let (fence, mut signal) = fence();
        queue.leave_behind(fence);
        drop(queue);
        let short = Duration::from_millis(50);
        assert_eq!(dropped.recv_timeout(short), Err(RecvTimeoutError::Timeout));
        signal.write_all(&[1]).unwrap();
        // Generous: catches a hang.
        assert_eq!(dropped.recv_timeout(LONGEST), Ok(()));
    }

    #[test]
    fn a_worker_with_nothing_left_behind_is_dropped_at_once() {
        let (sender, dropped) = mpsc::channel();
        drop(GpuQueue::new(Worker(sender)));
        assert_eq!(dropped.try_recv(), Ok(()));
    }
}
