//! When one side is lost.

use std::sync::Arc;
use std::time::Duration;

use api::replication::{ReplicationInfo, ReplicationState};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::pair::{Backup, Primary, Proxy};
use super::{Random, Workers, receive_options, replicate, small_machine, until};
use crate::backup::receive_at;
use crate::error::ErrorKind;
use crate::observer::{Event, Observer};
use crate::ownership::{Arbiter, FileArbiter, HostIdentity, Known, Standing};
use crate::primary::protect;
use crate::testing::{Machine, MemoryBuilder, MemoryGuest, Recorder, counters, memory};
use crate::transport::Address;

fn is_synced(event: &Event) -> bool {
    *event == Event::Synced
}

/// What the world heard is in the image that goes on.
fn assert_nothing_heard_is_lost(backup: &Backup, machine: &Machine) {
    let image = backup.log.started.lock().unwrap().clone().expect("the replica runs");
    for (worker, (has, heard)) in counters(&image).iter().zip(machine.released()).enumerate() {
        assert!(*has >= heard, "worker {worker}: told {heard}, the image has {has}");
    }
}

#[test]
fn cut_at_random_moments_exactly_one_owns() {
    let mut random = Random(0xC0FFEE);
    let (mut backups, mut primaries) = (0, 0);
    for seed in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let backup = Backup::start(Some(dir.path()));
        let proxy = Proxy::plain(backup.port());
        let machine = small_machine();
        let workers = Workers::start(&machine, 3, seed);
        let primary = Primary::start(&machine, &proxy.url(), Some(dir.path())).unwrap();
        primary.events.wait(is_synced).unwrap();
        let more = primary.handle.info().epoch_committed + random.next() % 20;
        until(|| primary.handle.info(), |info| info.epoch_committed >= more);
        proxy.cut();
        primary.handle.join();
        let owner = FileArbiter::new(dir.path().to_owned()).read().unwrap().unwrap();
        assert_eq!(owner.generation.0, 2, "seed {seed}");
        let by_primary = Standing::Solo { owner: primary.handle.identity().host };
        if owner.standing == by_primary {
            primaries += 1;
            assert!(machine.is_running() && !machine.is_holding(), "seed {seed}");
            assert_eq!(primary.handle.info().state, ReplicationState::Degraded);
            backup.events.wait(|e| matches!(e, Event::OwnershipLost { .. })).unwrap();
            assert!(backup.log.started.lock().unwrap().is_none(), "seed {seed}");
            machine.power_off();
            backup.handle.stop().unwrap();
        } else {
            backups += 1;
            backup.handle.join();
            assert_eq!(backup.handle.info().state, ReplicationState::TakenOver, "seed {seed}");
            assert!(machine.is_destroyed(), "seed {seed}");
            assert_eq!(primary.handle.info().state, ReplicationState::Lost);
            assert_nothing_heard_is_lost(&backup, &machine);
        }
        workers.join();
        assert_eq!(backup.wrong(), Vec::<String>::new(), "seed {seed}");
    }
    assert!(backups + primaries == 40);
}

#[test]
fn a_primary_that_vanishes_is_replaced_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let proxy = Proxy::plain(backup.port());
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 9);
    let primary = Primary::start(&machine, &proxy.url(), Some(dir.path())).unwrap();
    primary.events.wait(is_synced).unwrap();
    // The primary asks an arbiter that does not answer: it must hold its output, whatever comes.
    let aside = dir.path().join("aside");
    std::fs::create_dir(&aside).unwrap();
    backup.handle.failover(false).unwrap();
    primary.handle.join();
    backup.handle.join();
    workers.join();
    let info = backup.handle.info();
    let times = info.takeover.unwrap();
    assert!(times.detected_us <= times.owned_us && times.owned_us <= times.resumed_us);
    assert_eq!(info.generation, 2);
    assert_nothing_heard_is_lost(&backup, &machine);
    assert_eq!(backup.wrong(), Vec::<String>::new());
    let told = backup.events.events();
    assert!(matches!(told.last(), Some(Event::FailoverFinished { .. })), "{told:?}");
    drop(proxy);
}

#[test]
fn without_an_arbiter_only_a_person_takes_over() {
    let backup = Backup::start(None);
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 5);
    let proxy = Proxy::plain(backup.port());
    let early = backup.handle.failover(true).unwrap_err();
    assert_eq!(early.kind(), ErrorKind::Conflict);
    let primary = Primary::start(&machine, &proxy.url(), None).unwrap();
    primary.events.wait(is_synced).unwrap();
    let alive = backup.handle.failover(true).unwrap_err();
    assert_eq!(alive.kind(), ErrorKind::Conflict);
    proxy.cut();
    primary.handle.join();
    assert_eq!(primary.handle.info().state, ReplicationState::Degraded);
    assert!(machine.is_running() && !machine.is_holding());
    until(|| backup.handle.info(), |info| info.state == ReplicationState::Suspended);
    assert!(backup.log.started.lock().unwrap().is_none());
    let unforced = backup.handle.failover(false).unwrap_err();
    assert_eq!(unforced.kind(), ErrorKind::Conflict);
    machine.power_off();
    workers.join();
    backup.handle.failover(true).unwrap();
    assert!(backup.log.started.lock().unwrap().is_some());
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

#[test]
fn a_lost_backup_leaves_the_guest_running_or_paused_as_told() {
    for pause in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let backup = Backup::start(Some(dir.path()));
        let machine = small_machine();
        let workers = Workers::start(&machine, 2, 7);
        let mut options = replicate(&backup.url(), Some(dir.path()));
        if pause {
            options.degrade = api::replication::Degrade::Pause;
        }
        let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
        primary.events.wait(is_synced).unwrap();
        backup.handle.stop().unwrap();
        primary.handle.join();
        assert_eq!(machine.is_suspended(), pause);
        assert!(!machine.is_destroyed() && !machine.is_holding());
        let told = primary.events.events();
        let degraded = told.iter().filter(|e| matches!(e, Event::Degraded { .. })).count();
        assert_eq!(degraded, 1, "{told:?}");
        machine.power_off();
        workers.join();
    }
}

#[test]
fn output_stays_held_while_nobody_can_say_who_owns() {
    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join("records");
    std::fs::create_dir(&records).unwrap();
    let backup = Backup::start(Some(&records));
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 11);
    let primary = Primary::start(&machine, &backup.url(), Some(&records)).unwrap();
    primary.events.wait(is_synced).unwrap();
    // The storage goes away, then the backup.
    let away = dir.path().join("away");
    std::fs::rename(&records, &away).unwrap();
    backup.handle.stop().unwrap();
    primary.events.wait(|e| matches!(e, Event::Undecided { .. })).unwrap();
    let info = primary.handle.info();
    assert_eq!(info.state, ReplicationState::Suspended);
    assert!(info.last_error.is_some());
    let before = machine.released_count();
    assert!(machine.is_holding());
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(machine.released_count(), before, "something left while nobody owned");
    std::fs::rename(&away, &records).unwrap();
    primary.events.wait(|e| matches!(e, Event::Degraded { .. })).unwrap();
    primary.handle.join();
    assert!(!machine.is_holding());
    machine.power_off();
    workers.join();
}

#[test]
fn an_arbiter_whose_records_are_gone_decides_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let machine = small_machine();
    let primary = Primary::start(&machine, &backup.url(), Some(dir.path())).unwrap();
    primary.events.wait(is_synced).unwrap();
    // The directory is still there, as an empty mount point would be.
    let (record, aside) = (dir.path().join("gen-1"), dir.path().join("aside"));
    std::fs::rename(&record, &aside).unwrap();
    backup.handle.stop().unwrap();
    let undecided = primary.events.wait(|e| matches!(e, Event::Undecided { .. }));
    let Some(Event::Undecided { error }) = undecided else { panic!("{undecided:?}") };
    assert!(error.contains("no record where generation 1 was"), "{error}");
    assert!(!machine.is_destroyed() && machine.is_holding());
    std::fs::rename(&aside, &record).unwrap();
    primary.events.wait(|e| matches!(e, Event::Degraded { .. })).unwrap();
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding());
}

#[test]
fn after_a_take_over_the_vm_can_be_protected_again() {
    let dir = tempfile::tempdir().unwrap();
    let first = Backup::start(Some(dir.path()));
    let machine = small_machine();
    let primary = Primary::start(&machine, &first.url(), Some(dir.path())).unwrap();
    primary.events.wait(is_synced).unwrap();
    first.handle.failover(false).unwrap();
    primary.handle.join();
    let image = first.log.started.lock().unwrap().clone().unwrap();
    let moved = Machine::new(image);
    let second = Backup::start(Some(dir.path()));
    let stranger = Primary::start(&machine, &second.url(), Some(dir.path()));
    let refused = stranger.err().expect("the record names another owner");
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
    let options = replicate(&second.url(), Some(dir.path()));
    let again = Primary::with(&moved, options, first.handle.identity()).unwrap();
    again.events.wait(is_synced).unwrap();
    assert_eq!(again.handle.info().generation, 3);
    again.handle.stop().unwrap();
    assert_eq!(second.wrong(), Vec::<String>::new());
}

#[test]
fn epochs_beyond_the_staging_are_copied_anew_and_given_up_at_last() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = receive_options(Some(dir.path()));
    options.staging_size = 1 << 20;
    let builder = MemoryBuilder { lenient: true, ..MemoryBuilder::default() };
    let backup = Backup::with(builder, options);
    // 4 MiB, all of it written again and again in single steps: no epoch can be small.
    let machine = Machine::new(memory(&[(0, 1024)]));
    let writer = Arc::clone(&machine);
    let thread = std::thread::spawn(move || {
        let mut fill = 0u64;
        while writer
            .run(|ram| {
                fill += 1;
                for page in 1..1024u64 {
                    let content = [u8::try_from(fill % 251).unwrap(); crate::ids::PAGE_SIZE];
                    assert!(ram.write_page(crate::ids::PageIndex(page), &content));
                }
            })
            .is_some()
        {}
    });
    let primary = Primary::start(&machine, &backup.url(), Some(dir.path())).unwrap();
    primary.handle.join();
    let told = primary.events.events();
    assert!(told.contains(&Event::Synced), "{told:?}");
    let Some(Event::Degraded { reason, .. }) = told.last() else { panic!("{told:?}") };
    assert!(reason.contains("exceeds the backup's staging"), "{reason}");
    assert!(machine.is_running() && !machine.is_holding());
    machine.power_off();
    thread.join().unwrap();
    until(|| backup.handle.info(), |info| info.state == ReplicationState::Disconnected);
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

/// Says that a switch-over has ended, and waits until that was heard.
struct Slow(Recorder, Sender<()>, Receiver<()>);

impl Observer for Slow {
    fn event(&self, event: Event) {
        let is_end = matches!(event, Event::FailoverFinished { .. });
        self.0.event(event);
        if is_end {
            self.1.send(()).unwrap();
            self.2.recv().unwrap();
        }
    }
}

/// Whoever asks for a switch-over, and then what was told, finds its end there.
#[test]
fn the_end_of_a_switch_over_is_told_before_it_is_answered() {
    for by_primary in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (told, ends) = unbounded();
        let (goes_on, waits) = unbounded();
        let slow = Arc::new(Slow(Recorder::default(), told, waits));
        let quick = Arc::new(Recorder::default());
        let of = |is_slow| -> Arc<dyn Observer> {
            if is_slow { Arc::clone(&slow) as _ } else { Arc::clone(&quick) as _ }
        };
        let address = Address::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
        let (builder, options) = (MemoryBuilder::default(), receive_options(Some(dir.path())));
        let identity = HostIdentity::random();
        let backup = receive_at(builder, &address, options, identity, of(!by_primary)).unwrap();
        let guest = MemoryGuest(small_machine());
        let options = replicate(&backup.local_address().to_string(), Some(dir.path()));
        let (identity, known) = (HostIdentity::random(), Known::default());
        let primary = protect(guest, options, identity, &known, of(by_primary)).unwrap();
        let recorder = if by_primary { &slow.0 } else { &quick };
        recorder.wait(is_synced).unwrap();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| match by_primary {
                true => primary.failover(false),
                false => backup.failover(false),
            });
            ends.recv_timeout(Duration::from_secs(60)).unwrap();
            std::thread::sleep(Duration::from_millis(200));
            let is_answered = asked.is_finished();
            goes_on.send(()).unwrap();
            asked.join().unwrap().unwrap();
            assert!(!is_answered, "by the primary: {by_primary}");
        });
        primary.join();
        backup.join();
    }
}

/// A typing error would else be found after a whole first copy, when the primary says that the record is there.
#[test]
fn a_backup_says_at_once_that_its_arbiter_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(&dir.path().join("typo")));
    let told = |info: &ReplicationInfo| {
        info.last_error.as_ref().is_some_and(|error| error.contains("typo"))
    };
    until(|| backup.handle.info(), told);
    backup.handle.stop().unwrap();
}
