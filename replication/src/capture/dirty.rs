//! The pages written since the last seal.
//!
//! Enters: what each harvest adds. Leaves: the whole set, once, at the seal. Always holds: a page
//! that is not in the set has not changed since the last seal; the set may be larger than the
//! truth, never smaller.

use crate::guest::{Guest, GuestError};
use crate::ids::PageIndex;
use crate::ram::PageSet;

/// Gathers over several harvests.
#[derive(Debug)]
pub struct Dirty {
    pending: PageSet,
    /// Of these, what was harvested since [`Dirty::begin_late`].
    late: PageSet,
    /// Empty but during a harvest.
    fresh: PageSet,
}

impl Dirty {
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { pending: PageSet::new(pages), late: PageSet::new(pages), fresh: PageSet::new(pages) }
    }

    /// Adds what was written since the last harvest.
    ///
    /// # Errors
    /// From the VMM; what was gathered before stays.
    pub fn harvest(&mut self, guest: &mut impl Guest) -> Result<(), GuestError> {
        let harvested = guest.harvest(&mut self.fresh);
        // What came before an error was re-armed, too.
        self.fresh.drain_into([&mut self.pending, &mut self.late]);
        harvested
    }

    /// What is harvested from here on is late.
    pub fn begin_late(&mut self) {
        self.late.clear();
    }

    /// Pages of the set, or of one that was handed out before, that were harvested since then.
    #[must_use]
    pub fn late(&self) -> &PageSet {
        &self.late
    }

    /// Adds pages that count as written although no harvest says so.
    ///
    /// # Panics
    /// If `pages` is over another memory.
    pub fn add(&mut self, pages: &PageSet) {
        self.pending.union(pages);
    }

    /// Every page counts as written.
    pub fn add_all(&mut self) {
        self.pending.insert_range(PageIndex(0), self.pending.universe());
    }

    /// Forgets pages that were never written, see [`Guest::drop_untouched`].
    pub fn drop_untouched(&mut self, guest: &mut impl Guest) {
        guest.drop_untouched(&mut self.pending);
    }

    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.pending
    }

    /// Hands the set out and puts the emptied `spare` in its place.
    ///
    /// # Panics
    /// If `spare` is over another memory.
    pub fn take(&mut self, mut spare: PageSet) -> PageSet {
        assert_eq!(spare.universe(), self.pending.universe(), "sets over different memories");
        spare.clear();
        std::mem::replace(&mut self.pending, spare)
    }

    /// Hands out those of `count` pages from `first` on, and keeps the others.
    ///
    /// # Panics
    /// If a page lies past the memory.
    pub fn take_range(&mut self, first: u64, count: u64) -> PageSet {
        let mut range = PageSet::new(self.pending.universe());
        range.insert_range(PageIndex(first), count);
        range.intersect(&self.pending);
        self.pending.subtract(&range);
        range
    }
}
