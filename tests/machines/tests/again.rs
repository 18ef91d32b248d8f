//! A VM that lost its backup is protected again, by itself or by a person's word, and the second
//! failure finds it so.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use api::replication::{ReplicationInfo, ReplicationState, Role};
use api::response::VmState;
use serde_json::{Value, json};
use understudy_tests::equality::Equality;
use understudy_tests::link::Link;
use understudy_tests::pair::{Setup, free_port, start_backup, start_primary};
use understudy_tests::process::Vmm;
use understudy_tests::round::check_ticks;
use understudy_tests::scene::{LIMIT, records};
use understudy_tests::serial::Serial;

/// Peers that nobody freezes are not to be suspected, however busy the machine.
const PATIENT: &str = ",timeout_ms=20000";

fn setup() -> Setup {
    let mut setup = Setup::verify(2, "64M");
    for arguments in [&mut setup.primary_arguments, &mut setup.backup_arguments] {
        arguments.push("-v".to_owned());
    }
    setup.replicate_options = PATIENT.to_owned();
    setup.receive_options = PATIENT.to_owned();
    setup
}

fn somewhere() -> Result<String> {
    Ok(format!("tcp:127.0.0.1:{}", free_port()?))
}

/// A VM behind a link to its backup, protected; the guest has begun to verify.
struct Scene {
    link: Link,
    url: String,
    primary: Vmm,
    serial: Serial,
    backup: Vmm,
}

impl Scene {
    fn start(folder: &Path, setup: &Setup) -> Result<Self> {
        std::fs::create_dir(folder.join("arbiter"))?;
        let url = somewhere()?;
        let backup = start_backup(folder, "backup", &url, setup)?;
        let link = Link::to(&url)?;
        let mut primary = start_primary(folder, "primary", Some(&link.url()), setup)?;
        let serial = Serial::connect(&folder.join("primary.serial"), LIMIT)?;
        primary.wait_state(ReplicationState::Protected, LIMIT)?;
        serial.wait_more("verify ok", 3, LIMIT)?;
        Ok(Self { link, url, primary, serial, backup })
    }

    /// The primary is protected again, in this generation.
    fn again(&mut self, generation: u64) -> Result<ReplicationInfo> {
        let info = self.primary.wait("a protection anew", LIMIT, |vmm| {
            let info = vmm.replication().ok()?;
            (info.state == ReplicationState::Protected && info.generation == generation)
                .then_some(info)
        });
        let info = info.with_context(|| format!("The backup says:\n{}", self.backup.log()))?;
        ensure!(info.reconnect_attempts == 0, "{info:?}");
        Ok(info)
    }

    fn is_alone(&mut self) -> Result<()> {
        self.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
        self.serial.wait_more("verify ok", 2, LIMIT)?;
        Ok(())
    }
}

/// The primary is killed; the guest goes on at the backup with all its history.
fn goes_on_at(
    folder: &Path,
    name: &str,
    backup: &mut Vmm,
    mut primary: Vmm,
    before: &[&Serial],
) -> Result<()> {
    // A port without a client keeps nothing.
    let mut serial = Serial::connect(&folder.join(format!("{name}.serial")), LIMIT)?;
    primary.kill()?;
    before.last().context("nobody spoke")?.whole(LIMIT)?;
    backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    serial.wait_more("verify ok", 3, LIMIT)?;
    serial.verdict(LIMIT)?;
    let said: Vec<String> = before.iter().copied().chain([&serial]).map(Serial::text).collect();
    said.windows(2).try_for_each(|seam| check_ticks(&seam[0], &seam[1]))
}

#[test]
fn a_cut_link_is_healed_twice_and_the_backup_still_takes_over() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut scene = Scene::start(folder, &setup())?;
    for generation in [3, 5] {
        scene.link.cut();
        scene.is_alone()?;
        let tried = scene.primary.wait("an attempt in vain", LIMIT, |vmm| {
            vmm.replication().ok().filter(|info| info.reconnect_attempts >= 2)
        })?;
        ensure!(tried.last_error.is_some(), "{tried:?}");
        scene.link.heal();
        scene.again(generation)?;
        scene.serial.wait_more("verify ok", 3, LIMIT)?;
    }
    // Silent attempts, but for the first of a kind.
    let log = scene.primary.log();
    let told = log.lines().filter(|line| line.contains("still without a backup")).count();
    ensure!((1..=10).contains(&told), "{told} lines:\n{log}");
    check_ticks(&scene.serial.text(), "")?;
    let Scene { link: _link, primary, serial, mut backup, .. } = scene;
    goes_on_at(folder, "backup", &mut backup, primary, &[&serial])?;
    assert_eq!(records(&folder.join("arbiter"))?.len(), 6);
    Ok(())
}

#[test]
fn a_backup_that_was_killed_is_started_anew_and_found() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut scene = Scene::start(folder, &setup())?;
    for (name, generation) in [("second", 3), ("third", 5)] {
        scene.backup.kill()?;
        scene.is_alone()?;
        scene.backup = start_backup(folder, name, &scene.url, &setup())?;
        scene.again(generation)?;
        scene.serial.wait_more("verify ok", 3, LIMIT)?;
    }
    check_ticks(&scene.serial.text(), "")?;
    let Scene { link: _link, primary, serial, mut backup, .. } = scene;
    goes_on_at(folder, "third", &mut backup, primary, &[&serial])
}

#[test]
fn a_guest_that_must_not_run_alone_runs_with_the_next_backup() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut setup = setup();
    setup.replicate_options.push_str(",degrade=pause");
    let mut scene = Scene::start(folder, &setup)?;
    scene.backup.kill()?;
    scene.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    assert_eq!(scene.primary.vm_state()?, VmState::Paused);
    let before = scene.serial.settled()?;
    scene.backup = start_backup(folder, "second", &scene.url, &setup)?;
    scene.again(3)?;
    scene.primary.wait("the guest to run", LIMIT, |vmm| {
        (vmm.vm_state().ok()? == VmState::Running).then_some(())
    })?;
    scene.serial.wait_more("verify ok", 3, LIMIT)?;
    ensure!(scene.serial.lines().starts_with(&before));
    check_ticks(&scene.serial.text(), "")?;
    // A person's pause is not ended by a backup.
    scene.primary.put_expect("vm.pause", None, 204)?;
    scene.serial.settled()?;
    scene.backup.kill()?;
    scene.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
    scene.backup = start_backup(folder, "third", &scene.url, &setup)?;
    scene.again(5)?;
    let before = scene.serial.settled()?;
    assert_eq!(scene.primary.vm_state()?, VmState::Paused);
    assert_eq!(scene.serial.settled()?, before);
    scene.primary.put_expect("vm.resume", None, 204)?;
    scene.serial.wait_more("verify ok", 3, LIMIT)?;
    Ok(())
}

/// The body of a `vm.replicate` in the pair's arbiter directory.
fn replicate_body(folder: &Path, url: &str) -> String {
    json!({
        "destination_url": url,
        "arbiter": format!("file:{}", folder.join("arbiter").display()),
        "timeout_ms": 20000,
    })
    .to_string()
}

/// A fails over to B; B is protected by C, or by a new process where A was; B is killed.
fn thrice(back: bool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let Scene { link: _link, mut primary, serial, mut backup, .. } =
        Scene::start(folder, &setup())?;
    let second = Serial::connect(&folder.join("backup.serial"), LIMIT)?;
    primary.kill()?;
    serial.whole(LIMIT)?;
    backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    second.wait_more("verify ok", 3, LIMIT)?;
    // As it was called, with its sockets, where it is A that comes back.
    let name = if back { "primary" } else { "third" };
    let url = somewhere()?;
    let mut third = start_backup(folder, name, &url, &setup())?;
    backup.put_expect("vm.replicate", Some(&replicate_body(folder, &url)), 204)?;
    let info = backup.wait_state(ReplicationState::Protected, LIMIT)?;
    assert_eq!(info.generation, 3, "PAIR, SOLO, PAIR");
    second.wait_more("verify ok", 3, LIMIT)?;
    let all = records(&folder.join("arbiter"))?;
    let host = |record: &Value, part: &str| record["standing"]["pair"][part].clone();
    assert_eq!(host(&all[2], "primary"), host(&all[0], "backup"), "{all:?}");
    assert_ne!(host(&all[2], "backup"), host(&all[0], "primary"), "a process is a host");
    goes_on_at(folder, name, &mut third, backup, &[&serial, &second])
}

#[test]
fn a_vm_that_was_taken_over_goes_on_to_a_third_host() -> Result<()> {
    thrice(false)
}

#[test]
fn a_vm_that_was_taken_over_goes_back_to_where_it_was() -> Result<()> {
    thrice(true)
}

/// How slow a copy is that a test steps into. Some MiB that the guest has written take a minute.
const SLOW_BYTES_S: u64 = 128 << 10;

/// A copy anew that has begun and is far from done.
fn copying(folder: &Path) -> Result<Scene> {
    let mut setup = setup();
    setup.replicate_options.push_str(",compression=none");
    let mut scene = Scene::start(folder, &setup)?;
    scene.backup.kill()?;
    scene.is_alone()?;
    scene.link.limit(SLOW_BYTES_S);
    scene.backup = start_backup(folder, "second", &scene.url, &setup)?;
    scene.backup.wait_state(ReplicationState::Syncing, LIMIT)?;
    let before = scene.link.passed();
    scene.primary.wait("a part of the copy", LIMIT, |vmm| {
        let info = vmm.replication().ok()?;
        (info.state == ReplicationState::Syncing && scene.link.passed() > before + (32 << 10))
            .then_some(())
    })?;
    Ok(scene)
}

#[test]
fn a_backup_that_dies_in_the_copy_anew_costs_nothing_but_that() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut scene = copying(folder)?;
    scene.backup.kill()?;
    scene.is_alone()?;
    assert_eq!(records(&folder.join("arbiter"))?.len(), 2, "no pair");
    scene.link.limit(0);
    scene.backup = start_backup(folder, "third", &scene.url, &setup())?;
    scene.again(3)?;
    check_ticks(&scene.serial.text(), "")?;
    let Scene { link: _link, primary, serial, mut backup, .. } = scene;
    goes_on_at(folder, "third", &mut backup, primary, &[&serial])
}

#[test]
fn a_primary_that_dies_in_the_copy_anew_is_followed_by_nobody() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut scene = copying(folder)?;
    let speaks = Serial::connect(&folder.join("second.serial"), LIMIT)?;
    scene.primary.kill()?;
    scene.backup.wait_state(ReplicationState::Disconnected, LIMIT)?;
    let force = json!({"force": true}).to_string();
    let text = scene.backup.put_expect("vm.failover", Some(&force), 409)?;
    ensure!(text.contains("no committed replica"), "{text}");
    scene.backup.get_expect("vm.info", 404)?;
    ensure!(speaks.text().is_empty(), "half a copy speaks");
    assert_eq!(records(&folder.join("arbiter"))?.len(), 2);
    Ok(())
}

#[test]
fn a_vm_that_ends_while_its_backup_is_called_again_ends_in_order() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut scene = Scene::start(folder.path(), &setup())?;
    scene.backup.kill()?;
    scene.is_alone()?;
    let text = scene.primary.put_expect("vm.failover", Some("{}"), 409)?;
    ensure!(text.contains("Degraded"), "{text}");
    scene.primary.put_expect("vm.shutdown", None, 204)?;
    assert_eq!(scene.primary.vm_state()?, VmState::Created);
    let info = scene.primary.replication()?;
    assert_eq!(info.state, ReplicationState::Disconnected, "{info:?}");
    // Nothing of it gets in the way of the VM's next life.
    scene.primary.put_expect("vm.boot", None, 204)?;
    let serial = Serial::connect(&folder.path().join("primary.serial"), LIMIT)?;
    serial.wait_more("verify ok", 2, LIMIT)?;
    scene.primary.put_expect("vm.delete", None, 204)?;
    scene.primary.signal(libc::SIGTERM)?;
    assert_eq!(scene.primary.wait_exit(LIMIT)?.code(), Some(0), "{}", scene.primary.log());
    Ok(())
}

/// Copies anew after a cut of the link; the guest writes little meanwhile.
#[test]
fn after_a_short_cut_little_is_copied_and_the_memory_is_equal() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut setup = setup();
    // Memory that was all written once, and some pages that are written on and on.
    setup.command_line =
        "workload=verify+dirty vcpus=2 tick_ms=20 dirty_mib=48 dirty_fill=all dirty_set=64 \
         dirty_period_ms=20"
            .to_owned();
    setup.replicate_options.push_str(",compression=none");
    let equality = Equality::switch_on(folder, &mut setup)?;
    let mut scene = Scene::start(folder, &setup)?;
    // A guest that is still filling its memory writes more than a cut lets through.
    let filled = |line: &str| line.starts_with("dirty filled");
    scene.serial.wait_line("'dirty filled'", 0, LIMIT, filled)?;
    scene.serial.wait_more("verify ok", 3, LIMIT)?;
    let first = scene.link.passed();
    let compared = equality.compared()?.epochs;
    scene.link.cut();
    scene.is_alone()?;
    let before = scene.link.passed();
    scene.link.heal();
    let info = scene.again(3)?;
    let second = scene.link.passed() - before;
    println!("first copy and epochs {first} bytes, copy anew {second} bytes; {info:?}");
    scene.serial.wait_more("verify ok", 5, LIMIT)?;
    ensure!(second < first / 3, "{second} bytes anew, {first} at first");
    let log = scene.backup.log();
    ensure!(log.contains("is kept for its primary"), "{log}");
    let found = scene.primary.wait("epochs that are compared", LIMIT, |_| {
        equality.compared().ok().filter(|found| found.epochs > compared + 10)
    })?;
    ensure!(found.different == 0, "{found:?}");
    println!("{found:?}");
    let Scene { link: _link, primary, serial, mut backup, .. } = scene;
    goes_on_at(folder, "backup", &mut backup, primary, &[&serial])
}

fn plays(vmm: &mut Vmm, role: Role, generation: u64) -> Result<()> {
    vmm.wait(&format!("the role {role:?} in generation {generation}"), LIMIT, |vmm| {
        let info = vmm.replication().ok()?;
        let is_there = info.role == role
            && info.state == ReplicationState::Protected
            && info.generation == generation;
        is_there.then_some(())
    })
}

/// What the arbiter keeps, in its order: of a pair or of one host alone.
fn standings(folder: &Path) -> Result<Vec<String>> {
    let kinds = records(&folder.join("arbiter"))?.into_iter().map(|record| {
        let standing = record["standing"].as_object().context("a standing")?;
        standing.keys().next().cloned().context("a kind")
    });
    kinds.collect()
}

/// There and back again, without a moment in which the record says that one host is alone; and then
/// the failure that all of it is for.
#[test]
fn a_planned_switch_over_reverses_the_roles() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::create_dir(folder.join("arbiter"))?;
    let (to_b, to_a) = (somewhere()?, somewhere()?);
    let mut setup = setup();
    // Memory that either host keeps is compared whole with the other's at each epoch.
    let equality = Equality::switch_on(folder, &mut setup)?;
    let mut b = start_backup(folder, "backup", &to_b, &setup)?;
    setup.replicate_options.push_str(&format!(",return_url={to_a}"));
    let mut a = start_primary(folder, "primary", Some(&to_b), &setup)?;
    let mut serials = vec![Serial::connect(&folder.join("primary.serial"), LIMIT)?];
    plays(&mut a, Role::Primary, 1)?;
    serials[0].wait_more("verify ok", 3, LIMIT)?;
    for generation in [2, 3] {
        let compared = equality.compared()?.epochs;
        serials.push(Serial::connect(&folder.join(format!("{}.serial", b.name())), LIMIT)?);
        let since = Instant::now();
        a.put_expect("vm.failover", Some("{}"), 204)?;
        let moved = since.elapsed();
        let said = serials.last().context("there is one")?;
        said.wait_more("", 1, LIMIT)?;
        let silent = since.elapsed();
        plays(&mut b, Role::Primary, generation)?;
        plays(&mut a, Role::Backup, generation)?;
        println!(
            "moved after {} ms, heard again after {} ms at most; unprotected: never by the record",
            moved.as_millis(),
            silent.as_millis()
        );
        std::mem::swap(&mut a, &mut b);
        said.wait_more("verify ok", 3, LIMIT)?;
        a.wait("epochs that are compared with what was kept", LIMIT, |_| {
            equality.compared().ok().filter(|found| found.epochs > compared + 10)
        })?;
    }
    let found = equality.compared()?;
    ensure!(found.different == 0, "{found:?}");
    assert_eq!(standings(folder)?, ["pair"; 3]);
    let said: Vec<String> = serials.iter().map(Serial::text).collect();
    said.windows(2).try_for_each(|seam| check_ticks(&seam[0], &seam[1]))?;
    let before: Vec<&Serial> = serials.iter().collect();
    goes_on_at(folder, "backup", &mut b, a, &before)
}

/// The new host is lost while the old one is told of nothing yet, or of nothing but that it runs: the VM goes
/// on at the old one, from the last epoch, and nobody has heard what was done in between.
#[test]
fn a_new_host_that_is_lost_at_once_is_followed_by_the_old_one() -> Result<()> {
    for point in ["swapped", "start", "started"] {
        let folder = tempfile::tempdir()?;
        let folder = folder.path();
        std::fs::create_dir(folder.join("arbiter"))?;
        let (to_b, to_a) = (somewhere()?, somewhere()?);
        let mut setup = setup();
        setup.replicate_options = ",timeout_ms=2000".to_owned();
        setup.receive_options = ",timeout_ms=2000".to_owned();
        let mut b = {
            let mut setup = setup.clone();
            let file = folder.join("fault");
            std::fs::write(&file, "")?;
            let fault = format!("{point}:kill:{}", file.display());
            setup.backup_environment.push(("UNDERSTUDY_TEST_FAULT".into(), fault));
            start_backup(folder, "backup", &to_b, &setup)?
        };
        setup.replicate_options.push_str(&format!(",return_url={to_a}"));
        let mut a = start_primary(folder, "primary", Some(&to_b), &setup)?;
        let first = Serial::connect(&folder.join("primary.serial"), LIMIT)?;
        plays(&mut a, Role::Primary, 1)?;
        first.wait_more("verify ok", 3, LIMIT)?;
        let nothing = Serial::connect(&folder.join("backup.serial"), LIMIT)?;
        // Whoever asked is told of the loss, or of the end: A asks the arbiter in between.
        a.put("vm.failover", Some("{}"))?;
        b.wait_exit(LIMIT)?;
        // With ports of its own, which the VM that was here has left.
        plays(&mut a, Role::Backup, 2)?;
        let second = Serial::connect(&folder.join("primary.serial"), LIMIT)?;
        a.wait_state(ReplicationState::TakenOver, LIMIT)?;
        second.wait_more("verify ok", 3, LIMIT)?;
        ensure!(nothing.text().is_empty(), "B spoke before A had acknowledged: {}", nothing.text());
        check_ticks(&first.text(), &second.text())?;
        assert_eq!(standings(folder)?, ["pair", "pair", "solo"], "{point}");
    }
    Ok(())
}
