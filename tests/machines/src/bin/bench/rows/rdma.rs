//! What RDMA is worth: beside the bare device, and beside TCP.
//!
//! Both sides of each pair, and both ends of `ib_write_bw`, use the device of this host that has the
//! address `--rdma`. Turns alternate, so that a quotient holds on a machine that is slow, or emulated.

use std::fs;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use api::replication::RdmaPath;
use understudy_tests::pair::{Setup, Transport};

use super::rate::mean_rate;
use crate::Effort;
use crate::bare::Bare;
use crate::guest::{Spec, wait_filled};
use crate::host::Busy;
use crate::perftest::{self, Kind, MESSAGE_BYTES};
use crate::row::{Bound, FLOOR, OURS, Row};
use crate::samples::{Samples, float};
use crate::turns::Protected;
use crate::verbs::{self, Verbs};

const TCP: &str = "tcp";
const BARE: &str = "bare";
const SENDS: &str = "ib_send_bw -e";
/// Bare verbs, with both memories registered as ours are.
const VERBS: &str = "verbs, fresh";
/// By RDMA with `rdma_pin=off`.
const COPIED: &str = "unpinned";
const MEMORY_MIB: u64 = 64;
const EPOCH_MS: u64 = 100;
/// A device may be software on an emulated machine; nobody here is to be suspected for that.
const PATIENT: &str = ",timeout_ms=20000";
const LIMIT: Duration = Duration::from_secs(300);
const WITHOUT: &str = "without --rdma ADDRESS, this host's address on an RDMA device";

/// The options of both sides, and how they reach each other.
fn by(transport: Transport, mut setup: Setup, options: &str) -> Setup {
    setup.transport = transport;
    setup.replicate_options.push_str(&format!("{PATIENT}{options}"));
    setup.receive_options.push_str(PATIENT);
    setup
}

/// What a pair's data goes by, after it was protected.
fn path(machine: &Bare) -> Result<RdmaPath> {
    machine.primary.replication()?.rdma.context("the data did not go by RDMA")
}

/// First syncs, each column a sample a turn.
#[derive(Default)]
struct Syncs {
    columns: Vec<Column>,
    writes: Samples,
    sends: Samples,
    verbs: Samples,
    /// What the last copy by bare verbs took.
    took: Option<String>,
    path: Option<RdmaPath>,
}

struct Column {
    label: &'static str,
    /// MiB a second until the VM was protected.
    rate: Samples,
    /// Seconds of processor time for each GiB: of the primary and its backup, and of all this machine
    /// but the benchmark.
    processes: Samples,
    machine: Samples,
}

/// Both rows are of the same syncs.
fn syncs(effort: &Effort, address: IpAddr) -> Result<&'static Syncs> {
    static SYNCS: OnceLock<Result<Syncs, String>> = OnceLock::new();
    let done = SYNCS.get_or_init(|| measure(effort, address).map_err(|error| format!("{error:#}")));
    done.as_ref().map_err(|error| anyhow!("{error}"))
}

/// A VM whose every page has a content, and which does nothing more.
fn filled(transport: Transport, options: &str) -> Result<Bare> {
    let mut setup = Setup::verify(1, &format!("{MEMORY_MIB}M"));
    setup.command_line = "workload=dirty vcpus=1 tick_ms=1000 dirty_set=1 dirty_period_ms=1000 \
                          dirty_fill=all"
        .into();
    setup.replicate_options = ",console_output=pass".into();
    let machine = Bare::start(by(transport, setup, options))?;
    wait_filled(&machine.serial, LIMIT)?;
    Ok(machine)
}

fn measure(effort: &Effort, address: IpAddr) -> Result<Syncs> {
    let rdma = Transport::Rdma(address);
    let kinds = [(TCP, Transport::Tcp, ""), (COPIED, rdma, ",rdma_pin=off"), (OURS, rdma, "")];
    let mut syncs = Syncs::default();
    let mut machines = Vec::new();
    for (label, transport, options) in kinds {
        let mut machine = filled(transport, options)?;
        // Not counted: what only the first one finds cold.
        machine.protect()?;
        if transport == rdma {
            syncs.path = Some(path(&machine)?);
        }
        machine.set_free()?;
        machines.push(machine);
        syncs.columns.push(Column {
            label,
            rate: Samples::default(),
            processes: Samples::default(),
            machine: Samples::default(),
        });
    }
    let device = syncs.path.clone().context("no RDMA")?;
    let bytes = MEMORY_MIB << 20;
    let messages = bytes / MESSAGE_BYTES;
    let verbs = Verbs::new(&device, bytes)?;
    // Not counted, as the first protection is not.
    verbs.copy()?;
    for _ in 0..effort.turns {
        let bare = |kind| perftest::rate(&device, address, messages, kind);
        syncs.writes.add(vec![bare(Kind::PolledWrites)?]);
        for (machine, column) in machines.iter_mut().zip(&mut syncs.columns) {
            let pids = [machine.primary.pid(), machine.backup.pid()];
            let (before, busy) = (ticks(pids)?, Busy::now());
            let took = machine.protect()?;
            let (after, all) = (ticks(pids)?, Busy::now().others_since(busy));
            machine.set_free()?;
            let gib = float(MEMORY_MIB) / 1024.0;
            column.rate.add(vec![float(MEMORY_MIB) / took.as_secs_f64()]);
            column.processes.add(vec![float(after - before) / TICKS_PER_S / gib]);
            column.machine.add(vec![all / gib]);
        }
        syncs.sends.add(vec![bare(Kind::AwaitedSends)?]);
        let took = verbs.copy()?;
        syncs.verbs.add(vec![verbs::rate(bytes, &took)]);
        syncs.took = Some(took.note());
    }
    Ok(syncs)
}

/// USER_HZ, which Linux gives everybody on x86.
const TICKS_PER_S: f64 = 100.0;

/// User and kernel time of processes, of threads that ended, too (proc_pid_stat(5), fields 14 and 15).
fn ticks(pids: [u32; 2]) -> Result<u64> {
    let mut total = 0;
    for pid in pids {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // A name may hold blanks.
        let (_, fields) = text.rsplit_once(") ").context("a stat without a name")?;
        let times = fields.split_whitespace().skip(11).take(2);
        total += times.map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    }
    Ok(total)
}

fn device_note(path: &RdmaPath) -> String {
    let RdmaPath { device, mtu_bytes, depth, .. } = path;
    format!("device {device}, MTU {mtu_bytes}, depth {depth}; one data connection")
}

pub fn sync(effort: &Effort) -> Result<Row> {
    let what = format!("first sync of {MEMORY_MIB} MiB by RDMA, every page with a content");
    let mut row = Row::new("rdma-sync", what, "MiB/s");
    let Some(address) = effort.rdma else { return Ok(row.not_run(WITHOUT)) };
    let syncs = syncs(effort, address)?;
    row.column(FLOOR, &syncs.writes);
    row.column(SENDS, &syncs.sends);
    row.column(VERBS, &syncs.verbs);
    for column in &syncs.columns {
        row.column(column.label, &column.rate);
    }
    row.check_medians(OURS, FLOOR, Bound::AtLeast(0.8));
    row.check_medians(OURS, SENDS, Bound::Open);
    row.check_medians(OURS, VERBS, Bound::Open);
    row.check_medians(OURS, TCP, Bound::Open);
    row.note("floor: ib_write_bw, messages of 1 MiB; it polls, which takes a processor from a device of software");
    row.note("ib_send_bw: the same bytes by SEND; it sleeps until they are sent (-e), as we do");
    row.note("verbs, fresh: as many bytes by WRITEs of 1 MiB into new memory, registering of both memories and giving one back in it");
    row.notes.extend(syncs.took.clone());
    row.notes.extend(syncs.path.as_ref().map(device_note));
    row.note("until the VM is protected: with the memory registered in ours, without in unpinned");
    Ok(row)
}

pub fn cpu(effort: &Effort) -> Result<Row> {
    let what = "processor time of those first syncs for each GiB, all of this machine";
    let mut row = Row::new("rdma-cpu", what, "s/GiB");
    let Some(address) = effort.rdma else { return Ok(row.not_run(WITHOUT)) };
    for column in &syncs(effort, address)?.columns {
        row.column(column.label, &column.machine);
        let [all, processes] =
            [&column.machine, &column.processes].map(|samples| samples.median().unwrap_or(0.0));
        row.note(format!(
            "{}: {processes:.2} s of them in both VMMs, {:.2} s outside: the kernel's threads",
            column.label,
            (all - processes).max(0.0)
        ));
    }
    row.check_medians(OURS, TCP, Bound::Open);
    Ok(row)
}

/// From the seal to the backup's acknowledgement.
pub fn commit(effort: &Effort) -> Result<Row> {
    let (set, epoch_ms) = (300, EPOCH_MS);
    let what = format!("from seal to acknowledgement, {set} scattered pages each {epoch_ms} ms");
    let mut row = Row::new("rdma-commit", what, "us");
    let Some(address) = effort.rdma else { return Ok(row.not_run(WITHOUT)) };
    let spec = Spec { vcpus: 1, memory_mib: MEMORY_MIB, set, run: 1, sets: 1, epoch_ms };
    let mut pairs = Vec::new();
    for (label, transport) in [(TCP, Transport::Tcp), (OURS, Transport::Rdma(address))] {
        pairs.push((label, Protected::start_as(&spec, &by(transport, spec.setup(), ""))?));
    }
    for _ in 0..effort.turns {
        for (_, pair) in &mut pairs {
            pair.turn(effort.pauses, 10 * effort.limit)?;
        }
    }
    for (label, pair) in &pairs {
        row.column(*label, &pair.commit);
        let [pages, pause] =
            [&pair.pages, &pair.pause].map(|samples| samples.median().unwrap_or(0.0));
        row.note(format!(
            "{label}: {pages:.0} pages an epoch, for which the guest stood still {pause:.0} us; {} epochs \
             not seen",
            pair.unseen
        ));
    }
    row.check_medians(OURS, TCP, Bound::Open);
    row.check_p99s(OURS, TCP, Bound::Open);
    Ok(row)
}

pub fn rate_1(effort: &Effort) -> Result<Row> {
    rate(effort, "rdma-rate-1", 1)
}

pub fn rate_2(effort: &Effort) -> Result<Row> {
    rate(effort, "rdma-rate-2", 2)
}

pub fn rate_4(effort: &Effort) -> Result<Row> {
    rate(effort, "rdma-rate-4", 4)
}

/// What a guest gets done, protected by TCP and by RDMA, each beside the same VM without protection.
fn rate(effort: &Effort, name: &'static str, vcpus: u32) -> Result<Row> {
    let what = format!(
        "computing while 200 scattered pages are rewritten in each epoch of {EPOCH_MS} ms; vCPUs: {vcpus}"
    );
    let mut row = Row::new(name, what, "Mops/s");
    let Some(address) = effort.rdma else { return Ok(row.not_run(WITHOUT)) };
    let mut machines = Vec::new();
    for (label, transport) in [(TCP, Transport::Tcp), (OURS, Transport::Rdma(address))] {
        let mut setup = Setup::verify(vcpus, &format!("{MEMORY_MIB}M"));
        setup.command_line = format!(
            "vcpus={vcpus} tick_ms=100 workload=count+compute+dirty dirty_set=200 dirty_fill=set \
             dirty_period_ms={EPOCH_MS}"
        );
        setup.replicate_options = format!(",console_output=pass,epoch_ms={EPOCH_MS}");
        let machine = Bare::start(by(transport, setup, ""))?;
        machine.serial.wait_more("compute ops=", 3, LIMIT)?;
        machine.primary.put_ok("vm.pause", None)?;
        machines.push((label, machine, Samples::default(), Samples::default()));
    }
    let window = Duration::from_secs(effort.seconds);
    // Short turns, and more of them: each is held against its own moment.
    for _ in 0..2 * effort.turns {
        for (label, machine, bare, protected) in &mut machines {
            machine.primary.put_ok("vm.resume", None)?;
            bare.add(vec![mean_rate(&machine.serial, window)?]);
            machine.protect()?;
            protected.add(vec![mean_rate(&machine.serial, window)?]);
            let info = machine.primary.replication()?;
            ensure!(
                info.rdma.is_some() == (*label == OURS),
                "{label} went by {:?}",
                info.transport
            );
            machine.set_free()?;
            machine.primary.put_ok("vm.pause", None)?;
        }
    }
    for (label, _, bare, protected) in &machines {
        let own_bare = if *label == OURS { BARE } else { "bare, tcp's" };
        row.column(own_bare, bare);
        row.column(*label, protected);
        let shares = shares(protected, bare);
        let value = shares.median();
        row.check(format!("{label} / bare, of turns"), value, Bound::Open);
        if let Some(stats) = shares.stats() {
            let [p25, p75] = [stats.p25, stats.p75].map(crate::table::figure);
            row.note(format!("{label}: {p25} to {p75} of bare in half of {} turns", stats.count));
        }
    }
    Ok(row)
}

/// The share of each turn: both of its medians are of one moment of a machine whose speed changes.
fn shares(protected: &Samples, bare: &Samples) -> Samples {
    let mut shares = Samples::default();
    if let (Some(protected), Some(bare)) = (protected.stats(), bare.stats()) {
        let turns = protected.turn_medians.iter().zip(&bare.turn_medians);
        shares
            .add(turns.filter(|(_, bare)| **bare > 0.0).map(|(ours, bare)| ours / bare).collect());
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_held_against_its_own_moment() {
        let (mut protected, mut bare) = <(Samples, Samples)>::default();
        for speed in [1.0, 10.0, 100.0] {
            protected.add(vec![0.9 * speed]);
            bare.add(vec![speed]);
        }
        let stats = shares(&protected, &bare).stats().unwrap();
        assert!(
            stats.count == 3 && (stats.min - 0.9).abs() < 1e-9 && (stats.max - 0.9).abs() < 1e-9
        );
    }
}
