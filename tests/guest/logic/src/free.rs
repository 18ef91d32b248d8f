//! Which guest-physical memory is free, and its pages by number.

use crate::machine::PAGE_SIZE;

const RANGES_MAX: usize = 32;

/// Pages of one stretch when a part of memory is spread over all of it.
const STRETCH_PAGES: u64 = 512;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
}

impl Range {
    fn pages(self) -> u64 {
        (self.end - self.start) / PAGE_SIZE
    }
}

/// Ranges of whole pages, in the order in which they were added.
#[derive(Clone, Debug, Default)]
pub struct Free {
    ranges: [Range; RANGES_MAX],
    count: usize,
}

impl Free {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the whole pages of `start..start + length`, less everything below `floor`. A range
    /// beyond the table's size is left out, which only leaves that memory unused.
    pub fn add(&mut self, start: u64, length: u64, floor: u64) {
        let end = start.saturating_add(length) / PAGE_SIZE * PAGE_SIZE;
        let start = start.max(floor).next_multiple_of(PAGE_SIZE);
        if start >= end {
            return;
        }
        if let Some(place) = self.ranges.get_mut(self.count) {
            *place = Range { start, end };
            self.count += 1;
        }
    }

    #[must_use]
    pub fn pages(&self) -> u64 {
        self.used().iter().map(|range| range.pages()).sum()
    }

    /// Takes `pages` adjacent pages away; their address.
    pub fn take(&mut self, pages: u64) -> Option<u64> {
        let size = pages.checked_mul(PAGE_SIZE)?;
        let range = self.ranges.iter_mut().take(self.count);
        let range = range.into_iter().find(|range| range.end - range.start >= size)?;
        let address = range.start;
        range.start += size;
        Some(address)
    }

    /// The address of the `index`-th page.
    #[must_use]
    pub fn page(&self, mut index: u64) -> Option<u64> {
        for range in self.used() {
            if index < range.pages() {
                return Some(range.start + index * PAGE_SIZE);
            }
            index -= range.pages();
        }
        None
    }

    fn used(&self) -> &[Range] {
        self.ranges.get(..self.count).unwrap_or_default()
    }
}

/// A number of pages out of free memory, in stretches spread evenly over it: a small working
/// area thus reaches into the highest memory too.
#[derive(Clone, Debug)]
pub struct Area {
    free: Free,
    first: u64,
    available: u64,
    pages: u64,
}

impl Area {
    /// At most `pages` of the pages `first..first + available` of `free`.
    #[must_use]
    pub fn new(free: Free, first: u64, available: u64, pages: u64) -> Self {
        let available = available.min(free.pages().saturating_sub(first));
        Self { free, first, available, pages: pages.min(available) }
    }

    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The address of the `index`-th page; None from `pages()` on.
    #[must_use]
    pub fn page(&self, index: u64) -> Option<u64> {
        if index >= self.pages {
            return None;
        }
        let stretches = self.pages.div_ceil(STRETCH_PAGES);
        let places = self.available / STRETCH_PAGES;
        let (stretch, within) = (index / STRETCH_PAGES, index % STRETCH_PAGES);
        let place = if stretches <= places { stretch * places / stretches } else { stretch };
        self.free.page(self.first + place * STRETCH_PAGES + within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn with_hole() -> Free {
        let mut free = Free::new();
        free.add(0, 0xa_0000, 0x100_0000);
        free.add(0x10_0000, 0x8000_0000 - 0x10_0000, 0x100_0000);
        free.add(0x1_0000_0000, 0x4000_0800, 0x100_0000);
        free
    }

    #[test]
    fn low_memory_and_part_pages_are_left_out() {
        let free = with_hole();
        assert_eq!(free.pages(), (0x7f00_0000 + 0x4000_0000) / PAGE_SIZE);
        assert_eq!(free.page(0), Some(0x100_0000));
        assert_eq!(free.page(0x7f00_0000 / PAGE_SIZE), Some(0x1_0000_0000));
        assert_eq!(free.page(free.pages()), None);
    }

    #[test]
    fn what_is_taken_is_no_longer_free() {
        let mut free = with_hole();
        let before = free.pages();
        assert_eq!(free.take(16), Some(0x100_0000));
        assert_eq!(free.take(before), None);
        assert_eq!(free.pages(), before - 16);
        assert_eq!(free.page(0), Some(0x101_0000));
    }

    #[test]
    fn an_area_never_names_a_page_twice() {
        let free = with_hole();
        for pages in [1, 511, 512, 513, 5000, free.pages() - 1, free.pages(), u64::MAX] {
            let area = Area::new(free.clone(), 0, free.pages(), pages);
            assert_eq!(area.pages(), pages.min(free.pages()));
            let seen: BTreeSet<u64> =
                (0..area.pages()).map(|index| area.page(index).unwrap()).collect();
            assert_eq!(seen.len() as u64, area.pages());
            assert_eq!(area.page(area.pages()), None);
        }
    }

    #[test]
    fn a_small_area_reaches_above_the_hole() {
        let free = with_hole();
        let area = Area::new(free.clone(), 0, free.pages(), 16 * 512);
        assert!((0..area.pages()).any(|index| area.page(index).unwrap() >= 0x1_0000_0000));
    }

    #[test]
    fn two_areas_do_not_meet() {
        let free = with_hole();
        let border = free.pages() - 1000;
        let low = Area::new(free.clone(), 0, border, u64::MAX);
        let high = Area::new(free.clone(), border, u64::MAX, u64::MAX);
        let last = low.page(low.pages() - 1).unwrap();
        assert_eq!(high.page(0), Some(last + PAGE_SIZE));
        assert_eq!(low.pages() + high.pages(), free.pages());
    }
}
