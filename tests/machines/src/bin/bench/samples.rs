//! Figures of one column of a row, turn by turn, and what is said of them.

use serde::Serialize;

/// What was measured in several turns. The unit is the row's.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    turns: Vec<Vec<f64>>,
}

/// What is said of all turns together.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    pub count: usize,
    pub median: f64,
    pub p25: f64,
    pub p75: f64,
    pub p99: f64,
    pub min: f64,
    pub max: f64,
    /// Of each turn, in the order in which they were made.
    pub turn_medians: Vec<f64>,
}

impl Samples {
    /// Adds a turn; one without figures is none.
    pub fn add(&mut self, turn: Vec<f64>) {
        if !turn.is_empty() {
            self.turns.push(turn);
        }
    }

    /// `None` without a figure.
    #[must_use]
    pub fn stats(&self) -> Option<Stats> {
        let all = sorted(self.turns.concat());
        let (min, max) = (*all.first()?, *all.last()?);
        let at = |percent| rank(&all, percent);
        let turn_medians = self.turns.iter().map(|turn| middle(&sorted(turn.clone())));
        Some(Stats {
            count: all.len(),
            median: middle(&all),
            p25: at(25),
            p75: at(75),
            p99: at(99),
            min,
            max,
            turn_medians: turn_medians.collect(),
        })
    }

    #[must_use]
    pub fn median(&self) -> Option<f64> {
        Some(self.stats()?.median)
    }
}

fn sorted(mut figures: Vec<f64>) -> Vec<f64> {
    figures.sort_unstable_by(f64::total_cmp);
    figures
}

/// The figure in the middle, of an even number the mean of the two there. Of one figure at least.
fn middle(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) }
}

/// The smallest figure that `percent` of 100 do not exceed, as `replication-info` has it. Of one
/// figure at least.
fn rank(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[rank - 1]
}

/// A count as a float; exact below 2^53.
#[must_use]
pub fn float(count: u64) -> f64 {
    let [high, low] = [count >> 32, count & u64::from(u32::MAX)]
        .map(|half| f64::from(u32::try_from(half).unwrap_or(u32::MAX)));
    high * 4_294_967_296.0 + low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_pooled_and_kept_apart() {
        let mut samples = Samples::default();
        assert!(samples.stats().is_none());
        samples.add(vec![3.0, 1.0, 2.0]);
        samples.add(vec![]);
        samples.add(vec![10.0]);
        let stats = samples.stats().unwrap();
        // Not the better one of the two in the middle.
        assert_eq!((stats.count, stats.median, stats.p99, stats.max), (4, 2.5, 10.0, 10.0));
        assert_eq!(stats.turn_medians, [2.0, 10.0]);
    }

    #[test]
    fn large_counts_are_floats() {
        assert_eq!(float(5), 5.0);
        assert_eq!(float((7 << 32) + 9), 30_064_771_081.0);
    }
}
