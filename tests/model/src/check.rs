//! Runs explorations and says what they found.

use std::time::{Duration, Instant};

use stateright::{Checker, Expectation, HasDiscoveries, Model};

use crate::broken::Broken;
use crate::model::config::Config;
use crate::model::words;
use crate::model::world::{Act, Protocol, World};

/// A counterexample.
#[derive(Debug)]
pub struct Found {
    pub property: &'static str,
    /// Steps from the first state.
    pub steps: usize,
    /// What happens, and how things stand then.
    pub words: Vec<String>,
}

/// What an exploration came to.
#[derive(Debug)]
pub struct Outcome {
    pub name: &'static str,
    pub about: &'static str,
    pub states: usize,
    pub transitions: usize,
    pub depth: usize,
    pub took: Duration,
    /// Properties that do not hold.
    pub violated: Vec<Found>,
    /// Things that ought to be possible and are not.
    pub missing: Vec<&'static str>,
}

impl Outcome {
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.violated.is_empty() && self.missing.is_empty()
    }
}

/// Explores one configuration: all of it, or up to the first counterexample.
#[must_use]
pub fn explore(config: &Config, threads: usize) -> Outcome {
    let began = Instant::now();
    // A broken rule may show in more than one way.
    let finish = match config.broken {
        Some(_) => HasDiscoveries::AllFailures,
        None => HasDiscoveries::AnyFailures,
    };
    let checker = Protocol::new(config.clone())
        .checker()
        .threads(threads)
        .finish_when(finish)
        .spawn_bfs()
        .join();
    let took = began.elapsed();
    let found = checker.discoveries();
    let mut violated = vec![];
    let mut missing = vec![];
    for property in checker.model().properties() {
        let path = found.get(property.name);
        match (&property.expectation, path) {
            (Expectation::Sometimes, None) => missing.push(property.name),
            (Expectation::Always, Some(path)) => {
                violated.push(tell(property.name, path.clone().into_vec()));
            }
            _ => {}
        }
    }
    if !violated.is_empty() {
        // Not all was explored.
        missing.clear();
    }
    Outcome {
        name: config.name,
        about: config.about,
        states: checker.unique_state_count(),
        transitions: checker.state_count(),
        depth: checker.max_depth(),
        took,
        violated,
        missing,
    }
}

fn tell(property: &'static str, path: Vec<(World, Option<Act>)>) -> Found {
    let mut words = vec![];
    let mut steps = 0;
    for (world, act) in &path {
        words.push(format!("    {}", words::stand(world)));
        if let Some(act) = act {
            steps += 1;
            words.push(format!("{steps:>3} {}", words::act(world, *act)));
        }
    }
    Found { property, steps, words }
}

/// Explores a world with a broken rule: the property that it breaks must be among those that do
/// not hold.
#[must_use]
pub fn explore_broken(broken: Broken, threads: usize) -> (Outcome, bool) {
    let outcome = explore(&Config::broken(broken), threads);
    let found = outcome.violated.iter().any(|found| found.property == breaks(broken));
    (outcome, found)
}

/// What has to be seen to go wrong.
#[must_use]
pub fn breaks(broken: Broken) -> &'static str {
    use crate::model::properties as p;
    match broken {
        Broken::ReleaseBeforeAck
        | Broken::AckAfterSuspecting
        | Broken::AckBeforeWhole
        | Broken::StartOlder
        | Broken::ReleaseOnClaim
        | Broken::ResyncWithoutClaim
        | Broken::SpeaksBeforeReached => p::NOTHING_LOST,
        Broken::TakeOverWithoutSwap
        | Broken::UnknownIsWon
        | Broken::LoserGoesOn
        | Broken::ReadIsWon
        | Broken::OrphanStarts
        | Broken::HeirStartsWithoutSwap => p::ONE_OWNER,
        Broken::StartUnacknowledged => p::ACKNOWLEDGED,
        Broken::UnknownIsLost | Broken::FailedClaimDiscards => p::PROGRESS,
        Broken::HandedIsSaid => p::SAID_ONCE,
        Broken::DeltaOfAnother
        | Broken::AppliedBeforeItsEnd
        | Broken::RestForgets
        | Broken::GateLetsNextOut
        | Broken::WonBeforeItLasts
        | Broken::SwapOverwrites
        | Broken::UnknownWriteIsLost
        | Broken::AnotherHistoryCounts
        | Broken::OwnRefusalIsLost
        | Broken::CompareIsIgnored
        | Broken::MemberDecidesAlone => unreachable!("the model has nothing of it"),
    }
}
