//! TCP where data cannot go by RDMA. No host of these tests has a device for the address that they use.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use api::replication::{ReceiveReplicaData, ReplicateData, ReplicationState};

use super::pair::Primary;
use super::{LAYOUT, receive_options, replicate, small_machine, until};
use crate::backup::{BackupHandle, receive_at};
use crate::disk::Operation;
use crate::error::{Error, ErrorKind};
use crate::observer::Event;
use crate::ownership::HostIdentity;
use crate::testing::{
    Machine, MemoryBuilder, MemoryDisks, MemoryImage, Recorder, ReplicaLog, Request, memory,
};
use crate::transport::Address;
use crate::transport::rdma::FAKE;
use crate::transport::tls::testing::Authority;

struct Backup {
    handle: BackupHandle,
    log: Arc<ReplicaLog>,
}

/// A receiver of `rdma:` that serves those who fall back.
fn backup(change: impl FnOnce(&mut ReceiveReplicaData)) -> Result<Backup, Error> {
    backup_of(MemoryBuilder::default(), change)
}

fn backup_of(
    builder: MemoryBuilder,
    change: impl FnOnce(&mut ReceiveReplicaData),
) -> Result<Backup, Error> {
    let mut options = ReceiveReplicaData { fallback: true, ..receive_options(None) };
    change(&mut options);
    let log = Arc::clone(&builder.log);
    let address = Address::Rdma { host: "127.0.0.1".to_owned(), port: 0 };
    let events = Arc::new(Recorder::default());
    let handle = receive_at(builder, &address, options, HostIdentity::random(), events)?;
    Ok(Backup { handle, log })
}

fn options(backup: &Backup) -> ReplicateData {
    let url = backup.handle.local_address().to_string();
    assert!(url.starts_with("rdma:"), "{url}");
    ReplicateData { fallback: true, ..replicate(&url, None) }
}

fn protect(machine: &Arc<Machine>, options: ReplicateData) -> Result<Primary, Error> {
    Primary::with(machine, options, HostIdentity::random())
}

#[test]
fn a_vm_is_protected_by_tcp_where_rdma_cannot_be() {
    let backup = backup(|_| {}).unwrap();
    let machine = small_machine();
    let primary = protect(&machine, options(&backup)).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    for info in [primary.handle.info(), backup.handle.info()] {
        assert_eq!(info.transport.as_deref(), Some("tcp"), "{info:?}");
        assert!(info.fallback_reason.as_deref().unwrap().contains("RDMA"), "{info:?}");
        assert_eq!(info.rdma, None);
    }
    let seen = primary.handle.info().epoch_committed;
    machine.work(0, crate::ids::PageIndex(5), 1).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_committed > seen);
    primary.handle.stop().unwrap();
    assert_eq!(*backup.log.wrong.lock().unwrap(), Vec::<String>::new());
}

#[test]
fn without_it_a_host_that_cannot_do_rdma_says_so() {
    let machine = small_machine();
    let served = backup(|_| {}).unwrap();
    let error = protect(&machine, ReplicateData { fallback: false, ..options(&served) });
    let error = error.err().expect("no RDMA here").chain();
    assert!(error.contains("RDMA"), "{error}");
    assert!(machine.is_running() && !machine.is_tracking());
    // Nor is there such a receiver.
    let error = backup(|options| options.fallback = false).err().unwrap().chain();
    assert!(error.contains("RDMA"), "{error}");
}

#[test]
fn falling_back_is_for_rdma_only() {
    let tcp = super::pair::Backup::start(None);
    let machine = small_machine();
    let asked = ReplicateData { fallback: true, ..replicate(&tcp.url(), None) };
    let error = protect(&machine, asked).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.chain().contains("fallback"), "{error}");
    let options = ReceiveReplicaData { fallback: true, ..receive_options(None) };
    let address = Address::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
    let (builder, events) = (MemoryBuilder::default(), Arc::new(Recorder::default()));
    let error = receive_at(builder, &address, options, HostIdentity::random(), events);
    assert_eq!(error.err().unwrap().kind(), ErrorKind::Invalid);
}

/// It is lost and called again, and the session after the one by TCP tries RDMA first, in vain.
#[test]
fn a_backup_that_is_lost_is_called_again_by_tcp() {
    let backup = backup(|_| {}).unwrap();
    let machine = small_machine();
    let url = backup.handle.local_address().to_string();
    let (host, port) = url.strip_prefix("rdma:").unwrap().rsplit_once(':').unwrap();
    assert_eq!(host, "127.0.0.1");
    let proxy = super::pair::Proxy::plain(port.parse().unwrap());
    let through = proxy.url().replace("tcp:", "rdma:");
    let asked = ReplicateData { destination_url: through, reconnect: true, ..options(&backup) };
    let primary = protect(&machine, asked).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    proxy.cut();
    until(|| primary.handle.info(), |info| info.reconnect_attempts > 0);
    proxy.heal();
    primary.events.wait(|event| *event == Event::Resynced).unwrap();
    let info = primary.handle.info();
    assert_eq!((info.state, info.transport.as_deref()), (ReplicationState::Protected, Some("tcp")));
    primary.handle.stop().unwrap();
    assert_eq!(*backup.log.wrong.lock().unwrap(), Vec::<String>::new());
}

/// Files are replaced now and then, and may be half there: one that cannot be read is no reason to end attempts, whichever
/// of them meets it.
#[test]
fn a_key_that_is_renewed_between_the_calls_by_rdma_and_by_tcp_ends_nothing() {
    let directory = Authority::new().directory();
    let tls_dir = Some(directory.path().display().to_string());
    let backup = backup(|options| {
        options.rdma_device = Some(FAKE.to_owned());
        options.tls_dir.clone_from(&tls_dir);
    });
    let backup = backup.unwrap();
    let key = directory.path().join("client-key.pem");
    let text = std::fs::read(&key).unwrap();
    let url = backup.handle.local_address().to_string();
    let (_, port) = url.rsplit_once(':').unwrap();
    // What passes first is the next call's, which has read the key.
    let is_due = Arc::new(AtomicBool::new(false));
    let (renews, path) = (Arc::clone(&is_due), key.clone());
    let proxy = super::pair::Proxy::start(
        port.parse().unwrap(),
        Arc::new(move |_, _, _| {
            if renews.swap(false, Ordering::AcqRel) {
                std::fs::write(&path, "").unwrap();
            }
        }),
    );
    let asked = ReplicateData {
        destination_url: proxy.url().replace("tcp:", "rdma:"),
        // Each call by RDMA is one by TCP in the end.
        rdma_device: Some(format!("{FAKE} fails")),
        reconnect: true,
        tls_dir,
        ..options(&backup)
    };
    let machine = small_machine();
    let primary = protect(&machine, asked).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    proxy.cut();
    until(|| primary.handle.info(), |info| info.reconnect_attempts > 0);
    is_due.store(true, Ordering::Release);
    proxy.heal();
    let is_of_key = |error: &String| error.contains("client-key.pem");
    until(|| primary.handle.info(), |info| info.last_error.as_ref().is_some_and(is_of_key));
    std::fs::write(&key, text).unwrap();
    let is_end = |event: &Event| matches!(event, Event::Resynced | Event::Failed { .. });
    assert_eq!(primary.events.wait(is_end), Some(Event::Resynced));
    assert_eq!(primary.handle.info().transport.as_deref(), Some("tcp+tls"));
    primary.handle.stop().unwrap();
    assert_eq!(*backup.log.wrong.lock().unwrap(), Vec::<String>::new());
}

/// A pair whose data goes by what counts as RDMA, through a proxy.
fn by_rdma(change: impl FnOnce(&mut ReplicateData)) -> (Backup, super::pair::Proxy, ReplicateData) {
    by_rdma_to(backup(|options| options.rdma_device = Some(FAKE.to_owned())).unwrap(), change)
}

fn by_rdma_to(
    backup: Backup,
    change: impl FnOnce(&mut ReplicateData),
) -> (Backup, super::pair::Proxy, ReplicateData) {
    let url = backup.handle.local_address().to_string();
    let (_, port) = url.rsplit_once(':').unwrap();
    let proxy = super::pair::Proxy::plain(port.parse().unwrap());
    let mut options = ReplicateData {
        destination_url: proxy.url().replace("tcp:", "rdma:"),
        rdma_device: Some(FAKE.to_owned()),
        reconnect: true,
        timeout_ms: 500,
        heartbeat_ms: 50,
        ..options(&backup)
    };
    change(&mut options);
    (backup, proxy, options)
}

/// A data connection fails, and the control connection does not: the guest runs on, and is protected by TCP.
#[test]
fn tcp_takes_over_where_rdma_fails_in_a_session() {
    let (backup, proxy, options) = by_rdma(|_| {});
    let machine = small_machine();
    let workers = super::Workers::start(&machine, 2, 7);
    let primary = protect(&machine, options).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    assert_eq!(primary.handle.info().transport.as_deref(), Some("rdma"));
    assert_eq!(backup.handle.info().transport.as_deref(), Some("rdma"));
    // The control connection is the first, then come those for data.
    proxy.cut_one(1);
    primary.events.wait(|event| *event == Event::Resynced).unwrap();
    for info in [primary.handle.info(), backup.handle.info()] {
        assert_eq!(info.transport.as_deref(), Some("tcp"), "{info:?}");
        let reason = info.fallback_reason.as_deref().unwrap();
        assert!(reason.contains("unusable"), "{reason}");
    }
    assert!(!machine.is_suspended() && !machine.is_destroyed());
    let seen = primary.handle.info().epoch_committed;
    until(|| primary.handle.info(), |info| info.epoch_committed > seen + 3);
    primary.handle.stop().unwrap();
    machine.power_off();
    workers.join();
    assert_eq!(*backup.log.wrong.lock().unwrap(), Vec::<String>::new());
}

/// The session after the one by TCP begins by RDMA again.
#[test]
fn rdma_is_tried_again_after_a_session_by_tcp() {
    let (_backup, proxy, options) = by_rdma(|_| {});
    let machine = small_machine();
    // Whoever writes nothing does not notice.
    let workers = super::Workers::start(&machine, 1, 7);
    let primary = protect(&machine, options).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    proxy.cut_one(1);
    until(
        || primary.handle.info(),
        |info| {
            info.transport.as_deref() == Some("tcp") && info.state == ReplicationState::Protected
        },
    );
    proxy.cut();
    until(|| primary.handle.info(), |info| info.reconnect_attempts > 0);
    proxy.heal();
    let info = until(
        || primary.handle.info(),
        |info| {
            info.transport.as_deref() == Some("rdma") && info.state == ReplicationState::Protected
        },
    );
    assert_eq!(info.fallback_reason, None);
    primary.handle.stop().unwrap();
    machine.power_off();
    workers.join();
}

/// Without the option it is what it was: the backup counts as lost.
#[test]
fn without_it_a_backup_whose_data_connection_failed_is_lost() {
    let (_backup, proxy, options) = by_rdma(|options| options.fallback = false);
    let machine = small_machine();
    // Whoever writes nothing does not notice.
    let workers = super::Workers::start(&machine, 1, 7);
    let primary = protect(&machine, options).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    proxy.cut_one(1);
    primary.events.wait(|event| matches!(event, Event::Degraded { .. })).unwrap();
    primary.events.wait(|event| *event == Event::Resynced).unwrap();
    assert_eq!(primary.handle.info().transport.as_deref(), Some("rdma"));
    primary.handle.stop().unwrap();
    machine.power_off();
    workers.join();
}

/// A backup that does not allow TCP refuses it for good, and has the VM again by RDMA.
#[test]
fn a_backup_that_allows_no_tcp_is_called_by_rdma_again() {
    let rdma_only = |options: &mut ReceiveReplicaData| {
        options.rdma_device = Some(FAKE.to_owned());
        options.fallback = false;
    };
    let (_backup, proxy, options) = by_rdma_to(backup(rdma_only).unwrap(), |_| {});
    let machine = small_machine();
    // Whoever writes nothing does not notice.
    let workers = super::Workers::start(&machine, 1, 7);
    let primary = protect(&machine, options).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    proxy.cut_one(1);
    primary.events.wait(|event| *event == Event::Resynced).unwrap();
    let info = primary.handle.info();
    assert_eq!((info.transport.as_deref(), info.fallback_reason), (Some("rdma"), None));
    let told = primary.events.events();
    assert!(!told.iter().any(|event| matches!(event, Event::Failed { .. })), "{told:?}");
    primary.handle.stop().unwrap();
    machine.power_off();
    workers.join();
}

/// What goes by TCP anyway says nothing about RDMA.
#[test]
fn a_connection_of_the_disks_that_ends_is_no_reason_for_tcp() {
    const BYTES: usize = 64 << 10;
    let disks = MemoryDisks::new(vec![vec![1; BYTES]]);
    let machine = Machine::with_disks(memory(&LAYOUT), Some(Arc::clone(&disks)));
    let builder = MemoryBuilder {
        images: vec![MemoryImage::new(vec![0; BYTES])],
        ..MemoryBuilder::default()
    };
    let has_disks = |options: &mut ReceiveReplicaData| {
        options.rdma_device = Some(FAKE.to_owned());
        options.staging_size = 9 << 20;
    };
    let (_backup, proxy, options) = by_rdma_to(backup_of(builder, has_disks).unwrap(), |_| {});
    let connections = usize::try_from(options.connections).unwrap();
    let guest = Arc::clone(&machine);
    let user = std::thread::spawn(move || {
        let (operation, range) = (Operation::Write, 0..512);
        let write = Request { disk: 0, operation, range, fill: 7 };
        while disks.request(&guest, &write).is_some() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    });
    let primary = protect(&machine, options).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    proxy.cut_one(connections + 1);
    primary.events.wait(|event| *event == Event::Resynced).unwrap();
    let info = primary.handle.info();
    assert_eq!((info.transport.as_deref(), info.fallback_reason), (Some("rdma"), None));
    primary.handle.stop().unwrap();
    machine.power_off();
    user.join().unwrap();
}

/// The backup hears a primary that claims because of RDMA, and not for ever: it may reach the arbiter.
#[test]
fn a_primary_that_falls_back_and_reaches_no_arbiter_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (records, way) = (dir.path().join("records"), dir.path().join("way"));
    std::fs::create_dir(&records).unwrap();
    std::os::unix::fs::symlink(&records, &way).unwrap();
    let with_arbiter = |options: &mut ReceiveReplicaData| {
        options.rdma_device = Some(FAKE.to_owned());
        options.arbiter = Some(format!("file:{}", records.display()));
    };
    let url = format!("file:{}", way.display());
    let (backup, proxy, options) =
        by_rdma_to(backup(with_arbiter).unwrap(), |options| options.arbiter = Some(url));
    let machine = small_machine();
    // Whoever writes nothing does not notice.
    let workers = super::Workers::start(&machine, 1, 7);
    let primary = protect(&machine, options).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    // The way to the arbiter, from this side only.
    std::fs::remove_file(&way).unwrap();
    proxy.cut_one(1);
    until(|| backup.handle.info(), |info| info.takeover.is_some_and(|times| times.resumed_us > 0));
    assert!(machine.is_holding() && !machine.is_destroyed());
    std::os::unix::fs::symlink(&records, &way).unwrap();
    primary.handle.join();
    assert!(machine.is_destroyed());
    workers.join();
}
