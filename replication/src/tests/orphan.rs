//! A replica without an arbiter whose primary was lost: whom it serves next.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use api::replication::ReplicationState;

use super::pair::{Backup, Primary, Proxy};
use super::{replicate, small_machine, until};
use crate::error::Error;
use crate::ids::PageIndex;
use crate::observer::Event;
use crate::ownership::HostIdentity;
use crate::testing::Machine;

/// A backup with a committed replica and no primary, and the primary's machine and names.
fn orphaned() -> (Backup, Arc<Machine>, HostIdentity) {
    let backup = Backup::start(None);
    let proxy = Proxy::plain(backup.port());
    let machine = small_machine();
    let primary = Primary::start(&machine, &proxy.url(), None).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    proxy.cut();
    primary.handle.join();
    until(|| backup.handle.info(), |info| info.state == ReplicationState::Suspended);
    let identity = primary.handle.identity();
    (backup, machine, identity)
}

#[test]
fn the_same_primary_is_served_anew() {
    let (backup, machine, identity) = orphaned();
    machine.work(0, PageIndex(7), 1).unwrap();
    let options = replicate(&backup.url(), None);
    let primary = Primary::with(&machine, options, identity).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    assert_eq!(backup.log.built.load(Ordering::Acquire), 2);
    primary.handle.failover(false).unwrap();
    backup.handle.join();
    // The old replica was gone before the new one was built.
    assert_eq!(backup.wrong(), Vec::<String>::new());
    let image = backup.log.started.lock().unwrap().clone().unwrap();
    assert_eq!(crate::testing::checksum(&image), crate::testing::checksum(machine.ram()));
}

#[test]
fn another_primary_is_refused_and_the_replica_kept() {
    let (backup, _machine, _) = orphaned();
    let other = small_machine();
    let error = Primary::start(&other, &backup.url(), None).err().expect("refused");
    assert!(matches!(&error, Error::Unfit(reason) if reason.contains("stop it first")));
    assert!(other.is_running() && !other.is_tracking());
    assert_eq!(backup.handle.info().state, ReplicationState::Suspended);
    backup.handle.failover(true).unwrap();
    assert!(backup.log.started.lock().unwrap().is_some());
    assert_eq!(backup.wrong(), Vec::<String>::new());
}
