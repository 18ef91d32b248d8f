//! The order in which pages are visited.

use core::ops::Range;

use crate::random::{Random, mix};

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

/// A fixed set of pages: runs of adjacent ones, each somewhere in a cell of its own of all memory.
/// Slots of the set ascend as its pages do, and no two have the same page.
#[derive(Clone, Debug)]
pub struct Scatter {
    pages: u64,
    run: u64,
    /// Pages from the start of one run's cell to the next one's.
    cell: u64,
    seed: u64,
}

impl Scatter {
    /// `set` of `count` pages, in runs of `run`. What does not fit becomes one run.
    #[must_use]
    pub fn new(count: u64, set: u64, run: u64, seed: u64) -> Self {
        let pages = set.min(count);
        let run = run.clamp(1, pages.max(1));
        let cell = count.checked_div(pages.div_ceil(run)).unwrap_or(0);
        let (run, cell) = if cell < run { (pages.max(1), count) } else { (run, cell) };
        Self { pages, run, cell, seed }
    }

    /// Pages of the set.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The page of a slot below [`Scatter::pages`].
    #[must_use]
    pub fn page(&self, slot: u64) -> u64 {
        let (run, within) = (slot / self.run, slot % self.run);
        let room = self.cell - self.run.min(self.cell) + 1;
        run * self.cell + mix(self.seed ^ mix(run)) % room + within
    }
}

/// A [`Scatter`] dealt out run by run to several sets of the same size, each scattered like the whole.
#[derive(Clone, Debug)]
pub struct Dealt {
    whole: Scatter,
    sets: u64,
}

impl Dealt {
    /// `sets` sets of `set` of `count` pages each, in runs of `run`.
    #[must_use]
    pub fn new(count: u64, (set, sets): (u64, u64), run: u64, seed: u64) -> Self {
        let sets = sets.max(1);
        // Whole runs, so that each set has as many.
        let set = if sets > 1 { set.next_multiple_of(run.max(1)) } else { set };
        Self { whole: Scatter::new(count, set.saturating_mul(sets), run, seed), sets }
    }

    /// Pages of all sets.
    #[must_use]
    pub fn whole(&self) -> &Scatter {
        &self.whole
    }

    /// Pages of each set.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.whole.pages() / self.sets
    }

    /// The page of a slot below [`Dealt::pages`] of the set that round `round` has.
    #[must_use]
    pub fn page(&self, round: u64, slot: u64) -> u64 {
        let run = self.whole.run;
        let dealt = (slot / run * self.sets + round % self.sets) * run + slot % run;
        // Where memory was too small for all, the last runs are not whole.
        self.whole.page(dealt.min(self.whole.pages().saturating_sub(1)))
    }
}

/// Goes through slots once in each period, as fast as it can, and then waits for the next one.
#[derive(Clone, Debug)]
pub struct Rounds {
    slots: Range<u64>,
    next: u64,
    period_ns: u64,
    /// When the next round begins.
    round_ns: u64,
    /// Rounds that have begun.
    begun: u64,
}

impl Rounds {
    /// The first round begins now. A period of 0 has no waits.
    #[must_use]
    pub fn new(slots: Range<u64>, period_ns: u64, now_ns: u64) -> Self {
        let next = slots.end;
        Self { slots, next, period_ns, round_ns: now_ns, begun: 0 }
    }

    /// The slots whose turn it is, at most `batch`. A round that is late is not made up for.
    pub fn due(&mut self, now_ns: u64, batch: u64) -> Range<u64> {
        if self.next == self.slots.end && now_ns >= self.round_ns {
            self.next = self.slots.start;
            self.begun = self.begun.wrapping_add(1);
            self.round_ns = self.round_ns.saturating_add(self.period_ns).max(now_ns);
        }
        let start = self.next;
        self.next = self.slots.end.min(start.saturating_add(batch));
        start..self.next
    }

    /// Number of the round under way, from 1 on.
    #[must_use]
    pub fn round(&self) -> u64 {
        self.begun
    }

    /// When there is something to do; `u64::MAX` without slots.
    #[must_use]
    pub fn next_ns(&self) -> u64 {
        match (self.slots.is_empty(), self.next < self.slots.end) {
            (true, _) => u64::MAX,
            (false, true) => 0,
            (false, false) => self.round_ns,
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

    #[test]
    fn a_scattered_set_has_its_pages_once_each_in_runs() {
        for (count, set, run) in
            [(262_144, 1000, 1), (262_144, 10_000, 64), (1000, 1000, 7), (70, 65, 64), (5, 9, 2)]
        {
            let scatter = Scatter::new(count, set, run, 11);
            assert_eq!(scatter.pages(), set.min(count));
            let pages: Vec<u64> = (0..scatter.pages()).map(|slot| scatter.page(slot)).collect();
            assert!(pages.is_sorted_by(|a, b| a < b), "{count} {set} {run}");
            assert!(pages.iter().all(|page| *page < count));
        }
        let scatter = Scatter::new(262_144, 10_000, 64, 11);
        let pages: Vec<u64> = (0..10_000).map(|slot| scatter.page(slot)).collect();
        let breaks = pages.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
        assert!((150..157).contains(&breaks), "{breaks}");
        assert!(pages[9999] > 255_000);
        assert_eq!(Scatter::new(0, 10, 4, 1).pages(), 0);
    }

    #[test]
    fn another_seed_is_another_set() {
        let set = |seed| -> Vec<u64> {
            let scatter = Scatter::new(262_144, 1000, 1, seed);
            (0..1000).map(|slot| scatter.page(slot)).collect()
        };
        assert_eq!(set(1), set(1));
        let (first, second) = (set(1), set(2));
        let same = first.iter().zip(&second).filter(|(a, b)| a == b).count();
        assert!(same < 50, "{same}");
    }

    #[test]
    fn dealt_sets_have_no_page_in_common() {
        for (set, sets, run) in [(10_000, 4, 64), (1000, 7, 1), (100, 1, 64)] {
            let dealt = Dealt::new(262_144, (set, sets), run, 5);
            assert!(dealt.pages() >= set && dealt.pages() < set + run);
            let of = |round| (0..dealt.pages()).map(move |slot| (round, slot));
            let all = (1..=sets).flat_map(of).map(|(round, slot)| dealt.page(round, slot));
            let mut all: Vec<u64> = all.collect();
            all.sort_unstable();
            assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "{set} {sets} {run}");
            assert_eq!(dealt.page(1, 3), dealt.page(1 + sets, 3));
        }
        // More than there is.
        let dealt = Dealt::new(100, (64, 4), 16, 5);
        assert!((0..dealt.pages()).all(|slot| dealt.page(3, slot) < 100));
    }

    #[test]
    fn a_round_goes_through_the_slots_once_a_period() {
        let mut rounds = Rounds::new(10..15, 100, 1000);
        assert_eq!(rounds.next_ns(), 1000);
        assert!(rounds.due(999, 3).is_empty());
        assert_eq!(rounds.due(1000, 3), 10..13);
        assert_eq!(rounds.next_ns(), 0);
        assert_eq!(rounds.due(1050, 3), 13..15);
        assert_eq!(rounds.next_ns(), 1100);
        assert!(rounds.due(1099, 3).is_empty());
        assert_eq!(rounds.due(1100, 9), 10..15);
        // Late by many rounds: the next one at once, no more.
        assert_eq!(rounds.due(1990, 9), 10..15);
        assert_eq!(rounds.next_ns(), 1990);
        assert_eq!(rounds.due(1990, 9), 10..15);
        assert_eq!(rounds.next_ns(), 2090);
    }

    #[test]
    fn no_period_no_wait_and_no_slots_no_work() {
        let mut rounds = Rounds::new(0..2, 0, 5);
        for _ in 0..3 {
            assert_eq!(rounds.due(5, 9), 0..2);
            assert!(rounds.next_ns() <= 5);
        }
        let mut none = Rounds::new(3..3, 0, 5);
        assert!(none.due(5, 9).is_empty());
        assert_eq!(none.next_ns(), u64::MAX);
    }
}
