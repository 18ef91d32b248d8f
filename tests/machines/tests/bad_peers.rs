//! Peers that are none: whatever connects to a backup, and whatever a primary connects to, is
//! one clear error, and who works goes on working.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::replication::ReplicationState;
use api::response::VmState;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use serde_json::json;
use understudy_tests::pair::{Pair, Setup, free_port, start_backup};
use understudy_tests::process::Vmm;
use understudy_tests::scene::{self, LIMIT};
use understudy_tests::serial::Serial;

const VERIFY: &str = "workload=verify tick_ms=20";
const PATIENT: &str = ",timeout_ms=20000";
/// Bytes of a frame's header; its version and its length begin at these places.
const HEADER_BYTES: usize = 32;
const VERSION_AT: usize = 4;
const LENGTH_AT: usize = 8;

fn setup(times: &str) -> Setup {
    let mut setup = Setup::verify(1, "64M");
    setup.replicate_options = times.to_owned();
    setup.receive_options = times.to_owned();
    setup
}

/// A backup alone, its port, and an empty arbiter.
fn lonely_backup(folder: &Path, times: &str) -> Result<(Vmm, u16)> {
    fs::create_dir(folder.join("arbiter"))?;
    let port = free_port()?;
    let backup = start_backup(folder, "backup", &format!("tcp:127.0.0.1:{port}"), &setup(times))?;
    Ok((backup, port))
}

fn body(folder: &Path, port: u16, timeout_ms: u64) -> String {
    let arbiter = format!("file:{}", folder.join("arbiter").display());
    let url = format!("tcp:127.0.0.1:{port}");
    json!({"destination_url": url, "arbiter": arbiter, "timeout_ms": timeout_ms}).to_string()
}

/// What a real primary says first: its hello and its offer, as whole frames.
fn captured(folder: &Path) -> Result<(Vec<u8>, Vec<u8>)> {
    let arbiter = folder.join("arbiter");
    if !arbiter.exists() {
        fs::create_dir(&arbiter)?;
    }
    let (vmm, _serial) = scene::running(folder, "captured", VERIFY)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    // The peer that we are never answers; the primary waits for its welcome in the background.
    let protect = body(folder, port, 1000);
    let greeting = std::thread::spawn(move || -> Result<_> {
        let (mut stream, _) = listener.accept()?;
        let hello = frame(&mut stream)?;
        Ok((hello, frame(&mut stream)?))
    });
    vmm.put_expect("vm.replicate", Some(&protect), 500)?;
    greeting.join().expect("the listener does not panic")
}

fn frame(stream: &mut impl Read) -> Result<Vec<u8>> {
    let mut bytes = vec![0; HEADER_BYTES];
    stream.read_exact(&mut bytes).context("no header came")?;
    let length: [u8; 4] = bytes[LENGTH_AT..LENGTH_AT + 4].try_into()?;
    bytes.resize(HEADER_BYTES + usize::try_from(u32::from_le_bytes(length))?, 0);
    stream.read_exact(&mut bytes[HEADER_BYTES..]).context("no payload came")?;
    Ok(bytes)
}

/// Sends bytes as a stranger, ends, and reads what is answered.
fn say(port: u16, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LIMIT))?;
    // A backup that has seen enough closes while we still send.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Ok(answer)
}

/// The backup says, soon after a stranger has gone, what was wrong with it.
fn noted(backup: &mut Vmm, what: &str) -> Result<()> {
    backup.wait(&format!("'{what}' in last_error"), LIMIT, |vmm| {
        vmm.replication().ok()?.last_error.filter(|error| error.contains(what))
    })?;
    Ok(())
}

/// The backup takes a real primary, and takes over from it.
fn still_a_backup(folder: &Path, backup: &mut Vmm, port: u16) -> Result<()> {
    backup.get_expect("vmm.ping", 200)?;
    assert_eq!(backup.replication()?.state, ReplicationState::Disconnected);
    let (mut primary, serial) = scene::running(folder, "primary", VERIFY)?;
    primary.put_expect("vm.replicate", Some(&body(folder, port, 20000)), 204)?;
    primary.wait_state(ReplicationState::Protected, LIMIT)?;
    serial.wait_more("verify ok", 3, LIMIT)?;
    primary.kill()?;
    backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    let mut serial = Serial::connect(&folder.join("backup.serial"), LIMIT)?;
    serial.wait_more("verify ok", 3, LIMIT)?;
    serial.verdict(LIMIT)?;
    Ok(())
}

#[test]
fn garbage_for_a_backup() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut backup, port) = lonely_backup(folder.path(), PATIENT)?;
    let mut random = StdRng::seed_from_u64(11);
    for _ in 0..20 {
        let mut bytes = vec![0; random.random_range(0..64 << 10)];
        random.fill_bytes(&mut bytes);
        say(port, &bytes)?;
    }
    say(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    noted(&mut backup, "does not speak this protocol")?;
    still_a_backup(folder.path(), &mut backup, port)
}

#[test]
fn a_greeting_that_is_cut_or_damaged() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut backup, port) = lonely_backup(folder.path(), PATIENT)?;
    let (hello, offer) = captured(folder.path())?;
    let whole = [hello.clone(), offer].concat();
    for length in [1, 4, 31, 32, 40, hello.len(), hello.len() + 20, whole.len() - 1] {
        say(port, &whole[..length])?;
        backup.get_expect("vm.info", 404).with_context(|| format!("{length} bytes"))?;
    }
    let mut random = StdRng::seed_from_u64(12);
    for _ in 0..40 {
        let mut bytes = whole.clone();
        let at = random.random_range(0..bytes.len());
        bytes[at] ^= 1 << random.random_range(0..8);
        say(port, &bytes)?;
        backup.get_expect("vm.info", 404).with_context(|| format!("byte {at}"))?;
    }
    // A length that nobody should believe.
    let mut bytes = whole;
    bytes[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    say(port, &bytes)?;
    noted(&mut backup, "4294967295 bytes")?;
    still_a_backup(folder.path(), &mut backup, port)
}

#[test]
fn another_version_is_told_so() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut backup, port) = lonely_backup(folder.path(), PATIENT)?;
    let (mut hello, offer) = captured(folder.path())?;
    hello[VERSION_AT] = 99;
    let answer = say(port, &[hello, offer].concat())?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.contains("version 99"), "the peer is not told: {answer}");
    noted(&mut backup, "version 99")?;
    still_a_backup(folder.path(), &mut backup, port)
}

#[test]
fn peers_that_stall_hold_nobody_up() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut backup, port) = lonely_backup(folder.path(), PATIENT)?;
    let (hello, _) = captured(folder.path())?;
    let mut stalled = Vec::new();
    for length in [0, 1, 31, 40, hello.len()] {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.write_all(&hello[..length])?;
        stalled.push(stream);
    }
    still_a_backup(folder.path(), &mut backup, port)
}

#[test]
fn a_primary_that_stalls_is_given_up() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let brisk = ",timeout_ms=1000";
    let (mut backup, port) = lonely_backup(folder.path(), brisk)?;
    let (hello, offer) = captured(folder.path())?;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(&[hello, offer].concat())?;
    // It is welcomed, and then says nothing more.
    frame(&mut stream)?;
    backup.wait("the replica to be built", LIMIT, |vmm| {
        (vmm.get("vm.info").ok()?.status == 200).then_some(())
    })?;
    backup.wait_state(ReplicationState::Disconnected, LIMIT)?;
    backup.wait("its replica to be gone", LIMIT, |vmm| {
        (vmm.get("vm.info").ok()?.status == 404).then_some(())
    })?;
    noted(&mut backup, "silent")?;
    drop(stream);
    still_a_backup(folder.path(), &mut backup, port)
}

#[test]
fn a_backup_that_is_none() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::create_dir(folder.path().join("arbiter"))?;
    let (mut vmm, mut serial) = scene::running(folder.path(), "vmm", VERIFY)?;
    let answers: [&[u8]; 4] = [b"", b"HTTP/1.1 200 OK\r\n\r\n", &[0xff; 64], &[0; 4096]];
    for answer in answers {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let answer = answer.to_vec();
        let stranger = std::thread::spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            frame(&mut stream)?;
            frame(&mut stream)?;
            stream.write_all(&answer)?;
            Ok(())
        });
        vmm.put_expect("vm.replicate", Some(&body(folder.path(), port, 20000)), 500)?;
        stranger.join().expect("the stranger does not panic")?;
        assert_eq!(vmm.vm_state()?, VmState::Running);
        vmm.put_expect("vm.stop-replication", None, 404)?;
    }
    serial.wait_more("verify ok", 2, LIMIT)?;
    serial.verdict(LIMIT)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0));
    Ok(())
}

#[test]
fn a_second_primary_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(PATIENT))?;
    let url = pair.primary.replication()?.peer.context("no peer")?;
    // Another VM, with an arbiter of its own as it should be.
    let other = folder.path().join("other");
    fs::create_dir(&other)?;
    let (mut second, mut second_serial) = scene::running(folder.path(), "second", VERIFY)?;
    let arbiter = format!("file:{}", other.display());
    let body = json!({"destination_url": url, "arbiter": arbiter, "timeout_ms": 20000});
    let text = second.put_expect("vm.replicate", Some(&body.to_string()), 500)?;
    assert!(text.contains("another primary"), "{text}");
    assert_eq!(fs::read_dir(&other)?.count(), 0, "a refused primary left a record");
    second_serial.wait_more("verify ok", 2, LIMIT)?;
    second_serial.verdict(LIMIT)?;
    assert_eq!(second.wait_exit(LIMIT)?.code(), Some(0));
    // The first pair has not noticed.
    let before = pair.primary.replication()?;
    assert_eq!(before.state, ReplicationState::Protected);
    pair.primary_serial.wait_more("verify ok", 5, LIMIT)?;
    assert!(pair.primary.replication()?.epoch_committed > before.epoch_committed);
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    pair.backup_serial.wait_more("verify ok", 2, LIMIT)?;
    pair.backup_serial.verdict(LIMIT)?;
    Ok(())
}

#[test]
fn strangers_do_not_disturb_a_pair() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (hello, offer) = captured(folder.path())?;
    let folder = tempfile::tempdir()?;
    let mut pair = Pair::start(folder.path(), &setup(PATIENT))?;
    pair.wait_protected(LIMIT)?;
    let peer = pair.primary.replication()?.peer.context("no peer")?;
    let port: u16 = peer.rsplit(':').next().context("no port")?.parse()?;
    let mut random = StdRng::seed_from_u64(13);
    for _ in 0..10 {
        let mut bytes = vec![0; random.random_range(1..16 << 10)];
        random.fill_bytes(&mut bytes);
        say(port, &bytes)?;
        // Another VM's greeting; a data connection that belongs to no session; a cut one.
        let answer = say(port, &[hello.clone(), offer.clone()].concat())?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.contains("another primary"), "{answer}");
        say(port, &hello)?;
    }
    assert_eq!(pair.primary.replication()?.state, ReplicationState::Protected);
    assert!(matches!(pair.backup.vm_state()?, VmState::Created | VmState::Paused));
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    pair.backup_serial.wait_more("verify ok", 2, LIMIT)?;
    pair.backup_serial.verdict(LIMIT)?;
    Ok(())
}

/// `MemTotal` of this host in bytes.
fn memory_total() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.context("no MemTotal")?.trim().trim_end_matches("kB").trim();
    Ok(kib.parse::<u64>()? << 10)
}

#[test]
fn a_vm_that_does_not_fit_the_backup() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut backup, port) = lonely_backup(folder.path(), PATIENT)?;
    let (vmm, serial) = {
        let vmm = scene::idle(folder.path(), "large")?;
        let mut config = scene::config(folder.path(), "workload=count tick_ms=20");
        // More than the host has; the guest touches next to nothing of it.
        config["memory"]["size"] = json!((memory_total()? + (1 << 30)) >> 21 << 21);
        let serial = scene::boot(&vmm, folder.path(), &config)?;
        (vmm, serial)
    };
    serial.wait_more("tick ", 1, LIMIT)?;
    let text = vmm.put_expect("vm.replicate", Some(&body(folder.path(), port, 20000)), 500)?;
    assert!(text.contains("refused") && text.contains("does not fit"), "{text}");
    assert_eq!(vmm.vm_state()?, VmState::Running);
    serial.wait_more("tick ", 2, LIMIT)?;
    backup.wait_state(ReplicationState::Disconnected, LIMIT)?;
    drop((vmm, serial));
    still_a_backup(folder.path(), &mut backup, port)
}

#[test]
fn a_record_of_another_vm_is_respected() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut backup, port) = lonely_backup(folder.path(), PATIENT)?;
    let record = folder.path().join("arbiter").join("gen-1");
    let foreign = json!({
        "generation": 1,
        "vm": "6e5c8a9e-0000-4000-8000-000000000001",
        "standing": {"solo": {"owner": "6e5c8a9e-0000-4000-8000-000000000002"}},
    });
    fs::write(&record, foreign.to_string())?;
    let (mut vmm, mut serial) = scene::running(folder.path(), "vmm", VERIFY)?;
    let protect = body(folder.path(), port, 20000);
    let text = vmm.put_expect("vm.replicate", Some(&protect), 409)?;
    assert!(text.contains("empty") && text.contains("directory"), "no way out is named: {text}");
    assert_eq!(vmm.vm_state()?, VmState::Running);
    // A record that cannot be read says nothing about who may run: no guess is made.
    for damage in ["", "{", "{\"generation\": 7}"] {
        fs::write(&record, damage)?;
        let text = vmm.put_expect("vm.replicate", Some(&protect), 500)?;
        assert!(text.contains("gen-1"), "{text}");
    }
    serial.wait_more("verify ok", 2, LIMIT)?;
    assert_eq!(backup.replication()?.state, ReplicationState::Disconnected);
    fs::remove_file(&record)?;
    // An arbiter that is there for one of them only, and two different ones.
    let none = json!({"destination_url": format!("tcp:127.0.0.1:{port}"), "timeout_ms": 20000});
    let text = vmm.put_expect("vm.replicate", Some(&none.to_string()), 500)?;
    assert!(text.contains("arbiter"), "{text}");
    serial.wait_more("verify ok", 2, LIMIT)?;
    serial.verdict(LIMIT)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0));
    still_a_backup(folder.path(), &mut backup, port)
}

#[test]
fn two_different_arbiters_are_noticed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (backup, port) = lonely_backup(folder.path(), PATIENT)?;
    let other = folder.path().join("other");
    fs::create_dir(&other)?;
    let (mut vmm, mut serial) = scene::running(folder.path(), "vmm", VERIFY)?;
    let url = format!("tcp:127.0.0.1:{port}");
    let arbiter = format!("file:{}", other.display());
    let body = json!({"destination_url": url, "arbiter": arbiter, "timeout_ms": 20000});
    vmm.put_expect("vm.replicate", Some(&body.to_string()), 204)?;
    let error = vmm.wait("the end of the protection", LIMIT, |vmm| {
        let info = vmm.replication().ok()?;
        matches!(info.state, ReplicationState::Degraded | ReplicationState::Stopped)
            .then_some(info.last_error?)
    })?;
    ensure!(error.contains("arbiter"), "{error}");
    serial.wait_more("verify ok", 2, LIMIT)?;
    serial.verdict(LIMIT)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0));
    std::thread::sleep(Duration::from_millis(300));
    backup.get_expect("vm.info", 404)?;
    Ok(())
}
