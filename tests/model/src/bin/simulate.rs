//! Runs seeds, and prints the first that fails.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use protocol_model::broken::Broken;
use protocol_model::sim::run::run;
use protocol_model::sim::total::Total;

/// Runs the protocol's machines through seeded faults, with simulated time.
#[derive(Parser)]
struct Options {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000, value_name = "N", conflicts_with = "seed")]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0, value_name = "S", conflicts_with = "seed")]
    first: u64,
    /// Runs seeds for so long, however many those are.
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["seed", "seeds"])]
    seconds: Option<u64>,
    /// One seed; what happens is printed.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Breaks a rule on purpose; exits 0 only if a seed finds it.
    #[arg(long, value_name = "RULE", value_parser = rule)]
    broken: Option<Broken>,
    #[arg(long, default_value_t = 2, value_name = "N")]
    threads: usize,
}

fn rule(name: &str) -> Result<Broken, String> {
    let known = || Broken::every().map(Broken::name).collect::<Vec<_>>().join(", ");
    let found = Broken::every().find(|broken| broken.name() == name);
    found.ok_or_else(|| format!("expected one of {}", known()))
}

/// Something is said at least so often.
const BEAT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(seed) = options.seed {
        return one(seed, options.broken);
    }
    let began = Instant::now();
    let next = AtomicU64::new(options.first);
    let said = Mutex::new(Instant::now());
    let total = Mutex::new(Total::default());
    let is_over = |seed: u64| match options.seconds {
        Some(seconds) => began.elapsed().as_secs() >= seconds,
        None => seed - options.first >= options.seeds,
    };
    std::thread::scope(|scope| {
        for _ in 0..options.threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let failed = total.lock().unwrap_or_else(PoisonError::into_inner).failed();
                    // Seeds before the one that failed still run: the first is what is printed.
                    if is_over(seed) || failed.is_some_and(|failed| failed < seed) {
                        return;
                    }
                    let summary = run(seed, options.broken, false);
                    total.lock().unwrap_or_else(PoisonError::into_inner).add(seed, summary);
                    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                    if said.elapsed() > BEAT {
                        *said = Instant::now();
                        eprintln!("    seed {seed}, {} s", began.elapsed().as_secs());
                    }
                }
            });
        }
    });
    let total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    total.print(began.elapsed());
    match (options.broken, total.failed()) {
        (Some(_), Some(_)) | (None, None) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn one(seed: u64, broken: Option<Broken>) -> ExitCode {
    let summary = run(seed, broken, true);
    summary.trace.iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: {} events, hash {:016x}", summary.events, summary.hash);
    match summary.failure {
        Some(failure) => {
            println!("FAILED: {failure}");
            ExitCode::FAILURE
        }
        None => {
            println!("good");
            ExitCode::SUCCESS
        }
    }
}
