//! The generations that a processor remembers of its pages.
//!
//! The table lies in guest memory like the pages that it speaks of, so it can be stale itself.
//! Two things guard it: each entry carries a tag over its place and generation, and a running
//! digest over all entries is kept elsewhere. A table page that went back in time together with
//! the pages it names is found by the digest alone.

use crate::random::mix;

/// An entry's place in its table.
pub type Slot = u64;

/// An entry whose tag does not fit, or a table whose digest does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged {
    pub found: u64,
}

/// What a whole table amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub digest: u64,
    pub generation_min: u32,
}

/// Makes and checks entries: a generation in the upper half, its tag in the lower.
#[derive(Clone, Copy, Debug)]
pub struct Entries {
    key: u64,
}

impl Entries {
    #[must_use]
    pub fn new(owner: u32, seed: u64) -> Self {
        Self { key: mix(seed ^ (u64::from(owner) << 48) ^ 0x7461_626c_6500_0000) }
    }

    /// The entry for a page of this generation.
    #[must_use]
    pub fn encode(self, slot: Slot, generation: u32) -> u64 {
        let generation = u64::from(generation) << 32;
        generation | (mix(self.key ^ slot ^ generation) & 0xffff_ffff)
    }

    /// The generation that an entry stands for.
    pub fn decode(self, slot: Slot, entry: u64) -> Result<u32, Damaged> {
        let damaged = Damaged { found: entry };
        let generation = u32::try_from(entry >> 32).map_err(|_| damaged)?;
        (self.encode(slot, generation) == entry).then_some(generation).ok_or(damaged)
    }

    /// What an entry adds to the table's digest.
    #[must_use]
    pub fn weight(self, slot: Slot, entry: u64) -> u64 {
        mix(entry ^ mix(self.key ^ slot))
    }

    /// Reads the whole table anew.
    pub fn summary(self, entries: impl Iterator<Item = u64>) -> Summary {
        let mut summary = Summary { digest: 0, generation_min: u32::MAX };
        for (slot, entry) in (0_u64..).zip(entries) {
            summary.digest = summary.digest.wrapping_add(self.weight(slot, entry));
            let generation = u32::try_from(entry >> 32).unwrap_or(0);
            summary.generation_min = summary.generation_min.min(generation);
        }
        summary
    }
}

/// The running digest: follows every change of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    sum: u64,
}

impl Digest {
    #[must_use]
    pub fn of(summary: Summary) -> Self {
        Self { sum: summary.digest }
    }

    pub fn replace(&mut self, entries: Entries, slot: Slot, old: u64, new: u64) {
        let change = entries.weight(slot, new).wrapping_sub(entries.weight(slot, old));
        self.sum = self.sum.wrapping_add(change);
    }

    pub fn check(self, summary: Summary) -> Result<(), Damaged> {
        let damaged = Damaged { found: summary.digest };
        (self.sum == summary.digest).then_some(()).ok_or(damaged)
    }

    #[must_use]
    pub fn value(self) -> u64 {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: Entries, count: u64) -> (Vec<u64>, Digest) {
        let table: Vec<u64> = (0..count).map(|slot| entries.encode(slot, 1)).collect();
        let digest = Digest::of(entries.summary(table.iter().copied()));
        (table, digest)
    }

    #[test]
    fn every_flipped_bit_of_an_entry_is_seen() {
        let entries = Entries::new(2, 9);
        let entry = entries.encode(77, 123);
        assert_eq!(entries.decode(77, entry), Ok(123));
        for bit in 0..64 {
            assert!(entries.decode(77, entry ^ (1 << bit)).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn an_entry_belongs_to_its_place_and_owner() {
        let entries = Entries::new(2, 9);
        let entry = entries.encode(77, 123);
        assert!(entries.decode(78, entry).is_err());
        assert!(Entries::new(3, 9).decode(77, entry).is_err());
        assert!(entries.decode(0, 0).is_err());
    }

    #[test]
    fn the_digest_follows_the_table() {
        let entries = Entries::new(0, 1);
        let (mut table, mut digest) = table(entries, 1000);
        for slot in [0, 5, 999, 5] {
            let place = usize::try_from(slot).unwrap();
            let generation = entries.decode(slot, table[place]).unwrap() + 1;
            let new = entries.encode(slot, generation);
            digest.replace(entries, slot, table[place], new);
            table[place] = new;
        }
        let summary = entries.summary(table.iter().copied());
        assert_eq!(digest.check(summary), Ok(()));
        assert_eq!(summary.generation_min, 1);
    }

    #[test]
    fn an_entry_that_went_back_is_seen_by_the_digest_only() {
        let entries = Entries::new(0, 1);
        let (mut table, mut digest) = table(entries, 1000);
        let old = table[17];
        let new = entries.encode(17, 2);
        digest.replace(entries, 17, old, new);
        table[17] = new;
        table[17] = old;
        assert_eq!(entries.decode(17, table[17]), Ok(1));
        assert!(digest.check(entries.summary(table.iter().copied())).is_err());
    }
}
