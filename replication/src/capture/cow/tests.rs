//! Threads that write memory as fast as they can, and epochs of it that must not notice.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use api::replication::Cow;
use userfault::Userfault;
use vm_memory::{Bytes, GuestAddress};

use super::copy::CopyFreezer;
use super::protect::ProtectFreezer;
use super::table::Table;
use super::*;
use crate::checking::Delays;
use crate::ram::PageBuffer;
use crate::testing::memory;

mod lend;

/// How long a writer waits for a page that is lent: longer than any test.
const PATIENCE: Duration = Duration::from_secs(600);

/// Two regions, neither of whole groups of 64.
const LAYOUT: [(u64, u64); 2] = [(0, 90), (1 << 32, 317)];

/// Memory, what was written of it, and a gate through which each write goes.
struct Guest {
    ram: Ram,
    /// A bit a page, set by its writer.
    dirty: Vec<AtomicU64>,
    gate: RwLock<()>,
    ends: AtomicBool,
    writes: AtomicU64,
}

impl Guest {
    fn new() -> Arc<Self> {
        let ram = memory(&LAYOUT);
        let groups = ram.pages().div_ceil(64);
        Arc::new(Self {
            ram,
            dirty: (0..groups).map(|_| AtomicU64::new(0)).collect(),
            gate: RwLock::new(()),
            ends: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        })
    }

    fn write(&self, page: u64, value: u64) {
        let _inside = self.gate.read().unwrap();
        let at = self.ram.address(PageIndex(page)).unwrap();
        // Both ends of the page, so that a torn one shows.
        self.ram.mapping().write_obj(value, at).unwrap();
        let end = GuestAddress(at.0 + PAGE_SIZE as u64 - 8);
        self.ram.mapping().write_obj(value, end).unwrap();
        // After the bytes, as the VMM's own bitmap does; a harvest may come in between.
        self.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    /// Writers with a hot set, sequential runs, and pages at random.
    fn start(self: &Arc<Self>, count: u64) -> Vec<JoinHandle<()>> {
        let start = |number: u64| {
            let guest = Arc::clone(self);
            std::thread::spawn(move || {
                let mut random = number + 1;
                let pages = guest.ram.pages();
                let mut value = 0;
                while !guest.ends.load(Ordering::Relaxed) {
                    value += 1;
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let page = match random % 4 {
                        0 | 1 => (random >> 8) % 20,
                        2 => value,
                        _ => random >> 8,
                    };
                    guest.write(page % pages, value << 8 | number);
                }
            })
        };
        (0..count).map(start).collect()
    }

    fn harvest(&self) -> PageSet {
        let mut set = PageSet::new(self.ram.pages());
        for (group, word) in self.dirty.iter().enumerate() {
            let word = word.swap(0, Ordering::AcqRel);
            bits(word).for_each(|bit| set.insert(page(group, bit)));
        }
        set
    }

    fn none(&self) -> PageSet {
        PageSet::new(self.ram.pages())
    }

    fn contents(&self) -> Vec<Page> {
        let page = |page| {
            let mut bytes = [0; PAGE_SIZE];
            assert!(self.ram.read_page(PageIndex(page), &mut bytes));
            bytes
        };
        (0..self.ram.pages()).map(page).collect()
    }
}

/// What senders do: each takes its share; returns the pages whose bytes are not `sealed`.
fn send(frozen: &dyn Frozen, share: Share, sealed: &[Page]) -> (Vec<PageIndex>, u64) {
    let mut scratch = PageBuffer::touched(GROUP_PAGES);
    let mut cursor = Cursor::default();
    let (mut bad, mut count) = (vec![], 0);
    let mut last = None;
    loop {
        let mut batch = Vec::new();
        frozen.next(share, &mut cursor, scratch.all_mut(), &mut batch);
        if batch.is_empty() {
            return (bad, count);
        }
        assert!(batch.len() <= GROUP_PAGES);
        for (page, bytes) in batch {
            assert!(last < Some(page), "each page once, ascending");
            last = Some(page);
            count += 1;
            if *bytes != sealed[usize::try_from(page.0).unwrap()] {
                bad.push(page);
            }
        }
    }
}

/// How a sender sends its share of an epoch.
type Send = fn(&Guest, &dyn Frozen, Share, &[Page]) -> (Vec<PageIndex>, u64);

fn seal(freezer: &mut dyn Freezer, guest: &Arc<Guest>, epochs: u64, vcpus: u64) -> (u64, u64) {
    let by: Send = |_, frozen, share, sealed| send(frozen, share, sealed);
    seal_by(freezer, guest, epochs, vcpus, by)
}

/// Seals `epochs` epochs of a guest of `vcpus` writers, the senders of one still at work when the
/// next is sealed. Returns pages sent, and pages with other bytes than at their seal.
fn seal_by(
    freezer: &mut dyn Freezer,
    guest: &Arc<Guest>,
    epochs: u64,
    vcpus: u64,
    by: Send,
) -> (u64, u64) {
    let writers = guest.start(vcpus);
    let mut senders: Vec<JoinHandle<(u64, u64)>> = vec![];
    let (mut sent, mut bad) = (0, 0);
    for _ in 0..epochs {
        while guest.writes.swap(0, Ordering::Relaxed) < 20 {
            std::thread::yield_now();
        }
        let mut set = guest.harvest();
        if freezer.wants_ahead() {
            freezer.ahead(&guest.ram, &set).unwrap();
        }
        let stands = guest.gate.write().unwrap();
        let late = guest.harvest();
        set.union(&late);
        let set = Arc::new(set);
        let frozen = freezer.freeze(&guest.ram, &set, &late).unwrap();
        let sealed = Arc::new(guest.contents());
        drop(stands);
        freezer.prepare();
        // A sender takes the epochs in order.
        let before = std::mem::take(&mut senders);
        for (index, before) in (0..2).zip(before.into_iter().map(Some).chain([None, None])) {
            let share = Share { index, of: 2 };
            let (frozen, sealed, set) = (Arc::clone(&frozen), Arc::clone(&sealed), set.clone());
            let of = Arc::clone(guest);
            senders.push(std::thread::spawn(move || {
                let (mut sent, mut wrong) = before.map_or((0, 0), |before| before.join().unwrap());
                let (bad, count) = by(&of, frozen.as_ref(), share, &sealed);
                assert_eq!(count, share.count(&set));
                sent += count;
                wrong += bad.len() as u64;
                (sent, wrong)
            }));
        }
    }
    for sender in senders {
        let (count, wrong) = sender.join().unwrap();
        sent += count;
        bad += wrong;
    }
    guest.ends.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    (sent, bad)
}

#[test]
fn what_is_copied_is_what_was_sealed() {
    let guest = Guest::new();
    let mut freezer = CopyFreezer::new(guest.ram.pages()).unwrap();
    let (sent, bad) = seal(&mut freezer, &guest, 200, 3);
    assert!(sent > 1000);
    assert_eq!(bad, 0);
}

#[test]
fn what_is_protected_is_what_was_sealed() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    let (sent, bad) = seal(&mut freezer, &guest, 400, 3);
    assert!(sent > 1000);
    assert_eq!(bad, 0);
    assert!(freezer.kept().faults > 100, "{} faults", freezer.kept().faults);
}

/// What was copied ahead is sent unless it was written since; and it is of use.
#[test]
fn what_is_copied_ahead_is_what_was_sealed() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Hybrid, PATIENCE).unwrap();
    let share = Share { index: 0, of: 1 };
    for round in 1..20 {
        (0..300).for_each(|page| guest.write(page, round));
        let mut set = guest.harvest();
        freezer.ahead(&guest.ram, &set).unwrap();
        // Some are written again, one is new.
        (100..120).for_each(|page| guest.write(page, round + 100));
        guest.write(350, round);
        let late = guest.harvest();
        set.union(&late);
        let before = freezer.kept();
        let frozen = freezer.freeze(&guest.ram, &Arc::new(set), &late).unwrap();
        let sealed = guest.contents();
        assert_eq!(freezer.kept().ahead - before.ahead, 280);
        (0..400).for_each(|page| guest.write(page, 0));
        guest.harvest();
        let (bad, count) = send(frozen.as_ref(), share, &sealed);
        assert_eq!((bad, count), (vec![], 301), "round {round}");
    }
}

/// After an epoch that was too large, for instance: the guest runs on, and what was written since is
/// no longer known.
#[test]
fn copies_that_no_seal_took_are_forgotten() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Hybrid, PATIENCE).unwrap();
    (0..200).for_each(|page| guest.write(page, 1));
    assert!(freezer.wants_ahead());
    freezer.ahead(&guest.ram, &guest.harvest()).unwrap();
    (0..200).for_each(|page| guest.write(page, 2));
    guest.harvest();
    // The next seal asks anew, which begins what is late; it need not copy anything.
    freezer.wants_ahead();
    let mut set = guest.none();
    (7..10).for_each(|page| set.insert(PageIndex(page)));
    let frozen = freezer.freeze(&guest.ram, &Arc::new(set), &guest.none()).unwrap();
    let sealed = guest.contents();
    let (bad, count) = send(frozen.as_ref(), Share { index: 0, of: 1 }, &sealed);
    assert_eq!((bad, count), (vec![], 3));
}

#[test]
fn what_is_cheaper_is_what_was_sealed() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Hybrid, PATIENCE).unwrap();
    let (sent, bad) = seal(&mut freezer, &guest, 400, 3);
    assert!(sent > 1000);
    assert_eq!(bad, 0);
}

/// The tests above tell protection from nothing.
#[test]
fn without_protection_other_bytes_are_sent() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    freezer.break_for_test();
    let (_, bad) = seal(&mut freezer, &guest, 400, 3);
    assert!(bad > 0);
}

/// A page that was protected to save a call, and was written: the next time the call is worth it.
#[test]
fn a_gap_that_is_written_is_hot() {
    let guest = Guest::new();
    let userfault = Userfault::new(Arc::clone(guest.ram.mapping())).unwrap();
    let table = Table::new(guest.ram.clone(), userfault, PATIENCE);
    let (armed, plan) = table.arm(0, 0, 0b101, |_| 0b111);
    assert_eq!((armed, plan), (0b101, 0b111));
    table.protect(0, 3).unwrap();
    table.fault(1);
    let heat = |bit: usize| table.heat(0)[bit].load(Ordering::Relaxed);
    assert!(heat(1) > 0 && heat(0) == 0 && heat(2) == 0);
    assert_eq!(table.faults(), 0, "nothing was copied");
}

#[test]
fn an_epoch_that_nobody_takes_lets_the_guest_go_on() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    let mut set = PageSet::new(guest.ram.pages());
    (0..guest.ram.pages()).for_each(|page| set.insert(PageIndex(page)));
    let frozen = freezer.freeze(&guest.ram, &Arc::new(set), &guest.none()).unwrap();
    // Served by the thread, with the epoch there.
    guest.write(5, 1);
    assert_eq!(freezer.kept().faults, 1);
    drop(frozen);
    (0..guest.ram.pages()).for_each(|page| guest.write(page, 2));
    assert_eq!(freezer.kept().faults, 1);
}

/// The senders of an ended session may be the last to hold an epoch.
#[test]
fn an_epoch_outlives_its_freezer() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    let mut set = PageSet::new(guest.ram.pages());
    set.insert(PageIndex(89));
    set.insert(PageIndex(90));
    let frozen = freezer.freeze(&guest.ram, &Arc::new(set), &guest.none()).unwrap();
    drop(freezer);
    let sealed = guest.contents();
    guest.write(90, 7);
    let (bad, count) = send(frozen.as_ref(), Share { index: 0, of: 2 }, &sealed);
    assert_eq!((bad.len(), count), (0, 0));
    let (bad, count) = send(frozen.as_ref(), Share { index: 1, of: 2 }, &sealed);
    assert_eq!((bad.len(), count), (0, 2));
    drop(frozen);
    guest.write(89, 7);
}

#[test]
fn memory_that_is_given_back_was_copied_before() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    (0..100).for_each(|page| guest.write(page, page + 1));
    let frozen = freezer.freeze(&guest.ram, &Arc::new(guest.harvest()), &guest.none()).unwrap();
    let sealed = guest.contents();
    guest.ram.preserve();
    assert_eq!(freezer.kept().faults, 0);
    (0..100).for_each(|page| guest.write(page, 0));
    assert_eq!(freezer.kept().faults, 0, "nothing is protected any more");
    let (bad, count) = send(frozen.as_ref(), Share { index: 0, of: 1 }, &sealed);
    assert_eq!((bad.len(), count), (0, 100));
}

/// The dirty log may name a page that nobody wrote since, and that is still protected for the epoch
/// before. Armed for both, it would lose its protection with the first.
#[test]
fn a_page_that_is_named_again_is_not_armed_twice() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    guest.write(3, 1);
    let set = Arc::new(guest.harvest());
    let first = freezer.freeze(&guest.ram, &set, &guest.none()).unwrap();
    let second = freezer.freeze(&guest.ram, &set, &guest.none()).unwrap();
    let sealed = guest.contents();
    let share = Share { index: 0, of: 1 };
    assert_eq!(send(first.as_ref(), share, &sealed), (vec![], 1));
    guest.write(3, 2);
    assert_eq!(send(second.as_ref(), share, &sealed), (vec![], 1));
}

#[test]
fn more_epochs_than_slots_are_copied() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    let mut epochs = vec![];
    for value in 1..5 {
        guest.write(1, value);
        guest.write(value + 10, value);
        let frozen = freezer.freeze(&guest.ram, &Arc::new(guest.harvest()), &guest.none()).unwrap();
        epochs.push((frozen, guest.contents()));
    }
    for (frozen, sealed) in &epochs {
        let (bad, count) = send(frozen.as_ref(), Share { index: 0, of: 1 }, sealed);
        assert_eq!((bad.len(), count), (0, 2));
    }
}

/// A seal may protect a page again, beside others, that its taker has just unprotected and not yet
/// let go of. Who writes it then is told to the taker.
#[test]
fn who_waits_for_a_page_that_is_protected_again_while_it_is_taken_goes_on() {
    const LIMIT: Duration = Duration::from_secs(10);
    let guest = Guest::new();
    let userfault = Userfault::new(Arc::clone(guest.ram.mapping())).unwrap();
    let (reach, reached) = channel();
    let (go_on, goes_on) = channel::<()>();
    let goes_on = Mutex::new(goes_on);
    let delays = Delays::hook(move |point| {
        if point == "unprotect" {
            reach.send(()).unwrap();
            goes_on.lock().unwrap().recv().unwrap();
        }
    });
    let table = Arc::new(Table::new(guest.ram.clone(), userfault, PATIENCE).with_delays(delays));
    assert_eq!(table.arm(0, 0, 1 << 5, |free| free), (1 << 5, 1 << 5));
    table.protect(5, 1).unwrap();
    let takes = Arc::clone(&table);
    let taker = std::thread::spawn(move || {
        let mut room = PageBuffer::touched(1);
        takes.take(0, 0, 1 << 5, room.all_mut())
    });
    reached.recv_timeout(LIMIT).unwrap();
    table.protect(5, 1).unwrap();
    let (done, written) = channel();
    let writes = Arc::clone(&guest);
    let writer = std::thread::spawn(move || {
        writes.write(5, 7);
        done.send(()).unwrap();
    });
    let mut pages = vec![];
    while pages.is_empty() {
        table.userfault().faults(&mut pages).unwrap();
        std::thread::yield_now();
    }
    pages.iter().for_each(|page| table.fault(*page));
    go_on.send(()).unwrap();
    written.recv_timeout(LIMIT).expect("the writer goes on");
    assert_eq!(taker.join().unwrap(), 1 << 5);
    writer.join().unwrap();
}

#[test]
fn runs_and_ranks_of_bits() {
    assert_eq!(runs(0).count(), 0);
    assert_eq!(runs(u64::MAX).collect::<Vec<_>>(), [(0, 64)]);
    assert_eq!(runs(0b1011 | 1 << 63).collect::<Vec<_>>(), [(0, 2), (3, 1), (63, 1)]);
    assert_eq!(rank(0b1011, 0), 0);
    assert_eq!(rank(0b1011, 3), 2);
    assert_eq!(rank(u64::MAX, 63), 63);
}

#[test]
fn a_share_knows_its_runs_and_its_size() {
    for of in [1, 2, 3, 7] {
        for pages in [1, 63, 64, 65, 200, 64 * 7, 1000] {
            let mut all = PageSet::new(pages);
            all.insert_range(PageIndex(0), pages);
            for index in 0..of {
                let share = Share { index, of };
                assert_eq!(share.pages_of(pages), share.count(&all), "{share:?} of {pages}");
                for (first, count) in [(0, 1), (0, pages), (pages - 1, 1), (pages / 2, 2)] {
                    let mine = |page: u64| share.has(usize::try_from(page / 64).unwrap());
                    let expected = (first..first + count).all(mine);
                    let found = share.has_run(PageIndex(first), count);
                    assert_eq!(found, expected, "{share:?}: {count} pages from {first}");
                }
            }
        }
    }
}
