//! The epochs that are sealed and not acknowledged.
//!
//! Enters: seals, acknowledgements, the end of whoever would acknowledge. Leaves: what the backup's staging
//! has no room for, and, for the next session, the pages of all that nobody acknowledged ([`Rest`]). Always
//! holds: a set leaves only with its acknowledgement, or into those.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::rest::Rest;
use crate::ids::{EpochId, Generation};
use crate::protocol::primary::Primary;
use crate::ram::PageSet;
use crate::wire::SessionId;

/// An epoch that waits for its acknowledgement, and what it needs of the backup's staging.
pub(super) struct InFlight {
    pub(super) sealed_at: Instant,
    /// Its pages: what may differ should it never be acknowledged.
    pub(super) set: Arc<PageSet>,
    pub(super) pages: u64,
    pub(super) log_bytes: u64,
    /// That an image has to write, zero or discard.
    pub(super) touched_bytes: u64,
}

/// All of them, in their order.
pub(super) struct InFlights {
    epochs: VecDeque<InFlight>,
    /// Pages of epochs that nobody will acknowledge any more.
    unacknowledged: PageSet,
}

impl InFlights {
    /// None, over a memory of `pages`.
    pub(super) fn new(pages: u64) -> Self {
        Self { epochs: VecDeque::new(), unacknowledged: PageSet::new(pages) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.epochs.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.epochs.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &InFlight> {
        self.epochs.iter()
    }

    pub(super) fn last(&self) -> Option<&InFlight> {
        self.epochs.back()
    }

    /// Pages of all of them.
    pub(super) fn pages(&self) -> u64 {
        self.epochs.iter().map(|epoch| epoch.pages).sum()
    }

    /// Bytes of their logs.
    pub(super) fn log_bytes(&self) -> u64 {
        self.epochs.iter().map(|epoch| epoch.log_bytes).sum()
    }

    pub(super) fn sealed(&mut self, epoch: InFlight) {
        self.epochs.push_back(epoch);
    }

    /// The oldest is acknowledged.
    pub(super) fn acked(&mut self) -> Option<InFlight> {
        self.epochs.pop_front()
    }

    /// Nobody will acknowledge them; whether the backup has them nobody knows.
    pub(super) fn forget(&mut self) {
        for epoch in self.epochs.drain(..) {
            self.unacknowledged.union(&epoch.set);
        }
    }

    /// What the backup may have of this session, for a copy that goes on from there. `last` is the set that
    /// was taken last, `dirty` what was written since.
    pub(super) fn rest(
        &mut self,
        machine: &Primary,
        session: SessionId,
        generation: Generation,
        sealed: EpochId,
        (last, dirty): (&PageSet, &PageSet),
    ) -> Option<Rest> {
        self.forget();
        let committed = machine.committed();
        // A copy anew goes straight into the image: what was committed before is gone.
        if !machine.is_protected() || committed == EpochId(0) {
            return None;
        }
        let universe = self.unacknowledged.universe();
        let mut pages = std::mem::replace(&mut self.unacknowledged, PageSet::new(universe));
        pages.union(dirty);
        // Taken for an epoch that may have come to nothing.
        pages.union(last);
        Some(Rest { session, generation, committed, sealed, pages })
    }
}
