//! The pages of a region that were written through its mapping: by devices and by the VMM, not by
//! vCPUs.
//!
//! Enters: each write, after its last byte. Leaves: all pages once, by words of 64. Always holds: a
//! page whose write ended before a drain began is in that drain or was in an earlier one.
//!
//! A bit for each page, and above them a bit for each word that may not be zero, so that a drain of
//! 16 GiB looks at 8 KiB. A writer sets the page's bit and then the word's; who drains takes the
//! word's bit first. In whatever order the two meet, the word's bit is left where the page's is.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

const PAGE_SIZE: usize = 4096;
const BITS: usize = u64::BITS as usize;

/// Which pages of a region were written.
#[derive(Debug, Default)]
pub struct WrittenPages {
    words: Vec<AtomicU64>,
    summary: Vec<AtomicU64>,
    pages: usize,
}

fn zeros(count: usize) -> Vec<AtomicU64> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

impl WrittenPages {
    /// Hands out and forgets what was written: the number of a word's first page in the region, and
    /// the word, whose bit 0 that page is. Words come in ascending order.
    pub fn drain(&self, mut report: impl FnMut(u64, u64)) {
        for (at, summary) in self.summary.iter().enumerate() {
            // Most are zero, and reading is cheaper than swapping. A word that is missed here was
            // marked after this drain began.
            if summary.load(Ordering::Acquire) == 0 {
                continue;
            }
            let mut rest = summary.swap(0, Ordering::SeqCst);
            while rest != 0 {
                let word = at * BITS + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                let pages = self.words[word].swap(0, Ordering::SeqCst);
                if pages != 0 {
                    report((word * BITS) as u64, pages);
                }
            }
        }
    }

    /// How many pages wait for a drain.
    #[must_use]
    pub fn count(&self) -> u64 {
        let summaries = self.summary.iter().enumerate();
        let dirty = summaries.filter(|(_, summary)| summary.load(Ordering::Acquire) != 0);
        let words = dirty.flat_map(|(at, _)| self.words.iter().skip(at * BITS).take(BITS));
        words.map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }
}

impl<'a> WithBitmapSlice<'a> for WrittenPages {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WrittenPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let first = offset / PAGE_SIZE;
        // What lies past the end is no page of the region.
        let end = offset.saturating_add(len).div_ceil(PAGE_SIZE).min(self.pages);
        let mut page = first;
        while page < end && len > 0 {
            let (word, bit) = (page / BITS, page % BITS);
            let count = (BITS - bit).min(end - page);
            self.words[word].fetch_or((u64::MAX >> (BITS - count)) << bit, Ordering::SeqCst);
            self.summary[word / BITS].fetch_or(1 << (word % BITS), Ordering::SeqCst);
            page += count;
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE;
        let word = self.words.get(page / BITS).map_or(0, |word| word.load(Ordering::Acquire));
        word >> (page % BITS) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for WrittenPages {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(PAGE_SIZE);
        let words = pages.div_ceil(BITS);
        Self { words: zeros(words), summary: zeros(words.div_ceil(BITS)), pages }
    }
}

/// All orders in which a writer and a drain can meet, by loom:
/// `RUSTFLAGS="--cfg loom" cargo test -p guest-memory --lib`.
#[cfg(all(test, loom))]
mod orders {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    #[test]
    fn a_mark_is_in_this_drain_or_in_the_next() {
        loom::model(|| {
            let log = Arc::new(WrittenPages::with_len(3 * PAGE_SIZE));
            let writers = [0, 1].map(|page| {
                let log = Arc::clone(&log);
                thread::spawn(move || log.mark_dirty(page * PAGE_SIZE, 1))
            });
            let mut found = 0;
            log.drain(|_, word| {
                assert_eq!(found & word, 0);
                found |= word;
            });
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            log.drain(|_, word| {
                assert_eq!(found & word, 0, "reported twice");
                found |= word;
            });
            assert_eq!(found, 3, "a mark is lost");
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const PAGES: usize = BITS * BITS * 2 + 70;

    fn drained(log: &WrittenPages) -> Vec<u64> {
        let mut pages = vec![];
        log.drain(|first, word| {
            pages.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit));
        });
        pages
    }

    #[test]
    fn each_write_is_drained_once() {
        let log = WrittenPages::with_len(PAGES * PAGE_SIZE - 1);
        assert!(drained(&log).is_empty());
        log.mark_dirty(0, 0);
        log.mark_dirty(5 * PAGE_SIZE + 4095, 2);
        log.mark_dirty(62 * PAGE_SIZE, 4 * PAGE_SIZE);
        log.mark_dirty(BITS * BITS * PAGE_SIZE, 1);
        log.mark_dirty((PAGES - 1) * PAGE_SIZE, usize::MAX);
        log.mark_dirty(PAGES * PAGE_SIZE, 1);
        assert!(log.dirty_at(6 * PAGE_SIZE) && !log.dirty_at(7 * PAGE_SIZE));
        assert!(!log.dirty_at(usize::MAX));
        assert_eq!(log.count(), 8);
        let last = PAGES as u64 - 1;
        assert_eq!(drained(&log), [5, 6, 62, 63, 64, 65, 4096, last]);
        assert!(drained(&log).is_empty() && log.count() == 0);
    }

    #[test]
    fn slices_mark_their_region() {
        let log = WrittenPages::with_len(PAGES * PAGE_SIZE);
        log.slice_at(100 * PAGE_SIZE).slice_at(5).mark_dirty(PAGE_SIZE, 1);
        assert_eq!(drained(&log), [101]);
    }
}
