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
        Some(Self { min, median: figures[figures.len() / 2], max })
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
    fn the_median_is_in_the_middle() {
        let summary = Summary::of(vec![5000, 1000, 3200]).unwrap();
        assert_eq!(summary.to_string(), "min 1.0 ms, median 3.2 ms, max 5.0 ms");
        assert_eq!(Summary::of(Vec::new()), None);
    }
}
