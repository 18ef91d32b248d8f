//! What an idle guest costs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use understudy_tests::pair::Setup;
use understudy_tests::process::Vmm;

use crate::Effort;
use crate::bare::Bare;
use crate::row::{Bound, OURS, Row};
use crate::samples::{Samples, float};

const BARE: &str = "bare";
const BACKUP: &str = "backup";

pub fn idle(effort: &Effort) -> Result<Row> {
    let mut row = Row::new("idle", "an idle guest, 1 vCPU, 256 MiB", "% of a core");
    let mut setup = Setup::verify(1, "256M");
    // Neither ticks nor naps: output and changed memory are needs for an epoch.
    setup.command_line = "workload=idle vcpus=1 tick_ms=3600000 nap_ms=3600000".into();
    let mut machine = Bare::start(setup)?;
    // It says so once, and what it said before anybody was connected to its port is lost.
    let mark = machine.serial.mark();
    machine.primary.put_ok("vm.reboot", None)?;
    machine.serial.wait_after(mark, "ready", 1, Duration::from_secs(60))?;
    let window = Duration::from_secs(effort.seconds * 2);
    let (mut bare, mut ours, mut backup) = <(Samples, Samples, Samples)>::default();
    let mut epochs = Samples::default();
    for _ in 0..2 {
        bare.add(loads([&machine.primary], window)?.to_vec());
        machine.protect()?;
        // Until what the sync has stirred up is over.
        std::thread::sleep(Duration::from_millis(500));
        let before = machine.primary.replication()?.epoch_sealed;
        let [primary_load, backup_load] = loads([&machine.primary, &machine.backup], window)?;
        let sealed = machine.primary.replication()?.epoch_sealed - before;
        let needed = window.as_secs() + 1;
        ours.add(vec![primary_load]);
        backup.add(vec![backup_load]);
        epochs.add(vec![float(sealed.saturating_sub(needed))]);
        machine.set_free()?;
    }
    row.column(BARE, &bare);
    row.column(BACKUP, &backup);
    row.column(OURS, &ours);
    row.check("primary", ours.median(), Bound::AtMost(1.0));
    row.check("backup", backup.median(), Bound::AtMost(1.0));
    row.check("epochs without need", epochs.median(), Bound::AtMost(0.0));
    row.note(format!("windows of {} s; bare: the primary without protection", window.as_secs()));
    row.note("the guest wakes up once a second, and writes memory then: such an epoch is needed");
    Ok(row)
}

/// The share of a core that each process takes, in percent.
fn loads<const N: usize>(vmms: [&Vmm; N], window: Duration) -> Result<[f64; N]> {
    let start = Instant::now();
    let mut before = [0.0; N];
    for (vmm, time) in vmms.iter().zip(&mut before) {
        *time = cpu_seconds(vmm.pid())?;
    }
    std::thread::sleep(window);
    let mut loads = [0.0; N];
    for ((vmm, load), before) in vmms.iter().zip(&mut loads).zip(before) {
        *load = 100.0 * (cpu_seconds(vmm.pid())? - before) / start.elapsed().as_secs_f64();
    }
    Ok(loads)
}

/// Of all its threads, those that have ended, too; from the scheduler's own count: ticks are too coarse for 1 %.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let pid = Pid::from_raw(pid.try_into()?);
    let clock = clock_getcpuclockid(pid).context("cannot read a process's processor time")?;
    Ok(Duration::from(clock_gettime(clock)?).as_secs_f64())
}
