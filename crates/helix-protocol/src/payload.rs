// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory for the large part of a message, used again for the next one.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Buffers kept for later use by one pool. A client with more frames than this in flight still
/// works; the surplus is freed and allocated again.
const KEPT: usize = 4;
/// Bytes kept by one pool, unless a single buffer has more: four frames of 32 MiB, which is BGRA
/// of 3840 x 2160 pixels.
const KEPT_BYTES: usize = 128 * 1024 * 1024;
/// Buffers up to this size are kept whatever comes next.
const LARGE: usize = 1024 * 1024;

/// The bulk bytes of one message: pixels or an access unit.
///
/// The memory goes back to the decoder that read it when the payload is dropped, from whichever
/// thread, so that a stream of frames allocates nothing once it flows.
pub struct Payload {
    bytes: Vec<u8>,
    len: usize,
    pool: Weak<Pool>,
}

impl Payload {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Payload {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            len: bytes.len(),
            bytes,
            pool: Weak::new(),
        }
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.len)
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.put(std::mem::take(&mut self.bytes));
        }
    }
}

/// Initialised buffers that wait for their next use.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    buffers: Vec<Vec<u8>>,
    /// No large ones are wanted: nothing was received since [`Pool::trim`].
    idle: bool,
}

impl Pool {
    fn put(&self, bytes: Vec<u8>) {
        let mut kept = self.kept();
        let held: usize = kept.buffers.iter().map(Vec::len).sum();
        let surplus = kept.buffers.len() >= KEPT
            || (held > 0 && held + bytes.len() > KEPT_BYTES)
            || (kept.idle && bytes.len() > LARGE);
        if surplus {
            // Freeing takes a system call: not under the lock.
            drop(kept);
            drop(bytes);
        } else {
            kept.buffers.push(bytes);
        }
    }

    /// A buffer for `total` bytes, perhaps a smaller one.
    fn take(&self, total: usize) -> Vec<u8> {
        let mut kept = self.kept();
        kept.idle = false;
        // When frames become much smaller, memory of the large ones goes back to the system.
        kept.buffers
            .retain(|bytes| bytes.len() <= LARGE || bytes.len() / 4 <= total);
        kept.buffers.pop().unwrap_or_default()
    }

    /// Frees the large buffers, and those in use as they come back, until the next is taken.
    pub fn trim(&self) {
        let mut kept = self.kept();
        kept.idle = true;
        kept.buffers.retain(|bytes| bytes.len() <= LARGE);
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A payload that is being received. It grows as bytes arrive: a peer that announces much and
/// sends little costs little.
#[derive(Debug)]
pub(crate) struct Filling {
    bytes: Vec<u8>,
    filled: usize,
    total: usize,
    pool: Arc<Pool>,
}

/// How far ahead of the received bytes a buffer grows at first; then it doubles.
const FIRST_GROWTH: usize = 64 * 1024;

impl Filling {
    pub fn new(total: usize, pool: &Arc<Pool>) -> Self {
        Self {
            bytes: pool.take(total),
            filled: 0,
            total,
            pool: pool.clone(),
        }
    }

    /// Bytes still to come.
    pub fn missing(&self) -> usize {
        self.total - self.filled
    }

    /// Where the next bytes belong; never empty while bytes are missing.
    pub fn space(&mut self) -> &mut [u8] {
        if self.filled == self.bytes.len() && self.missing() > 0 {
            let grown = self.total.min(FIRST_GROWTH.max(2 * self.filled));
            // A doubled capacity would exceed what the message can ever need.
            self.bytes.reserve_exact(grown - self.filled);
            self.bytes.resize(grown, 0);
        }
        let end = self.bytes.len().min(self.total);
        &mut self.bytes[self.filled..end]
    }

    /// Says that `count` bytes were put into [`Filling::space`].
    pub fn advance(&mut self, count: usize) {
        self.filled = (self.filled + count).min(self.total).min(self.bytes.len());
    }

    /// Copies as much of `input` as is missing, but at most `limit`; returns how much.
    pub fn append(&mut self, input: &[u8], limit: usize) -> usize {
        let wanted = input.len().min(limit).min(self.missing());
        let mut copied = 0;
        while copied < wanted {
            let space = self.space();
            let count = space.len().min(wanted - copied);
            space[..count].copy_from_slice(&input[copied..copied + count]);
            self.advance(count);
            copied += count;
        }
        copied
    }

    pub fn finish(self) -> Payload {
        Payload {
            bytes: self.bytes,
            len: self.filled,
            pool: Arc::downgrade(&self.pool),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn memory_comes_back_and_is_used_again() {
        let pool = Arc::new(Pool::default());
        let mut filling = Filling::new(100_000, &pool);
        while filling.missing() > 0 {
            let count = filling.space().len();
            filling.advance(count);
        }
        let payload = filling.finish();
        assert_eq!(payload.len(), 100_000);
        let address = payload.as_ptr();
        drop(payload);
        let mut again = Filling::new(1000, &pool);
        assert_eq!(again.space().len(), 1000);
        assert_eq!(again.space().as_ptr(), address);
    }

    #[test]
    fn an_announced_size_alone_allocates_little() {
        let mut filling = Filling::new(usize::MAX, &Arc::default());
        assert_eq!(filling.space().len(), FIRST_GROWTH);
    }

    #[test]
    fn a_pool_keeps_a_bounded_number_of_buffers() {
        let pool = Pool::default();
        for _ in 0..100 {
            pool.put(vec![0; 10]);
        }
        assert_eq!(pool.kept().buffers.len(), KEPT);
    }

    /// Receives a message of `size` bytes.
    fn receive(size: usize, pool: &Arc<Pool>) -> Payload {
        let mut filling = Filling::new(size, pool);
        while filling.missing() > 0 {
            let count = filling.space().len();
            filling.advance(count);
        }
        filling.finish()
    }

    #[test]
    fn a_stream_of_large_frames_allocates_nothing() {
        const FRAME: usize = 8 * 1024 * 1024;
        let pool = Arc::default();
        let mut in_flight: VecDeque<_> = (0..3).map(|_| receive(FRAME, &pool)).collect();
        let known: Vec<_> = in_flight.iter().map(|payload| payload.as_ptr()).collect();
        for _ in 0..10 {
            // Two are done before the next two come, and one is still in use.
            in_flight.drain(..2);
            for _ in 0..2 {
                let payload = receive(FRAME, &pool);
                assert!(known.contains(&payload.as_ptr()));
                in_flight.push_back(payload);
            }
        }
    }

    #[test]
    fn a_pool_keeps_a_bounded_number_of_bytes() {
        let pool = Pool::default();
        pool.put(vec![0; KEPT_BYTES + 1]);
        pool.put(vec![0; 10]);
        assert_eq!(pool.kept().buffers.len(), 1, "one is kept however large");
        let pool = Pool::default();
        for _ in 0..4 {
            pool.put(vec![0; KEPT_BYTES / 2]);
        }
        assert_eq!(pool.kept().buffers.len(), 2);
    }

    #[test]
    fn a_trimmed_pool_frees_what_it_has_and_what_comes_back_late() {
        let pool = Arc::default();
        let late = receive(2 * LARGE, &pool);
        drop((receive(2 * LARGE, &pool), receive(LARGE, &pool)));
        pool.trim();
        drop(late);
        let sizes = || -> Vec<_> { pool.kept().buffers.iter().map(Vec::len).collect() };
        assert!(sizes().iter().all(|size| *size <= LARGE), "{:?}", sizes());
        // The next stream keeps its memory again.
        drop(receive(2 * LARGE, &pool));
        assert!(sizes().contains(&(2 * LARGE)), "{:?}", sizes());
    }

    #[test]
    fn a_payload_outlives_its_pool() {
        let pool = Arc::new(Pool::default());
        let mut filling = Filling::new(3, &pool);
        assert_eq!(filling.append(b"abcdef", 10), 3);
        let payload = filling.finish();
        drop(pool);
        assert_eq!(&*payload, b"abc");
    }
}
