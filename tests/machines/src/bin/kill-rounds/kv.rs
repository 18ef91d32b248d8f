//! The workload `kv`: clients of a key-value server, and the judgement of what they saw.

use std::io::Write;
use std::mem::{Discriminant, discriminant};
use std::time::Duration;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use understudy_tests::interrupt::Folder;
use understudy_tests::kv::figures::Latency;
use understudy_tests::kv::round::{self, Outcome, Plan};
use understudy_tests::kv::violation::Violation;
use understudy_tests::statistics::Summary;

use crate::{Disk, Kill, Options, keep, ms};

/// Long enough for a take-over and the clients' retransmissions on a slow machine.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);
/// A connection that lost its gate may be silent for ever.
const SILENCE_LIMIT_WITHOUT_GATE: Duration = Duration::from_secs(5);
/// Findings of a kind that are shown.
const SHOWN: usize = 2;

pub fn run(options: &Options, seed: u64) -> Result<bool> {
    let what = match options.kill {
        Kill::Primary => "the primary is killed",
        Kill::Backup => "the backup is killed",
        Kill::Stop => "the primary is stopped and wakes",
    };
    let log = match options.disk {
        Disk::None => "without a log",
        Disk::Replicated => "with its log on a replicated disk",
        Disk::Shared => "with its log on a shared disk",
    };
    println!("key-value server {log}, {} clients, {what}", options.clients);
    let mut random = StdRng::seed_from_u64(seed);
    let mut outcomes = Vec::new();
    let mut failed = 0;
    for number in 1..=options.rounds {
        let folder = Folder::new()?;
        match one(options, &folder, &mut random) {
            Ok(outcome) if outcome.violations.is_empty() => {
                println!("round {number}: {}", line(&outcome));
                outcomes.push(outcome);
            }
            Ok(outcome) => {
                failed += 1;
                println!("round {number}: FAILED: {}", line(&outcome));
                show(&outcome.violations);
                if options.without_gate {
                    println!("violation found, as it has to be without the gate");
                    return Ok(true);
                }
                keep(options, folder.path(), number)?;
            }
            Err(error) => {
                failed += 1;
                println!("round {number}: FAILED: {error:#}");
                keep(options, folder.path(), number)?;
            }
        }
        std::io::stdout().flush()?;
    }
    summary(&outcomes);
    println!("{} passed, {failed} failed", outcomes.len());
    if options.without_gate {
        println!("no violation found, though there was no gate");
        return Ok(false);
    }
    Ok(failed == 0)
}

fn one(options: &Options, folder: &Folder, random: &mut StdRng) -> Result<Outcome> {
    let disk = options.disk.into();
    let mut setup = round::setup(folder.path(), options.vcpus, &options.memory, disk)?;
    setup.replicate_options.push_str(&format!(",epoch_ms={}", options.epoch_ms));
    if options.without_gate {
        setup.primary_environment.push(("UNDERSTUDY_TEST_BREAK".into(), "net-gate".into()));
    }
    let plan = Plan {
        blow: options.kill.into(),
        clients: options.clients,
        seed: random.random(),
        disk,
        is_bare_first: options.bare_first,
        protected_for: Duration::from_millis(random.random_range(200..2000)),
        silence_limit: if options.without_gate {
            SILENCE_LIMIT_WITHOUT_GATE
        } else {
            SILENCE_LIMIT
        },
    };
    round::run(folder.path(), &setup, &plan)
}

/// The first few findings of each kind: clients tend to find the same.
fn show(violations: &[Violation]) {
    let mut kinds: Vec<(Discriminant<Violation>, usize)> = Vec::new();
    let mut left_out = 0;
    for violation in violations {
        let kind = discriminant(violation);
        let at = kinds.iter().position(|(known, _)| *known == kind).unwrap_or_else(|| {
            kinds.push((kind, 0));
            kinds.len() - 1
        });
        kinds[at].1 += 1;
        if kinds[at].1 <= SHOWN {
            println!("  {}", violation.chain());
        } else {
            left_out += 1;
        }
    }
    if left_out > 0 {
        println!("  and {left_out} more");
    }
}

fn line(outcome: &Outcome) -> String {
    let mut parts = Vec::new();
    if let Some([detected, owned, resumed]) = outcome.takeover_us.map(|times| times.map(ms)) {
        parts.push(format!("detected {detected}, owned {owned}, resumed {resumed} after the blow"));
    }
    let figures = &outcome.figures;
    if let Some(bare) = figures.bare {
        parts.push(format!("latency bare p50 {}, p99 {}", ms(bare.p50_us), ms(bare.p99_us)));
    }
    parts.push(format!(
        "latency protected p50 {}, p99 {}; longest silence {}; {} answered, {} of them writes",
        ms(figures.protected.p50_us),
        ms(figures.protected.p99_us),
        ms(figures.silence_us),
        figures.answered,
        figures.writes,
    ));
    if let Some(records) = outcome.records {
        parts.push(format!("{records} in the log"));
    }
    if let Some(extent) = outcome.extent {
        parts.push(format!(
            "linearizable on {} keys, found in {}",
            extent.keys,
            ms(extent.took_us)
        ));
    }
    if let Some(frames) = outcome.late_frames {
        parts.push(format!("{frames} late frames"));
    }
    parts.push(format!("epoch {}", outcome.epoch));
    parts.join("; ")
}

fn summary(outcomes: &[Outcome]) {
    let row = |name: &str, figures: Vec<u64>| {
        if let Some(summary) = Summary::of(figures) {
            println!("{name:<15} {summary}");
        }
    };
    for (at, name) in ["detected", "owned", "resumed"].into_iter().enumerate() {
        let times = outcomes.iter().filter_map(|outcome| Some(outcome.takeover_us?[at]));
        row(name, times.collect());
    }
    let of = |figure: fn(&Outcome) -> u64| outcomes.iter().map(figure).collect();
    row("longest silence", of(|outcome| outcome.figures.silence_us));
    let bare = |figure: fn(&Latency) -> u64| {
        outcomes.iter().filter_map(|outcome| outcome.figures.bare.as_ref().map(figure)).collect()
    };
    row("bare p50", bare(|latency| latency.p50_us));
    row("bare p99", bare(|latency| latency.p99_us));
    row("protected p50", of(|outcome| outcome.figures.protected.p50_us));
    row("protected p99", of(|outcome| outcome.figures.protected.p99_us));
}
