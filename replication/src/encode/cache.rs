//! What the peer has of a page: the content that was sent for it last.
//!
//! Enters: each page that is sent on a connection. Leaves: the content that the peer will have by
//! the time what follows on the same connection is applied. Always holds: what is remembered for a
//! page is what was sent for it last, so whoever sends a page without remembering it says so; and
//! memory stays below the bound.
//!
//! ```text
//!   page number ── hash ──> set of 8 places, each a page number and 4 KiB made at their first use
//! ```
//!
//! A set gives up its places by CLOCK, one step for each page that finds none: a place that was
//! found since the hand came by stays, and the page is not remembered. A guest's pages come in the
//! same order in each epoch, and whatever lets every newcomer in (plain CLOCK, or LRU) finds none of
//! nine pages that share eight places; this finds eight. Nor does a stream of pages
//! that are written once drive out those that are written again and again. Of a working set of two
//! thirds of the cache one page in thirty finds no place; with one place for each hash it would be
//! one in four.

use crate::capture::cow::Page;
use crate::ids::{PAGE_SIZE, PageIndex};

/// Most memory of the caches of all connections together: 16,384 pages. What a link of 10 Gb/s
/// takes in an epoch of 25 ms is half of that, so an epoch whose deltas could help is remembered,
/// and the one before it too.
pub const CACHE_BYTES: usize = 64 << 20;
const WAYS: usize = 8;
const NOBODY: PageIndex = PageIndex(u64::MAX);

/// Contents of pages, by page.
pub struct Cache {
    sets: Vec<Set>,
}

#[derive(Default)]
struct Set {
    pages: Tags,
    /// Found since the hand came by, a bit for each place.
    found: u8,
    hand: u8,
    contents: [Option<Box<Page>>; WAYS],
}

struct Tags([PageIndex; WAYS]);

impl Default for Tags {
    fn default() -> Self {
        Self([NOBODY; WAYS])
    }
}

/// What is remembered for a page.
pub enum Known<'a> {
    /// The content that was sent last, to be made equal to what is sent now.
    Content(&'a mut Page),
    /// Nothing, though there would have been room: the page was not sent for long, or never.
    Nothing,
    /// Nothing, for others have the room.
    Crowded,
}

impl Cache {
    /// The cache of one of `connections` connections.
    #[must_use]
    pub fn new(connections: usize) -> Self {
        Self::with_bytes(CACHE_BYTES / connections.max(1))
    }

    fn with_bytes(bytes: usize) -> Self {
        let count = (bytes / PAGE_SIZE / WAYS).max(1);
        Self { sets: (0..count).map(|_| Set::default()).collect() }
    }

    fn set(&mut self, page: PageIndex) -> &mut Set {
        // Two rounds of multiply and shift: strides come to lie in no set of their own.
        let hash = page.0.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let hash = (hash ^ hash >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 32;
        let at = hash % self.sets.len() as u64;
        &mut self.sets[usize::try_from(at).expect("less than the number of sets")]
    }

    /// What is known of a page that is sent as `now`. Where nothing is, `now` is remembered if
    /// there is room.
    pub fn know(&mut self, page: PageIndex, now: &Page) -> Known<'_> {
        let set = self.set(page);
        if let Some(way) = set.way(page) {
            set.found |= 1 << way;
            return Known::Content(set.contents[way].as_mut().expect("a place that is taken"));
        }
        let Some(way) = set.place() else { return Known::Crowded };
        let is_new = set.pages.0[way] == NOBODY;
        set.pages.0[way] = page;
        // A lap to be found in: the next newcomer of the same round does not throw it out.
        set.found |= 1 << way;
        match &mut set.contents[way] {
            Some(content) => content.copy_from_slice(now),
            empty @ None => *empty = Some(Box::new(*now)),
        }
        if is_new { Known::Nothing } else { Known::Crowded }
    }

    /// The page was sent as zeroes.
    pub fn zero(&mut self, page: PageIndex) {
        let set = self.set(page);
        if let Some(content) = set.way(page).and_then(|way| set.contents[way].as_mut()) {
            content.fill(0);
        }
    }

    /// The page is sent, and is not to be remembered.
    pub fn forget(&mut self, page: PageIndex) {
        let set = self.set(page);
        if let Some(way) = set.way(page) {
            set.pages.0[way] = NOBODY;
            set.found &= !(1 << way);
        }
    }

    /// Forgets everything; the memory stays.
    pub fn clear(&mut self) {
        for set in &mut self.sets {
            set.pages = Tags::default();
            set.found = 0;
        }
    }
}

impl Set {
    fn way(&self, page: PageIndex) -> Option<usize> {
        self.pages.0.iter().position(|known| *known == page)
    }

    /// A free place, or the one at the hand, if it was not found since the hand came by.
    fn place(&mut self) -> Option<usize> {
        if let Some(free) = self.way(NOBODY) {
            return Some(free);
        }
        let way = usize::from(self.hand);
        self.hand = (self.hand + 1) % 8;
        let was_found = self.found & (1 << way) != 0;
        self.found &= !(1 << way);
        (!was_found).then_some(way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(fill: u8) -> Page {
        [fill; PAGE_SIZE]
    }

    /// The first byte of what is known; then `fill` is.
    fn send(cache: &mut Cache, number: u64, fill: u8) -> Option<u8> {
        match cache.know(PageIndex(number), &page(fill)) {
            Known::Content(content) => {
                let before = content[0];
                content.fill(fill);
                Some(before)
            }
            Known::Nothing | Known::Crowded => None,
        }
    }

    fn fill(cache: &mut Cache, numbers: impl Iterator<Item = u64>, fill: u8) {
        for number in numbers {
            send(cache, number, fill);
        }
    }

    fn bytes(cache: &Cache) -> usize {
        let contents = cache.sets.iter().flat_map(|set| &set.contents);
        contents.flatten().count() * PAGE_SIZE
    }

    #[test]
    fn what_was_sent_last_is_known() {
        let mut cache = Cache::with_bytes(1 << 20);
        assert_eq!(send(&mut cache, 9, 1), None);
        assert_eq!(send(&mut cache, 9, 2), Some(1));
        assert_eq!(send(&mut cache, 9, 3), Some(2));
        cache.zero(PageIndex(9));
        assert_eq!(send(&mut cache, 9, 4), Some(0));
        cache.forget(PageIndex(9));
        assert_eq!(send(&mut cache, 9, 5), None);
        cache.clear();
        assert_eq!(send(&mut cache, 9, 6), None);
        cache.zero(PageIndex(10));
        assert_eq!(send(&mut cache, 10, 1), None, "zeroes are not worth a place");
    }

    #[test]
    fn memory_is_made_as_it_is_used_and_stays_below_the_bound() {
        let most = 1 << 20;
        let mut cache = Cache::with_bytes(most);
        assert_eq!(bytes(&cache), 0);
        fill(&mut cache, 0..10, 1);
        assert_eq!(bytes(&cache), 10 * PAGE_SIZE);
        for round in 0..3 {
            fill(&mut cache, 0..5000, round);
        }
        assert_eq!(bytes(&cache), most);
        cache.clear();
        fill(&mut cache, 0..5000, 1);
        assert_eq!(bytes(&cache), most);
    }

    #[test]
    fn many_connections_have_no_more_memory_than_one() {
        for connections in [1, 3, 128] {
            let mut caches: Vec<_> = (0..connections).map(|_| Cache::new(connections)).collect();
            let ways: usize = caches.iter_mut().map(|cache| cache.sets.len() * WAYS).sum();
            assert!(ways * PAGE_SIZE <= CACHE_BYTES, "{connections} connections");
        }
    }

    #[test]
    fn a_stream_of_pages_leaves_those_that_are_sent_again_and_again() {
        let mut cache = Cache::with_bytes(256 * PAGE_SIZE);
        let hot = || (0..64u64).map(|number| number * 3);
        fill(&mut cache, hot(), 0);
        let mut stream = 1_000_000u64;
        let (mut known, mut asked) = (0, 0);
        for round in 1..50 {
            for number in hot() {
                asked += 1;
                known += usize::from(send(&mut cache, number, round).is_some());
            }
            for _ in 0..64 {
                stream += 1;
                assert_eq!(send(&mut cache, stream, 0), None);
            }
        }
        assert!(known * 100 > asked * 95, "{known} of {asked}");
    }

    #[test]
    fn most_of_a_set_of_two_thirds_of_the_room_is_known() {
        let mut cache = Cache::with_bytes(3000 * PAGE_SIZE);
        // Scattered, as a guest's pages are.
        let pages = || (0..2000u64).map(|number| number * 7919 % 262_144);
        for _ in 0..4 {
            fill(&mut cache, pages(), 1);
        }
        let known = pages().filter(|number| send(&mut cache, *number, 2) == Some(1)).count();
        assert!(known > 1850, "{known}");
    }

    #[test]
    fn of_nine_pages_that_come_in_turn_eight_are_known() {
        let mut cache = Cache::with_bytes(WAYS * PAGE_SIZE);
        fill(&mut cache, 0..9, 0);
        for round in 1..20 {
            let known = (0..9).filter(|number| send(&mut cache, *number, round).is_some()).count();
            assert_eq!(known, 8, "round {round}");
        }
        // They are not written any more: others come in, in the end.
        fill(&mut cache, 100..108, 0);
        fill(&mut cache, 100..108, 1);
        let known = (100..108).filter(|number| send(&mut cache, *number, 2).is_some()).count();
        assert!(known >= 7, "{known}");
    }

    #[test]
    fn a_page_that_takes_anothers_place_is_told_from_one_that_is_new() {
        let mut cache = Cache::with_bytes(WAYS * PAGE_SIZE);
        for number in 0..WAYS as u64 {
            assert!(matches!(cache.know(PageIndex(number), &page(1)), Known::Nothing));
        }
        assert!(matches!(cache.know(PageIndex(99), &page(1)), Known::Crowded));
        cache.forget(PageIndex(3));
        assert!(matches!(cache.know(PageIndex(100), &page(1)), Known::Nothing));
    }
}
