//! The backup's image as the primary may write it: pure.
//!
//! ```text
//!   runs     |  5 ... 9   |                  | 64 ...
//!   lent     ... 6 | 7 ...                             this side's pieces
//!   granted         ... 7 | 8 ...                      the backup's
//!   writes   | 5, 6 | 7 | 8, 9 |             | 64 ...
//! ```
//!
//! Enters: the backup's grants, runs of pages. Leaves: WRITEs. Always holds: a WRITE reads one piece of this side's
//! memory and writes the same pages in one piece of the backup's; all of a run is written, and nothing else.

use ::rdma::Remote;

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::wire::Grant;

/// Most pages of one WRITE.
const WRITE_PAGES_MAX: u64 = 256;
/// Most pages that are worth putting into one list of runs: they may be one WRITE.
pub(crate) const PLACED_PAGES_MAX: usize = 256;

/// What the backup has opened: all of its memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Window {
    /// Ascending, side by side from the first page on.
    pieces: Vec<(PageIndex, Grant)>,
}

/// Pages that lie side by side on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) first: PageIndex,
    pub(super) pages: u64,
    pub(super) to: Remote,
}

impl Window {
    /// What a backup says that it opened of a memory of so many pages; `None` if that makes no sense.
    #[must_use]
    pub fn new(grants: &[Grant], pages: u64) -> Option<Self> {
        let mut next = 0u64;
        let mut pieces = Vec::with_capacity(grants.len());
        for grant in grants {
            let bytes = grant.pages.checked_mul(PAGE_SIZE as u64)?;
            grant.address.checked_add(bytes)?;
            if grant.pages == 0 {
                return None;
            }
            pieces.push((PageIndex(next), *grant));
            next = next.checked_add(grant.pages)?;
        }
        (next == pages).then_some(Self { pieces })
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
        let window = Window::new(&[grant(8, 1 << 20, 7), grant(92, 1 << 30, 9)], 100).unwrap();
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

    #[test]
    fn a_window_is_all_of_the_memory_and_nothing_else() {
        let end = u64::MAX - PAGE;
        assert!(Window::new(&[grant(1, end, 0)], 1).is_some());
        for grants in [
            vec![],
            vec![grant(9, 0, 0)],
            vec![grant(11, 0, 0)],
            vec![grant(10, 0, 0), grant(0, 0, 0)],
            vec![grant(10, u64::MAX - 9 * PAGE, 0)],
            vec![grant(u64::MAX, 0, 0), grant(11, 0, 0)],
            vec![grant(u64::MAX / PAGE, 0, 0), grant(u64::MAX / PAGE, 0, 0)],
        ] {
            assert_eq!(Window::new(&grants, 10), None, "{grants:?}");
        }
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
            let window = Window::new(&grants, 600).unwrap();
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
