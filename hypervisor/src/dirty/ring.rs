//! The rings: KVM writes an entry for each page that a vCPU makes writable.
//!
//! ```text
//!               KVM: DIRTY                  we: RESET             KVM_RESET_DIRTY_RINGS
//!   free (0) -----------------> noted ------------------> read -------------------------> free (0)
//!                                                                 page protected again
//! ```
//!
//! An entry is read before the page is protected again, so a write in between has no entry of its
//! own. Nothing is lost by that: whoever wants a page's bytes reads them after the harvest returned.
//! A vCPU whose ring is nearly full comes back from KVM_RUN; what is noted then waits here, in words,
//! for the next harvest.
//!
//! KVM keeps some entries in reserve and stops a vCPU before a ring is full. One that emulates the
//! guest's code (a software KVM does, in ring 0) may not look at that until much later, and writes
//! over what nobody read: see [`super::rings_are_sound`]. A ring without a free entry is therefore
//! taken for one that overflowed, and is an error from then on.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;

use super::{DirtyLog, Tracking, Written, words_of};
use crate::mapping::Mapping;
use crate::sys;
use crate::vm::VmError;

/// Entries of a vCPU's ring that suit a machine: a power of two. 16,384 of 16 bytes are 256 KiB for each vCPU, and as
/// many pages (64 MiB) as one vCPU writes in a long epoch.
pub const RING_ENTRIES: u32 = 16384;

/// Flag of an entry that KVM wrote, and of one that was read (KVM_DIRTY_GFN_F_DIRTY, _RESET).
const DIRTY: u32 = 1;
const RESET: u32 = 2;

const PAGE_SIZE: i64 = 4096;

/// The rings of a VM's vCPUs.
pub(crate) struct Rings {
    fd: Arc<VmFd>,
    entries: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rings: Vec<Ring>,
    /// Something was lost, for good: pages were overwritten, or not protected again.
    overflowed: bool,
    /// vCPUs in a row for which no room could be made.
    fruitless: usize,
    noted: BTreeMap<u32, Noted>,
}

/// What was read of a slot and not reported yet.
#[derive(Default)]
struct Noted {
    words: Vec<u64>,
    /// The words that are not zero, in the order of their first page.
    touched: Vec<usize>,
}

impl Noted {
    /// An entry of a slot that shrank since is none.
    fn note(&mut self, page: u64) {
        let Some(at) = usize::try_from(page / 64).ok().filter(|at| *at < self.words.len()) else {
            return;
        };
        if self.words[at] == 0 {
            self.touched.push(at);
        }
        self.words[at] |= 1 << (page % 64);
    }
}

impl Rings {
    /// `entries` is what KVM was told.
    pub(crate) fn new(fd: Arc<VmFd>, entries: u32) -> Self {
        Self { fd, entries, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all rings.
    fn read(&self, state: &mut State) -> Result<(), VmError> {
        let State { rings, overflowed, noted, .. } = state;
        for ring in rings {
            let read = ring.read(|slot, page| {
                if let Some(noted) = noted.get_mut(&slot) {
                    noted.note(page);
                }
            });
            ring.unreset += read;
            *overflowed |= ring.unreset >= self.entries;
        }
        if *overflowed { Err(VmError::RingOverflow) } else { Ok(()) }
    }

    /// Reads all rings and protects what they name again.
    fn collect(&self, state: &mut State) -> Result<(), VmError> {
        self.read(state)?;
        self.reset(state)
    }
}

impl Rings {
    /// Protects what was read again, all of it: since Linux 6.17 a signal that is pending ends this in
    /// the middle, without an error, and what was left out would be named by no ring any more. A kick
    /// ends KVM_RUN all the same, by the flag that comes before its signal. What cannot be held back
    /// (SIGSTOP, a freezer, a debugger) is found by the count, but for the batch of pages that KVM had
    /// counted and not protected yet: which is why rings are not chosen there.
    fn reset(&self, state: &mut State) -> Result<(), VmError> {
        let expected: u32 = state.rings.iter().map(|ring| ring.unreset).sum();
        if expected == 0 {
            return Ok(());
        }
        let reset = sys::without_signals(|| sys::reset_dirty_rings(&*self.fd));
        let found = reset.map_err(VmError::ResetRings)?;
        state.rings.iter_mut().for_each(|ring| ring.unreset = 0);
        state.overflowed |= found != expected;
        if found == expected { Ok(()) } else { Err(VmError::PartOfRings { expected, found }) }
    }
}

impl DirtyLog for Rings {
    fn tracking(&self) -> Tracking {
        Tracking::Ring
    }

    fn begins_full(&self) -> bool {
        false
    }

    fn slot_set(&self, slot: u32, pages: u64, logs: bool) {
        let mut state = self.state();
        // What rings still have of a log that ended is in the next one, too: more than is true.
        state.noted.remove(&slot);
        if logs && pages > 0 {
            let words = vec![0; usize::try_from(words_of(pages)).unwrap_or(0)];
            state.noted.insert(slot, Noted { words, touched: vec![] });
        }
    }

    fn vcpu_created(&self, vcpu: &dyn AsRawFd) -> Result<(), errno::Error> {
        self.state().rings.push(Ring::map(vcpu, self.entries)?);
        Ok(())
    }

    fn harvest(&self, report: &mut dyn FnMut(Written)) -> Result<(), VmError> {
        let mut state = self.state();
        // After an error what was read waits for the next harvest: it is not protected again.
        self.collect(&mut state)?;
        for (slot, noted) in &mut state.noted {
            for at in noted.touched.drain(..) {
                let word = std::mem::take(&mut noted.words[at]);
                report(Written { slot: *slot, first_page: at as u64 * 64, word });
            }
        }
        Ok(())
    }

    fn written(&self) -> Result<Option<u64>, VmError> {
        let mut state = self.state();
        self.read(&mut state)?;
        let noted = state.noted.values();
        let words = noted.flat_map(|noted| noted.touched.iter().map(|at| noted.words[*at]));
        Ok(Some(words.map(|word| u64::from(word.count_ones())).sum()))
    }

    fn make_room(&self) -> Result<(), VmError> {
        let mut state = self.state();
        // Whoever asks for the pages next hears what is lost; the guest itself goes on, unless there is
        // nothing that could be done to let it.
        let read = self.read(&mut state);
        let is_fruitless = read.is_err() && state.rings.iter().all(|ring| ring.unreset == 0);
        // Another vCPU may have made room for all since this one came to want some: each has one try that finds
        // nothing to do.
        state.fruitless = if is_fruitless { state.fruitless + 1 } else { 0 };
        if state.fruitless > state.rings.len() {
            return read;
        }
        match self.reset(&mut state) {
            Err(VmError::PartOfRings { .. }) => Ok(()),
            reset => reset,
        }
    }
}

/// One vCPU's ring, as this process sees it.
struct Ring {
    mapping: Mapping,
    /// A power of two.
    entries: u32,
    /// How many were read, ever, modulo 2^32: a multiple of the ring's length.
    next: u32,
    /// Of these, those whose pages are not protected again yet.
    unreset: u32,
}

// SAFETY: plain shared memory; entries are read through one `&mut`, and the flags that the kernel
// writes at the same time are accessed atomically only.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &dyn AsRawFd, entries: u32) -> Result<Self, errno::Error> {
        let bytes = entries as usize * size_of::<kvm_dirty_gfn>();
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        let mapping = Mapping::new(vcpu, bytes, offset)?;
        Ok(Self { mapping, entries, next: 0, unreset: 0 })
    }

    /// Hands each noted entry's slot and page to `note`, and marks it read; returns how many.
    fn read(&mut self, mut note: impl FnMut(u32, u64)) -> u32 {
        for count in 0..self.entries {
            let at = (self.next % self.entries) as usize;
            // SAFETY: `at` is below the ring's length, which is what was mapped.
            let entry = unsafe { self.mapping.start().cast::<kvm_dirty_gfn>().add(at) };
            // SAFETY: aligned, inside the mapping, and accessed atomically by this process; the
            // kernel's own accesses are single words.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            // Acquire: the rest of the entry was written before its flag.
            if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return count;
            }
            // SAFETY: aligned and inside the mapping; the kernel leaves an entry alone from its flag
            // until it was reset.
            let (slot, page) =
                unsafe { ((&raw const (*entry).slot).read(), (&raw const (*entry).offset).read()) };
            // Release: the kernel reuses the entry once it sees this.
            flags.store(DIRTY | RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            // The upper half is the address space, of which a VM without system management has one.
            note(slot & 0xffff, page);
        }
        self.entries
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    const ENTRIES: u32 = 8;

    /// A file where a vCPU's ring would be.
    fn ring() -> (File, Ring) {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let ring = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        file.set_len(u64::try_from(ring + PAGE_SIZE).unwrap()).unwrap();
        let ring = Ring::map(&file, ENTRIES).unwrap();
        (file, ring)
    }

    fn place(at: u32) -> u64 {
        u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096 + u64::from(at % ENTRIES) * 16
    }

    /// As KVM writes an entry.
    fn push(file: &File, at: u32, slot: u32, page: u64) {
        let entry = [&DIRTY.to_le_bytes()[..], &slot.to_le_bytes(), &page.to_le_bytes()].concat();
        file.write_all_at(&entry, place(at)).unwrap();
    }

    fn flags(file: &File, at: u32) -> u32 {
        let mut flags = [0; 4];
        file.read_exact_at(&mut flags, place(at)).unwrap();
        u32::from_le_bytes(flags)
    }

    fn read(ring: &mut Ring) -> Vec<(u32, u64)> {
        let mut found = vec![];
        let count = ring.read(|slot, page| found.push((slot, page)));
        assert_eq!(found.len(), count as usize);
        found
    }

    #[test]
    fn entries_are_read_once_and_in_order_around_the_end() {
        let (file, mut ring) = ring();
        assert!(read(&mut ring).is_empty());
        for round in 0..5 {
            let first = round * 5;
            for at in first..first + 5 {
                push(&file, at, 1 << 16 | at, u64::from(at) * 100);
            }
            let expected: Vec<_> = (first..first + 5).map(|at| (at, u64::from(at) * 100)).collect();
            assert_eq!(read(&mut ring), expected);
            assert!((first..first + 5).all(|at| flags(&file, at) & RESET != 0));
            assert!(read(&mut ring).is_empty(), "they wait for their reset");
            for at in first..first + 5 {
                file.write_all_at(&[0; 16], place(at)).unwrap();
            }
        }
    }

    #[test]
    fn a_ring_without_a_free_entry_is_an_error_for_good() {
        let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
        let rings = Rings::new(Arc::new(vm), ENTRIES);
        let (file, ring) = ring();
        rings.state().rings.push(ring);
        rings.slot_set(0, 128, true);
        (0..ENTRIES - 1).for_each(|at| push(&file, at, 0, at.into()));
        assert_eq!(rings.written().unwrap(), Some(u64::from(ENTRIES) - 1));
        assert_eq!(
            rings.written().unwrap(),
            Some(u64::from(ENTRIES) - 1),
            "a look changes nothing"
        );
        // What was read and not reset is in KVM's way, too.
        push(&file, ENTRIES - 1, 0, 100);
        assert!(matches!(rings.written(), Err(VmError::RingOverflow)));
        let mut nothing = |written| panic!("{written:?}");
        assert!(matches!(rings.harvest(&mut nothing), Err(VmError::RingOverflow)));
    }

    /// Two vCPUs' rings are full, and the first that says so empties both.
    #[test]
    fn a_vcpu_for_which_another_made_room_goes_on_after_an_overflow() {
        let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
        let rings = Rings::new(Arc::new(vm), ENTRIES);
        let (file, first) = ring();
        let (_other, second) = ring();
        rings.state().rings.extend([first, second]);
        (0..ENTRIES).for_each(|at| push(&file, at, 0, at.into()));
        assert!(matches!(rings.written(), Err(VmError::RingOverflow)));
        // As after the reset that the first one asked for.
        rings.state().rings[0].unreset = 0;
        for _ in 0..2 {
            rings.make_room().unwrap();
        }
        // Each was here, and found nothing to do: their rings are full all the same.
        assert!(matches!(rings.make_room(), Err(VmError::RingOverflow)));
    }

    #[test]
    fn what_is_noted_is_reported_once_by_words() {
        let mut noted = Noted { words: vec![0; 3], touched: vec![] };
        for page in [130, 1, 0, 191, 130, 192, u64::MAX] {
            noted.note(page);
        }
        assert_eq!((noted.touched, noted.words), (vec![2, 0], vec![3, 0, 1 << 2 | 1 << 63]));
    }
}
