//! The workload `verify`: the guest checks all of its memory.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use understudy_tests::interrupt::Folder;
use understudy_tests::pair::Setup;
use understudy_tests::round::{self, Blow, Outcome};
use understudy_tests::statistics::Summary;

use crate::{Kill, Options, keep, ms};

pub fn run(options: &Options, seed: u64) -> Result<bool> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut setup = Setup::verify(options.vcpus, &options.memory);
    setup.transport = options.transport;
    setup.replicate_options = format!(",epoch_ms={}", options.epoch_ms);
    if let Some(timeout_ms) = options.timeout_ms {
        for given in [&mut setup.replicate_options, &mut setup.receive_options] {
            given.push_str(&format!(",timeout_ms={timeout_ms}"));
        }
    }
    let blow = match (options.kill, &options.at) {
        (Kill::Stop, Some(point)) => Blow::StopAt(point),
        (Kill::Stop, None) => Blow::Stop,
        _ => Blow::Kill,
    };
    if blow != Blow::Kill {
        // Its log is to say why its data was refused.
        setup.primary_arguments.push("-v".to_owned());
    }
    let mut outcomes = Vec::new();
    let mut failed = 0;
    for number in 1..=options.rounds {
        let protected_for = Duration::from_millis(random.random_range(50..1500));
        let folder = Folder::new()?;
        match round::run_by(blow, folder.path(), &setup, protected_for, &mut ()) {
            Ok(outcome) => {
                println!("round {number}: {}", line(&outcome));
                outcomes.push(outcome);
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
    Ok(failed == 0)
}

fn line(outcome: &Outcome) -> String {
    let fence = outcome.fence.as_ref().map_or(String::new(), |said| format!("; woke up, {said}"));
    format!(
        "detected {}, owned {}, resumed {}, first output {} after the blow; epoch {} of {}; {}{fence}",
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
