//! What a primary may pile up at its backup, and what may go on while an arbiter is slow.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use api::replication::ReplicationState;
use uuid::Uuid;

use super::pair::Backup;
use super::scripted::{Script, offer};
use super::{cpu_ticks, receive_options, until};
use crate::ids::{EpochId, Generation};
use crate::observer::Event;
use crate::ownership::{Arbiter, FileArbiter, HostId, Record, Standing, VmId};
use crate::protocol::backup::Handover;
use crate::testing::MemoryBuilder;
use crate::wire::{Message, Offer, Seal, SessionId, WireError};

const G1: Generation = Generation(1);

/// A session whose first epoch waits to be parsed for as long as the guard lives.
fn busy<'a>(script: &mut Script, lock: &'a std::sync::Mutex<()>) -> std::sync::MutexGuard<'a, ()> {
    let guard = lock.lock().unwrap();
    script.say(&Message::Paired(G1));
    script.end(1);
    script.seal(1, 1, 0);
    until(|| script.backup.handle.info(), |info| info.epoch_sealed == 1);
    guard
}

#[test]
fn seals_cannot_pile_up_behind_a_busy_backup() {
    let mut script = Script::greeted(Backup::start(None), offer());
    let log = std::sync::Arc::clone(&script.backup.log);
    let guard = busy(&mut script, &log.busy);
    let stream = script.writer.get_ref();
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let seal = Message::Seal(Seal {
        epoch: EpochId(2),
        generation: G1,
        handover: Handover::No,
        pages: vec![0],
        changes: 0,
        state: vec![7; 8 << 20],
    });
    // A few are read ahead, a few fit the sockets' buffers: never 64.
    let refused = (0..64).find_map(|_| seal.send(&mut script.writer).err());
    let Some(WireError::Io(error)) = refused else { panic!("512 MiB were taken: {refused:?}") };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    drop(guard);
}

#[test]
fn parts_cannot_pile_up_behind_a_busy_backup() {
    let mut script = Script::greeted(Backup::start(None), offer());
    let log = std::sync::Arc::clone(&script.backup.log);
    let guard = busy(&mut script, &log.busy);
    script.end(2);
    script.end(3);
    script.end(4);
    // Long enough for all to be read while the first epoch is held up.
    std::thread::sleep(Duration::from_millis(300));
    drop(guard);
    script.acked(1);
    script.aborted("ended before those before it were acknowledged");
}

/// A primary with a record in `dir` that pairs it with a backup of short patience.
fn paired(dir: &Path) -> Script {
    let mut options = receive_options(Some(dir));
    (options.heartbeat_ms, options.timeout_ms) = (50, 300);
    let backup = Backup::with(MemoryBuilder::default(), options);
    let offer = Offer { arbiter: true, heartbeat_ms: 50, timeout_ms: 300, ..offer() };
    let mut script = Script::greeted(backup, offer);
    record(dir, &script);
    script.say(&Message::Paired(G1));
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
    script
}

fn record(dir: &Path, script: &Script) {
    let backup = script.backup.handle.identity().host;
    let standing = Standing::Pair { primary: HostId(script.host), backup };
    let record = Record { generation: G1, vm: VmId(script.vm), standing };
    FileArbiter::new(dir.to_owned()).compare_and_swap(Generation(0), &record).unwrap();
}

#[test]
fn a_claim_outlives_what_the_primary_says_and_its_silence() {
    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join("records");
    std::fs::create_dir(&records).unwrap();
    let mut script = paired(&records);
    let away = dir.path().join("away");
    std::fs::rename(&records, &away).unwrap();
    let handle = &script.backup.handle;
    std::thread::scope(|scope| {
        let taken = scope.spawn(|| handle.failover(false));
        script.backup.events.wait(|event| matches!(event, Event::Undecided { .. })).unwrap();
        Message::Paired(Generation(2)).send(&mut script.writer).unwrap();
        let before = cpu_ticks("repl-backup");
        std::thread::sleep(Duration::from_millis(1500));
        let spent = cpu_ticks("repl-backup") - before;
        assert!(spent < 15, "{spent} ticks of 10 ms while nothing happened");
        std::fs::rename(&away, &records).unwrap();
        // Whoever asked may have lost patience; the claim goes on.
        drop(taken.join().unwrap());
    });
    until(|| handle.info(), |info| info.state == ReplicationState::TakenOver);
}

#[test]
fn a_failed_look_at_the_record_of_a_dead_session_is_no_news() {
    let dir = tempfile::tempdir().unwrap();
    let backup = Backup::with(MemoryBuilder::default(), receive_options(Some(dir.path())));
    // Whoever reads this record waits until somebody writes it.
    let slow = dir.path().join("gen-1");
    nix::unistd::mkfifo(&slow, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let offer = || Offer { arbiter: true, ..offer() };
    let mut script = Script::greeted(backup, offer());
    script.say(&Message::Paired(G1));
    script.seal(1, 1, 0);
    until(|| script.backup.handle.info(), |info| info.epoch_sealed == 1);
    let Script { backup, writer, .. } = script;
    writer.get_ref().shutdown(std::net::Shutdown::Both).unwrap();
    backup.events.wait(|event| matches!(event, Event::ReceiveFailed { .. })).unwrap();
    let names = (Uuid::new_v4(), Uuid::new_v4());
    let mut next = Script::again(backup, SessionId(44), names, offer());
    std::fs::write(&slow, "no record").unwrap();
    until(|| next.backup.handle.info(), |info| info.last_error.is_some());
    std::fs::remove_file(&slow).unwrap();
    record(dir.path(), &next);
    next.say(&Message::Paired(G1));
    next.end(1);
    next.seal(1, 1, 0);
    next.acked(1);
}

/// A look that fails ends its session, and is told so: it is no claim that is undecided.
#[test]
fn a_claim_that_nobody_answers_is_told_also_after_a_look_that_failed() {
    let dir = tempfile::tempdir().unwrap();
    let (records, away) = (dir.path().join("records"), dir.path().join("away"));
    std::fs::create_dir(&records).unwrap();
    let backup = Backup::with(MemoryBuilder::default(), receive_options(Some(&records)));
    let offer = || Offer { arbiter: true, ..offer() };
    let mut script = Script::greeted(backup, offer());
    std::fs::rename(&records, &away).unwrap();
    script.say(&Message::Paired(G1));
    script.backup.events.wait(|event| matches!(event, Event::ReceiveFailed { .. })).unwrap();
    std::fs::rename(&away, &records).unwrap();
    let names = (Uuid::new_v4(), Uuid::new_v4());
    let mut next = Script::again(script.backup, SessionId(44), names, offer());
    record(&records, &next);
    next.say(&Message::Paired(G1));
    next.end(1);
    next.seal(1, 1, 0);
    next.acked(1);
    std::fs::rename(&records, &away).unwrap();
    let handle = &next.backup.handle;
    std::thread::scope(|scope| {
        let taken = scope.spawn(|| handle.failover(false));
        let told = next.backup.events.wait(|event| matches!(event, Event::Undecided { .. }));
        std::fs::rename(&away, &records).unwrap();
        taken.join().unwrap().unwrap();
        assert!(told.is_some(), "nobody was told");
    });
}
