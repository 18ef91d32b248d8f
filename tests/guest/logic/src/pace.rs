//! How many pages are due by now.

/// Backlog beyond this is forgotten: a machine that stood still does not race afterwards.
const BACKLOG_NS_MAX: u64 = 1_000_000_000;
const NS: u128 = 1_000_000_000;

/// Spreads `rate` events a second evenly; a rate of 0 has no limit.
#[derive(Clone, Debug)]
pub struct Pace {
    rate: u64,
    start_ns: u64,
    done: u64,
}

impl Pace {
    #[must_use]
    pub fn new(rate: u64, now_ns: u64) -> Self {
        Self { rate, start_ns: now_ns, done: 0 }
    }

    /// How many events may happen now, at most `batch`.
    pub fn due(&mut self, now_ns: u64, batch: u64) -> u64 {
        if self.rate == 0 {
            return batch;
        }
        let next_ns = self.next_ns();
        if now_ns.saturating_sub(next_ns) > BACKLOG_NS_MAX {
            *self = Self::new(self.rate, now_ns - BACKLOG_NS_MAX);
        }
        let elapsed = u128::from(now_ns.saturating_sub(self.start_ns));
        let total = u64::try_from(elapsed * u128::from(self.rate) / NS).unwrap_or(u64::MAX);
        total.saturating_sub(self.done).min(batch)
    }

    pub fn did(&mut self, events: u64) {
        self.done = self.done.saturating_add(events);
    }

    /// When the next event is due.
    #[must_use]
    pub fn next_ns(&self) -> u64 {
        if self.rate == 0 {
            return self.start_ns;
        }
        let offset = (u128::from(self.done) + 1) * NS / u128::from(self.rate);
        self.start_ns.saturating_add(u64::try_from(offset).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept() {
        let mut pace = Pace::new(2000, 100);
        let mut done = 0;
        for millisecond in 1..=1000 {
            let due = pace.due(100 + millisecond * 1_000_000, 64);
            pace.did(due);
            done += due;
        }
        assert_eq!(done, 2000);
    }

    #[test]
    fn a_long_pause_is_not_made_up_for() {
        let mut pace = Pace::new(1000, 0);
        let now = 3_600_000_000_000;
        let due = pace.due(now, u64::MAX);
        assert!(due <= 1000, "{due}");
        pace.did(due);
        assert_eq!(pace.due(now, u64::MAX), 0);
    }

    #[test]
    fn no_rate_no_limit() {
        assert_eq!(Pace::new(0, 5).due(5, 64), 64);
    }

    #[test]
    fn what_is_due_next_is_not_due_before() {
        let mut pace = Pace::new(3, 0);
        let next = pace.next_ns();
        assert_eq!(pace.due(next - 1, 10), 0);
        assert_eq!(pace.due(next + 1, 10), 1);
    }
}
