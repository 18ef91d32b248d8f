//! The content of a page, and the check of it.
//!
//! ```text
//! word 0   the page's own address
//! word 1   a mark and the owner
//! word 2   the generation: how often the owner has written the page
//! word 3   checksum over all other words
//! 4..512   base + place * step, where base comes from address, owner, generation and seed
//! ```
//!
//! Two generations differ in every word from 2 on, so a page that is half of one and half of the
//! other cannot pass, wherever the border is. The checksum lets somebody without the owner's
//! memory of the generation (a tool on the host) judge a page as well.

use crate::random::mix;

pub const WORDS: usize = 512;
pub type Page = [u64; WORDS];

const HEADER: usize = 4;
const MARK: u64 = 0x5041_4745 << 32;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a page's content depends on, apart from its generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageId {
    pub address: u64,
    pub owner: u32,
    pub seed: u64,
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A mixture, or damaged.
    Torn,
    /// Whole, but an older generation than the owner wrote last.
    Stale,
    /// Not this page at all: empty, or another page's content.
    Lost,
    /// The owner's memory of the generation is wrong or behind the page.
    Table,
}

impl Kind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Torn => "torn",
            Self::Stale => "stale",
            Self::Lost => "lost",
            Self::Table => "table",
        }
    }
}

/// A page that is not what its owner last wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub kind: Kind,
    pub found_generation: u64,
}

impl PageId {
    #[inline]
    fn base(self, generation: u32) -> u64 {
        let place = mix(self.address ^ mix(self.seed));
        mix(place ^ (u64::from(self.owner) << 32) ^ u64::from(generation))
    }

    #[inline]
    fn mark(self) -> u64 {
        MARK | u64::from(self.owner)
    }
}

/// Writes the page as its owner leaves it in this generation.
pub fn write(page: &mut Page, id: PageId, generation: u32) {
    let base = id.base(generation);
    let mut word = base.wrapping_add(STEP.wrapping_mul(HEADER as u64));
    for place in &mut page[HEADER..] {
        *place = word;
        word = word.wrapping_add(STEP);
    }
    page[0] = id.address;
    page[1] = id.mark();
    page[2] = u64::from(generation);
    page[3] = checksum(page);
}

/// The sum over all words but itself, each word weighed by its place.
#[must_use]
pub fn checksum(page: &Page) -> u64 {
    let mut sum = 0_u64;
    let mut place = STEP;
    for (index, word) in page.iter().enumerate() {
        if index != 3 {
            sum = sum.wrapping_add((word ^ place).rotate_left(17) ^ place);
        }
        place = place.wrapping_add(STEP);
    }
    sum
}

/// Whether the page is exactly what `write` leaves.
#[must_use]
pub fn holds(page: &Page, id: PageId, generation: u32) -> bool {
    let header = (page[0] ^ id.address) | (page[1] ^ id.mark());
    let mut differences = header | (page[2] ^ u64::from(generation)) | (page[3] ^ checksum(page));
    let mut word = id.base(generation).wrapping_add(STEP.wrapping_mul(HEADER as u64));
    for found in &page[HEADER..] {
        differences |= found ^ word;
        word = word.wrapping_add(STEP);
    }
    differences == 0
}

/// Checks the page against the generation that its owner remembers.
pub fn check(page: &Page, id: PageId, expected: u32) -> Result<(), Mismatch> {
    if holds(page, id, expected) {
        return Ok(());
    }
    let found_generation = page[2];
    if page[0] != id.address || page[1] != id.mark() {
        // A page whose header alone is damaged still has the content that belongs here.
        let mut restored = *page;
        restored[..HEADER].copy_from_slice(&[id.address, id.mark(), u64::from(expected), 0]);
        restored[3] = checksum(&restored);
        let kind = if holds(&restored, id, expected) { Kind::Torn } else { Kind::Lost };
        return Err(Mismatch { kind, found_generation });
    }
    let kind = match u32::try_from(found_generation) {
        Ok(found) if holds(page, id, found) && found < expected => Kind::Stale,
        Ok(found) if holds(page, id, found) => Kind::Table,
        _ => Kind::Torn,
    };
    Err(Mismatch { kind, found_generation })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PageId = PageId { address: 0x1_2345_6000, owner: 3, seed: 11 };

    fn page(generation: u32) -> Page {
        let mut page = [0; WORDS];
        write(&mut page, ID, generation);
        page
    }

    fn kind(page: &Page, expected: u32) -> Kind {
        check(page, ID, expected).unwrap_err().kind
    }

    #[test]
    fn what_was_written_is_found() {
        for generation in [1, 2, 1000, u32::MAX] {
            assert_eq!(check(&page(generation), ID, generation), Ok(()));
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        for bit in 0..WORDS * 64 {
            let mut page = page(5);
            page[bit / 64] ^= 1 << (bit % 64);
            assert_eq!(kind(&page, 5), Kind::Torn, "bit {bit}");
        }
    }

    #[test]
    fn an_older_generation_is_stale() {
        let mismatch = check(&page(4), ID, 5).unwrap_err();
        assert_eq!(mismatch, Mismatch { kind: Kind::Stale, found_generation: 4 });
    }

    #[test]
    fn a_newer_generation_accuses_the_table() {
        let mismatch = check(&page(6), ID, 5).unwrap_err();
        assert_eq!(mismatch, Mismatch { kind: Kind::Table, found_generation: 6 });
    }

    #[test]
    fn a_mixture_is_torn_wherever_its_border() {
        for (new, old) in [(5, 4), (4, 5)] {
            for border in 3..WORDS {
                let mut mixed = page(new);
                mixed[border..].copy_from_slice(&page(old)[border..]);
                assert_eq!(kind(&mixed, 5), Kind::Torn, "border {border}");
            }
        }
    }

    #[test]
    fn a_last_byte_of_another_generation_is_torn() {
        let mut mixed = page(5);
        let other = page(4);
        mixed[WORDS - 1] = (mixed[WORDS - 1] & !0xff) | (other[WORDS - 1] & 0xff);
        assert_eq!(kind(&mixed, 5), Kind::Torn);
    }

    #[test]
    fn an_empty_page_is_lost() {
        assert_eq!(kind(&[0; WORDS], 5), Kind::Lost);
    }

    #[test]
    fn another_page_s_content_is_lost() {
        let mut other = [0; WORDS];
        write(&mut other, PageId { address: ID.address + 4096, ..ID }, 5);
        assert_eq!(kind(&other, 5), Kind::Lost);
        write(&mut other, PageId { owner: 4, ..ID }, 5);
        assert_eq!(kind(&other, 5), Kind::Lost);
    }

    #[test]
    fn another_seed_is_torn() {
        let mut other = [0; WORDS];
        write(&mut other, PageId { seed: 12, ..ID }, 5);
        assert_eq!(kind(&other, 5), Kind::Torn);
    }

    #[test]
    fn the_checksum_alone_finds_swapped_words() {
        let mut page = page(5);
        page.swap(10, 11);
        assert_ne!(page[3], checksum(&page));
    }
}
