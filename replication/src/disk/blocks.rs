//! Which blocks of an image a copy still has to read: one bit each.

use std::ops::Range;

/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// A set of blocks of one image.
#[derive(Debug)]
pub(super) struct BlockMap {
    words: Vec<u64>,
    size_bytes: u64,
}

impl BlockMap {
    /// No block of an image.
    pub(super) fn empty(size_bytes: u64) -> Self {
        let words = size_bytes.div_ceil(BLOCK_BYTES * 64);
        let words = vec![0; usize::try_from(words).expect("a bitmap fits the address space")];
        Self { words, size_bytes }
    }

    /// All blocks of an image.
    pub(super) fn full(size_bytes: u64) -> Self {
        let mut map = Self::empty(size_bytes);
        map.mark(0..size_bytes);
        map
    }

    fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES)
    }

    /// Adds the blocks that a range of bytes touches, as far as it lies inside.
    pub(super) fn mark(&mut self, range: Range<u64>) {
        if range.start >= self.size_bytes {
            return;
        }
        let end = range.end.min(self.size_bytes).div_ceil(BLOCK_BYTES);
        let mut block = range.start / BLOCK_BYTES;
        while block < end {
            let bit = block % 64;
            let count = (64 - bit).min(end - block);
            self.words[index(block)] |= (u64::MAX >> (64 - count)) << bit;
            block += count;
        }
    }

    fn has(&self, block: u64) -> bool {
        self.words[index(block)] & (1 << (block % 64)) != 0
    }

    /// Whether a block that the range touches is in the set.
    pub(super) fn has_any(&self, range: &Range<u64>) -> bool {
        // Not further than the range: the bitmap of a large image is long.
        let end = range.end.min(self.size_bytes).div_ceil(BLOCK_BYTES);
        (range.start / BLOCK_BYTES..end).any(|block| self.has(block))
    }

    fn next(&self, from: u64) -> Option<u64> {
        let mut block = from;
        while block < self.blocks() {
            let rest = self.words[index(block)] >> (block % 64);
            if rest != 0 {
                return Some(block + u64::from(rest.trailing_zeros()));
            }
            block = (block / 64 + 1) * 64;
        }
        None
    }

    /// Takes the first blocks at or after `from` that follow each other, `most` bytes at most but
    /// one block at least; as bytes of the image.
    pub(super) fn take(&mut self, from: u64, most: u64) -> Option<Range<u64>> {
        let first = self.next(from.div_ceil(BLOCK_BYTES))?;
        let most = (most / BLOCK_BYTES).max(1);
        let mut end = first;
        while end < self.blocks() && end - first < most && self.has(end) {
            self.words[index(end)] &= !(1 << (end % 64));
            end += 1;
        }
        Some(first * BLOCK_BYTES..(end * BLOCK_BYTES).min(self.size_bytes))
    }

    /// Bytes of the blocks in the set, as if all were whole.
    pub(super) fn bytes(&self) -> u64 {
        let blocks: u64 = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        blocks * BLOCK_BYTES
    }
}

fn index(block: u64) -> usize {
    usize::try_from(block / 64).expect("the bitmap was allocated")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set_of_blocks(
            sectors in 1u64..40_000,
            marks in prop::collection::vec((0u64..40_000, 1u64..3000), 0..12),
            most in 1u64..(20 * BLOCK_BYTES),
        ) {
            let size = sectors * 512;
            let mut map = BlockMap::full(size);
            prop_assert_eq!(map.bytes(), size.div_ceil(BLOCK_BYTES) * BLOCK_BYTES);
            while map.take(0, u64::MAX).is_some() {}
            prop_assert_eq!(map.bytes(), 0);
            let mut model = BTreeSet::new();
            for (start, len) in marks {
                map.mark(start * 512..(start + len) * 512);
                let inside = (start..start + len).filter(|at| *at < sectors);
                model.extend(inside.map(|at| at * 512 / BLOCK_BYTES));
            }
            let mut at = 0;
            while let Some(range) = map.take(at, most) {
                prop_assert!(range.start >= at && range.end <= size && !range.is_empty());
                prop_assert!(range.end - range.start <= most.max(BLOCK_BYTES));
                let mut from = range.start;
                while from < range.end {
                    prop_assert!(model.remove(&(from / BLOCK_BYTES)));
                    from += BLOCK_BYTES;
                }
                at = range.end;
            }
            prop_assert!(model.is_empty(), "{:?}", model);
        }
    }
}
