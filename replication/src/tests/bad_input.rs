//! What a peer must not send, and what it must not be able to do: each gets one clear error, and
//! the other side goes on.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::replication::{Compression, ReceiveReplicaData, ReplicationState};
use uuid::Uuid;

use super::pair::{Backup, Primary, Proxy, Tamper};
use super::{Workers, receive_options, replicate, small_machine, until};
use crate::error::{Error, ErrorKind};
use crate::observer::Event;
use crate::ownership::HostIdentity;
use crate::testing::{Machine, MemoryBuilder, memory};
use crate::wire::{FrameWriter, HEADER_BYTES, Hello, Kind, Message, SessionId};

/// A backup without arbiter goes on after `attack`, having told one error that contains `text`.
fn one_error(text: &str, attack: impl FnOnce(&Backup)) {
    let backup = Backup::start(None);
    attack(&backup);
    let failed = backup.events.wait(|e| matches!(e, Event::ReceiveFailed { .. }));
    let Some(Event::ReceiveFailed { error }) = failed else { panic!("no error was told") };
    assert!(error.contains(text), "{error}");
    // It still serves an honest primary.
    let machine = small_machine();
    let primary = Primary::start(&machine, &backup.url(), None).unwrap();
    primary.events.wait(|e| *e == Event::Synced).unwrap();
    primary.handle.stop().unwrap();
    let failed = backup.events.events();
    let failed: Vec<_> =
        failed.iter().filter(|e| matches!(e, Event::ReceiveFailed { .. })).collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

fn greeting(session: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = FrameWriter::new(&mut bytes, SessionId(session));
    let (vm, host) = (Uuid::new_v4(), Uuid::new_v4());
    Message::Hello(Hello { vm, host, connection: 0, connections: 1 }).send(&mut writer).unwrap();
    bytes
}

fn send(backup: &Backup, bytes: &[u8]) {
    let mut stream = TcpStream::connect(("127.0.0.1", backup.port())).unwrap();
    stream.write_all(bytes).unwrap();
}

#[test]
fn strangers_get_nothing() {
    one_error("does not speak this protocol", |backup| send(backup, &[b'G'; 64]));
    one_error("ended inside a frame", |backup| send(backup, &greeting(1)[..40]));
    one_error("closed the connection", |backup| send(backup, &greeting(1)));
}

#[test]
fn only_the_header_of_what_is_no_greeting_is_read() {
    one_error("kind Seal arrived where a greeting was due", |backup| {
        let mut bytes = Vec::new();
        let mut writer = FrameWriter::new(&mut bytes, SessionId(1));
        writer.write(Kind::Seal, &[&[0; 1 << 20]]).unwrap();
        send(backup, &bytes[..HEADER_BYTES]);
    });
    one_error("kind Seal arrived where an offer was due", |backup| {
        let mut bytes = greeting(1);
        let mut seal = Vec::new();
        let mut writer = FrameWriter::new(&mut seal, SessionId(1));
        writer.write(Kind::Heartbeat, &[]).unwrap();
        writer.write(Kind::Seal, &[&[0; 1 << 20]]).unwrap();
        bytes.extend(&seal[HEADER_BYTES..2 * HEADER_BYTES]);
        send(backup, &bytes);
    });
}

#[test]
fn another_version_is_named() {
    one_error("protocol version 77", |backup| {
        let mut bytes = greeting(1);
        bytes[4] = 77;
        send(backup, &bytes);
    });
}

#[test]
fn oversized_flipped_and_reordered_greetings_are_refused() {
    one_error("are allowed", |backup| {
        let mut bytes = greeting(1);
        bytes[11] = 0xFF;
        send(backup, &bytes);
    });
    one_error("checksum", |backup| {
        let mut bytes = greeting(1);
        bytes[50] ^= 1;
        send(backup, &bytes);
    });
    one_error("where frame 0 was due", |backup| {
        let mut bytes = greeting(1);
        bytes[24] = 3;
        send(backup, &bytes);
    });
}

#[test]
fn a_peer_that_says_nothing_holds_nobody_up() {
    let backup = Backup::start(None);
    let silent: Vec<_> =
        (0..8).map(|_| TcpStream::connect(("127.0.0.1", backup.port())).unwrap()).collect();
    let machine = small_machine();
    let primary = Primary::start(&machine, &backup.url(), None).unwrap();
    primary.events.wait(|e| *e == Event::Synced).unwrap();
    primary.handle.stop().unwrap();
    drop(silent);
}

/// The limit is one for all of a greeting: who says a byte now and then would hold a place for as long as
/// it likes, and as many as there are places would keep the primary away.
#[test]
fn a_greeting_that_trickles_in_ends_in_time_and_its_place_is_free() {
    const PLACES: usize = 160;
    let options = ReceiveReplicaData { timeout_ms: 1000, ..receive_options(None) };
    let backup = Backup::with(MemoryBuilder::default(), options);
    let port = backup.port();
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut strangers: Vec<_> = (0..PLACES).map(|_| connect()).collect();
    let bytes = greeting(1);
    let start = Instant::now();
    for byte in &bytes[..5] {
        for stranger in &mut strangers {
            // Who was sent away already hears of it.
            let _ = stranger.write_all(&[*byte]);
        }
        std::thread::sleep(Duration::from_millis(600));
    }
    assert!(start.elapsed() >= Duration::from_secs(3), "two limits, and the farewell, are over");
    let machine = small_machine();
    let primary = Primary::start(&machine, &backup.url(), None).unwrap();
    primary.events.wait(|e| *e == Event::Synced).unwrap();
    primary.handle.stop().unwrap();
    let late = |e: &Event| matches!(e, Event::ReceiveFailed { error } if error.contains("in time"));
    assert!(backup.events.events().iter().any(late));
}

/// However many they are, and whatever each of them says.
#[test]
fn a_thousand_strangers_are_a_few_events_and_hide_nothing() {
    let backup = Backup::start(None);
    let machine = small_machine();
    let primary = Primary::start(&machine, &backup.url(), None).unwrap();
    primary.events.wait(|e| *e == Event::Synced).unwrap();
    let is_failed = |e: &Event| matches!(e, Event::ReceiveFailed { .. });
    for number in 0..1000u16 {
        let mut bytes = greeting(1);
        bytes[4..6].copy_from_slice(&(100 + number).to_le_bytes());
        send(&backup, &bytes);
    }
    backup.events.wait(is_failed).unwrap();
    let seen = primary.handle.info().epoch_committed;
    machine.work(0, crate::ids::PageIndex(5), 1).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_committed > seen);
    let info = backup.handle.info();
    assert_eq!((info.state, info.last_error), (ReplicationState::Protected, None));
    let told = backup.events.events().iter().filter(|e| is_failed(e)).count();
    assert!((1..=8).contains(&told), "{told} events");
    primary.handle.stop().unwrap();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

/// A backup whose listener is of no use any more serves the primary that it has, and waits for no other.
#[test]
fn a_backup_that_nobody_can_call_stops_once_it_has_nothing() {
    let backup = Backup::start(None);
    let machine = small_machine();
    let primary = Primary::start(&machine, &backup.url(), None).unwrap();
    primary.events.wait(|e| *e == Event::Synced).unwrap();
    backup.handle.break_listener();
    backup.events.wait(|e| matches!(e, Event::ReceiveFailed { .. })).unwrap();
    let seen = primary.handle.info().epoch_committed;
    machine.work(0, crate::ids::PageIndex(5), 1).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_committed > seen);
    assert_eq!(backup.handle.info().state, ReplicationState::Protected);
    primary.handle.stop().unwrap();
    // The end of the protection, and that of the reception.
    backup.events.wait_times(2, |e| *e == Event::Stopped).unwrap();
    let info = until(|| backup.handle.info(), |info| info.state == ReplicationState::Stopped);
    assert!(info.last_error.unwrap().contains("accepted any more"));
    backup.handle.join();
    // The same at once where there is nothing.
    let idle = Backup::start(None);
    idle.handle.break_listener();
    idle.events.wait(|e| *e == Event::Stopped).unwrap();
    idle.handle.join();
}

#[test]
fn a_second_primary_is_refused_and_the_first_goes_on() {
    let backup = Backup::start(None);
    let machine = small_machine();
    let primary = Primary::start(&machine, &backup.url(), None).unwrap();
    primary.events.wait(|e| *e == Event::Synced).unwrap();
    let other = small_machine();
    let error = Primary::start(&other, &backup.url(), None).err().expect("refused");
    assert!(matches!(&error, Error::Unfit(reason) if reason.contains("another primary")));
    assert!(other.is_running() && !other.is_tracking());
    let seen = primary.handle.info().epoch_committed;
    machine.work(0, crate::ids::PageIndex(5), 1).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_committed > seen);
    primary.handle.stop().unwrap();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

#[test]
fn a_memory_that_cannot_be_held_is_refused() {
    let builder = MemoryBuilder { pages_max: Some(10), ..MemoryBuilder::default() };
    let backup = Backup::with(builder, receive_options(None));
    let machine = small_machine();
    let error = Primary::start(&machine, &backup.url(), None).err().expect("refused");
    assert!(matches!(&error, Error::Refused(reason) if reason.contains("no memory for 273")));
    assert!(machine.is_running() && !machine.is_tracking());
    let failed = |events: Vec<Event>| {
        events.iter().filter(|e| matches!(e, Event::ReceiveFailed { .. })).count()
    };
    backup.events.wait(|e| matches!(e, Event::ReceiveFailed { .. })).unwrap();
    assert_eq!(failed(backup.events.events()), 1);
    let small = Machine::new(memory(&[(0, 8)]));
    let primary = Primary::start(&small, &backup.url(), None).unwrap();
    primary.events.wait(|e| *e == Event::Synced).unwrap();
    primary.handle.stop().unwrap();
}

#[test]
fn a_state_that_cannot_be_loaded_is_refused_while_the_primary_runs() {
    let builder = MemoryBuilder { refuse_states: true, ..MemoryBuilder::default() };
    let backup = Backup::with(builder, receive_options(None));
    let machine = small_machine();
    let primary = Primary::start(&machine, &backup.url(), None).unwrap();
    primary.handle.join();
    let told = primary.events.events();
    let Some(Event::Degraded { reason, .. }) = told.last() else { panic!("{told:?}") };
    assert!(reason.contains("not of this kind"), "{reason}");
    assert!(machine.is_running() && !machine.is_holding());
    until(|| backup.handle.info(), |info| info.state == ReplicationState::Disconnected);
}

/// The stream of one connection is damaged once the VM is protected.
fn damaged(
    connection: usize,
    compression: Compression,
    tamper: impl Fn(&mut Vec<u8>) + Send + Sync + 'static,
) {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(dir.path()));
    let armed = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let fire = Arc::clone(&armed);
    let change: Tamper = Arc::new(move |number, _, bytes| {
        let ordering = std::sync::atomic::Ordering::AcqRel;
        if number == connection && fire.swap(false, ordering) {
            tamper(bytes);
        }
    });
    let proxy = Proxy::start(backup.port(), change);
    let machine = small_machine();
    let workers = Workers::start(&machine, 2, 3);
    let mut options = replicate(&proxy.url(), Some(dir.path()));
    (options.heartbeat_ms, options.timeout_ms) = (50, 500);
    options.compression = compression;
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|e| *e == Event::Synced).unwrap();
    if connection > 0 {
        // Pages were sent before, so there are deltas.
        until(|| primary.handle.info(), |info| info.epoch_committed >= 20);
    }
    armed.store(true, std::sync::atomic::Ordering::Release);
    // Whoever wins, exactly one goes on, and the image was never touched by the damage.
    primary.handle.join();
    if machine.is_destroyed() {
        backup.handle.join();
        let image = backup.log.started.lock().unwrap().clone().expect("the replica runs");
        let has = crate::testing::counters(&image);
        assert!(has.iter().zip(machine.released()).all(|(has, heard)| *has >= heard));
    } else {
        assert!(machine.is_running());
        backup.events.wait(|e| matches!(e, Event::OwnershipLost { .. })).unwrap();
        machine.power_off();
    }
    workers.join();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

#[test]
fn damage_on_the_way_never_reaches_the_image() {
    use Compression::{Delta, Lz4, None};
    for (connection, compression) in [(0, None), (1, None), (3, None), (1, Delta), (2, Lz4)] {
        damaged(connection, compression, |bytes| bytes[0] ^= 0x10);
        damaged(connection, compression, |bytes| {
            let last = bytes.len() - 1;
            bytes[last] ^= 0x01;
        });
        damaged(connection, compression, |bytes| bytes.truncate(bytes.len() / 2));
        damaged(connection, compression, |bytes| bytes.extend_from_within(..));
    }
}

#[test]
fn sides_that_disagree_about_the_arbiter_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::start(None);
    let machine = small_machine();
    let error = Primary::start(&machine, &backup.url(), Some(dir.path())).err().expect("refused");
    assert!(matches!(&error, Error::Unfit(reason) if reason.contains("arbiter")), "{error}");
    // Two directories would let both sides win: seen before anything depends on it.
    let other = tempfile::tempdir().unwrap();
    let backup = Backup::start(Some(other.path()));
    let primary = Primary::start(&machine, &backup.url(), Some(dir.path())).unwrap();
    primary.handle.join();
    let told = primary.events.events();
    let Some(Event::Degraded { reason, .. }) = told.last() else { panic!("{told:?}") };
    assert!(reason.contains("seen from the backup"), "{reason}");
    assert!(!told.contains(&Event::Synced));
    assert!(machine.is_running() && !machine.is_holding());
}

#[test]
fn options_that_contradict_themselves_are_refused() {
    let refuse = |change: &dyn Fn(&mut api::replication::ReplicateData)| {
        let mut options = replicate("tcp:127.0.0.1:1", None);
        change(&mut options);
        let machine = small_machine();
        let error = Primary::with(&machine, options, HostIdentity::random()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    };
    refuse(&|options| options.epoch_min_ms = options.epoch_ms + 1);
    refuse(&|options| options.epoch_ms = 0);
    refuse(&|options| options.epoch_max_ms = Some(options.epoch_ms - 1));
    refuse(&|options| options.epoch_max_ms = Some(10_001));
    refuse(&|options| options.connections = 0);
    refuse(&|options| options.connections = 129);
    refuse(&|options| options.timeout_ms = options.heartbeat_ms);
    refuse(&|options| options.destination_url = "carrier-pigeon".to_owned());
    refuse(&|options| options.arbiter = Some("sqlite:x".to_owned()));
    refuse(&|options| options.arbiter_credentials = Some("/nonexistent".to_owned()));
    refuse(&|options| {
        options.arbiter = Some("file:/nonexistent".to_owned());
        options.arbiter_tls_dir = Some("/nonexistent".to_owned());
    });
    refuse(&|options| {
        options.arbiter = Some("etcd:http://127.0.0.1:1".to_owned());
        options.arbiter_credentials = Some("/nonexistent".to_owned());
    });
    refuse(&|options| options.rdma_device = Some("mlx5_0".to_owned()));
    refuse(&|options| options.rdma_depth = Some(64));
    let refuse_rdma = |change: &dyn Fn(&mut api::replication::ReplicateData)| {
        refuse(&|options| {
            options.destination_url = "rdma:127.0.0.1:1".to_owned();
            change(options);
        });
    };
    refuse_rdma(&|options| options.rdma_device = Some(String::new()));
    refuse_rdma(&|options| options.rdma_port = Some(0));
    refuse_rdma(&|options| options.rdma_gid_index = Some(256));
    refuse_rdma(&|options| options.rdma_depth = Some(3));
    let machine = small_machine();
    let nobody = Primary::start(&machine, "unix:/nonexistent/socket", None).err().unwrap();
    assert!(matches!(nobody, Error::Transport(_)), "{nobody}");
}
