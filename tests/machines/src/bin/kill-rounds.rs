//! Kill rounds: protect a VM, kill its primary, let the guest say whether anything was lost.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use understudy_tests::interrupt::{self, Folder};
use understudy_tests::pair::Setup;
use understudy_tests::round::{self, Outcome};
use understudy_tests::statistics::Summary;

/// Kill rounds with the test guest: a line a round, the verdict and take-over times at the end.
#[derive(Parser)]
struct Options {
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
    /// Keep the logs of a failed round here.
    #[arg(long)]
    keep: Option<PathBuf>,
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
    let mut random = StdRng::seed_from_u64(seed);
    let mut setup = Setup::verify(options.vcpus, &options.memory);
    setup.replicate_options = format!(",epoch_ms={}", options.epoch_ms);
    let mut outcomes = Vec::new();
    let mut failed = 0;
    for number in 1..=options.rounds {
        let protected_for = Duration::from_millis(random.random_range(50..1500));
        let folder = Folder::new()?;
        match round::run(folder.path(), &setup, protected_for, &mut ()) {
            Ok(outcome) => {
                println!("round {number}: {}", line(&outcome));
                outcomes.push(outcome);
            }
            Err(error) => {
                failed += 1;
                println!("round {number}: FAILED: {error:#}");
                keep(options, &folder, number)?;
            }
        }
        std::io::stdout().flush()?;
    }
    summary(&outcomes);
    println!("{} passed, {failed} failed", outcomes.len());
    Ok(failed == 0)
}

fn line(outcome: &Outcome) -> String {
    let ms = |us: u64| format!("{}.{} ms", us / 1000, us % 1000 / 100);
    format!(
        "detected {}, owned {}, resumed {}, first output {} after the kill; epoch {} of {}; {}",
        ms(outcome.detected_us),
        ms(outcome.owned_us),
        ms(outcome.resumed_us),
        ms(outcome.first_output_us),
        outcome.backup.epoch_committed,
        outcome.primary.epoch_sealed,
        outcome.verdict,
    )
}

fn summary(outcomes: &[Outcome]) {
    let row = |name: &str, figure: fn(&Outcome) -> u64| {
        if let Some(summary) = Summary::of(outcomes.iter().map(figure).collect()) {
            println!("{name:<13} {summary}");
        }
    };
    row("detected", |outcome| outcome.detected_us);
    row("owned", |outcome| outcome.owned_us);
    row("resumed", |outcome| outcome.resumed_us);
    row("first output", |outcome| outcome.first_output_us);
}

fn keep(options: &Options, folder: &Folder, number: u32) -> Result<()> {
    let Some(keep) = &options.keep else { return Ok(()) };
    let target = keep.join(format!("round-{number}"));
    std::fs::create_dir_all(&target)?;
    for entry in std::fs::read_dir(folder.path())? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            std::fs::copy(&path, target.join(name))?;
        }
    }
    println!("  its logs are in {}", target.display());
    Ok(())
}
