//! What the guest gets done, protected and unprotected, by its own clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use replication::ram::PageSet;
use understudy_tests::interrupt::Folder;
use understudy_tests::pair::Setup;
use understudy_tests::serial::Serial;
use vmm::machine::{Machine, MachineError};

use crate::Effort;
use crate::bare::Bare;
use crate::floor::boot;
use crate::row::{Bound, FLOOR, OURS, Row};
use crate::samples::{Samples, float};

const UNIT: &str = "Mops/s";
const BARE: &str = "bare";
const TICK_MS: u64 = 100;
const MEMORY_MIB: u64 = 64;
const EPOCH_MS: u64 = 25;
const EPOCH: Duration = Duration::from_millis(EPOCH_MS);
/// Epochs that do not stretch, whatever the guest does.
const FIXED: &str = "25 ms";
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

/// A machine in this process of which nothing is done but reading its dirty pages once in each
/// epoch: what tracking them alone costs the guest, a fault for each page.
struct Tracked {
    machine: Arc<Machine>,
    serial: Serial,
    _folder: Folder,
    rates: Samples,
}

impl Tracked {
    fn start(setup: &Setup) -> Result<Self> {
        let folder = Folder::new()?;
        let (machine, serial) = boot(&folder, &setup.command_line, setup.vcpus, MEMORY_MIB << 20)?;
        serial.wait_more("compute ops=", 3, START_LIMIT)?;
        machine.set_tracking(true)?;
        machine.pause()?;
        Ok(Self { machine: Arc::new(machine), serial, _folder: folder, rates: Samples::default() })
    }

    fn turn(&mut self, window: Duration) -> Result<()> {
        let ends = Arc::new(AtomicBool::new(false));
        let (machine, ended) = (Arc::clone(&self.machine), Arc::clone(&ends));
        self.machine.resume()?;
        let reads = std::thread::spawn(move || {
            let mut dirty = PageSet::new(machine.memory().ram().pages());
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(EPOCH);
                dirty.clear();
                machine.harvest(&mut dirty)?;
            }
            Ok::<_, MachineError>(())
        });
        let rates = rates(&self.serial, window);
        ends.store(true, Ordering::Relaxed);
        let read = reads.join().map_err(|_| anyhow!("the reader of dirty pages panicked"))?;
        read?;
        self.machine.pause()?;
        self.rates.add(rates?);
        Ok(())
    }
}

/// Tracked, bare and protected by turns, the last two in one VM.
fn measure(effort: &Effort, mut row: Row, vcpus: u32, workload: &str, least: f64) -> Result<Row> {
    // A first sync competes with the vCPUs, and there is one in each turn: a small memory.
    let mut setup = Setup::verify(vcpus, &format!("{MEMORY_MIB}M"));
    setup.command_line = format!("vcpus={vcpus} tick_ms={TICK_MS} workload=count+{workload}");
    setup.replicate_options = ",console_output=pass".into();
    let mut tracked = Tracked::start(&setup)?;
    let mut machine = Bare::start(setup)?;
    // All processors are there and at work.
    machine.serial.wait_more("compute ops=", 3, START_LIMIT)?;
    let [mut bare, mut fixed, mut protected] = <[Samples; 3]>::default();
    let (mut pages, mut pauses) = <(Samples, Samples)>::default();
    let window = Duration::from_secs(effort.seconds);
    for _ in 0..effort.turns {
        machine.primary.put_ok("vm.pause", None)?;
        tracked.turn(window)?;
        machine.primary.put_ok("vm.resume", None)?;
        bare.add(rates(&machine.serial, window)?);
        machine.protect_with("epoch_max_ms", EPOCH_MS)?;
        fixed.add(rates(&machine.serial, window)?);
        machine.set_free()?;
        machine.protect()?;
        protected.add(rates(&machine.serial, window)?);
        let info = machine.primary.replication()?;
        pages.add(vec![float(info.dirty_pages.p50)]);
        pauses.add(vec![float(info.pause_us.p50)]);
        machine.set_free()?;
    }
    row.column(FLOOR, &tracked.rates);
    row.column(BARE, &bare);
    row.column(FIXED, &fixed);
    row.column(OURS, &protected);
    let [pages, pause_us] = [pages, pauses].map(|samples| samples.median().unwrap_or(0.0));
    row.note(format!(
        "{pages:.0} pages an epoch, for which the guest stood still {pause_us:.0} us"
    ));
    row.check_medians(FIXED, BARE, Bound::AtLeast(least));
    row.check_medians(OURS, BARE, Bound::AtLeast(least));
    row.note("floor: dirty pages are tracked and read each 25 ms, and nothing else is done");
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
