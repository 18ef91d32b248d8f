//! What clients and the world feel: request latency, and how long a take-over takes.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use api::replication::TIMEOUT_MS_DEFAULT;
use understudy_tests::interrupt::Folder;
use understudy_tests::kv::round::{self as kv, Blow, Disk, Outcome, Plan};
use understudy_tests::pair::Setup;
use understudy_tests::round;

use crate::Effort;
use crate::row::{Bound, OURS, Row};
use crate::samples::{Samples, float};

const BARE: &str = "bare";
const SILENCE_LIMIT: Duration = Duration::from_secs(20);

fn ms(us: u64) -> f64 {
    float(us) / 1000.0
}

/// Why rounds with clients cannot run here.
fn problem() -> Option<&'static str> {
    (!Path::new("/dev/net/tun").exists()).then_some("this needs root and /dev/net/tun")
}

fn kv_round(effort: &Effort, blow: Blow, is_bare_first: bool, seed: u64) -> Result<Outcome> {
    let folder = Folder::new()?;
    let setup = kv::setup(folder.path(), 1, "256M", Disk::None)?;
    let plan = Plan {
        blow,
        // One at a time: what is measured is an answer, not a queue of them.
        clients: 1,
        seed,
        disk: Disk::None,
        protected_for: Duration::from_secs(effort.seconds),
        is_bare_first,
        silence_limit: SILENCE_LIMIT,
    };
    kv::run(folder.path(), &setup, &plan)
}

pub fn latency(effort: &Effort) -> Result<Row> {
    let what = "requests to the guest's TCP server, one client, protected and bare in one round";
    let mut row = Row::new("latency", what, "ms");
    if let Some(problem) = problem() {
        return Ok(row.not_run(problem));
    }
    let (mut bare, mut ours) = (Samples::default(), Samples::default());
    let (mut median, mut p99) = (Samples::default(), Samples::default());
    for seed in 0..if effort.is_full { 5 } else { 2 } {
        let figures = kv_round(effort, Blow::KillBackup, true, seed)?.figures;
        let Some(without) = figures.bare else { continue };
        bare.add(vec![ms(without.p50_us)]);
        ours.add(vec![ms(figures.protected.p50_us)]);
        median.add(vec![ms(figures.protected.p50_us) - ms(without.p50_us)]);
        p99.add(vec![ms(figures.protected.p99_us) - ms(without.p99_us)]);
        row.note(format!(
            "p50 {} bare, {} protected; p99 {} bare, {} protected; {} answers",
            ms(without.p50_us),
            ms(figures.protected.p50_us),
            ms(without.p99_us),
            ms(figures.protected.p99_us),
            figures.answered
        ));
    }
    row.column(BARE, &bare);
    row.column(OURS, &ours);
    row.check("ours - bare, p50", median.median(), Bound::AtMost(2.0));
    row.check("ours - bare, p99", p99.median(), Bound::AtMost(8.0));
    Ok(row)
}

pub fn kill(effort: &Effort) -> Result<Row> {
    let what = "take-over after SIGKILL of the primary, to the guest's next output";
    let mut row = Row::new("takeover-kill", what, "ms");
    let mut samples = Samples::default();
    let mut steps: [Samples; 3] = Default::default();
    for number in 0..if effort.is_full { 10 } else { 3 } {
        let folder = Folder::new()?;
        let setup = Setup::verify(2, "256M");
        // Not always at the same moment of an epoch.
        let protected_for = Duration::from_millis(300 + 17 * number);
        let outcome = round::run(folder.path(), &setup, protected_for, &mut ())?;
        samples.add(vec![ms(outcome.first_output_us)]);
        let times = [outcome.detected_us, outcome.owned_us, outcome.resumed_us];
        steps.iter_mut().zip(times).for_each(|(step, us)| step.add(vec![ms(us)]));
    }
    row.column(OURS, &samples);
    let [detected, owned, resumed] = steps.map(|step| step.median().unwrap_or(0.0));
    row.note(format!(
        "detected {detected:.1}, owned {owned:.1}, resumed {resumed:.1} ms (medians)"
    ));
    row.check("median", samples.median(), Bound::AtMost(50.0));
    Ok(row)
}

pub fn silence(effort: &Effort) -> Result<Row> {
    let what =
        "take-over after SIGSTOP of the primary, less the time-out, to the guest's next output";
    let mut row = Row::new("takeover-silence", what, "ms");
    let mut samples = Samples::default();
    for number in 0..if effort.is_full { 5 } else { 3 } {
        let folder = Folder::new()?;
        let setup = Setup::verify(2, "256M");
        let protected_for = Duration::from_millis(300 + 17 * number);
        let outcome =
            round::run_by(round::Blow::Stop, folder.path(), &setup, protected_for, &mut ())?;
        samples.add(vec![ms(outcome.first_output_us) - float(TIMEOUT_MS_DEFAULT)]);
        row.note(format!(
            "detected {:.1}, owned {:.1}, resumed {:.1}, first output {:.1} ms after the signal",
            ms(outcome.detected_us),
            ms(outcome.owned_us),
            ms(outcome.resumed_us),
            ms(outcome.first_output_us)
        ));
    }
    row.column(OURS, &samples);
    row.check("output - time-out", samples.median(), Bound::AtMost(50.0));
    Ok(row)
}
