//! What pays: a pure rule over costs that were measured, and the averages that it looks at.
//!
//! Enters: how long the link took for bytes to be written, and to arrive; how long an encoding took for
//! a page and what came of it. Leaves: a [`Choice`]. Always holds: nothing is chosen that was not
//! tried, and an encoding is begun only where it saves a good part of the time, so that one that
//! hardly pays does not come and go.
//!
//! ```text
//!   raw            4096 × link
//!   lz4            its time + its bytes × link              (4096 bytes if it did not fit)
//!   delta          its time + share that fits × its bytes × link + the other pages by raw or lz4
//! ```
//!
//! The times are added up although a sender encodes while the socket empties: so an encoding has to
//! pay even if nothing of it is hidden.

use std::time::Duration;

use crate::ids::PAGE_SIZE;

/// What a sender does with pages that are not zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Compare each with what the peer has.
    pub delta: bool,
    /// Compress those that are no delta.
    pub lz4: bool,
}

/// Tries after which something is known.
const TRIES_MIN: u32 = 4;
/// Values over which an average goes, in effect.
const WEIGHT: u32 = 32;
/// Fraction bits of an average, and of a share.
const FRACTION: u32 = 8;
const WHOLE: u64 = 1024;

/// An average that forgets.
#[derive(Clone, Copy, Debug, Default)]
struct Average {
    value: u64,
    count: u32,
}

impl Average {
    fn add(&mut self, value: u64) {
        self.count = (self.count + 1).min(WEIGHT);
        let (count, value) = (u64::from(self.count), value.min(u64::MAX >> 24) << FRACTION);
        self.value = (self.value * (count - 1) + value) / count;
    }

    /// Like [`Average::add`], for times of the same work: down at once, up slowly and not far,
    /// since a thread that lost its processor in between has not worked longer.
    fn add_time(&mut self, value: u64) {
        let average = self.get();
        if self.count == 0 || value >= average {
            let most = if self.count == 0 { value } else { 2 * average };
            return self.add(value.min(most));
        }
        self.count = (self.count + 1).min(WEIGHT);
        self.value -= ((average - value) << FRACTION) / 4;
    }

    fn get(self) -> u64 {
        self.value >> FRACTION
    }

    fn is_known(self) -> bool {
        self.count >= TRIES_MIN
    }
}

/// What one encoding costs and brings.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Of a page, whether it fitted or not.
    ns: Average,
    /// How many pages of [`WHOLE`] fitted.
    share: Average,
    /// Of a page that fitted.
    bytes: Average,
}

impl Cost {
    /// A page took this long.
    pub fn took(&mut self, time: Duration) {
        self.ns.add_time(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// A page became so many bytes; `None`: it did not fit.
    pub fn became(&mut self, bytes: Option<usize>) {
        self.share.add(if bytes.is_some() { WHOLE } else { 0 });
        if let Some(bytes) = bytes {
            self.bytes.add(bytes as u64);
        }
    }

    /// Whether it was tried often enough.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.ns.is_known() && self.share.is_known()
    }

    /// Nanoseconds for a page, where one that did not fit takes `rest`.
    fn time(&self, link: &Link, rest: u64) -> u64 {
        let share = self.share.get();
        let sent = link.ns(self.bytes.get());
        let (sent, rest) = (sent.saturating_mul(share), rest.saturating_mul(WHOLE - share));
        self.ns.get() + sent.saturating_add(rest) / WHOLE
    }
}

/// How long the link takes for bytes: as writing them takes, or, where they wait in a large buffer
/// after that, as their acknowledgements do, whichever is longer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Link {
    /// Picoseconds for a byte.
    ps: Average,
    /// Of bytes that arrived; few values count, for each is of many bytes already.
    carried_ps: Option<u64>,
}

impl Link {
    /// So many bytes took so long.
    pub fn took(&mut self, bytes: u64, time: Duration) {
        let ps = time.as_nanos().saturating_mul(1000) / u128::from(bytes.max(1));
        self.ps.add(u64::try_from(ps).unwrap_or(u64::MAX));
    }

    /// So many bytes arrived in a second. If that is the `least`, it only shows that the link is not
    /// slower: there was not always something to send.
    pub fn carried(&mut self, bytes_per_s: u64, is_least: bool) {
        let ps = 1_000_000_000_000 / bytes_per_s.max(1);
        self.carried_ps = match self.carried_ps {
            None if is_least => None,
            Some(old) if is_least && ps >= old => Some(old),
            None => Some(ps),
            Some(old) => Some(old - old / 4 + ps / 4),
        };
    }

    /// Whether it was seen often enough.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.ps.is_known() || self.carried_ps.is_some()
    }

    fn ns(&self, bytes: u64) -> u64 {
        self.ps.get().max(self.carried_ps.unwrap_or(0)).saturating_mul(bytes) / 1000
    }
}

/// All that is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    pub link: Link,
    pub delta: Cost,
    pub lz4: Cost,
}

/// Parts of 8 of the time without an encoding below which it is begun, and kept.
const BEGUN: u64 = 6;
const KEPT: u64 = 7;

/// What pays, where `before` is what was done until now.
#[must_use]
pub fn choose(costs: &Costs, before: Choice) -> Choice {
    let Costs { link, delta, lz4 } = costs;
    if !link.is_known() {
        return Choice::default();
    }
    let pays = |with: u64, without: u64, is_on: bool| {
        with < without.saturating_mul(if is_on { KEPT } else { BEGUN }) / 8
    };
    let raw = link.ns(PAGE_SIZE as u64);
    let compressed = lz4.time(link, raw);
    let use_lz4 = lz4.is_known() && pays(compressed, raw, before.lz4);
    let rest = if use_lz4 { compressed } else { raw };
    let compared = delta.time(link, rest);
    let use_delta = delta.is_known() && pays(compared, rest, before.delta);
    Choice { delta: use_delta, lz4: use_lz4 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Choice = Choice { delta: false, lz4: false };
    const DELTA: Choice = Choice { delta: true, lz4: false };
    const LZ4: Choice = Choice { delta: false, lz4: true };
    const BOTH: Choice = Choice { delta: true, lz4: true };

    fn link(megabytes_s: u64) -> Link {
        let mut link = Link::default();
        (0..100).for_each(|_| link.took(megabytes_s << 20, Duration::from_secs(1)));
        link
    }

    /// `taken` of 10 pages become `bytes`.
    fn cost(ns: u64, taken: usize, bytes: usize) -> Cost {
        let mut cost = Cost::default();
        for turn in 0..400 {
            cost.took(Duration::from_nanos(ns));
            cost.became((turn % 10 < taken).then_some(bytes));
        }
        cost
    }

    fn chosen(link: Link, delta: Cost, lz4: Cost) -> Choice {
        choose(&Costs { link, delta, lz4 }, NONE)
    }

    #[test]
    fn nothing_is_chosen_before_it_is_known() {
        let slow = link(10);
        assert_eq!(chosen(Link::default(), cost(1, 10, 10), cost(1, 10, 10)), NONE);
        assert_eq!(chosen(slow, Cost::default(), Cost::default()), NONE);
        let mut tried = Cost::default();
        for _ in 0..TRIES_MIN {
            assert_eq!(chosen(slow, tried, tried), NONE);
            tried.took(Duration::from_nanos(500));
            tried.became(Some(100));
        }
        assert_ne!(chosen(slow, tried, tried), NONE);
    }

    #[test]
    fn a_slow_link_takes_what_is_small() {
        let (small, half) = (cost(600, 10, 100), cost(5000, 10, 2000));
        // 100 MB/s: 39 µs a page.
        assert_eq!(chosen(link(100), small, half), BOTH);
        assert_eq!(chosen(link(100), cost(600, 0, 0), half), LZ4);
        assert_eq!(chosen(link(100), small, cost(5000, 0, 0)), DELTA);
    }

    #[test]
    fn a_fast_link_takes_pages_as_they_are() {
        // 4 GB/s: 1 µs a page.
        let fast = link(4000);
        assert_eq!(chosen(fast, cost(900, 10, 100), cost(5000, 10, 400)), NONE);
        assert_eq!(chosen(fast, cost(900, 1, 100), cost(5000, 1, 400)), NONE);
        // Comparing pays even there if it takes half as long as sending and nearly all fit.
        assert_eq!(chosen(fast, cost(400, 10, 100), cost(5000, 10, 400)), DELTA);
    }

    #[test]
    fn a_buffer_does_not_hide_a_slow_link() {
        let (small, half) = (cost(600, 10, 100), cost(5000, 10, 2000));
        // Written at 4 GB/s, carried at 50 MB/s: one look is enough.
        let mut hidden = link(4000);
        assert_eq!(chosen(hidden, cost(900, 10, 100), half), NONE);
        hidden.carried(50_000_000, true);
        assert_eq!(chosen(hidden, cost(900, 10, 100), half), NONE, "perhaps it carries more");
        hidden.carried(50_000_000, false);
        assert_eq!(chosen(hidden, small, half), BOTH);
        // A few bytes say nothing to the contrary; that more arrived does.
        hidden.carried(1_000_000, true);
        assert_eq!(chosen(hidden, small, half), BOTH);
        (0..30).for_each(|_| hidden.carried(4_000_000_000, true));
        assert_eq!(chosen(hidden, cost(900, 10, 100), half), NONE);
        // Nothing was written yet that would have told.
        let mut unknown = Link::default();
        assert!(!unknown.is_known());
        unknown.carried(50_000_000, false);
        assert_eq!(chosen(unknown, small, half), BOTH);
        // A peer that takes slowly what the link carries fast.
        let mut slow = link(50);
        (0..30).for_each(|_| slow.carried(4_000_000_000, false));
        assert_eq!(chosen(slow, small, half), BOTH);
    }

    #[test]
    fn what_does_not_fit_often_enough_does_not_pay() {
        let slow = link(100);
        let noise = cost(5000, 0, 0);
        assert_eq!(chosen(slow, cost(600, 2, 100), noise), NONE);
        assert_eq!(chosen(slow, cost(600, 4, 100), noise), DELTA);
    }

    #[test]
    fn what_hardly_pays_is_kept_but_not_begun() {
        let slow = link(100);
        let noise = cost(5000, 0, 0);
        // A link that takes 39 µs for a page, of which a delta saves a third, a sixth, a twelfth.
        for (taken, begun) in [(4, true), (2, false)] {
            let costs = Costs { link: slow, delta: cost(600, taken, 100), lz4: noise };
            assert_eq!(choose(&costs, NONE).delta, begun, "{taken}");
            assert!(choose(&costs, DELTA).delta, "{taken}");
        }
        let costs = Costs { link: slow, delta: cost(600, 1, 100), lz4: noise };
        assert!(!choose(&costs, DELTA).delta);
    }

    #[test]
    fn it_changes_its_mind() {
        let mut costs =
            Costs { link: link(100), delta: cost(600, 0, 0), lz4: cost(5000, 10, 1000) };
        let mut choice = choose(&costs, NONE);
        assert_eq!(choice, LZ4);
        (0..200).for_each(|_| costs.link.took(1 << 20, Duration::from_micros(300)));
        choice = choose(&costs, choice);
        assert_eq!(choice, NONE);
        (0..200).for_each(|_| costs.delta.became(Some(80)));
        assert_eq!(choose(&costs, choice), DELTA);
    }

    #[test]
    fn a_thread_that_lost_its_processor_is_no_cost() {
        let mut cost = cost(9000, 10, 2000);
        for _ in 0..4 {
            cost.took(Duration::from_millis(4));
            (0..8).for_each(|_| cost.took(Duration::from_nanos(9000)));
        }
        assert!(cost.ns.get() < 9200, "{}", cost.ns.get());
        // The first try, too.
        let mut cost = Cost::default();
        cost.took(Duration::from_millis(4));
        (0..30).for_each(|_| cost.took(Duration::from_nanos(9000)));
        assert!(cost.ns.get() < 10_000, "{}", cost.ns.get());
        // Work that is more is seen in the end.
        (0..200).for_each(|_| cost.took(Duration::from_nanos(30_000)));
        assert!(cost.ns.get() > 28_000, "{}", cost.ns.get());
    }

    #[test]
    fn no_number_is_too_large() {
        let mut costs = Costs::default();
        for _ in 0..100 {
            costs.link.took(0, Duration::MAX);
            costs.link.carried(0, false);
            costs.link.carried(u64::MAX, true);
            costs.lz4.took(Duration::MAX);
            costs.lz4.became(Some(usize::MAX));
            costs.delta.took(Duration::ZERO);
            costs.delta.became(Some(0));
        }
        assert!(choose(&costs, NONE).delta);
    }
}
