//! What outlives a planned switch-over, on either host: the old one's [`Legacy`], the new one's
//! [`WayBack`].
//!
//! The last epoch *n* of a switch-over is sealed by a guest that does not run on, so when the new host has
//! acknowledged it the old one's memory is that of *n*, byte for byte, and stays so: nobody writes it. The
//! new host notes what it writes from before its guest's first instruction. So each knows the other's memory, and
//! the way back copies what was written since and nothing else.
//!
//! Where the switch-over reversed the pair in one swap of the record, the old host keeps the machine's
//! state at *n* as well: it is a backup with a committed epoch from the start, and the new one's output is held
//! from the first instant.

use api::replication::ReplicateData;

use crate::ids::{EpochId, Generation};
use crate::ownership::{HostId, HostIdentity};
use crate::wire::{Base, SessionId};

/// What the old host of a switch-over has of the VM.
#[derive(Clone)]
pub struct Legacy {
    /// The names that this host had as the VM's primary, and has as its backup.
    pub(crate) identity: HostIdentity,
    /// The new primary.
    pub(crate) primary: HostId,
    /// Of the session that handed it over, and the last epoch of that.
    pub(crate) session: SessionId,
    pub(crate) epoch: EpochId,
    /// Of that session's pair, or of the reversed one.
    pub(crate) generation: Generation,
    /// What the machine was, as a backup was told.
    pub(crate) description: Vec<u8>,
    /// The machine's state at the epoch, if this host is the backup of the reversed pair.
    pub(crate) state: Option<Vec<u8>>,
}

impl std::fmt::Debug for Legacy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Legacy")
            .field("epoch", &self.epoch)
            .field("generation", &self.generation)
            .field("is_heir", &self.is_heir())
            .finish_non_exhaustive()
    }
}

impl Legacy {
    /// Whether this host is the VM's backup already, by the record.
    #[must_use]
    pub fn is_heir(&self) -> bool {
        self.state.is_some()
    }
}

/// How the new host of a switch-over protects the VM from there.
#[derive(Clone, Debug)]
pub struct WayBack {
    pub(crate) options: ReplicateData,
    /// What the old host has of it; `None` if what the guest writes is not noted.
    pub(crate) base: Option<Base>,
    /// The pair of both hosts stands already, and output is held.
    pub(crate) reversed: bool,
}

impl WayBack {
    /// The options of a primary.
    #[must_use]
    pub fn options(&self) -> &ReplicateData {
        &self.options
    }

    /// Whether the VM is protected by the old host already, whose answer its output waits for.
    #[must_use]
    pub fn is_reversed(&self) -> bool {
        self.reversed
    }
}
