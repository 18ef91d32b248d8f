//! Pages that are read in memory after they were handed out.

use std::sync::mpsc::{Receiver, RecvTimeoutError};

use super::*;

const LIMIT: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(20);
const WHOLE: Share = Share { index: 0, of: 1 };

/// What a sender does whose device reads memory when all is posted, the last first. `at_post`: a build
/// that lets go of pages then.
fn read_late(
    guest: &Guest,
    frozen: &dyn Frozen,
    share: Share,
    sealed: &[Page],
    at_post: bool,
) -> (Vec<PageIndex>, u64) {
    let mut scratch = PageBuffer::touched(GROUP_PAGES);
    let mut cursor = Cursor::default();
    let (mut bad, mut count, mut posted) = (vec![], 0, vec![]);
    let is_sealed =
        |page: PageIndex, bytes: &Page| *bytes == sealed[usize::try_from(page.0).unwrap()];
    loop {
        let (mut batch, mut loans) = (Vec::new(), Vec::new());
        frozen.lend(share, &mut cursor, scratch.all_mut(), &mut batch, &mut loans);
        if batch.is_empty() {
            break;
        }
        count += batch.len() as u64;
        bad.extend(batch.iter().filter(|(page, bytes)| !is_sealed(*page, bytes)).map(|at| at.0));
        let lent = |page: &PageIndex| loans.iter().any(|loan: &Loan| loan.has(*page));
        let pages: Vec<_> = batch.iter().map(|(page, _)| *page).filter(lent).collect();
        if at_post {
            loans.clear();
        }
        posted.push((pages, loans));
    }
    std::thread::yield_now();
    while let Some((pages, loans)) = posted.pop() {
        for page in pages {
            let mut bytes = [0; PAGE_SIZE];
            assert!(guest.ram.read_page(page, &mut bytes));
            if !is_sealed(page, &bytes) {
                bad.push(page);
            }
        }
        drop(loans);
    }
    (bad, count)
}

#[test]
fn what_is_lent_is_what_was_sealed() {
    for cow in [Cow::Protect, Cow::Hybrid] {
        let guest = Guest::new();
        let mut freezer = ProtectFreezer::new(&guest.ram, cow, PATIENCE).unwrap();
        let by: Send =
            |guest, frozen, share, sealed| read_late(guest, frozen, share, sealed, false);
        let (sent, bad) = seal_by(&mut freezer, &guest, 400, 3, by);
        assert!(sent > 1000);
        assert_eq!(bad, 0, "{cow:?}");
    }
}

/// The test above tells a build that waits for completions from one that does not.
#[test]
fn what_is_let_go_when_it_is_posted_is_other_bytes() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    let by: Send = |guest, frozen, share, sealed| read_late(guest, frozen, share, sealed, true);
    let (_, bad) = seal_by(&mut freezer, &guest, 400, 3, by);
    assert!(bad > 0);
}

/// An epoch of a few pages, all of which are lent.
fn lent(guest: &Arc<Guest>, freezer: &mut ProtectFreezer) -> (Arc<dyn Frozen>, Vec<Loan>) {
    (4..8).for_each(|page| guest.write(page, page));
    let frozen = freezer.freeze(&guest.ram, &Arc::new(guest.harvest()), &guest.none()).unwrap();
    let mut scratch = PageBuffer::touched(GROUP_PAGES);
    let (mut batch, mut loans) = (Vec::new(), Vec::new());
    frozen.lend(WHOLE, &mut Cursor::default(), scratch.all_mut(), &mut batch, &mut loans);
    assert_eq!((batch.len(), loans.len()), (4, 1));
    assert!((4..8).all(|page| loans[0].has(PageIndex(page))) && !loans[0].has(PageIndex(8)));
    drop(batch);
    (frozen, loans)
}

/// Writes a page, and says when it is written.
fn write_aside(guest: &Arc<Guest>, page: u64, value: u64) -> Receiver<()> {
    let (done, written) = channel();
    let guest = Arc::clone(guest);
    std::thread::spawn(move || {
        guest.write(page, value);
        let _ = done.send(());
    });
    written
}

fn until(what: impl Fn() -> bool) {
    let end = std::time::Instant::now() + LIMIT;
    while !what() {
        assert!(std::time::Instant::now() < end, "it never comes");
        std::thread::yield_now();
    }
}

#[test]
fn who_writes_a_page_that_is_lent_waits_for_its_end() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    let (frozen, mut loans) = lent(&guest, &mut freezer);
    let sealed = guest.contents();
    let written = write_aside(&guest, 5, 99);
    until(|| freezer.kept().faults == 1);
    assert_eq!(written.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout));
    // Others of the group are given back; that one is not.
    assert!(loans[0].retain(|page| page.0 == 5 || page.0 == 6));
    guest.write(4, 77);
    guest.write(7, 77);
    assert_eq!(freezer.kept().faults, 1);
    assert_eq!(written.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout));
    assert!(guest.contents()[5] == sealed[5]);
    drop(loans);
    written.recv_timeout(LIMIT).unwrap();
    guest.write(6, 77);
    assert_eq!(freezer.kept().faults, 1);
    assert!(!frozen.is_revoked());
}

/// The epoch may be over, and its session, long before the device is done.
#[test]
fn a_loan_outlives_its_epoch_and_its_freezer() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    let (frozen, loans) = lent(&guest, &mut freezer);
    // Named again, and still lent: copied, since nobody has written it.
    let mut set = guest.none();
    set.insert(PageIndex(5));
    let again = freezer.freeze(&guest.ram, &Arc::new(set), &guest.none()).unwrap();
    let sealed = guest.contents();
    assert_eq!(send(again.as_ref(), WHOLE, &sealed), (vec![], 1));
    drop((frozen, again, freezer));
    let written = write_aside(&guest, 5, 99);
    assert_eq!(written.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout));
    drop(loans);
    written.recv_timeout(LIMIT).unwrap();
}

#[test]
fn a_device_that_hangs_keeps_no_writer() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, SHORT).unwrap();
    let (frozen, loans) = lent(&guest, &mut freezer);
    guest.write(5, 99);
    assert!(frozen.is_revoked());
    guest.write(6, 99);
    assert_eq!(freezer.kept().faults, 1, "nothing is lent any more");
    drop(frozen);
    // The page is the next epoch's now, which a loan that ends late must not let go.
    (4..8).for_each(|page| guest.write(page, page));
    let next = freezer.freeze(&guest.ram, &Arc::new(guest.harvest()), &guest.none()).unwrap();
    let sealed = guest.contents();
    drop(loans);
    guest.write(5, 100);
    assert_eq!(freezer.kept().faults, 2, "it is still protected");
    let mut scratch = PageBuffer::touched(GROUP_PAGES);
    let (mut batch, mut loans) = (Vec::new(), Vec::new());
    next.lend(WHOLE, &mut Cursor::default(), scratch.all_mut(), &mut batch, &mut loans);
    assert!(loans.is_empty(), "nothing is lent for good");
    let of = |page: PageIndex| usize::try_from(page.0).unwrap();
    assert!(batch.iter().all(|(page, bytes)| **bytes == sealed[of(*page)]));
}

#[test]
fn memory_that_is_given_back_is_lent_to_nobody() {
    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, SHORT).unwrap();
    let (frozen, loans) = lent(&guest, &mut freezer);
    let (done, preserved) = channel();
    let ram = guest.ram.clone();
    std::thread::spawn(move || {
        ram.preserve();
        let _ = done.send(());
    });
    preserved.recv_timeout(LIMIT).expect("it waits no longer than the patience");
    assert!(frozen.is_revoked());
    drop(loans);

    let guest = Guest::new();
    let mut freezer = ProtectFreezer::new(&guest.ram, Cow::Protect, PATIENCE).unwrap();
    let (frozen, loans) = lent(&guest, &mut freezer);
    let (done, preserved) = channel();
    let ram = guest.ram.clone();
    std::thread::spawn(move || {
        ram.preserve();
        let _ = done.send(());
    });
    assert_eq!(preserved.recv_timeout(SHORT), Err(RecvTimeoutError::Timeout));
    drop(loans);
    preserved.recv_timeout(LIMIT).unwrap();
    assert!(!frozen.is_revoked());
}

/// The copy that the checksum is made of is there anyway: it is sent instead.
#[test]
fn a_page_that_somebody_waits_for_is_not_lent() {
    let guest = Guest::new();
    let userfault = Userfault::new(Arc::clone(guest.ram.mapping())).unwrap();
    let (reach, reached) = channel();
    let (go_on, goes_on) = channel::<()>();
    let goes_on = Mutex::new(goes_on);
    let delays = Delays::hook(move |point| {
        if point == "take" {
            reach.send(()).unwrap();
            goes_on.lock().unwrap().recv().unwrap();
        }
    });
    let table = Table::new(guest.ram.clone(), userfault, PATIENCE).with_delays(delays);
    let table = Arc::new(table);
    assert_eq!(table.arm(0, 0, 0b11 << 5, |free| free), (0b11 << 5, 0b11 << 5));
    table.protect(5, 2).unwrap();
    let takes = Arc::clone(&table);
    let taker = std::thread::spawn(move || {
        let mut room = PageBuffer::touched(2);
        takes.borrow(0, 0, 0b11 << 5, room.all_mut())
    });
    reached.recv_timeout(LIMIT).unwrap();
    let written = write_aside(&guest, 5, 7);
    let mut pages = vec![];
    until(|| {
        let mut found = vec![];
        table.userfault().faults(&mut found).unwrap();
        found.iter().for_each(|page| table.fault(*page));
        !found.is_empty()
    });
    pages.clear();
    table.userfault().faults(&mut pages).unwrap();
    go_on.send(()).unwrap();
    assert_eq!(taker.join().unwrap(), (0b11 << 5, 1 << 6));
    written.recv_timeout(LIMIT).expect("it waits for no device");
    assert_eq!(table.overdue(), None);
    table.give_back(0, 1 << 6);
    guest.write(6, 7);
}
