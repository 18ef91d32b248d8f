//! Compares all of a backup's memory with its primary's, at each epoch.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use understudy_tests::equality::{Compared, Equality};
use understudy_tests::interrupt::{self, Folder};
use understudy_tests::kv::round::{self, Blow, Disk, Plan};
use understudy_tests::pair::{Pair, Setup, Transport};

/// Longest time without an epoch.
const LIMIT: Duration = Duration::from_secs(120);
const BEAT: Duration = Duration::from_secs(5);

/// Runs a protected VM and compares, at each epoch, every page of the backup's memory with what
/// the primary's was at the seal. Exits 0 only if no page ever differed.
#[derive(Parser)]
struct Options {
    /// How many epochs to compare, at least.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// Memory of the guest, as --memory size= takes it.
    #[arg(long, default_value = "256M")]
    memory: String,
    /// How pages are kept while they are sent, as --replicate cow= takes it; several, with commas
    /// between them, one after the other; `all`: each.
    #[arg(long, default_value = "hybrid", value_delimiter = ',')]
    cow: Vec<String>,
    /// Longest epoch in milliseconds.
    #[arg(long, default_value_t = 10)]
    epoch_ms: u64,
    /// What the guest does: `hot`, all vCPUs rewrite a small set of pages, and verify the rest of
    /// memory; `random`, they write anywhere; `runs`, runs of 700 pages, each over a border of huge
    /// pages; `kv`, clients, a card and a disk write it; `all`, these and `hot`.
    #[arg(long, value_enum, default_value_t = Workload::Hot)]
    workload: Workload,
    /// How pages are written on the wire, as --replicate compression= takes it.
    #[arg(long, default_value = "auto")]
    compression: String,
    /// Tests the check: pages are sent as they are when they are sent. Exits 0 as soon as a page
    /// differs, 1 if none does.
    #[arg(long)]
    without_cow: bool,
    /// Tests the check, with cow=protect and cow=hybrid: pages that count as write-protected are not.
    #[arg(long)]
    without_protection: bool,
    /// Keeps the guest's memory in huge pages, for as long as the run takes the host's setting for it
    /// (shmem_enabled) from `never` to `advise`; fails if none came about.
    #[arg(long)]
    huge_pages: bool,
    /// Makes threads sleep at random: POINT:MICROSECONDS[,...]. Points: seal, arm, fault, take, send,
    /// unprotect, ack; see replication/src/checking.rs.
    #[arg(long, default_value = "")]
    delays: String,
    /// Where KVM notes the pages that the guest writes: bitmap or ring. Left to the VMM without it.
    #[arg(long, value_parser = ["bitmap", "ring"])]
    dirty_log: Option<String>,
    /// How pages travel: tcp, unix, or rdma:<address of this host on an RDMA device>.
    #[arg(long, default_value = "tcp")]
    transport: Transport,
    /// Data connections, as --replicate connections= takes it.
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// Tests the check of a first copy by RDMA straight into the backup's memory: some pages are not written.
    /// Exits 0 as soon as the backup says so, or a page differs.
    #[arg(long)]
    without_place: bool,
}

impl Options {
    fn is_broken(&self) -> bool {
        self.without_cow || self.without_protection || self.without_place
    }

    fn modes(&self) -> Vec<String> {
        if self.cow == ["all"] {
            return ["off", "copy", "protect", "hybrid"].map(str::to_owned).to_vec();
        }
        self.cow.clone()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Workload {
    Hot,
    Random,
    Runs,
    Kv,
    All,
}

impl Workload {
    fn has_clients(self) -> bool {
        matches!(self, Self::Kv | Self::All)
    }

    /// What the guest does beside serving clients.
    fn words(self) -> &'static str {
        match self {
            Self::Hot | Self::All => "verify+dirty dirty_order=hot",
            Self::Random => "verify+dirty dirty_order=random",
            // A huge page has 512.
            Self::Runs => {
                "verify+dirty dirty_set=2800 dirty_sets=2 dirty_run=700 dirty_period_ms=4"
            }
            Self::Kv => "",
        }
    }
}

/// The host's setting for huge pages of shared memory, put back at the end.
struct HugePages(Option<String>);

impl HugePages {
    const FILE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

    fn allow() -> Result<Self> {
        let text = std::fs::read_to_string(Self::FILE)
            .with_context(|| format!("This kernel has no {}", Self::FILE))?;
        let now = text.split(['[', ']']).nth(1).context("Nothing is chosen there")?.to_owned();
        if !["never", "deny"].contains(&now.as_str()) {
            return Ok(Self(None));
        }
        std::fs::write(Self::FILE, "advise")
            .with_context(|| format!("Cannot set {}", Self::FILE))?;
        Ok(Self(Some(now)))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.0
            && let Err(error) = std::fs::write(Self::FILE, before)
        {
            eprintln!("{} cannot be set back to {before}: {error}", Self::FILE);
        }
    }
}

/// Shared memory of a process that its tables map in huge pages, in KiB.
fn huge_kib(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("ShmemPmdMapped:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("this kernel does not count huge pages")?.parse()?)
}

fn main() -> ExitCode {
    let options = Options::parse();
    match interrupt::watch().and_then(|()| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("Error: {error:#}");
            println!("0 passed, 1 failed");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    ensure!(
        !(options.workload.has_clients() && matches!(options.transport, Transport::Rdma(_))),
        "--workload kv and all put the hosts into a network namespace of their own, where no RDMA device is: with \
         --transport rdma: use hot, random or runs"
    );
    let _huge_pages = options.huge_pages.then(HugePages::allow).transpose()?;
    let (mut passed, mut failed) = (0, 0);
    for mode in options.modes() {
        println!("cow={mode}, {} vCPUs", options.vcpus);
        if compare(options, &mode)? {
            passed += 1;
        } else {
            failed += 1;
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// As many epochs as are wanted, of one mode.
fn compare(options: &Options, mode: &str) -> Result<bool> {
    let mut all = Compared::default();
    while all.epochs < options.epochs && (all.different == 0 || !options.is_broken()) {
        let folder = Folder::new()?;
        let found = match options.workload.has_clients() {
            true => serve(options, mode, &folder, all.epochs)?,
            false => write(options, mode, &folder)?,
        };
        all.epochs += found.epochs;
        all.pages += found.pages;
        all.different += found.different;
        all.first = all.first.or(found.first);
        say(&all)?;
    }
    if let Some((epoch, address)) = &all.first {
        println!("the first page that differs is at {address}, in epoch {epoch} of its pair");
    }
    let is_found = all.different > 0;
    if options.is_broken() {
        println!("{}", if is_found { "found, as it has to be" } else { "nothing was found" });
    }
    Ok(is_found == options.is_broken())
}

fn say(compared: &Compared) -> Result<()> {
    println!(
        "{} epochs, {} pages compared, {} different",
        compared.epochs, compared.pages, compared.different
    );
    Ok(std::io::stdout().flush()?)
}

fn switch(options: &Options, mode: &str, folder: &Folder, setup: &mut Setup) -> Result<Equality> {
    let Options { epoch_ms, compression, connections, .. } = options;
    let options_given = format!(
        ",epoch_ms={epoch_ms},cow={mode},compression={compression},connections={connections},timeout_ms=20000"
    );
    setup.replicate_options.push_str(&options_given);
    setup.transport = options.transport;
    setup.receive_options.push_str(",timeout_ms=20000");
    let broken = [
        (options.without_cow, "cow"),
        (options.without_protection, "protect"),
        (options.without_place, "place"),
    ];
    for (_, part) in broken.into_iter().filter(|(is_asked, _)| *is_asked) {
        setup.primary_environment.push(("UNDERSTUDY_TEST_BREAK".into(), part.into()));
    }
    if let Some(log) = &options.dirty_log {
        setup.primary_environment.push(("UNDERSTUDY_TEST_DIRTY_LOG".into(), log.clone()));
    }
    if !options.delays.is_empty() {
        setup.primary_environment.push(("UNDERSTUDY_TEST_DELAYS".into(), options.delays.clone()));
    }
    Equality::switch_on(folder.path(), setup)
}

/// One pair, until it has compared as many epochs as are wanted.
fn write(options: &Options, mode: &str, folder: &Folder) -> Result<Compared> {
    let mut setup = Setup::verify(options.vcpus, &options.memory);
    let (words, vcpus) = (options.workload.words(), options.vcpus);
    setup.command_line = format!("workload={words} vcpus={vcpus} tick_ms=20");
    let equality = switch(options, mode, folder, &mut setup)?;
    let mut pair = Pair::start(folder.path(), &setup)?;
    let mut huge = 0;
    let mut last = (Instant::now(), Compared::default());
    let mut spoken = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let compared = equality.compared()?;
        if options.huge_pages {
            huge = huge.max(huge_kib(pair.primary.pid())?);
        }
        let is_enough = compared.epochs >= options.epochs;
        let info = if is_enough { Some(pair.primary.replication()?) } else { None };
        if let Some(info) = &info {
            let log = info.dirty_log.as_deref().unwrap_or("none");
            let (protected, faults) = (info.cow_protected, info.cow_faults);
            println!("{protected} pages protected, {faults} faults, dirty log: {log}");
            let is_wanted = options.dirty_log.as_deref().is_none_or(|wanted| wanted == log);
            ensure!(is_wanted, "the dirty log is {log}");
        }
        if let Some(path) = info.and_then(|info| info.rdma) {
            println!(
                "{} KiB of guest memory registered, {} KiB of pages read there, {} KiB went straight",
                path.registered_bytes >> 10,
                (path.from_memory_bytes - path.straight_bytes) >> 10,
                path.straight_bytes >> 10
            );
        }
        if is_enough || options.is_broken() && compared.different > 0 {
            if options.huge_pages {
                println!("at most {} MiB of guest memory were in huge pages at once", huge >> 10);
                ensure!(huge > 0, "no memory came about in huge pages");
            }
            return Ok(compared);
        }
        if options.without_place
            && let Some(error) = pair.primary.replication()?.last_error
            && error.contains("are not as the primary has them")
        {
            println!("the backup compared checksums: {error}");
            return Ok(Compared { different: 1, ..compared });
        }
        ensure!(pair.primary.is_alive(), "the primary is gone:\n{}", pair.primary.log());
        ensure!(pair.backup.is_alive(), "the backup is gone:\n{}", pair.backup.log());
        if compared.epochs > last.1.epochs {
            last = (Instant::now(), compared.clone());
        }
        if last.0.elapsed() > LIMIT {
            for process in [&pair.primary, &pair.backup] {
                println!("its last error: {:?}", process.replication()?.last_error);
            }
            let (primary, backup) = (pair.primary.log(), pair.backup.log());
            bail!("no epoch for {LIMIT:?}; the primary says:\n{primary}\nthe backup:\n{backup}");
        }
        if spoken.elapsed() > BEAT {
            spoken = Instant::now();
            say(&compared)?;
        }
    }
}

/// One kill round with clients; what they saw has to be right, too.
fn serve(options: &Options, mode: &str, folder: &Folder, seed: u64) -> Result<Compared> {
    let disk = Disk::Replicated;
    let mut setup = round::setup(folder.path(), options.vcpus, &options.memory, disk)?;
    let words = options.workload.words();
    if !words.is_empty() {
        setup.command_line =
            setup.command_line.replace("workload=kv", &format!("workload=kv+{words}"));
    }
    let equality = switch(options, mode, folder, &mut setup)?;
    let plan = Plan {
        blow: Blow::KillPrimary,
        clients: 8,
        seed,
        disk,
        protected_for: Duration::from_secs(5),
        is_bare_first: false,
        silence_limit: Duration::from_secs(20),
    };
    let outcome = round::run(folder.path(), &setup, &plan)?;
    if !options.is_broken() {
        let found = outcome.violations.first().map(|violation| violation.chain());
        ensure!(found.is_none(), "the clients found: {found:?}");
    }
    equality.compared()
}
