//! What a primary that lost its backup knows about the image that the backup may still have.
//!
//! The image is that of an epoch *b* of the session that ended, from the last one that was
//! acknowledged here to the last one that was sealed: the backup may have acknowledged more than was
//! heard, and never brings an epoch into its image that it does not acknowledge, nor a part of one.
//!
//! Always holds: **a page that is not in the set has the same bytes on both sides.**
//!
//! - At the seal of *b* both sides had the same memory: that is what committed means.
//! - A page that the guest or a device wrote between that seal and the last one is in the set of an
//!   epoch after *b*, all of which are among those without an acknowledgement here; their sets are
//!   united here.
//! - A page that was written after the last seal was harvested since, or will be: the tracking of
//!   dirty pages goes on while there is no backup, and each harvest before the first copy of the next
//!   session adds to the set.
//! - Nobody writes the image in between: a backup that gave a session up ends its receivers before it
//!   says so, and an image into which a copy went is no base. Nor does a copy anew here count as
//!   committed.
//!
//! The set may be larger than the truth. What it costs when it is wrong is what a dirty set that is too
//! small costs, which is why the same test looks for both (`UNDERSTUDY_TEST_EQUALITY`).

use crate::capture::dirty::Dirty;
use crate::ids::{EpochId, Generation};
use crate::ram::PageSet;
use crate::wire::{Base, SessionId};

/// See the module's documentation.
pub(super) struct Rest {
    pub(super) session: SessionId,
    /// Of the epochs.
    pub(super) generation: Generation,
    pub(super) committed: EpochId,
    pub(super) sealed: EpochId,
    /// Those that may differ.
    pub(super) pages: PageSet,
}

impl Rest {
    /// What a backup is asked for.
    pub(super) fn base(&self) -> Base {
        Base {
            session: self.session.0,
            generation: self.generation,
            committed: self.committed,
            sealed: self.sealed,
        }
    }
}

/// Begins a session in which `rest`, if the tracking of pages went on, may differ. Adds to `dirty` what has
/// to be copied beside what it has; whether that is less than everything.
pub(super) fn go_on(rest: Option<Rest>, has_base: bool, dirty: &mut Dirty) -> bool {
    match rest {
        Some(rest) if has_base => {
            dirty.add(&rest.pages);
            true
        }
        Some(_) => {
            dirty.add_all();
            false
        }
        // The first harvest has everything.
        None => false,
    }
}
