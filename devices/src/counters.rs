//! What `vm.counters` shows of a device.

use std::sync::atomic::{AtomicU64, Ordering};

/// A device that counts what happens to it.
pub trait Counters {
    /// Names and values; each only grows during the life of the device.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}

/// One event counter, shared by threads. Relaxed: a reader wants a number, not an order.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Adds a length in bytes.
    pub fn add_len(&self, len: usize) {
        self.add(u64::try_from(len).unwrap_or(u64::MAX));
    }

    /// The present value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
