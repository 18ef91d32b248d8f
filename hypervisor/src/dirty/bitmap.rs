//! The bitmap: one bit a page of a memory slot, set since the page was last re-armed. Where KVM leaves
//! re-arming to us (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), only what was read is cleared, never more.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use vmm_sys_util::errno;

use super::{DirtyLog, Slots, Tracking, Written};
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

/// KVM's bitmaps of a VM.
pub(crate) struct Bitmap {
    fd: Arc<VmFd>,
    slots: Arc<Slots>,
    /// Reading does not re-arm.
    manual: bool,
    begins_full: bool,
    /// Words for the largest slot, so that a harvest allocates nothing.
    words: Mutex<Vec<u64>>,
}

impl Bitmap {
    pub(crate) fn new(fd: Arc<VmFd>, slots: Arc<Slots>, manual: bool, begins_full: bool) -> Self {
        Self { fd, slots, manual, begins_full, words: Mutex::default() }
    }

    /// Clears exactly what was read.
    fn rearm(&self, slot: u32, pages: u64, words: &[u64]) -> Result<(), VmError> {
        if !self.manual {
            return Ok(());
        }
        for stretch in Stretches::new(words) {
            let first_page = pages_of(stretch.start);
            let count = pages_of(stretch.end).min(pages) - first_page;
            clear(&self.fd, slot, first_page, count, &words[stretch])?;
        }
        Ok(())
    }
}

impl DirtyLog for Bitmap {
    fn tracking(&self) -> Tracking {
        Tracking::Bitmap
    }

    fn begins_full(&self) -> bool {
        self.begins_full
    }

    fn slot_set(&self, _slot: u32, pages: u64, _logs: bool) {
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = usize::try_from(words_of(pages)).unwrap_or(0);
        if words.len() < wanted {
            words.resize(wanted, 0);
        }
    }

    fn vcpu_created(&self, _vcpu: &dyn AsRawFd) -> Result<(), errno::Error> {
        Ok(())
    }

    fn harvest(&self, report: &mut dyn FnMut(Written)) -> Result<(), VmError> {
        let mut room = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, pages) in self.slots.logged() {
            let count = usize::try_from(words_of(pages)).unwrap_or(0);
            let words = room.get_mut(..count).ok_or(VmError::BitmapLength { slot })?;
            read(&self.fd, slot, words)?;
            let rearmed = self.rearm(slot, pages, words);
            // After an error, too: some of them were cleared.
            for (at, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                report(Written { slot, first_page: pages_of(at), word: *word });
            }
            rearmed?;
        }
        Ok(())
    }

    fn make_room(&self) -> Result<(), VmError> {
        Ok(())
    }
}

/// Reads the bitmap of a slot, which `words` has the length of.
fn read(fd: &VmFd, slot: u32, words: &mut [u64]) -> Result<(), VmError> {
    sys::get_dirty_log(fd, slot, words).map_err(|source| VmError::DirtyLog { slot, source })
}

/// Re-arms the pages of `first_page..first_page + pages` whose bits are set in `words`.
fn clear(fd: &VmFd, slot: u32, first_page: u64, pages: u64, words: &[u64]) -> Result<(), VmError> {
    let count = u32::try_from(pages).map_err(|_| VmError::BitmapLength { slot })?;
    if u64::try_from(words.len()) != Ok(words_of(pages)) {
        return Err(VmError::BitmapLength { slot });
    }
    sys::clear_dirty_log(fd, slot, first_page, count, words)
        .map_err(|source| VmError::ClearDirtyLog { slot, source })
}

/// The two halves of a harvest, of a VM with [`Tracking::Bitmap`].
impl Vm {
    /// Reads the dirty bitmap of a slot into `words`, one word for 64 pages, the whole slot.
    /// Without manual re-arming this re-arms the pages, too.
    ///
    /// # Errors
    /// `words` has another length than the slot's bitmap, or the VM keeps rings.
    pub fn read_bitmap(&self, slot: u32, words: &mut [u64]) -> Result<(), VmError> {
        let pages = self.slot_pages(slot).ok_or(VmError::NoSlot { slot })?;
        if u64::try_from(words.len()) != Ok(words_of(pages)) {
            return Err(VmError::BitmapLength { slot });
        }
        read(self.fd(), slot, words)
    }

    /// Re-arms the pages of `first_page..first_page + pages` whose bits are set in `words`.
    /// `first_page` is a multiple of 64; `pages` is one, too, or reaches the slot's end.
    ///
    /// # Errors
    /// `words` has another length than that, or KVM refuses.
    pub fn clear_bitmap(
        &self,
        slot: u32,
        first_page: u64,
        pages: u64,
        words: &[u64],
    ) -> Result<(), VmError> {
        clear(self.fd(), slot, first_page, pages, words)
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
