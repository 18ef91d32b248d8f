//! What processors know of each other: counters that one writes and others read.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest_logic::machine::VCPUS_MAX;

/// One processor's. Two cache lines, so that processors do not slow each other down.
#[repr(C, align(128))]
pub struct Shared {
    pub online: AtomicU32,
    /// The last phase of the end that this processor has done.
    pub phase: AtomicU32,
    /// Moves as long as the processor does.
    pub heartbeat: AtomicU64,
    pub visits: AtomicU64,
    pub passes: AtomicU64,
    pub generation_min: AtomicU64,
    pub failures: AtomicU64,
    pub filled: AtomicU64,
    /// Pages of its own that the last check has found right.
    pub confirmed: AtomicU64,
    /// The table of generations, for the processor that cross-checks.
    pub table: AtomicU64,
    pub dirtied: AtomicU64,
    pub operations: AtomicU64,
    /// Pages that `dirty` has filled.
    pub dirty_filled: AtomicU64,
}

static ALL: [Shared; VCPUS_MAX as usize] = [const { Shared::new() }; VCPUS_MAX as usize];

impl Shared {
    const fn new() -> Self {
        Self {
            online: AtomicU32::new(0),
            phase: AtomicU32::new(0),
            heartbeat: AtomicU64::new(0),
            visits: AtomicU64::new(0),
            passes: AtomicU64::new(0),
            generation_min: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            filled: AtomicU64::new(0),
            confirmed: AtomicU64::new(0),
            table: AtomicU64::new(0),
            dirtied: AtomicU64::new(0),
            operations: AtomicU64::new(0),
            dirty_filled: AtomicU64::new(0),
        }
    }

    pub fn beat(&self) {
        add(&self.heartbeat, 1);
    }
}

/// Counts on a counter that only the calling processor writes.
pub fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Release);
}

/// The processor's own; the last one's for a number out of range.
#[must_use]
pub fn of(index: u32) -> &'static Shared {
    let index = (index as usize).min(ALL.len() - 1);
    &ALL[index]
}

/// The first `count` processors.
#[must_use]
pub fn first(count: u32) -> &'static [Shared] {
    ALL.get(..count as usize).unwrap_or(&ALL)
}

/// One counter over all of them.
#[must_use]
pub fn sum(processors: &[Shared], counter: fn(&Shared) -> &AtomicU64) -> u64 {
    processors.iter().map(|shared| counter(shared).load(Ordering::Acquire)).sum()
}
