//! The order in which pages are visited.

use crate::random::Random;

/// Visits in a row, and then somewhere else.
const STRETCH: u64 = 64;
const JUMPS: u64 = 16;

/// Sequential stretches with pseudo-random visits between them; the stretches alone reach every
/// page once in a pass.
#[derive(Clone, Debug)]
pub struct Mixed {
    count: u64,
    cursor: u64,
    step: u64,
    random: Random,
}

/// One visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    pub slot: u64,
    /// Every page has been visited since the last visit that said so.
    pub pass_done: bool,
}

impl Mixed {
    #[must_use]
    pub fn new(count: u64, seed: u64) -> Self {
        Self { count, cursor: 0, step: 0, random: Random::new(seed) }
    }

    /// None where there are no pages.
    pub fn visit(&mut self) -> Option<Visit> {
        if self.count == 0 {
            return None;
        }
        let step = self.step;
        self.step = (step + 1) % (STRETCH + JUMPS);
        if step >= STRETCH {
            return Some(Visit { slot: self.random.below(self.count), pass_done: false });
        }
        let slot = self.cursor;
        self.cursor = (slot + 1) % self.count;
        Some(Visit { slot, pass_done: self.cursor == 0 })
    }
}

/// How the `dirty` workload chooses pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Sequential,
    Random,
    /// Nine of ten writes go to the first `hot` pages, the tenth anywhere.
    Hot {
        hot: u64,
    },
}

/// Pages to write, without end.
#[derive(Clone, Debug)]
pub struct Writes {
    pattern: Pattern,
    count: u64,
    cursor: u64,
    random: Random,
}

impl Writes {
    #[must_use]
    pub fn new(pattern: Pattern, count: u64, seed: u64) -> Self {
        Self { pattern, count, cursor: 0, random: Random::new(seed) }
    }

    /// The next page's place.
    pub fn slot(&mut self) -> u64 {
        match self.pattern {
            Pattern::Sequential => {
                let slot = self.cursor;
                self.cursor = (slot + 1).checked_rem(self.count).unwrap_or(0);
                slot
            }
            Pattern::Hot { hot } if self.random.below(10) != 0 => {
                self.random.below(hot.min(self.count))
            }
            Pattern::Random | Pattern::Hot { .. } => self.random.below(self.count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_visits_every_page() {
        for count in [1, 2, 63, 64, 65, 1000] {
            let mut order = Mixed::new(count, 3);
            for _ in 0..3 {
                let mut seen = vec![false; usize::try_from(count).unwrap()];
                loop {
                    let visit = order.visit().unwrap();
                    seen[usize::try_from(visit.slot).unwrap()] = true;
                    if visit.pass_done {
                        break;
                    }
                }
                assert!(seen.iter().all(|seen| *seen), "count {count}");
            }
        }
        assert_eq!(Mixed::new(0, 3).visit(), None);
    }

    #[test]
    fn some_visits_jump() {
        let mut order = Mixed::new(1_000_000, 3);
        let slots: Vec<u64> = (0..160).map(|_| order.visit().unwrap().slot).collect();
        assert!(slots.iter().any(|slot| *slot > 1000));
        assert_eq!(slots[80], 64);
    }

    #[test]
    fn a_hot_set_is_hot() {
        let mut writes = Writes::new(Pattern::Hot { hot: 10 }, 100_000, 3);
        let hot = (0..10_000).filter(|_| writes.slot() < 10).count();
        assert!((8500..9500).contains(&hot), "{hot}");
    }

    #[test]
    fn sequential_writes_wrap() {
        let mut writes = Writes::new(Pattern::Sequential, 3, 0);
        assert_eq!([(); 5].map(|()| writes.slot()), [0, 1, 2, 0, 1]);
    }
}
