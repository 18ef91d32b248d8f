//! What the guest gets done, protected and unprotected, by its own clock.

use std::time::Duration;

use anyhow::{Context, Result};
use understudy_tests::pair::Setup;
use understudy_tests::serial::Serial;

use crate::Effort;
use crate::bare::Bare;
use crate::row::{Bound, OURS, Row};
use crate::samples::{Samples, float};

const UNIT: &str = "Mops/s";
const BARE: &str = "bare";
const TICK_MS: u64 = 100;
const START_LIMIT: Duration = Duration::from_secs(60);
/// Until first epochs and the end of a sync are over.
const SETTLE: Duration = Duration::from_millis(300);

pub fn compute_1(effort: &Effort) -> Result<Row> {
    let row = Row::new("rate-compute-1", "computing, 1 vCPU, 25 ms epochs", UNIT);
    measure(effort, row, 1, "compute", 0.97)
}

pub fn compute_16(effort: &Effort) -> Result<Row> {
    let row = Row::new("rate-compute-16", "computing, 16 vCPUs, 25 ms epochs", UNIT);
    measure(effort, row, 16, "compute", 0.90)
}

pub fn thousand(effort: &Effort) -> Result<Row> {
    let what = "computing while 1,000 scattered pages are rewritten each 25 ms, 1 vCPU";
    let row = Row::new("rate-1k-pages", what, UNIT);
    let workload = "compute+dirty dirty_set=1000 dirty_period_ms=25 dirty_fill=set";
    measure(effort, row, 1, workload, 0.90)
}

/// Bare and protected by turns, in one VM.
fn measure(effort: &Effort, mut row: Row, vcpus: u32, workload: &str, least: f64) -> Result<Row> {
    // A first sync competes with the vCPUs, and there is one in each turn: a small memory.
    let mut setup = Setup::verify(vcpus, "64M");
    setup.command_line = format!("vcpus={vcpus} tick_ms={TICK_MS} workload=count+{workload}");
    setup.replicate_options = ",console_output=pass".into();
    let mut machine = Bare::start(setup)?;
    // All processors are there and at work.
    machine.serial.wait_more("compute ops=", 3, START_LIMIT)?;
    let (mut bare, mut protected) = (Samples::default(), Samples::default());
    let (mut pages, mut pauses) = <(Samples, Samples)>::default();
    let window = Duration::from_secs(effort.seconds);
    for _ in 0..effort.turns {
        bare.add(rates(&machine.serial, window)?);
        machine.protect()?;
        protected.add(rates(&machine.serial, window)?);
        let info = machine.primary.replication()?;
        pages.add(vec![float(info.dirty_pages.p50)]);
        pauses.add(vec![float(info.pause_us.p50)]);
        machine.set_free()?;
    }
    row.column(BARE, &bare);
    row.column(OURS, &protected);
    let [pages, pause_us] = [pages, pauses].map(|samples| samples.median().unwrap_or(0.0));
    row.note(format!(
        "{pages:.0} pages an epoch, for which the guest stood still {pause_us:.0} us"
    ));
    row.check_medians(OURS, BARE, Bound::AtLeast(least));
    Ok(row)
}

/// Operations of each tick of a window, in millions a second of the guest's clock.
fn rates(serial: &Serial, window: Duration) -> Result<Vec<f64>> {
    std::thread::sleep(SETTLE);
    let mark = serial.mark();
    std::thread::sleep(window);
    let lines = serial.lines();
    let points = points(lines.get(mark..).unwrap_or_default());
    let pairs = points.windows(2).filter(|pair| pair[1].0 > pair[0].0);
    let rates: Vec<f64> = pairs
        .map(|pair| float(pair[1].1 - pair[0].1) / float(pair[1].0 - pair[0].0) / 1000.0)
        .collect();
    rates.first().context("the guest said nothing")?;
    Ok(rates)
}

/// The guest's milliseconds and its operations so far, of each tick that says both.
fn points(lines: &[String]) -> Vec<(u64, u64)> {
    let number = |line: &str, key: &str| {
        let (_, rest) = line.split_once(key)?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    };
    let mut time_ms = None;
    let mut points = Vec::new();
    for line in lines {
        if line.starts_with("tick ") {
            time_ms = number(line, "tsc_ms ");
        } else if line.starts_with("compute ")
            && let (Some(time_ms), Some(total)) = (time_ms.take(), number(line, "total="))
        {
            points.push((time_ms, total));
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_s_time_and_its_operations_belong_together() {
        let lines = [
            "compute ops=1 total=1 tick=1",
            "tick 2 tsc_ms 200",
            "compute ops=4 total=5 vcpu_avg=5 tick=2",
            "standstill_us max=3 count>1ms=0",
            "tick 3 tsc_ms 310",
            "compute ops=4 total=9 vcpu_avg=9 tick=3",
            "tick 4 tsc_ms 400",
        ];
        assert_eq!(points(&lines.map(str::to_owned)), [(200, 5), (310, 9)]);
    }
}
