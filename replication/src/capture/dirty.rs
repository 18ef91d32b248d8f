//! The pages written since the last seal.
//!
//! Enters: what each harvest adds. Leaves: the whole set, once, at the seal. Always holds: a page
//! that is not in the set has not changed since the last seal; the set may be larger than the
//! truth, never smaller.

use crate::guest::{Guest, GuestError};
use crate::ram::PageSet;

/// Gathers over several harvests.
#[derive(Debug)]
pub struct Dirty {
    pending: PageSet,
}

impl Dirty {
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { pending: PageSet::new(pages) }
    }

    /// Adds what was written since the last harvest.
    ///
    /// # Errors
    /// From the VMM; what was gathered before stays.
    pub fn harvest(&mut self, guest: &mut impl Guest) -> Result<(), GuestError> {
        guest.harvest(&mut self.pending)
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
}
