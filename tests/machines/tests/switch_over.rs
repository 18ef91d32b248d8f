//! Planned switch-overs in which more happens than the hand-over.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::client::{Client, Method};
use api::replication::{ReplicationState, Role};
use understudy_tests::pair::{Setup, free_port, start_backup, start_primary};
use understudy_tests::process::Vmm;
use understudy_tests::scene::{LIMIT, records};
use understudy_tests::serial::Serial;

/// Peers that nobody freezes are not to be suspected, however busy the machine.
const PATIENT: &str = ",timeout_ms=20000";
const FAILOVER: &str = "{}";

/// A protected VM whose hosts may stand at a point of the protocol.
struct Scene<'f> {
    folder: &'f Path,
    a: Vmm,
    b: Vmm,
    serial: Serial,
    /// Where A is to listen once B has the VM.
    return_port: u16,
}

/// The point's file of a side, as `UNDERSTUDY_TEST_FAULT` takes it.
fn fault(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.fault"))
}

fn setup() -> Setup {
    let mut setup = Setup::verify(1, "64M");
    for arguments in [&mut setup.primary_arguments, &mut setup.backup_arguments] {
        arguments.push("-v".to_owned());
    }
    setup.replicate_options = PATIENT.to_owned();
    setup.receive_options = PATIENT.to_owned();
    setup
}

impl<'f> Scene<'f> {
    /// A pair that a switch-over reverses; A may wait at `at_a`, B at `at_b`.
    fn start(folder: &'f Path, mut setup: Setup, at_a: &str, at_b: &str) -> Result<Self> {
        std::fs::create_dir(folder.join("arbiter"))?;
        let (to_b, return_port) = (free_port()?, free_port()?);
        let to_b = format!("tcp:127.0.0.1:{to_b}");
        let back = format!(",return_url=tcp:127.0.0.1:{return_port}");
        setup.replicate_options.push_str(&back);
        let wait = |name, point| {
            let file = fault(folder, name);
            ("UNDERSTUDY_TEST_FAULT".to_owned(), format!("{point}:wait:{}", file.display()))
        };
        setup.primary_environment.push(wait("a", at_a));
        setup.backup_environment.push(wait("b", at_b));
        let mut b = start_backup(folder, "b", &to_b, &setup)?;
        let mut a = start_primary(folder, "a", Some(&to_b), &setup)?;
        let serial = Serial::connect(&folder.join("a.serial"), LIMIT)?;
        plays(&mut a, Role::Primary, 1)?;
        plays(&mut b, Role::Backup, 1)?;
        serial.wait_more("verify ok", 2, LIMIT)?;
        Ok(Self { folder, a, b, serial, return_port })
    }

    fn arm(&self, name: &str) -> Result<()> {
        File::create(fault(self.folder, name)).context("Cannot arm a fault")?;
        Ok(())
    }

    fn reached(&self, name: &str) -> PathBuf {
        fault(self.folder, name).with_extension("fault.reached")
    }

    fn wait_reached(&self, name: &str) -> Result<()> {
        let (file, since) = (self.reached(name), Instant::now());
        while !file.exists() {
            ensure!(since.elapsed() < LIMIT, "{name} does not get to its point\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn go_on(&self, name: &str) -> Result<()> {
        std::fs::remove_file(self.reached(name)).context("Nobody waits at a point")
    }

    fn logs(&self) -> String {
        format!("A says:\n{}\nB says:\n{}", self.a.log(), self.b.log())
    }

    fn ask_failover(&self) -> JoinHandle<bool> {
        let socket = self.a.socket().to_owned();
        std::thread::spawn(move || {
            let asked = Client::connect(&socket)
                .and_then(|mut client| client.exchange(Method::Put, "vm.failover", Some(FAILOVER)));
            asked.is_ok_and(|answer| answer.is_success())
        })
    }
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

fn wait_boot(serial: &Serial, mark: usize) -> Result<()> {
    serial.wait_line("the guest's first line", mark, LIMIT, |line| line.starts_with("ready"))?;
    Ok(())
}

/// The guest writes its reset register just before the last epoch is sealed: the wish is in that epoch's
/// state, so the new host fulfils it. The old one's thread, which waited for the machine, hears that it is
/// gone before the control loop hears that the VM was handed over, or long after; either way this host is
/// the VM's backup then, and resets the guest when it has it again.
fn resets_as_it_is_handed_over(is_late: bool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut setup = setup();
    setup.command_line.push_str(" end=reset");
    let mut scene = Scene::start(folder.path(), setup, "reset", "claim")?;
    let said_by_b = Serial::connect(&folder.path().join("b.serial"), LIMIT)?;
    scene.arm("a")?;
    scene.arm("b")?;
    scene.serial.verdict(LIMIT)?;
    scene.wait_reached("a")?;
    let asked = scene.ask_failover();
    scene.wait_reached("b")?;
    if !is_late {
        scene.go_on("a")?;
        // It is at the machine's door by then, or comes to it a little later: both are to end well.
        std::thread::sleep(Duration::from_millis(50));
    }
    scene.go_on("b")?;
    ensure!(asked.join().unwrap_or_default(), "{}", scene.logs());
    plays(&mut scene.b, Role::Primary, 2)?;
    plays(&mut scene.a, Role::Backup, 2)?;
    if is_late {
        scene.go_on("a")?;
    }
    wait_boot(&said_by_b, 0)?;
    said_by_b.wait_more("verify ok", 2, LIMIT)?;
    // And back, where a guest that resets is reset.
    let mut back = Serial::connect(&folder.path().join("a.serial"), LIMIT)?;
    scene.b.put_expect("vm.failover", Some(FAILOVER), 204)?;
    plays(&mut scene.a, Role::Primary, 3)?;
    plays(&mut scene.b, Role::Backup, 3)?;
    back.wait_more("verify ok", 2, LIMIT)?;
    let mark = back.mark();
    scene.a.put_expect("vm.reboot", None, 204)?;
    wait_boot(&back, mark)?;
    let mark = back.mark();
    back.wait_after(mark, "verify ok", 2, LIMIT)?;
    back.verdict(LIMIT)?;
    wait_boot(&back, mark)
}

#[test]
fn a_guest_that_resets_as_it_is_handed_over_is_reset_where_it_goes() -> Result<()> {
    resets_as_it_is_handed_over(false)
}

#[test]
fn a_reset_that_comes_to_a_vm_that_was_handed_over_is_none_of_this_host_s() -> Result<()> {
    resets_as_it_is_handed_over(true)
}

/// A record that named a backup which is none would say that the VM is protected. That A cannot listen is
/// known before the last epoch is sealed, and said.
#[test]
fn a_host_that_cannot_be_the_backup_is_not_made_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut scene = Scene::start(folder.path(), setup(), "reset", "reset")?;
    let said_by_b = Serial::connect(&folder.path().join("b.serial"), LIMIT)?;
    let _taken = TcpListener::bind(("127.0.0.1", scene.return_port))?;
    scene.a.put_expect("vm.failover", Some(FAILOVER), 204)?;
    scene.b.wait_state(ReplicationState::Degraded, LIMIT)?;
    said_by_b.wait_more("verify ok", 2, LIMIT)?;
    let pairs = records(&folder.path().join("arbiter"))?
        .into_iter()
        .filter(|record| record["standing"].get("pair").is_some())
        .count();
    ensure!(pairs == 1, "{pairs} records name a pair");
    let why = "the VM is unprotected where it goes, this host cannot be its backup";
    ensure!(scene.a.log().contains(why), "{}", scene.logs());
    Ok(())
}
