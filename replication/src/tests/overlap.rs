//! A first copy straight into the image, by both engines, while both sides still register their memory piece by piece.
//! The device is none, see `transport::rdma::fake`: it has room for as many pieces as it is told.

use std::sync::Arc;

use api::replication::{RdmaPin, ReceiveReplicaData, ReplicateData, ReplicationState};

use super::pair::{Primary, Proxy};
use super::{LAYOUT, Workers, receive_options, replicate, small_machine, until};
use crate::backup::{BackupHandle, receive_at};
use crate::ids::PAGE_SIZE;
use crate::observer::Event;
use crate::ownership::HostIdentity;
use crate::ram::Ram;
use crate::testing::{Machine, MemoryBuilder, Recorder, ReplicaLog, memory};
use crate::transport::Address;
use crate::transport::rdma::FAKE;
use crate::transport::rdma::fake::{Reading, open_pieces, reading};

/// More than there are in the memory.
const ALL: u64 = 1000;
/// 100 pages and 173, 16 in each.
const PIECES: usize = 7 + 11;
const BYTES: u64 = (LAYOUT[0].1 + LAYOUT[1].1) * PAGE_SIZE as u64;

/// A device with room for so many pieces, which may be late.
#[derive(Clone, Copy, Debug)]
struct Device {
    pieces: u64,
    is_late: bool,
}

impl From<u64> for Device {
    fn from(pieces: u64) -> Self {
        Self { pieces, is_late: false }
    }
}

const LATE: Device = Device { pieces: ALL, is_late: true };

impl Device {
    fn name(self) -> Option<String> {
        Some(format!("{FAKE} {}{}", self.pieces, if self.is_late { " late" } else { "" }))
    }
}

/// A backup whose device has room for so many pieces, and its image.
struct Backup {
    handle: BackupHandle,
    log: Arc<ReplicaLog>,
    image: Ram,
}

impl Backup {
    fn start(device: impl Into<Device>) -> Self {
        Self::with(device, receive_options(None))
    }

    fn with(device: impl Into<Device>, mut options: ReceiveReplicaData) -> Self {
        let image = memory(&LAYOUT);
        let builder = MemoryBuilder { kept: Some(image.clone()), ..MemoryBuilder::default() };
        let log = Arc::clone(&builder.log);
        options.rdma_device = device.into().name();
        let address = Address::Rdma { host: "127.0.0.1".to_owned(), port: 0 };
        let events = Arc::new(Recorder::default());
        let handle = receive_at(builder, &address, options, HostIdentity::random(), events);
        Self { handle: handle.unwrap(), log, image }
    }

    fn asked(&self, device: impl Into<Device>) -> ReplicateData {
        let url = self.handle.local_address().to_string();
        ReplicateData { rdma_device: device.into().name(), ..replicate(&url, None) }
    }

    fn wrong(&self) -> Vec<String> {
        self.log.wrong.lock().unwrap().clone()
    }

    /// Waits until so many pieces of the image are open, or nothing more is to come.
    fn until_open(&self, pieces: usize, is_over: impl Fn() -> bool) {
        while open_pieces(&self.image) < pieces && !is_over() {
            std::thread::yield_now();
        }
    }

    /// The threads that give it back take their time.
    fn until_shut(&self) {
        until(|| self.handle.info(), |_| open_pieces(&self.image) == 0);
    }
}

/// A guest that has written all of its memory, and goes on.
fn guest(seed: u64) -> (Arc<Machine>, Workers) {
    let machine = small_machine();
    let pages = machine.ram().pages();
    for page in 0..pages {
        // Some are zero.
        if page % 9 != 4 {
            machine.work(0, crate::ids::PageIndex(page), page + seed).unwrap();
        }
    }
    let workers = Workers::start(&machine, 2, seed);
    (machine, workers)
}

fn protect(machine: &Arc<Machine>, options: ReplicateData) -> Primary {
    Primary::with(machine, options, HostIdentity::random()).unwrap()
}

/// A pair is protected and goes on for some epochs; what went straight, and the last error.
fn protected(
    here: impl Into<Device>,
    there: impl Into<Device>,
    seed: u64,
) -> (u64, Option<String>) {
    let (here, there) = (here.into(), there.into());
    let backup = Backup::start(there);
    let (machine, workers) = guest(seed);
    let primary = protect(&machine, backup.asked(here));
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    assert_eq!(open_pieces(&backup.image), 0, "protected while the primary may write");
    let info = until(|| primary.handle.info(), |info| info.epoch_committed > 5);
    assert_eq!(info.state, ReplicationState::Protected);
    let path = info.rdma.unwrap();
    assert_eq!(path.registered_bytes, if here.pieces >= PIECES as u64 { BYTES } else { 0 });
    primary.handle.stop().unwrap();
    machine.power_off();
    workers.join();
    assert_eq!(backup.wrong(), Vec::<String>::new(), "{here:?} here, {there:?} there");
    (path.straight_bytes, info.last_error)
}

#[test]
fn a_copy_goes_straight_piece_by_piece() {
    for seed in 1..=8 {
        let (straight, error) = protected(ALL, ALL, seed);
        // But for pages that are zero.
        assert!(straight > BYTES / 2, "{straight} bytes");
        assert_eq!(error, None);
    }
}

/// The copy does not wait for pieces that come late, on either side: these wait for the copy.
#[test]
fn pieces_go_before_the_last_one_is_registered() {
    let early = Device::from(ALL);
    for (here, there) in [(LATE, early), (early, LATE), (LATE, LATE)] {
        let (straight, error) = protected(here, there, 5);
        assert!(straight > BYTES / 2, "{straight} bytes: {here:?} here, {there:?} there");
        assert_eq!(error, None);
    }
}

/// A limit of locked memory is met half-way: what went straight stays, and the rest goes through the rings.
#[test]
fn the_rest_goes_through_the_rings_where_one_side_comes_short() {
    let mut straight = 0;
    for (here, there) in
        [(0, ALL), (ALL, 0), (0, 0), (1, ALL), (ALL, 1), (7, ALL), (ALL, 7), (7, 5), (5, 7)]
            .into_iter()
            .chain((12..PIECES as u64).flat_map(|pieces| [(pieces, ALL), (ALL, pieces)]))
    {
        let (bytes, error) = protected(here, there, here + 31 * there + 1);
        // The backup's reason is in its own log.
        assert_eq!(error.is_some(), here < PIECES as u64, "{error:?}");
        let pieces = here.min(there);
        assert!(bytes <= pieces * 16 * PAGE_SIZE as u64, "{bytes} bytes of {pieces} pieces");
        straight += bytes;
    }
    assert!(straight > 0, "nothing went straight");
}

/// `rdma_pin=on`: the protection ends with it, and the backup has its memory back.
#[test]
fn memory_that_cannot_all_be_registered_ends_the_protection_where_that_is_wanted() {
    for here in [0, 5, PIECES as u64 - 1] {
        let backup = Backup::start(ALL);
        let (machine, workers) = guest(here + 1);
        let options = ReplicateData { rdma_pin: Some(RdmaPin::On), ..backup.asked(here) };
        let primary = protect(&machine, options);
        let failed = primary.events.wait(|event| matches!(event, Event::Failed { .. })).unwrap();
        let Event::Failed { error } = failed else { unreachable!() };
        assert!(error.contains("no room for another piece"), "{error}");
        assert!(machine.is_running());
        backup.until_shut();
        machine.power_off();
        workers.join();
    }
}

/// Called off, or cut, half-way: nothing runs on the backup, and its memory is its own again.
#[test]
fn a_copy_that_ends_half_way_leaves_nothing_open() {
    for pieces in 0..PIECES {
        for cut in [false, true] {
            let backup = Backup::start(ALL);
            let (machine, workers) = guest(pieces as u64 + 1);
            let mut options = backup.asked(ALL);
            let (_, port) = options.destination_url.rsplit_once(':').unwrap();
            let proxy = Proxy::plain(port.parse().unwrap());
            options.destination_url = proxy.url().replace("tcp:", "rdma:");
            let primary = protect(&machine, options);
            backup.until_open(pieces, || {
                // At the latest when there is nothing half-way any more.
                use ReplicationState::{Protected, Stopped};
                matches!(primary.handle.info().state, Protected | Stopped)
            });
            if cut {
                proxy.cut();
                until(|| primary.handle.info(), |info| info.state != ReplicationState::Syncing);
            } else {
                primary.handle.stop().unwrap();
            }
            backup.until_shut();
            assert!(machine.is_running() && backup.log.started.lock().unwrap().is_none());
            if cut {
                // It may have been protected by then, or not.
                let _ = primary.handle.stop();
            }
            machine.power_off();
            workers.join();
            assert_eq!(backup.wrong(), Vec::<String>::new(), "{pieces} pieces");
        }
    }
}

/// A backup that is lost and called again, twice: what the guest's memory is registered for is its reading, whoever
/// the session is.
#[test]
fn memory_stays_registered_from_session_to_session() {
    let backup = Backup::start(ALL);
    let (machine, workers) = guest(9);
    let mut options = ReplicateData { reconnect: true, ..backup.asked(ALL) };
    let (_, port) = options.destination_url.rsplit_once(':').unwrap();
    let proxy = Proxy::plain(port.parse().unwrap());
    options.destination_url = proxy.url().replace("tcp:", "rdma:");
    let primary = protect(&machine, options);
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    for _ in 0..2 {
        assert_eq!(reading(machine.ram()), Reading { made: PIECES, now: PIECES });
        let committed = primary.handle.info().epoch_committed;
        proxy.cut();
        until(|| primary.handle.info(), |info| info.reconnect_attempts > 0);
        proxy.heal();
        let is_protected = |state| state == ReplicationState::Protected;
        let info = until(
            || primary.handle.info(),
            |info| is_protected(info.state) && info.epoch_committed > committed + 5,
        );
        assert_eq!(info.rdma.unwrap().registered_bytes, BYTES);
    }
    primary.handle.stop().unwrap();
    until(|| reading(machine.ram()), |found| *found == Reading { made: PIECES, now: 0 });
    machine.power_off();
    workers.join();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

/// An arbiter that is away may be so for long, and nobody hears what the device says meanwhile.
#[test]
fn memory_does_not_stay_registered_while_it_is_open_whose_the_vm_is() {
    let dir = tempfile::tempdir().unwrap();
    let [here, away] = ["records", "away"].map(|name| dir.path().join(name));
    std::fs::create_dir(&here).unwrap();
    // It does not suspect a primary that is cut off.
    let patient = ReceiveReplicaData { timeout_ms: 600_000, ..receive_options(Some(&here)) };
    let backup = Backup::with(ALL, patient);
    let (machine, workers) = guest(11);
    let mut options = ReplicateData { reconnect: true, ..backup.asked(ALL) };
    let (_, port) = options.destination_url.rsplit_once(':').unwrap();
    let proxy = Proxy::plain(port.parse().unwrap());
    options.destination_url = proxy.url().replace("tcp:", "rdma:");
    options.arbiter = Some(format!("file:{}", here.display()));
    options.timeout_ms = 1000;
    let primary = protect(&machine, options);
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    std::fs::rename(&here, &away).unwrap();
    proxy.cut_front();
    until(|| reading(machine.ram()), |found| found.now == 0);
    assert!(machine.is_holding(), "it was decided");
    std::fs::rename(&away, &here).unwrap();
    primary.events.wait(|event| matches!(event, Event::Degraded { .. })).unwrap();
    proxy.heal();
    primary.events.wait(|event| *event == Event::Resynced).unwrap();
    assert_eq!(reading(machine.ram()), Reading { made: 2 * PIECES, now: PIECES });
    primary.handle.stop().unwrap();
    machine.power_off();
    workers.join();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

/// What a device has no room for all of is of no use to any session.
#[test]
fn memory_that_is_registered_in_part_does_not_stay_so() {
    let backup = Backup::start(ALL);
    let (machine, workers) = guest(10);
    let primary = protect(&machine, backup.asked(5));
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    until(|| reading(machine.ram()), |found| *found == Reading { made: 5, now: 0 });
    primary.handle.stop().unwrap();
    machine.power_off();
    workers.join();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}
