//! Percentiles over a bounded window.

use std::time::Duration;

use api::replication::{PageCounts, Percentiles};

/// Most values that are remembered.
const VALUES_MAX: usize = 4096;

/// The last values of something, and its maximum ever.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    values: Vec<u64>,
    next: usize,
    last: u64,
    max: u64,
}

impl Window {
    pub(crate) fn add(&mut self, value: u64) {
        self.last = value;
        self.max = self.max.max(value);
        if self.values.len() < VALUES_MAX {
            self.values.push(value);
        } else {
            self.values[self.next] = value;
            self.next = (self.next + 1) % VALUES_MAX;
        }
    }

    /// Values that are remembered.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.values.len() as u64
    }

    pub(crate) fn add_time(&mut self, time: Duration) {
        self.add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// The smallest value that at least `percent` of 100 values do not exceed; 0 of none.
    fn percentile(sorted: &[u64], percent: usize) -> u64 {
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(0)
    }

    fn sorted(&self) -> Vec<u64> {
        let mut sorted = self.values.clone();
        sorted.sort_unstable();
        sorted
    }

    pub(crate) fn percentiles(&self) -> Percentiles {
        let sorted = self.sorted();
        Percentiles {
            last: self.last,
            p50: Self::percentile(&sorted, 50),
            p99: Self::percentile(&sorted, 99),
            max: self.max,
        }
    }

    pub(crate) fn page_counts(&self) -> PageCounts {
        let Percentiles { last, p50, p99, .. } = self.percentiles();
        PageCounts { last, p50, p99 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_hundred() {
        let mut window = Window::default();
        assert_eq!(window.percentiles(), Percentiles::default());
        (1..=100).rev().for_each(|value| window.add(value));
        let expected = Percentiles { last: 1, p50: 50, p99: 99, max: 100 };
        assert_eq!(window.percentiles(), expected);
    }

    #[test]
    fn old_values_leave_but_the_maximum_stays() {
        let mut window = Window::default();
        window.add(1_000_000);
        (0..VALUES_MAX).for_each(|_| window.add(7));
        let expected = Percentiles { last: 7, p50: 7, p99: 7, max: 1_000_000 };
        assert_eq!(window.percentiles(), expected);
        assert_eq!(window.values.len(), VALUES_MAX);
    }
}
