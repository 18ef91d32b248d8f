//! When to seal: a pure rule over times that the engine gives.
//!
//! Late when the guest is quiet, early when somebody waits for its output, and early when the
//! dirty set would outgrow what the backup can stage.

use std::time::Duration;

use crate::ids::PAGE_SIZE;

/// The rule and what it has learnt.
#[derive(Clone, Debug)]
pub struct Cadence {
    longest: Duration,
    shortest: Duration,
    staging_pages: u64,
    limit: Duration,
}

impl Cadence {
    /// Epochs between `shortest` and `longest` whose pages should fit `staging_bytes`.
    #[must_use]
    pub fn new(shortest: Duration, longest: Duration, staging_bytes: u64) -> Self {
        let staging_pages = staging_bytes / PAGE_SIZE as u64;
        Self { longest, shortest, staging_pages, limit: longest }
    }

    /// Most pages of an epoch.
    #[must_use]
    pub fn staging_pages(&self) -> u64 {
        self.staging_pages
    }

    /// Time from a seal to the next, with nothing in flight.
    #[must_use]
    pub fn interval(&self, output_waiting: bool) -> Duration {
        if output_waiting { self.shortest } else { self.limit.max(self.shortest) }
    }

    /// Learns from an epoch: at the same rate the next one shall fill half the staging at most.
    pub fn sealed(&mut self, pages: u64, took: Duration) {
        let half = (self.staging_pages / 2).max(1);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let room = match pages {
            0 => u64::MAX,
            pages => half.saturating_mul(micros) / pages,
        };
        // Down at once, up by halves: one quiet epoch does not make the next one safe.
        let room = Duration::from_micros(room);
        let up = self.limit.saturating_mul(3) / 2 + Duration::from_micros(1);
        self.limit = room.min(up).min(self.longest);
    }

    /// The dirty set has reached the point where waiting longer risks not fitting.
    #[must_use]
    pub fn is_near_full(&self, pages: u64) -> bool {
        pages >= self.staging_pages - self.staging_pages / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn output_shortens_and_dirt_bounds_the_interval() {
        let mut cadence = Cadence::new(MS, 25 * MS, 1000 * PAGE_SIZE as u64);
        assert_eq!(cadence.interval(false), 25 * MS);
        assert_eq!(cadence.interval(true), MS);
        cadence.sealed(1000, 10 * MS);
        assert_eq!(cadence.interval(false), 5 * MS);
        cadence.sealed(1, 10 * MS);
        assert!(cadence.interval(false) < 8 * MS);
        for _ in 0..20 {
            cadence.sealed(0, MS);
        }
        assert_eq!(cadence.interval(false), 25 * MS);
        cadence.sealed(u64::MAX, MS);
        assert_eq!(cadence.interval(false), MS);
    }

    #[test]
    fn three_quarters_are_near_full() {
        let cadence = Cadence::new(MS, MS, 100 * PAGE_SIZE as u64);
        assert!(!cadence.is_near_full(74));
        assert!(cadence.is_near_full(75));
    }
}
