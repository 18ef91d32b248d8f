//! The rows, each in the order in which the table has it.

mod pause;

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
];
