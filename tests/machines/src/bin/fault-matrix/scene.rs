//! A pair at work with its clients, and what a row does to it and asks of it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::client::{Client as Api, Method};
use api::replication::{ReplicateData, ReplicationInfo, ReplicationState};
use api::response::VmState;
use understudy_tests::kv::client::Client;
use understudy_tests::kv::crowd::{self, Crowd, Seen};
use understudy_tests::kv::history::{Operation, Sequence};
use understudy_tests::kv::round::{self, Disk};
use understudy_tests::network::SERVER;
use understudy_tests::pair::{self, Setup};
use understudy_tests::process::{POLL, Vmm};
use understudy_tests::serial::Serial;

use crate::arbiter::{Arbiter, Kind};
use crate::clock;
use crate::failing::{self, Call};
use crate::row::{End, Kept, Prepared};
use crate::world::{Host, Place, World};

/// Longest wait for anything in a row; a machine under load is slow, a broken one for ever.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Silence after which a peer is suspected.
pub const TIMEOUT: Duration = Duration::from_secs(2);
/// Answers to each client that show that somebody goes on.
const ANSWERS: u64 = 10;
/// How long nobody may say a word for it to count as held: longer than the arbiter is left in peace.
const HELD: Duration = Duration::from_millis(1500);
/// How long nothing new may come of what has come to rest.
const SETTLED: Duration = Duration::from_millis(150);
/// A VM of a vCPU is enough to be lost, and quickly copied.
const MEMORY: &str = "64M";
/// Where the backup listens, and where the old primary does after a switch-over.
const PORT: u16 = 4400;
const RETURN_PORT: u16 = 4401;
/// The process on A's host that takes the place of A.
const RETURNED_A: &str = "a2";

/// A pair and its surroundings. A begins as the primary, B as the backup.
pub struct Scene {
    pub folder: PathBuf,
    pub world: World,
    pub arbiter: Arbiter,
    pub a: Vmm,
    pub b: Vmm,
    pub serial: Serial,
    setup: Setup,
    url: String,
    clients: u32,
    /// Processes that were B.
    backups: u32,
    crowd: Option<Crowd>,
    /// What clients saw that have gone home.
    before: Vec<Operation>,
    blow: Option<Instant>,
    silence_limit: Duration,
    is_shared: bool,
    /// Dropped last, with what the processes still use.
    _kept: Kept,
}

impl Scene {
    /// Starts all of them; with `prepared.is_protected` the pair is one, and the clients at work.
    pub fn start(folder: &Path, kind: Kind, prepared: &Prepared, clients: u32) -> Result<Self> {
        let disk = match prepared {
            Prepared { reverses: true, .. } => Disk::None,
            Prepared { is_shared: true, .. } => Disk::Shared,
            _ => Disk::Replicated,
        };
        let mut setup = round::setup(folder, 1, MEMORY, disk)?;
        let kept = prepared.images.map_or(Ok(vec![]), |prepare| prepare(folder))?;
        let world = World::new()?;
        if prepared.reverses || prepared.recalls {
            let back = format!(",return_url=tcp:{}:{RETURN_PORT}", world.a.address);
            setup.replicate_options.push_str(&back);
        }
        if prepared.has_tls {
            let options = certificates(folder, &[world.a.address, world.b.address])?;
            setup.replicate_options.push_str(&options);
            setup.receive_options.push_str(&options);
        }
        let arbiter = Arbiter::new(kind, folder, &world)?;
        let setup = complete(setup, folder, &arbiter, prepared)?;
        if prepared.has_clocks {
            clock::prepare(folder)?;
        }
        let url = format!("tcp:{}:{PORT}", world.b.address);
        let b =
            start(folder, "b", &pair::backup_arguments(folder, "b", &url, &setup), &setup, &world)?;
        let target = prepared.is_protected.then_some(url.as_str());
        let arguments = pair::primary_arguments(folder, "a", target, &setup);
        let a = start(folder, "a", &arguments, &setup, &world)?;
        let serial = Serial::connect(&folder.join("a.serial"), LIMIT)?;
        let folder = folder.to_owned();
        let mut scene = Self {
            folder,
            world,
            arbiter,
            a,
            b,
            serial,
            setup,
            url,
            clients,
            backups: 1,
            crowd: None,
            before: vec![],
            blow: None,
            silence_limit: prepared.silence_limit,
            is_shared: prepared.is_shared,
            _kept: kept,
        };
        if prepared.is_protected {
            scene.wait_protected()?;
        }
        round::wait_ready(&scene.serial)?;
        scene.gather(&Arc::default(), 0)?;
        Ok(scene)
    }

    /// The guest's server listens again, of a guest that was reset after a mark of its serial port.
    pub fn wait_ready_again(&self, mark: usize) -> Result<()> {
        self.wait_said(mark, "KV READY")
    }

    /// The guest says so on its serial port, after a mark of that.
    pub fn wait_said(&self, mark: usize, words: &str) -> Result<()> {
        let is_said = |line: &str| line.contains(words);
        self.serial.wait_line(&format!("'{words}'"), mark, LIMIT, is_said).map(drop)
    }

    /// Sets the clients to work, and lets them for a while.
    fn gather(&mut self, sequence: &Arc<Sequence>, first: u32) -> Result<()> {
        let (clients, silence_limit) = (self.clients, self.silence_limit);
        let plan = crowd::Plan { clients, address: SERVER, silence_limit, seed: 7 };
        let crowd = Crowd::start_in(&plan, Some(&self.world.clients), sequence, first)?;
        crowd.wait_answers(3 * ANSWERS, LIMIT)?;
        self.crowd = Some(crowd);
        Ok(())
    }

    /// Others take the place of the clients, in the same history: of a row in which those may have
    /// been told of an error, or lost their connection.
    pub fn gather_anew(&mut self) -> Result<()> {
        let crowd = self.take_crowd()?;
        self.gather(&crowd.sequence(), self.clients)?;
        let Seen { clients, operations, .. } = crowd.finish();
        self.before.extend(operations);
        self.before.extend(clients.into_iter().flat_map(Client::into_operations));
        Ok(())
    }

    /// What clients saw that were replaced.
    pub fn take_before(&mut self) -> Vec<Operation> {
        std::mem::take(&mut self.before)
    }

    /// Waits until a client was told of an error.
    pub fn wait_refused(&self) -> Result<()> {
        let start = Instant::now();
        while !self.crowd()?.has_failed() {
            ensure!(start.elapsed() < LIMIT, "no client was told of an error");
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// From here on clients may be without service.
    pub fn blow(&mut self) {
        self.blow = Some(Instant::now());
    }

    pub fn blow_at(&self) -> Option<Instant> {
        self.blow
    }

    fn crowd(&self) -> Result<&Crowd> {
        self.crowd.as_ref().context("the clients have gone home")
    }

    pub fn take_crowd(&mut self) -> Result<Crowd> {
        self.crowd.take().context("the clients have gone home")
    }

    pub fn vmm(&mut self, place: Place) -> &mut Vmm {
        match place {
            Place::A => &mut self.a,
            Place::B | Place::Arbiter => &mut self.b,
        }
    }

    pub fn host(&self, place: Place) -> &Host {
        match place {
            Place::A => &self.world.a,
            Place::B | Place::Arbiter => &self.world.b,
        }
    }

    /// The image that a side's VM writes.
    pub fn image(&self, place: Place) -> PathBuf {
        self.folder.join(match place {
            _ if self.is_shared => "shared.img",
            Place::A => "primary.img",
            _ => "backup.img",
        })
    }

    // --- what is done ------------------------------------------------------------------------

    /// Begins the first copy of a VM that has run alone so far; whether it has begun. What becomes of it
    /// is seen later, and there may be no answer.
    pub fn protect(&self) -> Result<bool> {
        let answer = self.a.put("vm.replicate", Some(&self.replicate(&self.url)?));
        Ok(answer.is_ok_and(|answer| answer.is_success()))
    }

    /// The same on a thread of its own: A may stand still before it answers.
    pub fn ask_protect(&self) -> Result<JoinHandle<bool>> {
        Ok(self.ask("vm.replicate", Some(self.replicate(&self.url)?)))
    }

    fn replicate(&self, url: &str) -> Result<String> {
        let options = pair::replicate_options(&self.folder, url, &self.setup);
        let data: ReplicateData =
            options.parse().map_err(|error| anyhow::anyhow!("{options}: {error}"))?;
        Ok(serde_json::to_string(&data)?)
    }

    /// Another process in the place of B, which has ended.
    pub fn restart_b(&mut self) -> Result<()> {
        // A name of its own: the one that is dropped takes its socket with it.
        self.backups += 1;
        let name = format!("b{}", self.backups);
        let arguments = pair::backup_arguments(&self.folder, &name, &self.url, &self.setup);
        self.b = start(&self.folder, &name, &arguments, &self.setup, &self.world)?;
        Ok(())
    }

    /// A backup on A's host, in the place of an A that has ended, on A's tap and image.
    pub fn return_a(&mut self) -> Result<()> {
        let mut setup = self.setup.clone();
        setup.backup_environment.clone_from(&self.setup.primary_environment);
        let image = self.image(Place::A).display().to_string();
        let events = events_file(&self.folder, Place::A);
        setup.backup_arguments = vec![
            "--net".into(),
            format!("tap={}", self.world.a.tap),
            "--disk".into(),
            format!("path={image}"),
            "--event-monitor".into(),
            format!("path={}", events.display()),
            "-v".into(),
        ];
        let arguments =
            pair::backup_arguments(&self.folder, RETURNED_A, &self.return_url(), &setup);
        self.a = start(&self.folder, RETURNED_A, &arguments, &setup, &self.world)?;
        Ok(())
    }

    fn return_url(&self) -> String {
        format!("tcp:{}:{PORT}", self.world.a.address)
    }

    /// Begins the first copy of the VM that B took over, to A's host; whether it has begun.
    pub fn protect_b(&self) -> Result<bool> {
        let answer = self.b.put("vm.replicate", Some(&self.replicate(&self.return_url())?));
        Ok(answer.is_ok_and(|answer| answer.is_success()))
    }

    /// Asks A to hand over, on a thread of its own: A may not live to answer.
    pub fn ask_failover(&self) -> JoinHandle<bool> {
        self.ask("vm.failover", Some(r#"{"force":false}"#.to_owned()))
    }

    /// Asks A for something, on a thread of its own; whether it is answered as done.
    pub fn ask(&self, name: &'static str, body: Option<String>) -> JoinHandle<bool> {
        let socket = self.a.socket().to_owned();
        std::thread::spawn(move || {
            let asked = Api::connect(&socket);
            let answer =
                asked.and_then(|mut client| client.exchange(Method::Put, name, body.as_deref()));
            answer.is_ok_and(|answer| answer.is_success())
        })
    }

    /// From here on the fault that a side was started with comes at its point.
    pub fn arm(&self, place: Place) -> Result<()> {
        File::create(fault_file(&self.folder, place)).context("Cannot arm a fault")?;
        Ok(())
    }

    fn reached_file(&self, place: Place) -> PathBuf {
        fault_file(&self.folder, place).with_extension("reached")
    }

    /// Waits until the fault has come about.
    pub fn wait_reached(&self, place: Place) -> Result<()> {
        let (file, start) = (self.reached_file(place), Instant::now());
        while !file.exists() {
            ensure!(start.elapsed() < LIMIT, "{place:?} does not get to the point of its fault");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Lets whoever waits at its point go on.
    pub fn go_on(&self, place: Place) -> Result<()> {
        std::fs::remove_file(self.reached_file(place)).context("Nobody waits at a point")
    }

    /// Waits until a fault has killed its process.
    pub fn wait_killed(&mut self, place: Place) -> Result<()> {
        self.wait_reached(place)?;
        self.vmm(place).wait_exit(LIMIT).map(|_| ())
    }

    /// From here on a call fails with EIO in a side's process, of a row that has such.
    pub fn fail(&self, place: Place, call: Call) -> Result<()> {
        failing::begin(&self.folder, place, call, libc::EIO)
    }

    /// From here on it works again.
    pub fn mend(&self, place: Place, call: Call) -> Result<()> {
        failing::end(&self.folder, place, call)
    }

    /// Sets a side's wall clock, in a row that has such.
    pub fn turn_clock(&self, place: Place, to: &str) -> Result<()> {
        clock::turn(&self.folder, place, to)
    }

    /// Whether a side has seen its clock turned: its log has lines of that year.
    pub fn shows_year(&mut self, place: Place, year: u32) -> Result<()> {
        let log = self.vmm(place).log();
        let is_of_year = |line: &str| line.starts_with(&format!("{year}-"));
        ensure!(log.lines().any(is_of_year), "{place:?} has no line of {year}:\n{log}");
        Ok(())
    }

    // --- what is asked -----------------------------------------------------------------------

    pub fn wait_protected(&mut self) -> Result<()> {
        let synced = self.a.wait_state(ReplicationState::Protected, LIMIT);
        synced.with_context(|| format!("B says:\n{}", self.b.log()))?;
        self.b.wait_state(ReplicationState::Protected, LIMIT)?;
        Ok(())
    }

    /// A goes on without a backup.
    pub fn wait_a_alone(&mut self) -> Result<ReplicationInfo> {
        self.a.wait("A to go on alone", LIMIT, |vmm| {
            let info = vmm.replication().ok()?;
            matches!(info.state, ReplicationState::Degraded | ReplicationState::Stopped)
                .then_some(info)
        })
    }

    /// A runs, and the protection that was asked for is over, or was refused at once.
    pub fn wait_a_unprotected(&mut self, is_begun: bool) -> Result<()> {
        if is_begun { self.wait_a_alone().map(drop) } else { Ok(()) }
    }

    /// What is sealed is committed, and nothing new comes: of a VM that is paused.
    pub fn wait_committed(&mut self) -> Result<()> {
        let mut last = None;
        self.a.wait("the last epoch to be committed", LIMIT, |vmm| {
            std::thread::sleep(SETTLED);
            let info = vmm.replication().ok()?;
            let epochs = (info.epoch_sealed, info.epoch_committed);
            let is_over = epochs.0 == epochs.1 && last.replace(epochs) == Some(epochs);
            is_over.then_some(())
        })
    }

    /// Whether a pair still is one, or who goes on, once each side has had the time to suspect the
    /// other.
    pub fn wait_settled(&mut self) -> Result<End> {
        self.wait_served()?;
        std::thread::sleep(TIMEOUT);
        self.wait_served()?;
        use ReplicationState::{Degraded, Protected, TakenOver};
        let start = Instant::now();
        loop {
            let state = |vmm: &Vmm| vmm.replication().map(|info| info.state).unwrap_or_default();
            match (state(&self.a), state(&self.b)) {
                (Protected, Protected) => return Ok(End::Pair),
                (Degraded, _) => return Ok(End::A),
                (_, TakenOver) => return Ok(End::B),
                (a, b) if start.elapsed() > LIMIT => bail!("A is {a:?}, B is {b:?}"),
                _ => std::thread::sleep(POLL),
            }
        }
    }

    pub fn wait_b_took_over(&mut self) -> Result<()> {
        self.b.wait_state(ReplicationState::TakenOver, LIMIT).map(|_| ())
    }

    /// A side runs the VM, and the other one protects it.
    pub fn wait_reversed(&mut self) -> Result<()> {
        self.b.wait("B to be protected by A", LIMIT, |vmm| {
            let info = vmm.replication().ok()?;
            let is_primary = info.role == api::replication::Role::Primary;
            (is_primary && info.state == ReplicationState::Protected).then_some(())
        })?;
        self.a.wait_state(ReplicationState::Protected, LIMIT).map(|_| ())
    }

    /// B, as the primary of a VM that was handed over, goes on without its backup.
    pub fn wait_b_alone(&mut self) -> Result<()> {
        self.b.wait_state(ReplicationState::Degraded, LIMIT).map(|_| ())
    }

    /// B is without a backup, and the protection that was asked for is over, or was refused at once.
    pub fn wait_b_unprotected(&mut self, is_begun: bool) -> Result<()> {
        if !is_begun {
            return Ok(());
        }
        use ReplicationState::{Degraded, Stopped, TakenOver};
        self.b.wait("B to be without a backup", LIMIT, |vmm| {
            let state = vmm.replication().ok()?.state;
            matches!(state, Degraded | Stopped | TakenOver).then_some(())
        })
    }

    /// A goes on alone, and B, which lives, knows that its session is over. By its events too, as A calls it at
    /// once, and its state is that of the next session then.
    pub fn wait_b_without_primary(&mut self) -> Result<()> {
        let events = events_file(&self.folder, Place::B);
        self.b.wait("B to be without its primary", LIMIT, |vmm| {
            let is_over = vmm.replication().ok()?.state == ReplicationState::Disconnected;
            (is_over || shows(&events, "replication-lost")).then_some(())
        })
    }

    /// Who of two that live has won.
    pub fn wait_winner(&mut self) -> Result<Place> {
        let start = Instant::now();
        loop {
            let state = |vmm: &Vmm| vmm.replication().map(|info| info.state).unwrap_or_default();
            match (state(&self.a), state(&self.b)) {
                (ReplicationState::Degraded, _) => return Ok(Place::A),
                (_, ReplicationState::TakenOver) => return Ok(Place::B),
                (a, b) if start.elapsed() > LIMIT => {
                    bail!(
                        "nobody has won: A is {a:?}, B is {b:?}\n{}\n{}",
                        self.a.log(),
                        self.b.log()
                    )
                }
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The clients are served.
    pub fn wait_served(&self) -> Result<()> {
        self.crowd()?.wait_answers(ANSWERS, LIMIT)
    }

    /// Waits until a side that lives says that it holds.
    pub fn wait_holds(&mut self, place: Place) -> Result<()> {
        use ReplicationState::{Suspended, TakingOver};
        self.vmm(place).wait("it to hold", LIMIT, |vmm| {
            let state = vmm.replication().ok()?.state;
            matches!(state, Suspended | TakingOver).then_some(())
        })
    }

    /// Nobody says a word to the world: no client is answered, no frame leaves, for a while.
    pub fn is_held(&self) -> Result<()> {
        let count = || -> Result<_> {
            Ok((self.crowd()?.answered(), self.world.a.frames()?, self.world.b.frames()?))
        };
        let before = count()?;
        std::thread::sleep(HELD);
        let after = count()?;
        ensure!(
            before == after,
            "held, and yet (answers, frames) went from {before:?} to {after:?}"
        );
        Ok(())
    }

    /// No client is answered for a while, though a VM that was taken over is announced to the network.
    pub fn is_unanswered(&self) -> Result<()> {
        let before = self.crowd()?.answered();
        std::thread::sleep(HELD);
        let after = self.crowd()?.answered();
        ensure!(before == after, "held, and yet {} answers came", after - before);
        Ok(())
    }

    /// A side that lost, or never had it, has no VM that could run.
    pub fn wait_without_vm(&mut self, place: Place) -> Result<()> {
        if !self.vmm(place).is_alive() {
            return Ok(());
        }
        self.vmm(place).wait("its VM to be gone", LIMIT, |vmm| {
            let answer = vmm.get("vm.info").ok()?;
            let is_gone = answer.status == 404 || vmm.vm_state().ok()? == VmState::Created;
            is_gone.then_some(())
        })
    }

    /// What a side's event monitor shows so far.
    pub fn has_event(&self, place: Place, name: &str) -> bool {
        shows(&events_file(&self.folder, place), name)
    }

    /// One of these events is shown, which is written aside of what it tells of.
    pub fn wait_event(&mut self, place: Place, names: &[&str]) -> Result<()> {
        let file = events_file(&self.folder, place);
        let what = format!("the event {}", names.join(" or "));
        let is_shown = || names.iter().any(|name| shows(&file, name));
        self.vmm(place).wait(&what, LIMIT, |_| is_shown().then_some(()))
    }
}

fn shows(events: &Path, name: &str) -> bool {
    std::fs::read_to_string(events).is_ok_and(|text| text.contains(&format!("\"{name}\"")))
}

/// Makes certificates for hosts with these addresses; the option that names them.
fn certificates(folder: &Path, addresses: &[&str]) -> Result<String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/make-certificates.sh");
    let directory = folder.join("tls");
    let made =
        std::process::Command::new("bash").arg(script).arg(&directory).args(addresses).output();
    let made = made.context("Cannot run bash")?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(format!(",tls_dir={}", directory.display()))
}

fn fault_file(folder: &Path, place: Place) -> PathBuf {
    folder.join(if place == Place::A { "fault-a" } else { "fault-b" })
}

fn events_file(folder: &Path, place: Place) -> PathBuf {
    folder.join(if place == Place::A { "a.events" } else { "b.events" })
}

/// The setup with what a row has of its own.
fn complete(
    mut setup: Setup,
    folder: &Path,
    arbiter: &Arbiter,
    prepared: &Prepared,
) -> Result<Setup> {
    let timeout_ms = TIMEOUT.as_millis();
    let both = format!(",timeout_ms={timeout_ms},heartbeat_ms=100");
    setup.arbiter_url = arbiter.url();
    setup.arbiter = false;
    setup.replicate_options.push_str(&both);
    setup.replicate_options.push_str(prepared.options);
    setup.receive_options.push_str(&both);
    setup.receive_options.push_str(prepared.receive);
    let sides = [
        (Place::A, &mut setup.primary_arguments, &mut setup.primary_environment),
        (Place::B, &mut setup.backup_arguments, &mut setup.backup_environment),
    ];
    for (place, arguments, environment) in sides {
        let events = events_file(folder, place);
        arguments.extend(["--event-monitor".into(), format!("path={}", events.display())]);
        arguments.push("-v".into());
        if prepared.has_failures {
            environment.extend(failing::environment(folder, place)?);
        }
        if prepared.has_clocks {
            environment.extend(clock::environment(folder, place));
        }
        for fault in prepared.faults.iter().filter(|fault| fault.place == place) {
            let file = fault_file(folder, place);
            let value = format!("{}:{}:{}", fault.point, fault.action.word(), file.display());
            environment.push(("UNDERSTUDY_TEST_FAULT".into(), value));
        }
    }
    Ok(setup)
}

fn start(
    folder: &Path,
    name: &str,
    arguments: &[String],
    setup: &Setup,
    world: &World,
) -> Result<Vmm> {
    let (host, environment) = match name {
        "a" => (&world.a, &setup.primary_environment),
        RETURNED_A => (&world.a, &setup.backup_environment),
        _ => (&world.b, &setup.backup_environment),
    };
    Vmm::start_in(folder, name, arguments, environment, &host.namespaces())
}
