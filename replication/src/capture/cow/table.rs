//! Which pages are protected and for whom, group by group.
//!
//! ```text
//!              armed for an epoch                      gap (beside one that is needed)
//!               |             |                          |                |
//!       sender takes it    the guest writes it     a sender comes by   the guest writes it
//!               v             v                          v                |
//!            taking        copied aside               taking              |
//!               |             |                          |                |
//!               +--- unprotected, free <-----------------+----------------+
//! ```
//!
//! A sender that copies nothing *borrows* instead: what it takes stays protected and `taking` until it says that
//! the device has read it (`give_back`), which is when the peer has it: a packet that is lost is read again.
//! Who writes such a page waits for that. A device may hang: after the patience, everything that is
//! borrowed is taken back for good (`revoked`), whatever the device still reads, and the sender, whose
//! checksums no longer match, has failed.
//!
//! Always holds:
//! - a page that is armed is protected from before the guest runs until it left `armed`, and then
//!   until its bytes were copied. So only a page that is free is armed, and only under its group's
//!   lock does it become so or cease to be;
//! - what is unprotected is a page in `taking`, by its one taker, or one that is not armed, under
//!   its group's lock; or one that was taken back, under it, too;
//! - what is borrowed is a part of `taking`;
//! - a page that is protected and nothing else (that can come of races) is unprotected when it is
//!   written: it costs time, never bytes.
//!
//! The order of locks: a group, then what was copied aside. Nothing waits under them but one system
//! call that changes page tables, and no thread that writes guest memory holds one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use userfault::Userfault;

use super::{CowError, Page, bits, cost, page, rank, runs};
use crate::checking::Delays;
use crate::error::chain;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Ram;

/// Epochs of which pages may be protected at a time.
pub(super) const SLOTS: usize = 2;
/// Buffers of pages copied aside that are kept for the next.
const SPARE_PAGES_MAX: usize = 4096;

/// 64 pages with consecutive numbers, a bit each.
#[derive(Debug, Default)]
struct Group {
    /// Protected for the epoch in a slot, which needs them.
    armed: [u64; SLOTS],
    /// Protected, and needed by nobody.
    gap: u64,
    /// A sender copies or borrows them, and unprotects them then.
    taking: u64,
    /// Of these, those that somebody waits to write.
    waiting: u64,
    /// Of these, those that a device may be reading.
    borrowed: u64,
}

/// A page at an address that is a multiple of its size, see [`crate::ram::PageBuffer`].
#[repr(C, align(4096))]
struct Copied(Page);

/// Pages of one epoch that were written before a sender came.
type Aside = Mutex<HashMap<PageIndex, Box<Copied>>>;

/// The state of all pages.
pub(super) struct Table {
    groups: Box<[Mutex<Group>]>,
    /// For each page, see [`cost`].
    heat: Box<[AtomicU8]>,
    aside: [Aside; SLOTS],
    spare: Mutex<Vec<Box<Copied>>>,
    faults: AtomicU64,
    /// What the handler served since it was last asked.
    served: Mutex<(u32, Duration)>,
    /// Since when somebody waits for pages that are borrowed.
    waits: Mutex<HashMap<u64, Instant>>,
    /// How long anybody does.
    patience: Duration,
    /// Everything that was borrowed was taken back, and nothing is borrowed any more.
    revoked: AtomicBool,
    userfault: Userfault,
    ram: Ram,
    delays: Delays,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics under these locks; and who does anyway ends the process or the protection.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    /// `patience`: how long a write may wait for a page that is borrowed.
    pub(super) fn new(ram: Ram, userfault: Userfault, patience: Duration) -> Self {
        let groups = ram.pages().div_ceil(64);
        Self {
            groups: (0..groups).map(|_| Mutex::default()).collect(),
            // Whole groups.
            heat: (0..groups * 64).map(|_| AtomicU8::new(0)).collect(),
            aside: Default::default(),
            spare: Mutex::default(),
            faults: AtomicU64::new(0),
            served: Mutex::default(),
            waits: Mutex::default(),
            patience,
            revoked: AtomicBool::new(false),
            userfault,
            ram,
            delays: Delays::from_environment(),
        }
    }

    /// What happens at each point of an epoch.
    #[cfg(test)]
    pub(super) fn with_delays(mut self, delays: Delays) -> Self {
        self.delays = delays;
        self
    }

    pub(super) fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    pub(super) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// The handler served `faults` writers, who waited for it `waited` together.
    pub(super) fn served(&self, faults: u32, waited: Duration) {
        let mut served = lock(&self.served);
        *served = (served.0.saturating_add(faults), served.1.saturating_add(waited));
    }

    /// What was served since this was called last.
    pub(super) fn take_served(&self) -> (u32, Duration) {
        std::mem::take(&mut lock(&self.served))
    }

    /// Of the 64 pages of a group.
    pub(super) fn heat(&self, group: usize) -> &[AtomicU8] {
        &self.heat[group * 64..][..64]
    }

    /// Ends the process: a page stays protected, or faults are not served. The backup goes on.
    pub(super) fn fatal(&self, error: &CowError) -> ! {
        tracing::error!("copy-on-write fails, this host gives up: {}", chain(error));
        std::process::abort();
    }

    /// Arms pages of a group for `slot`: `plan` is asked for the pages to protect, of those that are
    /// free, and may name others between them. Returns those that are armed now. The caller
    /// protects all that was planned, before the guest runs.
    pub(super) fn arm(
        &self,
        slot: usize,
        group: usize,
        word: u64,
        plan: impl FnOnce(u64) -> u64,
    ) -> (u64, u64) {
        let mut state = lock(&self.groups[group]);
        let busy = state.armed.iter().fold(state.taking, |busy, armed| busy | armed);
        // What somebody takes is about to be unprotected, whoever protects it.
        let plan = plan(word & !busy) & !state.taking;
        let armed = plan & word & !busy;
        state.armed[slot] |= armed;
        state.gap = (state.gap | plan) & !busy & !armed;
        (armed, plan)
    }

    /// Protects pages that were planned.
    pub(super) fn protect(&self, first: u64, pages: u64) -> Result<(), CowError> {
        self.userfault.protect(first, pages).map_err(CowError::Protect)?;
        self.delays.at("arm");
        Ok(())
    }

    fn unprotect(&self, group: usize, word: u64) {
        for (first, count) in runs(word) {
            // The last group may be longer than the memory, but not what was ever protected.
            if let Err(error) = self.userfault.unprotect(group as u64 * 64 + first, count) {
                self.fatal(&CowError::Protect(error));
            }
        }
    }

    fn copy(&self, page: PageIndex, into: &mut Page) {
        assert!(self.ram.read_page(page, into), "page {page} was armed");
    }

    fn spare_page(&self) -> Box<Copied> {
        let spare = lock(&self.spare).pop();
        spare.unwrap_or_else(|| Box::new(Copied([0; PAGE_SIZE])))
    }

    /// Somebody waits to write the page of this index.
    pub(super) fn fault(&self, index: u64) {
        self.delays.at("fault");
        let index = usize::try_from(index).expect("a page of this memory");
        let (group, bit) = (index / 64, index % 64);
        let word = 1 << bit;
        let mut state = lock(&self.groups[group]);
        if state.taking & word != 0 {
            // Its taker unprotects it in a moment; or has done so, and a seal has protected it again
            // beside others: the taker looks once more when it is done.
            if state.borrowed & !state.waiting & word != 0 {
                self.begin_wait(group, bit);
            }
            state.waiting |= word;
            return;
        }
        if let Some(slot) = state.armed.iter().position(|armed| armed & word != 0) {
            self.set_aside(&mut state, slot, group, bit);
            self.faults.fetch_add(1, Ordering::Relaxed);
            cost::heat_up(&self.heat(group)[bit]);
        } else if state.gap & word != 0 {
            // Protected to save a call, and that was dearer.
            cost::heat_up(&self.heat(group)[bit]);
        }
        state.gap &= !word;
        // Under the lock: an epoch that arms the page does so before or after, not in between.
        self.unprotect(group, word);
    }

    /// Copies an armed page aside, which is free then, but for its protection.
    fn set_aside(&self, state: &mut Group, slot: usize, group: usize, bit: usize) {
        let mut copy = self.spare_page();
        self.copy(page(group, bit), &mut copy.0);
        lock(&self.aside[slot]).insert(page(group, bit), copy);
        state.armed[slot] &= !(1 << bit);
    }

    /// Takes the pages of a group that are still armed for `slot`, copies them and unprotects them;
    /// returns them. `into` has a place for each page of `kept`, in order.
    pub(super) fn take(&self, slot: usize, group: usize, kept: u64, into: &mut [Page]) -> u64 {
        self.take_with(slot, group, |mine| {
            for bit in bits(mine) {
                self.copy(page(group, bit), &mut into[rank(kept, bit)]);
                cost::cool(&self.heat(group)[bit]);
            }
        })
    }

    /// Unprotects the pages of a group that are still armed for `slot`: nobody needs them any more.
    pub(super) fn let_go(&self, slot: usize, group: usize) {
        self.take_with(slot, group, |_| ());
    }

    fn take_with(&self, slot: usize, group: usize, copy: impl FnOnce(u64)) -> u64 {
        let mut state = lock(&self.groups[group]);
        let mine = std::mem::take(&mut state.armed[slot]);
        let taken = mine | std::mem::take(&mut state.gap);
        state.taking |= taken;
        drop(state);
        if taken != 0 {
            self.delays.at("take");
            copy(mine);
            self.let_free(group, taken);
        }
        mine
    }

    /// Unprotects what its one taker is done with.
    fn let_free(&self, group: usize, taken: u64) {
        self.unprotect(group, taken);
        self.delays.at("unprotect");
        let mut state = lock(&self.groups[group]);
        state.taking &= !taken;
        let waiting = state.waiting & taken;
        state.waiting &= !taken;
        // Not armed, since nothing is that somebody takes.
        self.unprotect(group, waiting);
    }

    /// As [`Table::take`], but what is returned second stays protected until it is given back: its bytes
    /// in memory are those of `into` until then. What somebody waits for is not among them, nor is
    /// anything once all was taken back.
    pub(super) fn borrow(
        &self,
        slot: usize,
        group: usize,
        kept: u64,
        into: &mut [Page],
    ) -> (u64, u64) {
        let mut state = lock(&self.groups[group]);
        let mine = std::mem::take(&mut state.armed[slot]);
        state.taking |= mine;
        drop(state);
        if mine == 0 {
            return (0, 0);
        }
        self.delays.at("take");
        for bit in bits(mine) {
            self.copy(page(group, bit), &mut into[rank(kept, bit)]);
        }
        let mut state = lock(&self.groups[group]);
        // Under the lock: either it is seen that this was revoked, or whoever revokes sees what is borrowed.
        let revoked = self.revoked.load(Ordering::Acquire);
        let borrowed = if revoked { 0 } else { mine & !state.waiting };
        state.borrowed |= borrowed;
        drop(state);
        if mine != borrowed {
            self.let_free(group, mine & !borrowed);
        }
        (mine, borrowed)
    }

    /// The peer has the bytes of what was borrowed.
    pub(super) fn give_back(&self, group: usize, word: u64) {
        let mut state = lock(&self.groups[group]);
        // What is missing was taken back.
        let mine = word & state.borrowed;
        state.borrowed &= !mine;
        let taken = mine | std::mem::take(&mut state.gap);
        state.taking |= taken;
        let waiting = state.waiting & mine;
        drop(state);
        if taken == 0 {
            return;
        }
        if waiting != 0 {
            let mut waits = lock(&self.waits);
            for bit in bits(waiting) {
                waits.remove(&page(group, bit).0);
            }
        }
        bits(mine & !waiting).for_each(|bit| cost::cool(&self.heat(group)[bit]));
        self.let_free(group, taken);
    }

    /// Somebody waits for a page that is borrowed: it was better copied.
    fn begin_wait(&self, group: usize, bit: usize) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        cost::heat_up(&self.heat(group)[bit]);
        lock(&self.waits).insert(page(group, bit).0, Instant::now());
    }

    /// When the patience of whoever waits longest for a page that is borrowed is over.
    pub(super) fn overdue(&self) -> Option<Instant> {
        lock(&self.waits).values().min().map(|since| *since + self.patience)
    }

    /// Whether everything that was borrowed was taken back.
    pub(super) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Takes back everything that is borrowed, and lends nothing any more. What a device reads from here
    /// on may be newer than what was checksummed: the peer finds that out, and the session ends.
    pub(super) fn revoke(&self) {
        if !self.revoked.swap(true, Ordering::AcqRel) {
            let ms = self.patience.as_millis();
            tracing::warn!("the RDMA device kept pages of the guest for {ms} ms: they are let go");
        }
        for (group, state) in self.groups.iter().enumerate() {
            let mut state = lock(state);
            let borrowed = std::mem::take(&mut state.borrowed);
            if borrowed != 0 {
                self.unprotect(group, borrowed);
                state.taking &= !borrowed;
                state.waiting &= !borrowed;
            }
        }
        lock(&self.waits).clear();
    }

    /// Hands out a page that was copied aside for `slot`.
    pub(super) fn take_aside(&self, slot: usize, page: PageIndex, into: &mut Page) {
        let copy = lock(&self.aside[slot]).remove(&page);
        let copy = copy.expect("a page of an epoch is copied, armed, or copied aside");
        *into = copy.0;
        let mut spare = lock(&self.spare);
        if spare.len() < SPARE_PAGES_MAX {
            spare.push(copy);
        }
    }

    /// The epoch in `slot` is over.
    pub(super) fn forget(&self, slot: usize) {
        lock(&self.aside[slot]).clear();
    }

    /// Copies aside whatever is armed: memory is about to change without being written.
    pub(super) fn preserve(&self) {
        for (group, state) in self.groups.iter().enumerate() {
            let mut state = lock(state);
            let mut freed = std::mem::take(&mut state.gap);
            for slot in 0..SLOTS {
                let armed = state.armed[slot];
                for bit in bits(armed) {
                    self.set_aside(&mut state, slot, group, bit);
                }
                freed |= armed;
            }
            self.unprotect(group, freed);
            drop(state);
            // A sender may be copying others of this group, or a device reading them.
            let until = Instant::now() + self.patience;
            loop {
                let (taking, borrowed) = {
                    let state = lock(&self.groups[group]);
                    (state.taking, state.borrowed)
                };
                if taking == 0 {
                    break;
                }
                if borrowed != 0 && Instant::now() > until {
                    self.revoke();
                }
                std::thread::yield_now();
            }
        }
    }
}
