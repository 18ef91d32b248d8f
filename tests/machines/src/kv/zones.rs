//! An exact answer without a search: what unique values make possible.
//!
//! P. B. Gibbons, E. Korach: Testing Shared Memories, SIAM J. Comput. 26 (1997), section 5: of a
//! register whose writes are unique, take each write with the reads of its value. From the first
//! return among them to the last invocation is their zone. If the return comes first, the register
//! surely had the value throughout the zone (a *forward* zone); if not, some moment between the
//! two is enough (a *backward* zone). The history is linearizable exactly if no read ends before
//! its write begins, no two forward zones overlap, and no backward zone is inside a forward one.

use std::collections::BTreeMap;

use super::history::{Kind, Operation};

/// Of the operations with one value.
#[derive(Clone, Copy, Debug)]
struct Zone {
    first_return: u64,
    last_invoked: u64,
}

impl Zone {
    fn is_forward(&self) -> bool {
        self.first_return < self.last_invoked
    }

    fn bounds(&self) -> (u64, u64) {
        let (a, b) = (self.first_return, self.last_invoked);
        (a.min(b), a.max(b))
    }
}

/// Whether a register that had `begin` may have answered so, and have `end` afterwards.
#[must_use]
pub fn is_possible(begin: u64, operations: &[Operation], end: u64) -> bool {
    // What was there before, as a write before everything, and a read after everything.
    let mut writes = BTreeMap::from([(begin, (0, 0))]);
    let mut reads = vec![(end, u64::MAX - 1, u64::MAX)];
    for operation in operations {
        let (invoked, returned) = (operation.invoked.sequence + 1, operation.returned_at());
        let returned = returned.saturating_add(1);
        match (operation.kind, operation.returned) {
            (Kind::Put(value), _) => {
                writes.insert(value, (invoked, returned));
            }
            (Kind::Get, Some(answer)) => reads.push((answer.value, invoked, returned)),
            (Kind::Get, None) => {}
        }
    }
    zones(&writes, &reads).is_some_and(|zones| fit(&zones))
}

/// None if a value was read that nobody had begun to write.
fn zones(writes: &BTreeMap<u64, (u64, u64)>, reads: &[(u64, u64, u64)]) -> Option<Vec<Zone>> {
    let mut zones: BTreeMap<u64, Zone> = BTreeMap::new();
    for (value, invoked, returned) in reads {
        let (write_invoked, write_returned) = *writes.get(value)?;
        if *returned < write_invoked {
            return None;
        }
        let zone = zones
            .entry(*value)
            .or_insert(Zone { first_return: write_returned, last_invoked: write_invoked });
        zone.first_return = zone.first_return.min(*returned);
        zone.last_invoked = zone.last_invoked.max(*invoked);
    }
    for (value, (invoked, returned)) in writes {
        // A write that nobody read and nobody acknowledged need not have happened.
        if *returned != u64::MAX {
            let zone = Zone { first_return: *returned, last_invoked: *invoked };
            zones.entry(*value).or_insert(zone);
        }
    }
    Some(zones.into_values().collect())
}

fn fit(zones: &[Zone]) -> bool {
    let mut forward: Vec<(u64, u64)> =
        zones.iter().filter(|zone| zone.is_forward()).map(Zone::bounds).collect();
    forward.sort_unstable();
    if forward.windows(2).any(|pair| pair[1].0 < pair[0].1) {
        return false;
    }
    zones.iter().filter(|zone| !zone.is_forward()).all(|zone| {
        let (from, to) = zone.bounds();
        // They do not overlap, so only the last that begins before it can hold it.
        let before = forward.partition_point(|forward| forward.0 < from);
        before == 0 || forward[before - 1].1 <= to
    })
}

#[cfg(test)]
#[path = "zones_tests.rs"]
mod tests;
