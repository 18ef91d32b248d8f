//! All checks of what a crowd saw and what the disk holds.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::history::Operation;
use super::linear::{self, Extent};
use super::log;
use super::violation::Violation;

/// Of all keys of a round; it takes a fraction of a second.
const SEARCH_LIMIT: Duration = Duration::from_secs(60);

/// What was found.
#[derive(Debug, Default)]
pub struct Verdict {
    pub violations: Vec<Violation>,
    /// What was looked through, of a linearizable history.
    pub extent: Option<Extent>,
    /// How many records a whole log has.
    pub records: Option<usize>,
}

/// Holds the history against the semantics of a register, and against the log where there is one.
pub fn judge(operations: &[Operation], image: Option<&Path>) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    match linear::check(operations, SEARCH_LIMIT) {
        Ok(extent) => verdict.extent = Some(extent),
        Err(violation) => verdict.violations.push(violation),
    }
    if let Some(image) = image {
        let records = log::read(image)?;
        verdict.records = records.as_ref().ok().map(Vec::len);
        let checked = records.and_then(|records| log::check(&records, operations));
        verdict.violations.extend(checked.err());
    }
    Ok(verdict)
}
