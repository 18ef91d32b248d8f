//! How fast the device gets rid of what is posted, and so how much of a guest's memory it may be lent: pure.
//!
//! Whoever writes a page that is lent waits until the peer's device has it. Behind what is under way already, over
//! a slow link, that may take as long as a device that hangs is waited for. So before pages are lent
//! what is under way is let drain to what the link carries in a part of that time; where not even a frame is,
//! nothing is lent and pages are copied.
//!
//! Enters: when bytes are posted and complete. Leaves: how many may be under way. Always holds: only time in which
//! something was under way counts.

use std::time::{Duration, Instant};

/// What is lent is to be back in this part of the patience of whoever waits for it: other connections, whose
/// share of the link is not known, may begin to send at any time.
const PATIENCE_PART: u32 = 8;
/// Most bytes under way when something is lent.
const UNDER_WAY_MAX: u64 = 2 << 20;
/// Fewer bytes tell how long a way takes, and not how fast it is.
const SAMPLE_BYTES_MIN: usize = 64 << 10;
/// Of the average, what one measurement counts for.
const WEIGHT: u64 = 4;

pub(super) struct Pace {
    patience: Duration,
    /// The average; nothing has completed yet: `None`.
    ns_per_kib: Option<u64>,
    /// Since when the device is at what is under way.
    since: Instant,
}

impl Pace {
    pub(super) fn new(patience: Duration, now: Instant) -> Self {
        Self { patience, ns_per_kib: None, since: now }
    }

    /// Something is posted, and nothing was under way.
    pub(super) fn begins(&mut self, now: Instant) {
        self.since = now;
    }

    /// So many bytes completed since the last time, or since it began.
    pub(super) fn completed(&mut self, bytes: usize, now: Instant) {
        let since = std::mem::replace(&mut self.since, now);
        if bytes < SAMPLE_BYTES_MIN {
            return;
        }
        let kib = (bytes as u64).div_ceil(1024).max(1);
        let ns = u64::try_from((now - since).as_nanos()).unwrap_or(u64::MAX) / kib;
        self.ns_per_kib = Some(match self.ns_per_kib {
            None => ns,
            Some(average) => average - average / WEIGHT + ns / WEIGHT,
        });
    }

    /// How many bytes may be under way, `more` that are to be lent among them; `None`: not even those.
    pub(super) fn under_way_max(&self, more: usize) -> Option<usize> {
        // Before anything is known one frame tells.
        let Some(ns_per_kib) = self.ns_per_kib else { return Some(more) };
        let ns = u64::try_from((self.patience / PATIENCE_PART).as_nanos()).unwrap_or(u64::MAX);
        let most = (ns / ns_per_kib.max(1)).saturating_mul(1024).min(UNDER_WAY_MAX);
        usize::try_from(most).ok().filter(|most| *most >= more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: usize = 256 << 10;
    const SECOND: Duration = Duration::from_secs(1);

    /// A link that carries a frame in so many milliseconds, one after the other.
    fn pace_of(frame_ms: u64) -> Pace {
        let mut now = Instant::now();
        let mut pace = Pace::new(SECOND, now);
        for _ in 0..20 {
            // Nothing is sent for a while.
            now += Duration::from_secs(7);
            pace.begins(now);
            for _ in 0..4 {
                now += Duration::from_millis(frame_ms);
                pace.completed(FRAME, now);
            }
        }
        pace
    }

    #[test]
    fn what_is_lent_is_back_long_before_patience_is_over() {
        assert_eq!(Pace::new(SECOND, Instant::now()).under_way_max(FRAME), Some(FRAME));
        // 256 MiB/s: more than enough for the most.
        assert_eq!(pace_of(1).under_way_max(FRAME), Some(2 << 20));
        // 125 ms are six frames of 20 ms, and one of 100 ms.
        let most = pace_of(20).under_way_max(FRAME).unwrap();
        assert!((6 * FRAME..7 * FRAME).contains(&most), "{most}");
        assert!(pace_of(100).under_way_max(FRAME).is_some());
        assert_eq!(pace_of(100).under_way_max(2 * FRAME), None);
        assert_eq!(pace_of(200).under_way_max(FRAME), None);
    }

    /// The end of an epoch is a frame of some bytes, and takes as long as the way there and back.
    #[test]
    fn a_long_way_is_not_a_slow_one() {
        let mut pace = pace_of(1);
        let mut now = Instant::now() + Duration::from_secs(1000);
        for _ in 0..100 {
            pace.begins(now);
            now += Duration::from_millis(20);
            pace.completed(60, now);
        }
        assert_eq!(pace.under_way_max(FRAME), Some(2 << 20));
    }

    #[test]
    fn a_link_that_recovers_is_lent_to_again() {
        let mut pace = pace_of(1000);
        assert_eq!(pace.under_way_max(FRAME), None);
        let mut now = Instant::now() + Duration::from_secs(1000);
        pace.begins(now);
        for _ in 0..20 {
            now += Duration::from_millis(2);
            pace.completed(FRAME, now);
        }
        assert!(pace.under_way_max(FRAME).is_some());
    }
}
