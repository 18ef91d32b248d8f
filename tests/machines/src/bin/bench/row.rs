//! A row of the table: what was measured, what was promised, and whether that is met.
//!
//! Always holds: a row that could not run has no figure, and says why.

use serde::Serialize;

use crate::samples::{Samples, Stats};

/// Column of the least that the machine can do.
pub const FLOOR: &str = "floor";
/// Column of our product as it is delivered.
pub const OURS: &str = "ours";

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// Nothing is promised: the figure is for the reader.
    Open,
}

/// Whether a promise is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Met,
    Missed,
    /// Nothing was promised, or nothing could be measured.
    Unknown,
}

/// One promise of a row.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What is held against the bound.
    pub what: String,
    pub value: Option<f64>,
    pub bound: Bound,
    pub verdict: Verdict,
}

#[derive(Clone, Debug, Serialize)]
pub struct Column {
    pub label: String,
    #[serde(flatten)]
    pub stats: Stats,
}

/// A step of a pause, medians in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub name: &'static str,
    pub us: f64,
}

/// A pause taken apart.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// Whose pause.
    pub label: &'static str,
    pub steps: Vec<Step>,
}

impl Profile {
    #[must_use]
    pub fn whole_us(&self) -> f64 {
        self.steps.iter().map(|step| step.us).sum()
    }

    /// Of one of its steps; none has this name: 0.
    #[must_use]
    pub fn us(&self, name: &str) -> f64 {
        self.steps.iter().filter(|step| step.name == name).map(|step| step.us).sum()
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: &'static str,
    pub what: String,
    pub unit: &'static str,
    /// Floor, baselines, ours, in this order.
    pub columns: Vec<Column>,
    pub checks: Vec<Check>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<Profile>,
    pub notes: Vec<String>,
    /// Cores that processes of others took while this was measured: it disturbs.
    pub others_cores: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_run: Option<String>,
}

impl Row {
    #[must_use]
    pub fn new(name: &'static str, what: impl Into<String>, unit: &'static str) -> Self {
        Self {
            name,
            what: what.into(),
            unit,
            columns: vec![],
            checks: vec![],
            profiles: vec![],
            notes: vec![],
            others_cores: 0.0,
            not_run: None,
        }
    }

    /// The row, without a figure, and why.
    #[must_use]
    pub fn not_run(mut self, why: impl Into<String>) -> Self {
        self.columns.clear();
        self.not_run = Some(why.into());
        self
    }

    /// Adds a column, if there is anything in it.
    pub fn column(&mut self, label: impl Into<String>, samples: &Samples) {
        if let Some(stats) = samples.stats() {
            self.columns.push(Column { label: label.into(), stats });
        }
    }

    /// The pause of one column taken apart, if it was.
    #[must_use]
    pub fn profile(&self, label: &str) -> Option<&Profile> {
        self.profiles.iter().find(|profile| profile.label == label)
    }

    #[must_use]
    pub fn stats(&self, label: &str) -> Option<&Stats> {
        self.columns.iter().find(|column| column.label == label).map(|column| &column.stats)
    }

    pub fn check(&mut self, what: impl Into<String>, value: Option<f64>, bound: Bound) {
        let is_met = value.and_then(|value| match bound {
            Bound::AtMost(most) => Some(value <= most),
            Bound::AtLeast(least) => Some(value >= least),
            Bound::Open => None,
        });
        let verdict = match is_met {
            Some(true) => Verdict::Met,
            Some(false) => Verdict::Missed,
            None => Verdict::Unknown,
        };
        self.checks.push(Check { what: what.into(), value, bound, verdict });
    }

    /// Holds the quotient of two columns' medians against a bound.
    pub fn check_medians(&mut self, above: &str, below: &str, bound: Bound) {
        self.check_medians_as(format!("{above} / {below}"), above, below, bound);
    }

    /// The same under another name.
    pub fn check_medians_as(&mut self, name: String, above: &str, below: &str, bound: Bound) {
        let value = self.quotient(above, below, |stats| stats.median);
        self.check(name, value, bound);
    }

    /// The same of their 99th percentiles.
    pub fn check_p99s(&mut self, above: &str, below: &str, bound: Bound) {
        let value = self.quotient(above, below, |stats| stats.p99);
        self.check(format!("{above} / {below}, p99"), value, bound);
    }

    fn quotient(&self, above: &str, below: &str, of: fn(&Stats) -> f64) -> Option<f64> {
        let (above, below) = (of(self.stats(above)?), of(self.stats(below)?));
        (below > 0.0).then(|| above / below)
    }

    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_met_missed_or_unknown() {
        let mut samples = Samples::default();
        let mut row = Row::new("r", "what", "us");
        row.column("empty", &samples);
        samples.add(vec![2.0]);
        row.column(FLOOR, &samples);
        samples.add(vec![3.0, 3.0]);
        row.column(OURS, &samples);
        row.check_medians(OURS, FLOOR, Bound::AtMost(1.5));
        row.check_medians(OURS, FLOOR, Bound::AtLeast(1.6));
        row.check_medians(OURS, "empty", Bound::AtMost(9.0));
        row.check_medians(OURS, FLOOR, Bound::Open);
        let verdicts: Vec<_> = row.checks.iter().map(|check| check.verdict).collect();
        assert_eq!(verdicts, [Verdict::Met, Verdict::Missed, Verdict::Unknown, Verdict::Unknown]);
        assert_eq!(row.checks[3].value, Some(1.5));
        assert!(row.not_run("no KVM").columns.is_empty());
    }
}
