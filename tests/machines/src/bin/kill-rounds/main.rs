//! Kill rounds: protect a VM, strike its pair, and say whether anything was lost.

mod kv;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use understudy_tests::interrupt;
use understudy_tests::kv::round::{self, Blow};
use understudy_tests::pair::Transport;

/// Kill rounds with the test guest: a line a round, the verdict and take-over times at the end.
#[derive(Parser)]
struct Options {
    /// What the guest does, and who says whether anything was lost: `verify`, the guest itself of
    /// its memory; `kv`, clients of a key-value server in it, of all that they saw.
    #[arg(long, value_enum, default_value_t = Workload::Verify)]
    workload: Workload,
    /// How many rounds.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// Memory of the guest, as --memory size= takes it.
    #[arg(long, default_value = "512M")]
    memory: String,
    /// The rounds' random moments follow from this; printed, so that a run can be repeated.
    #[arg(long)]
    seed: Option<u64>,
    /// Longest epoch in milliseconds.
    #[arg(long, default_value_t = 25)]
    epoch_ms: u64,
    /// How epochs travel: tcp, unix, or rdma:<address of this host on an RDMA device>. With --workload
    /// verify.
    #[arg(long, default_value = "tcp")]
    transport: Transport,
    /// After how much silence a side suspects the other, in milliseconds, and how long an RDMA device may
    /// take: a process that is killed is noticed at once. With --workload verify.
    #[arg(long)]
    timeout_ms: Option<u64>,
    /// Keep the logs of a failed round here.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// What is struck: the primary is killed, the backup is killed (with --workload kv), or the primary is stopped
    /// until the backup has the VM, and then wakes.
    #[arg(long, value_enum, default_value_t = Kill::Primary)]
    kill: Kill,
    /// The primary is stopped when it gets to this step of an epoch, not at any moment: a point of
    /// UNDERSTUDY_TEST_FAULT, `send` for example. With --workload verify and --kill stop.
    #[arg(long)]
    at: Option<String>,
    /// Clients of the server, each with a connection. With --workload kv.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=60))]
    clients: u32,
    /// Where the server's log is: on an image of each host, on one that both use, or nowhere. With
    /// --workload kv.
    #[arg(long, value_enum, default_value_t = Disk::Replicated)]
    disk: Disk,
    /// The clients first work for as long without protection, which is then switched on: the
    /// latency of both in one round. With --workload kv.
    #[arg(long)]
    bare_first: bool,
    /// Tests the checker: the primary lets frames out before their epoch is committed, and the run
    /// succeeds once that was found out. With --workload kv.
    #[arg(long)]
    without_gate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Workload {
    Verify,
    Kv,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kill {
    Primary,
    Backup,
    Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Disk {
    Replicated,
    Shared,
    None,
}

impl From<Disk> for round::Disk {
    fn from(disk: Disk) -> Self {
        match disk {
            Disk::Replicated => Self::Replicated,
            Disk::Shared => Self::Shared,
            Disk::None => Self::None,
        }
    }
}

impl From<Kill> for Blow {
    fn from(kill: Kill) -> Self {
        match kill {
            Kill::Primary => Self::KillPrimary,
            Kill::Backup => Self::KillBackup,
            Kill::Stop => Self::StopPrimary,
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match interrupt::watch().and_then(|()| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    let seed = options.seed.unwrap_or_else(rand::random);
    println!("{} rounds, {} vCPUs, {}, seed {seed}", options.rounds, options.vcpus, options.memory);
    match options.workload {
        Workload::Verify => {
            let others = options.without_gate || options.bare_first || options.kill == Kill::Backup;
            ensure!(
                !others,
                "--kill backup, --bare-first and --without-gate are for --workload kv"
            );
            let is_alone = options.at.is_some() && options.kill != Kill::Stop;
            ensure!(!is_alone, "--at is for --kill stop");
            verify::run(options, seed)
        }
        Workload::Kv => {
            let is_tcp = options.transport == Transport::Tcp;
            let are_others = is_tcp && options.timeout_ms.is_none() && options.at.is_none();
            ensure!(are_others, "--transport, --timeout-ms and --at are for --workload verify");
            let is_blind = options.without_gate && options.kill == Kill::Backup;
            ensure!(!is_blind, "--without-gate: a primary that goes on takes nothing back");
            kv::run(options, seed)
        }
    }
}

/// Microseconds as milliseconds.
fn ms(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

/// Keeps the files of a failed round, if that is wanted.
fn keep(options: &Options, folder: &Path, number: u32) -> Result<()> {
    let Some(keep) = &options.keep else { return Ok(()) };
    let target = keep.join(format!("round-{number}"));
    std::fs::create_dir_all(&target)?;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            std::fs::copy(&path, target.join(name))?;
        }
    }
    println!("  its logs are in {}", target.display());
    Ok(())
}
