//! Counting in a ring of bytes that one end writes and the other reads: pure, for both ends.
//!
//! ```text
//!            read            written              the writer may go on to here
//!   ... -------|================|----------------------| (one ring further than `read`)
//!              '-- unread ------'-- room --------------'
//! ```
//!
//! All counts are of bytes since the beginning; a place in the ring is a count modulo its size. A
//! *chunk* is what one write announces. The reader has a receive posted for each chunk that the writer
//! may have under way, so there are at most as many as both sides agreed on that it has not said to be free.

use std::collections::VecDeque;

/// Bytes of a ring: some frames of pages, so that either end can be late.
pub(super) const RING_BYTES: usize = 4 << 20;
/// A reader says what is free after this part of a ring, or of the chunks.
const CREDIT_PART: usize = 4;

/// The writer's count.
#[derive(Debug)]
pub(super) struct Outgoing {
    size: u64,
    written: u64,
    /// What the reader has read.
    read: u64,
    /// Ends of the chunks that are not read.
    chunks: VecDeque<u64>,
    chunks_max: usize,
}

/// Where bytes go: one stretch, or two around the ring's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) offset: usize,
    pub(super) len: usize,
}

fn stretches(size: u64, from: u64, len: usize) -> [Stretch; 2] {
    let place = usize::try_from(from % size).unwrap_or(0);
    let size = usize::try_from(size).unwrap_or(0);
    let first = len.min(size - place);
    [Stretch { offset: place, len: first }, Stretch { offset: 0, len: len - first }]
}

impl Outgoing {
    /// Of a ring of `size` bytes, and for so many chunks under way.
    pub(super) fn new(size: usize, chunks_max: usize) -> Self {
        Self { size: size as u64, written: 0, read: 0, chunks: VecDeque::new(), chunks_max }
    }

    /// Bytes that may be written now.
    pub(super) fn room(&self) -> usize {
        if self.chunks.len() >= self.chunks_max {
            return 0;
        }
        usize::try_from(self.size - (self.written - self.read)).unwrap_or(0)
    }

    /// Chunks that may be written now.
    pub(super) fn chunks_left(&self) -> usize {
        self.chunks_max.saturating_sub(self.chunks.len())
    }

    /// Bytes, and chunks, that may be written at some time whatever the reader has not said yet.
    pub(super) fn room_for_sure(&self) -> (usize, usize) {
        let part = |whole: usize| whole - whole / CREDIT_PART;
        (part(usize::try_from(self.size).unwrap_or(0)), part(self.chunks_max))
    }

    /// Where the next chunk begins.
    pub(super) fn place(&self) -> usize {
        usize::try_from(self.written % self.size).unwrap_or(0)
    }

    /// A chunk of `len` bytes is on its way; where it goes.
    ///
    /// # Panics
    /// If there is no room for it.
    pub(super) fn write(&mut self, len: usize) -> [Stretch; 2] {
        assert!(len > 0 && len <= self.room(), "{len} bytes do not fit");
        let at = stretches(self.size, self.written, len);
        self.written += len as u64;
        self.chunks.push_back(self.written);
        at
    }

    /// The reader says how much it has read in all; `false` if that makes no sense.
    pub(super) fn credit(&mut self, read: u64) -> bool {
        if read < self.read || read > self.written {
            return false;
        }
        self.read = read;
        while self.chunks.front().is_some_and(|end| *end <= read) {
            self.chunks.pop_front();
        }
        true
    }
}

/// The reader's count.
#[derive(Debug)]
pub(super) struct Incoming {
    size: u64,
    written: u64,
    read: u64,
    /// What the writer was told last.
    told: u64,
    /// Ends of the chunks that are not read, and how many were read since the writer was told: those
    /// that it waits for may have come long before.
    chunks: VecDeque<u64>,
    freed: usize,
    chunks_max: usize,
}

impl Incoming {
    /// Of a ring of `size` bytes, and for so many chunks under way.
    pub(super) fn new(size: usize, chunks_max: usize) -> Self {
        let (size, chunks) = (size as u64, VecDeque::new());
        Self { size, written: 0, read: 0, told: 0, chunks, freed: 0, chunks_max }
    }

    /// Bytes that are here and not read.
    pub(super) fn unread(&self) -> usize {
        usize::try_from(self.written - self.read).unwrap_or(0)
    }

    /// A chunk came; `false` if nobody who counts could have sent it.
    pub(super) fn arrived(&mut self, len: u32) -> bool {
        let written = self.written + u64::from(len);
        if len == 0 || written - self.told > self.size || self.chunks.len() >= self.chunks_max {
            return false;
        }
        self.written = written;
        self.chunks.push_back(written);
        true
    }

    /// Takes up to `len` bytes; where they are.
    pub(super) fn read(&mut self, len: usize) -> Stretch {
        let [first, _] = stretches(self.size, self.read, len.min(self.unread()));
        self.read += first.len as u64;
        while self.chunks.front().is_some_and(|end| *end <= self.read) {
            self.chunks.pop_front();
            self.freed += 1;
        }
        first
    }

    /// What the writer is to be told now, if it is time. Not earlier: a word costs a packet.
    pub(super) fn credit(&mut self) -> Option<u64> {
        let bytes = self.read - self.told >= self.size / CREDIT_PART as u64;
        let chunks = self.freed >= (self.chunks_max / CREDIT_PART).max(1);
        (bytes || chunks).then(|| {
            self.told = self.read;
            self.freed = 0;
            self.read
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHUNKS: usize = 64;

    #[test]
    fn a_ring_wraps_and_fills() {
        let mut ring = Outgoing::new(10, CHUNKS);
        let whole = |at: [Stretch; 2]| at.map(|at| (at.offset, at.len));
        assert_eq!(whole(ring.write(7)), [(0, 7), (0, 0)]);
        assert_eq!(ring.room(), 3);
        assert!(!ring.credit(8), "more than was written");
        assert!(ring.credit(5) && ring.room() == 8);
        assert_eq!(whole(ring.write(8)), [(7, 3), (0, 5)]);
        assert_eq!(ring.room(), 0);
        assert!(!ring.credit(4), "less than before");
        assert!(ring.credit(15) && ring.room() == 10);
    }

    #[test]
    fn chunks_are_bounded() {
        let mut ring = Outgoing::new(1000, CHUNKS);
        for _ in 0..CHUNKS {
            ring.write(1);
        }
        assert_eq!(ring.room(), 0);
        assert!(ring.credit(1) && ring.room() > 0);
    }

    /// A writer that waits for this much is not left waiting.
    #[test]
    fn what_is_sure_to_be_free_becomes_so() {
        for depth in [1, 3, 4, 5, CHUNKS, 1024] {
            let (mut out, mut into) = (Outgoing::new(1000, depth), Incoming::new(1000, depth));
            let (bytes, chunks) = out.room_for_sure();
            assert!(bytes >= 750 && chunks >= depth * 3 / 4);
            for len in (1..60).cycle().take(5000) {
                if out.room() >= len {
                    out.write(len);
                    assert!(into.arrived(u32::try_from(len).unwrap()));
                }
                while into.unread() > 0 {
                    into.read(7);
                    into.credit().into_iter().for_each(|read| assert!(out.credit(read)));
                }
                assert!(out.room() >= bytes && out.chunks_left() >= chunks, "{depth}");
            }
        }
    }

    /// All chunks come before any is read, and are read a byte at a time.
    #[test]
    fn a_burst_of_small_chunks_stops_nobody() {
        for depth in [1, 3, 4, CHUNKS, 1024] {
            burst(depth);
        }
    }

    fn burst(depth: usize) {
        let (mut out, mut into) = (Outgoing::new(1 << 20, depth), Incoming::new(1 << 20, depth));
        for _ in 0..10 {
            while out.room() > 0 {
                out.write(2);
                assert!(into.arrived(2));
            }
            assert!(!into.arrived(2), "more than there are receives for");
            while into.unread() > 0 {
                into.read(1);
                if let Some(read) = into.credit() {
                    assert!(out.credit(read));
                }
            }
            assert!(out.room() > 0, "all is read, and the writer waits for ever");
        }
    }

    #[test]
    fn what_nobody_could_have_sent_is_refused() {
        let mut ring = Incoming::new(10, CHUNKS);
        assert!(!ring.arrived(0) && !ring.arrived(11));
        assert!(ring.arrived(10) && !ring.arrived(1), "no word that anything is free");
        assert_eq!(ring.read(4).len, 4);
        assert_eq!(ring.credit(), Some(4));
        assert!(!ring.arrived(5) && ring.arrived(4));
        // What was read, and not said to be free, is still the reader's.
        let mut ring = Incoming::new(100, CHUNKS);
        assert!(ring.arrived(100) && ring.read(10).len == 10 && ring.credit().is_none());
        assert!(!ring.arrived(1));
    }

    proptest! {
        /// Both ends in any order: bytes come in their order, nothing is overwritten before it was
        /// read, and whoever waits is told in the end.
        #[test]
        fn two_ends_agree(steps in prop::collection::vec((0usize..3, 1usize..40), 1..400), depth in 1usize..80) {
            const SIZE: usize = 64;
            let (mut out, mut into) = (Outgoing::new(SIZE, depth), Incoming::new(SIZE, depth));
            let mut memory = [0u8; SIZE];
            let (mut wire, mut next, mut expected) = (VecDeque::new(), 0u8, 0u8);
            for (what, len) in steps {
                match what {
                    0 => {
                        let len = len.min(out.room());
                        if len == 0 {
                            // The reader is never silent for good: reading all frees room.
                            prop_assert!(into.unread() > 0 || !wire.is_empty() || out.room() > 0);
                            continue;
                        }
                        for at in out.write(len) {
                            for byte in &mut memory[at.offset..][..at.len] {
                                *byte = next;
                                next = next.wrapping_add(1);
                            }
                        }
                        wire.push_back(u32::try_from(len).unwrap());
                    }
                    1 => if let Some(len) = wire.pop_front() {
                        prop_assert!(into.arrived(len));
                    },
                    _ => {
                        let at = into.read(len);
                        for byte in &memory[at.offset..][..at.len] {
                            prop_assert_eq!(*byte, expected);
                            expected = expected.wrapping_add(1);
                        }
                        if let Some(read) = into.credit() {
                            prop_assert!(out.credit(read));
                        }
                    }
                }
            }
        }
    }
}
