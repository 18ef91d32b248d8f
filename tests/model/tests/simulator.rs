//! Seeds that CI runs.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol_model::broken::Broken;
use protocol_model::guest::Position;
use protocol_model::sim::machine::Output;
use protocol_model::sim::memory::{self, PAGES};
use protocol_model::sim::oracle::Oracle;
use protocol_model::sim::run::run;
use protocol_model::sim::total::Total;
use replication::ids::EpochId;

const SEEDS: u64 = 2000;
const THREADS: usize = 2;

/// What the simulator cannot bring about, with the reason.
const NEVER: [(&str, &str); 1] = [("primary Alone -> Stopped", "an engine ends in Alone")];

/// Seeds up to the first that fails, on as many threads.
fn total(seeds: u64, broken: Option<Broken>) -> Total {
    let total = Mutex::new(Total::default());
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds || total.lock().unwrap().failed().is_some() {
                        return;
                    }
                    let summary = run(seed, broken, false);
                    total.lock().unwrap().add(seed, summary);
                }
            });
        }
    });
    total.into_inner().unwrap()
}

#[test]
fn no_seed_fails_and_every_transition_is_made() {
    let total = total(SEEDS, None);
    assert_eq!(total.failure(), None, "see scripts/simulate.sh --seed");
    assert_eq!(total.coverage.strangers(), [""; 0]);
    assert!(total.bases > 0, "no copy went on from what was kept");
    assert!(total.garbled > 0, "no bit was turned over");
    assert!(total.refused > 0, "no call was refused");
    assert!(total.storage_faults > 0, "nothing went wrong at the arbiter's storage");
    assert!(total.etcd_faults > 0, "nothing went wrong at the arbiter's cluster");
    let never = |name: &str| NEVER.iter().any(|(known, _)| *known == name);
    for (name, count) in total.coverage.counts() {
        assert_eq!(count == 0, never(&name), "{name}: {count}");
    }
}

#[test]
fn a_seed_gives_the_same_run_each_time() {
    for seed in [1, 2, 3] {
        let (first, second) = (run(seed, None, true), run(seed, None, true));
        assert_eq!((first.hash, first.events), (second.hash, second.events));
        assert!(first.events > 1000, "{}", first.events);
    }
    assert_ne!(run(1, None, true).hash, run(2, None, true).hash);
}

#[test]
fn every_broken_rule_is_found_by_some_seed() {
    for broken in Broken::every() {
        assert!(total(SEEDS, Some(broken)).failed().is_some(), "{} is not found", broken.name());
    }
}

#[test]
fn the_oracle_sees_a_page_that_differs_and_answers_that_cannot_be() {
    let position = Position { incarnation: 0, at: 1, handover: false };
    let mut oracle = Oracle::default();
    let ram = memory::new();
    memory::write(&ram, PAGES - 1, 511, 7);
    oracle.sealed(position, EpochId(7), &ram);
    let passed = memory::snapshot(&ram);
    assert_eq!(oracle.committed(position, None, &ram), Ok(()));
    assert_eq!(oracle.started(position, &ram), Ok(EpochId(7)));
    memory::write(&ram, PAGES - 1, 511, 8);
    assert!(oracle.committed(position, None, &ram).is_err());
    assert!(oracle.started(position, &ram).is_err());
    assert_eq!(oracle.committed(position, Some(&passed), &ram), Ok(()));
    let differs = memory::snapshot(&ram);
    assert!(oracle.committed(position, Some(&differs), &ram).is_err());

    let request = oracle.begins(0);
    let answer = |request, total| Output::Response { client: 0, request, total };
    assert!(oracle.left(answer(request + 1, 1)).is_err(), "nobody asked");
    assert!(oracle.left(answer(request, 2)).is_err(), "more than were ever asked");
    let mut oracle = Oracle::default();
    oracle.begins(0);
    assert_eq!(oracle.left(answer(1, 1)), Ok(()));
    oracle.begins(0);
    assert!(oracle.left(answer(2, 0)).is_err(), "what was answered is forgotten");
    assert_eq!(oracle.left(Output::Line(1)), Ok(()));
    assert!(oracle.left(Output::Line(3)).is_err(), "a line is missing");
}

#[test]
fn the_oracle_sees_a_sum_that_falls_behind_one_that_somebody_was_told() {
    let answer = |client, request, total| Output::Response { client, request, total };
    let mut oracle = Oracle::default();
    oracle.begins(0);
    oracle.begins(1);
    // Of client 0's request nobody was told but by this sum.
    assert_eq!(oracle.left(answer(1, 1, 2)), Ok(()));
    oracle.begins(1);
    let counted_once = oracle.left(answer(1, 2, 2));
    assert!(counted_once.is_err(), "the request of client 0 was counted, and is no more");

    let mut oracle = Oracle::default();
    for client in 0..3 {
        oracle.begins(client);
    }
    assert_eq!(oracle.left(answer(1, 1, 3)), Ok(()));
    assert_eq!(oracle.left(answer(0, 1, 1)), Ok(()), "asked before: its answer may be late");
    oracle.begins(0);
    assert_eq!(oracle.left(answer(0, 2, 4)), Ok(()));
}
