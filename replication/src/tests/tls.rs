//! A pair whose connections go by TLS, and sides that do not fit.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use api::replication::{ReceiveReplicaData, ReplicateData, ReplicationState};

use super::pair::{Backup, Primary, Proxy};
use super::{LAYOUT, Workers, receive_options, replicate, small_machine, until};
use crate::error::ErrorKind;
use crate::observer::Event;
use crate::ownership::HostIdentity;
use crate::testing::{Machine, MemoryBuilder, MemoryDisks, MemoryImage, counters, memory};
use crate::transport::tls::testing::Authority;

fn is_synced(event: &Event) -> bool {
    *event == Event::Synced
}

fn by_tls(mut options: ReplicateData, directory: &Path) -> ReplicateData {
    options.tls_dir = Some(directory.display().to_string());
    options
}

fn received_by_tls(mut options: ReceiveReplicaData, directory: &Path) -> ReceiveReplicaData {
    options.tls_dir = Some(directory.display().to_string());
    options
}

/// Whether bytes have a run of others in them.
fn has(bytes: &[u8], other: &[u8]) -> bool {
    bytes.windows(other.len()).any(|window| window == other)
}

/// Control, data, bell and disks: all of them begin as TLS does, and nothing that passes is a frame.
#[test]
fn a_pair_by_tls_protects_and_takes_over() {
    const MARK: &[u8] = b"what only the guest and its backup know";
    let directory = Authority::new().directory();
    let arbiter = tempfile::tempdir().unwrap();
    let mut disk = vec![7; 1 << 20];
    disk[4096..4096 + MARK.len()].copy_from_slice(MARK);
    let image = MemoryImage::new(vec![0; disk.len()]);
    let builder = MemoryBuilder { images: vec![image], ..MemoryBuilder::default() };
    // As much as a VM with disks needs.
    let options =
        ReceiveReplicaData { staging_size: 9 << 20, ..receive_options(Some(arbiter.path())) };
    let backup = Backup::with(builder, received_by_tls(options, directory.path()));
    // The first byte of each connection, and what must not be read on the way.
    let seen: Arc<Mutex<(Vec<u8>, bool)>> = Arc::default();
    let notes = Arc::clone(&seen);
    let proxy = Proxy::start(
        backup.port(),
        Arc::new(move |_, offset, bytes| {
            let mut seen = notes.lock().unwrap();
            if offset == 0 {
                seen.0.push(bytes[0]);
            }
            seen.1 |= has(bytes, MARK) || has(bytes, b"USTD");
        }),
    );
    let machine = Machine::with_disks(memory(&LAYOUT), Some(MemoryDisks::new(vec![disk])));
    let workers = Workers::start(&machine, 3, 11);
    let options = by_tls(replicate(&proxy.url(), Some(arbiter.path())), directory.path());
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(is_synced).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_committed > 20);
    for info in [primary.handle.info(), backup.handle.info()] {
        assert_eq!(info.transport.as_deref(), Some("tcp+tls"));
    }
    // A handshake's record: control, three of data, bell, disks.
    until(|| primary.handle.info(), |_| seen.lock().unwrap().0.len() == 6);
    assert_eq!(*seen.lock().unwrap(), (vec![22; 6], false));
    backup.handle.failover(false).unwrap();
    primary.handle.join();
    backup.handle.join();
    workers.join();
    assert_eq!(backup.handle.info().state, ReplicationState::TakenOver);
    let image = backup.log.started.lock().unwrap().clone().expect("the replica runs");
    for (worker, (has, heard)) in counters(&image).iter().zip(machine.released()).enumerate() {
        assert!(*has >= heard, "worker {worker}: told {heard}, the image has {has}");
    }
    assert_eq!(backup.wrong(), Vec::<String>::new());
    assert!(!seen.lock().unwrap().1);
}

/// A primary whose process dies says no farewell: that is a loss, not an end in order.
#[test]
fn a_primary_that_is_cut_off_is_lost() {
    let directory = Authority::new().directory();
    let options = received_by_tls(receive_options(None), directory.path());
    let backup = Backup::with(MemoryBuilder::default(), options);
    let proxy = Proxy::plain(backup.port());
    let machine = small_machine();
    let options = by_tls(replicate(&proxy.url(), None), directory.path());
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(is_synced).unwrap();
    proxy.cut();
    primary.handle.join();
    assert_eq!(primary.handle.info().state, ReplicationState::Degraded);
    let info = until(|| backup.handle.info(), |info| info.state == ReplicationState::Suspended);
    let error = info.last_error.unwrap_or_default();
    assert!(error.contains("cut off") || error.contains("process ended"), "{error}");
    machine.power_off();
    backup.handle.failover(true).unwrap();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

/// What a primary is told and its backup notes, when their certificates do not fit; an honest primary
/// is served after that.
fn refused(
    (primary_dir, backup_dir, honest): (Option<&Path>, Option<&Path>, Option<&Path>),
    [told, noted]: [&str; 2],
) {
    let given = |options: ReplicateData, dir: Option<&Path>| match dir {
        Some(dir) => by_tls(options, dir),
        None => options,
    };
    let options = match backup_dir {
        Some(dir) => received_by_tls(receive_options(None), dir),
        None => receive_options(None),
    };
    let backup = Backup::with(MemoryBuilder::default(), options);
    let machine = small_machine();
    let options = given(replicate(&backup.url(), None), primary_dir);
    let error = Primary::with(&machine, options, HostIdentity::random()).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Other);
    assert!(error.chain().contains(told), "{}", error.chain());
    assert!(machine.is_running() && !machine.is_holding(), "the guest was touched");
    let info = until(|| backup.handle.info(), |info| info.last_error.is_some());
    let error = info.last_error.unwrap();
    assert!(error.starts_with("A connection from tcp:127.0.0.1:"), "{error}");
    assert!(error.contains(noted), "{error}");
    let options = given(replicate(&backup.url(), None), honest);
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(is_synced).unwrap();
    primary.handle.stop().unwrap();
}

#[test]
fn sides_that_do_not_fit_say_so_on_either_side() {
    let (ours, theirs) = (Authority::new().directory(), Authority::new().directory());
    let (ours, theirs) = (Some(ours.path()), Some(theirs.path()));
    let both = "give tls_dir to both sides, or to neither";
    refused(
        (ours, theirs, theirs),
        [
            "The backup's certificate is refused: it is not of the authority of ca-cert.pem",
            "The primary refuses this side's certificate: it is not of the authority",
        ],
    );
    refused(
        (None, ours, ours),
        [
            &format!("The peer speaks TLS and this side does not: {both}"),
            &format!("The primary speaks no TLS: {both}"),
        ],
    );
    refused(
        (ours, None, None),
        [
            &format!("The backup speaks no TLS: {both}"),
            &format!("The peer speaks TLS and this side does not: {both}"),
        ],
    );
}

#[test]
fn a_peer_that_stops_in_its_handshake_holds_nobody_up() {
    let directory = Authority::new().directory();
    let options = received_by_tls(receive_options(None), directory.path());
    let backup = Backup::with(MemoryBuilder::default(), options);
    let begins: [&[u8]; 4] = [&[], &[22], &[22, 3, 1, 1, 0, 1, 0, 0, 0xfc, 3, 3], &[23, 3, 3]];
    let mut silent: Vec<TcpStream> = Vec::new();
    for begin in begins.iter().cycle().take(16) {
        let mut stream = TcpStream::connect(("127.0.0.1", backup.port())).unwrap();
        stream.write_all(begin).unwrap();
        silent.push(stream);
    }
    let machine = small_machine();
    let options = by_tls(replicate(&backup.url(), None), directory.path());
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(is_synced).unwrap();
    // Each of them is given up, after the time-out.
    for stream in &mut silent {
        let _ = stream.read_to_end(&mut Vec::new());
    }
    primary.handle.stop().unwrap();
}

#[test]
fn certificates_that_cannot_be_had_are_an_invalid_option() {
    let directory = Authority::new().directory();
    let options = by_tls(replicate("unix:/tmp/none", None), directory.path());
    let error = Primary::with(&small_machine(), options, HostIdentity::random()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(error.chain(), "Option 'tls_dir' is invalid: it is for tcp: and rdma: only");
    std::fs::remove_file(directory.path().join("client-key.pem")).unwrap();
    let options = by_tls(replicate("tcp:127.0.0.1:1", None), directory.path());
    let error = Primary::with(&small_machine(), options, HostIdentity::random()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let line = error.chain();
    assert!(line.contains("client-key.pem': No such file"), "{line}");
}
