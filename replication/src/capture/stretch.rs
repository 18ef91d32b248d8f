//! How long an epoch may last when nobody waits for it: a pure rule.
//!
//! Enters: each seal, what it cost the guest, and whether output waited. Leaves: the interval to the
//! next. Always holds: it is `epoch_ms` where output was seen of late or an epoch would be large, and
//! never more than `most`.
//!
//! ```text
//!              calm, costs enough, small: up by half
//!          +--------------------------------------------+
//!          v                                            |
//!   epoch_ms ---> 1.5 ---> 2.25 ---> ... ---> most -----+
//!          ^                                            |
//!          +--------------------------------------------+
//!              output waited; or down as the dirty set grows
//! ```
//!
//! A seal costs the guest its pause, and afterwards a fault for each page that it writes again. Both
//! are paid once for each epoch, so epochs eight times as long have seven eighths of it back; more
//! is hardly worth what a failure then makes the backup compute again. Nothing else is lost:
//! output is sealed at once whatever the interval.

use std::time::Duration;

/// An interval is at most so many times `epoch_ms` unless told otherwise...
const TIMES_MAX: u32 = 8;
/// ... and, where `epoch_ms` is not longer itself, this: what a take-over computes again.
const LONGEST: Duration = Duration::from_millis(250);
/// Seals in a row without output until nobody is taken to wait: 0.2 s by default.
const CALM_SEALS: u32 = 8;
/// A seal that costs less than this part of `epoch_ms` is not worth making it rare.
const WORTH_PARTS: u32 = 512;
/// The least that the first write to a page costs on any host once it is tracked again: an exit.
const FAULT: Duration = Duration::from_micros(1);

/// The interval, and what it depends on.
#[derive(Clone, Debug)]
pub(super) struct Stretch {
    base: Duration,
    most: Duration,
    interval: Duration,
    calm: u32,
}

impl Stretch {
    /// From `base` to `most`; `None`: as far as is sensible.
    pub(super) fn new(base: Duration, most: Option<Duration>) -> Self {
        let sensible = || (base * TIMES_MAX).min(LONGEST);
        let most = most.unwrap_or_else(sensible).max(base);
        Self { base, most, interval: base, calm: 0 }
    }

    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    pub(super) fn is_stretched(&self) -> bool {
        self.interval > self.base
    }

    /// Never again: what the guest writes meanwhile cannot be watched.
    pub(super) fn forgo(&mut self) {
        (self.most, self.interval) = (self.base, self.base);
    }

    /// Somebody waits for output.
    pub(super) fn output(&mut self) {
        (self.calm, self.interval) = (0, self.base);
    }

    /// An epoch of `took` has `pages`, of which `small` are sent in less than `epoch_ms`; the guest
    /// `stood` for it.
    pub(super) fn sealed(&mut self, pages: u64, small: u64, took: Duration, stood: Duration) {
        self.calm = self.calm.saturating_add(1);
        let faults = FAULT.saturating_mul(u32::try_from(pages).unwrap_or(u32::MAX));
        let is_worth_it = stood.saturating_add(faults) >= self.base / WORTH_PARTS;
        if self.calm < CALM_SEALS || !is_worth_it {
            self.interval = self.base;
            return;
        }
        // At this rate so long an epoch is as large as one may be.
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let fits = match pages {
            0 => Duration::MAX,
            pages => Duration::from_micros(small.saturating_mul(micros) / pages),
        };
        let up = self.interval + self.interval / 2;
        self.interval = up.min(fits).min(self.most).max(self.base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const US: Duration = Duration::from_micros(1);
    const BASE: Duration = Duration::from_millis(25);

    /// Seals `count` epochs of the present length, of `pages`.
    fn seal(stretch: &mut Stretch, count: u32, pages: u64, stood: Duration) {
        for _ in 0..count {
            stretch.sealed(pages, 8000, stretch.interval(), stood);
        }
    }

    fn calm() -> Stretch {
        let mut stretch = Stretch::new(BASE, None);
        seal(&mut stretch, 50, 10, 300 * US);
        stretch
    }

    #[test]
    fn a_calm_guest_s_epochs_grow_by_halves() {
        let mut stretch = Stretch::new(BASE, None);
        seal(&mut stretch, CALM_SEALS - 1, 10, 300 * US);
        assert!(!stretch.is_stretched());
        let mut before = BASE;
        for _ in 0..5 {
            seal(&mut stretch, 1, 10, 300 * US);
            assert_eq!(stretch.interval(), before + before / 2);
            before = stretch.interval();
        }
        seal(&mut stretch, 10, 10, 300 * US);
        assert_eq!(stretch.interval(), 8 * BASE);
    }

    #[test]
    fn output_ends_it_at_once() {
        let mut stretch = calm();
        stretch.output();
        assert_eq!(stretch.interval(), BASE);
        seal(&mut stretch, CALM_SEALS - 1, 10, 300 * US);
        assert_eq!(stretch.interval(), BASE, "and for a while");
        for _ in 0..100 {
            stretch.output();
            seal(&mut stretch, CALM_SEALS - 1, 10, 300 * US);
            assert_eq!(stretch.interval(), BASE, "again and again");
        }
    }

    #[test]
    fn dirt_ends_it_as_far_as_it_goes() {
        let mut stretch = calm();
        stretch.sealed(16_000, 8000, 200 * MS, 300 * US);
        assert_eq!(stretch.interval(), 100 * MS);
        stretch.sealed(16_000, 8000, 30 * MS, 300 * US);
        assert_eq!(stretch.interval(), BASE);
        stretch.sealed(u64::MAX, 8000, 30 * MS, 300 * US);
        assert_eq!(stretch.interval(), BASE);
        // A set that does not grow with the time is no reason.
        let mut stretch = Stretch::new(BASE, None);
        seal(&mut stretch, 50, 4000, 300 * US);
        assert_eq!(stretch.interval(), 8 * BASE);
    }

    #[test]
    fn what_costs_nothing_is_not_made_rare() {
        let mut stretch = Stretch::new(BASE, None);
        seal(&mut stretch, 50, 4, 40 * US);
        assert!(!stretch.is_stretched());
        seal(&mut stretch, 50, 50, 40 * US);
        assert!(stretch.is_stretched(), "faults count");
        let mut stretch = Stretch::new(BASE, None);
        seal(&mut stretch, 50, 0, 50 * US);
        assert!(stretch.is_stretched(), "a pause counts");
    }

    #[test]
    fn the_longest_is_bounded() {
        for (base_ms, most_ms, expected_ms) in [
            (1, None, 8),
            (100, None, 250),
            (250, None, 250),
            (1000, None, 1000),
            (25, Some(25), 25),
            (25, Some(1000), 1000),
            (25, Some(3), 25),
        ] {
            let mut stretch = Stretch::new(base_ms * MS, most_ms.map(|ms: u32| ms * MS));
            seal(&mut stretch, 100, 1, 10 * MS);
            assert_eq!(stretch.interval(), expected_ms * MS, "{base_ms} {most_ms:?}");
        }
    }

    #[test]
    fn what_cannot_be_watched_is_not_stretched() {
        let mut stretch = calm();
        stretch.forgo();
        seal(&mut stretch, 50, 10, 300 * US);
        assert_eq!(stretch.interval(), BASE);
    }
}
