//! The check of a copy that was written straight into the image, where no software saw it.
//!
//! ```text
//!   the primary's checksum of a page differs ──> suspect ──a frame brings the page, or a later
//!                                                   │      checksum matches────────> none any more
//!                                                   └─the first epoch ends──> the copy is wrong
//! ```
//!
//! Enters: checksums, runs of pages that come after them. Leaves: a page that is wrong, once that is certain.
//! The checksum is of a page that the guest may be writing: one that differs is suspect, no more.
//! If the guest did write it the page comes again: in a later pass, whose checksum follows it and whose verdict is the one
//! that counts, with frames or in the first epoch, which have checksums of their own. A checksum that is compared
//! late, when the page has come again, makes it suspect at most, until the next one.
//! So a page that is still suspect when the connection brings the end of that epoch was not written, and is
//! not what the primary has. One connection's: a page is always on the same.

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::{PageSet, Ram};
use crate::wire::{Encoding, GroupSums, Run};

#[derive(Debug, Default)]
pub(crate) struct Suspects {
    /// Made for the first of them.
    pages: Option<PageSet>,
}

impl Suspects {
    /// Compares pages with their checksums at the primary.
    pub(crate) fn compare(&mut self, ram: &Ram, sums: &GroupSums<'_>) {
        let mut bytes = [0; PAGE_SIZE];
        for (page, sum) in sums.iter() {
            if !ram.read_page(page, &mut bytes) || crc32fast::hash(&bytes) != sum {
                let pages = self.pages.get_or_insert_with(|| PageSet::new(ram.pages()));
                pages.insert(page);
            } else if let Some(pages) = &mut self.pages {
                pages.remove(page);
            }
        }
    }

    /// These pages come anew; a delta brings only a part of one.
    pub(crate) fn replaced(&mut self, runs: &[Run]) {
        let Some(pages) = &mut self.pages else { return };
        for run in runs.iter().filter(|run| run.encoding != Encoding::Delta) {
            (0..u64::from(run.count)).for_each(|at| pages.remove(PageIndex(run.first.0 + at)));
        }
    }

    /// The first epoch has ended: how many pages are wrong, and the first.
    pub(crate) fn end(&mut self) -> Option<(u64, PageIndex)> {
        let pages = self.pages.take()?;
        pages.iter().next().map(|first| (pages.len(), first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;
    use crate::wire::{decode_sums, encode_sums};

    fn sums(ram: &Ram, pages: u64) -> Vec<u8> {
        let mut out = vec![];
        let sums = crate::page_set::bits(pages).map(|bit| {
            let mut bytes = [0; PAGE_SIZE];
            assert!(ram.read_page(PageIndex(bit as u64), &mut bytes));
            crc32fast::hash(&bytes)
        });
        encode_sums(0, pages, sums, &mut out);
        out
    }

    #[test]
    fn a_page_that_differs_and_does_not_come_again_is_found() {
        let (here, there) = (memory(&[(0, 10)]), memory(&[(0, 10)]));
        for page in 0..10 {
            let bytes = [u8::try_from(page).unwrap(); PAGE_SIZE];
            assert!(here.write_page(PageIndex(page), &bytes));
            assert!(there.write_page(PageIndex(page), &bytes));
        }
        let mut bytes = [7; PAGE_SIZE];
        bytes[4095] = 6;
        for page in [3, 7, 8] {
            assert!(here.write_page(PageIndex(page), &bytes));
        }
        // Of page 8 nothing is said.
        let payload = sums(&there, 0b10_1111_1111 & !(1 << 8));
        let groups = decode_sums(&payload, 10).unwrap();
        let run = |first, count| Run { first: PageIndex(first), count, encoding: Encoding::Raw };
        for (runs, wrong) in [
            (vec![], Some((2, PageIndex(3)))),
            (vec![run(4, 3), run(8, 2)], Some((2, PageIndex(3)))),
            (vec![run(2, 2)], Some((1, PageIndex(7)))),
            (vec![run(0, 10)], None),
            (vec![run(7, 1), run(3, 1)], None),
            (vec![Run { encoding: Encoding::Delta, ..run(0, 10) }], Some((2, PageIndex(3)))),
        ] {
            let mut suspects = Suspects::default();
            groups.iter().for_each(|group| suspects.compare(&here, group));
            suspects.replaced(&runs);
            assert_eq!(suspects.end(), wrong, "{runs:?}");
            assert_eq!(suspects.end(), None, "said once");
        }
        let mut suspects = Suspects::default();
        groups.iter().for_each(|group| suspects.compare(&there, group));
        assert_eq!(suspects.end(), None);
        // The page comes again, and its checksum: the last word counts.
        for (passes, wrong) in [([&here, &there], None), ([&there, &here], Some((2, PageIndex(3))))]
        {
            let mut suspects = Suspects::default();
            for ram in passes {
                groups.iter().for_each(|group| suspects.compare(ram, group));
            }
            assert_eq!(suspects.end(), wrong);
        }
    }
}
