//! What the inputs get to. A target that never gets past its first check finds nothing and would
//! not say so: each counts what it wants to have seen, and `examples/replay.rs` shows it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

static COUNTS: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());

/// An input got to `place`.
pub fn reached(place: &'static str) {
    let mut counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    *counts.entry(place).or_default() += 1;
}

/// Counts what a device has counted itself.
pub fn reached_all(counters: Vec<(&'static str, u64)>) {
    counters.into_iter().filter(|(_, count)| *count > 0).for_each(|(name, _)| reached(name));
}

/// How often each place was reached since the last call, by this process.
pub fn take() -> BTreeMap<&'static str, u64> {
    std::mem::take(&mut *COUNTS.lock().unwrap_or_else(PoisonError::into_inner))
}
