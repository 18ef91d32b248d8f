use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::disk::{BLOCK_BYTES, CHANGE_COST_BYTES};

struct Rig {
    journal: Arc<Journal>,
    full: Arc<AtomicUsize>,
    room: Arc<AtomicUsize>,
}

fn counting() -> (Arc<AtomicUsize>, Waker) {
    let count = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&count);
    let wake = move || {
        counted.fetch_add(1, Ordering::SeqCst);
    };
    (count, Waker::new(wake))
}

fn rig() -> Rig {
    let (full, on_full) = counting();
    let (room, on_room) = counting();
    let journal = Arc::new(Journal::new(&[4 * BLOCK_BYTES, 2 * BLOCK_BYTES], on_full, on_room));
    while journal.next_marked(0, 0, u64::MAX).is_some() {}
    while journal.next_marked(1, 0, u64::MAX).is_some() {}
    Rig { journal, full, room }
}

fn write(disk: u32, offset: u64, data: &[u8]) -> Told<'_> {
    Told { disk, operation: Operation::Write, offset, len: data.len() as u64, data }
}

#[test]
fn a_change_is_marked_or_kept_never_neither() {
    let rig = rig();
    rig.journal.record(write(0, BLOCK_BYTES, &[1; 512]));
    assert_eq!(rig.journal.next_marked(0, 0, u64::MAX), Some(BLOCK_BYTES..2 * BLOCK_BYTES));
    rig.journal.begin_log(1 << 20);
    assert!(rig.journal.wait_log());
    rig.journal.record(write(0, 0, &[1; 512]));
    rig.journal.record(write(1, 0, &[2; 512]));
    assert_eq!(rig.journal.marked_bytes(), 0);
    let log = rig.journal.seal();
    assert_eq!(log.changes.iter().map(|change| change.disk).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(log.bytes, 2 * (512 + CHANGE_COST_BYTES));
    rig.journal.record(write(1, BLOCK_BYTES, &[3; 512]));
    rig.journal.stop_log();
    assert!(rig.journal.seal().changes.is_empty());
    assert_eq!(rig.journal.next_marked(1, 0, u64::MAX), Some(BLOCK_BYTES..2 * BLOCK_BYTES));
    assert_eq!(rig.journal.marked_bytes(), 0);
}

#[test]
fn a_full_log_refuses_asks_for_a_seal_and_has_room_after_it() {
    let rig = rig();
    let cost = 512 + CHANGE_COST_BYTES;
    rig.journal.begin_log(2 * cost);
    for count in [1, 2] {
        assert!(rig.journal.reserve(cost));
        rig.journal.record(write(0, 0, &[1; 512]));
        rig.journal.release(cost);
        assert_eq!(rig.full.load(Ordering::SeqCst), 1, "at the half, once, not at {count}");
    }
    assert!(!rig.journal.reserve(cost));
    assert_eq!(rig.room.load(Ordering::SeqCst), 0);
    assert_eq!(rig.journal.seal().bytes, 2 * cost);
    assert_eq!(rig.room.load(Ordering::SeqCst), 1);
    assert!(rig.journal.reserve(cost) && rig.journal.reserve(cost) && !rig.journal.reserve(1));
    // What is reserved is in the way as much as what is kept.
    assert_eq!(rig.full.load(Ordering::SeqCst), 2);
    rig.journal.release(cost);
    assert_eq!(rig.room.load(Ordering::SeqCst), 2);
    assert!(rig.journal.reserve(cost) && !rig.journal.reserve(cost));
    rig.journal.stop_log();
    assert_eq!(rig.room.load(Ordering::SeqCst), 3);
    assert!((0..100).all(|_| rig.journal.reserve(cost)), "without a reader nobody waits");
}

#[test]
fn logging_begins_when_what_is_under_way_fits() {
    let rig = rig();
    assert!(rig.journal.reserve(1000) && rig.journal.reserve(1000));
    rig.journal.begin_log(1500);
    assert!(!rig.journal.reserve(1), "no more than the log will hold");
    rig.journal.record(write(0, 0, &[1; 512]));
    assert_eq!(rig.journal.marked_bytes(), BLOCK_BYTES);
    let journal = Arc::clone(&rig.journal);
    let waits = std::thread::spawn(move || journal.wait_log());
    rig.journal.release(1000);
    assert!(waits.join().unwrap());
    rig.journal.record(write(0, 0, &[1; 512]));
    assert_eq!(rig.journal.seal().changes.len(), 1);
}

#[test]
fn whoever_waits_for_a_log_that_is_called_off_is_told() {
    let rig = rig();
    assert!(rig.journal.reserve(1000));
    rig.journal.begin_log(500);
    let journal = Arc::clone(&rig.journal);
    let waits = std::thread::spawn(move || journal.wait_log());
    rig.journal.stop_log();
    assert!(!waits.join().unwrap());
}

#[test]
fn what_was_ever_changed_is_known() {
    let rig = rig();
    let touched = |blocks: Range<u64>| {
        rig.journal.is_touched(0, &(blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES))
    };
    assert!(!touched(0..4));
    rig.journal.record(write(0, 2 * BLOCK_BYTES - 512, &[1; 512]));
    assert!(rig.journal.next_marked(0, 0, u64::MAX).is_some());
    rig.journal.begin_log(1 << 20);
    assert!(rig.journal.wait_log());
    rig.journal.record(write(0, 3 * BLOCK_BYTES, &[2; 512]));
    assert_eq!(rig.journal.seal().changes.len(), 1);
    assert_eq!([0, 1, 2, 3].map(|block| touched(block..block + 1)), [false, true, false, true]);
    assert!(touched(0..2) && touched(0..4) && touched(2..4));
    assert!(!rig.journal.is_touched(1, &(0..BLOCK_BYTES)) && !rig.journal.is_touched(9, &(0..1)));
}
