//! While nothing breaks.

use std::sync::atomic::Ordering;

use api::replication::ReplicationState;

use super::pair::{Backup, Primary};
use super::{Workers, small_machine, until};
use crate::observer::Event;
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
