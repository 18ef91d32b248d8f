//! What a client reads, kept by the engine and read from any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::replication::{PauseSteps, ReplicationInfo};

use super::stats::Window;
use crate::disk::Done;
use crate::handover::Legacy;
use crate::ids::PAGE_SIZE;

/// The parts of [`ReplicationInfo`], as they are gathered.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    /// All but the distributions and counters.
    pub(crate) info: ReplicationInfo,
    /// On a primary: whether a lost backup is called again; and whether there is one to be called,
    /// from the loss to the first commit.
    pub(crate) reconnects: bool,
    pub(crate) alone: bool,
    /// On a primary: a switch-over is under way, or was cut and nobody knows who has the VM.
    pub(crate) hands_over: bool,
    /// On a primary whose VM was handed over: what this host still has of it.
    pub(crate) legacy: Option<Legacy>,
    pub(crate) pause_us: Window,
    /// Of each step in turn, as in [`PauseSteps`].
    pub(crate) steps_us: [Window; 5],
    pub(crate) commit_us: Window,
    pub(crate) dirty_pages: Window,
}

/// Counters that several threads raise.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) wire_bytes: AtomicU64,
    pub(crate) raw_bytes: AtomicU64,
    /// Of pages that a device reads in guest memory.
    pub(crate) from_memory_bytes: AtomicU64,
    /// Of these, straight into the backup's.
    pub(crate) straight_bytes: AtomicU64,
    /// Of a backup's image, registered for the primary's WRITEs and given back, in all.
    pub(crate) opened_bytes: AtomicU64,
    /// What the disks' images of a backup have taken.
    pub(crate) images: Done,
    /// Pages of the first copy that are through.
    pub(crate) synced_pages: AtomicU64,
    /// Pages of its first pass.
    pub(crate) to_sync_pages: AtomicU64,
    /// Bytes of disks of the first copy that are through.
    pub(crate) synced_disk_bytes: AtomicU64,
    /// Bytes of its first pass.
    pub(crate) to_sync_disk_bytes: AtomicU64,
}

impl Counters {
    /// What a backup says it has done: it grows with whatever it does.
    pub(crate) fn done(&self) -> u64 {
        let bytes =
            [&self.wire_bytes, &self.opened_bytes].map(|bytes| bytes.load(Ordering::Relaxed));
        bytes.into_iter().fold(self.images.count(), u64::wrapping_add)
    }

    /// Share of the first pass that is through; whole only once the engine says so.
    fn progress(&self) -> f64 {
        let page = PAGE_SIZE as u64;
        let sum = |pages: &AtomicU64, disks: &AtomicU64| {
            let pages = pages.load(Ordering::Relaxed).saturating_mul(page);
            pages.saturating_add(disks.load(Ordering::Relaxed))
        };
        let all = sum(&self.to_sync_pages, &self.to_sync_disk_bytes);
        let done = sum(&self.synced_pages, &self.synced_disk_bytes);
        let share = done.saturating_mul(1000).checked_div(all).unwrap_or(0).min(990);
        u32::try_from(share).map_or(0.0, |share| f64::from(share) / 1000.0)
    }
}

/// Shared between the engine's threads and the handle.
#[derive(Clone, Debug, Default)]
pub(crate) struct Status {
    gathered: Arc<Mutex<Gathered>>,
    pub(crate) counters: Arc<Counters>,
}

impl Status {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Gathered> {
        // Nothing is half done under this lock that another reader could trip over.
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an error for the client.
    pub(crate) fn failed(&self, error: &str) {
        self.lock().info.last_error = Some(error.to_owned());
    }

    pub(crate) fn info(&self) -> ReplicationInfo {
        // Sorted outside of the lock: the engine takes it before it lets output go.
        let gathered = self.lock();
        let mut info = gathered.info.clone();
        let [pause_us, commit_us, dirty_pages] =
            [&gathered.pause_us, &gathered.commit_us, &gathered.dirty_pages].map(Clone::clone);
        let steps_us = gathered.steps_us.clone();
        drop(gathered);
        info.sync_progress = info.sync_progress.max(self.counters.progress());
        info.pause_us = pause_us.percentiles();
        let [stop, harvest, keep, capture, release] =
            steps_us.each_ref().map(|step| step.percentiles().p50);
        info.pause_steps_us = PauseSteps { stop, harvest, keep, capture, release };
        info.commit_latency_us = commit_us.percentiles();
        info.dirty_pages = dirty_pages.page_counts();
        info.bytes_sent = self.counters.wire_bytes.load(Ordering::Relaxed);
        if let Some(path) = &mut info.rdma {
            path.from_memory_bytes = self.counters.from_memory_bytes.load(Ordering::Relaxed);
            path.straight_bytes = self.counters.straight_bytes.load(Ordering::Relaxed);
        }
        info.bytes_raw = self.counters.raw_bytes.load(Ordering::Relaxed);
        info
    }
}
