//! Room for a bitmap, at the begin of a cache line.
//!
//! The kernel copies a bitmap out of pages of its own. Into room that begins a few bytes after a
//! page does, as what an allocator maps by itself, some processors copy at a fifth of their speed
//! (AMD's `rep movsb` takes source and destination for overlapping; glibc bug 30994): 270 us and
//! more instead of 62 us for the 512 KiB of a guest with 16 GiB.

const LINE_BYTES: usize = 64;
const LINE_WORDS: usize = LINE_BYTES / size_of::<u64>();

/// Words of a bitmap.
#[derive(Debug, Default)]
pub struct Words {
    /// More than are used, by less than a line.
    words: Vec<u64>,
    start: usize,
    len: usize,
}

impl Words {
    /// So many words, all zero.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let words = vec![0; len + LINE_WORDS - 1];
        let start = words.as_ptr().align_offset(LINE_BYTES);
        // An address that cannot be aligned costs time only.
        Self { words, start: if start < LINE_WORDS { start } else { 0 }, len }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `len` words; `None` if there are not so many.
    #[must_use]
    pub fn first_mut(&mut self, len: usize) -> Option<&mut [u64]> {
        let all = self.words.get_mut(self.start..)?.get_mut(..self.len)?;
        all.get_mut(..len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_begin_at_a_line_and_there_are_no_more() {
        for len in [0, 1, 7, 8, 9, 1 << 16] {
            // Several at a time, so that they lie at different places.
            let mut all: Vec<_> = (0..5).map(|_| Words::new(len)).collect();
            for words in &mut all {
                let first = words.first_mut(len).unwrap();
                assert_eq!(first.len(), len);
                assert!(len == 0 || first.as_ptr().addr().is_multiple_of(LINE_BYTES));
                assert!(words.first_mut(len + 1).is_none());
            }
        }
    }
}
