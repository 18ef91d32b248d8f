//! A pair of hosts that lose each other in every way: one of them runs the guest, never both,
//! and the guest finds its memory as it left it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::replication::{ReplicationState, Role};
use api::response::{VmCounters, VmState};
use serde_json::{Value, json};
use understudy_tests::pair::{Pair, Setup, free_port};
use understudy_tests::process::Vmm;
use understudy_tests::round;
use understudy_tests::scene::{self, LIMIT, records};
use understudy_tests::serial::Serial;

/// Peers that nobody freezes are not to be suspected, however busy the machine.
const PATIENT: &str = ",timeout_ms=20000";
/// Peers that are frozen are suspected soon.
const BRISK: &str = ",timeout_ms=1500,heartbeat_ms=50";

fn setup(vcpus: u32, times: &str) -> Setup {
    let mut setup = Setup::verify(vcpus, "64M");
    setup.replicate_options = times.to_owned();
    setup.receive_options = times.to_owned();
    setup
}

/// All ticks in a text, in its order.
fn ticks(text: &str) -> Vec<u64> {
    let numbers = text.split("tick=").skip(1);
    numbers
        .filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
        .collect()
}

/// The record's owner if it runs alone.
fn owner(record: &Value) -> Option<&str> {
    record["standing"]["solo"]["owner"].as_str()
}

/// The primary's and the backup's host in a record of a pair.
fn pair_of(record: &Value) -> Result<(String, String)> {
    let host = |name: &str| {
        let host = record["standing"]["pair"][name].as_str();
        host.map(str::to_owned).with_context(|| format!("no pair: {record}"))
    };
    Ok((host("primary")?, host("backup")?))
}

/// There are two records: the pair's, and one that says that `side` owns the VM alone.
fn owned_by(arbiter: &Path, side: Role) -> Result<()> {
    let records = records(arbiter)?;
    ensure!(records.len() == 2, "the arbiter has {} records: {records:?}", records.len());
    let (primary, backup) = pair_of(&records[0])?;
    let wanted = if side == Role::Primary { primary } else { backup };
    ensure!(owner(&records[1]) == Some(&wanted), "{records:?} is not owned by the {side:?}");
    Ok(())
}

/// The guest goes on at the backup, and is right about its memory.
fn goes_on(vmm: &mut Vmm, serial: &mut Serial) -> Result<()> {
    serial.wait_more("verify ok", 3, LIMIT)?;
    serial.verdict(LIMIT)?;
    let status = vmm.wait_exit(LIMIT)?;
    ensure!(status.success(), "{} ended with {status}:\n{}", vmm.name(), vmm.log());
    Ok(())
}

/// A backup that never ran the VM and has none.
fn has_no_vm(vmm: &Vmm, serial: &Serial) -> Result<()> {
    vmm.get_expect("vm.info", 404)?;
    let text = serial.text();
    ensure!(text.is_empty(), "the VM spoke on {}: {text}", vmm.name());
    Ok(())
}

fn kill_round(vcpus: u32) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let setup = setup(vcpus, PATIENT);
    let outcome = round::run(folder.path(), &setup, Duration::from_millis(400), &mut ())?;
    assert_eq!(outcome.backup.role, Role::Backup);
    Ok(())
}

#[test]
fn killed_with_1_vcpu() -> Result<()> {
    kill_round(1)
}

#[test]
fn killed_with_2_vcpus() -> Result<()> {
    kill_round(2)
}

#[test]
fn killed_with_4_vcpus() -> Result<()> {
    kill_round(4)
}

#[test]
fn killed_over_a_unix_socket_and_several_connections() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut setup = setup(2, PATIENT);
    setup.replicate_options.push_str(",connections=3");
    let url = format!("unix:{}", folder.path().join("replica").display());
    let mut pair = Pair::start_at(folder.path(), &setup, &url)?;
    pair.wait_protected(LIMIT)?;
    pair.primary_serial.wait_more("verify ok", 5, LIMIT)?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    owned_by(&pair.arbiter, Role::Backup)?;
    goes_on(&mut pair.backup, &mut pair.backup_serial)
}

#[test]
fn a_frozen_primary_is_replaced_and_stays_silent() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(2, BRISK))?;
    pair.primary.signal(libc::SIGSTOP)?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    pair.backup_serial.wait_more("verify ok", 3, LIMIT)?;
    round::wake(&mut pair)?;
    pair.primary.put_expect("vm.resume", None, 404)?;
    pair.primary.get_expect("vmm.ping", 200)?;
    owned_by(&pair.arbiter, Role::Backup)?;
    goes_on(&mut pair.backup, &mut pair.backup_serial)
}

#[test]
fn a_killed_backup_leaves_the_guest_running() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(2, PATIENT))?;
    pair.backup.kill()?;
    let info = pair.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    assert_eq!(info.role, Role::Primary);
    assert_eq!(pair.primary.vm_state()?, VmState::Running);
    owned_by(&pair.arbiter, Role::Primary)?;
    goes_on(&mut pair.primary, &mut pair.primary_serial)?;
    consecutive(&[&pair.primary_serial])
}

/// What the serial ports said, one after the other, has every tick once.
fn consecutive(serials: &[&Serial]) -> Result<()> {
    let text: String = serials.iter().map(|serial| serial.text()).collect();
    let ticks = ticks(&text);
    ensure!(!ticks.is_empty(), "no ticks in {text}");
    for pair in ticks.windows(2) {
        ensure!(pair[1] == pair[0] + 1, "tick {} follows {}:\n{text}", pair[1], pair[0]);
    }
    Ok(())
}

#[test]
fn a_frozen_backup_never_starts_the_vm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // Called again it would be a backup again.
    let mut setup = setup(1, BRISK);
    setup.replicate_options.push_str(",reconnect=off");
    let mut pair = scene::protected(folder.path(), &setup)?;
    pair.backup.signal(libc::SIGSTOP)?;
    pair.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.backup.signal(libc::SIGCONT)?;
    pair.backup.wait_state(ReplicationState::Disconnected, LIMIT)?;
    pair.backup.wait("its replica to be gone", LIMIT, |vmm| {
        (vmm.get("vm.info").ok()?.status == 404).then_some(())
    })?;
    let force = json!({"force": true}).to_string();
    pair.backup.put_expect("vm.failover", Some(&force), 409)?;
    has_no_vm(&pair.backup, &pair.backup_serial)?;
    owned_by(&pair.arbiter, Role::Primary)?;
    goes_on(&mut pair.primary, &mut pair.primary_serial)?;
    consecutive(&[&pair.primary_serial])
}

#[test]
fn a_primary_that_must_not_run_alone_is_paused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut setup = setup(1, PATIENT);
    setup.replicate_options.push_str(",degrade=pause");
    let mut pair = scene::protected(folder.path(), &setup)?;
    pair.backup.kill()?;
    pair.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    assert_eq!(pair.primary.vm_state()?, VmState::Paused);
    let before = pair.primary_serial.settled()?;
    assert_eq!(pair.primary_serial.settled()?, before);
    pair.primary.put_expect("vm.resume", None, 204)?;
    goes_on(&mut pair.primary, &mut pair.primary_serial)?;
    consecutive(&[&pair.primary_serial])
}

#[test]
fn without_an_arbiter_a_person_decides() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut setup = setup(2, PATIENT);
    setup.arbiter = false;
    let mut pair = scene::protected(folder.path(), &setup)?;
    let (ask, force) = (json!({}).to_string(), json!({"force": true}).to_string());
    // The primary is alive: no word of a person changes that.
    pair.backup.put_expect("vm.failover", Some(&ask), 409)?;
    pair.backup.put_expect("vm.failover", Some(&force), 409)?;
    pair.primary.kill()?;
    pair.backup.wait("the loss to be noticed", LIMIT, |vmm| {
        (vmm.replication().ok()?.state != ReplicationState::Protected).then_some(())
    })?;
    let text = pair.backup.put_expect("vm.failover", Some(&ask), 409)?;
    assert!(text.contains("force"), "{text}");
    let state = pair.backup.replication()?.state;
    assert!(state != ReplicationState::TakenOver, "{state:?}");
    assert_eq!(pair.backup_serial.text(), "", "the VM was started by nobody's word");
    assert!(matches!(pair.backup.vm_state()?, VmState::Created | VmState::Paused));
    pair.backup.put_expect("vm.failover", Some(&force), 204)?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    pair.backup.put_expect("vm.failover", Some(&force), 409)?;
    goes_on(&mut pair.backup, &mut pair.backup_serial)
}

fn planned(arbiter: bool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut setup = setup(2, PATIENT);
    setup.arbiter = arbiter;
    let mut pair = scene::protected(folder.path(), &setup)?;
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.primary.put_expect("vm.failover", Some("{}"), 204)?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    assert_eq!(pair.backup.vm_state()?, VmState::Running);
    pair.primary.wait_state(ReplicationState::Lost, LIMIT)?;
    pair.primary.wait("its VM to be gone", LIMIT, |vmm| {
        (vmm.get("vm.info").ok()?.status == 404).then_some(())
    })?;
    if arbiter {
        owned_by(&pair.arbiter, Role::Backup)?;
    }
    goes_on(&mut pair.backup, &mut pair.backup_serial)?;
    consecutive(&[&pair.primary_serial, &pair.backup_serial])
}

#[test]
fn a_planned_switch_over_loses_and_repeats_nothing() -> Result<()> {
    planned(true)
}

#[test]
fn a_planned_switch_over_without_an_arbiter() -> Result<()> {
    planned(false)
}

#[test]
fn a_person_takes_the_vm_over_to_the_backup() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    pair.backup.put_expect("vm.failover", Some("{}"), 204)?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    pair.primary.wait_state(ReplicationState::Lost, LIMIT)?;
    owned_by(&pair.arbiter, Role::Backup)?;
    goes_on(&mut pair.backup, &mut pair.backup_serial)
}

#[test]
fn a_protection_that_is_ended_starts_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    pair.primary.put_expect("vm.stop-replication", None, 204)?;
    assert_eq!(pair.primary.replication()?.state, ReplicationState::Stopped);
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.backup.wait_state(ReplicationState::Disconnected, LIMIT)?;
    pair.backup.wait("its replica to be gone", LIMIT, |vmm| {
        (vmm.get("vm.info").ok()?.status == 404).then_some(())
    })?;
    owned_by(&pair.arbiter, Role::Primary)?;
    consecutive(&[&pair.primary_serial])?;
    pair.primary.kill()?;
    let force = json!({"force": true}).to_string();
    pair.backup.put_expect("vm.failover", Some(&force), 409)?;
    std::thread::sleep(Duration::from_millis(500));
    has_no_vm(&pair.backup, &pair.backup_serial)?;
    assert_eq!(pair.backup.replication()?.state, ReplicationState::Disconnected);
    assert_eq!(records(&pair.arbiter)?.len(), 2);
    Ok(())
}

#[test]
fn a_vm_is_protected_anew() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    let peer = pair.primary.replication()?.peer.context("no peer")?;
    pair.primary.put_expect("vm.stop-replication", None, 204)?;
    let body = json!({
        "destination_url": peer,
        "arbiter": format!("file:{}", pair.arbiter.display()),
        "timeout_ms": 20000,
    });
    pair.primary.put_expect("vm.replicate", Some(&body.to_string()), 204)?;
    let info = pair.primary.wait_state(ReplicationState::Protected, LIMIT)?;
    assert_eq!(info.generation, 3, "PAIR, SOLO, PAIR");
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.primary.kill()?;
    let mut serial = Serial::connect(&folder.path().join("backup.serial"), LIMIT)?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    assert_eq!(records(&pair.arbiter)?.len(), 4);
    goes_on(&mut pair.backup, &mut serial)
}

#[test]
fn a_guest_that_powers_off_is_not_resurrected() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    // Its last words leave although they were held.
    goes_on(&mut pair.primary, &mut pair.primary_serial)?;
    pair.backup.wait_state(ReplicationState::Disconnected, LIMIT)?;
    pair.backup.wait("its replica to be gone", LIMIT, |vmm| {
        (vmm.get("vm.info").ok()?.status == 404).then_some(())
    })?;
    has_no_vm(&pair.backup, &pair.backup_serial)?;
    owned_by(&pair.arbiter, Role::Primary)?;
    pair.backup.signal(libc::SIGTERM)?;
    assert_eq!(pair.backup.wait_exit(LIMIT)?.code(), Some(0), "{}", pair.backup.log());
    Ok(())
}

#[test]
fn a_primary_that_is_shut_down_ends_the_protection() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    pair.primary.signal(libc::SIGTERM)?;
    assert_eq!(pair.primary.wait_exit(LIMIT)?.code(), Some(0), "{}", pair.primary.log());
    pair.backup.wait_state(ReplicationState::Disconnected, LIMIT)?;
    has_no_vm(&pair.backup, &pair.backup_serial)?;
    owned_by(&pair.arbiter, Role::Primary)
}

#[test]
fn a_backup_that_is_shut_down_leaves_the_guest_running() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    pair.backup.signal(libc::SIGTERM)?;
    assert_eq!(pair.backup.wait_exit(LIMIT)?.code(), Some(0), "{}", pair.backup.log());
    pair.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    owned_by(&pair.arbiter, Role::Primary)?;
    goes_on(&mut pair.primary, &mut pair.primary_serial)
}

#[test]
fn a_reset_stays_protected() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(2, PATIENT))?;
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    let mark = pair.primary_serial.mark();
    pair.primary.put_expect("vm.reboot", None, 204)?;
    pair.primary_serial.wait_after(mark, "understudy-guest", 1, LIMIT)?;
    pair.primary_serial.wait_more("verify ok", 5, LIMIT)?;
    pair.wait_protected(LIMIT)?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    goes_on(&mut pair.backup, &mut pair.backup_serial)
}

#[test]
fn a_pause_in_between_harms_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(2, PATIENT))?;
    for _ in 0..3 {
        pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
        pair.primary.put_expect("vm.pause", None, 204)?;
        assert_eq!(pair.primary.vm_state()?, VmState::Paused);
        let before = pair.primary_serial.settled()?;
        assert_eq!(pair.primary_serial.settled()?, before);
        pair.primary.put_expect("vm.resume", None, 204)?;
    }
    assert_eq!(pair.primary.replication()?.state, ReplicationState::Protected);
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    consecutive(&[&pair.primary_serial])?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    assert_eq!(pair.backup.vm_state()?, VmState::Running);
    goes_on(&mut pair.backup, &mut pair.backup_serial)
}

#[test]
fn a_paused_vm_is_taken_over_paused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    pair.primary.put_expect("vm.pause", None, 204)?;
    pair.primary_serial.settled()?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    assert_eq!(pair.backup.vm_state()?, VmState::Paused);
    pair.backup.put_expect("vm.resume", None, 204)?;
    goes_on(&mut pair.backup, &mut pair.backup_serial)
}

#[test]
fn what_a_pair_refuses() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    let replicate = json!({"destination_url": "tcp:127.0.0.1:1"}).to_string();
    let other = format!("unix:{}", folder.path().join("other").display());
    let receive = json!({"receiver_url": other}).to_string();
    let create = scene::config(folder.path(), "workload=count").to_string();
    let restore = json!({"source_url": "file:///nonexistent"}).to_string();
    pair.primary.put_expect("vm.replicate", Some(&replicate), 409)?;
    pair.primary.put_expect("vm.receive-replica", Some(&receive), 409)?;
    pair.backup.put_expect("vm.receive-replica", Some(&receive), 409)?;
    pair.backup.put_expect("vm.create", Some(&create), 500)?;
    let text = pair.backup.put_expect("vm.restore", Some(&restore), 500)?;
    assert!(text.contains("backup"), "{text}");
    for name in ["vm.boot", "vm.pause", "vm.resume", "vm.shutdown", "vm.reboot"] {
        let answer = pair.backup.put(name, None)?;
        assert!(matches!(answer.status, 409 | 500), "{name} on a backup: {answer:?}");
    }
    // Nothing of it is here to be deleted, and it stays a backup.
    pair.backup.put_expect("vm.delete", None, 204)?;
    let counters: VmCounters = serde_json::from_str(&pair.primary.get_expect("vm.counters", 200)?)?;
    assert!(counters["__replication"]["epoch_committed"] > 0, "{counters:?}");
    // None of this changed anything.
    assert!(matches!(pair.backup.vm_state()?, VmState::Created | VmState::Paused));
    assert_eq!(pair.primary.replication()?.state, ReplicationState::Protected);
    pair.primary_serial.wait_more("verify ok", 2, LIMIT)?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    goes_on(&mut pair.backup, &mut pair.backup_serial)
}

#[test]
fn a_backup_is_stopped_by_a_person() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut pair = scene::protected(folder.path(), &setup(1, PATIENT))?;
    pair.backup.put_expect("vm.stop-replication", None, 204)?;
    pair.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    pair.primary_serial.wait_more("verify ok", 2, LIMIT)?;
    owned_by(&pair.arbiter, Role::Primary)?;
    pair.backup.get_expect("vm.info", 404)?;
    // It is an ordinary VMM again.
    let serial = scene::boot(
        &pair.backup,
        folder.path(),
        &scene::config(folder.path(), "workload=count tick_ms=20"),
    )?;
    serial.wait_more("tick ", 2, LIMIT)?;
    goes_on(&mut pair.primary, &mut pair.primary_serial)
}

#[test]
fn a_peer_that_is_not_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut vmm, mut serial) = scene::running(folder.path(), "vmm", "workload=verify tick_ms=20")?;
    let port = free_port()?;
    for url in [format!("tcp:127.0.0.1:{port}"), "unix:/nonexistent/replica".to_owned()] {
        let body = json!({"destination_url": url}).to_string();
        let text = vmm.put_expect("vm.replicate", Some(&body), 500)?;
        let place = url.split_once(':').context("no scheme")?.1;
        assert!(text.contains(place), "{text}");
        assert_eq!(vmm.vm_state()?, VmState::Running);
        serial.wait_more("verify ok", 2, LIMIT)?;
    }
    for url in ["warp:host:1", "tcp:", "tcp:host", "tcp:host:99999", ""] {
        let body = json!({"destination_url": url}).to_string();
        vmm.put_expect("vm.replicate", Some(&body), 400).context(url)?;
    }
    let body = json!({"destination_url": "tcp:h:1", "epoch_ms": 0}).to_string();
    let text = vmm.put_expect("vm.replicate", Some(&body), 400)?;
    assert!(text.contains("epoch_ms"), "{text}");
    vmm.put_expect("vm.stop-replication", None, 404)?;
    goes_on(&mut vmm, &mut serial)
}

/// The host dies between a guest's triple fault and its reset: what KVM leaves of that vCPU, which
/// on AMD looks alive, must not run on the backup, where the guest boots anew.
#[test]
fn a_triple_fault_that_was_not_answered_resets_the_guest_at_the_backup() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut setup = setup(2, PATIENT);
    setup.command_line = "workload=verify vcpus=2 tick_ms=20 ticks=30 end=triple".to_owned();
    setup.primary_environment.push(("UNDERSTUDY_TEST_BREAK".into(), "reset".into()));
    let mut pair = Pair::start(folder.path(), &setup)?;
    pair.wait_protected(LIMIT)?;
    pair.primary.wait("the triple fault", LIMIT, |vmm| {
        vmm.log().contains("had a triple fault").then_some(())
    })?;
    let sealed = pair.primary.replication()?.epoch_sealed;
    pair.primary.wait("an epoch with it", LIMIT, |vmm| {
        (vmm.replication().ok()?.epoch_committed > sealed).then_some(())
    })?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    pair.backup_serial.wait_line("the guest's first words", 0, LIMIT, |line| {
        line.starts_with("understudy-guest ")
    })?;
    let log = pair.backup.log();
    let first = log.find("had a triple fault");
    // Of its own second life, if it came to that; never of the vCPU that was dead before.
    assert!(first.is_none() || pair.backup_serial.text().contains("tick=30"), "{log}");
    Ok(())
}

/// The lock of its image would never change hands.
#[test]
fn a_vm_with_a_shared_disk_is_not_handed_over() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("shared.img");
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let mut setup = setup(1, PATIENT);
    setup.replicate_options.push_str(",disk_mode=shared");
    for arguments in [&mut setup.primary_arguments, &mut setup.backup_arguments] {
        arguments.extend(["--disk".to_owned(), format!("path={}", image.display())]);
    }
    let pair = scene::protected(folder.path(), &setup)?;
    let text = pair.primary.put_expect("vm.failover", Some("{}"), 409)?;
    assert!(text.contains("shared"), "{text}");
    pair.primary_serial.wait_more("verify ok", 2, LIMIT)?;
    Ok(())
}

/// Its backup would only find out when it has to start the VM.
#[test]
fn a_backup_with_a_smaller_image_is_found_out_while_the_primary_runs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut setup = setup(1, PATIENT);
    // All but the path is the primary's.
    let images = [("big", 2 << 20, ",readonly=on"), ("small", 1 << 20, "")];
    let sides = [&mut setup.primary_arguments, &mut setup.backup_arguments];
    for (arguments, (name, bytes, options)) in sides.into_iter().zip(images) {
        let image = folder.path().join(name);
        std::fs::File::create(&image)?.set_len(bytes)?;
        arguments.extend(["--disk".to_owned(), format!("path={}{options}", image.display())]);
    }
    let mut pair = Pair::start(folder.path(), &setup)?;
    let info = pair.primary.wait("an end of the first copy", LIMIT, |vmm| {
        let info = vmm.replication().ok()?;
        let is_under_way =
            matches!(info.state, ReplicationState::Disconnected | ReplicationState::Syncing);
        (!is_under_way).then_some(info)
    })?;
    ensure!(info.state != ReplicationState::Protected, "{info:?}");
    let why = (info.last_error, pair.backup.replication()?.last_error);
    ensure!(format!("{why:?}").contains("sectors"), "{why:?}");
    pair.primary_serial.wait_more("verify ok", 2, LIMIT)?;
    Ok(())
}
