//! Explores the protocol, and looks for each rule that was broken on purpose.

use std::process::ExitCode;

use clap::Parser;
use protocol_model::broken::Broken;
use protocol_model::check::{Outcome, breaks, explore, explore_broken};
use protocol_model::model::config::Config;

/// Explores every order of events of the ownership protocol, within bounds, and looks for each rule
/// that was broken on purpose.
#[derive(Parser)]
struct Options {
    /// More epochs, faults and requests: minutes and gigabytes instead of seconds.
    #[arg(long)]
    large: bool,
    /// Only configurations and broken rules with this in their name; may be given more than once.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// One configuration with these bounds, and no broken rule: epochs, sessions, crashes,
    /// arbiter_faults, asks, too_large, give_ups, image_failures, and, 0 or 1, arbiter and reverses.
    #[arg(long, value_name = "NAME=N,...", value_parser = Config::parse)]
    bounds: Option<Config>,
    /// Prints each counterexample step by step.
    #[arg(long)]
    paths: bool,
    /// Threads that explore.
    #[arg(long, default_value_t = 2, value_name = "N")]
    threads: usize,
}

impl Options {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.contains(only.as_str()))
    }

    fn wants_bounds(&self, config: &Config) -> bool {
        self.bounds.is_some() || self.wants(config.name)
    }

    fn wants_broken(&self, broken: Broken) -> bool {
        self.bounds.is_none() && self.wants(broken.name())
    }

    fn path(&self, outcome: &Outcome) {
        for found in outcome.violated.iter().filter(|_| self.paths) {
            println!("    against '{}':", found.property);
            found.words.iter().for_each(|line| println!("    {line}"));
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let (mut passed, mut failed) = (0, 0);
    let configs = match &options.bounds {
        Some(config) => vec![config.clone()],
        None if options.large => Config::large(),
        None => Config::quick(),
    };
    println!(
        "{:<12} {:>10} {:>11} {:>6} {:>8}  {:<6}  what may happen",
        "bounds", "states", "transitions", "depth", "seconds", ""
    );
    for config in configs.iter().filter(|config| options.wants_bounds(config)) {
        let outcome = explore(config, options.threads);
        let verdict = if outcome.is_good() { "holds" } else { "FAILS" };
        println!(
            "{:<12} {:>10} {:>11} {:>6} {:>8.1}  {verdict:<6}  {}",
            outcome.name,
            outcome.states,
            outcome.transitions,
            outcome.depth,
            outcome.took.as_secs_f64(),
            outcome.about
        );
        for found in &outcome.violated {
            println!("    VIOLATED after {} steps: {}", found.steps, found.property);
        }
        for missing in &outcome.missing {
            println!("    NEVER HAPPENS: {missing}");
        }
        options.path(&outcome);
        if outcome.is_good() { passed += 1 } else { failed += 1 }
    }
    println!();
    println!("{:<24} {:>10} {:>6}  found against", "broken rule", "states", "steps");
    for broken in Broken::ALL.into_iter().filter(|broken| options.wants_broken(*broken)) {
        let (outcome, is_found) = explore_broken(broken, options.threads);
        if is_found {
            passed += 1
        } else {
            failed += 1
        }
        let first = outcome.violated.iter().find(|found| found.property == breaks(broken));
        let steps = first.map_or("-".to_owned(), |found| found.steps.to_string());
        let mut against: Vec<_> = outcome.violated.iter().map(|found| found.property).collect();
        against.sort_by_key(|property| *property != breaks(broken));
        let against = if is_found { against.join("; ") } else { format!("NOT FOUND {against:?}") };
        println!("{:<24} {:>10} {steps:>6}  {against}", broken.name(), outcome.states);
        options.path(&outcome);
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
