//! What goes over the wire.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::replication::ReplicationInfo;
use understudy_tests::interrupt::Folder;
use understudy_tests::network::Namespace;
use understudy_tests::pair::{Pair, Setup};

use crate::Effort;
use crate::row::{Bound, FLOOR, OURS, Row};
use crate::samples::{Samples, float};
use crate::turns::is_built;

const LIMIT: Duration = Duration::from_secs(180);
/// Of the link that is slower than the guest.
const LINK_MBIT: u64 = 400;

pub fn delta(effort: &Effort) -> Result<Row> {
    let what = "bytes on the wire for each byte of an epoch whose pages have 64 bytes changed";
    let mut row = Row::new("wire-64-bytes", what, "bytes/byte");
    let mut none = Samples::default();
    none.add(vec![sent_of_raw(effort, ",compression=none")?]);
    row.column("none", &none);
    if is_built(",compression=delta") {
        let mut delta = Samples::default();
        delta.add(vec![sent_of_raw(effort, ",compression=delta")?]);
        row.column(OURS, &delta);
    } else {
        row.note("compression=delta is not built");
    }
    row.check("delta", row.stats(OURS).map(|stats| stats.median), Bound::AtMost(0.1));
    Ok(row)
}

/// Bytes sent over bytes of pages and state, over a window of epochs.
fn sent_of_raw(effort: &Effort, options: &str) -> Result<f64> {
    let folder = Folder::new()?;
    let mut setup = Setup::verify(1, "256M");
    setup.command_line = "workload=dirty vcpus=1 tick_ms=250 dirty_set=1000 dirty_period_ms=20 \
                          dirty_bytes=64 dirty_fill=set"
        .into();
    setup.replicate_options = format!(",console_output=pass{options}");
    let mut pair = Pair::start(folder.path(), &setup)?;
    pair.primary_serial.wait_line("'filled'", 0, LIMIT, |line| line.contains("filled"))?;
    let before = pair.wait_protected(LIMIT)?;
    std::thread::sleep(Duration::from_secs(effort.seconds));
    let after = pair.primary.replication()?;
    let more = |of: fn(&ReplicationInfo) -> u64| float(of(&after) - of(&before));
    Ok(more(|info| info.bytes_sent) / more(|info| info.bytes_raw).max(1.0))
}

pub fn slow_link(effort: &Effort) -> Result<Row> {
    let what = format!("streaming writes over a link of {LINK_MBIT} Mbit/s");
    let row = Row::new("slow-link", what, "MB/s");
    if !effort.is_full && !effort.is_named {
        return Ok(row.not_run("with --full, or by its name"));
    }
    let link = Namespace::new()?;
    // The VMMs live no longer than the thread that starts them, and are in its namespace.
    link.within(|| in_namespace(effort, row))?
}

fn in_namespace(effort: &Effort, mut row: Row) -> Result<Row> {
    let bytes_per_s = LINK_MBIT * 125_000;
    // Both ways share it, and one of them is acknowledgements only.
    let shape = format!("qdisc add dev lo root tbf rate {LINK_MBIT}mbit burst 1mb latency 50ms");
    let output = Command::new("tc").args(shape.split(' ')).output().context("Cannot run 'tc'")?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(output.status.success(), "tc {shape}: {said}");
    let folder = Folder::new()?;
    let mut setup = Setup::verify(1, "128M");
    // Pages that have to cross the link as they are.
    setup.command_line = "workload=dirty vcpus=1 tick_ms=200 dirty_fill=all".into();
    setup.replicate_options = ",console_output=pass,compression=none".into();
    let mut pair = Pair::start(folder.path(), &setup)?;
    pair.primary_serial.wait_line("'filled'", 0, LIMIT, |line| line.contains("filled"))?;
    let mut before = pair.wait_protected(LIMIT)?;
    let mark = pair.primary_serial.mark();
    let mut useful = Samples::default();
    for _ in 0..effort.turns {
        let start = Instant::now();
        std::thread::sleep(Duration::from_secs(effort.seconds.max(5)));
        let after = pair.primary.replication()?;
        let bytes = after.bytes_raw - before.bytes_raw;
        useful.add(vec![float(bytes) / start.elapsed().as_secs_f64() / 1e6]);
        before = after;
    }
    let mut link = Samples::default();
    link.add(vec![float(bytes_per_s) / 1e6]);
    row.column(FLOOR, &link);
    row.column(OURS, &useful);
    row.check_medians(OURS, FLOOR, Bound::AtLeast(0.85));
    let lines = pair.primary_serial.lines();
    let said = Said::of(lines.get(mark..).unwrap_or_default());
    let evenness = said.as_ref().map(|said| said.least_per_s / said.per_s.max(1.0));
    row.check("least tick / median tick", evenness, Bound::AtLeast(0.5));
    row.note(said.map_or_else(|| "the guest said nothing".into(), |said| said.note()));
    row.note(format!(
        "pause p50 {:.1} ms, p99 {:.1} ms, {} pages an epoch",
        float(before.pause_us.p50) / 1000.0,
        float(before.pause_us.p99) / 1000.0,
        before.dirty_pages.p50
    ));
    Ok(row)
}

/// How evenly the guest went on.
struct Said {
    per_s: f64,
    /// In the tick in which it wrote the least.
    least_per_s: f64,
    /// In the tick in which the VM became protected, which does not count.
    first_per_s: f64,
    stood_ms: f64,
    ticks: usize,
    /// Ticks with less than half of the median.
    slow: usize,
}

impl Said {
    fn of(lines: &[String]) -> Option<Self> {
        let number = |line: &String, key: &str| {
            let (_, rest) = line.split_once(key)?;
            rest.split_whitespace().next()?.parse::<u64>().ok().map(float)
        };
        let all = |key| lines.iter().filter_map(move |line| number(line, key));
        // The first tick began before the VM was protected.
        let first_per_s = all("per_s=").next()?;
        let (mut rates, mut stood) = (Samples::default(), Samples::default());
        let each: Vec<f64> = all("per_s=").skip(1).collect();
        rates.add(each.clone());
        stood.add(all("standstill_us max=").skip(1).collect());
        let (rates, stood) = (rates.stats()?, stood.stats()?);
        let stood_ms = stood.max / 1000.0;
        let slow = each.iter().filter(|rate| **rate < rates.median / 2.0).count();
        let (per_s, least_per_s, ticks) = (rates.median, rates.min, each.len());
        Some(Self { per_s, least_per_s, first_per_s, stood_ms, ticks, slow })
    }

    fn note(&self) -> String {
        let Self { per_s, least_per_s, first_per_s, stood_ms, ticks, slow } = self;
        format!(
            "the guest wrote {per_s:.0} pages/s (least in a tick {least_per_s:.0}, less than half in {slow} of \
             {ticks} ticks of 200 ms; {first_per_s:.0} in that in which it became protected), and stood still for \
             {stood_ms:.0} ms at most"
        )
    }
}

/// A pair whose guest writes pages flat out in its turns.
struct Stream {
    pair: Pair,
    _folder: Folder,
    /// Pages and state before encoding, in MB a second.
    rates: Samples,
}

impl Stream {
    fn start(options: &str) -> Result<Self> {
        let folder = Folder::new()?;
        let mut setup = Setup::verify(1, "128M");
        setup.command_line = "workload=dirty vcpus=1 tick_ms=250 dirty_fill=all".into();
        setup.replicate_options = format!(",console_output=pass{options}");
        let mut pair = Pair::start(folder.path(), &setup)?;
        pair.primary_serial.wait_line("'filled'", 0, LIMIT, |line| line.contains("filled"))?;
        pair.wait_protected(LIMIT)?;
        pair.primary.put_ok("vm.pause", None)?;
        Ok(Self { pair, _folder: folder, rates: Samples::default() })
    }

    fn turn(&mut self, seconds: u64) -> Result<()> {
        self.pair.primary.put_ok("vm.resume", None)?;
        // What was measured of the link in the last turn is found out again.
        std::thread::sleep(Duration::from_secs(1));
        let mut rates = vec![];
        for _ in 0..seconds {
            let (start, before) = (Instant::now(), self.pair.primary.replication()?);
            std::thread::sleep(Duration::from_secs(1));
            let after = self.pair.primary.replication()?;
            let bytes = float(after.bytes_raw - before.bytes_raw);
            rates.push(bytes / start.elapsed().as_secs_f64() / 1e6);
        }
        self.pair.primary.put_ok("vm.pause", None)?;
        self.rates.add(rates);
        Ok(())
    }
}

/// What choosing costs where nothing is to be gained: noise, and a link that is faster than any encoding.
pub fn auto(effort: &Effort) -> Result<Row> {
    let what = "streaming writes of noise over the loopback, compression=auto and none";
    let mut row = Row::new("auto-fast-link", what, "MB/s");
    let mut none = Stream::start(",compression=none")?;
    let mut ours = Stream::start(",compression=auto")?;
    for _ in 0..effort.turns {
        none.turn(effort.seconds)?;
        ours.turn(effort.seconds)?;
    }
    row.column("none", &none.rates);
    row.column(OURS, &ours.rates);
    row.check_medians(OURS, "none", Bound::AtLeast(0.95));
    Ok(row)
}
