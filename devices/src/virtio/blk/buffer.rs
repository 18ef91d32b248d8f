//! The VMM's own buffers for the host's I/O.
//!
//! A guest's pages are never handed to the host: its I/O may end after a reset or a take-over, and
//! every write to guest memory must pass the bitmap. Buffers begin at a page, as O_DIRECT wants.

use std::sync::{Mutex, PoisonError};

/// What O_DIRECT needs at most of an address.
const ALIGN_BYTES: usize = 4096;
/// Powers of two of pages: 4 KiB to 1 MiB.
const CLASSES: usize = 9;
/// The largest buffer.
pub(super) const BUFFER_BYTES_MAX: usize = ALIGN_BYTES << (CLASSES - 1);
/// Most bytes kept for later in each size.
const IDLE_BYTES_MAX: usize = 2 << 20;

/// A buffer that begins at a page boundary.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
    class: usize,
}

impl Buffer {
    fn new(class: usize) -> Self {
        let bytes = vec![0; (ALIGN_BYTES << class) + ALIGN_BYTES];
        // An address that cannot be aligned is used as it is; O_DIRECT would then say so.
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES).min(ALIGN_BYTES);
        Self { bytes, start, len: 0, class }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Buffers that were used and will be again. What they contain is left from other requests of the
/// same disk, so a buffer is written in full before it is read.
#[derive(Debug, Default)]
pub(super) struct BufferPool {
    idle: Mutex<[Vec<Buffer>; CLASSES]>,
}

/// The size whose buffers hold `len` bytes, at most the largest.
fn class_of(len: usize) -> usize {
    (0..CLASSES - 1).find(|class| ALIGN_BYTES << class >= len).unwrap_or(CLASSES - 1)
}

/// What a buffer of `len` bytes takes.
pub(super) fn cost_bytes(len: usize) -> usize {
    ALIGN_BYTES << class_of(len)
}

impl BufferPool {
    /// A buffer of `len` bytes, at most [`BUFFER_BYTES_MAX`].
    pub(super) fn take(&self, len: usize) -> Buffer {
        let class = class_of(len);
        let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner)[class].pop();
        let mut buffer = kept.unwrap_or_else(|| Buffer::new(class));
        buffer.len = len.min(BUFFER_BYTES_MAX);
        buffer
    }

    /// Gives a buffer back.
    pub(super) fn give(&self, buffer: Buffer) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let list = &mut idle[buffer.class];
        if !buffer.bytes.is_empty() && list.len() < IDLE_BYTES_MAX >> (12 + buffer.class) {
            list.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_begin_at_a_page_and_are_used_again() {
        let pool = BufferPool::default();
        for len in [1, 512, 4096, 4097, 100_000, BUFFER_BYTES_MAX] {
            let mut buffer = pool.take(len);
            assert_eq!(buffer.bytes().len(), len);
            assert_eq!(buffer.bytes().as_ptr().align_offset(ALIGN_BYTES), 0);
            assert!(cost_bytes(len) >= len && cost_bytes(len) < 2 * len.max(ALIGN_BYTES));
            buffer.bytes_mut().fill(7);
            let at = buffer.bytes().as_ptr();
            pool.give(buffer);
            assert_eq!(pool.take(len).bytes().as_ptr(), at);
        }
        for _ in 0..10 {
            let many: Vec<_> = (0..10).map(|_| pool.take(BUFFER_BYTES_MAX)).collect();
            many.into_iter().for_each(|buffer| pool.give(buffer));
        }
        let kept = pool.idle.lock().unwrap()[CLASSES - 1].len();
        assert_eq!(kept * BUFFER_BYTES_MAX, IDLE_BYTES_MAX);
    }
}
