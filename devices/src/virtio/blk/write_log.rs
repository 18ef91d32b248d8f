//! Where a disk's changes are recorded for a copy of its image elsewhere.
//!
//! A change is recorded in the epoch in which it *ends*, under the pass under which its request is
//! answered. So a saved state and the changes recorded before it say the same:
//!
//! - what the guest was told is done is recorded: no seal fits between the two;
//! - what is recorded and not answered is a piece of a longer request, or of a driver that was reset
//!   meanwhile: the image here has it as well;
//! - what is neither is in flight in the state, and is carried out again, from the guest's memory as
//!   it is there, by whoever goes on from that state. It does not matter whether the other image has
//!   some of it already.
//!
//! To record what the host is *given* would be right too for what it then does. But a change that
//! fails would travel although the image here does not have it, and what began before the log was
//! there would be missing. What is recorded is the buffer that the host was given, so a guest that
//! changes its memory meanwhile cannot make the images differ.

use std::sync::Arc;

use super::buffer::BUFFER_BYTES_MAX;

/// What a record costs beside its data.
pub const RECORD_COST_BYTES: u64 = 128;

/// Most that one step of a request records: a buffer, and a flush behind it.
const STEP_COST_BYTES: u64 = BUFFER_BYTES_MAX as u64 + 2 * RECORD_COST_BYTES;

/// A change that the host has carried out. Offsets and lengths in bytes, whole sectors, in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// At most the largest buffer's bytes, 1 MiB.
    Write { offset: u64, data: &'a [u8] },
    /// The range reads as zeroes; its room may be freed if `unmap`.
    Zero { offset: u64, len: u64, unmap: bool },
    /// What the range reads as is of no use any more.
    Discard { offset: u64, len: u64 },
    /// What was recorded before is durable here.
    Flush,
}

/// Records changes. Nothing here may block: the guest's pause waits for whoever records.
pub trait WriteLog: Send + Sync {
    /// Sets room aside before the host is given something. False if there is none: then the disk
    /// gives the host reads only, until [`super::Disk::wake`].
    fn reserve(&self, bytes: u64) -> bool;
    /// Gives back some of what was set aside.
    fn release(&self, bytes: u64);
    /// Takes a change, see the module's documentation. Two that overlap come in the order in which
    /// the host carried them out.
    fn record(&self, change: &Change<'_>);
}

/// What is set aside for one step of a request.
pub(super) struct Room {
    log: Arc<dyn WriteLog>,
    bytes: u64,
}

impl Room {
    /// Room for whatever the next step is.
    pub(super) fn reserve(log: &Arc<dyn WriteLog>) -> Option<Self> {
        let (log, bytes) = (Arc::clone(log), STEP_COST_BYTES);
        // Not `then_some`: what is made and dropped gives back what it never had.
        log.reserve(bytes).then(|| Self { log, bytes })
    }

    /// The step has this much data, and no more.
    pub(super) fn shrink(&mut self, data_bytes: usize) {
        let needed = (data_bytes as u64 + 2 * RECORD_COST_BYTES).min(self.bytes);
        self.log.release(self.bytes - needed);
        self.bytes = needed;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.log.release(self.bytes);
    }
}
