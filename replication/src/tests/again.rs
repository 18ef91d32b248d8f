//! A primary that lost its backup calls it again.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use api::replication::{Compression, Degrade, ReplicateData, ReplicationInfo, ReplicationState};

use super::pair::{Backup, Primary, Proxy, Tamper};
use super::{Workers, receive_options, replicate, small_machine, until};
use crate::backup::receive_at;
use crate::error::ErrorKind;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::observer::Event;
use crate::ownership::{Arbiter, FileArbiter, HostIdentity, Known, Record, Standing};
use crate::testing::{Machine, MemoryBuilder, Recorder, counters, memory};

fn options(url: &str, arbiter: Option<&Path>) -> ReplicateData {
    ReplicateData { reconnect: true, ..replicate(url, arbiter) }
}

fn primary(machine: &Arc<Machine>, url: &str, arbiter: Option<&Path>) -> Primary {
    let primary = Primary::with(machine, options(url, arbiter), HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    primary
}

fn record(dir: &Path) -> Record {
    FileArbiter::new(dir.to_owned()).read().unwrap().unwrap()
}

fn is_protected(info: &ReplicationInfo) -> bool {
    info.state == ReplicationState::Protected
}

fn resynced(primary: &Primary, times: usize) {
    primary.events.wait_times(times, |event| *event == Event::Resynced).unwrap();
}

/// The backup goes on from what the primary told the world, whole.
fn takes_over(backup: &Backup, primary: &Primary, machine: &Machine) {
    primary.handle.failover(false).unwrap();
    backup.handle.join();
    assert_eq!(backup.wrong(), Vec::<String>::new());
    let image = backup.log.started.lock().unwrap().clone().expect("the replica runs");
    for (has, heard) in counters(&image).iter().zip(machine.released()) {
        assert!(*has >= heard, "told {heard}, the image has {has}");
    }
}

/// The primary sees the link end, and wins; the backup sees it later, when it is healed.
fn cut(proxy: &Proxy, primary: &Primary) {
    proxy.cut_front();
    until(|| primary.handle.info(), |info| info.state == ReplicationState::Degraded);
}

/// Clients see a state with what belongs to it, at whatever moment they ask.
#[test]
fn who_sees_it_protected_sees_no_attempts_to_get_there() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let proxy = Proxy::plain(backup.port());
    let machine = small_machine();
    let workers = Workers::start(&machine, 1, 1);
    let primary = primary(&machine, &proxy.url(), Some(dir.path()));
    let over = AtomicBool::new(false);
    let torn = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let torn = |info: &ReplicationInfo| {
                let whole = info.reconnect_attempts == 0
                    && (info.sync_progress - 1.0).abs() < f64::EPSILON
                    && info.epoch_committed <= info.epoch_sealed;
                is_protected(info) && !whole
            };
            let mut asked = std::iter::from_fn(|| {
                (!over.load(Ordering::Relaxed)).then(|| primary.handle.info())
            });
            asked.find(torn)
        });
        for times in 1..=6 {
            cut(&proxy, &primary);
            until(|| primary.handle.info(), |info| info.reconnect_attempts > 0);
            proxy.heal();
            resynced(&primary, times);
        }
        over.store(true, Ordering::Relaxed);
        client.join().unwrap()
    });
    assert_eq!(torn, None);
    takes_over(&backup, &primary, &machine);
    primary.handle.join();
    workers.join();
}

#[test]
fn a_cut_link_is_called_over_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let proxy = Proxy::plain(backup.port());
    let machine = small_machine();
    let workers = Workers::start(&machine, 3, 1);
    let primary = primary(&machine, &proxy.url(), Some(dir.path()));
    for times in 1..=3 {
        cut(&proxy, &primary);
        assert!(machine.is_running() && !machine.is_holding());
        until(|| primary.handle.info(), |info| info.reconnect_attempts > 0);
        proxy.heal();
        resynced(&primary, times);
        let info = until(|| primary.handle.info(), is_protected);
        assert_eq!(info.reconnect_attempts, 0);
        assert_eq!(info.generation, 1 + 2 * times as u64, "PAIR, SOLO, PAIR, ...");
        assert!(machine.is_holding());
    }
    let lost = |event: &&Event| matches!(event, Event::OwnershipLost { .. });
    assert_eq!(backup.events.events().iter().filter(lost).count(), 3);
    takes_over(&backup, &primary, &machine);
    primary.handle.join();
    workers.join();
}

#[test]
fn without_an_arbiter_too() {
    let backup = Backup::start(None);
    let proxy = Proxy::plain(backup.port());
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 4);
    let primary = primary(&machine, &proxy.url(), None);
    for times in 1..=2 {
        cut(&proxy, &primary);
        proxy.heal();
        resynced(&primary, times);
    }
    takes_over(&backup, &primary, &machine);
    primary.handle.join();
    workers.join();
}

/// A process that was started anew where the old one listened.
#[test]
fn a_backup_that_comes_back_with_another_name_is_called() {
    let dir = tempfile::tempdir().unwrap();
    let first = Backup::start(Some(dir.path()));
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 8);
    let primary = primary(&machine, &first.url(), Some(dir.path()));
    let address = first.handle.local_address().clone();
    first.handle.stop().unwrap();
    first.handle.join();
    let info = until(|| primary.handle.info(), |info| info.reconnect_attempts >= 2);
    assert_eq!(info.state, ReplicationState::Degraded);
    assert!(info.last_error.unwrap().contains("connect"), "{:?}", primary.handle.info());
    let builder = MemoryBuilder::default();
    let (log, events) = (Arc::clone(&builder.log), Arc::new(Recorder::default()));
    let options = receive_options(Some(dir.path()));
    let identity = HostIdentity::random();
    let handle = receive_at(builder, &address, options, identity, events.clone()).unwrap();
    let second = Backup { handle, events, log };
    resynced(&primary, 1);
    let standing = record(dir.path()).standing;
    let host = primary.handle.identity().host;
    assert_eq!(standing, Standing::Pair { primary: host, backup: identity.host });
    takes_over(&second, &primary, &machine);
    primary.handle.join();
    workers.join();
}

#[test]
fn a_guest_that_was_paused_for_want_of_a_backup_runs_with_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let first = Backup::start(Some(dir.path()));
    let machine = small_machine();
    let pause =
        ReplicateData { degrade: Degrade::Pause, ..options(&first.url(), Some(dir.path())) };
    let primary = Primary::with(&machine, pause, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let address = first.handle.local_address().clone();
    first.handle.stop().unwrap();
    first.handle.join();
    primary.events.wait(|event| matches!(event, Event::Degraded { .. })).unwrap();
    assert!(machine.is_suspended());
    let builder = MemoryBuilder::default();
    let options = receive_options(Some(dir.path()));
    let events = Arc::new(Recorder::default());
    let second =
        receive_at(builder, &address, options, HostIdentity::random(), events.clone()).unwrap();
    resynced(&primary, 1);
    assert!(!machine.is_suspended());
    machine.work(0, PageIndex(3), 5).unwrap();
    primary.handle.failover(false).unwrap();
    second.join();
}

#[test]
fn a_person_ends_the_attempts() {
    let backup = Backup::start(None);
    let machine = small_machine();
    let primary = primary(&machine, &backup.url(), None);
    backup.handle.stop().unwrap();
    backup.handle.join();
    until(|| primary.handle.info(), |info| info.reconnect_attempts >= 1);
    assert!(primary.handle.is_alone() && !primary.handle.is_over());
    let refused = primary.handle.failover(false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    assert!(refused.to_string().contains("Degraded"), "{refused}");
    primary.handle.stop().unwrap();
    primary.handle.join();
    assert!(primary.handle.is_over());
    assert_eq!(primary.handle.info().state, ReplicationState::Stopped);
    assert!(machine.is_running() && !machine.is_holding() && !machine.is_tracking());
    assert_eq!(primary.events.events().last(), Some(&Event::Stopped));
}

/// A peer that accepts the connection and says nothing.
#[test]
fn a_person_is_heard_while_a_call_is_not_answered() {
    let backup = Backup::start(None);
    let machine = small_machine();
    let primary = primary(&machine, &backup.url(), None);
    let port = backup.port();
    backup.handle.stop().unwrap();
    backup.handle.join();
    let silent = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let (held, _) = silent.accept().unwrap();
    let began = std::time::Instant::now();
    primary.handle.stop().unwrap();
    primary.handle.join();
    assert!(began.elapsed() < std::time::Duration::from_secs(4), "it waited for the peer");
    drop(held);
}

#[test]
fn a_refusal_that_time_does_not_change_ends_the_attempts() {
    let dir = tempfile::tempdir().unwrap();
    let first = Backup::start(Some(dir.path()));
    let machine = small_machine();
    let primary = primary(&machine, &first.url(), Some(dir.path()));
    let address = first.handle.local_address().clone();
    first.handle.stop().unwrap();
    first.handle.join();
    // Whoever listens there now has no arbiter.
    let events = Arc::new(Recorder::default());
    let (builder, identity) = (MemoryBuilder::default(), HostIdentity::random());
    let other = receive_at(builder, &address, receive_options(None), identity, events).unwrap();
    let failed = primary.events.wait(|event| matches!(event, Event::Failed { .. })).unwrap();
    assert!(format!("{failed:?}").contains("arbiter"), "{failed:?}");
    primary.handle.join();
    assert_eq!(primary.handle.info().state, ReplicationState::Stopped);
    assert!(machine.is_running() && !machine.is_holding());
    other.stop().unwrap();
}

#[test]
fn another_owner_s_record_ends_the_attempts() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let machine = small_machine();
    let primary = primary(&machine, &backup.url(), Some(dir.path()));
    backup.handle.stop().unwrap();
    backup.handle.join();
    primary.events.wait(|event| matches!(event, Event::Degraded { .. })).unwrap();
    let standing = record(dir.path());
    let next = Record {
        generation: standing.generation.next(),
        standing: Standing::Solo { owner: HostIdentity::random().host },
        ..standing
    };
    FileArbiter::new(dir.path().to_owned()).compare_and_swap(standing.generation, &next).unwrap();
    let failed = primary.events.wait(|event| matches!(event, Event::Failed { .. })).unwrap();
    assert!(format!("{failed:?}").contains("another owner"), "{failed:?}");
    primary.handle.join();
}

/// The second failure, in the middle of the copy anew.
#[test]
fn a_cut_in_the_copy_anew_leaves_nothing_to_take_over_and_the_next_attempt_succeeds() {
    const LET_THROUGH_BYTES: u64 = 8192;
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let (stalls, passed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (is_stalled, some) = (Arc::clone(&stalls), Arc::clone(&passed));
    // A link that carries a part of the copy, and what is said about it.
    let tamper: Tamper = Arc::new(move |_, offset, bytes| {
        if is_stalled.load(Ordering::Acquire) && offset + bytes.len() as u64 > LET_THROUGH_BYTES {
            some.store(true, Ordering::Release);
            bytes.clear();
        }
    });
    let proxy = Proxy::start(backup.port(), tamper);
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 6);
    let mut options = options(&proxy.url(), Some(dir.path()));
    options.compression = Compression::None;
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let more = primary.handle.info().epoch_committed + 20;
    until(|| primary.handle.info(), |info| info.epoch_committed >= more);
    cut(&proxy, &primary);
    stalls.store(true, Ordering::Release);
    proxy.heal();
    until(|| primary.handle.info(), |_| passed.load(Ordering::Acquire));
    assert_eq!(backup.handle.info().state, ReplicationState::Syncing);
    proxy.cut();
    until(|| backup.handle.info(), |info| info.state == ReplicationState::Disconnected);
    let refused = backup.handle.failover(true).unwrap_err();
    assert!(refused.to_string().contains("no committed replica"), "{refused}");
    until(|| primary.handle.info(), |info| info.state == ReplicationState::Degraded);
    assert!(machine.is_running() && !machine.is_holding());
    let host = primary.handle.identity().host;
    // It may have become that of a pair, of which the backup has not heard: sending is done before
    // what was sent has come.
    assert_eq!(record(dir.path()).runs_on(), host);
    stalls.store(false, Ordering::Release);
    proxy.heal();
    resynced(&primary, 1);
    takes_over(&backup, &primary, &machine);
    primary.handle.join();
    workers.join();
}

/// 16 MiB of which no page is zero.
fn full_machine() -> Arc<Machine> {
    let machine = Machine::new(memory(&[(0, PAGES)]));
    for page in 0..PAGES {
        let bytes = [u8::try_from(page % 251).unwrap() + 1; PAGE_SIZE];
        assert!(machine.ram().write_page(PageIndex(page), &bytes));
    }
    machine
}

const PAGES: u64 = 4096;

/// A machine that was copied, whose link was cut, and that wrote these pages meanwhile; the bytes that
/// went over the link in the first copy and in the one anew.
fn copied_anew(machine: &Arc<Machine>, pages: &[u64]) -> (Backup, Primary, u64, u64) {
    let backup = Backup::start(None);
    let proxy = Proxy::plain(backup.port());
    let mut options = options(&proxy.url(), None);
    options.compression = Compression::None;
    let primary = Primary::with(machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let first = primary.handle.info().bytes_sent;
    cut(&proxy, &primary);
    for page in pages {
        machine.work(0, PageIndex(*page), *page).unwrap();
    }
    proxy.heal();
    resynced(&primary, 1);
    let second = primary.handle.info().bytes_sent - first;
    // An epoch more, so that the backup compares the one before.
    machine.work(0, PageIndex(1), 99).unwrap();
    let more = primary.handle.info().epoch_committed + 1;
    until(|| primary.handle.info(), |info| info.epoch_committed >= more);
    primary.handle.failover(false).unwrap();
    backup.handle.join();
    primary.handle.join();
    (backup, primary, first, second)
}

#[test]
fn only_what_changed_is_copied_after_a_cut() {
    let machine = full_machine();
    let pages: Vec<u64> = (0..20).map(|at| 7 + at * 200).collect();
    let (backup, _, first, second) = copied_anew(&machine, &pages);
    assert_eq!(backup.log.reused.load(Ordering::Acquire), 1);
    assert_eq!(backup.log.built.load(Ordering::Acquire), 1);
    assert_eq!(backup.wrong(), Vec::<String>::new());
    assert!(first > PAGES * PAGE_SIZE as u64, "{first} bytes of a first copy");
    assert!(second < 100 * PAGE_SIZE as u64, "{second} bytes for 21 pages");
    let image = backup.log.started.lock().unwrap().clone().unwrap();
    assert_eq!(crate::testing::checksum(&image), crate::testing::checksum(machine.ram()));
}

#[test]
fn a_page_that_is_missing_in_what_changed_is_found() {
    let machine = full_machine();
    machine.forget(PageIndex(207));
    let (backup, ..) = copied_anew(&machine, &[7, 207, 407]);
    let wrong = backup.wrong();
    assert!(wrong.iter().any(|line| line.starts_with("before the next epoch")), "{wrong:?}");
    let image = backup.log.started.lock().unwrap().clone().unwrap();
    let page = |ram: &crate::ram::Ram, page: u64| {
        let mut bytes = [0; PAGE_SIZE];
        assert!(ram.read_page(PageIndex(page), &mut bytes));
        bytes
    };
    let differ: Vec<u64> =
        (0..PAGES).filter(|at| page(&image, *at) != page(machine.ram(), *at)).collect();
    assert_eq!(differ, [207]);
}

/// Whatever the primary believes, memory that was not kept of exactly that session is not gone on from.
#[test]
fn another_process_has_no_base_and_gets_everything() {
    let machine = full_machine();
    let first = Backup::start(None);
    let mut options = options(&first.url(), None);
    options.compression = Compression::None;
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let sent = primary.handle.info().bytes_sent;
    let address = first.handle.local_address().clone();
    first.handle.stop().unwrap();
    first.handle.join();
    until(|| primary.handle.info(), |info| info.reconnect_attempts > 0);
    let builder = MemoryBuilder::default();
    let (log, events) = (Arc::clone(&builder.log), Arc::new(Recorder::default()));
    let identity = HostIdentity::random();
    let handle =
        receive_at(builder, &address, receive_options(None), identity, events.clone()).unwrap();
    let second = Backup { handle, events, log };
    resynced(&primary, 1);
    assert!(primary.handle.info().bytes_sent - sent > PAGES * PAGE_SIZE as u64);
    assert_eq!(second.log.reused.load(Ordering::Acquire), 0);
    takes_over(&second, &primary, &machine);
    let image = second.log.started.lock().unwrap().clone().unwrap();
    assert_eq!(crate::testing::checksum(&image), crate::testing::checksum(machine.ram()));
}

/// A directory by a name that another one can be put behind, as behind a mount point.
struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["records", "empty"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let this = Self { dir };
        this.put("records");
        this
    }

    /// Where it is mounted.
    fn point(&self) -> std::path::PathBuf {
        self.dir.path().join("point")
    }

    fn behind(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn put(&self, name: &str) {
        let next = self.dir.path().join("next");
        std::os::unix::fs::symlink(self.behind(name), &next).unwrap();
        std::fs::rename(next, self.point()).unwrap();
    }
}

/// What is mounted is away between two sessions, and comes back in the worst moment.
#[test]
fn a_mount_that_was_away_takes_no_vm_from_its_owner() {
    let mount = Mount::new();
    let records = mount.behind("records");
    let backup = Backup::start(Some(&records));
    let proxy = Proxy::plain(backup.port());
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 12);
    let primary = primary(&machine, &proxy.url(), Some(&mount.point()));
    cut(&proxy, &primary);
    assert_eq!(record(&records).generation.0, 2);
    mount.put("empty");
    let before = primary.handle.info().reconnect_attempts;
    proxy.heal();
    let wrong = mount.behind("empty").join("gen-1");
    until(|| primary.handle.info(), |info| wrong.exists() || info.reconnect_attempts >= before + 3);
    mount.put("records");
    let resynced = |event: &Event| *event == Event::Resynced;
    let lost = |event: &Event| matches!(event, Event::OwnershipLost { .. });
    primary.events.wait(|event| resynced(event) || lost(event)).unwrap();
    assert!(!machine.is_destroyed(), "the record says that it is this host's");
    assert!(!wrong.exists(), "an empty directory was taken for one where nothing was");
    assert_eq!(record(&records).generation.0, 3);
    takes_over(&backup, &primary, &machine);
    primary.handle.join();
    workers.join();
}

/// Whatever wrote it: a record that says that this host runs the VM takes it from nobody.
#[test]
fn a_later_record_of_its_own_is_claimed_from_and_destroys_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let proxy = Proxy::plain(backup.port());
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 13);
    let primary = primary(&machine, &proxy.url(), Some(dir.path()));
    let arbiter = FileArbiter::new(dir.path().to_owned());
    let host = primary.handle.identity().host;
    for _ in 0..2 {
        let standing = record(dir.path());
        let generation = standing.generation;
        let solo = Standing::Solo { owner: host };
        let next = Record { generation: generation.next(), standing: solo, ..standing };
        arbiter.compare_and_swap(generation, &next).unwrap();
    }
    proxy.cut_front();
    let ended =
        |event: &Event| matches!(event, Event::Degraded { .. } | Event::OwnershipLost { .. });
    primary.events.wait(ended).unwrap();
    assert!(!machine.is_destroyed());
    let standing = record(dir.path());
    assert_eq!(standing.generation.0, 4);
    assert_eq!(standing.standing, Standing::Solo { owner: host });
    assert!(machine.is_running() && !machine.is_holding());
    proxy.heal();
    resynced(&primary, 1);
    takes_over(&backup, &primary, &machine);
    primary.handle.join();
    workers.join();
}

/// The same where the sessions are a person's, and not those of one protection.
#[test]
fn an_empty_mount_is_no_arbiter_for_who_protected_the_vm_before() {
    let mount = Mount::new();
    let (records, known) = (mount.behind("records"), Known::default());
    let backup = Backup::start(Some(&records));
    let machine = small_machine();
    let identity = HostIdentity::random();
    let options = || options(&backup.url(), Some(&mount.point()));
    let synced = |primary: Primary| {
        primary.events.wait(|event| *event == Event::Synced).unwrap();
        primary
    };
    let first = synced(Primary::knowing(&machine, options(), identity, &known).unwrap());
    first.handle.stop().unwrap();
    first.handle.join();
    mount.put("empty");
    let refused = Primary::knowing(&machine, options(), identity, &known).err().unwrap();
    assert!(refused.chain().contains("is its storage mounted"), "{}", refused.chain());
    assert!(machine.is_running() && !machine.is_holding());
    assert_eq!(FileArbiter::new(mount.behind("empty")).read().unwrap(), None);
    mount.put("records");
    let second = synced(Primary::knowing(&machine, options(), identity, &known).unwrap());
    assert_eq!(record(&records).generation.0, 3);
    takes_over(&backup, &second, &machine);
    second.handle.join();
    // Whoever took it over knows as well.
    let taken = Known::default();
    backup.handle.tell(&taken);
    let arbiter = format!("file:{}", records.display());
    assert_eq!(taken.of(identity.vm, Some(&arbiter)).generation().0, 4);
}

/// What only this host has seen binds nobody: the first protection was begun before the storage was there.
#[test]
fn a_first_protection_at_an_empty_mount_point_is_followed_by_one_at_the_right_place() {
    let mount = Mount::new();
    let records = mount.behind("records");
    mount.put("empty");
    let backup = Backup::start(Some(&records));
    let machine = small_machine();
    let options = options(&backup.url(), Some(&mount.point()));
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    // It comes back while a pair is written that is seen by nobody else.
    let wrong = mount.behind("empty").join("gen-1");
    until(|| primary.handle.info(), |_| wrong.exists());
    mount.put("records");
    let told = |event: &Event| matches!(event, Event::Synced | Event::Resynced);
    primary.events.wait(told).unwrap();
    assert_eq!(record(&records).generation.0, 1, "what stood elsewhere counts for nothing");
    assert!(machine.is_holding() && !machine.is_destroyed());
    machine.work(0, PageIndex(3), 5).unwrap();
    takes_over(&backup, &primary, &machine);
    primary.handle.join();
}

/// The same where it comes back after a session has looked at the record, and before it puts its own in that one's place.
#[test]
fn a_record_that_only_this_host_has_seen_is_not_waited_for() {
    let mount = Arc::new(Mount::new());
    let records = mount.behind("records");
    mount.put("empty");
    let backup = Backup::start(Some(&records));
    // Control, data and bell of the session whose pair is refused, and then the control connection of the next.
    let next = replicate("tcp:none:1", None).connections as usize + 2;
    let mounts = Arc::clone(&mount);
    let proxy = Proxy::start(
        backup.port(),
        Arc::new(move |number, offset, _| {
            if (number, offset) == (next, 0) {
                mounts.put("records");
            }
        }),
    );
    let machine = small_machine();
    let options = options(&proxy.url(), Some(&mount.point()));
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    let resynced = |event: &Event| *event == Event::Resynced;
    primary.events.wait(resynced).unwrap();
    let unfounded = |event: &Event| matches!(event, Event::Undecided { error } if error.contains("where generation 1 was"));
    assert!(primary.events.events().iter().any(unfounded), "it was not asked for");
    assert_eq!(record(&records).generation.0, 1, "what stood elsewhere counts for nothing");
    assert!(machine.is_holding() && !machine.is_destroyed());
    machine.work(0, PageIndex(3), 5).unwrap();
    takes_over(&backup, &primary, &machine);
    primary.handle.join();
}
