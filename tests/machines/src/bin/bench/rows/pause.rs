//! How long the guest stands still for an epoch.

use anyhow::Result;
use api::replication::Cow;

use crate::Effort;
use crate::floor::Floor;
use crate::guest::Spec;
use crate::host;
use crate::row::{Bound, FLOOR, OURS, Profile, Row};
use crate::turns::{CAPTURE, Protected, is_built, name};

const UNIT: &str = "us";
const MIB_SMALL: u64 = 1024;
const MIB_LARGE: u64 = 16 * 1024;
/// A first sync takes seconds for each GiB, and many on a busy machine.
const MIB_LARGE_QUICK: u64 = 2 * 1024;
const HYBRID: &str = "hybrid";

pub fn thousand(effort: &Effort) -> Result<Row> {
    let spec = Spec { vcpus: 1, memory_mib: MIB_SMALL, set: 1000, run: 1, sets: 1, epoch_ms: 25 };
    let row = Row::new("pause-1k", "1,000 scattered pages, 1 vCPU, 1 GiB", UNIT);
    let mut row = measure(effort, row, &spec, &[Cow::Off, Cow::Copy])?;
    row.check_medians(OURS, FLOOR, Bound::AtMost(1.5));
    row.check_p99s(OURS, FLOOR, Bound::AtMost(4.0));
    Ok(row)
}

pub fn runs(effort: &Effort) -> Result<Row> {
    let spec =
        Spec { vcpus: 1, memory_mib: MIB_SMALL, set: 10_000, run: 64, sets: 8, epoch_ms: 100 };
    let row = Row::new("pause-10k-runs", "10,000 pages in runs of 64, 1 vCPU, 1 GiB", UNIT);
    let mut row = measure(effort, row, &spec, &[Cow::Off, Cow::Copy])?;
    let ours = if Cow::default() == Cow::Hybrid { OURS } else { HYBRID };
    if !is_built(",cow=hybrid") {
        row.note("hybrid is not built: there is nothing to hold against copy and off");
    }
    row.check_medians(ours, "copy", Bound::AtMost(1.0 / 3.0));
    row.check_medians(ours, "off", Bound::AtMost(1.0 / 8.0));
    Ok(row)
}

pub fn four(effort: &Effort) -> Result<Row> {
    let spec = Spec { vcpus: 4, memory_mib: MIB_SMALL, set: 4000, run: 1, sets: 1, epoch_ms: 25 };
    let row = Row::new("pause-4-vcpus", "4,000 scattered pages, 4 vCPUs, 1 GiB", UNIT);
    several(effort, row, &spec)
}

pub fn sixteen(effort: &Effort) -> Result<Row> {
    let spec =
        Spec { vcpus: 16, memory_mib: MIB_SMALL, set: 16_000, run: 1, sets: 1, epoch_ms: 100 };
    let row = Row::new("pause-16-vcpus", "16,000 scattered pages, 16 vCPUs, 1 GiB", UNIT);
    several(effort, row, &spec)
}

fn several(effort: &Effort, row: Row, spec: &Spec) -> Result<Row> {
    let mut row = measure(effort, row, spec, &[Cow::Off])?;
    row.check_medians(OURS, FLOOR, Bound::AtMost(1.5));
    // The vCPUs are saved beside the harvest and the keeping; the capture waits for what is left.
    let share =
        |label| row.profile(label).map(|profile| profile.us(CAPTURE) / profile.whole_us().max(1.0));
    let (ours, floor) = (share(OURS), share(FLOOR));
    row.check("state / pause", ours, Bound::AtMost(0.2));
    row.note(format!("state / pause of the floor's loop: {:.3}", floor.unwrap_or(0.0)));
    Ok(row)
}

/// Takes turns: the floor, each way to keep pages that this build has, and ours.
fn measure(effort: &Effort, mut row: Row, spec: &Spec, baselines: &[Cow]) -> Result<Row> {
    let mut floor = Floor::start(spec)?;
    let mut kinds: Vec<(&str, Protected)> = Vec::new();
    // A way that is not the default has a column of its own, once it is built.
    for cow in [Cow::Off, Cow::Copy, Cow::Protect, Cow::Hybrid] {
        let is_wanted = baselines.contains(&cow) || !matches!(cow, Cow::Off | Cow::Copy);
        if is_wanted && cow != Cow::default() && is_built(&format!(",cow={}", name(cow))) {
            kinds.push((name(cow), Protected::start(spec, Some(cow))?));
        }
    }
    kinds.push((OURS, Protected::start(spec, None)?));
    for _ in 0..effort.turns {
        floor.turn(effort.pauses, effort.limit)?;
        for (_, pair) in &mut kinds {
            pair.turn(effort.pauses, effort.limit)?;
        }
    }
    row.column(FLOOR, floor.pause());
    row.profiles.push(Profile { label: FLOOR, steps: floor.profile() });
    row.note(format!("floor: {:.0} pages an epoch", floor.pages.median().unwrap_or(0.0)));
    for (label, pair) in &kinds {
        if *label == OURS {
            row.profiles.push(Profile { label: OURS, steps: pair.profile() });
        }
        row.column(*label, &pair.pause);
        note_pair(&mut row, label, pair);
    }
    if baselines.contains(&Cow::default())
        && let Some(stats) = row.stats(OURS).cloned()
    {
        // The default is one of the baselines: the same figures under its name.
        row.columns.push(crate::row::Column { label: name(Cow::default()).into(), stats });
    }
    Ok(row)
}

fn note_pair(row: &mut Row, label: &str, pair: &Protected) {
    let [pages, commit] =
        [&pair.pages, &pair.commit].map(|samples| samples.median().unwrap_or(0.0));
    row.note(format!(
        "{label}: {pages:.0} pages an epoch, committed {:.1} ms after the seal; {} epochs not seen",
        commit / 1000.0,
        pair.unseen
    ));
}

pub fn memory(effort: &Effort) -> Result<Row> {
    let row = Row::new("pause-16-gib", "1,000 scattered pages, 1 GiB and 16 GiB of memory", UNIT);
    let mut large_mib = if effort.is_full { MIB_LARGE } else { MIB_LARGE_QUICK };
    // Neither side touches more than the guest does, a small part; but each has to fit by itself.
    let room_mib = host::memory_mib("MemAvailable:").saturating_sub(2048);
    while large_mib > room_mib {
        large_mib /= 2;
    }
    if large_mib <= MIB_SMALL {
        return Ok(row.not_run("this host has no memory for a larger pair"));
    }
    let mut row = row;
    if large_mib < MIB_LARGE {
        let why = if effort.is_full { "this host has no more" } else { "quick" };
        row.note(format!("{} GiB instead of 16: {why}", large_mib / 1024));
    }
    let sizes = [("1 GiB", MIB_SMALL), (OURS, large_mib)];
    let mut pairs = Vec::new();
    for (label, memory_mib) in sizes {
        let spec = Spec { vcpus: 1, memory_mib, set: 1000, run: 1, sets: 1, epoch_ms: 25 };
        pairs.push((label, Protected::start(&spec, None)?));
    }
    for _ in 0..effort.turns {
        for (_, pair) in &mut pairs {
            pair.turn(effort.pauses, effort.limit)?;
        }
    }
    for (label, pair) in &pairs {
        row.profiles.push(Profile { label, steps: pair.profile() });
        row.column(*label, &pair.pause);
        note_pair(&mut row, label, pair);
    }
    let measure = format!("{} GiB / 1 GiB", large_mib / 1024);
    row.check_medians_as(measure, OURS, "1 GiB", Bound::AtMost(1.3));
    Ok(row)
}
