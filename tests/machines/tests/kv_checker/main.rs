//! The checker of the key-value rounds against servers that are right, or broken in one way: what
//! is right passes, and each fault is found for what it is. Needs neither KVM nor root.

mod server;

use std::time::Duration;

use anyhow::{Result, ensure};
use server::{Fault, Server};
use understudy_tests::kv::client::Client;
use understudy_tests::kv::crowd::{Crowd, Plan};
use understudy_tests::kv::judge::{Verdict, judge};
use understudy_tests::kv::violation::Violation;

const CLIENTS: u32 = 8;
const ANSWERS: u64 = 300;
/// A write that is lost shows only if it is read before the next one: about one in three.
const FAULTS: u64 = 60;
const LIMIT: Duration = Duration::from_secs(60);
/// A test that waits for silence waits so long.
const SILENCE_LIMIT: Duration = Duration::from_secs(2);

/// A crowd at a server with this fault, and all checks.
fn verdict(fault: Fault) -> Result<Verdict> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(fault)?;
    let plan =
        Plan { clients: CLIENTS, address: server.address, silence_limit: SILENCE_LIMIT, seed: 7 };
    let crowd = Crowd::start(&plan, None)?;
    crowd.wait_answers(ANSWERS, LIMIT)?;
    while fault.is_in_answers() && !crowd.has_failed() && server.faults() < FAULTS {
        crowd.wait_answers(1, LIMIT)?;
    }
    let mut seen = crowd.finish();
    seen.read_back(|sequence| Client::connect(CLIENTS, plan.address, SILENCE_LIMIT, sequence))?;
    let image = folder.path().join("image");
    server.write_image(&image)?;
    let mut verdict = judge(&seen.operations, Some(&image))?;
    verdict.violations.splice(0..0, seen.violations);
    Ok(verdict)
}

/// The fault is found, and told as what it is.
fn finds(fault: Fault, is_it: impl Fn(&Violation) -> bool) -> Result<()> {
    let found = verdict(fault)?.violations;
    let said: Vec<String> = found.iter().map(Violation::chain).collect();
    ensure!(found.iter().any(is_it), "{fault:?}: {said:#?}");
    Ok(())
}

#[test]
fn a_right_server_passes() -> Result<()> {
    let verdict = verdict(Fault::None)?;
    ensure!(verdict.violations.is_empty(), "{:?}", verdict.violations);
    ensure!(verdict.extent.is_some_and(|extent| extent.keys > 8), "{verdict:?}");
    ensure!(verdict.records.is_some_and(|records| records > 100), "{verdict:?}");
    Ok(())
}

#[test]
fn a_forgotten_write_is_found() -> Result<()> {
    finds(Fault::ForgetsWrites, |found| matches!(found, Violation::NotLinearizable { .. }))?;
    // The log has it, and the reads do not.
    finds(Fault::ForgetsWrites, |found| matches!(found, Violation::Read { .. }))
}

#[test]
fn a_stale_read_is_found() -> Result<()> {
    finds(Fault::ReadsStale, |found| matches!(found, Violation::NotLinearizable { .. }))
}

#[test]
fn answers_out_of_sequence_are_found() -> Result<()> {
    finds(Fault::SwapsAnswers, |found| matches!(found, Violation::OutOfSequence { .. }))?;
    finds(Fault::AnswersTwice, |found| {
        matches!(found, Violation::OutOfSequence { .. } | Violation::Surplus { .. })
    })
}

#[test]
fn connections_that_end_or_fall_silent_are_found() -> Result<()> {
    finds(Fault::ClosesConnections, |found| matches!(found, Violation::Closed { .. }))?;
    finds(Fault::Falls, |found| matches!(found, Violation::Silent { .. }))
}

#[test]
fn a_refused_write_is_found() -> Result<()> {
    finds(Fault::RefusesWrites, |found| matches!(found, Violation::Refused { .. }))
}

#[test]
fn a_damaged_log_is_found() -> Result<()> {
    finds(Fault::SkipsRecords, |found| matches!(found, Violation::Lost { .. }))?;
    finds(Fault::LosesSector, |found| matches!(found, Violation::Hole { number: 11 }))?;
    finds(Fault::TearsSector, |found| matches!(found, Violation::Damaged { number: 11, .. }))?;
    finds(Fault::ReordersLog, |found| matches!(found, Violation::Order { .. }))
}
