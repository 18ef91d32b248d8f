//! The rows, each in the order in which the table has it.

mod idle;
mod pause;
mod rate;
mod sync;
mod takeover;
mod wire;

use anyhow::Result;

use crate::Effort;
use crate::row::Row;

/// A row's name and how it is measured.
pub type Entry = (&'static str, fn(&Effort) -> Result<Row>);

pub const ALL: &[Entry] = &[
    ("pause-1k", pause::thousand),
    ("pause-10k-runs", pause::runs),
    ("pause-4-vcpus", pause::four),
    ("pause-16-vcpus", pause::sixteen),
    ("pause-16-gib", pause::memory),
    ("rate-compute-1", rate::compute_1),
    ("rate-compute-16", rate::compute_16),
    ("rate-1k-pages", rate::thousand),
    ("auto-fast-link", wire::auto),
    ("slow-link", wire::slow_link),
    ("first-sync", sync::first),
    ("first-sync-tls", sync::by_tls),
    ("latency", takeover::latency),
    ("takeover-kill", takeover::kill),
    ("takeover-silence", takeover::silence),
    ("wire-64-bytes", wire::delta),
    ("idle", idle::idle),
];
