//! Whether the server's log on disk has every acknowledged write, once, in an order that explains
//! every answer.
//!
//! The server changes its map in the order of its log. So the log is the order of the writes, and
//! the reads can be held against it one by one, without a search: a second judgement beside
//! [`super::linear`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};
use guest_logic::kv::{Record, SECTOR_BYTES};

use super::history::{Kind, Operation};
use super::violation::Violation;

/// The records of a disk image: from sector 0 on, without a gap, and nothing behind them.
pub fn read(image: &Path) -> Result<Result<Vec<Record>, Violation>> {
    let failed = || format!("Cannot read the disk image {}", image.display());
    let mut file = BufReader::new(File::open(image).with_context(failed)?);
    let sectors = image.metadata().with_context(failed)?.len() / SECTOR_BYTES as u64;
    let mut records = Vec::new();
    let mut hole = None;
    for number in 0..sectors {
        let mut sector = [0; SECTOR_BYTES];
        file.read_exact(&mut sector).with_context(failed)?;
        match (Record::decode(number, &sector), hole) {
            (Err(source), _) => return Ok(Err(Violation::Damaged { number, source })),
            (Ok(Some(_)), Some(number)) => return Ok(Err(Violation::Hole { number })),
            (Ok(Some(record)), None) => records.push(record),
            (Ok(None), _) => hole = hole.or(Some(number)),
        }
    }
    Ok(Ok(records))
}

/// Holds the log against what the clients saw.
pub fn check(records: &[Record], operations: &[Operation]) -> Result<(), Violation> {
    let writes = places(records, operations)?;
    check_order(records, &writes)?;
    let mut chains: BTreeMap<u32, Vec<&Operation>> = BTreeMap::new();
    for record in records {
        chains.entry(record.key).or_default().push(writes[&record.value].1);
    }
    for operation in operations {
        if let (Kind::Get, Some(returned)) = (operation.kind, operation.returned) {
            let chain = chains.get(&operation.key).map_or(&[][..], Vec::as_slice);
            check_read(operation, returned.value, chain)?;
        }
    }
    Ok(())
}

/// Writes by their unique value, with the numbers of their records.
type Writes<'a> = BTreeMap<u64, (Option<u64>, &'a Operation)>;

/// Each record is of a write, each acknowledged write has a record.
fn places<'a>(records: &[Record], operations: &'a [Operation]) -> Result<Writes<'a>, Violation> {
    let mut writes = Writes::new();
    for operation in operations {
        if let Kind::Put(value) = operation.kind {
            writes.insert(value, (None, operation));
        }
    }
    for record in records {
        let number = record.number;
        let is_its = |write: &&mut (Option<u64>, &Operation)| {
            write.1.id == record.id && write.1.key == record.key
        };
        let Some(write) = writes.get_mut(&record.value).filter(is_its) else {
            return Err(Violation::Stranger { number });
        };
        if write.0.replace(number).is_some() {
            return Err(Violation::Twice { number });
        }
    }
    for (value, (place, operation)) in &writes {
        if place.is_none() && operation.returned.is_some() {
            return Err(Violation::Lost { key: operation.key, value: *value });
        }
    }
    Ok(writes)
}

/// A write that was acknowledged before another was asked for is in front of it.
fn check_order(records: &[Record], writes: &Writes) -> Result<(), Violation> {
    let mut last_invoked = 0;
    for record in records {
        let operation = writes[&record.value].1;
        if operation.returned_at() < last_invoked {
            return Err(Violation::Order { number: record.number });
        }
        last_invoked = last_invoked.max(operation.invoked.sequence);
    }
    Ok(())
}

/// The value was the key's at some moment of the read, given the order of the key's writes.
fn check_read(read: &Operation, value: u64, chain: &[&Operation]) -> Result<(), Violation> {
    let place = chain.iter().position(|write| write.kind == Kind::Put(value));
    let next = match (place, value) {
        (Some(place), _) if chain[place].invoked.sequence > read.returned_at() => None,
        (Some(place), _) => Some(place + 1),
        (None, 0) => Some(0),
        (None, _) => None,
    };
    let is_stale = |next: usize| {
        chain.get(next).is_some_and(|write| write.returned_at() < read.invoked.sequence)
    };
    match next {
        Some(next) if !is_stale(next) => Ok(()),
        _ => Err(Violation::Read { key: read.key, value }),
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
