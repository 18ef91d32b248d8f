//! Progress of a long wait, told in the log at most once a second.

use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(1);
/// The clock is read once in so many steps.
const STRIDE: u64 = 4096;

/// A piece of work with a known number of steps.
pub struct Progress {
    what: &'static str,
    total: u64,
    told: Instant,
}

impl Progress {
    #[must_use]
    pub fn new(what: &'static str, total: u64) -> Self {
        Self { what, total, told: Instant::now() }
    }

    /// Step `step` is done.
    pub fn at(&mut self, step: u64) {
        if step.is_multiple_of(STRIDE) && self.told.elapsed() >= EVERY {
            self.told = Instant::now();
            let percent = step.saturating_mul(100) / self.total.max(1);
            tracing::info!("{}: {percent} %", self.what);
        }
    }
}
