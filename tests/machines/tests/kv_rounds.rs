//! One round of each kind with the key-value workload: a pair serves clients over its taps, is
//! struck once, and everything that the clients saw is judged. Needs root and /dev/net/tun.

use std::time::Duration;

use anyhow::{Result, ensure};
use understudy_tests::kv::round::{self, Blow, Disk, Outcome, Plan};
use understudy_tests::kv::violation::Violation;

fn plan(blow: Blow, disk: Disk) -> Plan {
    Plan {
        blow,
        clients: 8,
        seed: 11,
        disk,
        protected_for: Duration::from_millis(300),
        is_bare_first: false,
        silence_limit: Duration::from_secs(20),
    }
}

/// A round in which nothing is wrong.
fn passes(plan: &Plan, options: &str) -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let mut setup = round::setup(folder.path(), 1, "64M", plan.disk)?;
    setup.replicate_options.push_str(options);
    setup.receive_options = options.to_owned();
    let outcome = round::run(folder.path(), &setup, plan)?;
    let found: Vec<String> = outcome.violations.iter().map(Violation::chain).collect();
    ensure!(found.is_empty(), "{found:#?}");
    ensure!(outcome.figures.writes > 100, "{outcome:?}");
    ensure!(outcome.extent.is_some_and(|extent| extent.keys > 8), "{outcome:?}");
    Ok(outcome)
}

/// Peers that nobody freezes are not to be suspected, however busy the machine.
const PATIENT: &str = ",timeout_ms=20000";

#[test]
fn clients_outlive_a_killed_primary() -> Result<()> {
    let outcome = passes(&plan(Blow::KillPrimary, Disk::Shared), PATIENT)?;
    ensure!(outcome.takeover_us.is_some(), "{outcome:?}");
    Ok(())
}

/// Protection is switched on while the clients are at work: nothing of it may reach them.
#[test]
fn clients_outlive_the_switch_to_protection_and_a_killed_primary() -> Result<()> {
    let mut plan = plan(Blow::KillPrimary, Disk::Replicated);
    plan.is_bare_first = true;
    let outcome = passes(&plan, PATIENT)?;
    ensure!(outcome.takeover_us.is_some(), "{outcome:?}");
    ensure!(outcome.figures.bare.is_some_and(|bare| bare.p50_us > 0), "{outcome:?}");
    Ok(())
}

#[test]
fn clients_outlive_a_killed_backup() -> Result<()> {
    passes(&plan(Blow::KillBackup, Disk::Replicated), PATIENT).map(|_| ())
}

#[test]
fn clients_outlive_a_frozen_primary_that_wakes() -> Result<()> {
    let outcome = passes(&plan(Blow::StopPrimary, Disk::None), ",timeout_ms=2000")?;
    ensure!(outcome.late_frames.is_some(), "{outcome:?}");
    Ok(())
}

/// A frozen primary keeps the lock of the image that both use: its backup waits for it.
#[test]
fn clients_outlive_a_frozen_primary_that_holds_the_image() -> Result<()> {
    let outcome = passes(&plan(Blow::StopPrimary, Disk::Shared), ",timeout_ms=2000")?;
    ensure!(outcome.takeover_us.is_some(), "{outcome:?}");
    Ok(())
}

/// The checker's own proof: a guest that stands still after the blow is found out.
#[test]
fn a_guest_that_stands_still_is_found_out() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut plan = plan(Blow::KillBackup, Disk::None);
    plan.silence_limit = Duration::from_secs(3);
    let mut setup = round::setup(folder.path(), 1, "64M", plan.disk)?;
    setup.replicate_options.push_str(",degrade=pause,timeout_ms=20000");
    setup.receive_options.push_str(PATIENT);
    let found = round::run(folder.path(), &setup, &plan)?.violations;
    let is_silent = |violation: &Violation| matches!(violation, Violation::Silent { .. });
    ensure!(found.iter().any(is_silent), "{found:?}");
    Ok(())
}

/// The checker's own proof: frames that leave before their epoch is committed are found out. There
/// is no disk, whose own gate would hold the answers to writes, and whose flushes would end epochs.
#[test]
fn output_without_a_gate_is_found_out() -> Result<()> {
    let is_lost = |violation: &Violation| matches!(violation, Violation::NotLinearizable { .. });
    for seed in 0..5 {
        let folder = tempfile::tempdir()?;
        let mut plan = plan(Blow::KillPrimary, Disk::None);
        (plan.seed, plan.silence_limit) = (seed, Duration::from_secs(3));
        let mut setup = round::setup(folder.path(), 1, "64M", plan.disk)?;
        setup.primary_environment.push(("UNDERSTUDY_TEST_BREAK".into(), "net-gate".into()));
        if round::run(folder.path(), &setup, &plan)?.violations.iter().any(is_lost) {
            return Ok(());
        }
    }
    anyhow::bail!("nothing was found in 5 rounds")
}
