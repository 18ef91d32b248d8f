//! One round: a pair serves a crowd, one of the two is struck, and everything is held against what
//! the clients saw.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::replication::{ReplicationState, TakeoverTimes};

use super::client::Client;
use super::crowd::{self, Crowd, Seen};
use super::figures::{Figures, Moments};
use super::judge;
use super::linear::Extent;
use super::violation::Violation;
use crate::network::{BACKUP_TAP, GUEST_IP, Network, PRIMARY_TAP, SERVER};
use crate::now_us;
use crate::pair::{Apart, Pair, Setup};
use crate::process::Vmm;
use crate::scene;
use crate::serial::Serial;

/// Longest wait for anything in a round; a machine under load is slow, a broken one for ever.
const LIMIT: Duration = Duration::from_secs(120);
/// Answers to each client after the blow: the connections are of use, not only open.
const ANSWERS_AFTER: u64 = 20;
/// Of an image: a sector for each write of a round, of which one that waits for the arbiter's time-outs has many.
const DISK_BYTES: u64 = 96 << 20;
const PRIMARY: &str = "primary";
const BACKUP: &str = "backup";
const MAC: &str = "52:54:00:77:00:02";

/// What happens to the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// SIGKILL of the primary.
    KillPrimary,
    /// SIGKILL of the backup.
    KillBackup,
    /// SIGSTOP of the primary, SIGCONT once the backup has the VM.
    StopPrimary,
}

/// Where the guest's log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Nowhere: it has no disk.
    None,
    /// In an image of each host.
    Replicated,
    /// In an image that both hosts use.
    Shared,
}

impl Disk {
    fn image(self, folder: &Path, host: &str) -> Option<PathBuf> {
        match self {
            Self::None => None,
            Self::Replicated => Some(folder.join(format!("{host}.img"))),
            Self::Shared => Some(folder.join("shared.img")),
        }
    }
}

/// How a round is made.
#[derive(Clone, Debug)]
pub struct Plan {
    pub blow: Blow,
    pub clients: u32,
    pub seed: u64,
    pub disk: Disk,
    /// How long the clients work before the blow.
    pub protected_for: Duration,
    /// They first work for as long without protection, which is then switched on.
    pub is_bare_first: bool,
    /// How long a client waits for an answer.
    pub silence_limit: Duration,
}

/// What a round showed. The times of the VM are microseconds since the blow.
#[derive(Debug)]
pub struct Outcome {
    pub violations: Vec<Violation>,
    pub figures: Figures,
    pub extent: Option<Extent>,
    /// Records in the log of the host that has the VM.
    pub records: Option<usize>,
    pub epoch: u64,
    /// Of a take-over: detected, owned, resumed. A primary that goes on alone is never down.
    pub takeover_us: Option<[u64; 3]>,
    /// Frames that a frozen primary sent after it woke: of epochs that its backup has.
    pub late_frames: Option<u64>,
}

/// The guest under its key-value workload, with a card and a disk on both hosts.
pub fn setup(folder: &Path, vcpus: u32, memory: &str, disk: Disk) -> Result<Setup> {
    let mut setup = Setup::verify(vcpus, memory);
    setup.command_line = format!("workload=kv vcpus={vcpus} ip={GUEST_IP} port={}", SERVER.port());
    setup.primary_arguments = vec!["--net".into(), format!("tap={PRIMARY_TAP},mac={MAC}")];
    setup.backup_arguments = vec!["--net".into(), format!("tap={BACKUP_TAP}")];
    let sides = [&mut setup.primary_arguments, &mut setup.backup_arguments];
    for (arguments, host) in sides.into_iter().zip([PRIMARY, BACKUP]) {
        if let Some(image) = disk.image(folder, host) {
            File::create(&image)
                .and_then(|file| file.set_len(DISK_BYTES))
                .with_context(|| format!("Cannot make {}", image.display()))?;
            arguments.extend(["--disk".into(), format!("path={}", image.display())]);
        }
    }
    if disk == Disk::Shared {
        setup.replicate_options.push_str(",disk_mode=shared");
    }
    Ok(setup)
}

/// Runs a round in namespaces of its own. Needs root, /dev/kvm and /dev/net/tun.
pub fn run(folder: &Path, setup: &Setup, plan: &Plan) -> Result<Outcome> {
    let network = Network::new()?;
    // The VMMs die with the thread that started them, and are in its namespace.
    network.hosts.within(|| in_namespace(folder, setup, plan, &network))?
}

fn in_namespace(folder: &Path, setup: &Setup, plan: &Plan, network: &Network) -> Result<Outcome> {
    let start = || {
        let crowd = Crowd::start(&crowd_plan(plan), Some(&network.clients))?;
        crowd.wait_answers(1, LIMIT)?;
        anyhow::Ok(crowd)
    };
    let (mut pair, crowd, bare_until) = if plan.is_bare_first {
        let apart = Apart::start(folder, setup)?;
        wait_ready(&apart.primary_serial)?;
        let crowd = start()?;
        std::thread::sleep(plan.protected_for);
        let until = Instant::now();
        let mut pair = apart.protect(folder)?;
        wait_protected(&mut pair)?;
        (pair, crowd, Some(until))
    } else {
        let mut pair = Pair::start(folder, setup)?;
        wait_protected(&mut pair)?;
        wait_ready(&pair.primary_serial)?;
        (pair, start()?, None)
    };
    let protected_from = Instant::now();
    std::thread::sleep(plan.protected_for);
    let info = pair.primary.replication()?;
    ensure!(info.state == ReplicationState::Protected, "before the blow: {info:?}");
    let blow = Instant::now();
    let struck = strike(&mut pair, plan, network)?;
    crowd.wait_answers(ANSWERS_AFTER, LIMIT)?;
    let records = scene::records(&pair.arbiter)?;
    ensure!(records.len() == 2, "one host won, so one record is new: {records:?}");
    let mut seen = crowd.finish();
    let (survivor, host) = match plan.blow {
        Blow::KillBackup => (&mut pair.primary, PRIMARY),
        Blow::KillPrimary | Blow::StopPrimary => (&mut pair.backup, BACKUP),
    };
    read_back_and_stop(&mut seen, plan, network, survivor)?;
    let Seen { operations, mut violations, .. } = seen;
    let image = plan.disk.image(folder, host);
    let verdict = judge::judge(&operations, image.as_deref())?;
    violations.extend(verdict.violations);
    Ok(Outcome {
        violations,
        figures: Figures::of(&operations, Moments { bare_until, protected_from, blow }),
        extent: verdict.extent,
        records: verdict.records,
        epoch: info.epoch_committed,
        takeover_us: struck.takeover_us,
        late_frames: struck.late_frames,
    })
}

/// Waits until the server listens. It says that once, perhaps before anybody was at the serial port;
/// what it has done so far it says again and again.
pub fn wait_ready(serial: &Serial) -> Result<()> {
    let is_word = |line: &str| line.starts_with("KV READY") || line.starts_with("KV puts");
    serial.wait_line("'KV READY'", 0, LIMIT, is_word)?;
    Ok(())
}

fn wait_protected(pair: &mut Pair) -> Result<()> {
    let synced = pair.wait_protected(LIMIT);
    synced.with_context(|| format!("The backup says:\n{}", pair.backup.log()))?;
    Ok(())
}

fn crowd_plan(plan: &Plan) -> crowd::Plan {
    crowd::Plan {
        clients: plan.clients,
        address: SERVER,
        silence_limit: plan.silence_limit,
        seed: plan.seed,
    }
}

/// What the VMMs say of the blow.
struct Struck {
    takeover_us: Option<[u64; 3]>,
    late_frames: Option<u64>,
}

fn strike(pair: &mut Pair, plan: &Plan, network: &Network) -> Result<Struck> {
    let struck_us = now_us();
    match plan.blow {
        Blow::KillPrimary => {
            pair.primary.kill()?;
            let takeover_us = Some(taken_over(&mut pair.backup, struck_us)?);
            Ok(Struck { takeover_us, late_frames: None })
        }
        Blow::KillBackup => {
            pair.backup.kill()?;
            pair.primary.wait_state(ReplicationState::Degraded, LIMIT)?;
            Ok(Struck { takeover_us: None, late_frames: None })
        }
        Blow::StopPrimary => {
            pair.primary.signal(libc::SIGSTOP)?;
            // The lock of a shared image keeps the backup waiting until the primary lets go.
            let takeover_us = match plan.disk {
                Disk::Shared => wait_owned(pair).map(|()| None)?,
                _ => Some(taken_over(&mut pair.backup, struck_us)?),
            };
            let before = network.frames_from(PRIMARY_TAP)?;
            pair.primary.signal(libc::SIGCONT)?;
            pair.primary.wait_state(ReplicationState::Lost, LIMIT)?;
            pair.primary.wait("its VM to be gone", LIMIT, |vmm| {
                (vmm.get("vm.info").ok()?.status == 404).then_some(())
            })?;
            let late_frames = Some(network.frames_from(PRIMARY_TAP)? - before);
            let takeover_us = match takeover_us {
                None => taken_over(&mut pair.backup, struck_us)?,
                Some(times) => times,
            };
            Ok(Struck { takeover_us: Some(takeover_us), late_frames })
        }
    }
}

/// Waits until the arbiter has given the VM to the backup.
fn wait_owned(pair: &mut Pair) -> Result<()> {
    let arbiter = pair.arbiter.clone();
    pair.backup
        .wait("the ownership", LIMIT, |_| (scene::records(&arbiter).ok()?.len() > 1).then_some(()))
}

fn taken_over(backup: &mut Vmm, struck_us: u64) -> Result<[u64; 3]> {
    let info = backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    let TakeoverTimes { detected_us, owned_us, resumed_us } =
        info.takeover.context("The backup does not say when it took over")?;
    Ok([detected_us, owned_us, resumed_us].map(|time_us| time_us.saturating_sub(struck_us)))
}

/// The last word on every key, and the end of the guest: what it has flushed is in its image.
fn read_back_and_stop(
    seen: &mut Seen,
    plan: &Plan,
    network: &Network,
    survivor: &mut Vmm,
) -> Result<()> {
    let connect = |sequence: &_| {
        let connect = || Client::connect(plan.clients, SERVER, plan.silence_limit, sequence);
        network.clients.within(connect)?
    };
    let mut reader = match seen.read_back(connect) {
        Ok(reader) => reader,
        // A server that nobody can talk to any more is among what the clients found.
        Err(error) if seen.violations.is_empty() => return Err(error),
        Err(_) => return Ok(()),
    };
    match reader.stop() {
        Ok(()) => {
            let status = survivor.wait_exit(LIMIT)?;
            ensure!(status.success(), "{} ended with {status}", survivor.name());
        }
        Err(violation) => seen.violations.push(violation),
    }
    Ok(())
}
