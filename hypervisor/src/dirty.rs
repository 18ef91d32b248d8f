//! The dirty log: one bit a page of a memory slot, set since the page was last re-armed.
//!
//! In: KVM's bitmap. Out: the same bitmap in the caller's words, and, where KVM leaves re-arming
//! to us (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), the set pages write-protected again. What always
//! holds: a page that was written after its bit was read is reported by the next harvest. So only
//! what was read is cleared, never more.

use crate::sys;
use crate::vm::{Vm, VmError};

/// Clean words between two dirty ones that one KVM_CLEAR_DIRTY_LOG rather carries along than
/// ends for. A call costs as much as about this many words of zeros: it takes the slots' lock and
/// flushes TLBs, a zero word is copied and skipped.
const GAP_WORDS: usize = 512;

/// Most words of one KVM_CLEAR_DIRTY_LOG: its page count has 32 bits and full words.
const STRETCH_WORDS_MAX: usize = (u32::MAX / u64::BITS) as usize;

/// Words of the bitmap of a slot with so many pages.
pub fn words_of(pages: u64) -> u64 {
    pages.div_ceil(u64::from(u64::BITS))
}

impl Vm {
    /// Reads the dirty bitmap of a slot into `words`, one word for 64 pages, the whole slot.
    /// Without manual re-arming this re-arms the pages, too.
    pub fn dirty_log(&self, slot: u32, words: &mut [u64]) -> Result<(), VmError> {
        self.check_bitmap(slot, words)?;
        sys::get_dirty_log(self.fd(), slot, words)
            .map_err(|source| VmError::DirtyLog { slot, source })
    }

    /// Re-arms the pages of `first_page..first_page + pages` whose bits are set in `words`.
    /// `first_page` is a multiple of 64; `pages` is one, too, or reaches the slot's end.
    pub fn clear_dirty_log(
        &self,
        slot: u32,
        first_page: u64,
        pages: u64,
        words: &[u64],
    ) -> Result<(), VmError> {
        let count = u32::try_from(pages).map_err(|_| VmError::BitmapLength { slot })?;
        if u64::try_from(words.len()) != Ok(words_of(pages)) {
            return Err(VmError::BitmapLength { slot });
        }
        sys::clear_dirty_log(self.fd(), slot, first_page, count, words)
            .map_err(|source| VmError::ClearDirtyLog { slot, source })
    }

    /// Reads the dirty bitmap of a slot and re-arms exactly the pages that it reports.
    pub fn harvest_dirty_log(&self, slot: u32, words: &mut [u64]) -> Result<(), VmError> {
        let slot_pages = self.check_bitmap(slot, words)?;
        sys::get_dirty_log(self.fd(), slot, words)
            .map_err(|source| VmError::DirtyLog { slot, source })?;
        if !self.capabilities().manual_dirty_log {
            return Ok(());
        }
        for stretch in Stretches::new(words) {
            let first_page = pages_of(stretch.start);
            let end_page = pages_of(stretch.end).min(slot_pages);
            self.clear_dirty_log(slot, first_page, end_page - first_page, &words[stretch])?;
        }
        Ok(())
    }

    /// The slot's pages, if `words` is as long as its bitmap.
    fn check_bitmap(&self, slot: u32, words: &[u64]) -> Result<u64, VmError> {
        let pages = self.slot_pages(slot).ok_or(VmError::NoSlot { slot })?;
        if u64::try_from(words.len()) != Ok(words_of(pages)) {
            return Err(VmError::BitmapLength { slot });
        }
        Ok(pages)
    }
}

/// First page of a word. A word's index fits: the words are in memory.
fn pages_of(word: usize) -> u64 {
    word as u64 * u64::from(u64::BITS)
}

/// Stretches of words that begin and end with a dirty one and hold no long clean gap.
struct Stretches<'a> {
    words: &'a [u64],
    next: usize,
}

impl<'a> Stretches<'a> {
    fn new(words: &'a [u64]) -> Self {
        Self { words, next: 0 }
    }
}

impl Iterator for Stretches<'_> {
    type Item = std::ops::Range<usize>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = &self.words[self.next..];
        let start = self.next + rest.iter().position(|&word| word != 0)?;
        let mut end = start + 1;
        for (index, &word) in self.words.iter().enumerate().skip(end) {
            if index - end >= GAP_WORDS || index - start >= STRETCH_WORDS_MAX {
                break;
            }
            if word != 0 {
                end = index + 1;
            }
        }
        self.next = end;
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_bridge_small_gaps_only() {
        let mut words = vec![0u64; 4 * GAP_WORDS];
        assert_eq!(Stretches::new(&words).count(), 0);
        words[3] = 1;
        words[3 + GAP_WORDS] = 2;
        words[4 + 2 * GAP_WORDS + 1] = 4;
        let last = words.len() - 1;
        words[last] = 8;
        let found: Vec<_> = Stretches::new(&words).collect();
        let third = 4 + 2 * GAP_WORDS + 1;
        assert_eq!(found, [3..4 + GAP_WORDS, third..third + 1, last..last + 1]);
    }
}
