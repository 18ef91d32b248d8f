//! The explorations that CI makes, and every rule that was broken on purpose.

use protocol_model::broken::Broken;
use protocol_model::check::{Outcome, explore, explore_broken};
use protocol_model::model::config::Config;

const THREADS: usize = 2;

fn words(outcome: &Outcome) -> String {
    let violated = outcome.violated.iter().map(|found| {
        let path = found.words.join("\n");
        format!("'{}' after {} steps:\n{path}\n", found.property, found.steps)
    });
    let missing = outcome.missing.iter().map(|missing| format!("never happens: {missing}\n"));
    violated.chain(missing).collect()
}

#[test]
fn what_must_hold_holds_in_every_order_of_events() {
    for config in Config::quick() {
        let outcome = explore(&config, THREADS);
        println!("{}: {} states, depth {}", config.name, outcome.states, outcome.depth);
        assert!(outcome.is_good(), "{}: {}", config.name, words(&outcome));
    }
}

#[test]
fn each_rule_that_is_broken_on_purpose_is_found() {
    for broken in Broken::ALL {
        let (outcome, is_found) = explore_broken(broken, THREADS);
        assert!(is_found, "{} is not found: {}", broken.name(), words(&outcome));
    }
}
