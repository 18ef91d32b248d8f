//! A protection's life: begun, lost, ended, begun anew, and a VM that ends in the middle of it.

use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use api::replication::ReplicationState;
use api::response::VmState;
use serde_json::{Value, json};
use understudy_tests::pair::{Pair, Setup, free_port, start_backup};
use understudy_tests::process::Vmm;
use understudy_tests::scene::{self, LIMIT, records};
use understudy_tests::serial::Serial;

/// Peers that nobody freezes are not to be suspected, however busy the machine.
const PATIENT: &str = ",timeout_ms=20000";

fn setup() -> Setup {
    let mut setup = Setup::verify(1, "64M");
    setup.replicate_options = PATIENT.to_owned();
    setup.receive_options = PATIENT.to_owned();
    setup
}

/// The body of a `vm.replicate` in the pair's arbiter directory.
fn replicate_body(arbiter: &Path, url: &str) -> String {
    json!({
        "destination_url": url,
        "arbiter": format!("file:{}", arbiter.display()),
        "timeout_ms": 20000,
    })
    .to_string()
}

/// Another backup with the pair's arbiter, and where it listens.
fn another_backup(folder: &Path, name: &str) -> Result<(Vmm, String)> {
    let url = format!("tcp:127.0.0.1:{}", free_port()?);
    Ok((start_backup(folder, name, &url, &setup())?, url))
}

/// `vmm` is protected by a new backup, is killed, and its VM goes on there.
fn protected_again(folder: &Path, vmm: &mut Vmm, serial: &Serial, generation: u64) -> Result<()> {
    let (mut backup, url) = another_backup(folder, "another")?;
    let body = replicate_body(&folder.join("arbiter"), &url);
    vmm.put_expect("vm.replicate", Some(&body), 204)?;
    let info = vmm.wait_state(ReplicationState::Protected, LIMIT)?;
    assert_eq!(info.generation, generation);
    serial.wait_more("verify ok", 3, LIMIT)?;
    vmm.kill()?;
    backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    let mut serial = Serial::connect(&folder.join("another.serial"), LIMIT)?;
    serial.wait_more("verify ok", 3, LIMIT)?;
    serial.verdict(LIMIT)?;
    assert_eq!(records(&folder.join("arbiter"))?.len() as u64, generation + 1);
    Ok(())
}

#[test]
fn a_degraded_vm_is_protected_by_a_new_backup() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Pair { mut primary, mut backup, primary_serial, .. } =
        scene::protected(folder.path(), &setup())?;
    backup.kill()?;
    // At once: its engine may still be closing.
    primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    protected_again(folder.path(), &mut primary, &primary_serial, 3)
}

#[test]
fn a_vm_that_was_taken_over_is_protected_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Pair { mut primary, mut backup, backup_serial, .. } =
        scene::protected(folder.path(), &setup())?;
    primary.kill()?;
    backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    protected_again(folder.path(), &mut backup, &backup_serial, 3)
}

#[test]
fn what_is_asked_of_the_wrong_side_is_refused_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup())?;
    for request in ["vm.boot", "vm.pause", "vm.resume", "vm.shutdown"] {
        let text = pair.backup.put_expect(request, None, 409)?;
        assert!(text.contains("vm.failover"), "{request}: {text}");
    }
    // It says that the primary is gone.
    let text = pair.primary.put_expect("vm.failover", Some(r#"{"force":true}"#), 409)?;
    assert!(text.contains("this host runs the VM"), "{text}");
    assert_eq!(pair.primary.replication()?.state, ReplicationState::Protected);
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.primary_serial.verdict(LIMIT)?;
    Ok(())
}

#[test]
fn a_degraded_protection_can_be_ended() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup())?;
    pair.backup.kill()?;
    pair.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    pair.primary.put_expect("vm.stop-replication", None, 204)?;
    pair.primary.put_expect("vm.stop-replication", None, 404)?;
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.primary_serial.verdict(LIMIT)?;
    Ok(())
}

#[test]
fn a_backup_that_is_not_there_does_not_cost_the_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Pair { mut primary, primary_serial, arbiter, backup, .. } =
        scene::protected(folder.path(), &setup())?;
    primary.put_expect("vm.stop-replication", None, 204)?;
    drop(backup);
    let nowhere = format!("tcp:127.0.0.1:{}", free_port()?);
    let body = replicate_body(&arbiter, &nowhere);
    for _ in 0..2 {
        primary.put_expect("vm.replicate", Some(&body), 500)?;
    }
    protected_again(folder.path(), &mut primary, &primary_serial, 3)
}

/// What a second VMM with a VM of its own does to a pair's directory.
#[test]
fn a_second_vm_in_a_living_pair_s_directory_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup())?;
    let (mut stranger, url) = another_backup(folder.path(), "another")?;
    let (second, serial) = scene::running(folder.path(), "second", "workload=verify tick_ms=20")?;
    let body = replicate_body(&pair.arbiter, &url);
    let text = second.put_expect("vm.replicate", Some(&body), 409)?;
    ensure!(text.contains("record"), "{text}");
    serial.wait_more("verify ok", 2, LIMIT)?;
    assert_eq!(stranger.replication()?.state, ReplicationState::Disconnected);
    stranger.signal(libc::SIGTERM)?;
    assert_eq!(stranger.wait_exit(LIMIT)?.code(), Some(0));
    assert_eq!(pair.primary.replication()?.state, ReplicationState::Protected);
    pair.primary_serial.wait_more("verify ok", 2, LIMIT)?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    pair.backup_serial.wait_more("verify ok", 2, LIMIT)?;
    assert_eq!(second.vm_state()?, VmState::Running);
    Ok(())
}

#[test]
fn a_vm_that_ends_while_its_backup_is_called_is_gone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = scene::config(folder.path(), "workload=count tick_ms=20");
    let vmm = scene::idle(folder.path(), "vmm")?;
    let serial = scene::boot(&vmm, folder.path(), &config)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    // It accepts, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("tcp:{}", silent.local_addr()?);
    let body = json!({"destination_url": url, "timeout_ms": 20000}).to_string();
    std::thread::scope(|scope| {
        let called = scope.spawn(|| vmm.put("vm.replicate", Some(&body)));
        let (stream, _) = silent.accept()?;
        vmm.put_expect("vm.shutdown", None, 204)?;
        assert_eq!(vmm.vm_state()?, VmState::Created);
        let speaks = serial.wait_after(serial.mark(), "tick ", 25, LIMIT);
        ensure!(speaks.is_err(), "a VM that was shut down speaks");
        drop(serial);
        // Nothing of the first one gets in the way of a second.
        vmm.put_expect("vm.boot", None, 204)?;
        let serial = Serial::connect(&folder.path().join("vm.serial"), LIMIT)?;
        serial.wait_more("tick ", 2, LIMIT)?;
        drop(stream);
        let answer = called.join().expect("the client does not panic")?;
        assert!(!answer.is_success(), "{answer:?}");
        serial.wait_more("tick ", 2, LIMIT)?;
        assert_eq!(vmm.vm_state()?, VmState::Running);
        Ok(())
    })
}

/// The names of a VMM's events, and the last one's.
fn events(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path)?;
    let events = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
    events
        .map(|event| {
            let event = event?;
            let part = |name: &str| event[name].as_str().map(str::to_owned).context("no text");
            Ok(format!("{}:{}", part("source")?, part("event")?))
        })
        .collect()
}

#[test]
fn both_sides_tell_what_happens() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let url = format!("tcp:127.0.0.1:{}", free_port()?);
    let monitor = |name: &str| format!("path={}", path(name).display());
    let mut backup = Vmm::start(
        folder.path(),
        "backup",
        &[
            "--receive-replica",
            &format!("receiver_url={url}"),
            "--serial",
            &format!("socket={}", path("backup.serial").display()),
            "--event-monitor",
            &monitor("b.events"),
        ],
    )?;
    let mut primary =
        Vmm::start(folder.path(), "primary", &["--event-monitor", &monitor("a.events")])?;
    let config = scene::config(folder.path(), "workload=verify tick_ms=20");
    let serial = scene::boot(&primary, folder.path(), &config)?;
    let body = json!({"destination_url": url, "timeout_ms": 20000}).to_string();
    primary.put_expect("vm.replicate", Some(&body), 204)?;
    primary.wait_state(ReplicationState::Protected, LIMIT)?;
    serial.wait_more("verify ok", 2, LIMIT)?;
    primary.put_expect("vm.failover", Some("{}"), 204)?;
    primary.wait("its VM to be gone", LIMIT, |vmm| {
        (vmm.get("vm.info").ok()?.status == 404).then_some(())
    })?;
    backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    for vmm in [&mut primary, &mut backup] {
        vmm.signal(libc::SIGTERM)?;
        assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    }
    let expected = [
        "vmm:starting",
        "vm:booting",
        "vm:booted",
        "vm:replication-started",
        "vm:replication-synced",
        "vm:failover-started",
        "vm:failover-finished",
        "vm:deleted",
        "vmm:shutdown",
    ];
    assert_eq!(events(&path("a.events"))?, expected);
    let expected = [
        "vmm:starting",
        "vm:replica-receive-ready",
        "vm:replica-receive-started",
        "vm:failover-started",
        "vm:resumed",
        "vm:failover-finished",
        "vm:shutdown",
        "vm:deleted",
        "vmm:shutdown",
    ];
    assert_eq!(events(&path("b.events"))?, expected);
    Ok(())
}
