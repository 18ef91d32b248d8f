//! While nothing breaks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::replication::{Compression, Cow, ReplicationState};

use super::pair::{Backup, Primary, Proxy};
use super::{Workers, replicate, small_machine, until};
use crate::observer::Event;
use crate::ownership::HostIdentity;
use crate::testing::{checksum, counters};

#[test]
fn the_image_is_the_primary_s_at_every_seal() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let machine = small_machine();
    let workers = Workers::start(&machine, 4, 1);
    let primary = Primary::start(&machine, &backup.url(), Some(dir.path())).unwrap();
    let info = until(|| primary.handle.info(), |info| info.epoch_committed >= 2000);
    assert_eq!(info.state, ReplicationState::Protected);
    assert_eq!(info.generation, 1);
    assert!(info.pause_us.max >= info.pause_us.p50 && info.bytes_sent > 0);
    primary.handle.stop().unwrap();
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding() && !machine.is_tracking());
    machine.power_off();
    assert!(workers.join() > 0);
    assert_eq!(backup.wrong(), Vec::<String>::new());
    assert!(backup.log.compared.load(Ordering::Acquire) >= 1999);
    let stopped = [Event::ReplicationStarted { peer: backup.url() }, Event::Synced, Event::Stopped];
    assert_eq!(primary.events.events(), stopped);
    backup.events.wait(|event| *event == Event::Stopped).unwrap();
    until(|| backup.handle.info(), |info| info.state == ReplicationState::Disconnected);
    backup.handle.stop().unwrap();
}

#[test]
fn a_planned_switch_over_loses_nothing() {
    for arbiter in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let arbiter = arbiter.then(|| dir.path());
        let backup = Backup::start(arbiter);
        let machine = small_machine();
        let workers = Workers::start(&machine, 3, 2);
        let primary = Primary::start(&machine, &backup.url(), arbiter).unwrap();
        primary.events.wait(|event| *event == Event::Synced).unwrap();
        primary.handle.failover(false).unwrap();
        primary.handle.join();
        backup.handle.join();
        assert!(machine.is_destroyed());
        workers.join();
        assert_eq!(backup.wrong(), Vec::<String>::new());
        let image = backup.log.started.lock().unwrap().clone().unwrap();
        // The guest stood still from the last seal on: nothing at all is lost, said or done.
        assert_eq!(checksum(&image), checksum(machine.ram()));
        assert_eq!(counters(&image)[..3], machine.released()[..3]);
        assert_eq!(backup.handle.info().state, ReplicationState::TakenOver);
        assert_eq!(primary.handle.info().state, ReplicationState::Lost);
    }
}

#[test]
fn a_guest_that_stands_until_its_pages_are_sent_is_replicated_too() {
    let backup = Backup::start(None);
    let machine = small_machine();
    let workers = Workers::start(&machine, 3, 6);
    let mut options = replicate(&backup.url(), None);
    (options.cow, options.compression) = (Cow::Off, Compression::None);
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_committed >= 200);
    primary.handle.stop().unwrap();
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding());
    // Each pause is counted once; the last epoch may have been sealed and never sent whole.
    let (pauses, sealed) = (primary.handle.pauses(), primary.handle.info().epoch_sealed);
    assert!((sealed - 1..=sealed).contains(&pauses), "{pauses} pauses in {sealed} epochs");
    machine.power_off();
    workers.join();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

#[test]
fn an_end_is_shown_once_it_is_so() {
    let backup = Backup::start(None);
    let machine = small_machine();
    let primary = Arc::new(Primary::start(&machine, &backup.url(), None).unwrap());
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let shown = Arc::new(Mutex::new(None));
    let (seen, weak) = (Arc::clone(&shown), Arc::downgrade(&primary));
    machine.before_pass(Box::new(move || {
        let state = weak.upgrade().map(|primary| primary.handle.info().state);
        *seen.lock().unwrap() = state;
    }));
    primary.handle.stop().unwrap();
    let before = *shown.lock().unwrap();
    assert!(before.is_some() && before != Some(ReplicationState::Stopped), "{before:?}");
    assert_eq!(primary.handle.info().state, ReplicationState::Stopped);
}

#[test]
fn a_stop_is_answered_once_the_backup_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let slow = Arc::new(AtomicBool::new(false));
    let is_slow = Arc::clone(&slow);
    let proxy = Proxy::start(
        backup.port(),
        Arc::new(move |number, _, _| {
            if number == 0 && is_slow.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(200));
            }
        }),
    );
    let machine = small_machine();
    let primary = Primary::start(&machine, &proxy.url(), Some(dir.path())).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    slow.store(true, Ordering::Release);
    primary.handle.stop().unwrap();
    // The process may end now: its bell, the connection after the three for data, rings.
    proxy.cut_one(4);
    let told = backup.events.wait(|event| {
        matches!(
            event,
            Event::Stopped | Event::FailoverStarted { .. } | Event::ReceiveFailed { .. }
        )
    });
    assert_eq!(told, Some(Event::Stopped), "{:?}", backup.events.events());
}
