//! Checksums of pages that were written straight into the backup's image, on the data connection by which they
//! were.
//!
//! ```text
//! Sums:  | group ... |
//! group: | number u64 | pages u64 | CRC-32 u32 ... |
//! ```
//!
//! A group is 64 pages from page 64 × number on; a bit of `pages`, the lowest for the first, says that the
//! group's page has a checksum here. Groups ascend.

use super::message::Fields;
use super::{Kind, WireError};
use crate::ids::PageIndex;

/// Most groups of one frame: to check it is to read as many pages, 64 for each, for a peer's few bytes.
pub const SUM_GROUPS_MAX: usize = 16;
/// Pages of a group.
const GROUP_PAGES: usize = 64;
const SUM_BYTES: usize = 4;
pub(super) const SUMS_BYTES_MAX: usize = SUM_GROUPS_MAX * (16 + GROUP_PAGES * SUM_BYTES);

/// The checksums of a group's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSums<'a> {
    pub group: u64,
    /// Of so many pages as bits are set.
    pub pages: u64,
    sums: &'a [[u8; SUM_BYTES]],
}

impl<'a> GroupSums<'a> {
    /// The pages that have a checksum, and the checksums.
    pub fn iter(&self) -> impl Iterator<Item = (PageIndex, u32)> + use<'a> {
        let first = self.group * GROUP_PAGES as u64;
        let pages = crate::page_set::bits(self.pages);
        let sums = self.sums.iter().map(|sum| u32::from_le_bytes(*sum));
        pages.map(move |bit| PageIndex(first + bit as u64)).zip(sums)
    }
}

/// Appends a group to a frame; `sums` are those of the pages whose bits are set.
pub fn encode_sums(group: u64, pages: u64, sums: impl Iterator<Item = u32>, out: &mut Vec<u8>) {
    out.extend(group.to_le_bytes());
    out.extend(pages.to_le_bytes());
    sums.for_each(|sum| out.extend(sum.to_le_bytes()));
}

/// The groups of a frame, of a memory of `universe` pages.
///
/// # Errors
/// [`WireError::Malformed`].
pub fn decode_sums(payload: &[u8], universe: u64) -> Result<Vec<GroupSums<'_>>, WireError> {
    let mut from = Fields { kind: Kind::Sums, rest: payload };
    let mut groups: Vec<GroupSums<'_>> = Vec::with_capacity(SUM_GROUPS_MAX);
    while !from.rest.is_empty() {
        let (group, pages) = (from.u64()?, from.u64()?);
        let last = 63u64.saturating_sub(pages.leading_zeros().into());
        let last = group.checked_mul(GROUP_PAGES as u64).and_then(|first| first.checked_add(last));
        if pages == 0 || last.is_none_or(|last| last >= universe) {
            return from.malformed("pages of checksums");
        }
        if groups.last().is_some_and(|before| before.group >= group) {
            return from.malformed("order of checksums");
        }
        if groups.len() == SUM_GROUPS_MAX {
            return from.malformed("number of checksums");
        }
        let bytes = pages.count_ones() as usize * SUM_BYTES;
        let Some((sums, rest)) = from.rest.split_at_checked(bytes) else {
            return from.malformed("too short");
        };
        from.rest = rest;
        groups.push(GroupSums { group, pages, sums: sums.as_chunks().0 });
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIVERSE: u64 = 64 * 64 + 3;

    fn encoded(groups: &[(u64, u64)]) -> Vec<u8> {
        let mut out = vec![];
        for (group, pages) in groups {
            let pages_of = crate::page_set::bits(*pages);
            let sum = |bit: usize| u32::try_from(group * 100 + bit as u64).unwrap();
            encode_sums(*group, *pages, pages_of.map(sum), &mut out);
        }
        out
    }

    #[test]
    fn what_is_said_of_pages_is_heard_of_the_same() {
        let groups = [(0, u64::MAX), (7, 1 << 63 | 0b101), (64, 0b111)];
        let bytes = encoded(&groups);
        let decoded = decode_sums(&bytes, UNIVERSE).unwrap();
        let found: Vec<_> = decoded.iter().flat_map(GroupSums::iter).collect();
        let expected: Vec<_> = groups
            .iter()
            .flat_map(|(group, pages)| {
                crate::page_set::bits(*pages).map(move |bit| {
                    let sum = u32::try_from(group * 100 + bit as u64).unwrap();
                    (PageIndex(group * 64 + bit as u64), sum)
                })
            })
            .collect();
        assert_eq!(found, expected);
        assert_eq!(found.len(), 64 + 3 + 3);
        assert!(decode_sums(&[], UNIVERSE).unwrap().is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused = |bytes: &[u8]| decode_sums(bytes, UNIVERSE).unwrap_err().to_string();
        for (groups, what) in [
            (&[(1, 0)][..], "pages of checksums"),
            (&[(64, 1 << 3)], "pages of checksums"),
            (&[(u64::MAX / 64, 1 << 63)], "pages of checksums"),
            (&[(5, 1), (5, 2)], "order of checksums"),
            (&[(5, 1), (4, 1)], "order of checksums"),
        ] {
            let mut out = vec![];
            for (group, pages) in groups {
                encode_sums(*group, *pages, (0..pages.count_ones()).map(|_| 0), &mut out);
            }
            assert!(refused(&out).ends_with(what), "{groups:?}: {}", refused(&out));
        }
        let many: Vec<_> = (0..=SUM_GROUPS_MAX as u64).map(|group| (group, 1)).collect();
        assert!(refused(&encoded(&many)).ends_with("number of checksums"));
        let whole = encoded(&[(3, 0b11)]);
        for cut in 1..whole.len() {
            assert!(refused(&whole[..cut]).ends_with("too short"), "{cut} bytes");
        }
        assert!(decode_sums(&encoded(&many[..SUM_GROUPS_MAX]), UNIVERSE).is_ok());
        assert_eq!(SUMS_BYTES_MAX, encoded(&vec![(0, u64::MAX); SUM_GROUPS_MAX]).len());
    }
}
