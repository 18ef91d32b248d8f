//! Sets of pages, as quick over much memory as over little.

use crate::ids::PageIndex;

/// A set of pages: one bit each, in words of 64 (a *group*), and above them one bit for each word
/// that is not zero. What it costs to go through a set depends on the pages in it; the memory's size
/// adds a bit for 64 pages: 16 GiB are 8 KiB of such bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    /// Which words are not zero: exactly those.
    summary: Vec<u64>,
    pages: u64,
}

/// The numbers of the bits that are set, ascending.
pub(crate) fn bits(word: u64) -> impl Iterator<Item = usize> {
    let mut rest = word;
    std::iter::from_fn(move || {
        (rest != 0).then(|| {
            let bit = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            bit
        })
    })
}

/// The word of a page that is in the universe.
fn group_of(page: u64) -> usize {
    usize::try_from(page / 64).expect("checked against the universe")
}

impl PageSet {
    /// The empty set over `pages` pages.
    ///
    /// # Panics
    /// If the host cannot address that many pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("pages fit the address space");
        Self { words: vec![0; words], summary: vec![0; words.div_ceil(64)], pages }
    }

    /// Number of pages that the set is over, in it or not.
    #[must_use]
    pub fn universe(&self) -> u64 {
        self.pages
    }

    /// The groups with a page in the set, ascending: their numbers and words, lowest page in the
    /// lowest bit; bits past the universe are zero.
    pub fn groups(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let summary = self.summary.iter().enumerate().filter(|(_, bits)| **bits != 0);
        summary
            .flat_map(|(at, word)| bits(*word).map(move |bit| at * 64 + bit))
            .map(|group| (group, self.words[group]))
    }

    /// The word of a group.
    ///
    /// # Panics
    /// If the group lies past the universe.
    #[must_use]
    pub fn word(&self, group: usize) -> u64 {
        assert!(group < self.words.len(), "a group past the universe");
        // Most are zero where this is asked of many, and the summary is in a cache then.
        let is_there = self.summary[group / 64] >> (group % 64) & 1 == 1;
        if is_there { self.words[group] } else { 0 }
    }

    /// Number of pages in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.groups().map(|(_, word)| u64::from(word.count_ones())).sum()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.summary.iter().all(|word| *word == 0)
    }

    /// Adds the pages of a group whose bits are set; they are of the universe.
    fn add(&mut self, group: usize, word: u64) {
        if word != 0 {
            self.words[group] |= word;
            self.summary[group / 64] |= 1 << (group % 64);
        }
    }

    /// Adds a page.
    ///
    /// # Panics
    /// If the page lies past the universe.
    pub fn insert(&mut self, page: PageIndex) {
        assert!(page.0 < self.pages, "page {page} of {}", self.pages);
        self.add(group_of(page.0), 1 << (page.0 % 64));
    }

    /// Removes a page, if it is in the set.
    pub fn remove(&mut self, page: PageIndex) {
        if !self.contains(page) {
            return;
        }
        let group = group_of(page.0);
        self.words[group] &= !(1 << (page.0 % 64));
        if self.words[group] == 0 {
            self.summary[group / 64] &= !(1 << (group % 64));
        }
    }

    /// Removes every page of `other`.
    ///
    /// # Panics
    /// If the universes differ.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets over different memories");
        for (group, word) in other.groups() {
            self.words[group] &= !word;
            if self.words[group] == 0 {
                self.summary[group / 64] &= !(1 << (group % 64));
            }
        }
    }

    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[group_of(page.0)] & (1 << (page.0 % 64)) != 0
    }

    /// Adds 64 pages from `first` on as far as their bits are set.
    ///
    /// # Panics
    /// If a set bit lies past the universe.
    pub fn insert_word(&mut self, first: PageIndex, word: u64) {
        if word == 0 {
            return;
        }
        let last = first.0 + u64::from(63 - word.leading_zeros());
        assert!(last < self.pages, "page {last} of {}", self.pages);
        let shift = first.0 % 64;
        let group = group_of(first.0);
        self.add(group, word << shift);
        if shift != 0 && word >> (64 - shift) != 0 {
            self.add(group + 1, word >> (64 - shift));
        }
    }

    /// Adds every page of `other`.
    ///
    /// # Panics
    /// If the universes differ.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets over different memories");
        for (group, word) in other.groups() {
            self.add(group, word);
        }
    }

    /// Adds its pages to each of `others`, and empties it.
    ///
    /// # Panics
    /// If the universes differ.
    pub fn drain_into(&mut self, others: [&mut Self; 2]) {
        for other in others {
            other.union(self);
        }
        self.clear();
    }

    /// Removes every page that is not in `other`.
    ///
    /// # Panics
    /// If the universes differ.
    pub fn intersect(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets over different memories");
        for at in 0..self.summary.len() {
            for bit in bits(self.summary[at]) {
                let group = at * 64 + bit;
                self.words[group] &= other.words[group];
                if self.words[group] == 0 {
                    self.summary[at] &= !(1 << bit);
                }
            }
        }
    }

    /// Adds `count` pages from `first` on.
    ///
    /// # Panics
    /// If a page lies past the universe.
    pub fn insert_range(&mut self, first: PageIndex, count: u64) {
        let end = first.0.checked_add(count).filter(|end| *end <= self.pages);
        let end = end.expect("pages of this memory");
        let mut at = first.0;
        while at < end {
            let part = (64 - at % 64).min(end - at);
            self.add(group_of(at), (u64::MAX >> (64 - part)) << (at % 64));
            at += part;
        }
    }

    pub fn clear(&mut self) {
        for at in 0..self.summary.len() {
            for bit in bits(std::mem::take(&mut self.summary[at])) {
                self.words[at * 64 + bit] = 0;
            }
        }
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.groups().flat_map(|(group, word)| {
            bits(word).map(move |bit| PageIndex(group as u64 * 64 + bit as u64))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_inserted_and_intersected() {
        for (first, count) in
            [(0, 0), (0, 1), (5, 59), (5, 60), (0, 64), (63, 2), (60, 200), (0, 300)]
        {
            let mut set = PageSet::new(300);
            set.insert_range(PageIndex(first), count);
            let pages: Vec<_> = set.iter().map(|page| page.0).collect();
            assert_eq!(pages, (first..first + count).collect::<Vec<_>>());
            let mut other = PageSet::new(300);
            other.insert_range(PageIndex(62), 10);
            set.intersect(&other);
            assert!(set.iter().all(|page| (62..72).contains(&page.0) && page.0 >= first));
        }
    }

    /// The same set as plain numbers.
    fn model(set: &PageSet) -> Vec<u64> {
        let words = set.words.iter().enumerate();
        let pages = words.flat_map(|(at, word)| bits(*word).map(move |bit| (at * 64 + bit) as u64));
        for (at, word) in set.words.iter().enumerate() {
            let says = set.summary[at / 64] >> (at % 64) & 1 == 1;
            assert_eq!(says, *word != 0, "the summary of group {at}");
            assert_eq!(set.word(at), *word);
        }
        pages.collect()
    }

    #[test]
    fn a_summary_says_exactly_which_words_there_are() {
        let pages = 64 * 64 * 3 + 17;
        let mut set = PageSet::new(pages);
        let mut other = PageSet::new(pages);
        for page in [0, 63, 64, 4095, 4096, 8191, 8192, pages - 1] {
            set.insert(PageIndex(page));
        }
        assert_eq!(model(&set), set.iter().map(|page| page.0).collect::<Vec<_>>());
        assert_eq!((set.len(), set.contains(PageIndex(4096))), (8, true));
        other.insert_range(PageIndex(4000), 200);
        set.intersect(&other);
        assert_eq!(model(&set), [4095, 4096]);
        let mut third = PageSet::new(pages);
        set.insert(PageIndex(pages - 1));
        set.drain_into([&mut other, &mut third]);
        assert!(set.is_empty() && set == PageSet::new(pages));
        assert_eq!(model(&third), [4095, 4096, pages - 1]);
        assert_eq!(model(&other).len(), 201);
        other.clear();
        assert!(model(&other).is_empty() && other.is_empty());
    }

    #[test]
    fn pages_leave_one_by_one_and_by_sets() {
        let pages = 64 * 64 * 2 + 5;
        let mut set = PageSet::new(pages);
        let mut other = PageSet::new(pages);
        for page in [0, 63, 64, 70, 4096, pages - 1] {
            set.insert(PageIndex(page));
        }
        for page in [1, 63, 63, 4096, pages - 1, pages, u64::MAX] {
            set.remove(PageIndex(page));
        }
        assert_eq!(model(&set), [0, 64, 70]);
        [0, 5, 70, 8000].into_iter().for_each(|page| other.insert(PageIndex(page)));
        set.subtract(&other);
        assert_eq!(model(&set), [64]);
        set.subtract(&set.clone());
        assert!(model(&set).is_empty() && set.is_empty());
    }

    #[test]
    fn words_go_to_any_place() {
        for first in [0, 1, 60, 64, 100, 4090] {
            let mut set = PageSet::new(5000);
            set.insert_word(PageIndex(first), 1 | 1 << 63);
            set.insert_word(PageIndex(first + 128), 0b1010);
            set.insert_word(PageIndex(u64::MAX), 0);
            assert_eq!(model(&set), [0, 63, 129, 131].map(|page| first + page));
        }
        let mut set = PageSet::new(70);
        set.insert_word(PageIndex(60), 1 << 9);
        assert_eq!(model(&set), [69]);
    }

    #[test]
    #[should_panic(expected = "page 70 of 70")]
    fn words_past_the_end_are_refused() {
        PageSet::new(70).insert_word(PageIndex(60), 1 << 10);
    }
}
