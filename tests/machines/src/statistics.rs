//! Minimum, median, maximum of a few figures.

use std::fmt;

/// A summary in the unit of what went in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub min: u64,
    pub median: u64,
    pub max: u64,
}

impl Summary {
    /// `None` of nothing.
    #[must_use]
    pub fn of(mut figures: Vec<u64>) -> Option<Self> {
        figures.sort_unstable();
        let (min, max) = (*figures.first()?, *figures.last()?);
        // Of an odd number both are the one in the middle.
        let (lower, upper) = (figures[(figures.len() - 1) / 2], figures[figures.len() / 2]);
        Some(Self { min, median: lower.midpoint(upper), max })
    }
}

impl fmt::Display for Summary {
    /// In milliseconds, of microseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |us: u64| format!("{}.{}", us / 1000, us % 1000 / 100);
        let (min, median, max) = (ms(self.min), ms(self.median), ms(self.max));
        write!(f, "min {min} ms, median {median} ms, max {max} ms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_or_between_the_two_that_are() {
        let text = |figures: &[u64]| Summary::of(figures.to_vec()).unwrap().to_string();
        assert_eq!(text(&[5000, 1000, 3200]), "min 1.0 ms, median 3.2 ms, max 5.0 ms");
        assert_eq!(text(&[7000]), "min 7.0 ms, median 7.0 ms, max 7.0 ms");
        assert_eq!(text(&[3000, 1000]), "min 1.0 ms, median 2.0 ms, max 3.0 ms");
        assert_eq!(text(&[9000, 1000, 4000, 3000]), "min 1.0 ms, median 3.5 ms, max 9.0 ms");
        let median = Summary::of(vec![u64::MAX, u64::MAX]).map(|summary| summary.median);
        assert_eq!(median, Some(u64::MAX));
        assert_eq!(Summary::of(Vec::new()), None);
    }
}
