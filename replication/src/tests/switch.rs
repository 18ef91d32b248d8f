//! Planned switch-overs whose old host is wanted as the new one's backup.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use api::replication::{Compression, ReplicateData, ReplicationState};

use super::pair::{Backup, Primary};
use super::scripted::{greet, offer};
use super::{Workers, receive_options, replicate, small_machine, until};
use crate::backup::{prepare, receive_at, receive_back};
use crate::error::Error;
use crate::handover::{Legacy, WayBack};
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::observer::Event;
use crate::ownership::{Arbiter, FileArbiter, HostIdentity, Known, Record, Standing};
use crate::primary::{PrimaryHandle, layout, protect_back};
use crate::ram::Ram;
use crate::testing::{Machine, MemoryBuilder, MemoryGuest, Recorder, counters, memory};
use crate::transport::Address;
use crate::wire::{Message, Offer, SessionId, Welcome};

/// A port that is free at the moment.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn record(dir: &Path) -> Record {
    FileArbiter::new(dir.to_owned()).read().unwrap().unwrap()
}

/// A VM that B has been handed, with what either host is left with.
struct Handed {
    dir: tempfile::TempDir,
    arbiter: bool,
    return_port: u16,
    /// What was A's.
    machine: Arc<Machine>,
    legacy: Legacy,
    b: Backup,
    way_back: WayBack,
    /// What is B's.
    moved: Arc<Machine>,
}

fn options(url: &str, dir: Option<&Path>, return_port: u16) -> ReplicateData {
    ReplicateData {
        return_url: Some(format!("tcp:127.0.0.1:{return_port}")),
        compression: Compression::None,
        reconnect: true,
        epoch_min_ms: 1,
        timeout_ms: 1500,
        ..replicate(url, dir)
    }
}

impl Handed {
    fn over(machine: Arc<Machine>, workers: Option<Workers>, arbiter: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let records = arbiter.then(|| dir.path());
        let b = Backup::start(records);
        let return_port = free_port();
        let options = options(&b.url(), records, return_port);
        let a = Primary::with(&machine, options, HostIdentity::random()).unwrap();
        a.events.wait(|event| *event == Event::Synced).unwrap();
        let more = a.handle.info().epoch_committed + 3;
        machine.work(0, PageIndex(1), 1).unwrap();
        if workers.is_some() {
            until(|| a.handle.info(), |info| info.epoch_committed >= more);
        }
        a.handle.failover(false).unwrap();
        let way_back = b.handle.take_way_back().expect("somebody wants it back");
        let legacy = a.handle.take_legacy().expect("this host has its memory");
        a.handle.join();
        b.handle.join();
        if let Some(workers) = workers {
            workers.join();
        }
        assert_eq!(b.wrong(), Vec::<String>::new());
        let image = b.log.started.lock().unwrap().clone().expect("the replica runs");
        let moved = Machine::going_on(image, &b.log);
        Self { dir, arbiter, return_port, machine, legacy, b, way_back, moved }
    }

    fn records(&self) -> Option<&Path> {
        self.arbiter.then(|| self.dir.path())
    }

    /// A listens at the return address, around what it has.
    fn listen(&self) -> Backup {
        let builder =
            MemoryBuilder { kept: Some(self.machine.ram().clone()), ..MemoryBuilder::default() };
        let (log, events) = (Arc::clone(&builder.log), Arc::new(Recorder::default()));
        let mut options = receive_options(self.records());
        options.receiver_url = format!("tcp:127.0.0.1:{}", self.return_port);
        options.timeout_ms = 1500;
        let prepared = prepare(options).unwrap();
        let handle = receive_back(builder, prepared, self.legacy.clone(), events.clone()).unwrap();
        Backup { handle, events, log }
    }

    /// B protects what it was handed.
    fn protect(&self) -> (PrimaryHandle, Arc<Recorder>) {
        let events = Arc::new(Recorder::default());
        let guest = MemoryGuest(Arc::clone(&self.moved));
        let identity = self.b.handle.identity();
        let handle =
            protect_back(guest, self.way_back.clone(), identity, &Known::default(), events.clone())
                .unwrap();
        (handle, events)
    }
}

/// What the world heard of these machines, in whose order each goes on from the one before, is in the
/// image.
fn nothing_is_lost(image: &Ram, machines: &[&Machine]) {
    for machine in machines {
        for (worker, (has, heard)) in counters(image).iter().zip(machine.released()).enumerate() {
            assert!(*has >= heard, "worker {worker}: told {heard}, the image has {has}");
        }
    }
}

fn with_workers(seed: u64) -> Handed {
    let machine = small_machine();
    let workers = Workers::start(&machine, 3, seed);
    Handed::over(machine, Some(workers), true)
}

#[test]
fn the_pair_is_reversed_in_one_swap_and_output_waits_for_the_old_host() {
    let handed = with_workers(3);
    assert!(handed.way_back.is_reversed() && handed.legacy.is_heir());
    let (a, b) = (handed.legacy.identity.host, handed.b.handle.identity().host);
    let standing = record(handed.dir.path());
    assert_eq!(standing.generation.0, 2);
    assert_eq!(standing.standing, Standing::Pair { primary: b, backup: a });
    // The guest runs, and nothing leaves.
    assert!(handed.moved.is_holding() && handed.moved.is_tracking());
    let workers = Workers::start(&handed.moved, 3, 4);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(handed.moved.released_count(), 0);
    let heir = handed.listen();
    let (primary, events) = handed.protect();
    events.wait(|event| *event == Event::Reversed).unwrap();
    let first = primary.info().epoch_committed;
    until(|| primary.info(), |info| info.epoch_committed > first + 10);
    assert!(handed.moved.released_count() > 0 && handed.moved.is_holding());
    let info = primary.info();
    assert_eq!((info.state, info.generation), (ReplicationState::Protected, 2));
    let standing = record(handed.dir.path());
    assert_eq!(standing.generation.0, 2, "there was no other record in between: {standing}");
    assert_eq!(heir.handle.info().state, ReplicationState::Protected);
    // And back, in the same way.
    primary.failover(false).unwrap();
    heir.handle.join();
    primary.join();
    workers.join();
    assert_eq!(heir.wrong(), Vec::<String>::new());
    let image = heir.log.started.lock().unwrap().clone().unwrap();
    nothing_is_lost(&image, &[&handed.machine, &handed.moved]);
    let standing = record(handed.dir.path());
    assert_eq!(standing.standing, Standing::Pair { primary: a, backup: b });
    assert_eq!(standing.generation.0, 3);
}

#[test]
fn an_old_host_that_nobody_calls_goes_on_from_the_last_epoch() {
    let handed = with_workers(5);
    // B's guest runs for a while, and B is lost before anybody heard of that.
    for step in 0..20 {
        handed.moved.work(1, PageIndex(5), step).unwrap();
    }
    assert_eq!(handed.moved.released_count(), 0);
    let heir = handed.listen();
    heir.handle.join();
    assert_eq!(heir.handle.info().state, ReplicationState::TakenOver);
    assert_eq!(heir.wrong(), Vec::<String>::new());
    let standing = record(handed.dir.path());
    assert_eq!(standing.generation.0, 3);
    assert_eq!(standing.standing, Standing::Solo { owner: handed.legacy.identity.host });
    let image = heir.log.started.lock().unwrap().clone().unwrap();
    nothing_is_lost(&image, &[&handed.machine, &handed.moved]);
    // B wakes up: it lost the VM, and says nothing.
    let (primary, events) = handed.protect();
    events.wait(|event| matches!(event, Event::OwnershipLost { .. })).unwrap();
    primary.join();
    assert!(handed.moved.is_destroyed());
    assert_eq!(handed.moved.released_count(), 0);
    assert_eq!(primary.info().state, ReplicationState::Lost);
}

#[test]
fn a_new_host_that_does_not_reach_the_old_one_goes_on_alone_and_calls_it() {
    let handed = with_workers(6);
    let workers = Workers::start(&handed.moved, 2, 7);
    let (primary, events) = handed.protect();
    events.wait(|event| matches!(event, Event::Degraded { .. })).unwrap();
    let standing = record(handed.dir.path());
    assert_eq!(standing.generation.0, 3);
    assert_eq!(standing.standing, Standing::Solo { owner: handed.b.handle.identity().host });
    until(|| primary.info(), |_| handed.moved.released_count() > 0);
    // The old host listens late: its claim is lost, and what it has is good to go on from.
    let late = handed.listen();
    events.wait(|event| *event == Event::Resynced).unwrap();
    assert_eq!(record(handed.dir.path()).generation.0, 4);
    assert_eq!(late.log.reused.load(Ordering::Acquire), 1, "its memory was gone on from");
    primary.failover(false).unwrap();
    late.handle.join();
    primary.join();
    workers.join();
    assert_eq!(late.wrong(), Vec::<String>::new());
}

#[test]
fn a_person_ends_the_wait_for_the_old_host() {
    let handed = with_workers(8);
    let (primary, events) = handed.protect();
    assert_eq!(handed.moved.released_count(), 0);
    primary.stop().unwrap();
    primary.join();
    assert_eq!(events.events().last(), Some(&Event::Stopped));
    assert!(!handed.moved.is_holding() && !handed.moved.is_tracking());
    assert!(handed.moved.is_running());
    assert_eq!(record(handed.dir.path()).generation.0, 3);
}

#[test]
fn a_call_that_came_to_nothing_leaves_the_old_host_waiting_for_the_next() {
    let handed = with_workers(10);
    let heir = handed.listen();
    let HostIdentity { host, vm } = handed.b.handle.identity();
    let called = Offer {
        arbiter: true,
        base: handed.way_back.base,
        reversed: true,
        regions: layout(handed.machine.ram()),
        description: handed.legacy.description.clone(),
        ..offer()
    };
    let (writer, reader, word) = greet(&heir, SessionId(9), (vm.0, host.0), called);
    assert!(matches!(word, Message::Welcome(Welcome { has_base: true, .. })), "{word:?}");
    drop((writer, reader));
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(heir.handle.info().state, ReplicationState::Protected);
    let (primary, events) = handed.protect();
    events.wait(|event| *event == Event::Reversed).unwrap();
    assert_eq!(record(handed.dir.path()).generation.0, 2, "nobody asked for the VM");
    primary.failover(false).unwrap();
    heir.handle.join();
    primary.join();
    assert_eq!(heir.wrong(), Vec::<String>::new());
}

/// Whoever listens at the return address, but the old host with what it has.
#[test]
fn another_process_at_the_return_address_is_no_heir() {
    let handed = with_workers(9);
    let builder = MemoryBuilder::default();
    let address = Address::Tcp { host: "127.0.0.1".to_owned(), port: handed.return_port };
    let (events, identity) = (Arc::new(Recorder::default()), HostIdentity::random());
    let log = Arc::clone(&builder.log);
    let options = receive_options(Some(handed.dir.path()));
    let handle = receive_at(builder, &address, options, identity, events.clone()).unwrap();
    let other = Backup { handle, events, log };
    let (primary, events) = handed.protect();
    events.wait(|event| matches!(event, Event::Degraded { .. })).unwrap();
    // It is a backup as any other, from then on.
    events.wait(|event| *event == Event::Resynced).unwrap();
    assert_eq!(record(handed.dir.path()).generation.0, 4);
    primary.failover(false).unwrap();
    other.handle.join();
    primary.join();
    assert_eq!(other.wrong(), Vec::<String>::new());
}

const PAGES: u64 = 4096;

/// 16 MiB of which no page is zero.
fn full_machine() -> Arc<Machine> {
    let machine = Machine::new(memory(&[(0, PAGES)]));
    for page in 0..PAGES {
        let bytes = [u8::try_from(page % 251).unwrap() + 1; PAGE_SIZE];
        assert!(machine.ram().write_page(PageIndex(page), &bytes));
    }
    machine
}

/// Without an arbiter there is no pair to reverse: the VM is copied back, and only what was written.
#[test]
fn without_an_arbiter_only_what_was_written_is_copied_back() {
    let handed = Handed::over(full_machine(), None, false);
    assert!(!handed.way_back.is_reversed() && !handed.legacy.is_heir());
    assert!(!handed.moved.is_holding() && handed.moved.is_tracking());
    for page in 0..20 {
        handed.moved.work(0, PageIndex(7 + page * 200), page).unwrap();
    }
    let back = handed.listen();
    let (primary, events) = handed.protect();
    events.wait(|event| *event == Event::Resynced).unwrap();
    let sent = primary.info().bytes_sent;
    assert!(sent < 100 * PAGE_SIZE as u64, "{sent} bytes for 20 pages");
    handed.moved.work(0, PageIndex(1), 99).unwrap();
    let more = primary.info().epoch_committed + 1;
    until(|| primary.info(), |info| info.epoch_committed >= more);
    primary.failover(false).unwrap();
    back.handle.join();
    primary.join();
    assert_eq!(back.wrong(), Vec::<String>::new());
    let image = back.log.started.lock().unwrap().clone().unwrap();
    assert_eq!(crate::testing::checksum(&image), crate::testing::checksum(handed.moved.ram()));
}

/// Whoever protects it would let nothing out and never ask for it.
#[test]
fn a_reversed_pair_whose_old_host_has_nothing_known_is_not_begun() {
    let handed = with_workers(11);
    let way_back = WayBack { base: None, ..handed.way_back.clone() };
    let guest = MemoryGuest(Arc::clone(&handed.moved));
    let identity = handed.b.handle.identity();
    let observer = Arc::new(Recorder::default());
    let begun = protect_back(guest, way_back, identity, &Known::default(), observer);
    assert!(begun.is_err());
    assert_eq!(handed.moved.released_count(), 0);
}

/// The same where what is written is not noted from the start: it is found.
#[test]
fn a_page_that_was_written_unnoted_is_found() {
    let handed = Handed::over(full_machine(), None, true);
    handed.moved.forget(PageIndex(207));
    for page in [7, 207, 407] {
        handed.moved.work(0, PageIndex(page), page).unwrap();
    }
    let heir = handed.listen();
    let (primary, events) = handed.protect();
    events.wait(|event| *event == Event::Reversed).unwrap();
    handed.moved.work(0, PageIndex(1), 99).unwrap();
    primary.failover(false).unwrap();
    heir.handle.join();
    primary.join();
    assert!(!heir.wrong().is_empty(), "a page that differs was not seen");
}

#[test]
fn a_replica_that_does_not_start_leaves_the_vm_to_its_old_host() {
    let dir = tempfile::tempdir().unwrap();
    let b = Backup::start(Some(dir.path()));
    b.log.doomed.store(true, Ordering::Release);
    let return_port = free_port();
    let machine = small_machine();
    let options = options(&b.url(), Some(dir.path()), return_port);
    let a = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    a.events.wait(|event| *event == Event::Synced).unwrap();
    machine.work(0, PageIndex(3), 5).unwrap();
    // The claim is B's, and B does not run: A asks the arbiter and finds itself the backup. Whoever asked
    // for the switch-over is told of B's failure before.
    assert!(a.handle.failover(false).is_err());
    a.events.wait(|event| matches!(event, Event::FailoverFinished { .. })).unwrap();
    let legacy = a.handle.take_legacy().expect("this host has its memory");
    a.handle.join();
    assert!(legacy.is_heir());
    let builder = MemoryBuilder { kept: Some(machine.ram().clone()), ..MemoryBuilder::default() };
    let log = Arc::clone(&builder.log);
    let mut options = receive_options(Some(dir.path()));
    options.receiver_url = format!("tcp:127.0.0.1:{return_port}");
    options.timeout_ms = 400;
    let events = Arc::new(Recorder::default());
    let heir = receive_back(builder, prepare(options).unwrap(), legacy, events).unwrap();
    heir.join();
    assert_eq!(heir.info().state, ReplicationState::TakenOver);
    let image = log.started.lock().unwrap().clone().unwrap();
    nothing_is_lost(&image, &[&machine]);
    assert_eq!(record(dir.path()).generation.0, 3);
}

#[test]
fn a_host_that_cannot_be_the_backup_at_once_hands_over_without_a_reversal() {
    let dir = tempfile::tempdir().unwrap();
    let b = Backup::start(Some(dir.path()));
    let machine = small_machine();
    let options = options(&b.url(), Some(dir.path()), free_port());
    let a = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    a.events.wait(|event| *event == Event::Synced).unwrap();
    assert!(!a.handle.is_handing_over());
    a.handle.hand_over_alone().unwrap();
    let way_back = b.handle.take_way_back().expect("somebody wants it back");
    assert!(!way_back.is_reversed() && !a.handle.take_legacy().unwrap().is_heir());
    let owner = b.handle.identity().host;
    assert_eq!(record(dir.path()).standing, Standing::Solo { owner });
    let told = b.events.events();
    let began = told.iter().find(|event| matches!(event, Event::FailoverStarted { .. }));
    let Some(Event::FailoverStarted { reason, generation }) = began else { panic!("{told:?}") };
    assert_eq!((reason.as_str(), generation.0), ("The primary hands the VM over", 1));
    let won = Event::FailoverFinished { generation: generation.next() };
    assert_eq!(told.last(), Some(&won));
    a.events.wait(|event| *event == won).unwrap();
}

#[test]
fn a_prepared_backup_has_its_address_until_it_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = receive_options(Some(dir.path()));
    options.receiver_url = format!("tcp:127.0.0.1:{}", free_port());
    let prepared = prepare(options.clone()).unwrap();
    assert!(prepare(options.clone()).is_err(), "its address is taken");
    drop(prepared);
    prepare(options).unwrap();
}

/// A backup whose peer is not patient, and the directory of the records as the backup sees it.
fn impatient() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join("records");
    std::fs::create_dir(&records).unwrap();
    std::os::unix::fs::symlink(&records, dir.path().join("seen")).unwrap();
    (dir, records)
}

fn short(url: &str, records: &Path) -> ReplicateData {
    ReplicateData { timeout_ms: 400, heartbeat_ms: 100, ..replicate(url, Some(records)) }
}

#[test]
fn a_switch_over_that_the_backup_does_not_end_is_ended_by_the_arbiter() {
    let (dir, records) = impatient();
    let b = Backup::start(Some(&dir.path().join("seen")));
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 14);
    let a = Primary::with(&machine, short(&b.url(), &records), HostIdentity::random()).unwrap();
    a.events.wait(|event| *event == Event::Synced).unwrap();
    // B acknowledges the last epoch, and does not come to claim the VM.
    std::fs::remove_file(dir.path().join("seen")).unwrap();
    let refused = a.handle.failover(false).unwrap_err();
    assert!(refused.to_string().contains("did not take the VM over"), "{refused}");
    a.events.wait(|event| matches!(event, Event::Degraded { .. })).unwrap();
    let standing = Standing::Solo { owner: a.handle.identity().host };
    assert_eq!(record(&records).standing, standing);
    a.handle.join();
    assert!(machine.is_running() && !machine.is_holding());
    machine.power_off();
    workers.join();
}

#[test]
fn a_person_ends_a_switch_over_that_the_backup_does_not_end() {
    let (dir, records) = impatient();
    let b = Backup::start(Some(&dir.path().join("seen")));
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 15);
    let options = ReplicateData { timeout_ms: 20_000, ..replicate(&b.url(), Some(&records)) };
    let a = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    a.events.wait(|event| *event == Event::Synced).unwrap();
    std::fs::remove_file(dir.path().join("seen")).unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| a.handle.failover(false));
        b.events.wait(|event| matches!(event, Event::Undecided { .. })).unwrap();
        a.handle.stop().unwrap();
        let refused = asked.join().unwrap().unwrap_err();
        assert!(refused.to_string().contains("by a person"), "{refused}");
    });
    a.handle.join();
    assert_eq!(a.events.events().last(), Some(&Event::Stopped));
    assert!(machine.is_running() && !machine.is_holding());
    machine.power_off();
    workers.join();
    // B learns that it lost, and waits for the next one.
    std::os::unix::fs::symlink(&records, dir.path().join("seen")).unwrap();
    b.events.wait(|event| matches!(event, Event::OwnershipLost { .. })).unwrap();
    assert!(b.log.started.lock().unwrap().is_none());
}

/// The backup owns the VM and does not come to start it: whatever the old host has is nobody's.
#[test]
fn a_switch_over_whose_claim_was_won_is_the_backup_s_however_long_it_takes() {
    let (_dir, records) = impatient();
    let b = Backup::start(Some(&records));
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 16);
    let a = Primary::with(&machine, short(&b.url(), &records), HostIdentity::random()).unwrap();
    a.events.wait(|event| *event == Event::Synced).unwrap();
    let starting = b.log.starting.lock().unwrap();
    assert!(a.handle.failover(false).is_err());
    a.events.wait(|event| matches!(event, Event::OwnershipLost { .. })).unwrap();
    a.handle.join();
    assert!(machine.is_destroyed());
    drop(starting);
    b.handle.join();
    workers.join();
    assert_eq!(b.wrong(), Vec::<String>::new());
    let image = b.log.started.lock().unwrap().clone().expect("the replica runs");
    nothing_is_lost(&image, &[&machine]);
}

/// Without an arbiter the backup's word says whose the VM is, and it is heard however late it comes.
#[test]
fn without_an_arbiter_a_backup_that_starts_late_is_still_heard() {
    let b = Backup::start(None);
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 17);
    let options = ReplicateData { timeout_ms: 400, heartbeat_ms: 100, ..replicate(&b.url(), None) };
    let a = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    a.events.wait(|event| *event == Event::Synced).unwrap();
    let starting = b.log.starting.lock().unwrap();
    let refused = a.handle.failover(false).unwrap_err();
    assert!(refused.to_string().contains("did not take the VM over"), "{refused}");
    a.events.wait(|event| matches!(event, Event::Undecided { .. })).unwrap();
    assert!(!machine.is_destroyed());
    // A VM that ends says nothing of whose it is.
    let refused = a.handle.end().unwrap_err();
    assert!(matches!(refused, Error::Conflict(_)), "{refused}");
    assert!(machine.is_holding());
    drop(starting);
    a.handle.join();
    assert!(machine.is_destroyed());
    let ended = a.events.events();
    assert!(matches!(ended.last(), Some(Event::FailoverFinished { .. })), "{ended:?}");
    b.handle.join();
    workers.join();
    assert_eq!(b.wrong(), Vec::<String>::new());
    let image = b.log.started.lock().unwrap().clone().expect("the replica runs");
    nothing_is_lost(&image, &[&machine]);
}

/// The guest runs, but for the pauses of epochs, and its output is held.
fn goes_on_unheard(machine: &Machine) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !(machine.is_running() && machine.is_holding()) {
        assert!(Instant::now() < deadline, "holding: {}", machine.is_holding());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What the last epoch is too large for is copied anew, as with any epoch, and the VM is protected again.
#[test]
fn a_last_epoch_that_does_not_fit_fails_the_switch_over_and_not_the_protection() {
    for arbiter in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let records = arbiter.then(|| dir.path());
        let mut receive = receive_options(records);
        receive.staging_size = 1 << 20;
        let builder = MemoryBuilder { lenient: true, ..MemoryBuilder::default() };
        let b = Backup::with(builder, receive);
        let machine = Machine::new(memory(&[(0, 1024)]));
        let mut options = replicate(&b.url(), records);
        // The burst is found by the switch-over, not by an epoch before it.
        options.epoch_ms = 10_000;
        let a = Primary::with(&machine, options, HostIdentity::random()).unwrap();
        a.events.wait(|event| *event == Event::Synced).unwrap();
        machine.run(|ram| {
            (1..900).for_each(|page| {
                assert!(ram.write_page(PageIndex(page), &[7; PAGE_SIZE]));
            })
        });
        let refused = a.handle.failover(false).unwrap_err();
        assert!(refused.to_string().contains("exceeds the backup's staging"), "{refused}");
        let failed = a.events.wait(|event| matches!(event, Event::FailoverFailed { .. })).unwrap();
        assert!(format!("{failed:?}").contains("exceeds the backup's staging"), "{failed:?}");
        a.events.wait(|event| *event == Event::Resynced).unwrap();
        goes_on_unheard(&machine);
        machine.work(0, PageIndex(3), 5).unwrap();
        a.handle.failover(false).unwrap();
        a.handle.join();
        b.handle.join();
        assert_eq!(b.wrong(), Vec::<String>::new());
        let image = b.log.started.lock().unwrap().clone().expect("the replica runs");
        assert_eq!(crate::testing::checksum(&image), crate::testing::checksum(machine.ram()));
    }
}

/// The host that is to take it over lacks a tap: nothing is claimed, and the VM stays where it runs.
#[test]
fn a_switch_over_to_a_host_that_could_not_run_the_vm_is_refused() {
    for arbiter in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let records = arbiter.then(|| dir.path());
        let b = Backup::start(records);
        b.log.lacking.store(true, Ordering::Release);
        let machine = small_machine();
        let workers = Workers::start(&machine, 2, 17);
        let options = ReplicateData { reconnect: true, ..replicate(&b.url(), records) };
        let a = Primary::with(&machine, options, HostIdentity::random()).unwrap();
        let warned = b.handle.info().last_error.expect("a warning while there is time");
        assert!(warned.contains("The tap is in use"), "{warned}");
        a.events.wait(|event| *event == Event::Synced).unwrap();
        let refused = a.handle.failover(false).unwrap_err();
        assert!(refused.to_string().contains("The tap is in use"), "{refused}");
        a.events.wait(|event| *event == Event::Resynced).unwrap();
        assert_eq!(b.log.reused.load(Ordering::Acquire), 1, "its memory was gone on from");
        goes_on_unheard(&machine);
        b.log.lacking.store(false, Ordering::Release);
        a.handle.failover(false).unwrap();
        a.handle.join();
        b.handle.join();
        workers.join();
        assert_eq!(b.wrong(), Vec::<String>::new());
        let image = b.log.started.lock().unwrap().clone().expect("the replica runs");
        nothing_is_lost(&image, &[&machine]);
    }
}

/// It would be built with the first VM's images and taps.
#[test]
fn the_old_host_takes_no_other_vm() {
    let handed = Handed::over(small_machine(), None, false);
    assert!(!handed.legacy.is_heir());
    let back = handed.listen();
    let names = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
    let (_, _, word) = greet(&back, SessionId(7), names, offer());
    let Message::Refuse(reason) = word else { panic!("{word:?}") };
    assert!(reason.contains("for the VM that it handed over"), "{reason}");
    assert!(reason.contains("vm.receive-replica"), "{reason}");
    let (primary, events) = handed.protect();
    events.wait(|event| *event == Event::Resynced).unwrap();
    primary.stop().unwrap();
    // Nor once its own was let go.
    until(|| back.handle.info(), |info| info.state == ReplicationState::Disconnected);
    let (_, _, word) = greet(&back, SessionId(8), names, offer());
    assert!(matches!(word, Message::Refuse(_)), "{word:?}");
    let own = (handed.legacy.identity.vm.0, names.1);
    let (_, _, word) = greet(&back, SessionId(9), own, offer());
    assert!(matches!(word, Message::Welcome(_)), "{word:?}");
}
