//! Staging: pages of epochs that are not committed yet, invisible to the image.
//!
//! Enters: checked frames of one data connection. Leaves: one [`Part`] at its end marker. Always
//! holds: the parts of all such epochs have at most the bytes that were set aside together, each
//! byte of contents counted as it is kept. A page takes 4 KiB at most, whatever its encoding, so a
//! primary that counts pages never exceeds them. Runs are not counted: their number is bounded by
//! the pages of the memory, none of which an epoch has twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ids::EpochId;
use crate::wire::{ConnectionPart, Run};

/// What is left of the bytes set aside for the epochs that are being staged.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    left: Arc<AtomicU64>,
    whole: u64,
}

impl Budget {
    pub(super) fn new(whole: u64) -> Self {
        Self { left: Arc::new(AtomicU64::new(whole)), whole }
    }

    /// Takes `bytes`, all or nothing.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let less = |left: u64| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_ok()
    }

    /// What an epoch took is free again.
    pub(super) fn give_back(&self, bytes: u64) {
        let more = |left: u64| Some(left.saturating_add(bytes).min(self.whole));
        let _ = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
    }

    pub(super) fn whole(&self) -> u64 {
        self.whole
    }
}

/// What one connection carried of an epoch.
#[derive(Debug, Default)]
pub(super) struct Part {
    pub(super) epoch: EpochId,
    pub(super) sum: ConnectionPart,
    /// What it took of the budget.
    pub(super) cost_bytes: u64,
    pub(super) runs: Vec<Run>,
    /// Contents of the runs that are not zero, in order: pages, and deltas with their lengths.
    pub(super) bytes: Vec<u8>,
}

impl Part {
    /// Forgets what it holds and keeps its buffers.
    pub(super) fn clear(&mut self) {
        self.epoch = EpochId(0);
        self.sum = ConnectionPart::default();
        self.cost_bytes = 0;
        self.runs.clear();
        self.bytes.clear();
    }

    /// Room for the contents of a frame, to be read into.
    pub(super) fn room(&mut self, bytes: usize) -> &mut [u8] {
        let from = self.bytes.len();
        self.bytes.resize(from + bytes, 0);
        &mut self.bytes[from..]
    }
}
