//! The backup's image as the primary may write it: pure.
//!
//! ```text
//!   runs     |  5 ... 9   |                  | 64 ...
//!   lent     ... 6 | 7 ...                             this side's pieces
//!   granted         ... 7 | 8 ...                      the backup's
//!   writes   | 5, 6 | 7 | 8, 9 |             | 64 ...
//! ```
//!
//! Enters: the backup's grants, as they come, runs of pages. Leaves: WRITEs. Always holds: a WRITE reads one piece of
//! this side's memory and writes the same pages in one piece of the backup's; all of a run is written, and nothing else;
//! what was granted lies side by side from the first page on, and is no more than the memory.

use ::rdma::Remote;

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::wire::{GRANTS_MAX, Grant};

/// Most pages of one WRITE.
const WRITE_PAGES_MAX: u64 = 256;
/// Most pages that are worth putting into one list of runs: they may be one WRITE.
pub(crate) const PLACED_PAGES_MAX: usize = 256;

/// What the backup has opened of its memory so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Ascending, side by side from the first page on.
    pieces: Vec<(PageIndex, Grant)>,
    /// In all of them.
    open: u64,
    /// Of the memory.
    pages: u64,
}

/// Pages that lie side by side on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) first: PageIndex,
    pub(super) pages: u64,
    pub(super) to: Remote,
}

impl Window {
    /// Nothing yet of a memory of so many pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { pieces: vec![], open: 0, pages }
    }

    /// What a backup says that it opened, too; `false` if that makes no sense, and then nothing is changed.
    #[must_use]
    pub fn widen(&mut self, grants: &[Grant]) -> bool {
        let mut next = self.open;
        let mut pieces = Vec::with_capacity(grants.len());
        for grant in grants {
            let bytes = grant.pages.checked_mul(PAGE_SIZE as u64);
            let end = bytes.and_then(|bytes| grant.address.checked_add(bytes));
            let after = next.checked_add(grant.pages).filter(|after| *after <= self.pages);
            let (Some(_), Some(after), 1..) = (end, after, grant.pages) else { return false };
            pieces.push((PageIndex(next), *grant));
            next = after;
        }
        if pieces.is_empty() || self.pieces.len() + pieces.len() > GRANTS_MAX {
            return false;
        }
        self.pieces.extend(pieces);
        self.open = next;
        true
    }

    /// Pages from the first on that are open.
    #[must_use]
    pub fn open_pages(&self) -> u64 {
        self.open
    }

    /// Whether that is all.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.open == self.pages
    }

    /// Where a page is, and how many from it on lie side by side there.
    fn place(&self, page: PageIndex) -> Option<(Remote, u64)> {
        let after = self.pieces.partition_point(|(first, _)| *first <= page);
        let (first, grant) = self.pieces.get(after.checked_sub(1)?)?;
        let before = page.0 - first.0;
        let left = grant.pages.checked_sub(before).filter(|left| *left > 0)?;
        let address = grant.address + before * PAGE_SIZE as u64;
        Some((Remote { address, key: grant.key }, left))
    }

    /// The WRITEs of a run of pages; `left` says how many from a page on lie side by side on this side. `false`
    /// if some page is on neither.
    pub(super) fn writes(
        &self,
        (first, count): (PageIndex, u64),
        left: impl Fn(PageIndex) -> u64,
        out: &mut Vec<Placed>,
    ) -> bool {
        let (mut page, mut count) = (first, count);
        while count > 0 {
            let Some((to, there)) = self.place(page) else { return false };
            let pages = count.min(there).min(left(page)).min(WRITE_PAGES_MAX);
            if pages == 0 {
                return false;
            }
            out.push(Placed { first: page, pages, to });
            (page, count) = (PageIndex(page.0 + pages), count - pages);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn grant(pages: u64, address: u64, key: u32) -> Grant {
        Grant { pages, address, key }
    }

    #[test]
    fn a_run_is_cut_where_either_sides_pieces_end() {
        let window = window(&[grant(8, 1 << 20, 7), grant(92, 1 << 30, 9)], 100);
        let left = |page: PageIndex| if page.0 < 7 { 7 - page.0 } else { 100 - page.0 };
        let mut writes = vec![];
        assert!(window.writes((PageIndex(5), 5), left, &mut writes));
        let to = |address, key| Remote { address, key };
        let expected = [
            (5, 2, to((1 << 20) + 5 * PAGE, 7)),
            (7, 1, to((1 << 20) + 7 * PAGE, 7)),
            (8, 2, to(1 << 30, 9)),
        ];
        let found: Vec<_> =
            writes.iter().map(|write| (write.first.0, write.pages, write.to)).collect();
        assert_eq!(found, expected);
        assert!(!window.writes((PageIndex(98), 3), left, &mut vec![]), "past the end");
        assert!(!window.writes((PageIndex(5), 1), |_| 0, &mut vec![]), "not lent");
    }

    fn window(grants: &[Grant], pages: u64) -> Window {
        let mut window = Window::new(pages);
        assert!(window.widen(grants));
        window
    }

    #[test]
    fn a_window_is_no_more_than_the_memory() {
        let end = u64::MAX - PAGE;
        assert!(window(&[grant(1, end, 0)], 1).is_whole());
        for grants in [
            vec![],
            vec![grant(11, 0, 0)],
            vec![grant(10, 0, 0), grant(0, 0, 0)],
            vec![grant(0, 0, 0)],
            vec![grant(10, u64::MAX - 9 * PAGE, 0)],
            vec![grant(u64::MAX, 0, 0), grant(11, 0, 0)],
            vec![grant(u64::MAX / PAGE, 0, 0), grant(u64::MAX / PAGE, 0, 0)],
        ] {
            let mut window = Window::new(10);
            assert!(!window.widen(&grants), "{grants:?}");
            assert_eq!(window, Window::new(10), "{grants:?}");
        }
    }

    #[test]
    fn a_window_opens_piece_by_piece_and_no_further_than_the_memory() {
        let mut window = Window::new(10);
        let mut writes = vec![];
        for (pages, open) in [(4, 4), (5, 9)] {
            assert!(window.widen(&[grant(pages, open * PAGE, 0)]));
            assert_eq!((window.open_pages(), window.is_whole()), (open, false));
            let left = |page: PageIndex| 10 - page.0;
            assert!(window.writes((PageIndex(open - 1), 1), left, &mut writes));
            assert!(!window.writes((PageIndex(open), 1), left, &mut vec![]), "not open yet");
        }
        let before = window.clone();
        assert!(!window.widen(&[grant(1, 0, 0), grant(1, 0, 0)]) && !window.widen(&[]));
        assert_eq!(window, before, "half of it was taken");
        assert!(window.widen(&[grant(1, 0, 0)]) && window.is_whole());
        assert!(!window.widen(&[grant(1, 0, 0)]) && !window.widen(&[grant(0, 0, 0)]));
    }

    /// Each costs this side some bytes, and a part of a copy.
    #[test]
    fn a_window_has_no_more_pieces_than_a_memory_is_cut_into() {
        let mut window = Window::new(u64::MAX / PAGE);
        for _ in 0..GRANTS_MAX {
            assert!(window.widen(&[grant(1, 0, 0)]));
        }
        assert!(!window.widen(&[grant(1, 0, 0)]));
    }

    /// Sizes of pieces that lie side by side over so many pages.
    fn any_pieces(pages: u64) -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(1..pages, 1..8).prop_map(move |sizes| {
            let (mut left, mut all) = (pages, vec![]);
            for size in sizes {
                let size = size.min(left);
                all.extend((size > 0).then_some(size));
                left -= size;
            }
            all.extend((left > 0).then_some(left));
            all
        })
    }

    proptest! {
        /// A device that does what the WRITEs say: each page of the runs is written once, to its place.
        #[test]
        fn every_page_of_a_run_is_written_to_its_place(
            lent in any_pieces(600),
            granted in any_pieces(600),
            runs in prop::collection::vec((0u64..600, 1u64..600), 1..6),
        ) {
            // The backup's pieces lie anywhere, in any order.
            let base = |at: usize| (granted.len() - at) as u64 * (1 << 30);
            let grants: Vec<_> = granted.iter().enumerate().map(|(at, pages)| {
                grant(*pages, base(at), u32::try_from(at).unwrap())
            }).collect();
            let mut window = Window::new(600);
            grants.iter().for_each(|grant| assert!(window.widen(std::slice::from_ref(grant))));
            let left = |page: PageIndex| {
                let mut end = 0;
                lent.iter().map(|pages| { end += pages; end }).find(|end| *end > page.0).unwrap() - page.0
            };
            for (first, count) in runs {
                let count = count.min(600 - first);
                let mut writes = vec![];
                prop_assert!(window.writes((PageIndex(first), count), left, &mut writes));
                let mut next = first;
                for Placed { first, pages, to } in writes {
                    prop_assert_eq!(first.0, next);
                    prop_assert!((1..=WRITE_PAGES_MAX.min(left(first))).contains(&pages));
                    for page in next..next + pages {
                        let (mut start, mut at) = (0, 0);
                        while start + granted[at] <= page {
                            start += granted[at];
                            at += 1;
                        }
                        prop_assert_eq!(to.address + (page - next) * PAGE, base(at) + (page - start) * PAGE);
                        prop_assert_eq!(to.key, u32::try_from(at).unwrap());
                    }
                    next += pages;
                }
                prop_assert_eq!(next, first + count);
            }
        }
    }
}
