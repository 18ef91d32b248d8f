//! The bitmap: one bit a page of a memory slot, set since the page was last re-armed. Where KVM leaves
//! re-arming to us (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), only what was read is cleared, never more.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use vmm_sys_util::errno;

use super::{DirtyLog, Slots, Tracking, Words, Written};
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
    buffers: Mutex<Buffers>,
}

/// Kept from one harvest to the next, so that none allocates.
#[derive(Default)]
struct Buffers {
    /// Those of the largest slot.
    words: Words,
    /// Those that are not zero.
    dirty: Vec<usize>,
}

impl Bitmap {
    pub(crate) fn new(fd: Arc<VmFd>, slots: Arc<Slots>, manual: bool, begins_full: bool) -> Self {
        Self { fd, slots, manual, begins_full, buffers: Mutex::default() }
    }

    /// Clears exactly what was read; `dirty` are the words that are not zero.
    fn rearm(&self, slot: u32, pages: u64, words: &[u64], dirty: &[usize]) -> Result<(), VmError> {
        if !self.manual {
            return Ok(());
        }
        for stretch in stretches(dirty) {
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
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = usize::try_from(words_of(pages)).unwrap_or(0);
        if buffers.words.len() < wanted {
            buffers.words = Words::new(wanted);
        }
    }

    fn vcpu_created(&self, _vcpu: &dyn AsRawFd) -> Result<(), errno::Error> {
        Ok(())
    }

    fn harvest(&self, report: &mut dyn FnMut(Written)) -> Result<(), VmError> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let Buffers { words, dirty } = &mut *buffers;
        for (slot, pages) in self.slots.logged() {
            let count = usize::try_from(words_of(pages)).unwrap_or(0);
            let words = words.first_mut(count).ok_or(VmError::BitmapLength { slot })?;
            read(&self.fd, slot, words)?;
            find_dirty(words, dirty);
            let rearmed = self.rearm(slot, pages, words, dirty);
            // After an error, too: some of them were cleared.
            for at in &*dirty {
                report(Written { slot, first_page: pages_of(*at), word: words[*at] });
            }
            rearmed?;
        }
        Ok(())
    }

    fn written(&self) -> Result<Option<u64>, VmError> {
        if !self.manual {
            return Ok(None);
        }
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pages = 0;
        for (slot, slot_pages) in self.slots.logged() {
            let count = usize::try_from(words_of(slot_pages)).unwrap_or(0);
            let words = buffers.words.first_mut(count).ok_or(VmError::BitmapLength { slot })?;
            read(&self.fd, slot, words)?;
            pages += words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        Ok(Some(pages))
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

/// Puts the numbers of the words that are not zero into `dirty`. Most are zero, so several are
/// looked at in one step, which the compiler makes wide.
fn find_dirty(words: &[u64], dirty: &mut Vec<usize>) {
    const STEP: usize = 16;
    dirty.clear();
    for (step, chunk) in words.chunks(STEP).enumerate() {
        if chunk.iter().fold(0, |all, word| all | word) != 0 {
            let first = step * STEP;
            let found = chunk.iter().enumerate().filter(|(_, word)| **word != 0);
            dirty.extend(found.map(|(at, _)| first + at));
        }
    }
}

/// Stretches of words that begin and end with a dirty one and hold no long clean gap.
fn stretches(dirty: &[usize]) -> impl Iterator<Item = Range<usize>> + '_ {
    let splits = |from: &usize, to: &usize| to - from <= GAP_WORDS;
    dirty.chunk_by(splits).flat_map(|stretch| {
        let (first, end) = (stretch[0], stretch[stretch.len() - 1] + 1);
        let starts = (first..end).step_by(STRETCH_WORDS_MAX);
        starts.map(move |start| start..end.min(start + STRETCH_WORDS_MAX))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_bridge_small_gaps_only() {
        assert_eq!(stretches(&[]).count(), 0);
        let third = 4 + 2 * GAP_WORDS;
        let last = 4 * GAP_WORDS;
        let found: Vec<_> = stretches(&[3, 3 + GAP_WORDS, third, last]).collect();
        assert_eq!(found, [3..4 + GAP_WORDS, third..third + 1, last..last + 1]);
        let far = STRETCH_WORDS_MAX / GAP_WORDS + 1;
        let long: Vec<_> = (0..=far).map(|at| at * GAP_WORDS).collect();
        let found: Vec<_> = stretches(&long).collect();
        assert_eq!(found, [0..STRETCH_WORDS_MAX, STRETCH_WORDS_MAX..far * GAP_WORDS + 1]);
    }

    #[test]
    fn each_dirty_word_is_found() {
        let mut words = vec![0u64; 100];
        let mut dirty = vec![7];
        find_dirty(&words, &mut dirty);
        assert!(dirty.is_empty());
        for at in [0, 15, 16, 63, 98, 99] {
            words[at] = 1 << (at % 64);
        }
        find_dirty(&words, &mut dirty);
        assert_eq!(dirty, [0, 15, 16, 63, 98, 99]);
    }
}
