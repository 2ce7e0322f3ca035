// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory for the large part of a message, used again for the next one.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Buffers kept for later use by one pool. A client with more frames than this in flight still
/// works; the surplus is freed and allocated again.
const KEPT: usize = 4;

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
pub(crate) struct Pool(Mutex<Vec<Vec<u8>>>);

impl Pool {
    fn put(&self, bytes: Vec<u8>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(bytes);
        }
    }

    /// A buffer for `total` bytes, perhaps a smaller one.
    fn take(&self, total: usize) -> Vec<u8> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // When frames become much smaller, memory of the large ones goes back to the system.
        kept.retain(|bytes| bytes.len() <= LARGE || bytes.len() / 4 <= total);
        kept.pop().unwrap_or_default()
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

/// Buffers up to this size are kept whatever comes next.
const LARGE: usize = 1024 * 1024;

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
        assert_eq!(pool.0.lock().unwrap().len(), KEPT);
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
