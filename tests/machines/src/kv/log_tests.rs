//! Logs by hand against histories by hand.

use std::time::Instant;

use guest_logic::kv::BadRecord;

use super::super::history::{Event, Returned};
use super::*;

fn operation(invoked: u64, returned: Option<u64>, kind: Kind, value: u64) -> Operation {
    let event = |sequence| Event { sequence, at: Instant::now() };
    Operation {
        client: 0,
        id: invoked,
        key: 3,
        kind,
        invoked: event(invoked),
        returned: returned.map(|at| Returned { event: event(at), value }),
    }
}

fn put(invoked: u64, returned: Option<u64>, value: u64) -> Operation {
    operation(invoked, returned, Kind::Put(value), value)
}

fn get(invoked: u64, returned: u64, value: u64) -> Operation {
    operation(invoked, Some(returned), Kind::Get, value)
}

/// The log of these writes in this order.
fn log(writes: &[&Operation]) -> Vec<Record> {
    let record = |(number, write): (u64, &&Operation)| {
        let Kind::Put(value) = write.kind else { panic!("only writes are logged") };
        Record { number, key: write.key, value, id: write.id }
    };
    (0..).zip(writes).map(record).collect()
}

fn found(records: &[Record], operations: &[Operation]) -> String {
    check(records, operations).map_or_else(|violation| violation.chain(), |()| "right".to_owned())
}

#[test]
fn a_whole_log_is_right() {
    let (a, b, c) = (put(1, Some(4), 10), put(2, Some(3), 11), put(5, None, 12));
    let reads = [get(6, 7, 11), get(0, 8, 0)];
    let all = [&[a, b, c][..], &reads].concat();
    assert_eq!(found(&log(&[&a, &b, &c]), &all), "right");
    // The last write was never answered: it need not be there.
    assert_eq!(found(&log(&[&a, &b]), &all), "right");
    assert!(found(&log(&[&b, &a]), &all).contains("0xb was read"), "then the last is 10");
}

#[test]
fn what_is_missing_or_too_much_is_found() {
    let (a, b) = (put(1, Some(2), 10), put(3, Some(4), 11));
    assert!(found(&log(&[&a]), &[a, b]).contains("write of 0xb to key 3 is missing"));
    assert!(found(&log(&[&a, &b, &b]), &[a, b]).contains("record 2 is of a write that was"));
    assert!(found(&log(&[&a, &b]), &[a]).contains("record 1 is of no write"));
    let other = Operation { key: 4, ..b };
    assert!(found(&log(&[&a, &other]), &[a, b]).contains("record 1 is of no write"));
    assert!(found(&log(&[&b, &a]), &[a, b]).contains("record 1 was acknowledged before"));
}

#[test]
fn reads_are_held_against_the_log() {
    let (a, b) = (put(2, Some(3), 10), put(4, Some(5), 11));
    let with = |read| found(&log(&[&a, &b]), &[a, b, read]);
    for right in [get(0, 1, 0), get(1, 9, 0), get(1, 9, 11), get(6, 7, 11)] {
        assert_eq!(with(right), "right", "{right}");
    }
    for wrong in [get(4, 9, 0), get(6, 7, 10), get(0, 1, 10), get(6, 7, 12)] {
        assert!(with(wrong).contains("was read from key 3"), "{wrong}");
    }
}

/// An image of the sectors.
fn image(sectors: &[[u8; SECTOR_BYTES]]) -> Result<Vec<Record>, Violation> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, sectors.concat()).unwrap();
    read(&path).unwrap()
}

#[test]
fn an_image_is_read_to_its_end() {
    let records = log(&[&put(1, Some(2), 10), &put(3, Some(4), 11)]);
    let empty = [0; SECTOR_BYTES];
    let (first, second) = (records[0].encode(), records[1].encode());
    assert_eq!(image(&[first, second, empty, empty]).unwrap(), records);
    assert_eq!(image(&[empty]).unwrap(), []);
    let hole = image(&[first, empty, Record { number: 2, ..records[1] }.encode()]);
    assert!(matches!(hole, Err(Violation::Hole { number: 1 })), "{hole:?}");
    let mut torn = second;
    torn[24..].fill(0);
    let torn = image(&[first, torn, empty]);
    let Err(Violation::Damaged { number: 1, source: BadRecord::Checksum { .. } }) = torn else {
        panic!("{torn:?}")
    };
    let moved = image(&[second, first]);
    assert!(matches!(moved, Err(Violation::Damaged { number: 0, .. })), "{moved:?}");
}
